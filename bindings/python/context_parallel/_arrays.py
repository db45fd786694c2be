"""The caller's arrays as C sees them, in place: NumPy's, torch's, and of any library that offers DLPack or the CUDA array interface."""

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p, py_object
from typing import NamedTuple

import numpy as np

from . import _abi
from ._lib import Error, argument_error

ALIGN = 64
# DLPack's kDLInt, kDLUInt, kDLOpaqueHandle; no tensor has them, seeds and buffers of bytes do.
_INTEGER, _UNSIGNED, _UNKNOWN = 0, 1, 3
# Libraries whose arrays never change: nothing may be written into them, whatever their capsules say.
_IMMUTABLE = ("jax", "jaxlib")


class Layout(NamedTuple):
    """Where an array is and how it lies. Strides count elements."""

    data: int
    device: tuple
    code: int
    bits: int
    shape: tuple
    strides: tuple
    read_only: bool = False
    keep: object = None  # what the description depends on


def torch_module():
    """torch, if the caller has imported it; this package never does."""
    return sys.modules.get("torch")


def is_tensor(array):
    torch = torch_module()
    return torch is not None and isinstance(array, getattr(torch, "Tensor", ()))


def is_array(array):
    """Can an output be made that is like this array?"""
    return isinstance(array, np.ndarray) or is_tensor(array)


def is_foreign(array):
    return not is_array(array) and (hasattr(array, "__dlpack__") or hasattr(array, "__cuda_array_interface__"))


def layout(array, stream=None):
    """Describes an array; ValueError says why it cannot be. `stream`: where the call works, so that the array's library can order its own work before."""
    if isinstance(array, np.ndarray):
        return _of_numpy(array)
    if is_tensor(array):
        return _of_torch(array)
    if hasattr(array, "__dlpack__"):
        return _of_dlpack(array, stream)
    if hasattr(array, "__cuda_array_interface__"):
        return _of_interface(array, stream)
    raise ValueError(f"got {type(array).__name__}, need a NumPy array, a torch tensor, or an array with __dlpack__ or __cuda_array_interface__")


def describe(name, array, axes, wrong, stream=None, written=False):
    """A tensor as C sees it. What C cannot be told goes to `wrong`, and the library gets a tensor that it refuses."""
    try:
        if written and array is None:
            raise ValueError("got NoneType; outputs are made only for NumPy arrays and torch tensors, else the caller gives them")
        found = layout(array, stream)
        if written and (found.read_only or type(array).__module__.split(".")[0] in _IMMUTABLE):
            raise ValueError("got a read-only array, the result is written there")
        made = _abi.cp_tensor(data=found.data, device_type=found.device[0], device_id=found.device[1], ndim=len(found.shape))
        made.dtype_code, made.dtype_bits, made.dtype_lanes = found.code, min(found.bits, 255), 1
        order = axes if len(axes) == len(found.shape) else range(min(len(found.shape), 4))
        for i, axis in enumerate(order):
            made.shape[i], made.stride[i] = found.shape[axis], found.strides[axis]
        return made
    except Exception as error:
        wrong.append(error if isinstance(error, Error) else argument_error(f"{name}: {error}"))
        return _abi.cp_tensor()


def buffer(name, array, wrong, stream=None):
    """Address and size of a writable array of bytes; nothing for None."""
    if array is None:
        return None, 0
    try:
        found = layout(array, stream)
        if (found.code, found.bits) == (_UNSIGNED, 8) and len(found.shape) == 1 and found.strides[0] == 1 and not found.read_only:
            return found.data, found.shape[0]
        why = ""
    except Exception as error:
        why = f": {error}"
    wrong.append(argument_error(f"{name}: need a contiguous, writable array of uint8{why}"))
    return None, 1  # Refused: bytes without an address.


def seed_on_device(seed, place, stream):
    """The address of one 64-bit integer on a CUDA device, which must be `place`; None for what is on the host."""
    if not is_tensor(seed) and not is_foreign(seed):
        return None
    found = layout(seed, stream)
    if found.device[0] != _abi.CP_DEVICE_CUDA:
        return None
    if found.device != place:
        raise ValueError(f"got one on CUDA device {found.device[1]}, the layer is on {'the CPU' if place[0] != found.device[0] else place[1]}")
    if found.code not in (_INTEGER, _UNSIGNED) or found.bits != 64 or any(extent != 1 for extent in found.shape):
        raise ValueError(f"got shape {found.shape} of {found.bits} bits, on a device it is one 64-bit integer")
    return found.data


def aligned(array, stream=None):
    """Address and bytes of the part of an array of bytes that starts at a multiple of 64."""
    found = layout(array, stream)
    start = -found.data % ALIGN
    return found.data + start, found.shape[0] - start


def new(like, shape, dtype=None):
    """An empty array of `like`'s library, on its device."""
    if is_tensor(like):
        torch = torch_module()
        return torch.empty(tuple(shape), dtype=like.dtype if dtype is None else getattr(torch, dtype), device=like.device)
    return np.empty(shape, like.dtype if dtype is None else dtype)


def on_host(values):
    """Values that may be on a device, as a NumPy array: then this copies them and waits for that."""
    if is_tensor(values):
        return values.detach().cpu().numpy()
    if hasattr(values, "__cuda_array_interface__") and hasattr(values, "get"):
        return np.asarray(values.get())
    return np.asarray(values)


def _code(name, kind):
    if name == "bfloat16":
        return _abi.CP_CODE_BFLOAT
    return {"f": _abi.CP_CODE_FLOAT, "i": _INTEGER, "u": _UNSIGNED}.get(kind, _UNKNOWN)


def _elements(strides, itemsize):
    if any(stride % itemsize for stride in strides):
        raise ValueError(f"got byte strides {strides}, must be multiples of the element size {itemsize}")
    return tuple(stride // itemsize for stride in strides)


def _dense(shape):
    strides = []
    span = 1
    for extent in reversed(shape):
        strides.insert(0, span)
        span *= extent
    return tuple(strides)


def _of_numpy(array):
    dtype, interface = array.dtype, array.__array_interface__
    if not dtype.isnative:
        raise ValueError(f"got {dtype} of the other byte order")
    data, read_only = interface["data"]
    code = _code(dtype.name, dtype.kind)
    return Layout(data, (_abi.CP_DEVICE_CPU, 0), code, dtype.itemsize * 8, array.shape, _elements(array.strides, dtype.itemsize), read_only)


def _of_torch(tensor):
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError("got a lazily conjugated or negated tensor; call .resolve_conj().resolve_neg()")
    kinds = {"cpu": _abi.CP_DEVICE_CPU, "cuda": _abi.CP_DEVICE_CUDA}
    if tensor.device.type not in kinds:
        raise ValueError(f"got device {tensor.device}, allowed cpu, cuda")
    device = (kinds[tensor.device.type], tensor.device.index or 0)
    name = str(tensor.dtype).removeprefix("torch.")
    kind = name[0] if name.rstrip("0123456789") in ("float", "int", "uint") else ""
    return Layout(tensor.data_ptr(), device, _code(name, kind), tensor.element_size() * 8, tuple(tensor.shape), tuple(tensor.stride()))


def _of_interface(array, stream):
    """The CUDA array interface, which cannot say bfloat16."""
    about = array.__cuda_array_interface__
    dtype = np.dtype(about["typestr"])
    if dtype.kind == "V":
        raise ValueError(f"got typestr {about['typestr']!r}; the CUDA array interface knows no bfloat16, offer __dlpack__")
    if not dtype.isnative:
        raise ValueError(f"got {dtype} of the other byte order")
    if about.get("mask") is not None:
        raise ValueError("got a masked array")
    works_on = about.get("stream")
    if works_on is not None and (works_on or 1) != (stream or 1):
        names = f"its library works on stream {works_on:#x}, this call on {stream or 1:#x}"
        raise ValueError(f"{names}; pass stream=, or order them and pass an array that names no stream")
    shape = tuple(about["shape"])
    strides = about.get("strides")
    strides = _dense(shape) if strides is None else _elements(tuple(strides), dtype.itemsize)
    data, read_only = about["data"]
    # The interface does not say which device; the array usually does.
    device = getattr(getattr(array, "device", None), "id", None)
    return Layout(data, (_abi.CP_DEVICE_CUDA, device or 0), _code(dtype.name, dtype.kind), dtype.itemsize * 8, shape, strides, bool(read_only))


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned. The older DLManagedTensor starts with its tensor."""

    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("manager_ctx", c_void_p),
        ("deleter", c_void_p),
        ("flags", c_uint64),
        ("tensor", _DLTensor),
    ]


_DL_READ_ONLY, _DL_COPIED = 1, 2
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = c_void_p, [py_object, c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype, _capsule_is.argtypes = ctypes.c_int, [py_object, c_char_p]


def _capsule(array, stream):
    kind, _ = array.__dlpack_device__()
    # DLPack's streams: 1 is the legacy default stream, which is 0 here; off CUDA there are none.
    settings = {"stream": stream or 1} if kind == _abi.CP_DEVICE_CUDA else {}
    try:
        return array.__dlpack__(max_version=(1, 0), **settings)
    except TypeError:  # from before version 1
        return array.__dlpack__(**settings)


def _of_dlpack(array, stream):
    # Not consumed: the capsule keeps its name, and with it the duty to free what it stands for.
    capsule = _capsule(array, stream)
    flags = 0
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise ValueError(f"got DLPack version {managed.major}.{managed.minor}, allowed 1")
        t, flags = managed.tensor, managed.flags
    elif _capsule_is(capsule, b"dltensor"):
        t = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    else:
        raise ValueError("__dlpack__ gave no capsule of a tensor")
    if flags & _DL_COPIED:
        raise ValueError("__dlpack__ made a copy; this library works in place")
    if t.lanes != 1:
        raise ValueError(f"got {t.lanes} lanes, need 1")
    shape = tuple(t.shape[i] for i in range(t.ndim))
    strides = tuple(t.strides[i] for i in range(t.ndim)) if t.strides else _dense(shape)
    data = (t.data or 0) + t.byte_offset
    return Layout(data, (t.device_type, t.device_id), t.code, t.bits, shape, strides, bool(flags & _DL_READ_ONLY), capsule)
