//! Which samples run on which ranks, and on how many: hybrid and dynamic context parallelism. Pure.
//!
//! A training step's samples differ in length by four orders of magnitude. Cutting every one across all ranks wastes communication on the short
//! ones; giving every one a rank of its own leaves most ranks waiting for the longest. A scheduler decides, from the lengths alone and alike on
//! every rank, where each sample runs:
//!
//! ```text
//!            rank 0 1 2 3 4 5 6 7
//! micro-batch 0  aaaaaaaaaaaaaaaa    a on ranks 0 … 7
//!                bbbbbb c d d e f    then b on 0 … 2, c alone on 3, d on 4 and 5 …
//! micro-batch 1  …                   after a barrier
//! ```
//! A *pack* is what one call of attention (and of the layers around it) works on: samples that run on the same ranks at the same time. No pack
//! holds more than `tokens_per_rank` tokens on a rank. The packs of a micro-batch are on ranges of ranks that nest (of any two, one contains
//! the other, or they are apart), and every rank runs its packs widest range first, those of one range in their order: so all ranks of a pack
//! arrive at it together, having run the same packs before, and no rank waits except at the barrier that ends the micro-batch.
//!
//! | scheduler | whose |
//! |---|---|
//! | [`nested`] | ours: any cp size, packs, a cost with communication |
//! | [`megatron::balanced`] | Megatron-LM's hybrid context parallelism, `BalancedCPScheduler` as released |
//! | [`dynamic`] | `DefaultDynamicCPScheduler` of its `dev` branch |
//! | [`megatron::dp_balanced`] | its `DpBalancedScheduler`: one cp size for all |
//!
//! [`cost::Cost`] judges any of them, and says how fast any schedule could be at best.

pub mod cost;
pub mod dynamic;
pub mod megatron;
pub mod nested;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use std::collections::HashMap;

/// Most ranks of a schedule.
pub const MAX_RANKS: u32 = 1 << 16;
/// Most samples of a schedule.
pub const MAX_SAMPLES: usize = 1 << 20;

/// What is to be scheduled.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Tokens of every sample; its index is the sample's id.
    pub lengths: &'a [u32],
    /// Ranks to run them on: dp·cp in Megatron's words.
    pub ranks: u32,
    /// Most tokens that a rank holds of one pack: Megatron's `max_seqlen_per_dp_cp_rank`.
    pub tokens_per_rank: u32,
}

/// Where a sample runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Micro-batches run one after another, with a barrier between.
    pub micro_batch: u32,
    /// First rank.
    pub first: u32,
    /// Number of consecutive ranks: the sample's cp size.
    pub ranks: u32,
    /// Samples of a micro-batch with the same ranks and the same pack run in one call; packs of the same ranks run in ascending order.
    pub pack: u32,
}

/// Where every sample runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// By sample id.
    pub placements: Vec<Placement>,
    /// How many micro-batches.
    pub micro_batches: u32,
}

impl Batch<'_> {
    /// The batch, if it can be scheduled at all.
    pub fn check(&self) -> Result<()> {
        let Batch { lengths, ranks, tokens_per_rank } = *self;
        if ranks == 0 || ranks > MAX_RANKS {
            return Err(Error::argument(format!("ranks: got {ranks}, allowed 1 … {MAX_RANKS}")));
        }
        if tokens_per_rank == 0 || tokens_per_rank > 1 << 30 {
            return Err(Error::argument(format!(
                "tokens_per_rank: got {tokens_per_rank}, allowed 1 … {}",
                1 << 30
            )));
        }
        if lengths.len() > MAX_SAMPLES {
            return Err(Error::argument(format!(
                "lengths: got {} samples, allowed up to {MAX_SAMPLES}",
                lengths.len()
            )));
        }
        let most = u64::from(ranks) * u64::from(tokens_per_rank);
        match lengths.iter().position(|&l| l == 0 || u64::from(l) > most) {
            None => Ok(()),
            Some(i) => Err(Error::argument(format!(
                "lengths[{i}]: got {}, allowed 1 … {most}: {ranks} ranks with {tokens_per_rank} tokens (tokens_per_rank) each",
                lengths[i]
            ))),
        }
    }

    /// Sample ids, longest first, ties by id.
    pub fn longest_first(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..self.lengths.len() as u32).collect();
        ids.sort_by_key(|&i| std::cmp::Reverse(self.lengths[i as usize]));
        ids
    }

    /// Fewest ranks of Megatron's that hold a sample: a power of two.
    fn power_of_two(&self, length: u32) -> u32 {
        length.div_ceil(self.tokens_per_rank).next_power_of_two()
    }
}

impl Schedule {
    /// Sample ids in the order in which ranks run them: micro-batches, then wide ranges before narrow ones, packs in order, in a pack the longest first.
    pub fn order(&self, lengths: &[u32]) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..self.placements.len() as u32).collect();
        ids.sort_by_key(|&i| {
            let (p, length) = (&self.placements[i as usize], lengths[i as usize]);
            let down = std::cmp::Reverse::<u32>;
            (p.micro_batch, down(p.ranks), p.first, p.pack, down(length), i)
        });
        ids
    }

    /// Megatron's shape: `[micro-batch][rank]` → ids of the samples that the rank runs, in order. A sample's cp size is the number of ranks that list it.
    pub fn sample_id_groups(&self, lengths: &[u32], ranks: u32) -> Vec<Vec<Vec<u32>>> {
        let mut groups = vec![vec![Vec::new(); ranks as usize]; self.micro_batches as usize];
        for id in self.order(lengths) {
            let p = &self.placements[id as usize];
            let group = &mut groups[p.micro_batch as usize];
            group[p.first as usize..(p.first + p.ranks) as usize]
                .iter_mut()
                .for_each(|r| r.push(id));
        }
        groups
    }

    /// Is this a schedule of the batch? Every sample on ranks that exist, packs within the limit, ranges nested.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        batch.check()?;
        if self.placements.len() != batch.lengths.len() {
            return Err(Error::argument(format!(
                "placements: got {}, there are {} samples",
                self.placements.len(),
                batch.lengths.len()
            )));
        }
        let mut tokens: HashMap<(u32, u32, u32, u32), u64> = HashMap::new();
        for (i, p) in self.placements.iter().enumerate() {
            let bad = |what: String| Err(Error::argument(format!("placements[{i}]: {what}")));
            if p.micro_batch >= self.micro_batches {
                return bad(format!(
                    "micro_batch: got {}, there are {}",
                    p.micro_batch, self.micro_batches
                ));
            }
            if p.ranks == 0 || u64::from(p.first) + u64::from(p.ranks) > u64::from(batch.ranks) {
                return bad(format!(
                    "{} ranks from rank {}, there are {}",
                    p.ranks, p.first, batch.ranks
                ));
            }
            let sum = tokens.entry((p.micro_batch, p.first, p.ranks, p.pack)).or_default();
            *sum += u64::from(batch.lengths[i]);
            let most = u64::from(p.ranks) * u64::from(batch.tokens_per_rank);
            if *sum > most {
                return bad(format!(
                    "its pack has {sum} tokens or more, {} ranks hold {most} (tokens_per_rank {})",
                    p.ranks, batch.tokens_per_rank
                ));
            }
        }
        // By first rank, the wider first: then a range crosses one before it exactly if it begins inside an open one and ends outside.
        let mut ids: Vec<usize> = (0..self.placements.len()).collect();
        ids.sort_by_key(|&i| {
            let p = &self.placements[i];
            (p.micro_batch, p.first, std::cmp::Reverse(p.ranks))
        });
        let mut open: Vec<(u32, u32, usize)> = Vec::new();
        for i in ids {
            let p = &self.placements[i];
            let end = p.first + p.ranks;
            while open.last().is_some_and(|&(m, e, _)| m != p.micro_batch || e <= p.first) {
                open.pop();
            }
            if let Some(&(_, e, other)) = open.last()
                && e < end
            {
                return Err(Error::argument(format!(
                    "placements[{i}]: its ranks {} … {} overlap with those of placements[{other}] without one containing the other",
                    p.first,
                    end - 1
                )));
            }
            open.push((p.micro_batch, end, i));
        }
        Ok(())
    }
}
