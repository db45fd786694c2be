//! The C ABI's data for schedules.

// These docs are the C header's, where [in] and [out] say who writes.
#![allow(rustdoc::broken_intra_doc_links)]

/// Who decides which samples run on which ranks.
pub type cp_scheduler = u32;
/// Ours: any number of ranks for a sample, packs, one micro-batch of nested ranges of ranks in which no rank waits.
pub const CP_SCHEDULER_NESTED: u32 = 0;
/// BalancedCPScheduler as released with megatron-core 0.16.1: powers of two, every sample a pack of its own.
pub const CP_SCHEDULER_MEGATRON: u32 = 1;
/// DefaultDynamicCPScheduler of Megatron-LM's dev branch: powers of two, one pack per rank and micro-batch.
pub const CP_SCHEDULER_DYNAMIC: u32 = 2;
/// Megatron-LM's DpBalancedScheduler: `cp_size` ranks for every pack, samples in their order.
pub const CP_SCHEDULER_DP_BALANCED: u32 = 3;

/// What is scheduled onto what, and what it costs.
///
/// Seconds that a pack takes on each of its p ranks, forward and backward of one layer:
/// cost_call + cost_rank (p - 1) + the sum over its samples of (cost_pair L^2 / 2 + cost_token L) / p + cost_wire L (p - 1) / p, L tokens each.
/// If all five are 0, they are those of a layer of Llama 3 8B in bf16 on H100s with a 400 Gb/s network; only their ratios matter.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_schedule_config {
    /// sizeof(cp_schedule_config), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Number of ranks: dp times cp.
    pub ranks: u32,
    /// Most tokens of one pack that a rank holds (Megatron's max_seqlen_per_dp_cp_rank).
    pub tokens_per_rank: u32,
    /// CP_SCHEDULER_*.
    pub scheduler: cp_scheduler,
    /// CP_SCHEDULER_DYNAMIC: fewest ranks of a sample; CP_SCHEDULER_DP_BALANCED: ranks of every pack; 0: 1. Others: 0.
    pub cp_size: u32,
    /// Per (query, key) pair.
    pub cost_pair: f64,
    /// Per token, outside of attention.
    pub cost_token: f64,
    /// Per token that other ranks hold.
    pub cost_wire: f64,
    /// Per pack and further rank.
    pub cost_rank: f64,
    /// Per pack.
    pub cost_call: f64,
}

/// Where a sample runs. Micro-batches run one after another, with a barrier between. In one, a rank runs its packs widest range of ranks first, those of
/// one range in ascending order; all its ranks then arrive at a pack together.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct cp_placement {
    /// Counted from 0.
    pub micro_batch: u32,
    /// The sample runs on `rank_count` consecutive ranks from here: make a subset of them, or give them to cp_set_group.
    pub first_rank: u32,
    /// Its context-parallel size.
    pub rank_count: u32,
    /// Samples of a micro-batch with equal ranks and equal `pack` run in one call, as packed sequences.
    pub pack: u32,
}
