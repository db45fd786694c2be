//! Constants and structs of `rows` and `collect`.

use super::abi::{cp_format, cp_partition, cp_sequences, cp_side};
use libc::c_void;

/// Instead of a position or a token: padding, or beyond the end of a sequence.
pub const CP_NO_TOKEN: u32 = 0xffff_ffff;

/// What a loss is the mean of.
pub type cp_loss_mean = u32;
/// All tokens of all dp x cp ranks and micro-batches: sum(w * l) / sum(w). Megatron's calculate_per_token_loss.
pub const CP_LOSS_PER_TOKEN: u32 = 0;
/// The tokens of a replica (its cp ranks) in a micro-batch, then replicas and micro-batches. Megatron's loss functions with two results.
pub const CP_LOSS_PER_REPLICA: u32 = 1;

/// How gradients of the dp x cp ranks are put together.
pub type cp_gradients = u32;
/// Added up.
pub const CP_GRADIENTS_SUMMED: u32 = 0;
/// Averaged over all dp x cp ranks, as data parallelism does by default.
pub const CP_GRADIENTS_AVERAGED: u32 = 1;

/// What cp_loss_scale depends on.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_loss_config {
    /// sizeof(cp_loss_config).
    pub struct_size: u32,
    /// CP_LOSS_*.
    pub mean: cp_loss_mean,
    /// CP_GRADIENTS_*.
    pub gradients: cp_gradients,
    /// Ranks of a replica; 0 = 1.
    pub cp_size: u32,
    /// Replicas; 0 = 1.
    pub dp_size: u32,
    /// Micro-batches of a step; 0 = 1. Per token they are in `tokens` already.
    pub microbatches: u32,
    /// Sum of the weights: per token of all ranks and micro-batches, per replica of the replica's ranks in this micro-batch.
    pub tokens: f64,
}

/// Rows that cp_group_shift and cp_group_gather move: `row_bytes` bytes each, one after another, of whatever type.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_rows_args {
    /// sizeof(cp_rows_args).
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// The sequences.
    pub sequences: *const cp_sequences,
    /// CP_PARTITION_*.
    pub partition: cp_partition,
    /// CP_FORMAT_*.
    pub format: cp_format,
    /// CP_SIDE_*.
    pub side: cp_side,
    /// cp_group_shift: how many tokens after a row the one is that it gets; negative: before.
    pub shift: i32,
    /// Bytes of a row, at least 1.
    pub row_bytes: usize,
    /// This rank's rows, in the order of cp_partition_tokens.
    pub local: *const c_void,
    /// How many they are.
    pub local_rows: usize,
    /// The result; overlaps nothing.
    pub out: *mut c_void,
    /// Rows at `out`: as many as `local_rows` for cp_group_shift, as many as all padded sequences have for cp_group_gather.
    pub out_rows: usize,
}
