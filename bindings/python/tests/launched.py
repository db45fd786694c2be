"""What a rank of test_processes.py and test_cuda.py does, started by torchrun, mpirun or multiprocessing: some cases by all communication types, results
into files. With a second argument, auto, nccl or staged, ranks are on CUDA devices and data moves that way."""

import os
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import context_parallel as cp
from corpus import cases
from ranks import run_case

CUDA_CASES = (("causal_33_gqa3", "bfloat16"), ("thd_padded_between", "float16"), ("bias_and_everything", "bfloat16"))
CASES = (("causal_33_gqa3", "float32"), ("pad_left", "bfloat16"), ("thd_padded_between", "float16"), ("bias_and_everything", "bfloat16"))
COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")


def rank(group, folder, index=None):
    """index: of the CUDA device."""
    for name, dtype in CASES if index is None else CUDA_CASES:
        for comm in COMMS:
            found = run_case(group, cases()[name], dtype, comm) if index is None else on_device(group, cases()[name], dtype, comm, index)
            arrays = {f"{key}.{part}": array for key, pair in found.items() for part, array in zip(("rows", "tokens"), pair)}
            # np.save knows no bfloat16; fp32 holds it.
            arrays = {key: array.astype(np.float32) if key.endswith("rows") else array for key, array in arrays.items()}
            np.savez(Path(folder) / f"{name}.{comm}.{group.rank}.npz", **arrays)
    group.barrier()


def on_device(group, case, dtype, comm, index):
    import devices

    stream = devices.Stream(index)
    view = lambda x: devices.DLPackArray(x, index)
    found = run_case(group, case, dtype, comm, view=view, preallocate=True, stream=stream, device=("cuda", index))
    stream.synchronize()
    return {key: (np.asarray(array), tokens) for key, (array, tokens) in found.items()}


def member(pipe, number, size, folder):
    """A process of multiprocessing: the unique id comes through the pipe."""
    id = cp.unique_id() if number == 0 else pipe.recv_bytes()
    if number == 0:
        pipe.send_bytes(id)
    with cp.Group.from_id(id, number, size, transport="shm", timeout=60) as group:
        rank(group, folder)


def waiter(pipe, number):
    """Rank 1 says that it is there, then waits in a barrier that rank 0, killed by the test, never comes to."""
    id = cp.unique_id() if number == 0 else pipe.recv_bytes()
    if number == 0:
        pipe.send_bytes(id)
    group = cp.Group.from_id(id, number, 2, timeout=60)
    pipe.send_bytes(b"joined")
    if number == 0:
        pipe.recv_bytes()  # for ever
    try:
        group.barrier()
    except cp.Error as error:
        pipe.send_bytes(f"{error.status.name} {error}".encode())


def trader(pipe, rank, size):
    """A process that trades sequence for heads and back, and compares. Rank 0 sends the id, the others get it."""
    id = cp.unique_id() if rank == 0 else pipe.recv_bytes()
    if rank == 0:
        pipe.send_bytes(id)
    with cp.Group.from_id(id, rank, size, "shm", timeout=30) as group:
        sequences = cp.Sequences.packed([0, 7, 20, 33], padded=[0, 9, 22, 40])
        whole = np.arange(40 * 6 * 5, dtype=np.float32).reshape(40, 6, 5)
        for first, last in ((7, 9), (22, 22), (35, 40)):
            whole[first:last] = 0
        tokens = cp.partition_tokens("zigzag", "thd", sequences, size, rank)
        how = dict(format="thd", partition="zigzag")
        for _ in range(3):
            found = cp.sequence_to_heads(group, whole[tokens], sequences, **how)
            mine = cp.heads_of_rank(6, size, rank)
            assert (found == whole[:, mine.start : mine.stop]).all()
            assert (cp.heads_to_sequence(group, found, sequences, **how) == whole[tokens]).all()


if __name__ == "__main__":
    settings, index = {}, None
    if len(sys.argv) > 2:
        import devices

        local = next(int(os.environ[name]) for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK") if name in os.environ)
        index = local % devices.count()
        settings = {"transport": sys.argv[2], "device": ("cuda", index)}
    with cp.Group.from_env(timeout=60, **settings) as group:
        rank(group, sys.argv[1], index)
        print(f"rank {group.rank} of {group.size}: done")
