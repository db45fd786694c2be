//! Computing: what a plan's compute steps mean, as plain structs over raw memory. `cpu` carries them out on the spot, `cuda` enqueues them.

pub mod cpu;
pub mod cuda;

use crate::dtype::DType;
use crate::mask::Slice;
use crate::partition::Segment;
use crate::score::{Score, Seed};
use std::ops::Range;

/// A tensor in memory, logically `[rows, heads, dim]`, `dim` contiguous. Rows of a caller's `[batch, seq, heads, dim]` tensor are
/// numbered `batch · rows_per_batch + position`, so bshd, sbhd and bhsd differ only in strides. Strides are in elements.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Element (0, 0, 0).
    pub ptr: *mut u8,
    /// Storage type.
    pub dtype: DType,
    /// Number of rows.
    pub rows: usize,
    /// Number of heads.
    pub heads: usize,
    /// Elements per row and head; 1 for statistics such as the LSE.
    pub dim: usize,
    /// Rows of one batch entry; `rows` when there is one.
    pub rows_per_batch: usize,
    /// Elements between batch entries.
    pub stride_batch: usize,
    /// Elements between rows of a batch entry.
    pub stride_row: usize,
    /// Elements between heads.
    pub stride_head: usize,
}

// SAFETY: a view is an address and numbers; whoever reads or writes through it answers for it.
unsafe impl Send for View {}

impl View {
    /// A dense `[rows, heads, dim]` buffer.
    pub fn dense(ptr: *mut u8, dtype: DType, rows: usize, heads: usize, dim: usize) -> View {
        View {
            ptr,
            dtype,
            rows,
            heads,
            dim,
            rows_per_batch: rows.max(1),
            stride_batch: 0,
            stride_row: heads * dim,
            stride_head: dim,
        }
    }

    /// Element offset of (row, head, 0).
    pub fn offset(&self, row: usize, head: usize) -> usize {
        (row / self.rows_per_batch) * self.stride_batch
            + (row % self.rows_per_batch) * self.stride_row
            + head * self.stride_head
    }

    /// Address of (row, head, 0). Computing it is safe; whether it may be read is the caller's business.
    pub fn at(&self, row: usize, head: usize) -> *mut u8 {
        self.ptr.wrapping_add(self.offset(row, head) * self.dtype.size())
    }

    /// Rows lie one after another without gaps, so that a range of rows is a range of bytes.
    pub fn is_dense(&self) -> bool {
        let dense_rows = (self.stride_head == self.dim || self.heads == 1)
            && (self.stride_row == self.heads * self.dim || self.rows <= 1);
        let dense_batches = self.rows <= self.rows_per_batch
            || self.stride_batch == self.rows_per_batch * self.stride_row;
        dense_rows && dense_batches
    }
}

/// Which key head serves a query head. Local head `h` is global head `q_first + h`; its key head is `(q_first + h) / group`
/// globally and `kv_first` less than that locally.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeadMap {
    /// Global index of local query head 0.
    pub q_first: u32,
    /// Query heads per key head, G = H / Hkv.
    pub group: u32,
    /// Global index of local key head 0.
    pub kv_first: u32,
}

impl HeadMap {
    /// Local key head of a local query head.
    pub fn kv_of(&self, head: usize) -> usize {
        (self.q_first as usize + head) / self.group as usize - self.kv_first as usize
    }
}

/// Running softmax state of every query row and head, all fp32: un-normalised output `[rows, heads, dim_v]`, and the running
/// maximum and sum `[rows, heads, 1]`. Their units are the backend's own; only the last attend step turns them into O and LSE.
#[derive(Clone, Copy, Debug)]
pub struct State {
    /// Un-normalised output.
    pub out: View,
    /// Running maximum.
    pub max: View,
    /// Running sum.
    pub sum: View,
}

/// Where the last attend step writes: O in the storage type, and LSE (fp32, natural log).
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// `[rows, heads, dim_v]`, storage type.
    pub out: View,
    /// `[rows, heads, 1]`, fp32.
    pub lse: View,
    /// The largest visible score of every row, `[rows, heads, 1]` fp32, if it is asked for; −∞ where nothing is seen.
    pub top: Option<View>,
}

/// What scores depend on beside q, k and the slices. Every true token among the rows is in a segment; rows in none are padding.
#[derive(Clone, Copy, Debug)]
pub struct Effects<'a> {
    /// The formula.
    pub score: &'a Score,
    /// Which tokens the query rows are.
    pub queries: &'a [Segment],
    /// Which tokens the key rows are.
    pub keys: &'a [Segment],
    /// Per sequence: the key position on the diagonal of query position 0.
    pub diagonals: &'a [i32],
    /// Key of the dropout's random words.
    pub seed: Seed,
    /// Per sequence the caller's number for it, for dropout; empty: its index.
    pub ids: &'a [u32],
    /// One row, a sink for every global query head, fp32.
    pub sinks: Option<View>,
    /// Additive bias: the query rows; a head for each query head, or one for all; an element for each key of the padded sequence.
    pub bias: Option<View>,
    /// Backward: its gradient, fp32, added to.
    pub d_bias: Option<View>,
    /// Per sequence: padding keys before the first true one, which the bias has columns for.
    pub padding: &'a [u32],
}

/// One forward attend step: all rows of `q` against what `slices` let them see in `k`, `v`.
///
/// Slices are sorted by (q, k) and a row may be in several. A row in none keeps its state; with `first` it starts from the empty
/// state (O = 0, LSE = −∞) and with `last` it is written, so rows that see nothing, padding included, come out as exactly 0 and −∞.
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[rows, heads, dim_qk]`.
    pub q: View,
    /// `[key rows, kv heads, dim_qk]`.
    pub k: View,
    /// `[key rows, kv heads, dim_v]`.
    pub v: View,
    /// The work.
    pub slices: &'a [Slice],
    /// Query head → key head.
    pub heads: HeadMap,
    /// Multiplies q·k before the softmax.
    pub scale: f32,
    /// State to continue from and to leave behind; `None` only when the step is both first and last.
    pub state: Option<State>,
    /// Everything beside plain attention; `None` if that is all.
    pub effects: Option<Effects<'a>>,
    /// Start from the empty state instead of reading it.
    pub first: bool,
    /// Normalise and write the result instead of leaving the state.
    pub last: Option<Output>,
}

/// One backward attend step: adds into fp32 gradients what `slices` contribute. Rows whose LSE is −∞ contribute nothing.
///
/// With P = exp(scale·q·k − lse): dV += Pᵀ·dO; dS = P ∘ (dO·Vᵀ − delta); dQ += scale·dS·K; dK += scale·dSᵀ·Q (FlashAttention-2, arXiv 2307.08691).
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// `[rows, heads, dim_qk]`.
    pub q: View,
    /// `[key rows, kv heads, dim_qk]`.
    pub k: View,
    /// `[key rows, kv heads, dim_v]`.
    pub v: View,
    /// Gradient of the output, `[rows, heads, dim_v]`.
    pub d_out: View,
    /// Global LSE, `[rows, heads, 1]` fp32.
    pub lse: View,
    /// Σ O∘dO per row and head, `[rows, heads, 1]` fp32.
    pub delta: View,
    /// The work, sorted by (q, k).
    pub slices: &'a [Slice],
    /// Query head → key head.
    pub heads: HeadMap,
    /// As in the forward step.
    pub scale: f32,
    /// As in the forward step.
    pub effects: Option<Effects<'a>>,
    /// `[rows, heads, dim_qk]` fp32, added to.
    pub dq: View,
    /// `[key rows, kv heads, dim_qk]` fp32, added to.
    pub dk: View,
    /// `[key rows, kv heads, dim_v]` fp32, added to.
    pub dv: View,
}

/// Keys and values from latents (c ; r): k = [up_k·c ; r], v = up_v·c per head, each element summed in fp32 and rounded to the storage type.
#[derive(Clone, Debug)]
pub struct Expand<'a> {
    /// `[rows, 1, dim + rope]`.
    pub latent: View,
    /// Seen as `[dim_qk − rope, heads, dim]`, all heads.
    pub up_k: View,
    /// Seen as `[dim_v, heads, dim]`, all heads.
    pub up_v: View,
    /// Head of the weights that local head 0 is.
    pub first_head: usize,
    /// `[rows, local heads, dim_qk]`.
    pub k: View,
    /// `[rows, local heads, dim_v]`.
    pub v: View,
    /// Rows, the same in all.
    pub rows: &'a [Range<u32>],
}

/// The way back: d_latent += Σ over local heads of (up_kᵀ·dk + up_vᵀ·dv ; dk of r), d_up_k += dk·cᵀ, d_up_v += dv·cᵀ over all rows, in fp32. The order of
/// adding does not depend on the number of threads. Where operands are pairs of bf16, dk and dv are rounded to it.
#[derive(Clone, Debug)]
pub struct Contract<'a> {
    /// `[rows, local heads, dim_qk]` fp32.
    pub dk: View,
    /// `[rows, local heads, dim_v]` fp32.
    pub dv: View,
    /// As in [`Expand`].
    pub latent: View,
    /// As in [`Expand`].
    pub up_k: View,
    /// As in [`Expand`].
    pub up_v: View,
    /// As in [`Expand`].
    pub first_head: usize,
    /// `[rows, 1, dim + rope]` fp32, added to.
    pub d_latent: View,
    /// As `up_k`, fp32, added to.
    pub d_up_k: View,
    /// As `up_v`, fp32, added to.
    pub d_up_v: View,
    /// Rows, the same in all.
    pub rows: &'a [Range<u32>],
}

/// A run of rows to copy: row `src + i·src_step` to row `dst + i·dst_step` for `i` in `0 .. rows`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// First source row.
    pub src: u32,
    /// Rows between two source rows.
    pub src_step: u32,
    /// First destination row.
    pub dst: u32,
    /// Rows between two destination rows.
    pub dst_step: u32,
    /// Number of rows.
    pub rows: u32,
}

/// Copies rows of some heads, converting between storage types; with `add`, adds in fp32 instead (the destination is fp32).
#[derive(Clone, Copy, Debug)]
pub struct CopyRows<'a> {
    /// Source.
    pub src: View,
    /// First head read.
    pub src_head: usize,
    /// Destination.
    pub dst: View,
    /// First head written.
    pub dst_head: usize,
    /// Number of heads.
    pub heads: usize,
    /// The rows.
    pub runs: &'a [Run],
    /// Add instead of overwrite.
    pub add: bool,
}

/// Σ over `dim` of O∘dO, fp32: `delta[row, head]` for all rows.
#[derive(Clone, Copy, Debug)]
pub struct Delta {
    /// Output of the forward pass.
    pub out: View,
    /// Its gradient.
    pub d_out: View,
    /// `[rows, heads, 1]` fp32.
    pub delta: View,
}

/// `terms[row, head]` = −exp(sink − LSE)·delta, 0 where the LSE is −∞: what a row adds to the gradient of its head's sink.
#[derive(Clone, Copy, Debug)]
pub struct SinkTerms {
    /// One row, fp32.
    pub sinks: View,
    /// `[rows, heads, 1]` fp32.
    pub lse: View,
    /// `[rows, heads, 1]` fp32.
    pub delta: View,
    /// `[rows, heads, 1]` fp32.
    pub terms: View,
}

/// A number per head over all rows of `src` to `dst[dst_row, dst_head + head]`: the sum, or the largest. Both fp32.
#[derive(Clone, Copy, Debug)]
pub struct Reduce {
    /// `[rows, heads, 1]`.
    pub src: View,
    /// `[rows, more heads, 1]`.
    pub dst: View,
    /// Row written.
    pub dst_row: usize,
    /// First head written.
    pub dst_head: usize,
    /// The largest instead of the sum.
    pub max: bool,
}

/// Called by a backend now and then from the calling thread while it computes, so that transports can progress.
pub type Progress<'a> = &'a mut dyn FnMut() -> crate::error::Result<()>;
