//! Which tokens rows are, for scores that depend on positions: a number per row, because rows need not be consecutive tokens.

use super::{ALIGN, TableBuilder, put};
use crate::backend::cuda::params::{NO_TOKEN, Sequence, Token};
use crate::partition::Segment;

/// Where the tables of an attend step lie in the blob, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenWork {
    /// `cp_token[]`, by query row.
    pub queries: u64,
    /// `uint32_t[]`, by key row.
    pub keys: u64,
    /// `cp_sequence[]`.
    pub sequences: u64,
    /// `float[]`, by global query head; none without ALiBi.
    pub slopes: Option<u64>,
}

/// The sequences that a rank's queries belong to. Their numbers come with a call, so their table is written anew for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequences {
    /// Where in the blob.
    pub at: u64,
    /// Index in the problem, and all but the caller's number.
    list: Vec<(u32, Sequence)>,
}

impl Sequences {
    /// The table with the caller's numbers, `ids` by index in the problem; empty: the index itself.
    pub fn write(&self, ids: &[u32], out: &mut Vec<u8>) {
        out.clear();
        for (index, Sequence { diagonal, padding, reserved, .. }) in &self.list {
            let number = *ids.get(*index as usize).unwrap_or(index);
            for word in [diagonal.cast_unsigned(), number, *padding, *reserved] {
                out.extend_from_slice(&word.to_ne_bytes());
            }
        }
    }
}

impl TableBuilder {
    /// The tables of the query rows, and the slopes. Those of keys are added per step. `diagonals` and `padding` as in
    /// [`Effects`](crate::backend::Effects): by sequence of the problem.
    pub fn tokens(
        &mut self,
        queries: &[Segment],
        rows: u32,
        (diagonals, padding): (&[i32], &[u32]),
        slopes: &[f32],
    ) -> (TokenWork, Sequences) {
        let mut place = vec![NO_TOKEN; diagonals.len()];
        let mut list = Vec::new();
        let mut tokens = vec![Token { position: NO_TOKEN, sequence: 0 }; rows as usize];
        for s in queries.iter().filter(|s| s.len > 0) {
            let sequence = &mut place[s.seq as usize];
            if *sequence == NO_TOKEN {
                *sequence = list.len() as u32;
                let (diagonal, padding) = (diagonals[s.seq as usize], padding[s.seq as usize]);
                list.push((s.seq, Sequence { diagonal, number: s.seq, padding, reserved: 0 }));
            }
            for (row, position) in rows_of(s) {
                tokens[row] = Token { position, sequence: *sequence };
            }
        }
        let own: Vec<Sequence> = list.iter().map(|(_, sequence)| *sequence).collect();
        let blob = &mut self.blob;
        let work = TokenWork {
            queries: put(blob, &tokens),
            keys: 0,
            sequences: put(blob, &own),
            slopes: (!slopes.is_empty()).then(|| put(blob, slopes)),
        };
        (work, Sequences { at: work.sequences, list })
    }

    /// The table of key rows.
    pub fn positions(&mut self, keys: &[Segment], rows: u32) -> u64 {
        let mut positions = vec![NO_TOKEN; rows as usize];
        for s in keys {
            for (row, position) in rows_of(s) {
                positions[row] = position;
            }
        }
        put(&mut self.blob, &positions)
    }
}

/// Rows of a segment with their positions.
fn rows_of(s: &Segment) -> impl Iterator<Item = (usize, u32)> {
    (0..s.len).map(|i| ((s.offset + i) as usize, s.start + i * s.step))
}

/// Most bytes of the tables of `steps` steps: a sequence has at least one row.
pub fn tokens_bound(steps: usize, [q_rows, k_rows]: [usize; 2], slopes: usize) -> usize {
    q_rows * (size_of::<Token>() + size_of::<Sequence>())
        + (steps * k_rows + slopes) * size_of::<u32>()
        + (3 + steps) * ALIGN
}

#[cfg(test)]
mod tests {
    use super::super::{TableBuilder, Tiling};
    use super::*;

    fn words(blob: &[u8], at: u64, count: usize) -> Vec<u32> {
        let bytes = &blob[at as usize..at as usize + 4 * count];
        bytes.chunks(4).map(|w| u32::from_ne_bytes(w.try_into().unwrap())).collect()
    }

    #[test]
    fn rows_have_their_tokens() {
        let tiling = Tiling { q_rows: 64, k_rows: 64 };
        let mut builder = TableBuilder::new(tiling, tiling);
        let segment = |seq, start, step, len, offset| Segment { seq, start, step, len, offset };
        // Sequence 1 is someone else's; row 3 is padding.
        let queries = [segment(2, 10, 4, 3, 0), segment(0, 5, 1, 2, 4), segment(2, 7, 1, 1, 6)];
        let (work, sequences) =
            builder.tokens(&queries, 7, (&[-1, 0, 30], &[6, 0, 5]), &[0.5, 0.25]);
        let keys = builder.positions(&[segment(2, 1, 3, 2, 1)], 4);
        let blob = builder.finish();
        let none = NO_TOKEN;
        assert_eq!(
            words(&blob, work.queries, 14),
            [10, 0, 14, 0, 18, 0, none, 0, 5, 1, 6, 1, 7, 0]
        );
        assert_eq!(words(&blob, work.sequences, 8), [30, 2, 5, 0, u32::MAX, 0, 6, 0]);
        assert_eq!(words(&blob, work.slopes.unwrap(), 2), [0.5, 0.25].map(f32::to_bits));
        assert_eq!(words(&blob, keys, 4), [none, 1, 4, none]);
        let mut patch = Vec::new();
        sequences.write(&[7, 8, 9], &mut patch);
        assert_eq!(words(&patch, 0, 8), [30, 9, 5, 0, u32::MAX, 7, 6, 0]);
        sequences.write(&[], &mut patch);
        assert_eq!(patch, blob[sequences.at as usize..][..32]);
        assert!(blob.len() <= tokens_bound(1, [7, 4], 2));
    }
}
