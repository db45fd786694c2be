"""ctypes mirrors of the header's part about a rank's rows and losses; `_abi` takes them up."""

from ctypes import POINTER, c_double, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

from ._abi import Sized, cp_sequences

CP_NO_TOKEN = 0xFFFFFFFF
CP_LOSS_PER_TOKEN = 0
CP_LOSS_PER_REPLICA = 1
CP_GRADIENTS_SUMMED = 0
CP_GRADIENTS_AVERAGED = 1


class cp_loss_config(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("mean", c_uint32),
        ("gradients", c_uint32),
        ("cp_size", c_uint32),
        ("dp_size", c_uint32),
        ("microbatches", c_uint32),
        ("tokens", c_double),
    ]


class cp_rows_args(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("sequences", POINTER(cp_sequences)),
        ("partition", c_uint32),
        ("format", c_uint32),
        ("side", c_uint32),
        ("shift", c_int32),
        ("row_bytes", c_size_t),
        ("local", c_void_p),
        ("local_rows", c_size_t),
        ("out", c_void_p),
        ("out_rows", c_size_t),
    ]


_dealing = [c_uint32, c_uint32, POINTER(cp_sequences), c_uint32]
_list = [c_void_p, c_size_t, POINTER(c_size_t)]

FUNCTIONS = {
    "cp_partition_positions": (c_int32, [*_dealing, c_uint32, c_uint32, *_list]),
    "cp_partition_lengths": (c_int32, [*_dealing, c_uint32, c_uint32, c_void_p, *_list]),
    "cp_partition_order": (c_int32, [*_dealing, c_uint32, *_list]),
    "cp_partition_shift": (c_int32, [*_dealing, c_uint32, c_uint32, c_int32, *_list]),
    "cp_partition_shift_exchange": (c_int32, [*_dealing, c_uint32, c_uint32, c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t]),
    "cp_group_shift": (c_int32, [c_void_p, POINTER(cp_rows_args)]),
    "cp_group_gather": (c_int32, [c_void_p, POINTER(cp_rows_args)]),
    "cp_loss_weights": (c_int32, [*_dealing, c_uint32, c_int32, *_list]),
    "cp_loss_tokens": (c_int32, [c_uint32, POINTER(cp_sequences), c_int32, POINTER(c_uint64)]),
    "cp_loss_scale": (c_int32, [POINTER(cp_loss_config), POINTER(c_double)]),
}
