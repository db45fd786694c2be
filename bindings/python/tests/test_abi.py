"""_abi.py and _lib.py against include/context_parallel.h, by the C compiler."""

import ctypes
import os
import re
import subprocess
import sys

import pytest

from context_parallel import Status, _abi, _lib
from corpus import ROOT

pytestmark = pytest.mark.fast

HEADER = (ROOT / "include/context_parallel.h").read_text()
# Structs that Python has no use for: a transport of the caller's own is C's.
C_ONLY = {"cp_piece", "cp_message", "cp_transport_ops"}


def test_struct_layouts(tmp_path):
    names = set(re.findall(r"^typedef struct (cp_\w+) \{", HEADER, re.M))
    assert names - C_ONLY == {name for name, x in vars(_abi).items() if name.startswith("cp_") and isinstance(x, type) and issubclass(x, ctypes.Structure)}
    expected, lines = [], []
    for name in sorted(names - C_ONLY):
        struct = getattr(_abi, name)
        lines.append(f'    printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, _ in struct._fields_:
            offset = getattr(struct, field)
            lines.append(f'    printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));')
            expected.append(f"{name}.{field} {offset.offset} {offset.size}")
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    source.write_text('#include <stdio.h>\n#include "context_parallel.h"\nint main(void) {\n' + "\n".join(lines) + "\n    return 0;\n}\n")
    subprocess.run([os.environ.get("CC", "cc"), "-I", ROOT / "include", source, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split("\n")
    assert printed[:-1] == expected


def test_all_fields_are_mirrored():
    for name, body in re.findall(r"^typedef struct (cp_\w+) \{(.*?)^\} \1;", HEADER, re.M | re.S):
        if name not in C_ONLY:
            code = re.sub(r"//.*", "", body)
            assert re.findall(r"(\w+)(?:\[\d+\])?;", code) == [field for field, _ in getattr(_abi, name)._fields_], name


def test_constants():
    in_header = {name: int(value, 0) for name, value in re.findall(r"^#define (CP_\w+) (\w+)$", HEADER, re.M)}
    assert in_header == {name: value for name, value in vars(_abi).items() if name.startswith("CP_")}
    assert {f"CP_ERR_{s.name}": s.value for s in Status} == {n: v for n, v in in_header.items() if n.startswith("CP_ERR_")}


def test_functions():
    code = re.sub(r"//.*", "", HEADER)
    declared = {name: arguments.split(",") for name, arguments in re.findall(r"^[\w ]+[ *](cp_\w+)\(([^;]*)\);", code, re.M)}
    assert declared.keys() == _lib.FUNCTIONS.keys()
    for name, arguments in declared.items():
        assert len(_lib.FUNCTIONS[name][1]) == (0 if arguments == ["void"] else len(arguments)), name


def import_with(**environment):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import context_parallel"
    return subprocess.run([sys.executable, "-c", code, ROOT / "bindings/python"], env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_library_that_is_not_there():
    result = import_with(CONTEXT_PARALLEL_LIB="/nowhere/libcontext_parallel.so")
    assert "ImportError" in result.stderr and "/nowhere/libcontext_parallel.so" in result.stderr


def test_another_version_is_refused(tmp_path):
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text("unsigned cp_version(void) { return 7003001; }\n")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", source, "-o", library], check=True)
    result = import_with(CONTEXT_PARALLEL_LIB=str(library))
    assert "ImportError" in result.stderr and "is version 7.3, this package needs 0.1" in result.stderr


def test_importing_needs_neither_torch_nor_ml_dtypes():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import context_parallel; print({'torch', 'ml_dtypes'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code, ROOT / "bindings/python"], check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"
