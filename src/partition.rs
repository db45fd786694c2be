//! Which tokens a rank holds, and in which row of its local buffers.
//!
//! ```text
//! one sequence of 16 tokens, P = 2          rank 0                     rank 1
//! zigzag      chunks r and 2P−1−r           0 1 2 3 · 12 13 14 15      4 … 11
//! contiguous  slice r                       0 … 7                      8 … 15
//! striped     every P-th token from r       0 2 4 … 14                 1 3 5 … 15
//! ```
//! Zigzag and striped cut every sequence; contiguous cuts a dense batch per sequence and a packed (thd) buffer as one piece, so
//! that documents stay whole where they can. Lengths need not divide by anything: cut j of n lies at ⌊j·L/n⌋ of the padded length.

use crate::problem::{Extent, Problem};

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

/// What one rank holds of one side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// Rows of the local buffer, padding included.
    pub rows: u32,
    /// The true tokens among them, in row order.
    pub segments: Vec<Segment>,
}

/// All positions that `rank` holds, padding included, in row order.
pub fn stretches(problem: &Problem, rank: u32, side: Side) -> Vec<Stretch> {
    let ranks = u64::from(problem.ranks);
    let r = u64::from(rank);
    let cut = |j: u64, parts: u64, length: u32| (j * u64::from(length) / parts) as u32;
    let mut out = Vec::new();
    let extents = problem.seqs.iter().map(|s| s.extent(side).padded).enumerate();
    match &problem.partition {
        Partition::Zigzag => {
            for (seq, padded) in extents {
                for j in [r, 2 * ranks - 1 - r] {
                    let (from, to) = (cut(j, 2 * ranks, padded), cut(j + 1, 2 * ranks, padded));
                    out.push(Stretch { seq: seq as u32, start: from, step: 1, len: to - from });
                }
            }
        }
        Partition::Contiguous if problem.packed => {
            let total: u64 = problem.seqs.iter().map(|s| u64::from(s.extent(side).padded)).sum();
            let (from, to) = (r * total / ranks, (r + 1) * total / ranks);
            let mut base = 0u64;
            for (seq, padded) in extents {
                let (a, b) = (from.max(base), to.min(base + u64::from(padded)));
                if a < b {
                    out.push(Stretch {
                        seq: seq as u32,
                        start: (a - base) as u32,
                        step: 1,
                        len: (b - a) as u32,
                    });
                }
                base += u64::from(padded);
            }
        }
        Partition::Contiguous => {
            for (seq, padded) in extents {
                let (from, to) = (cut(r, ranks, padded), cut(r + 1, ranks, padded));
                out.push(Stretch { seq: seq as u32, start: from, step: 1, len: to - from });
            }
        }
        Partition::Striped => {
            for (seq, padded) in extents {
                let len = padded.saturating_sub(rank).div_ceil(problem.ranks);
                out.push(Stretch { seq: seq as u32, start: rank, step: problem.ranks, len });
            }
        }
        Partition::List { q, k } => {
            let lists = if side == Side::Query { q } else { k };
            out.extend_from_slice(&lists[rank as usize]);
        }
    }
    out.retain(|s| s.len > 0);
    out
}

/// What `rank` holds: the stretches without their padding, neighbours joined.
pub fn holding(problem: &Problem, rank: u32, side: Side) -> Holding {
    let mut rows = 0;
    let mut segments: Vec<Segment> = Vec::new();
    for s in stretches(problem, rank, side) {
        if let Some(segment) = without_padding(&s, problem.seqs[s.seq as usize].extent(side), rows)
        {
            match segments.last_mut() {
                Some(last) if joins(last, &segment) => last.len += segment.len,
                _ => segments.push(segment),
            }
        }
        rows += s.len;
    }
    Holding { rows, segments }
}

/// Does `b` continue `a`, in positions and in rows? The step of a single token says nothing, so two of them are left apart.
pub fn joins(a: &Segment, b: &Segment) -> bool {
    a.seq == b.seq
        && a.step == b.step
        && a.len.max(b.len) > 1
        && a.start + a.len * a.step == b.start
        && a.offset + a.len == b.offset
}

/// The true tokens of a stretch that starts at local row `row`.
fn without_padding(s: &Stretch, extent: Extent, row: u32) -> Option<Segment> {
    let index_at_or_after =
        |position: u32| position.saturating_sub(s.start).div_ceil(s.step).min(s.len);
    let first = index_at_or_after(extent.before);
    let last = index_at_or_after(extent.before + extent.len);
    (first < last).then(|| Segment {
        seq: s.seq,
        start: s.start + first * s.step - extent.before,
        step: s.step,
        len: last - first,
        offset: row + first,
    })
}

/// Global token index of every local row, in row order: positions in the padded sequences laid one after another. For packed
/// sequences this is the index list that selects a rank's rows from the whole packed buffer.
pub fn tokens(problem: &Problem, rank: u32, side: Side) -> Vec<u32> {
    let mut base = vec![0u32];
    for s in &problem.seqs {
        base.push(base[base.len() - 1] + s.extent(side).padded);
    }
    let row = |s: Stretch| {
        let base = base[s.seq as usize];
        (0..s.len).map(move |i| base + s.start + i * s.step)
    };
    stretches(problem, rank, side).into_iter().flat_map(row).collect()
}

/// Smallest length at or above `len` that every rank gets an equal share of: a multiple of 2P for zigzag, of P otherwise.
/// Nothing here needs it; frameworks that must exchange equal shapes do.
pub fn padded_length(len: u64, ranks: u32, partition: &Partition) -> u64 {
    let parts =
        if *partition == Partition::Zigzag { 2 * u64::from(ranks) } else { u64::from(ranks) };
    len.div_ceil(parts) * parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::{Sequence, tests::small};

    fn packed(cu: &[u32], ranks: u32) -> Problem {
        let mut p = small(ranks, 1, 1);
        p.packed = true;
        p.seqs = cu.windows(2).map(|w| Sequence::square(w[1] - w[0])).collect();
        p
    }

    /// The vectors published with TransformerEngine's `thd_get_partitioned_indices`.
    #[test]
    fn zigzag_indices_are_transformer_engines() {
        let p = packed(&[0, 8, 16], 2);
        assert_eq!(tokens(&p, 0, Side::Query), [0, 1, 6, 7, 8, 9, 14, 15]);
        assert_eq!(tokens(&p, 1, Side::Query), [2, 3, 4, 5, 10, 11, 12, 13]);
        let p = packed(&[0, 8, 16, 24, 40], 4);
        assert_eq!(tokens(&p, 0, Side::Query), [0, 7, 8, 15, 16, 23, 24, 25, 38, 39]);
    }

    #[test]
    fn every_token_has_one_holder_and_padding_none() {
        for ranks in 1..9 {
            for partition in [Partition::Zigzag, Partition::Contiguous, Partition::Striped] {
                for packed in [false, true] {
                    let mut p = small(ranks, 1, 1);
                    p.packed = packed;
                    p.partition = partition.clone();
                    let q = Extent { before: 3, len: 11, padded: 17 };
                    p.seqs = vec![
                        Sequence { q, k: q },
                        Sequence::square(5),
                        Sequence { q: Extent { before: 0, len: 0, padded: 4 }, k: q },
                    ];
                    check(&p);
                }
            }
        }
    }

    fn check(p: &Problem) {
        let mut seen: Vec<Vec<u32>> = p.seqs.iter().map(|s| vec![0; s.q.len as usize]).collect();
        let mut all = Vec::new();
        for rank in 0..p.ranks {
            let held = holding(p, rank, Side::Query);
            let local = tokens(p, rank, Side::Query);
            assert_eq!(held.rows as usize, local.len());
            for s in &held.segments {
                for i in 0..s.len {
                    let position = s.start + i * s.step;
                    seen[s.seq as usize][position as usize] += 1;
                    let base: u32 = p.seqs[..s.seq as usize].iter().map(|s| s.q.padded).sum();
                    assert_eq!(
                        local[(s.offset + i) as usize],
                        base + p.seqs[s.seq as usize].q.before + position
                    );
                }
            }
            all.extend(local);
        }
        assert!(seen.iter().flatten().all(|&n| n == 1), "{p:?}");
        all.sort_unstable();
        let total: u32 = p.seqs.iter().map(|s| s.q.padded).sum();
        assert_eq!(all, (0..total).collect::<Vec<_>>());
    }
}
