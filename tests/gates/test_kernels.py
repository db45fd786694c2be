"""The gates of kernels.py hold: each planted fault is refused, for its reason, on every architecture."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
import kernels as gates  # noqa: E402

WANTED = {
    "cp_forward_bf16_right": None,
    "cp_forward_bf16_no_ldmatrix": "no LDSM.16.M88.4 (ldmatrix_x4)",
    "cp_forward_bf16_no_copy": "no LDGSTS.E.BYPASS.128 (cp_async_16)",
    "cp_forward_bf16_no_exp2": "no MUFU.EX2 (exp2_approx)",
    "cp_forward_bf16_other_type": "0 tensor core instructions for bf16, 1 for the other type",
    "cp_forward_f16_other_type": "0 tensor core instructions for f16, 1 for the other type",
    "cp_backward_bf16_no_add": "no RED.E.ADD.F32 (add_global)",
    "cp_expand_bf16_no_copy": "no LDGSTS.E.BYPASS.128 (cp_async_16)",
    "cp_contract_latent_f16_other_type": "0 tensor core instructions for f16, 1 for the other type",
    "cp_delta_no_bounds": "no launch bounds",
    "cp_delta_local": "local memory: stack 128 bytes",
    "cp_delta_spills": "local memory",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    nvcc = next(ROOT.glob(".venv/cuda/lib/python3*/site-packages/nvidia/cu13/bin/nvcc"), None) or os.environ.get("NVCC")
    assert nvcc, "no nvcc: run kernels/setup"
    file = tmp_path_factory.mktemp("planted") / "planted.fatbin"
    archs = [word for arch in sorted(gates.ARCHS) for word in ("-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}")]
    subprocess.run([nvcc, "--fatbin", "-std=c++17", "-O3", f"-I{ROOT / 'kernels'}", *archs, "-o", file, HERE / "planted.cu"], check=True)
    return file


@pytest.fixture(scope="module")
def found(planted):
    return gates.read(str(planted))[0]


@pytest.mark.parametrize("name", WANTED)
def test_a_planted_fault_is_refused(found, name):
    for arch in gates.ARCHS:
        faults = gates.faults(name, arch, found[name, arch])
        if WANTED[name] is None:
            assert not faults
        else:
            assert len(faults) == 1 and WANTED[name] in faults[0], (arch, faults)


def test_what_is_not_read_is_refused():
    assert gates.faults("cp_delta", "sm_80", gates.Kernel())


def test_the_program_fails(planted):
    run = subprocess.run([sys.executable, HERE / "kernels.py", planted], capture_output=True, text=True)
    assert run.returncode == 1 and f"{len(WANTED) * len(gates.ARCHS)} kernels" in run.stdout
    assert "FAILED cp_delta_no_bounds sm_90: no launch bounds" in run.stdout


def test_missing_kernels_are_named():
    every = {(name, arch): None for arch in gates.ARCHS for name in gates.ROW_KERNELS}
    for operation in ("forward", "backward"):
        for storage in ("bf16", "f16"):
            every |= {(f"cp_{operation}_{storage}_{dim}{more}", arch): None for dim in gates.DIMS for more in ("", "_score") for arch in gates.ARCHS}
    of_latents = [f"cp_{operation}_{storage}" for operation in gates.LATENT_KERNELS for storage in ("bf16", "f16")]
    every |= {(name, arch): None for name in of_latents for arch in gates.ARCHS}
    assert gates.missing(every) == []
    # Two sets of one shape: each has its own architectures.
    small = dict(every)
    del small["cp_backward_f16_256", "sm_120"]
    assert gates.missing(small) == ["cp_backward_f16_256: not there for sm_120"]
    small["cp_backward_f16_256_small", "sm_120"] = None
    assert gates.missing(small) == ["cp_backward_f16_256_small: not there for sm_80"]
    small["cp_backward_f16_256_small", "sm_80"] = None
    assert gates.missing(small) == []
    assert gates.missing({**every, ("cp_new", "sm_80"): None}) == ["cp_new: not a kernel of this library"]
