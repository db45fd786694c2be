"""Arrays on CUDA devices over the driver alone, for tests: they offer DLPack and the CUDA array interface, as CuPy's and JAX's do. The driver is
whatever libcuda.so.1 is found: the software GPU (LD_LIBRARY_PATH=target/softgpu) or a real one."""

import ctypes
import functools
import gc
import types
import weakref
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p, py_object

import ml_dtypes
import numpy as np

from context_parallel._arrays import _DLTensor, _Versioned

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CODES = {"f": 2, "i": 0, "u": 1}


@functools.cache
def driver():
    """libcuda.so.1, started; OSError if there is none."""
    lib = ctypes.CDLL("libcuda.so.1")
    lib.cuGetErrorName.argtypes = [c_int, POINTER(c_char_p)]
    call("cuInit", 0, lib=lib)
    return lib


def call(function, *arguments, lib=None):
    lib = lib or driver()
    status = getattr(lib, function)(*arguments)
    if status != 0:
        name = c_char_p()
        lib.cuGetErrorName(status, byref(name))
        raise RuntimeError(f"{function}: {(name.value or b'?').decode()} ({status})")


@functools.cache
def count():
    n = c_int()
    call("cuDeviceGetCount", byref(n))
    return n.value


@functools.cache
def _context(index):
    device, context = c_int(), c_void_p()
    call("cuDeviceGet", byref(device), index)
    call("cuDevicePrimaryCtxRetain", byref(context), device)
    return context


class on:
    """Makes a device current for the length of a `with`."""

    def __init__(self, index):
        self.index = index

    def __enter__(self):
        call("cuCtxPushCurrent_v2", _context(self.index))

    def __exit__(self, *_):
        call("cuCtxPopCurrent_v2", byref(c_void_p()))


class Stream:
    """A stream that does not wait for the default one. As CuPy's, it has its address in `ptr`."""

    def __init__(self, index=0):
        self.index, stream = index, c_void_p()
        with on(index):
            call("cuStreamCreate", byref(stream), 1)
        self.ptr = stream.value
        self._end = weakref.finalize(self, _destroy, index, self.ptr)

    def synchronize(self):
        with on(self.index):
            call("cuStreamSynchronize", c_void_p(self.ptr))

    def pending(self):
        """Is there work that has not run?"""
        with on(self.index):
            status = driver().cuStreamQuery(c_void_p(self.ptr))
        assert status in (0, 600), status
        return status != 0


def _destroy(index, pointer):
    with on(index):
        call("cuStreamDestroy_v2", c_void_p(pointer))


class Graph:
    """What is enqueued on a stream inside a `with` is captured; launch() runs it."""

    def __init__(self, stream):
        self.stream, self._graph, self._executable = stream, c_void_p(), c_void_p()

    def __enter__(self):
        # What these tests' own memory does when it is collected would end the capture.
        gc.collect()
        gc.disable()
        with on(self.stream.index):
            call("cuStreamBeginCapture_v2", c_void_p(self.stream.ptr), 1)

    def __exit__(self, kind, *_):
        gc.enable()
        with on(self.stream.index):
            # After an error inside, the capture may be spoilt.
            status = driver().cuStreamEndCapture(c_void_p(self.stream.ptr), byref(self._graph))
            assert status == 0 or kind is not None, status
            if kind is None:
                call("cuGraphInstantiateWithFlags", byref(self._executable), self._graph, c_uint64(0))

    def launch(self):
        with on(self.stream.index):
            call("cuGraphLaunch", self._executable, c_void_p(self.stream.ptr))

    def close(self):
        with on(self.stream.index):
            call("cuGraphExecDestroy", self._executable)
            call("cuGraphDestroy", self._graph)


class Memory:
    """Bytes on a device; given back when nothing uses them any more, which waits for the device."""

    def __init__(self, size, index=0):
        self.size, self.index, address = size, index, c_uint64()
        with on(index):
            call("cuMemAlloc_v2", byref(address), c_size_t(max(size, 1)))
        self.address = address.value
        self._end = weakref.finalize(self, _free, index, self.address)

    def write(self, data, at=0):
        with on(self.index):
            call("cuMemcpyHtoD_v2", c_uint64(self.address + at), data.ctypes.data_as(c_void_p), c_size_t(data.nbytes))

    def read(self):
        """Does not wait for any stream but the default one."""
        data = np.empty(self.size, np.uint8)
        with on(self.index):
            call("cuMemcpyDtoH_v2", data.ctypes.data_as(c_void_p), c_uint64(self.address), c_size_t(self.size))
        return data


def _free(index, address):
    with on(index):
        call("cuCtxSynchronize")
        call("cuMemFree_v2", c_uint64(address))


class DeviceArray:
    """The device's copy of a NumPy array, its strides included. `np.asarray` copies back; what writes it must be done by then."""

    def __init__(self, array, index=0, shift=0):
        """shift: so many bytes lie in front."""
        self.dtype, self.shape, self.strides, self.index, self.shift = array.dtype, array.shape, array.strides, index, shift
        span = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides)) + self.dtype.itemsize if array.size else 0
        self.memory = Memory(span + shift, index)
        if span:
            # The bytes between elements too.
            self.memory.write(np.frombuffer((ctypes.c_char * span).from_address(array.ctypes.data), np.uint8), shift)
        self.address = self.memory.address + shift
        self.streams = []  # what callers of __dlpack__ named

    def __array__(self, dtype=None, copy=None):
        raw = self.memory.read()[self.shift :]
        made = np.ndarray(self.shape, self.dtype, raw.tobytes(), 0, self.strides) if raw.size else np.empty(self.shape, self.dtype)
        return made if dtype is None else made.astype(dtype)


class InterfaceArray(DeviceArray):
    """Offers the CUDA array interface only."""

    named_stream = None

    @property
    def device(self):
        return types.SimpleNamespace(id=self.index)

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": self.strides,
            "version": 3,
            "stream": self.named_stream,
        }

    def get(self):
        return np.asarray(self)


class DLPackArray(DeviceArray):
    """Offers DLPack only: versioned, or as before version 1."""

    versioned = True
    flags = 0

    def __dlpack_device__(self):
        return 2, self.index

    def __dlpack__(self, *, stream=None, **newer):
        if not self.versioned and newer:
            raise TypeError(f"__dlpack__() got an unexpected keyword argument {next(iter(newer))!r}")
        self.streams.append(stream)
        code = 4 if self.dtype == BFLOAT16 else CODES[self.dtype.kind]
        ndim = len(self.shape)
        shape = (c_int64 * ndim)(*self.shape)
        strides = (c_int64 * ndim)(*(s // self.dtype.itemsize for s in self.strides))
        offset = 16 if self.address % 256 == 0 else 0  # also what byte_offset is for
        tensor = _DLTensor(self.address - offset, 2, self.index, ndim, code, self.dtype.itemsize * 8, 1, shape, strides, offset)
        managed = _Versioned(1, 0, None, None, self.flags, tensor) if self.versioned else tensor
        self._exported = (managed, shape, strides)  # the last capsule depends on it
        capsule = ctypes.pythonapi.PyCapsule_New
        capsule.restype, capsule.argtypes = py_object, [c_void_p, c_char_p, c_void_p]
        return capsule(ctypes.addressof(managed), b"dltensor_versioned" if self.versioned else b"dltensor", None)


class OldDLPackArray(DLPackArray):
    versioned = False


def buffer(size, index=0):
    """Bytes on a device, aligned to 256, full of 255: NaN in every type."""
    return DLPackArray(np.full(size, 255, np.uint8), index)
