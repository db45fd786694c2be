//! The C ABI's data: constants and structs, exactly as C sees them.

// These docs are the C header's, where [in] and [out] say who writes.
#![allow(rustdoc::broken_intra_doc_links)]

use crate::error::Status;
use crate::transport::user::CpTransportOps;
use libc::{c_char, c_void};

/// Outcome of a call: one of the CP_ERR_* numbers, or CP_OK.
pub type cp_status = i32;

/// Success.
pub const CP_OK: i32 = 0;
/// An argument is wrong. Nothing changed; everything stays usable.
pub const CP_ERR_INVALID_ARGUMENT: i32 = 1;
/// A handle is null, destroyed, or of another kind.
pub const CP_ERR_INVALID_HANDLE: i32 = 2;
/// Calls in an order that makes no sense, or from two threads at once. Everything stays usable.
pub const CP_ERR_INVALID_USAGE: i32 = 3;
/// Valid, but not offered here; the text says what and why. Everything stays usable.
pub const CP_ERR_UNSUPPORTED: i32 = 4;
/// Cannot be captured in a CUDA graph. Everything stays usable.
pub const CP_ERR_NOT_CAPTURABLE: i32 = 5;
/// Memory, a given buffer, or a declared limit is too small. Everything stays usable.
pub const CP_ERR_OUT_OF_MEMORY: i32 = 6;
/// A struct is longer than this library knows, with a tail that is not zero.
pub const CP_ERR_VERSION: i32 = 7;
/// The ranks disagree, or another rank refused its arguments; the text names it. Nothing moved; everything stays usable, unless ranks called
/// different sets of ranks: that loses the group.
pub const CP_ERR_MISMATCH: i32 = 8;
/// The CUDA driver reported an error. The group is lost.
pub const CP_ERR_CUDA: i32 = 9;
/// NCCL reported an error. The group is lost.
pub const CP_ERR_NCCL: i32 = 10;
/// A transport failed. The group is lost.
pub const CP_ERR_TRANSPORT: i32 = 11;
/// A deadline passed; the text names who was waited for. The group is lost.
pub const CP_ERR_TIMEOUT: i32 = 12;
/// A peer died; the text names it. The group is lost.
pub const CP_ERR_PEER_LOST: i32 = 13;
/// The group was aborted. The group is lost.
pub const CP_ERR_ABORTED: i32 = 14;
/// A bug in this library. Destroy the handle that it came from.
pub const CP_ERR_INTERNAL: i32 = 15;

const _: () = {
    assert!(CP_ERR_INVALID_ARGUMENT == Status::InvalidArgument as i32);
    assert!(CP_ERR_MISMATCH == Status::Mismatch as i32);
    assert!(CP_ERR_INTERNAL == Status::Internal as i32);
};

/// Host memory (DLPack's kDLCPU).
pub const CP_DEVICE_CPU: i32 = 1;
/// Memory of a CUDA device (DLPack's kDLCUDA).
pub const CP_DEVICE_CUDA: i32 = 2;

/// Type of a tensor's elements.
pub type cp_dtype = u32;
/// fp32.
pub const CP_DTYPE_F32: u32 = 1;
/// bfloat16.
pub const CP_DTYPE_BF16: u32 = 2;
/// fp16.
pub const CP_DTYPE_F16: u32 = 3;

/// Type code of IEEE floats in cp_tensor (DLPack's kDLFloat).
pub const CP_CODE_FLOAT: u8 = 2;
/// Type code of bfloat16 in cp_tensor (DLPack's kDLBfloat).
pub const CP_CODE_BFLOAT: u8 = 4;

/// How sequences lie in the tensors.
pub type cp_format = u32;
/// One sequence per batch entry, `[batch, seq, heads, dim]`. bshd, sbhd and bhsd differ only in strides.
pub const CP_FORMAT_DENSE: u32 = 0;
/// Sequences one after another, `[tokens, heads, dim]` (thd).
pub const CP_FORMAT_PACKED: u32 = 1;

/// Communication type: the four names that Megatron uses.
pub type cp_comm_type = u32;
/// Ring attention: keys and values of one peer per stage.
pub const CP_COMM_P2P: u32 = 0;
/// Keys and values of all peers in one stage.
pub const CP_COMM_ALL_GATHER: u32 = 1;
/// Heads are traded for sequence (Ulysses).
pub const CP_COMM_A2A: u32 = 2;
/// Heads are traded inside teams of consecutive ranks, keys and values between teams (USP).
pub const CP_COMM_A2A_P2P: u32 = 3;

/// Stage count in cp_comm_config: the fewest stages whose workspace stays within `memory_cap_bytes` on every rank.
pub const CP_STAGES_AUTO: u32 = 0xffff_ffff;

/// How tokens are dealt out to ranks.
pub type cp_partition = u32;
/// Chunks r and 2P-1-r of 2P chunks of every sequence: even work under a causal mask.
pub const CP_PARTITION_ZIGZAG: u32 = 0;
/// Slice r of every sequence, or of the whole packed buffer.
pub const CP_PARTITION_CONTIGUOUS: u32 = 1;
/// Every P-th token from r.
pub const CP_PARTITION_STRIPED: u32 = 2;
/// The caller's own list, given with the sequences of every call.
pub const CP_PARTITION_LIST: u32 = 3;
/// Packed documents stay whole on one rank where they can, and long ones are cut so that all ranks compute alike under a causal mask: few
/// keys move. Pieces are of 256 tokens or more, ranks' rows equal to within 256 (cp_partition_tokens tells). Packed self-attention only.
pub const CP_PARTITION_BALANCED: u32 = 4;

/// cp_attention_config.flags: no query sees a later key.
pub const CP_ATTENTION_CAUSAL: u32 = 1;
/// cp_attention_config.flags: the mask's diagonal ends in the last query and the last key (for different lengths) instead of starting at the first ones.
pub const CP_ATTENTION_BOTTOM_RIGHT: u32 = 2;
/// cp_attention_config.flags: `window_left` counts (without it the left side is unlimited).
pub const CP_ATTENTION_WINDOW_LEFT: u32 = 4;
/// cp_attention_config.flags: `window_right` counts (without it the right side is unlimited; causal makes it 0).
pub const CP_ATTENTION_WINDOW_RIGHT: u32 = 8;
/// cp_attention_config.flags: partial dK and dV travel as fp32 instead of the storage type.
pub const CP_ATTENTION_WIRE_F32: u32 = 16;
/// cp_attention_config.flags: with a2a and a2a+p2p, forward leaves the head-split Q, K, V in the saved buffer; without it backward exchanges them again.
pub const CP_ATTENTION_SAVE: u32 = 32;
/// cp_attention_config.flags: decode with a KV cache. Refused: this library trains and prefills.
pub const CP_ATTENTION_KV_CACHE: u32 = 64;
/// cp_attention_config.flags: on CUDA dQ, and the gradient of a bias that heads share, are summed in a fixed order, so that equal inputs give equal
/// bits, at some cost in speed. The CPU always does.
pub const CP_ATTENTION_DETERMINISTIC: u32 = 128;

/// cp_comm_config.flags: the classical neighbour ring instead of direct exchange, for comparison.
pub const CP_COMM_RELAY: u32 = 1;
/// cp_comm_config.flags: move queries and outputs instead of keys. Refused: keys move here.
pub const CP_COMM_MOVE_QUERIES: u32 = 2;

/// cp_group_config.flags: on CUDA the ranks agree before every forward and backward also where their hosts would not meet otherwise (NCCL): a
/// rank that calls something else, or whose arguments are wrong, is then named at once on all. It makes hosts wait for each other: for debugging.
pub const CP_GROUP_AGREE: u32 = 1;

/// How a group's ranks find each other.
pub type cp_bootstrap = u32;
/// From what is given: `id`, `allgather` or `transport`, whichever is not NULL; with none, a group of one.
pub const CP_BOOTSTRAP_AUTO: u32 = 0;
/// From the environment of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or mpirun (OMPI_*, PMI_*); `rank` and `size` are ignored.
pub const CP_BOOTSTRAP_ENV: u32 = 1;

/// How a group moves bytes.
pub type cp_transport_kind = u32;
/// `local` if all ranks are threads of one process; if they are processes, on the CPU `shm`, on CUDA NCCL if every rank finds its library, else staged.
pub const CP_TRANSPORT_AUTO: u32 = 0;
/// Ranks are threads of one process; on CUDA each with a device of its own, or several on one. Forward and backward block until the peers' hosts
/// have come to every exchange, and cannot be captured in a CUDA graph.
pub const CP_TRANSPORT_LOCAL: u32 = 1;
/// Ranks are processes of one host, over shared memory without a name. CPU only.
pub const CP_TRANSPORT_SHM: u32 = 2;
/// CUDA: NCCL, a device per rank. Hosts do not wait for each other or for devices; calls can be captured in a CUDA graph.
pub const CP_TRANSPORT_NCCL: u32 = 3;
/// CUDA: through page-locked host memory and a transport of the CPU's, the last resort. Slow: hosts wait for their devices; nothing is capturable.
pub const CP_TRANSPORT_STAGED: u32 = 4;

/// Names a new group; rank 0 makes it, all ranks get a copy.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_unique_id {
    /// Opaque.
    pub bytes: [u8; 128],
}

/// The caller's own allgather: every rank gives `bytes` bytes at `mine`; `all` (room for size × bytes) gets those of all ranks in
/// rank order. Returns 0 on success. Must not throw, and must not call this library.
pub type cp_allgather_fn = Option<
    unsafe extern "C" fn(
        ctx: *mut c_void,
        mine: *const c_void,
        all: *mut c_void,
        bytes: usize,
    ) -> i32,
>;

/// How to make a group. Zero everywhere but `struct_size`, `rank` and `size` is a good default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_group_config {
    /// sizeof(cp_group_config).
    pub struct_size: u32,
    /// CP_GROUP_*.
    pub flags: u32,
    /// This rank, 0 … size-1.
    pub rank: u32,
    /// Number of ranks. With `nccl_comm` both may be 0: they are the communicator's.
    pub size: u32,
    /// CP_BOOTSTRAP_*.
    pub bootstrap: cp_bootstrap,
    /// CP_TRANSPORT_*.
    pub transport_kind: cp_transport_kind,
    /// Id from cp_get_unique_id, or NULL.
    pub id: *const cp_unique_id,
    /// The caller's allgather, or NULL; used only inside cp_group_init: once, or twice if the ranks are on CUDA devices of several hosts.
    pub allgather: cp_allgather_fn,
    /// First argument of `allgather`.
    pub allgather_ctx: *mut c_void,
    /// The caller's transport, or NULL; context_parallel_mpi.h makes one from an MPI_Comm. On success the group owns it and destroys it; after an error it is still the caller's.
    pub transport: *const CpTransportOps,
    /// Deadline of every wait in milliseconds; 0 = 300,000.
    pub timeout_ms: u64,
    /// CP_DEVICE_CPU, or 0 for the same, or CP_DEVICE_CUDA; equal on all ranks.
    pub device_type: i32,
    /// CUDA's number of this rank's device; 0 on the CPU.
    pub device_id: i32,
    /// CUDA: the caller's own ncclComm_t, or NULL: NCCL then needs no other way for the ranks to find each other. It stays the caller's, who keeps it
    /// until group and layers are destroyed and uses it for nothing else during calls; a group that is lost aborts it.
    pub nccl_comm: *mut c_void,
    /// CUDA: file of the NCCL library, or NULL: CP_NCCL from the environment, else one that the process has already, else libnccl.so.2. A process
    /// opens one.
    pub nccl_library: *const c_char,
}

pub use crate::transport::user::{
    CpMessage as cp_message, CpPiece as cp_piece, CpTransportOps as cp_transport_ops,
};

/// A tensor: memory of the caller's, with shape and element strides. The numbers are DLPack's. Frozen: it never grows.
///
/// Dense format: `[batch, seq, heads, dim]`, ndim 4. Packed format: `[tokens, heads, dim]`, ndim 3. LSE: `[batch, heads, seq]`, ndim 3, or
/// packed `[heads, tokens]`, ndim 2. Strides are not negative, the last is 1 (LSE: any). Data is aligned to the element size; on CUDA data and
/// all strides but the last (not the LSE's, nor a bias's) are multiples of 16 bytes, and elements are bf16 or fp16.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_tensor {
    /// First element.
    pub data: *mut c_void,
    /// CP_DEVICE_*, the layer's; 0 is CP_DEVICE_CPU.
    pub device_type: i32,
    /// CUDA's number of the device, the layer's; 0 on the CPU.
    pub device_id: i32,
    /// CP_CODE_FLOAT or CP_CODE_BFLOAT.
    pub dtype_code: u8,
    /// 16 or 32.
    pub dtype_bits: u8,
    /// 1.
    pub dtype_lanes: u16,
    /// Number of dimensions in use.
    pub ndim: u32,
    /// Elements along each dimension.
    pub shape: [i64; 4],
    /// Elements from one index to the next, along each dimension.
    pub stride: [i64; 4],
    /// Must be 0.
    pub reserved: u64,
}

const _: () = assert!(size_of::<cp_tensor>() == 96);

/// Evenly spaced tokens of a caller's own partition: positions start, start + step, … of a padded sequence.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_stretch {
    /// Index of the sequence.
    pub seq: u32,
    /// First position.
    pub start: u32,
    /// Positions between tokens, at least 1; the same for all stretches of a sequence.
    pub step: u32,
    /// Number of tokens.
    pub len: u32,
}

/// cp_mask_slice.flags: `lo` counts (without it there is no least difference).
pub const CP_SLICE_LO: u32 = 1;
/// cp_mask_slice.flags: `hi` counts (without it there is no greatest difference).
pub const CP_SLICE_HI: u32 = 2;

/// A part of a mask of the caller's own: queries q_begin … q_end - 1 of a sequence see its keys k_begin … k_end - 1, as far as
/// lo <= key - query <= hi and the layer's own mask (causal, window) lets them. Positions count from the sequence's first true token, and no
/// range goes beyond the true tokens. So {s, 0, n, 0, n} is all of sequence s, and with hi = 0 and CP_SLICE_HI its causal half.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_mask_slice {
    /// Index of the sequence.
    pub sequence: u32,
    /// First query.
    pub q_begin: u32,
    /// One past the last query; greater than `q_begin`.
    pub q_end: u32,
    /// First key.
    pub k_begin: u32,
    /// One past the last key; greater than `k_begin`.
    pub k_end: u32,
    /// CP_SLICE_*.
    pub flags: u32,
    /// Least key - query; counts with CP_SLICE_LO, else 0.
    pub lo: i32,
    /// Greatest key - query; counts with CP_SLICE_HI, else 0.
    pub hi: i32,
}

const _: () = assert!(size_of::<cp_mask_slice>() == 32);

/// The sequences of one call: all of them, with their global lengths, equal on every rank. All arrays are host memory and are read during
/// the call only. A k field that is zero or NULL means "as q".
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_sequences {
    /// sizeof(cp_sequences).
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// Batch entries, or packed sequences.
    pub count: u32,
    /// Dense: global padded query length of every entry. Packed: 0.
    pub seq_q: u32,
    /// Dense: global padded key length.
    pub seq_k: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Dense: true query lengths, `[count]`; NULL = all padded length.
    pub lens_q: *const i32,
    /// Dense: true key lengths; NULL = as q if the padded lengths are equal, else all of the padded length.
    pub lens_k: *const i32,
    /// Dense: padding tokens before the first true one, `[count]` (left padding); NULL = 0.
    pub before_q: *const i32,
    /// Dense: the same for keys; NULL = as q if the padded lengths are equal, else 0.
    pub before_k: *const i32,
    /// Packed: cumulative true query lengths, `[count + 1]`, starting with 0.
    pub cu_seqlens_q: *const i32,
    /// Packed: the same for keys.
    pub cu_seqlens_k: *const i32,
    /// Packed: cumulative padded query lengths, `[count + 1]`; NULL = no padding.
    pub cu_seqlens_q_padded: *const i32,
    /// Packed: the same for keys; NULL = as q if cu_seqlens_k is NULL too, else no padding.
    pub cu_seqlens_k_padded: *const i32,
    /// CP_PARTITION_LIST: query stretches of rank 0, then rank 1, …
    pub list_q: *const cp_stretch,
    /// CP_PARTITION_LIST: key stretches; NULL = as q.
    pub list_k: *const cp_stretch,
    /// Number of query stretches of each rank, `[ranks of the group]`.
    pub list_q_counts: *const u32,
    /// Number of key stretches of each rank.
    pub list_k_counts: *const u32,
    /// What queries see at most, `[slice_count]`, in any order; NULL = what the layer's mask lets them see. Where there are slices, nothing else
    /// is seen of any sequence, and no query sees a key in two of them. Attention only: who holds what does not depend on it.
    pub slices: *const cp_mask_slice,
    /// Number of slices; 0 exactly if `slices` is NULL.
    pub slice_count: u64,
}

/// Gives `bytes` bytes of device memory, aligned to 64, that work enqueued on `stream` (a CUstream) from now on may use; NULL on failure. Called
/// only inside forward and backward; must not throw, and must not call this library.
pub type cp_device_alloc_fn = Option<
    unsafe extern "C" fn(ctx: *mut c_void, bytes: usize, stream: *mut c_void) -> *mut c_void,
>;

/// Takes memory back that a cp_device_alloc_fn gave, before the call that got it returns: work enqueued on `stream` so far still uses it.
pub type cp_device_free_fn = Option<
    unsafe extern "C" fn(ctx: *mut c_void, ptr: *mut c_void, bytes: usize, stream: *mut c_void),
>;

/// A layer: what stays the same over its calls.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_attention_config {
    /// sizeof(cp_attention_config).
    pub struct_size: u32,
    /// CP_ATTENTION_*.
    pub flags: u32,
    /// Query heads.
    pub heads: u32,
    /// Key heads; divides `heads`; 0 = `heads`.
    pub kv_heads: u32,
    /// Elements per head of Q and K: a multiple of 8 up to 256.
    pub head_dim_qk: u32,
    /// Elements per head of V and O: a multiple of 8 up to 256; 0 = `head_dim_qk`.
    pub head_dim_v: u32,
    /// CP_DTYPE_*.
    pub dtype: cp_dtype,
    /// CP_FORMAT_*.
    pub format: cp_format,
    /// CP_PARTITION_*.
    pub partition: cp_partition,
    /// Keys before the diagonal that are seen; counts with CP_ATTENTION_WINDOW_LEFT.
    pub window_left: u32,
    /// Keys after the diagonal that are seen; counts with CP_ATTENTION_WINDOW_RIGHT.
    pub window_right: u32,
    /// Multiplies q·k before the softmax; 0 = 1/sqrt(head_dim_qk).
    pub softmax_scale: f32,
    /// Most rows of Q or K that a rank ever holds, padding included; 0 = no limit. Beyond it calls are refused.
    pub max_tokens_per_rank: u32,
    /// Threads of the CPU backend, the calling one included; 0 = CP_THREADS from the environment, or 1.
    pub threads: u32,
    /// CP_DEVICE_CPU, or 0 for the same, or CP_DEVICE_CUDA. The layer's groups are of the same device.
    pub device_type: i32,
    /// CUDA's number of the device; 0 on the CPU.
    pub device_id: i32,
    /// CUDA: attention kernels launch so many multiprocessors' worth of blocks fewer, to leave room to others, such as NCCL's. Forward runs two blocks on
    /// a multiprocessor and the device spreads them, so its room is spread too. Deterministic backward leaves none.
    pub sm_margin: u32,
    /// CUDA: pieces of the mask (one per pair of query and key chunks or documents, and slice, that see each other) that one rank computes in one
    /// stage, at most; 0 = 1024. Work lists are part of the workspace, and this bounds them, if no row is in more than four pieces for each rank of
    /// the group. Slices may cut finer: cp_attention_report says what a call needs.
    pub max_segments: u32,
    /// CUDA: gives device memory to a call that brings no workspace; NULL: the layer keeps its own.
    pub device_alloc: cp_device_alloc_fn,
    /// CUDA: takes it back; given if `device_alloc` is.
    pub device_free: cp_device_free_fn,
    /// First argument of both.
    pub device_alloc_ctx: *mut c_void,
    /// Soft-cap: scores x = softmax_scale·q·k become softcap·tanh(x/softcap); 0 = none.
    pub softcap: f32,
    /// Probability of dropping a weight, 0 … below 1. What is dropped depends on seed, sequence, head and positions only, not on the ranks.
    pub dropout: f32,
    /// ALiBi: slopes of the query heads, `[heads]`, host memory that is read during the call only; NULL = none. A score loses
    /// slope·|key position − diagonal|, after the soft-cap; the diagonal is the mask's.
    pub alibi_slopes: *const f32,
    /// Number of query head 0 among the heads of the whole model, for dropout: ranks of tensor parallelism hold different ones.
    pub head_offset: u32,
    /// CP_REACH_*, not CP_REACH_NONE: every query head has a sink, given with every call; the gradient that backward writes is this rank's part, or
    /// the sum over the group. Off-by-one softmax is a sink of 0.
    pub sinks: cp_reach,
    /// CP_REACH_*, not CP_REACH_NONE: forward writes the largest visible score of every query head, over this rank's part or over the group. NaN among them
    /// do not count.
    pub max_logit: cp_reach,
    /// CP_BIAS_*, CP_BIAS among them: an additive bias `[batch, heads, queries, keys]` comes with every call and is added to the scores after
    /// softmax_scale, soft-cap and ALiBi; 0 = none.
    pub bias: u32,
    /// CP_KV_WIRE_*: how keys and values travel between ranks, and so what every rank attends, its own keys included; 0 = in `dtype`.
    pub kv_wire: cp_kv_wire,
    /// Must be 0.
    pub reserved: u32,
    /// Multi-head latent attention: elements of the latent c that keys and values of a token are made of, a multiple of 8 up to 4096; 0 = none. Calls
    /// then have `latent`, `up_k` and `up_v` instead of `k` and `v`: head h has `k = [up_k[h]·c ; r]`, `v = up_v[h]·c`, rounded to the storage type. Latents
    /// travel between ranks, and each rank expands those that it attends for its own heads. kv_heads is `heads`, or 0.
    pub latent_dim: u32,
    /// With latent_dim: elements of r, the part of a key that all heads share and that comes with its positions rotated into it: a multiple of 8 below
    /// head_dim_qk.
    pub latent_rope: u32,
}

/// cp_attention_config.bias: there is one; without other flags it is the same for all batch entries, heads and queries.
pub const CP_BIAS: u32 = 1;
/// cp_attention_config.bias: one for every batch entry (dense format).
pub const CP_BIAS_BATCH: u32 = 2;
/// cp_attention_config.bias: one for every query head.
pub const CP_BIAS_HEADS: u32 = 4;
/// cp_attention_config.bias: one for every query.
pub const CP_BIAS_QUERIES: u32 = 8;
/// cp_attention_config.bias: backward writes its gradient; needs CP_BIAS_QUERIES.
pub const CP_BIAS_GRADIENT: u32 = 16;

/// How far a number per head reaches.
pub type cp_reach = u32;
/// It is not asked for.
pub const CP_REACH_NONE: u32 = 0;
/// This rank's part: the caller puts the ranks' together, as it does with its other gradients. What is forward's is of the rows and heads that this
/// rank computes (with a2a the others' are -inf), what is backward's of its own rows and all heads.
pub const CP_REACH_RANK: u32 = 1;
/// The whole group's: the same number on every rank, for one more exchange of some bytes.
pub const CP_REACH_GROUP: u32 = 2;

/// How keys and values travel between ranks.
pub type cp_kv_wire = u32;
/// In the tensors' storage type.
pub const CP_KV_WIRE_STORAGE: u32 = 0;
/// As 8-bit numbers E4M3 (up to 448) in blocks: 32 consecutive elements of a row and head (the last block of a head has as many as are left) share a
/// power of two, the smallest with which rounding to nearest even gives nothing beyond the format's largest number. That is 1.03 bytes an element (1.13 of heads of 8) instead of 2 or 4. The result is
/// exactly attention of Q with K and V rounded so, whatever the communication type and the number of ranks, one included, and so are O, LSE, dQ; dK and dV are the
/// gradients of the rounded K and V, and travel as without it. A block with a NaN or an infinity becomes NaN.
pub const CP_KV_WIRE_E4M3: u32 = 1;
/// The same with E5M2 (up to 57344): one mantissa bit fewer, more range within a block.
pub const CP_KV_WIRE_E5M2: u32 = 2;

/// How a group communicates for a layer. All zero is p2p.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_comm_config {
    /// sizeof(cp_comm_config).
    pub struct_size: u32,
    /// CP_COMM_RELAY, …
    pub flags: u32,
    /// CP_COMM_P2P, …
    pub comm_type: cp_comm_type,
    /// KV stages, 1 … b-1; 0 = what the name stands for; CP_STAGES_AUTO = the fewest within `memory_cap_bytes`.
    pub stages: u32,
    /// Exchange levels in `level_sizes`: 0, or 2 for a2a+p2p (innermost first: consecutive ranks). More are refused.
    pub level_count: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Sizes of the levels; their product is the group's size.
    pub level_sizes: [u32; 4],
    /// Workspace that no rank may exceed; counts with CP_STAGES_AUTO.
    pub memory_cap_bytes: u64,
}

/// cp_forward_args.flags: dropout_seed is the address of the seed, a uint64_t in device memory that the kernels of forward and backward read when they
/// run: a graph draws another mask in every replay for which it is written before. On CUDA, with dropout. Forward and backward must find the same.
pub const CP_FORWARD_SEED_AT: u32 = 1;

/// Forward's note to backward. Plain data; copy it as you like.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_context {
    /// Fingerprint of the problem.
    pub problem: u64,
    /// Group and communication that forward used.
    pub attached: u64,
    /// Forward's dropout seed.
    pub dropout_seed: u64,
    /// CP_FORWARD_SEED_AT if that is an address; the upper half is a hash of `sequence_ids`.
    pub flags: u64,
}

/// Arguments of cp_attention_forward. S is the local sequence: what the partition gives this rank.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_forward_args {
    /// sizeof(cp_forward_args).
    pub struct_size: u32,
    /// CP_FORWARD_SEED_AT or 0.
    pub flags: u32,
    /// The sequences. [in]
    pub sequences: *const cp_sequences,
    /// `[batch, S_q, heads, head_dim_qk]`. [in]
    pub q: cp_tensor,
    /// `[batch, S_k, kv_heads, head_dim_qk]`. [in]
    pub k: cp_tensor,
    /// `[batch, S_k, kv_heads, head_dim_v]`. [in]
    pub v: cp_tensor,
    /// `[batch, S_q, heads, head_dim_v]`. [out]
    pub out: cp_tensor,
    /// `[batch, heads, S_q]` fp32, natural log. [out]
    pub lse: cp_tensor,
    /// Kept for backward: cp_attention_saved_size bytes, aligned to 64, on CUDA device memory; NULL when that is 0. [out]
    pub saved: *mut c_void,
    /// Bytes at `saved`.
    pub saved_bytes: usize,
    /// At least cp_attention_workspace_size bytes, aligned to 64, on CUDA device memory that is used until the stream is through with the call; or
    /// NULL: from `device_alloc`, or the layer's own.
    pub workspace: *mut c_void,
    /// Bytes at `workspace`.
    pub workspace_bytes: usize,
    /// For backward; may be NULL. [out]
    pub context: *mut cp_context,
    /// With sinks: `[heads]` fp32, ndim 1. [in]
    pub sinks: cp_tensor,
    /// With max_logit: `[heads]` fp32, ndim 1; -inf where nothing is seen. [out]
    pub max_logit: cp_tensor,
    /// With dropout: the seed, equal on all ranks; with CP_FORWARD_SEED_AT its address.
    pub dropout_seed: u64,
    /// With dropout: a number for every sequence, `[count]`, equal on all ranks: equal numbers drop alike, wherever and with whatever else they
    /// are computed. NULL = index in the call.
    pub sequence_ids: *const u32,
    /// With a bias: `[batch or 1, heads or 1, S_q or 1, keys]`, ndim 4 in either format (packed: batch is 1, S_q the local tokens), in the layer's
    /// storage type. Queries are this rank's, keys those of the whole padded sequence in natural order (packed: of the longest one). With a2a it
    /// is exchanged like Q. -inf hides a key as a mask does. No number does that for all keys of a query: with -1e9 for each of them fp32 does not hold
    /// its LSE finely enough for backward, and its gradients are of the wrong size. [in]
    pub bias: cp_tensor,
    /// With latent_dim, and then `k` and `v` are not given: (c ; r) of this rank's key tokens, `[batch, S_k, 1, latent_dim + latent_rope]`. [in]
    pub latent: cp_tensor,
    /// With latent_dim: `[heads, head_dim_qk - latent_rope, latent_dim]`, ndim 3, storage type, equal on all ranks. [in]
    pub up_k: cp_tensor,
    /// With latent_dim: `[heads, head_dim_v, latent_dim]`, likewise. [in]
    pub up_v: cp_tensor,
}

/// Arguments of cp_attention_backward: what forward had, the gradient of the output, and where the gradients go.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_backward_args {
    /// sizeof(cp_backward_args).
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// The same sequences as forward had. [in]
    pub sequences: *const cp_sequences,
    /// What forward wrote. [in]
    pub context: *const cp_context,
    /// As in forward. [in]
    pub q: cp_tensor,
    /// As in forward. [in]
    pub k: cp_tensor,
    /// As in forward. [in]
    pub v: cp_tensor,
    /// Forward's result. [in]
    pub out: cp_tensor,
    /// Forward's result. [in]
    pub lse: cp_tensor,
    /// Gradient of `out`, its shape. [in]
    pub d_out: cp_tensor,
    /// Shape of `q`. [out]
    pub dq: cp_tensor,
    /// Shape of `k`. [out]
    pub dk: cp_tensor,
    /// Shape of `v`. [out]
    pub dv: cp_tensor,
    /// What forward left. [in]
    pub saved: *const c_void,
    /// Bytes at `saved`.
    pub saved_bytes: usize,
    /// As in forward.
    pub workspace: *mut c_void,
    /// Bytes at `workspace`.
    pub workspace_bytes: usize,
    /// As in forward. [in]
    pub sinks: cp_tensor,
    /// With sinks: their gradient, `[heads]` fp32, ndim 1. [out]
    pub d_sinks: cp_tensor,
    /// As in forward; the seed is in the context.
    pub sequence_ids: *const u32,
    /// As in forward. [in]
    pub bias: cp_tensor,
    /// With CP_BIAS_GRADIENT: shape of `bias`: what this rank's queries add, over all keys. [out]
    pub d_bias: cp_tensor,
    /// As in forward. [in]
    pub latent: cp_tensor,
    /// As in forward. [in]
    pub up_k: cp_tensor,
    /// As in forward. [in]
    pub up_v: cp_tensor,
    /// With latent_dim, and then `dk` and `dv` are not given: shape of `latent`, complete. On CUDA gradients of the keys and
    /// values that were expanded are rounded to the storage type on the way: in fp16 they end at 65504. [out]
    pub d_latent: cp_tensor,
    /// With latent_dim: shape of `up_k`, fp32: this rank's part, to be summed over the group together with the other weights' gradients. With p2p and
    /// all_gather it is what the rank's own queries give, with a2a what all queries give through the rank's heads (0 for other heads), with a2a+p2p what
    /// its team's queries give through its heads. [out]
    pub d_up_k: cp_tensor,
    /// Likewise, shape of `up_v`. [out]
    pub d_up_v: cp_tensor,
}

/// What a layer's call needs in memory and moves, for this rank. Bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct cp_report {
    /// sizeof(cp_report), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Workspace of forward.
    pub forward_workspace: u64,
    /// Workspace of backward.
    pub backward_workspace: u64,
    /// Kept between the two.
    pub saved: u64,
    /// Held by the transport (rings, mailboxes).
    pub transport: u64,
    /// Held by the kernels (packed tiles).
    pub kernels: u64,
    /// Sent in forward.
    pub forward_sent: u64,
    /// Received in forward.
    pub forward_received: u64,
    /// Sent in backward.
    pub backward_sent: u64,
    /// Received in backward.
    pub backward_received: u64,
    /// Floating-point operations of forward: of attention, and of what expands latents.
    pub forward_flops: u64,
    /// Floating-point operations of backward, likewise.
    pub backward_flops: u64,
    /// KV stages.
    pub stages: u32,
    /// Size of the head exchange.
    pub inner: u32,
}

/// What a group has moved so far, its subsets included.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct cp_statistics {
    /// sizeof(cp_statistics), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Time in which computation stood still for an exchange.
    pub exposed_ns: u64,
}

/// Which half of a training step a plan is for.
pub type cp_pass = u32;
/// Forward.
pub const CP_PASS_FORWARD: u32 = 0;
/// Backward.
pub const CP_PASS_BACKWARD: u32 = 1;

/// How a plan is written.
pub type cp_plan_format = u32;
/// Steps of this rank, a line each.
pub const CP_PLAN_TEXT: u32 = 0;
/// The same as JSON.
pub const CP_PLAN_JSON: u32 = 1;

/// Which side of attention: queries or keys.
pub type cp_side = u32;
/// Q, O, LSE and their gradients.
pub const CP_SIDE_Q: u32 = 0;
/// K, V and their gradients.
pub const CP_SIDE_K: u32 = 1;
