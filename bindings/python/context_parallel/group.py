"""Groups: ranks that compute together."""

import ctypes
import os
import threading
from ctypes import byref, c_uint32, c_void_p

from . import _abi, _device
from ._lib import Handle, argument_error, check, lib, number

_TRANSPORTS = {
    "auto": _abi.CP_TRANSPORT_AUTO,
    "local": _abi.CP_TRANSPORT_LOCAL,
    "shm": _abi.CP_TRANSPORT_SHM,
    "nccl": _abi.CP_TRANSPORT_NCCL,
    "staged": _abi.CP_TRANSPORT_STAGED,
}


def unique_id():
    """128 bytes that name one new group. Rank 0 makes them, in its own process, and gives them to all ranks by any means."""
    made = _abi.cp_unique_id()
    check(lib.cp_get_unique_id(byref(made)))
    return bytes(made.bytes)


class Group:
    """Ranks that compute together. Made by from_env, from_id, from_allgather, from_nccl, threads or subset, never directly.

    One thread at a time uses a group and its subsets; only abort() may come from another. Collective methods are called by all ranks in the same
    order. `timeout`, in seconds, is the deadline of every wait (None: 300).

    On CUDA, for all ways to make one: device: this rank's, as for Attention. transport: "nccl" (a device per rank; "auto" between processes, where NCCL is
    found), "local" (ranks are threads; several may share a device), "staged" (through the host, slow). nccl_comm: the caller's ncclComm_t, as an
    integer; it stays the caller's. nccl_library: file of libnccl.so.2 (None: CP_NCCL, one that the process has, or what is installed). agree: ranks compare
    every call before it also over NCCL, so that wrong arguments are named everywhere: for debugging, hosts wait for each other.
    """

    def __init__(self, pointer):
        self._handle = Handle(self, "group", pointer, lib.cp_group_destroy)
        value = c_uint32()
        self._handle.call(lib.cp_group_rank, byref(value))
        self.rank = value.value
        self._handle.call(lib.cp_group_size, byref(value))
        self.size = value.value
        ranks = (c_uint32 * self.size)()
        self._handle.call(lib.cp_group_global_ranks, ranks, self.size)
        self.global_ranks = list(ranks)

    @classmethod
    def _init(cls, transport, timeout, *, device=None, nccl_comm=None, nccl_library=None, agree=False, **fields):
        if transport not in _TRANSPORTS:
            raise argument_error(f"transport: got {transport!r}, allowed {', '.join(map(repr, _TRANSPORTS))}")
        # 0 means the default to the library, so the shortest deadline is a millisecond.
        milliseconds = 0 if timeout is None else max(1, round(timeout * 1000))
        fields["device_type"], fields["device_id"] = _device.device(device)
        if nccl_comm is not None:
            if not hasattr(nccl_comm, "__index__") or not 0 < nccl_comm.__index__() < 1 << 64:
                raise argument_error(f"nccl_comm: got {nccl_comm!r}, need the address of an ncclComm_t")
            fields["nccl_comm"] = nccl_comm.__index__()
        if nccl_library is not None:
            fields["nccl_library"] = os.fsencode(nccl_library)
        fields["flags"] = _abi.CP_GROUP_AGREE if agree else 0
        config = _abi.cp_group_config(transport_kind=_TRANSPORTS[transport], timeout_ms=milliseconds, **fields)
        pointer = c_void_p()
        check(lib.cp_group_init(byref(config), byref(pointer)))
        return cls(pointer.value)

    @classmethod
    def from_env(cls, transport="auto", timeout=None, **cuda):
        """The ranks that torchrun or mpirun started (Open MPI, MPICH). Collective."""
        return cls._init(transport, timeout, bootstrap=_abi.CP_BOOTSTRAP_ENV, **cuda)

    @classmethod
    def from_id(cls, id, rank, size, transport="auto", timeout=None, **cuda):
        """The ranks that were given the same unique_id(). Collective."""
        if len(id) != 128:
            raise argument_error(f"id: got {len(id)} bytes, unique_id() makes 128")
        made = _abi.cp_unique_id.from_buffer_copy(id)
        return cls._init(transport, timeout, rank=number("rank", rank), size=number("size", size), id=ctypes.pointer(made), **cuda)

    @classmethod
    def from_nccl(cls, nccl_comm, device, timeout=None, **cuda):
        """The ranks of the caller's NCCL communicator (an ncclComm_t as an integer), which know each other already. Collective."""
        return cls._init("nccl", timeout, nccl_comm=nccl_comm, device=device, **cuda)

    @classmethod
    def from_allgather(cls, rank, size, allgather, transport="auto", timeout=None, **cuda):
        """The ranks that share a collective of the caller's: allgather(mine: bytes) returns the bytes of all ranks in order. Collective.

        With torch.distributed: `def allgather(mine): all = [None] * size; dist.all_gather_object(all, mine); return all`.
        """
        raised = []

        def callback(_, mine, all, count):
            try:
                parts = list(allgather(ctypes.string_at(mine, count)))
                if len(parts) != size or any(len(part) != count for part in parts):
                    raise argument_error(f"allgather: returned lengths {[len(p) for p in parts]}, must be {size} times {count} bytes")
                ctypes.memmove(all, b"".join(parts), count * size)
                return 0
            except BaseException as error:  # Nothing may pass through C; it is raised below.
                raised.append(error)
                return 1

        function = _abi.cp_allgather_fn(callback)  # Lives until the call that uses it has returned.
        try:
            return cls._init(transport, timeout, rank=number("rank", rank), size=number("size", size), allgather=function, **cuda)
        except RuntimeError as error:
            if raised:
                raise raised[0] from error
            raise

    @classmethod
    def threads(cls, size, transport="auto", timeout=None, *, device=None, **cuda):
        """Groups for `size` threads of this process, one per rank: [group of rank 0, …]. Not collective. device: one for all, or a list of one for each."""
        id, made = unique_id(), [None] * size
        devices = device if isinstance(device, list) else [device] * size
        if len(devices) != size:
            raise argument_error(f"device: got a list of {len(devices)}, need {size}")

        def join(rank):
            try:
                made[rank] = cls.from_id(id, rank, size, transport, timeout, device=devices[rank], **cuda)
            except Exception as error:
                made[rank] = error

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for group in made:
            if isinstance(group, Exception):
                raise group
        return made

    def subset(self, ranks):
        """The group of some ranks of this group, in this order. Local; only members call it; it stays valid when this group is closed."""
        ranks = [number("ranks", r) for r in ranks]
        pointer = c_void_p()
        self._handle.call(lib.cp_group_subset, (c_uint32 * len(ranks))(*ranks), len(ranks), byref(pointer))
        return Group(pointer.value)

    def barrier(self):
        """Waits until all ranks have come. Collective."""
        self._handle.call(lib.cp_group_barrier)

    def warm_up(self):
        """Connects all pairs of ranks, which NCCL otherwise does at a pair's first message. Collective."""
        self._handle.call(lib.cp_group_warm_up)

    def abort(self):
        """Ends pending and future calls of this group and its relatives, here and elsewhere, with ABORTED. From any thread."""
        self._handle.call(lib.cp_group_abort)

    def statistics(self):
        """What this rank's group and its relatives have moved so far: sent_bytes, received_bytes, exposed_ns."""
        made = _abi.cp_statistics()
        self._handle.call(lib.cp_group_statistics, byref(made))
        return _abi.fields(made)

    def close(self):
        """Ends the use of this group; layers that have it keep it alive. Closing twice does nothing."""
        self._handle.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return f"Group(rank={self.rank}, size={self.size}, global_ranks={self.global_ranks})"
