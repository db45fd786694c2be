//! How tokens are dealt out to ranks: the words for it. What a rank then holds is `holding`'s business.
//!
//! ```text
//! one sequence of 16 tokens, P = 2          rank 0                     rank 1
//! zigzag      chunks r and 2P−1−r           0 1 2 3 · 12 13 14 15      4 … 11
//! contiguous  slice r                       0 … 7                      8 … 15
//! striped     every P-th token from r       0 2 4 … 14                 1 3 5 … 15
//! balanced    documents whole where they can be (`balance`)
//! ```
//! Zigzag and striped cut every sequence; contiguous cuts a dense batch per sequence and a packed (thd) buffer as one piece, so
//! that documents stay whole where they can. Lengths need not divide by anything: cut j of n lies at ⌊j·L/n⌋ of the padded length.

/// Evenly spaced tokens of one sequence that a rank holds. Padding belongs to no segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Index of the sequence.
    pub seq: u32,
    /// Position of the first token, counted from the sequence's first true (not padding) token.
    pub start: u32,
    /// Positions between tokens: 1 except for striped partitions.
    pub step: u32,
    /// Number of tokens.
    pub len: u32,
    /// Row of the first token in the local buffer.
    pub offset: u32,
}

/// Evenly spaced positions of one sequence, padding included: what a partition hands out before padding is taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stretch {
    /// Index of the sequence.
    pub seq: u32,
    /// First position in the padded sequence.
    pub start: u32,
    /// Positions between tokens.
    pub step: u32,
    /// Number of positions.
    pub len: u32,
}

/// How tokens are dealt out to ranks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Partition {
    /// Chunks r and 2P−1−r of 2P chunks of every sequence: causal work is even (Llama 3, arXiv 2407.21783 §3.3.2; Megatron's layout).
    Zigzag,
    /// One slice per rank.
    Contiguous,
    /// Every P-th token (striped attention, arXiv 2311.09431).
    Striped,
    /// Documents stay whole where they can, and all ranks compute alike: see [`crate::balance`]. Problems that layers make have its
    /// lists instead, since working them out takes as long as a plan.
    Balanced,
    /// The caller's own lists, one per rank, for queries and for keys. Local rows are in list order.
    List {
        /// Query stretches of every rank.
        q: Vec<Vec<Stretch>>,
        /// Key stretches of every rank.
        k: Vec<Vec<Stretch>>,
    },
}

/// Queries and keys are cut separately: in cross-attention their lengths differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Q, O, dO, dQ, LSE.
    Query,
    /// K, V, dK, dV.
    Key,
}

/// Does `b` continue `a`, in positions and in rows? The step of a single token says nothing, so two of them are left apart.
pub fn joins(a: &Segment, b: &Segment) -> bool {
    a.seq == b.seq
        && a.step == b.step
        && a.len.max(b.len) > 1
        && a.start + a.len * a.step == b.start
        && a.offset + a.len == b.offset
}

/// Smallest length at or above `len` that every rank gets an equal share of: a multiple of 2P for zigzag, of P otherwise.
/// Nothing here needs it; frameworks that must exchange equal shapes do.
pub fn padded_length(len: u64, ranks: u32, partition: &Partition) -> u64 {
    let parts =
        if *partition == Partition::Zigzag { 2 * u64::from(ranks) } else { u64::from(ranks) };
    len.div_ceil(parts) * parts
}
