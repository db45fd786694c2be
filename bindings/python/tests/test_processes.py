"""Ranks as processes: by multiprocessing, torchrun, and mpirun of Open MPI and of MPICH; a process that is killed."""

import glob
import multiprocessing
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from corpus import ROOT, cases, check
from launched import CASES, COMMS, member, waiter
from ranks import collect

SCRIPT = ROOT / "bindings/python/tests/launched.py"
EXAMPLE = ROOT / "bindings/python/example.py"
CUDA_EXAMPLE = ROOT / "bindings/python/example_cuda.py"


def leftovers():
    return set(glob.glob("/dev/shm/*context*") + glob.glob("/dev/shm/cp*") + glob.glob("/tmp/context_parallel*"))


def check_results(folder, size, of=CASES):
    for name, dtype in of:
        for comm in COMMS:
            of_ranks = []
            for rank in range(size):
                with np.load(folder / f"{name}.{comm}.{rank}.npz") as file:
                    of_ranks.append({key: (file[f"{key}.rows"], file[f"{key}.tokens"]) for key in sorted({name.split(".")[0] for name in file})})
            case = cases()[name]
            check(case, dtype, collect(case, of_ranks, case.format))


def launch(command, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "PMIX_", "OMPI_COMM_")) and k not in ("RANK", "WORLD_SIZE")}
    environment = {**clean, "PYTHONPATH": str(ROOT / "bindings/python"), "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def mpirun(name):
    variable = {"openmpi": "OPENMPI_BIN", "mpich": "MPICH_BIN"}[name]
    assert variable in os.environ, f"{variable} is not set: source tests/env.sh (after tests/setup)"
    return os.path.join(os.environ[variable], "mpirun")


def done(printed):
    """(rank, size) of every rank that came to its end. Launchers may mix the lines of ranks."""
    return sorted(re.findall(r"rank (\d) of (\d): done", printed))


def spawn(target, arguments):
    context = multiprocessing.get_context("spawn")
    return [context.Process(target=target, args=a) for a in arguments]


@pytest.mark.parametrize("size", [2, 3])
def test_multiprocessing(size, tmp_path):
    before = leftovers()
    # Rank 0 sends the id here, and it is sent on to all others.
    pipes = [multiprocessing.get_context("spawn").Pipe() for _ in range(size)]
    processes = spawn(member, [(pipes[r][1], r, size, str(tmp_path)) for r in range(size)])
    for process in processes:
        process.start()
    id = pipes[0][0].recv_bytes()
    for mine, _ in pipes[1:]:
        mine.send_bytes(id)
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * size
    check_results(tmp_path, size)
    assert leftovers() == before


def test_a_killed_process_is_named():
    before = leftovers()
    pipes = [multiprocessing.get_context("spawn").Pipe() for _ in range(2)]
    processes = spawn(waiter, [(pipes[r][1], r) for r in range(2)])
    for process in processes:
        process.start()
    pipes[1][0].send_bytes(pipes[0][0].recv_bytes())
    assert [mine.recv_bytes() for mine, _ in pipes] == [b"joined"] * 2
    time.sleep(0.1)
    processes[0].kill()
    killed = time.monotonic()
    assert pipes[1][0].poll(20), "rank 1 waits on"
    text = pipes[1][0].recv_bytes().decode()
    assert text.startswith("PEER_LOST") and "rank 0" in text, text
    assert time.monotonic() - killed < 10
    for process in processes:
        process.join(10)
    assert leftovers() == before


def test_torchrun(torch, tmp_path):
    printed = launch([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, SCRIPT, tmp_path])
    assert done(printed) == [("0", "2"), ("1", "2")]
    check_results(tmp_path, 2)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_mpirun(mpi, size, tmp_path):
    printed = launch([mpirun(mpi), "-n", size, sys.executable, SCRIPT, tmp_path])
    assert done(printed) == [(str(rank), str(size)) for rank in range(size)]
    check_results(tmp_path, size)


def errors_of_example(printed):
    errors = [float(text) for text in re.findall(r"max error (\d\.\de[-+]\d+)", printed)]
    return len(errors), max(errors)


def test_example_under_mpirun():
    count, worst = errors_of_example(launch([mpirun("mpich"), "-n", 3, sys.executable, EXAMPLE]))
    assert count == 12 and worst < 1e-4


def test_example_under_torchrun(torch):
    count, worst = errors_of_example(launch([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, EXAMPLE]))
    assert count == 8 and worst < 1e-4


def test_cuda_example_without_gpus(torch):
    """One rank and two: the gradient as a whole has the same norm."""
    norms = []
    for ranks in (1, 2):
        printed = launch([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, CUDA_EXAMPLE])
        found = re.findall(r"tokens, gradient norm (\d+\.\d+)", printed)
        assert len(found) == ranks, printed
        norms.append(sum(float(norm) ** 2 for norm in found) ** 0.5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
