//! What happens to a score between q·k and the softmax, to its weight after it, and what is asked about scores.
//!
//! ```text
//! x = scale · q·k
//! x = cap · tanh(x / cap)                      soft-cap (Gemma 2, arXiv 2408.00118)
//! x = x − slope[head] · |k − diagonal(q)|      ALiBi (arXiv 2108.12409); diagonal(q) is the mask's, so bottom-right where that is
//! x = x + bias[batch, head, q, k]              additive bias, after the scale
//! LSE = ln(Σ exp x + exp sink[head])           softmax sink (arXiv 2309.17453); off-by-one is a sink of 0
//! P = exp(x − LSE);  P' = keep(q, k) · P / (1 − p)       dropout
//! ```
//! Positions count from a sequence's first true token. Nothing here depends on how tokens are dealt out, so every result is that of
//! one rank.

use crate::error::{Error, Result};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// The key of dropout's random words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seed {
    /// Given.
    Value(u64),
    /// Read when the kernels run from this address in device memory, so that every replay of a graph may draw another mask. Only on CUDA.
    At(u64),
}

impl Default for Seed {
    fn default() -> Seed {
        Seed::Value(0)
    }
}

/// How far a number per head is summed up: over what this rank computed, or over all ranks of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reach {
    /// This rank's part: the caller reduces it, together with its other gradients.
    Rank,
    /// All ranks': the same number on each.
    Group,
}

/// The shape of an additive bias `[batch, heads, queries, keys]`: which of its dimensions are there, and not 1. Columns are the keys of the
/// whole padded sequence in natural order, rows this rank's queries in local order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BiasShape {
    /// One for every batch entry, instead of one for all.
    pub batch: bool,
    /// One for every query head, instead of one for all.
    pub heads: bool,
    /// One for every query, instead of one for all.
    pub queries: bool,
    /// Backward writes its gradient.
    pub gradient: bool,
}

/// Everything beside scale and mask. The default is plain attention.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// Soft-cap; 0 = none.
    pub softcap: f32,
    /// ALiBi slopes, one for each query head; empty = none.
    pub slopes: Arc<[f32]>,
    /// Additive bias.
    pub bias: Option<BiasShape>,
    /// Probability p of dropping a weight, 0 … below 1.
    pub dropout: f32,
    /// Added to a query head's number for dropout: ranks of tensor parallelism hold different heads of one model.
    pub head_offset: u32,
    /// There is a sink per query head, fp32; its gradient reaches so far.
    pub sinks: Option<Reach>,
    /// The largest visible score of every query head is asked for, over so much.
    pub max_logit: Option<Reach>,
}

impl Eq for Score {}

impl Hash for Score {
    fn hash<H: Hasher>(&self, h: &mut H) {
        let Score { softcap, slopes, bias, dropout, head_offset, sinks, max_logit } = self;
        (softcap.to_bits(), bias, dropout.to_bits(), head_offset, sinks, max_logit).hash(h);
        slopes.iter().for_each(|s| s.to_bits().hash(h));
    }
}

impl Score {
    /// Does a score or its weight depend on anything but q, k and the mask?
    pub fn changes(&self) -> bool {
        self.softcap != 0.0 || !self.slopes.is_empty() || self.bias.is_some() || self.dropout > 0.0
    }

    /// Do kernels need to know which token a row is?
    pub fn needs_origins(&self) -> bool {
        self.changes() || self.sinks.is_some() || self.max_logit.is_some()
    }

    /// Is it plain attention?
    pub fn is_plain(&self) -> bool {
        !self.needs_origins()
    }

    /// Checks the numbers; the error names the field.
    pub fn validate(&self, heads: u32) -> Result<()> {
        if !(self.softcap.is_finite() && self.softcap >= 0.0) {
            let got = self.softcap;
            return Err(Error::argument(format!(
                "softcap: got {got}, must be finite and not negative (0 = none)"
            )));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let got = self.dropout;
            return Err(Error::argument(format!("dropout: got {got}, allowed 0 … below 1")));
        }
        if self.head_offset.checked_add(heads).is_none() {
            let got = self.head_offset;
            return Err(Error::argument(format!(
                "head_offset: got {got}, too large for {heads} heads"
            )));
        }
        if !self.slopes.is_empty() && self.slopes.len() != heads as usize {
            let got = self.slopes.len();
            return Err(Error::argument(format!(
                "alibi_slopes: got {got}, need one for each of {heads} query heads"
            )));
        }
        if self.bias.is_some_and(|b| b.gradient && !b.queries) {
            return Err(Error::argument(
                "bias: a gradient needs one bias per query; that of one for all is not offered",
            ));
        }
        if self.bias.is_some_and(|b| !b.queries && (b.batch || b.heads)) {
            return Err(Error::unsupported(
                "bias: one for all queries is offered only as one for all heads and batch entries too",
            ));
        }
        if let Some(slope) = self.slopes.iter().find(|s| !s.is_finite()) {
            return Err(Error::argument(format!("alibi_slopes: got {slope}, must be finite")));
        }
        Ok(())
    }
}

/// Weights are kept when their random word is at least this.
pub fn drop_below(p: f32) -> u32 {
    (f64::from(p) * 4_294_967_296.0) as u32
}

/// Four random words for the keys 4·block … 4·block + 3 of a query: Philox4x32-10 (Salmon et al., SC 2011) of the counter
/// (block, query, head, sequence) under the key `seed`. Positions count within the sequence; `head` is global; `sequence` is the caller's number for it.
#[inline(always)]
pub fn words(seed: u64, sequence: u32, head: u32, query: u32, block: u32) -> [u32; 4] {
    let mut c = [block, query, head, sequence];
    let mut k = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with Random123 (kat_vectors, philox4x32 10).
    #[test]
    fn words_are_philox() {
        assert_eq!(words(0, 0, 0, 0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = u32::MAX;
        let all = words(u64::MAX, ones, ones, ones, ones);
        assert_eq!(all, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = words(0x299f_31d0_a409_3822, 0x0370_7344, 0x1319_8a2e, 0x85a3_08d3, 0x243f_6a88);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn numbers_are_checked() {
        assert!(Score::default().validate(4).is_ok() && Score::default().is_plain());
        let bad = [
            Score { softcap: -1.0, ..Score::default() },
            Score { dropout: 1.0, ..Score::default() },
            Score { slopes: [1.0; 3].into(), ..Score::default() },
            Score { slopes: [f32::NAN; 4].into(), ..Score::default() },
            Score { head_offset: u32::MAX - 2, ..Score::default() },
        ];
        for (score, word) in
            bad.iter().zip(["softcap", "dropout", "alibi_slopes", "alibi_slopes", "head_offset"])
        {
            assert!(score.validate(4).unwrap_err().to_string().contains(word));
        }
    }
}
