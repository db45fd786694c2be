//! Losses and gradients under context parallelism: which rows count, and what to multiply by so that the gradient is that of one rank.
//!
//! Every rank has the losses l_i of its own rows, with weights w_i. What is to be minimised is one number over all ranks of dp × cp:
//!
//! ```text
//! per token     L = Σ w_i·l_i / N,  N = Σ w_i over all dp·cp ranks and all micro-batches    Megatron's calculate_per_token_loss
//! per replica   L = mean over dp and micro-batches of (Σ_cp w_i·l_i / n), n = Σ_cp w_i      Megatron's legacy loss_func, two results
//! ```
//! A rank calls backward on `scale · Σ w_i·l_i` over its own rows, and the gradients of all dp·cp ranks are then added up, or averaged (what
//! data parallelism does by default). [`scale`] is the number that makes the result ∂L:
//!
//! ```text
//!                gradients summed       gradients averaged
//! per token      1 / N                  dp·cp / N
//! per replica    1 / (dp·m·n)           cp / (m·n)            m micro-batches
//! ```
//! Megatron's own factors are these: per token it sums, and divides by the all-reduced N at the end; per replica it averages over dp × cp, and
//! `loss_func` multiplies by cp and divides by m. Leaving that cp out makes gradients cp times too small; putting it in where gradients are
//! summed makes them too large. A loss that every rank of cp computes alike from gathered values (an auxiliary loss) counts cp times
//! when summed, once when averaged.
//!
//! A rank, or a replica, without a token that counts contributes 0: `scale` is 0 where n or N is, never 0/0.

use crate::error::{Error, Result};
use crate::partition::Side;
use crate::problem::Problem;
use crate::rows::{NONE, positions, shifted};

/// 1 for every local query row that counts, else 0: rows of padding never do, and with `shift` ≠ 0 neither do rows whose label, `shift` tokens
/// on, is beyond the end of their sequence.
pub fn weights(problem: &Problem, rank: u32, shift: i32) -> Vec<f32> {
    let sources = match shift {
        0 => positions(problem, rank, Side::Query),
        _ => shifted(problem, rank, Side::Query, shift),
    };
    sources.into_iter().map(|s| if s == NONE { 0.0 } else { 1.0 }).collect()
}

/// How many rows of all ranks together [`weights`] counts, from the lengths alone: no all-reduce is needed for it.
pub fn counted(problem: &Problem, shift: i32) -> u64 {
    let of = |len: u32| u64::from(len.saturating_sub(shift.unsigned_abs()));
    problem.seqs.iter().map(|s| of(s.q.len)).sum()
}

/// What is minimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mean {
    /// Over all tokens of dp × cp and of all micro-batches.
    PerToken,
    /// Over the tokens of a replica (a cp group), then over replicas and micro-batches.
    PerReplica,
}

/// How gradients of the dp·cp ranks are put together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Added up.
    Sum,
    /// Averaged.
    Average,
}

/// Sizes that a scale depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// Ranks of a replica.
    pub cp: u32,
    /// Replicas.
    pub dp: u32,
    /// Micro-batches of a step; per token they are in the tokens already.
    pub microbatches: u32,
    /// Σ w_i: per token over everything, per replica over the replica's ranks in this micro-batch.
    pub tokens: f64,
}

/// What a rank multiplies its Σ w_i·l_i by before backward; 0 when nothing counts.
pub fn scale(mean: Mean, reduction: Reduction, sizes: Sizes) -> Result<f64> {
    let Sizes { cp, dp, microbatches, tokens } = sizes;
    for (name, size) in [("cp_size", cp), ("dp_size", dp), ("microbatches", microbatches)] {
        if size == 0 {
            return Err(Error::argument(format!("{name}: got 0, must be at least 1")));
        }
    }
    if !tokens.is_finite() || tokens < 0.0 {
        return Err(Error::argument(format!(
            "tokens: got {tokens}, must be a sum of weights, 0 or more"
        )));
    }
    let (cp, dp, m) = (f64::from(cp), f64::from(dp), f64::from(microbatches));
    let summed = match mean {
        Mean::PerToken => 1.0 / tokens,
        Mean::PerReplica => 1.0 / (dp * m * tokens),
    };
    let averaged = if reduction == Reduction::Average { dp * cp } else { 1.0 };
    Ok(if tokens == 0.0 { 0.0 } else { averaged * summed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::holding::tokens;
    use crate::problem::{Extent, Sequence, tests::small};

    /// dp·m packs of three short sequences each, so that with cp = 4 some ranks have no token; one pack has nothing that counts.
    fn packs(cp: u32, count: usize) -> Vec<Problem> {
        let pack = |i: usize| {
            let mut p = small(cp, 1, 1);
            p.packed = true;
            let lens = if i == 3 { [1, 0, 1] } else { [5 + i as u32, 1, 2] };
            let e = |len| Extent { before: 0, len, padded: 12 };
            p.seqs = lens.iter().map(|&l| Sequence { q: e(l), k: e(l) }).collect();
            p
        };
        (0..count).map(pack).collect()
    }

    /// l_i = θ·x_i, so ∂l_i/∂θ = x_i: some number of the pack and the token.
    fn x(pack: usize, token: u32) -> f64 {
        f64::from((pack as u32 * 131 + token * 37) % 17) - 5.5
    }

    #[test]
    fn gradients_are_those_of_one_rank() {
        let (dp, m) = (3, 2);
        for cp in [1, 2, 4] {
            for shift in [0, 1, 2] {
                let alone = packs(1, dp * m);
                let split = packs(cp, dp * m);
                for mean in [Mean::PerToken, Mean::PerReplica] {
                    for reduction in [Reduction::Sum, Reduction::Average] {
                        check(mean, reduction, &alone, &split, dp, m, shift);
                    }
                }
            }
        }
    }

    fn sum(p: &Problem, pack: usize, rank: u32, shift: i32) -> (f64, f64) {
        let held = tokens(p, rank, Side::Query);
        let weights = weights(p, rank, shift);
        assert_eq!(held.len(), weights.len());
        let rows = held.iter().zip(&weights);
        rows.fold((0.0, 0.0), |(sum, n), (t, w)| {
            (sum + f64::from(*w) * x(pack, *t), n + f64::from(*w))
        })
    }

    fn check(
        mean: Mean,
        reduction: Reduction,
        alone: &[Problem],
        split: &[Problem],
        dp: usize,
        m: usize,
        shift: i32,
    ) {
        // By the definitions, on one rank.
        let whole: Vec<(f64, f64)> =
            alone.iter().enumerate().map(|(i, p)| sum(p, i, 0, shift)).collect();
        let all: f64 = whole.iter().map(|w| w.1).sum();
        let want = match mean {
            Mean::PerToken => whole.iter().map(|w| w.0).sum::<f64>() / all,
            Mean::PerReplica => {
                let means = whole.iter().map(|w| if w.1 == 0.0 { 0.0 } else { w.0 / w.1 });
                means.sum::<f64>() / (dp * m) as f64
            }
        };
        // As dp·cp ranks do it: pack i is micro-batch i mod m of replica i / m.
        let cp = split[0].ranks;
        let mut gradients = Vec::new();
        let mut idle = 0;
        for replica in 0..dp {
            for rank in 0..cp {
                let mut g = 0.0;
                for micro in 0..m {
                    let i = replica * m + micro;
                    let n = counted(&split[i], shift) as f64;
                    assert_eq!(n, whole[i].1, "counted from lengths");
                    let tokens = if mean == Mean::PerToken { all } else { n };
                    let sizes = Sizes { cp, dp: dp as u32, microbatches: m as u32, tokens };
                    let (local, own) = sum(&split[i], i, rank, shift);
                    idle += usize::from(own == 0.0);
                    g += scale(mean, reduction, sizes).unwrap() * local;
                }
                gradients.push(g);
            }
        }
        assert!(cp < 4 || idle > 0, "some rank should have had nothing");
        let total: f64 = gradients.iter().sum();
        let got = match reduction {
            Reduction::Sum => total,
            Reduction::Average => total / gradients.len() as f64,
        };
        assert!(
            got.is_finite() && (got - want).abs() < 1e-12,
            "{mean:?} {reduction:?}: {got} {want}"
        );
    }

    /// As Megatron writes them: `loss * cp / num_microbatches` of a mean, averaged; 1/N, summed.
    #[test]
    fn factors_are_megatrons() {
        let sizes = Sizes { cp: 4, dp: 2, microbatches: 8, tokens: 1000.0 };
        let of = |mean, reduction| scale(mean, reduction, sizes).unwrap();
        assert_eq!(of(Mean::PerReplica, Reduction::Average), 4.0 / (8.0 * 1000.0));
        assert_eq!(of(Mean::PerToken, Reduction::Sum), 1.0 / 1000.0);
        let nothing = Sizes { tokens: 0.0, ..sizes };
        assert_eq!(scale(Mean::PerToken, Reduction::Average, nothing).unwrap(), 0.0);
        for bad in [Sizes { cp: 0, ..sizes }, Sizes { tokens: f64::NAN, ..sizes }] {
            assert!(scale(Mean::PerToken, Reduction::Sum, bad).is_err());
        }
    }
}
