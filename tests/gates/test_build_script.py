"""build.rs by itself: which nvcc it takes, what it asks of it, what it keeps. A small script stands in for nvcc."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NVCC = r"""#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release ${FAKE%.*}, V${FAKE:=13.0.88}"; exit; }
echo "$@" >>"$CALLS"
for last; do :; done
grep -q BROKEN "$last" && { echo "$last(1): error: broken" >&2; exit 2; }
while [ "$1" != -o ]; do shift; done
echo fat >"$2"
echo "ptxas info    : Compiling entry function 'kernel_of_$(basename "$last" .cu)' for 'sm_80'" >&2
"""


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "build_script"
    subprocess.run(["rustc", "--edition", "2024", "-o", path, ROOT / "build.rs"], check=True)
    return path


class Project:
    """A folder with kernels, in which the build script runs in an empty environment."""

    def __init__(self, program, folder):
        self.program, self.folder, self.calls_file = program, folder, folder / "calls"
        self.out = folder / "target/debug/build/context_parallel-0/out"
        self.out.mkdir(parents=True)
        self.write("kernels/rows.cu", '#include "shared.cuh"\n')
        self.write("kernels/wide_big.cu", '#include <stdint.h>\n#  include "wide.cuh"\n')
        self.write("kernels/wide_small.cu", '#include "wide.cuh"\n')
        self.write("kernels/shared.cuh", "")
        self.write("kernels/wide.cuh", '#include "shared.cuh"\n')

    def write(self, path, text):
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def nvcc(self, path):
        path = self.write(path, NVCC)
        path.chmod(0o755)
        return path

    def run(self, out=None, **variables):
        out = out or self.out
        out.mkdir(parents=True, exist_ok=True)
        environment = {"OUT_DIR": str(out), "CARGO_MANIFEST_DIR": str(self.folder), "NUM_JOBS": "2", "CALLS": str(self.calls_file), "PATH": "/usr/bin:/bin"}
        self.calls_file.write_text("")
        result = subprocess.run([self.program], cwd=self.folder, env=environment | {k: str(v) for k, v in variables.items()}, capture_output=True, text=True)
        self.stdout, self.stderr, self.calls = result.stdout, result.stderr, self.calls_file.read_text().splitlines()
        self.list = (out / "cuda_images.rs").read_text() if result.returncode == 0 else ""
        return result.returncode

    def compiled(self):
        return sorted(pathlib.Path(call.split()[-1]).name for call in self.calls)


@pytest.fixture
def project(program, tmp_path):
    return Project(program, tmp_path)


no_cuda_here = pytest.mark.skipif(
    os.path.exists("/usr/local/cuda/bin/nvcc") or shutil.which("nvcc", path="/usr/bin:/bin") is not None, reason="this machine has an nvcc of its own"
)


@no_cuda_here
def test_without_nvcc(project):
    assert project.run() == 0
    assert "NVCC: Option<&str> = None" in project.list and "Image {" not in project.list
    assert "cargo:warning=built without CUDA kernels" in project.stdout
    assert project.run(CP_CUDA="off") == 0 and "cargo:warning" not in project.stdout
    assert project.run(CP_CUDA="require") == 1
    assert "no nvcc in NVCC" in project.stderr and "kernels/setup" in project.stderr


def test_off_compiles_nothing(project):
    assert project.run(CP_CUDA="off", NVCC=project.nvcc("nvcc")) == 0
    assert not project.calls and "NVCC: Option<&str> = None" in project.list


@pytest.mark.parametrize("variable, value, place", [
    ("NVCC", "some/nvcc", "some/nvcc"),
    ("CUDA_HOME", "toolkit", "toolkit/bin/nvcc"),
    ("CUDA_PATH", "toolkit", "toolkit/bin/nvcc"),
    ("VIRTUAL_ENV", "venv", "venv/lib/python3.11/site-packages/nvidia/cu13/bin/nvcc"),
    ("UNUSED", "", ".venv/cuda/lib/python3.12/site-packages/nvidia/cu13/bin/nvcc"),
    ("PATH", "tools", "tools/nvcc"),
])
def test_places(project, variable, value, place):
    nvcc = project.nvcc(place)
    value = f"{project.folder / value}:/usr/bin:/bin" if variable == "PATH" else project.folder / value
    assert project.run(**{"CP_CUDA": "require", variable: value}) == 0, project.stderr
    assert f"cargo:rerun-if-changed={nvcc}\n" in project.stdout
    assert 'Some("13.0.88")' in project.list


def test_links_are_resolved(project):
    nvcc = project.nvcc("toolkit/bin/nvcc")
    (project.folder / "tools").mkdir()
    (project.folder / "tools/nvcc").symlink_to(nvcc)
    assert project.run(CP_CUDA="require", PATH=f"{project.folder}/tools:/usr/bin:/bin") == 0
    assert f"cargo:rerun-if-changed={nvcc}\n" in project.stdout


def test_earlier_places_win(project):
    named = project.nvcc("a/nvcc")
    project.nvcc("b/bin/nvcc")
    assert project.run(NVCC=named, CUDA_HOME=project.folder / "b") == 0
    assert f"cargo:rerun-if-changed={named}\n" in project.stdout


def test_wrong_words_are_refused(project):
    nvcc = project.nvcc("nvcc")
    assert project.run(CP_CUDA="yes") == 1
    assert 'CP_CUDA: got "yes", allowed auto, require, off' in project.stderr
    assert project.run(NVCC=nvcc, CP_CUDA_ARCHS="80,75") == 1
    assert 'got "75", allowed 80, 90, 100, 120, ptx' in project.stderr
    # What the caller named is never passed over.
    assert project.run(NVCC=project.folder / "nowhere") == 1
    assert "nowhere" in project.stderr


def test_old_compilers_are_refused(project):
    assert project.run(NVCC=project.nvcc("nvcc"), FAKE="12.4.131") == 1
    assert "is CUDA 12.4.131, needed 12.8 or later" in project.stderr


def test_architectures_follow_names(project):
    assert project.run(NVCC=project.nvcc("nvcc")) == 0
    archs = {pathlib.Path(c.split()[-1]).name: [w.split("code=")[1] for w in c.split() if w.startswith("arch=")] for c in project.calls}
    assert archs == {
        "rows.cu": ["sm_80", "sm_90", "sm_100", "sm_120", "compute_80"],
        "wide_big.cu": ["sm_80", "sm_90", "sm_100"],
        "wide_small.cu": ["sm_80", "sm_120", "compute_80"],
    }
    assert 'name: "wide_small", archs: ["80", "120", "ptx"], kernels: ["kernel_of_wide_small"]' in project.list.replace("&", "")
    assert project.run(NVCC=project.nvcc("nvcc"), CP_CUDA_ARCHS="90, ptx") == 0
    assert project.compiled() == ["rows.cu", "wide_big.cu"]
    assert "wide_small" not in project.list


def test_only_what_changed_is_compiled(project):
    nvcc = project.nvcc("nvcc")
    assert project.run(NVCC=nvcc) == 0 and project.compiled() == ["rows.cu", "wide_big.cu", "wide_small.cu"]
    list_before = project.list
    assert project.run(NVCC=nvcc) == 0 and project.compiled() == [] and project.list == list_before
    # The other profile shares the cache.
    release = project.folder / "target/release/build/context_parallel-1/out"
    assert project.run(out=release, NVCC=nvcc) == 0 and project.compiled() == []
    assert (release / "rows.fatbin").read_text() == "fat\n"
    project.write("kernels/wide.cuh", '#include "shared.cuh"\n// changed\n')
    assert project.run(NVCC=nvcc) == 0 and project.compiled() == ["wide_big.cu", "wide_small.cu"]
    project.write("kernels/shared.cuh", "// changed\n")
    assert project.run(NVCC=nvcc) == 0 and len(project.calls) == 3
    assert project.run(NVCC=nvcc, FAKE="13.0.89") == 0 and len(project.calls) == 3


def test_a_failure_is_shown_and_not_kept(project):
    nvcc = project.nvcc("nvcc")
    project.write("kernels/rows.cu", "BROKEN")
    for _ in range(2):
        assert project.run(NVCC=nvcc) == 1
        assert "could not compile kernels/rows.cu" in project.stderr and "error: broken" in project.stderr
    project.write("kernels/rows.cu", "")
    assert project.run(NVCC=nvcc) == 0 and project.compiled() == ["rows.cu"]
