#!/usr/bin/env python3
"""Makes the CUDA build of PyTorch load on a machine without any NVIDIA library.

PyPI offers only that build for Linux; its CPU half is complete, but the dynamic loader insists on some five gigabytes of NVIDIA
libraries that a CPU run never calls. This writes an empty-bodied library for each of them into torch/lib, which is on the run path
of PyTorch's own libraries, so no environment variable is needed. Every function of a stand-in returns 100, which is CUDA's own
"no device is detected": torch.cuda.is_available() is False.

usage: torch_stubs.py SITE_PACKAGES   (needs readelf and cc)
"""

import pathlib
import re
import subprocess
import sys
import tempfile
from collections import defaultdict

# What every Linux machine with a C++ compiler has.
SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s|z|quadmath|util)\.so|ld-linux")


def readelf(*arguments):
    return subprocess.run(["readelf", "-W", *arguments], capture_output=True, text=True, check=True).stdout


def needed_versions(library):
    """Symbol version → the library that must define it, from the table of needed versions."""
    owner, file = {}, None
    for line in readelf("-V", library).splitlines():
        if found := re.search(r"\bFile: (\S+)", line):
            file = found[1]
        elif file and (found := re.search(r"\bName: (\S+)\s+Flags:", line)):
            owner[found[1]] = file
    return owner


def dynamic_symbols(library):
    """(name, version or None, is it defined here?) of every dynamic symbol that must be resolved."""
    for line in readelf("--dyn-syms", library).splitlines():
        # Num: Value Size Type Bind Vis Ndx Name
        fields = line.split()
        if len(fields) < 8 or fields[4] != "GLOBAL":
            continue
        name, _, version = fields[7].partition("@")
        yield name, version.lstrip("@") or None, fields[6] != "UND"


def survey(libraries):
    """Missing library → version → names it must define. Names without a version may come from any library: they go to the first."""
    present = {library.name for library in libraries}
    missing, undefined, defined, owner = set(), set(), set(), {}
    for library in libraries:
        missing.update(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", library)))
        owner.update(needed_versions(library))
        for name, version, here in dynamic_symbols(library):
            if here:
                defined.add(name)
            else:
                undefined.add((name, version))
    missing = sorted(name for name in missing - present if not SYSTEM.match(name))
    wanted = {name: defaultdict(set) for name in missing}
    for name, version in undefined:
        if name in defined or re.match("_?Py", name):
            continue
        if version is None:
            wanted[missing[0]][None].add(name)
        elif owner.get(version) in wanted:
            wanted[owner[version]][version].add(name)
    return wanted


def build(soname, versions, folder, scratch):
    source, script = scratch / "stub.c", scratch / "stub.map"
    names = sorted(set().union(*versions.values()))
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))
    nodes = [f"{version} {{ global: {'; '.join(sorted(names))}; }};" for version, names in versions.items() if version]
    script.write_text("\n".join(nodes) + "\n")
    command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", "-nostdlib", f"-Wl,-soname,{soname}"]
    if nodes:
        command.append(f"-Wl,--version-script={script}")
    subprocess.run([*command, "-o", str(folder / soname), str(source)], check=True)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1]) / "torch" / "lib"
    libraries = sorted(path for path in folder.glob("lib*.so*") if path.is_file())
    if not libraries:
        sys.exit(f"torch_stubs.py: no libraries in {folder}")
    wanted = survey(libraries)
    with tempfile.TemporaryDirectory() as scratch:
        for soname, versions in wanted.items():
            build(soname, versions, folder, pathlib.Path(scratch))
    count = sum(len(names) for versions in wanted.values() for names in versions.values())
    print(f"torch: {len(wanted)} stand-ins for NVIDIA libraries, {count} functions")


if __name__ == "__main__":
    main()
