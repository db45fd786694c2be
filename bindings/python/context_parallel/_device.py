"""Devices, streams, and the allocators that CUDA layers take their workspace from."""

import contextlib
import sys

from . import _abi
from ._arrays import is_tensor, torch_module
from ._lib import argument_error, number


def device(value):
    """(CP_DEVICE_CUDA, index) or, for the CPU, (0, 0), from None, "cpu", "cuda", "cuda:1", ("cuda", 1), or a torch.device. "cuda" is torch's current
    device, without torch 0."""
    if value is None:
        return 0, 0
    kind, index = value if isinstance(value, (tuple, list)) and len(value) == 2 else str(value).partition(":")[::2]
    if kind == "cpu" and index in ("", 0, "0", None):
        return 0, 0
    if kind == "cuda" and index in ("", None):
        torch = torch_module()
        return _abi.CP_DEVICE_CUDA, torch.cuda.current_device() if torch is not None and torch.cuda.is_available() else 0
    if kind == "cuda" and str(index).isdecimal():
        return _abi.CP_DEVICE_CUDA, number("device", int(index))
    raise argument_error(f"device: got {value!r}, allowed 'cpu', 'cuda', 'cuda:N', ('cuda', N)")


def pointer(stream):
    """The CUstream of an int, torch's .cuda_stream, CuPy's .ptr, or __cuda_stream__()."""
    if hasattr(stream, "__cuda_stream__"):
        about = stream.__cuda_stream__
        return (about() if callable(about) else about)[1]
    for name in ("cuda_stream", "ptr"):
        stream = getattr(stream, name, stream)
    if not hasattr(stream, "__index__") or not 0 <= stream.__index__() < 1 << 64:
        raise argument_error(f"stream: got {stream!r}, need a CUstream as an integer, or a stream of torch or CuPy")
    return stream.__index__()


def current_stream(array, index):
    """The stream that the array's library works on now: torch's and CuPy's current one, the one that an array names; else the default stream."""
    if is_tensor(array) and array.is_cuda:
        return torch_module().cuda.current_stream(index).cuda_stream
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy.cuda.get_current_stream().ptr
    if not hasattr(array, "__dlpack__"):
        named = getattr(array, "__cuda_array_interface__", {}).get("stream")
        return 0 if named in (None, 1) else named
    return 0


@contextlib.contextmanager
def torch_stream(stream, index, tensors):
    """Makes torch allocate for `stream`, and not give away the memory of `tensors` before what is on it now has run."""
    torch = torch_module()
    if torch is None or not any(is_tensor(t) and t.is_cuda for t in tensors) or torch.cuda.current_stream(index).cuda_stream == stream:
        yield
        return
    other = torch.cuda.ExternalStream(stream, device=index)
    with torch.cuda.stream(other):
        yield
    for t in tensors:
        if is_tensor(t) and t.is_cuda:
            t.record_stream(other)


class Allocator:
    """C callbacks over alloc(bytes, stream) -> address and free(address, bytes, stream). What they raise is kept in `raised`."""

    def __init__(self, alloc, free):
        self.raised = None

        def give(_, size, stream):
            try:
                return alloc(size, stream or 0)
            except BaseException as error:
                self.raised = error
                return None

        def take(_, address, size, stream):
            try:
                free(address, size, stream or 0)
            except BaseException as error:
                self.raised = error

        self.alloc, self.free = _abi.cp_device_alloc_fn(give), _abi.cp_device_free_fn(take)

    def reraise(self, cause=None):
        """Raises what a callback raised since the last time."""
        raised, self.raised = self.raised, None
        if raised is not None:
            raise raised from cause


def allocator(value, index):
    """An Allocator, or None for the library's own memory. `value`: None, "torch", "own", or (alloc, free)."""
    torch = torch_module()
    if value is None:
        value = "torch" if torch is not None and torch.cuda.is_available() else "own"
    if value == "own":
        return None
    if value == "torch":
        if torch is None or not torch.cuda.is_available():
            raise argument_error("allocator: got 'torch', but torch is not imported or has no CUDA")
        # torch orders by stream what it gives away again, also while a graph is captured.
        return Allocator(
            lambda size, stream: torch.cuda.caching_allocator_alloc(size, index, stream),
            lambda address, size, stream: torch.cuda.caching_allocator_delete(address),
        )
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(callable, value)):
        return Allocator(*value)
    raise argument_error(f"allocator: got {value!r}, allowed 'torch', 'own', (alloc, free)")
