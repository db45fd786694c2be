//! What goes with a rank's rows besides Q, K and V: positions, labels shifted by any number of tokens, and the index lists that bring
//! them there or put a whole sequence together again. Pure, for any partition, any lengths, packed, padded.
//!
//! ```text
//! tokens of two sequences  a0 a1 a2 a3 · b0 b1 b2 b3      zigzag, P = 2: rank 0 has a0 a3 b0 b3
//! positions                0 3 0 3                        rows of a table of rotary frequencies, too
//! shifted by 1             a1 – b1 –                      a1 and b1 come from rank 1: `exchange`
//! ```

use crate::holding::{holding, stretches, tokens};
use crate::partition::Side;
use crate::problem::Problem;

/// Instead of a position or a token: padding, or beyond the end of a sequence.
pub const NONE: u32 = u32::MAX;

/// Position of every local row in its sequence, counted from the first true token; [`NONE`] for padding.
pub fn positions(problem: &Problem, rank: u32, side: Side) -> Vec<u32> {
    let held = holding(problem, rank, side);
    let mut out = vec![NONE; held.rows as usize];
    for s in &held.segments {
        for i in 0..s.len {
            out[(s.offset + i) as usize] = s.start + i * s.step;
        }
    }
    out
}

/// For every local row the token that stands `by` after it in its sequence (before it, if negative), numbered as [`tokens`] does; [`NONE`]
/// where there is none, and for padding. By 1: where the label of a row's token is, by 2 and more: for multi-token prediction.
pub fn shifted(problem: &Problem, rank: u32, side: Side, by: i32) -> Vec<u32> {
    let held = holding(problem, rank, side);
    let firsts = first_tokens(problem, side);
    let mut out = vec![NONE; held.rows as usize];
    for s in &held.segments {
        let len = i64::from(problem.seqs[s.seq as usize].extent(side).len);
        for i in 0..s.len {
            let position = i64::from(s.start + i * s.step) + i64::from(by);
            if (0..len).contains(&position) {
                out[(s.offset + i) as usize] = firsts[s.seq as usize] + position as u32;
            }
        }
    }
    out
}

/// Number of every sequence's first true token.
fn first_tokens(problem: &Problem, side: Side) -> Vec<u32> {
    let mut base = 0;
    let first = |e: crate::problem::Extent| {
        base += e.padded;
        base - e.padded + e.before
    };
    problem.seqs.iter().map(|s| s.extent(side)).map(first).collect()
}

/// One rank's part of an all-to-all of rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    /// For every rank (this one included): local rows that go there, in the order of the receiver's rows.
    pub sends: Vec<Vec<u32>>,
    /// For every rank: local rows that what comes from there is for, ascending.
    pub recvs: Vec<Vec<u32>>,
}

/// The exchange that gives every row what [`shifted`] says. Rows that are in no list get nothing.
pub fn exchange(problem: &Problem, rank: u32, side: Side, by: i32) -> Exchange {
    let ranks = problem.ranks as usize;
    let total: u32 = problem.seqs.iter().map(|s| s.extent(side).padded).sum();
    let mut holder = vec![(0, 0); total as usize];
    for r in 0..problem.ranks {
        for (row, token) in tokens(problem, r, side).into_iter().enumerate() {
            holder[token as usize] = (r, row as u32);
        }
    }
    let mut out = Exchange { sends: vec![Vec::new(); ranks], recvs: vec![Vec::new(); ranks] };
    for r in 0..problem.ranks {
        for (row, token) in shifted(problem, r, side, by).into_iter().enumerate() {
            if token == NONE {
                continue;
            }
            let (from, at) = holder[token as usize];
            if from == rank {
                out.sends[r as usize].push(at);
            }
            if r == rank {
                out.recvs[from as usize].push(row as u32);
            }
        }
    }
    out
}

/// For every token its row among the shards of all ranks laid one after another: what an all-gather's result is indexed by to give
/// whole sequences.
pub fn order(problem: &Problem, side: Side) -> Vec<u32> {
    let total: u32 = problem.seqs.iter().map(|s| s.extent(side).padded).sum();
    let mut out = vec![0; total as usize];
    let shards = (0..problem.ranks).flat_map(|r| tokens(problem, r, side));
    for (row, token) in shards.enumerate() {
        out[token as usize] = row as u32;
    }
    out
}

/// For every sequence how many true tokens, and how many rows with padding, a rank holds. Their running sums are the local `cu_seqlens` and
/// `cu_seqlens_padded`, where a rank's rows are in the order of the sequences: always, but for a caller's lists.
pub fn lengths(problem: &Problem, rank: u32, side: Side) -> Vec<(u32, u32)> {
    let mut out = vec![(0, 0); problem.seqs.len()];
    for s in holding(problem, rank, side).segments {
        out[s.seq as usize].0 += s.len;
    }
    for s in stretches(problem, rank, side) {
        out[s.seq as usize].1 += s.len;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::Dealt;
    use crate::partition::{Partition, Stretch};
    use crate::problem::{Extent, Sequence, tests::small};

    fn packed(ranks: u32, lens: &[(u32, u32)]) -> Problem {
        let mut p = small(ranks, 1, 1);
        p.packed = true;
        let of = |&(len, padded)| {
            let e = Extent { before: 0, len, padded };
            Sequence { q: e, k: e }
        };
        p.seqs = lens.iter().map(of).collect();
        p
    }

    /// Megatron's rows of the frequency table, g = s/2 of the padded length: r·g … (r+1)·g and S − (r+1)·g … S − r·g.
    #[test]
    fn positions_are_megatrons_two_slices() {
        let mut p = small(4, 1, 1);
        p.seqs = vec![Sequence::square(32)];
        for r in 0..4 {
            let slices: Vec<u32> =
                (4 * r..4 * (r + 1)).chain(32 - 4 * (r + 1)..32 - 4 * r).collect();
            assert_eq!(positions(&p, r, Side::Query), slices);
        }
    }

    #[test]
    fn padding_has_no_position() {
        let mut p = packed(2, &[(3, 8)]);
        assert_eq!(positions(&p, 0, Side::Query), [0, 1, NONE, NONE]);
        assert_eq!(positions(&p, 1, Side::Query), [2, NONE, NONE, NONE]);
        p.seqs[0].q.before = 5;
        assert_eq!(positions(&p, 0, Side::Query), [NONE, NONE, 1, 2]);
        assert_eq!(positions(&p, 1, Side::Query), [NONE, NONE, NONE, 0]);
    }

    /// Megatron's `roll_tensor` by −1: both chunks of a rank move up by one, the last element of chunk r is the first of chunk r + 1 (of rank
    /// r + 1, or of the last rank's own second chunk), that of chunk 2P−1−r the first of rank r − 1's second chunk, rank 0's none.
    #[test]
    fn one_token_is_megatrons_roll() {
        for ranks in [1, 2, 3, 4, 8] {
            let c = 3;
            let mut p = small(ranks, 1, 1);
            p.seqs = vec![Sequence::square(2 * ranks * c)];
            let held: Vec<Vec<u32>> = (0..ranks).map(|r| tokens(&p, r, Side::Query)).collect();
            for r in 0..ranks as usize {
                let (first, second) = (&held[r][..c as usize], &held[r][c as usize..]);
                let after_first = match r + 1 < ranks as usize {
                    true => held[r + 1][0],
                    false => second[0],
                };
                let after_second = if r == 0 { NONE } else { held[r - 1][c as usize] };
                let mut want = first[1..].to_vec();
                want.push(after_first);
                want.extend_from_slice(&second[1..]);
                want.push(after_second);
                assert_eq!(shifted(&p, r as u32, Side::Query, 1), want, "P {ranks}, rank {r}");
            }
        }
    }

    /// `get_cu_seqlens_on_cp_rank`: c = padded/2P, n1 = clamp(ℓ − r·c, 0, c), n2 = clamp(ℓ − (2P−r−1)·c, 0, c), summed up.
    #[test]
    fn lengths_are_transformer_engines() {
        let seqs = [(5, 8), (8, 8), (9, 16), (0, 8), (1, 24)];
        for ranks in [1, 2, 4] {
            let p = packed(ranks, &seqs);
            for r in 0..ranks {
                let formula = |&(len, padded): &(u32, u32)| {
                    let c = padded / (2 * ranks);
                    let clamp = |start: u32| len.saturating_sub(start).min(c);
                    (clamp(r * c) + clamp((2 * ranks - r - 1) * c), 2 * c)
                };
                let want: Vec<_> = seqs.iter().map(formula).collect();
                assert_eq!(lengths(&p, r, Side::Query), want, "P {ranks}, rank {r}");
            }
        }
    }

    /// The published id vectors, one token a chunk: gathered → sequence pos[r] = 2r, pos[r+P] = 2P−2r−1, back id[2r] = r,
    /// id[2r+1] = 2P−r−1.
    #[test]
    fn order_is_transformer_engines() {
        for ranks in 1..9 {
            let mut p = small(ranks, 1, 1);
            p.seqs = vec![Sequence::square(2 * ranks)];
            let pos = (0..ranks).map(|r| 2 * r).chain((0..ranks).map(|r| 2 * ranks - 2 * r - 1));
            assert_eq!(order(&p, Side::Query), pos.collect::<Vec<_>>());
            let id = (0..ranks).flat_map(|r| [r, 2 * ranks - r - 1]);
            let held: Vec<u32> = (0..ranks).flat_map(|r| tokens(&p, r, Side::Query)).collect();
            assert_eq!(held, id.collect::<Vec<_>>());
        }
    }

    fn partitions(p: &Problem) -> Vec<Partition> {
        let total = |s: &Sequence| s.q.padded;
        // Every other position of a sequence to the first rank, from the last sequence to the first.
        let mut lists = vec![Vec::new(); p.ranks as usize];
        for (seq, s) in p.seqs.iter().enumerate().rev() {
            for odd in 0..2u32 {
                let len = (total(s) + 1 - odd) / 2;
                if len > 0 {
                    let rank = (odd * (seq as u32 + 1)) % p.ranks;
                    lists[rank as usize].push(Stretch {
                        seq: seq as u32,
                        start: odd,
                        step: 2,
                        len,
                    });
                }
            }
        }
        let list = Partition::List { q: lists.clone(), k: lists };
        vec![
            Partition::Zigzag,
            Partition::Contiguous,
            Partition::Striped,
            Partition::Balanced,
            list,
        ]
    }

    /// Labels moved through the exchange are the global sequence's, shifted, for every partition, padding on both sides, odd lengths.
    #[test]
    fn exchange_brings_the_global_shift() {
        for ranks in 1..6 {
            let mut base = packed(ranks, &[(13, 20), (1, 1), (0, 4), (31, 31), (2, 9)]);
            base.seqs[0].q.before = 3;
            base.seqs[4].q.before = 7;
            base.seqs.iter_mut().for_each(|s| s.k = s.q);
            let total: u32 = base.seqs.iter().map(|s| s.q.padded).sum();
            for partition in partitions(&base) {
                let mut p = Problem { partition, ..base.clone() };
                p.validate().unwrap();
                Dealt::default().resolve(&mut p);
                for by in [-3, -1, 0, 1, 2, 5, 40, i32::MAX, i32::MIN] {
                    check_shift(&p, total, by);
                }
            }
        }
    }

    fn check_shift(p: &Problem, total: u32, by: i32) {
        let side = Side::Query;
        // The definition: position + by of the same sequence, if that is a true token.
        let mut want = vec![NONE; total as usize];
        let mut base = 0;
        for s in &p.seqs {
            for i in 0..s.q.len {
                let to = i64::from(i) + i64::from(by);
                if to >= 0 && to < i64::from(s.q.len) {
                    want[(base + s.q.before + i) as usize] = base + s.q.before + to as u32;
                }
            }
            base += s.q.padded;
        }
        let of: Vec<Exchange> = (0..p.ranks).map(|r| exchange(p, r, side, by)).collect();
        let held: Vec<Vec<u32>> = (0..p.ranks).map(|r| tokens(p, r, side)).collect();
        for r in 0..p.ranks as usize {
            let mut got = vec![NONE; held[r].len()];
            for peer in 0..p.ranks as usize {
                let (sent, kept) = (&of[peer].sends[r], &of[r].recvs[peer]);
                assert_eq!(sent.len(), kept.len());
                for (from, to) in sent.iter().zip(kept) {
                    got[*to as usize] = held[peer][*from as usize];
                }
            }
            let local: Vec<u32> = held[r].iter().map(|t| want[*t as usize]).collect();
            assert_eq!(got, local, "rank {r} by {by}: {p:?}");
            assert_eq!(shifted(p, r as u32, side, by), local);
        }
        let order = order(p, side);
        let shards: Vec<u32> = held.concat();
        assert!((0..total).all(|t| shards[order[t as usize] as usize] == t));
    }
}
