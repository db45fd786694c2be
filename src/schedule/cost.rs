//! What a schedule costs: one model by which all schedulers are judged, and the least that any schedule can cost.
//!
//! A pack on p ranks takes, on each of them, forward and backward of one layer,
//!
//! ```text
//! t(pack, p) = f(p) + Σ v(L, p)                         over the pack's samples
//! v(L, p)    = (pair·L²/2 + token·L) / p  +  wire·L·(p − 1)/p
//! f(p)       = call + rank·(p − 1)
//! ```
//! a rank takes the sum over its packs, a micro-batch the largest over its ranks, a schedule the sum over its micro-batches.

use super::{Batch, Placement, Schedule};
use crate::error::{Error, Result};

/// Seconds on one rank, forward and backward of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Per (query, key) pair of attention.
    pub pair: f64,
    /// Per token, in everything but attention.
    pub token: f64,
    /// Per token that is held by other ranks: its keys and values arrive, their gradients leave.
    pub wire: f64,
    /// Per pack and further rank: a message's latency.
    pub rank: f64,
    /// Per pack, however few its tokens.
    pub call: f64,
}

impl Default for Cost {
    /// A layer of Llama 3 8B (hidden 4096, 32 query and 8 key heads of 128, feed-forward 14336) in bf16, causal, on an H100 with a 400 Gb/s network
    /// interface; nothing hides behind anything else. Of these, only the ratios matter to a schedule.
    ///
    /// * pair: 4·32·128 FLOPs forward, 2.5 times that backward, at 600 TFLOP/s (what FlashAttention 3 reaches): 0.096 ns;
    /// * token: 218 million weights, 2 FLOPs each forward, 4 backward, at 600 TFLOP/s: 2.2 µs;
    /// * wire: 4096 bytes of keys and values forward, the same again and as many gradients backward, at 40 GB/s: 0.31 µs;
    /// * rank: a message forward, one backward, 10 µs each;
    /// * call: the weights are read once, 436 MB at 3.35 TB/s: 0.13 ms (backward reads them again; left out).
    fn default() -> Cost {
        let flops = 600e12;
        let weights = (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) as f64;
        Cost {
            pair: 3.5 * f64::from(4 * 32 * 128) / flops,
            token: 6.0 * weights / flops,
            wire: 3.0 * f64::from(2 * 8 * 128 * 2) / 40e9,
            rank: 2.0 * 10e-6,
            call: 2.0 * weights / 3.35e12,
        }
    }
}

impl Cost {
    /// Terms that are numbers, none negative, and work that takes time.
    pub fn check(&self) -> Result<()> {
        let Cost { pair, token, wire, rank, call } = *self;
        let terms =
            [("pair", pair), ("token", token), ("wire", wire), ("rank", rank), ("call", call)];
        match terms.iter().find(|(_, t)| !(0.0..1e6).contains(t)) {
            Some((name, got)) => {
                Err(Error::argument(format!("cost.{name}: got {got}, allowed 0 … 1e6 seconds")))
            }
            None if pair + token <= 0.0 => {
                Err(Error::argument("cost: pair and token are both 0, allowed: one of them"))
            }
            None => Ok(()),
        }
    }

    /// What a sample costs each of its ranks, beside its pack: v(L, p).
    pub fn sample(&self, length: u32, ranks: u32) -> f64 {
        let (l, p) = (f64::from(length), f64::from(ranks));
        (self.whole(l) + self.wire * l * (p - 1.0)) / p
    }

    /// What a pack costs each of its ranks, beside its samples: f(p).
    pub fn pack(&self, ranks: u32) -> f64 {
        self.call + self.rank * (f64::from(ranks) - 1.0)
    }

    /// A sample's work that is divided among its ranks.
    fn whole(&self, l: f64) -> f64 {
        self.pair * l * l / 2.0 + self.token * l
    }

    /// Fewest ranks, of `least ..= most`, on which a sample alone takes no more than `time`; if none, those on which it takes least.
    pub(super) fn ranks_within(&self, length: u32, least: u32, most: u32, time: f64) -> u32 {
        let l = f64::from(length);
        // v + f = a/p + b + rank·p: falls, then rises.
        let a = self.whole(l) - self.wire * l;
        let b = self.wire * l + self.call - self.rank;
        let alone = |p: u32| a / f64::from(p) + b + self.rank * f64::from(p);
        if a <= 0.0 || alone(least) <= time {
            return least;
        }
        let left = time - b;
        let root = left * left - 4.0 * self.rank * a;
        let fastest = || {
            let p = ((a / self.rank).sqrt() as u32).clamp(least, most);
            if p < most && alone(p + 1) < alone(p) { p + 1 } else { p }
        };
        if left <= 0.0 || root < 0.0 {
            return fastest();
        }
        let mut p =
            ((2.0 * a / (left + root.sqrt())).ceil().min(f64::from(most)) as u32).max(least);
        // Rounding, either way.
        if p > least && alone(p - 1) <= time {
            p -= 1;
        }
        if alone(p) > time && p < most && alone(p + 1) <= time {
            p += 1;
        }
        if alone(p) <= time { p } else { fastest() }
    }

    /// Calls `each` with the loads of all ranks, micro-batch by micro-batch. The schedule is one of this batch ([`Schedule::check`]).
    fn each_load(&self, made: &Schedule, batch: &Batch, mut each: impl FnMut(&[f64])) {
        let mut loads = vec![0.0; batch.ranks as usize];
        let mut last: Option<Placement> = None;
        for id in made.order(batch.lengths) {
            let p = made.placements[id as usize];
            for _ in last.map_or(0, |l| l.micro_batch)..p.micro_batch {
                each(&loads);
                loads.fill(0.0);
            }
            let mut cost = self.sample(batch.lengths[id as usize], p.ranks);
            if last != Some(p) {
                cost += self.pack(p.ranks);
                last = Some(p);
            }
            let ranks = p.first as usize..(p.first + p.ranks) as usize;
            loads[ranks].iter_mut().for_each(|load| *load += cost);
        }
        if last.is_some() {
            each(&loads);
        }
    }

    /// Seconds of every rank, by micro-batch.
    pub fn loads(&self, made: &Schedule, batch: &Batch) -> Vec<Vec<f64>> {
        let mut all = Vec::new();
        self.each_load(made, batch, |loads| all.push(loads.to_vec()));
        all
    }

    /// How long a schedule takes.
    pub fn seconds(&self, made: &Schedule, batch: &Batch) -> f64 {
        let mut sum = 0.0;
        self.each_load(made, batch, |loads| sum += loads.iter().copied().fold(0.0, f64::max));
        sum
    }

    /// No schedule of the batch takes less: the smallest T for which, for every q = 1 … n,
    ///
    /// ```text
    /// Σ min ⌊p/q⌋·w(L, p)  ≤  ⌊n/q⌋·T        over samples; the least over ⌈L/M⌉ ≤ p ≤ n with v(L, p) + f(p) ≤ T
    /// w(L, p) = v(L, p) + f(p)·L/(p·M)        a sample's share of its pack, which holds M tokens on a rank at most
    /// ```
    /// Of the ⌊n/q⌋ ranks q−1, 2q−1, …, p consecutive ones contain at least ⌊p/q⌋. So the left side is no more than what these ranks do, and the
    /// longest of them takes T or less. q = 1 says that work must be done by someone; q > n/2, that samples which need more than half of the
    /// ranks run one after another; the condition on p, that no sample takes longer than all.
    pub fn bound(&self, batch: &Batch) -> f64 {
        if batch.lengths.is_empty() {
            return 0.0;
        }
        let n = batch.ranks;
        // Of those with equal ⌊n/q⌋ the smallest q says most.
        let mut strides = Vec::new();
        let mut q = 1;
        while q <= n {
            strides.push(q);
            q = n / (n / q) + 1;
        }
        let least: Vec<u32> =
            batch.lengths.iter().map(|&l| l.div_ceil(batch.tokens_per_rank)).collect();
        let feasible = |t: f64| {
            let mut sums = vec![0.0; strides.len()];
            for (&l, &least) in batch.lengths.iter().zip(&least) {
                let p = self.ranks_within(l, least, n, t);
                if self.sample(l, p) + self.pack(p) > t {
                    return false;
                }
                let most = self.most_within(l, p, n, t);
                for (sum, &q) in sums.iter_mut().zip(&strides) {
                    if p < q {
                        break;
                    }
                    *sum += f64::from(p / q)
                        * self.least_share(batch, l, p, most.min((p / q + 1) * q - 1));
                }
            }
            sums.iter().zip(&strides).all(|(sum, &q)| *sum <= f64::from(n / q) * t)
        };
        let mut high = batch
            .lengths
            .iter()
            .zip(&least)
            .map(|(&l, &p)| self.sample(l, p) + self.pack(p))
            .sum::<f64>();
        let mut low = 0.0;
        for _ in 0..40 {
            let middle = (low + high) / 2.0;
            if feasible(middle) {
                high = middle;
            } else {
                low = middle;
            }
        }
        // The lower end is not feasible; sums of a million terms are right to 1e-9.
        low * (1.0 - 1e-9)
    }

    /// Most ranks, from `fit` up, on which a sample alone takes no more than `time`.
    fn most_within(&self, length: u32, fit: u32, most: u32, time: f64) -> u32 {
        let alone = |p: u32| self.sample(length, p) + self.pack(p);
        let (mut yes, mut no) = (fit, most + 1);
        while no - yes > 1 {
            let p = yes.midpoint(no);
            // Falls, then rises: what is too long and still falling lies below `fit`.
            if alone(p) <= time { yes = p } else { no = p }
        }
        yes
    }

    /// Least w(L, p) for p in `low ..= high`: it falls, then rises. The least ⌊p/q⌋·w of all p ≥ low is among those with the smallest ⌊p/q⌋.
    fn least_share(&self, batch: &Batch, length: u32, low: u32, high: u32) -> f64 {
        let share = |p: u32| {
            self.sample(length, p)
                + self.pack(p) * f64::from(length)
                    / (f64::from(p) * f64::from(batch.tokens_per_rank))
        };
        share(low).min(share(high))
    }
}
