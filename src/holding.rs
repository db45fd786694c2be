//! What a rank holds of a problem: which tokens, and in which row of its local buffers.

use crate::balance::balance;
use crate::partition::{Partition, Segment, Side, Stretch, joins};
use crate::problem::{Extent, Problem};

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
        Partition::Balanced => {
            let docs: Vec<Extent> = problem.seqs.iter().map(|s| s.extent(side)).collect();
            out = balance(&docs, problem.ranks).swap_remove(rank as usize);
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
