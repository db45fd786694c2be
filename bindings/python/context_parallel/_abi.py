"""ctypes mirrors of include/context_parallel.h: constants, structs, and nothing else. tests/test_abi.py compares them to the header."""

from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p, sizeof

CP_OK = 0
CP_ERR_INVALID_ARGUMENT = 1
CP_ERR_INVALID_HANDLE = 2
CP_ERR_INVALID_USAGE = 3
CP_ERR_UNSUPPORTED = 4
CP_ERR_NOT_CAPTURABLE = 5
CP_ERR_OUT_OF_MEMORY = 6
CP_ERR_VERSION = 7
CP_ERR_MISMATCH = 8
CP_ERR_CUDA = 9
CP_ERR_NCCL = 10
CP_ERR_TRANSPORT = 11
CP_ERR_TIMEOUT = 12
CP_ERR_PEER_LOST = 13
CP_ERR_ABORTED = 14
CP_ERR_INTERNAL = 15

CP_DEVICE_CPU = 1
CP_DEVICE_CUDA = 2
CP_DTYPE_F32 = 1
CP_DTYPE_BF16 = 2
CP_DTYPE_F16 = 3
CP_CODE_FLOAT = 2
CP_CODE_BFLOAT = 4
CP_FORMAT_DENSE = 0
CP_FORMAT_PACKED = 1
CP_COMM_P2P = 0
CP_COMM_ALL_GATHER = 1
CP_COMM_A2A = 2
CP_COMM_A2A_P2P = 3
CP_STAGES_AUTO = 0xFFFFFFFF
CP_PARTITION_ZIGZAG = 0
CP_PARTITION_CONTIGUOUS = 1
CP_PARTITION_STRIPED = 2
CP_PARTITION_LIST = 3
CP_PARTITION_BALANCED = 4
CP_SLICE_LO = 1
CP_SLICE_HI = 2
CP_ATTENTION_CAUSAL = 1
CP_ATTENTION_BOTTOM_RIGHT = 2
CP_ATTENTION_WINDOW_LEFT = 4
CP_ATTENTION_WINDOW_RIGHT = 8
CP_ATTENTION_WIRE_F32 = 16
CP_ATTENTION_SAVE = 32
CP_ATTENTION_KV_CACHE = 64
CP_ATTENTION_DETERMINISTIC = 128
CP_REACH_NONE, CP_REACH_RANK, CP_REACH_GROUP = 0, 1, 2
CP_KV_WIRE_STORAGE, CP_KV_WIRE_E4M3, CP_KV_WIRE_E5M2 = 0, 1, 2
CP_BIAS, CP_BIAS_BATCH, CP_BIAS_HEADS, CP_BIAS_QUERIES, CP_BIAS_GRADIENT = 1, 2, 4, 8, 16
CP_FORWARD_SEED_AT = 1
CP_COMM_RELAY = 1
CP_COMM_MOVE_QUERIES = 2
CP_GROUP_AGREE = 1
CP_BOOTSTRAP_AUTO = 0
CP_BOOTSTRAP_ENV = 1
CP_TRANSPORT_AUTO = 0
CP_TRANSPORT_LOCAL = 1
CP_TRANSPORT_SHM = 2
CP_TRANSPORT_NCCL = 3
CP_TRANSPORT_STAGED = 4
CP_PASS_FORWARD = 0
CP_PASS_BACKWARD = 1
CP_PLAN_TEXT = 0
CP_PLAN_JSON = 1
CP_SIDE_Q = 0
CP_SIDE_K = 1

cp_allgather_fn = CFUNCTYPE(c_int32, c_void_p, c_void_p, c_void_p, c_size_t)
cp_device_alloc_fn = CFUNCTYPE(c_void_p, c_void_p, c_size_t, c_void_p)
cp_device_free_fn = CFUNCTYPE(None, c_void_p, c_void_p, c_size_t, c_void_p)


class Sized(Structure):
    """A struct whose first field is its size: set here, everything else zero unless given."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.struct_size = sizeof(self)


def fields(struct):
    """A filled struct as a dict, without its size and flags."""
    return {name: getattr(struct, name) for name, _ in struct._fields_ if name not in ("struct_size", "flags")}


class cp_unique_id(Structure):
    _fields_ = [("bytes", c_uint8 * 128)]


class cp_group_config(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("rank", c_uint32),
        ("size", c_uint32),
        ("bootstrap", c_uint32),
        ("transport_kind", c_uint32),
        ("id", POINTER(cp_unique_id)),
        ("allgather", cp_allgather_fn),
        ("allgather_ctx", c_void_p),
        ("transport", c_void_p),
        ("timeout_ms", c_uint64),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("nccl_comm", c_void_p),
        ("nccl_library", c_char_p),
    ]


class cp_statistics(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("sent_bytes", c_uint64),
        ("received_bytes", c_uint64),
        ("exposed_ns", c_uint64),
    ]


class cp_stretch(Structure):
    _fields_ = [("seq", c_uint32), ("start", c_uint32), ("step", c_uint32), ("len", c_uint32)]


class cp_mask_slice(Structure):
    _fields_ = [
        ("sequence", c_uint32),
        ("q_begin", c_uint32),
        ("q_end", c_uint32),
        ("k_begin", c_uint32),
        ("k_end", c_uint32),
        ("flags", c_uint32),
        ("lo", c_int32),
        ("hi", c_int32),
    ]


class cp_sequences(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("count", c_uint32),
        ("seq_q", c_uint32),
        ("seq_k", c_uint32),
        ("reserved", c_uint32),
        ("lens_q", c_void_p),
        ("lens_k", c_void_p),
        ("before_q", c_void_p),
        ("before_k", c_void_p),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("cu_seqlens_q_padded", c_void_p),
        ("cu_seqlens_k_padded", c_void_p),
        ("list_q", c_void_p),
        ("list_k", c_void_p),
        ("list_q_counts", c_void_p),
        ("list_k_counts", c_void_p),
        ("slices", c_void_p),
        ("slice_count", c_uint64),
    ]


class cp_attention_config(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("heads", c_uint32),
        ("kv_heads", c_uint32),
        ("head_dim_qk", c_uint32),
        ("head_dim_v", c_uint32),
        ("dtype", c_uint32),
        ("format", c_uint32),
        ("partition", c_uint32),
        ("window_left", c_uint32),
        ("window_right", c_uint32),
        ("softmax_scale", c_float),
        ("max_tokens_per_rank", c_uint32),
        ("threads", c_uint32),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("sm_margin", c_uint32),
        ("max_segments", c_uint32),
        ("device_alloc", cp_device_alloc_fn),
        ("device_free", cp_device_free_fn),
        ("device_alloc_ctx", c_void_p),
        ("softcap", c_float),
        ("dropout", c_float),
        ("alibi_slopes", c_void_p),
        ("head_offset", c_uint32),
        ("sinks", c_uint32),
        ("max_logit", c_uint32),
        ("bias", c_uint32),
        ("kv_wire", c_uint32),
        ("reserved", c_uint32),
        ("latent_dim", c_uint32),
        ("latent_rope", c_uint32),
    ]


class cp_comm_config(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("comm_type", c_uint32),
        ("stages", c_uint32),
        ("level_count", c_uint32),
        ("reserved", c_uint32),
        ("level_sizes", c_uint32 * 4),
        ("memory_cap_bytes", c_uint64),
    ]


class cp_report(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("forward_workspace", c_uint64),
        ("backward_workspace", c_uint64),
        ("saved", c_uint64),
        ("transport", c_uint64),
        ("kernels", c_uint64),
        ("forward_sent", c_uint64),
        ("forward_received", c_uint64),
        ("backward_sent", c_uint64),
        ("backward_received", c_uint64),
        ("forward_flops", c_uint64),
        ("backward_flops", c_uint64),
        ("stages", c_uint32),
        ("inner", c_uint32),
    ]


class cp_tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("dtype_code", c_uint8),
        ("dtype_bits", c_uint8),
        ("dtype_lanes", c_uint16),
        ("ndim", c_uint32),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
        ("reserved", c_uint64),
    ]


class cp_trade_args(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("sequences", POINTER(cp_sequences)),
        ("partition", c_uint32),
        ("format", c_uint32),
        ("heads", c_uint32),
        ("count", c_uint32),
        ("local", POINTER(cp_tensor)),
        ("whole", POINTER(cp_tensor)),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    ]


class cp_context(Structure):
    _fields_ = [("problem", c_uint64), ("attached", c_uint64), ("dropout_seed", c_uint64), ("flags", c_uint64)]


class cp_forward_args(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("sequences", POINTER(cp_sequences)),
        ("q", cp_tensor),
        ("k", cp_tensor),
        ("v", cp_tensor),
        ("out", cp_tensor),
        ("lse", cp_tensor),
        ("saved", c_void_p),
        ("saved_bytes", c_size_t),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("context", POINTER(cp_context)),
        ("sinks", cp_tensor),
        ("max_logit", cp_tensor),
        ("dropout_seed", c_uint64),
        ("sequence_ids", c_void_p),
        ("bias", cp_tensor),
        ("latent", cp_tensor),
        ("up_k", cp_tensor),
        ("up_v", cp_tensor),
    ]


class cp_backward_args(Sized):
    _fields_ = [
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("sequences", POINTER(cp_sequences)),
        ("context", POINTER(cp_context)),
        ("q", cp_tensor),
        ("k", cp_tensor),
        ("v", cp_tensor),
        ("out", cp_tensor),
        ("lse", cp_tensor),
        ("d_out", cp_tensor),
        ("dq", cp_tensor),
        ("dk", cp_tensor),
        ("dv", cp_tensor),
        ("saved", c_void_p),
        ("saved_bytes", c_size_t),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("sinks", cp_tensor),
        ("d_sinks", cp_tensor),
        ("sequence_ids", c_void_p),
        ("bias", cp_tensor),
        ("d_bias", cp_tensor),
        ("latent", cp_tensor),
        ("up_k", cp_tensor),
        ("up_v", cp_tensor),
        ("d_latent", cp_tensor),
        ("d_up_k", cp_tensor),
        ("d_up_v", cp_tensor),
    ]


from ._abi_mesh import *  # noqa: E402, F403
from ._abi_rows import *  # noqa: E402, F403
from ._abi_schedule import *  # noqa: E402, F403
