"""ctypes mirrors of the header's part about schedules; `_abi` takes them up."""

from ctypes import POINTER, Structure, c_double, c_int32, c_size_t, c_uint32, c_void_p

from ._abi import Sized

CP_SCHEDULER_NESTED = 0
CP_SCHEDULER_MEGATRON = 1
CP_SCHEDULER_DYNAMIC = 2
CP_SCHEDULER_DP_BALANCED = 3


class cp_schedule_config(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("ranks", c_uint32),
        ("tokens_per_rank", c_uint32),
        ("scheduler", c_uint32),
        ("cp_size", c_uint32),
        ("cost_pair", c_double),
        ("cost_token", c_double),
        ("cost_wire", c_double),
        ("cost_rank", c_double),
        ("cost_call", c_double),
    ]


class cp_placement(Structure):
    _fields_ = [("micro_batch", c_uint32), ("first_rank", c_uint32), ("rank_count", c_uint32), ("pack", c_uint32)]


_config, _double = POINTER(cp_schedule_config), POINTER(c_double)

FUNCTIONS = {
    "cp_schedule_samples": (c_int32, [_config, c_void_p, c_size_t, c_void_p, POINTER(c_uint32)]),
    "cp_schedule_time": (c_int32, [_config, c_void_p, c_size_t, c_void_p, _double, _double]),
}
