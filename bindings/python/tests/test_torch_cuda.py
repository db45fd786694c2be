"""torch CUDA tensors on machines whose torch has CUDA: tests/gpu/torch_tensors.py, and cases of the corpus. Elsewhere test_cuda.py tests the same calls on
a stand-in for torch."""

import os
import subprocess
import sys

import pytest

import context_parallel as cp
from context_parallel import _lib
from corpus import ROOT, cases, check
from ranks import collect, everywhere, run_case
from test_torch import AsArray, to_torch


@pytest.fixture
def cuda_torch(torch):
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here; runs on a machine with a GPU")
    return torch


def test_torch_tensors(torch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bindings/python"), "CONTEXT_PARALLEL_LIB": str(_lib.path)}
    found = subprocess.run([sys.executable, ROOT / "tests/gpu/torch_tensors.py"], env=environment, capture_output=True, text=True, timeout=600)
    if found.returncode == 77:
        pytest.skip(f"{found.stdout.strip()}; runs on a machine with a GPU")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name, comm", [("causal_101_sbhd", "p2p"), ("pad_left", "all_gather"), ("thd_padded_between", "a2a"), ("gqa_8_2", "a2a+p2p")])
def test_corpus(cuda_torch, name, comm):
    torch, case = cuda_torch, cases()[name]
    groups = cp.Group.threads(2, "local", timeout=60, device="cuda:0")

    def work(group):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = run_case(group, case, "bfloat16", comm, view=lambda x: to_torch(torch, x).cuda(), device="cuda:0")
        stream.synchronize()
        return {key: (AsArray(x.cpu()), tokens) for key, (x, tokens) in found.items()}

    check(case, "bfloat16", collect(case, everywhere(groups, work), case.format))
