"""Finds and loads libcontext_parallel.so, declares its functions, turns statuses into exceptions, and guards handles."""

import contextlib
import ctypes
import enum
import os
import threading
import weakref
from ctypes import POINTER, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

from . import _abi, _abi_mesh, _abi_rows, _abi_schedule

VERSION = (0, 1)


class Status(enum.IntEnum):
    """Outcome of a call, as in the C header."""

    INVALID_ARGUMENT = _abi.CP_ERR_INVALID_ARGUMENT
    INVALID_HANDLE = _abi.CP_ERR_INVALID_HANDLE
    INVALID_USAGE = _abi.CP_ERR_INVALID_USAGE
    UNSUPPORTED = _abi.CP_ERR_UNSUPPORTED
    NOT_CAPTURABLE = _abi.CP_ERR_NOT_CAPTURABLE
    OUT_OF_MEMORY = _abi.CP_ERR_OUT_OF_MEMORY
    VERSION = _abi.CP_ERR_VERSION
    MISMATCH = _abi.CP_ERR_MISMATCH
    CUDA = _abi.CP_ERR_CUDA
    NCCL = _abi.CP_ERR_NCCL
    TRANSPORT = _abi.CP_ERR_TRANSPORT
    TIMEOUT = _abi.CP_ERR_TIMEOUT
    PEER_LOST = _abi.CP_ERR_PEER_LOST
    ABORTED = _abi.CP_ERR_ABORTED
    INTERNAL = _abi.CP_ERR_INTERNAL


class Error(RuntimeError):
    """What the library refused or met. `status` says which kind, the text which argument, what was got, what is allowed, which rank.

    After TRANSPORT, TIMEOUT, PEER_LOST, ABORTED and INTERNAL the group is lost; after all others everything stays usable.
    """

    def __init__(self, status, text):
        super().__init__(text)
        self.status = Status(status)


def argument_error(text):
    return Error(Status.INVALID_ARGUMENT, f"invalid argument: {text}")


def _candidates():
    given = os.environ.get("CONTEXT_PARALLEL_LIB")
    if given:
        return [Path(given)]
    package = Path(__file__).resolve().parent
    name = "libcontext_parallel.so"
    # In a checkout the package lies in bindings/python, three folders below the root.
    builds = [package.parents[2] / "target" / profile / name for profile in ("release", "debug")]
    return [package / "lib" / name, *builds]


_size_out = POINTER(c_size_t)
_handle_out = POINTER(c_void_p)
_sequences = POINTER(_abi.cp_sequences)

# What every function takes. Those that return c_int32 return a status.
FUNCTIONS = {
    "cp_version": (c_uint32, []),
    "cp_build_info": (c_char_p, []),
    "cp_status_string": (c_char_p, [c_int32]),
    "cp_last_error": (c_char_p, []),
    "cp_last_error_copy": (c_size_t, [c_char_p, c_size_t]),
    "cp_get_unique_id": (c_int32, [POINTER(_abi.cp_unique_id)]),
    "cp_group_init": (c_int32, [POINTER(_abi.cp_group_config), _handle_out]),
    "cp_group_subset": (c_int32, [c_void_p, POINTER(c_uint32), c_size_t, _handle_out]),
    "cp_group_rank": (c_int32, [c_void_p, POINTER(c_uint32)]),
    "cp_group_size": (c_int32, [c_void_p, POINTER(c_uint32)]),
    "cp_group_global_ranks": (c_int32, [c_void_p, POINTER(c_uint32), c_size_t]),
    "cp_group_barrier": (c_int32, [c_void_p]),
    "cp_group_warm_up": (c_int32, [c_void_p]),
    "cp_group_abort": (c_int32, [c_void_p]),
    "cp_group_statistics": (c_int32, [c_void_p, POINTER(_abi.cp_statistics)]),
    "cp_group_destroy": (c_int32, [c_void_p]),
    "cp_partition_padded_length": (c_int32, [c_uint32, c_uint32, c_uint64, POINTER(c_uint64)]),
    "cp_partition_tokens": (c_int32, [c_uint32, c_uint32, _sequences, c_uint32, c_uint32, c_uint32, c_void_p, c_size_t, _size_out]),
    "cp_sequence_to_heads": (c_int32, [c_void_p, POINTER(_abi.cp_trade_args), c_void_p]),
    "cp_heads_to_sequence": (c_int32, [c_void_p, POINTER(_abi.cp_trade_args), c_void_p]),
    "cp_trade_share": (c_int32, [c_uint32, c_uint32, c_uint32, c_uint32, POINTER(c_uint32), POINTER(c_uint32)]),
    "cp_trade_workspace_size": (c_int32, [c_void_p, POINTER(_abi.cp_trade_args), _size_out]),
    "cp_attention_create": (c_int32, [POINTER(_abi.cp_attention_config), _handle_out]),
    "cp_query_support": (c_int32, [POINTER(_abi.cp_attention_config), POINTER(_abi.cp_comm_config), c_uint32]),
    "cp_set_group": (c_int32, [c_void_p, c_void_p, POINTER(_abi.cp_comm_config)]),
    "cp_attention_workspace_size": (c_int32, [c_void_p, c_uint32, _size_out]),
    "cp_attention_saved_size": (c_int32, [c_void_p, _sequences, _size_out]),
    "cp_attention_report": (c_int32, [c_void_p, _sequences, POINTER(_abi.cp_report)]),
    "cp_attention_forward": (c_int32, [c_void_p, POINTER(_abi.cp_forward_args), c_void_p]),
    "cp_attention_backward": (c_int32, [c_void_p, POINTER(_abi.cp_backward_args), c_void_p]),
    "cp_attention_plan": (c_int32, [c_void_p, _sequences, c_uint32, c_uint32, c_char_p, c_size_t, _size_out]),
    "cp_attention_destroy": (c_int32, [c_void_p]),
    **_abi_mesh.FUNCTIONS,
    **_abi_rows.FUNCTIONS,
    **_abi_schedule.FUNCTIONS,
}


def _load():
    tried = _candidates()
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        names = ", ".join(map(str, tried))
        raise ImportError(f"libcontext_parallel.so was not found; tried {names}. Build it with `cargo build --release`, or set CONTEXT_PARALLEL_LIB")
    # CDLL, not PyDLL: the interpreter's lock is released during calls, so that ranks may be threads.
    lib = ctypes.CDLL(str(path))
    lib.cp_version.restype = c_uint32
    version = lib.cp_version()
    if divmod(version // 1000, 1000) != VERSION:
        raise ImportError(f"{path} is version {version // 1000000}.{version // 1000 % 1000}, this package needs {VERSION[0]}.{VERSION[1]}")
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib, path


lib, path = _load()


def check(status):
    """Raises what a status says; the text is this thread's last error."""
    if status != _abi.CP_OK:
        raise Error(status, lib.cp_last_error().decode())


class Handle:
    """A C handle that is destroyed once: by close(), or when its owner is gone, but never while a call uses it."""

    def __init__(self, owner, name, pointer, destroy):
        self.name, self._pointer, self._destroy = name, pointer, destroy
        self._lock, self._users = threading.Lock(), 0
        self._finalizer = weakref.finalize(owner, destroy, pointer)

    @contextlib.contextmanager
    def use(self):
        """The pointer, kept alive for the length of a `with`. Any number of threads at once: the library says which may."""
        with self._lock:
            if self._pointer is None:
                raise Error(Status.INVALID_HANDLE, f"invalid handle: {self.name}: used after close()")
            self._users += 1
        try:
            yield self._pointer
        finally:
            with self._lock:
                self._users -= 1

    def call(self, function, *arguments):
        with self.use() as pointer:
            check(function(pointer, *arguments))

    def close(self):
        with self._lock:
            if self._pointer is None:
                return
            if self._users:
                raise Error(Status.INVALID_USAGE, f"invalid usage: {self.name}: close() while another thread is inside a call")
            self._finalizer.detach()
            pointer, self._pointer = self._pointer, None
        check(self._destroy(pointer))


def number(name, value):
    """A number that C takes as uint32_t; ctypes would cut it to size without a word."""
    if not hasattr(value, "__index__") or not 0 <= value.__index__() < 1 << 32:
        raise argument_error(f"{name}: got {value!r}, must be an integer from 0 to 2^32 - 1")
    return value.__index__()


def build_info():
    """What the library was built with and what it found, as JSON text."""
    return lib.cp_build_info().decode()
