//! The C ABI's data of sequence ↔ heads.

use super::abi::{cp_format, cp_partition, cp_sequences, cp_tensor};
use libc::c_void;

/// One exchange between a rank's rows of all heads and whole sequences of a rank's heads, of up to 16 tensors at once.
///
/// Dense format: `[batch, seq, heads, dim]`, packed: `[tokens, heads, dim]`, as in attention. A tensor may be fp32, bf16 or fp16, each its own, with any
/// number of elements per head; on CUDA too, and there is no rule of 16 bytes. `local[i]` has this rank's rows, in the order of cp_partition_tokens,
/// and all heads; its heads divide `heads`. `whole[i]` has the rows of all padded sequences in their order, and the heads that cp_trade_share says.
/// Padding rows of what is read are not read; of what is written they are exactly 0. With whole tensors without gaps messages land in place.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_trade_args {
    /// sizeof(cp_trade_args).
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// The sequences; the query side counts.
    pub sequences: *const cp_sequences,
    /// CP_PARTITION_*.
    pub partition: cp_partition,
    /// CP_FORMAT_*.
    pub format: cp_format,
    /// Heads that are dealt out to the ranks, a multiple of every tensor's; 0 = the most that a tensor has.
    pub heads: u32,
    /// Number of tensors, 1 … 16.
    pub count: u32,
    /// This rank's rows of every tensor, `[count]`.
    pub local: *const cp_tensor,
    /// Whole sequences of every tensor, `[count]`.
    pub whole: *const cp_tensor,
    /// At least cp_trade_workspace_size bytes, aligned to 64; NULL = memory that the group keeps.
    pub workspace: *mut c_void,
    /// Bytes at `workspace`.
    pub workspace_bytes: usize,
}
