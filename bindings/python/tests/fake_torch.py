"""As much of torch's interface for CUDA tensors as this package calls, over `devices`: torch itself runs on real GPUs only (test_torch_cuda.py)."""

import contextlib
import threading

import ml_dtypes
import numpy as np

import devices


class _DType:
    def __init__(self, name, of_numpy):
        self.name, self.numpy = name, np.dtype(of_numpy)

    def __str__(self):
        return f"torch.{self.name}"


bfloat16, float16, float32 = _DType("bfloat16", ml_dtypes.bfloat16), _DType("float16", np.float16), _DType("float32", np.float32)
uint8, int32 = _DType("uint8", np.uint8), _DType("int32", np.int32)
_DTYPES = {t.numpy: t for t in (bfloat16, float16, float32, uint8, int32)}


class _Device:
    type = "cuda"

    def __init__(self, index):
        self.index = index


class Tensor(devices.DeviceArray):
    """Neither DLPack nor the CUDA array interface: everything goes by torch's own names."""

    is_cuda = True

    def __init__(self, array, index=0):
        super().__init__(array, index)
        self.ndim, self.device, self.recorded = len(self.shape), _Device(index), []
        self.numpy_dtype, self.dtype = self.dtype, _DTYPES[self.dtype]
        self.made_on = cuda.current_stream(index).cuda_stream

    def __array__(self, dtype=None, copy=None):
        self.dtype, kept = self.numpy_dtype, self.dtype
        try:
            return super().__array__(dtype, copy)
        finally:
            self.dtype = kept

    def data_ptr(self):
        return self.address

    def stride(self):
        return tuple(s // self.element_size() for s in self.strides)

    def element_size(self):
        return self.numpy_dtype.itemsize

    def is_conj(self):
        return False

    is_neg = is_conj

    def detach(self):
        return self

    cpu = detach

    def numpy(self):
        return np.asarray(self)

    def record_stream(self, stream):
        self.recorded.append(stream.cuda_stream)


def empty(shape, *, dtype, device):
    return Tensor(np.full(shape, 255 if dtype is uint8 else np.nan, dtype.numpy), device.index)


class _Stream:
    def __init__(self, cuda_stream):
        self.cuda_stream = cuda_stream


class _Cuda:
    """torch.cuda; the caching allocator counts, and gives nothing back."""

    def __init__(self):
        self.current, self.taken, self.given_back = threading.local(), {}, []

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def current_stream(self, index):
        return getattr(self.current, "stream", None) or _Stream(0)

    def ExternalStream(self, pointer, device):
        return _Stream(pointer)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current.stream = self.current_stream(0), stream
        try:
            yield
        finally:
            self.current.stream = before

    def caching_allocator_alloc(self, size, device, stream):
        made = devices.Memory(size, device)
        self.taken[made.address] = (made, size, stream)
        return made.address

    def caching_allocator_delete(self, address):
        self.given_back.append(address)


cuda = _Cuda()
