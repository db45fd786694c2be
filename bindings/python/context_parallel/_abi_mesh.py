"""ctypes mirrors of the header's part about meshes and padding; `_abi` takes them up."""

from ctypes import POINTER, c_char_p, c_int32, c_size_t, c_uint32, c_uint64, c_void_p

from ._abi import Sized

CP_FP8_OFF = 0
CP_FP8_ROWS_16 = 1
CP_FP8_ROWS_32 = 2
CP_PADDING_SEQUENCE_PARALLEL = 1
CP_PADDING_MEGATRON = 2
CP_PADDING_TP_OVERLAP = 4
CP_TAIL_APPEND_DUMMY = 0
CP_TAIL_EXTEND_LAST = 1


class cp_mesh(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("tp", c_uint32),
        ("cp", c_uint32),
        ("ep", c_uint32),
        ("dp", c_uint32),
        ("pp", c_uint32),
        ("world_size", c_uint32),
        ("first_rank", c_uint32),
        ("reserved", c_uint32),
        ("order", c_char_p),
    ]


class cp_padding_config(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("tp", c_uint32),
        ("cp", c_uint32),
        ("fp8", c_uint32),
        ("reserved", c_uint32),
        ("decoder_length", c_uint64),
    ]


class cp_tail_config(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("ranks", c_uint32),
        ("partition", c_uint32),
        ("tail", c_uint32),
        ("slots", c_uint32),
        ("multiple", c_uint64),
        ("rows", c_uint64),
    ]


_mesh, _padding = POINTER(cp_mesh), POINTER(cp_padding_config)
_number, _size, _long = POINTER(c_uint32), POINTER(c_size_t), POINTER(c_uint64)
_members = [c_void_p, c_size_t, _size, _number]

FUNCTIONS = {
    "cp_mesh_fill": (c_int32, [_mesh, _mesh]),
    "cp_mesh_expert": (c_int32, [_mesh, c_uint32, c_uint32, _mesh]),
    "cp_mesh_members": (c_int32, [_mesh, c_char_p, c_uint32, *_members]),
    "cp_mesh_groups": (c_int32, [_mesh, c_char_p, c_void_p, c_size_t, _size]),
    "cp_mesh_level_members": (c_int32, [_mesh, c_char_p, c_void_p, c_size_t, c_uint32, c_uint32, *_members]),
    "cp_mesh_consecutive_members": (c_int32, [_mesh, c_char_p, c_uint32, c_uint32, *_members]),
    "cp_comm_types_per_layer": (c_int32, [c_char_p, c_size_t, c_void_p]),
    "cp_padding_factor": (c_int32, [_padding, _long]),
    "cp_padding_amount": (c_int32, [_padding, c_uint64, _long]),
    "cp_padding_sequences": (c_int32, [c_void_p, c_size_t, c_uint32, c_void_p]),
    "cp_padding_tail": (c_int32, [POINTER(cp_tail_config), c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_size_t, _size, _long]),
    "cp_padding_batch": (c_int32, [c_uint32, c_uint64, c_uint64, c_uint32, c_uint32, c_void_p, c_void_p, _number]),
    "cp_padding_image_bounds": (c_int32, [c_void_p, c_size_t, c_void_p, c_size_t, c_uint32, c_uint32, c_uint32, c_void_p]),
    "cp_padding_split": (c_int32, [c_uint64, c_uint32, c_uint32, _long, _long, _long]),
}
