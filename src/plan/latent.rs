//! Latents (multi-head latent attention): they travel instead of keys and values, and whoever attends them expands them for its own heads.
//!
//! ```text
//!   forward    expand own latents, attend;  expand those of stage 1, attend;  …
//!   backward   expand, attend into fresh dK, dV, contract into the gradient of the latents;  per stage likewise
//! ```
//! Keys and values of one stage exist at a time, and so do their gradients: own ones are expanded twice in backward, before and after the stages. What
//! goes home is the gradient of the latents. That of the weights stays where it was computed: over this team's queries and this rank's heads.

use super::build::Builder;
use super::{Event, Kind, Op, Slot, Tensor};
use std::ops::Range;

impl Builder<'_> {
    /// Rows of stage s that are expanded: what arrived, or of own ones all but padding.
    fn expanded(&self, s: u32) -> Vec<Range<u32>> {
        if s > 0 {
            return std::iter::once(0..self.survey.stage(s).arriving.rows).collect();
        }
        let mut rows: Vec<Range<u32>> = Vec::new();
        let mut segments: Vec<_> = self.survey.mine.k.segments.iter().collect();
        segments.sort_unstable_by_key(|s| s.offset);
        for s in segments {
            match rows.last_mut() {
                Some(last) if last.end == s.offset => last.end += s.len,
                _ => rows.push(s.offset..s.offset + s.len),
            }
        }
        rows
    }

    /// Latents of stage s.
    fn latent(&mut self, s: u32) -> Slot {
        match s {
            0 => self.input(Tensor::Latent),
            _ => Slot::indexed(Kind::Recv, Tensor::Latent, s % 2),
        }
    }

    /// Keys of stage s, expanded from its latents when `arrived`.
    pub fn expand(&mut self, arrived: Option<Event>, s: u32) -> Slot {
        let rows = self.expanded(s);
        let end = rows.last().map_or(0, |r| r.end);
        let [k, _] = [Tensor::K, Tensor::V].map(|t| self.slot_rows(Kind::Seen, t, 0, end));
        let latent = self.latent(s);
        if end > 0 && !self.share(self.survey.member).q.is_empty() {
            for tensor in [Tensor::UpK, Tensor::UpV] {
                self.slot(Kind::Caller, tensor, 0);
            }
            self.compute(&[arrived], Op::Expand { latent, k, rows });
        }
        k
    }

    /// Keys of stage s, and zeros for their gradients.
    pub fn expand_with_gradients(&mut self, arrived: Option<Event>, s: u32) -> (Slot, Slot) {
        let k = self.expand(arrived, s);
        let end = self.expanded(s).last().map_or(0, |r| r.end);
        let [dk, dv] = [Tensor::DK, Tensor::DV].map(|t| self.slot_rows(Kind::Seen, t, 0, end));
        for slot in [dk, dv] {
            self.clear(&[], slot, end);
        }
        (k, dk)
    }

    /// Adds the gradients of the keys of stage s to `d_latent`.
    pub fn contract(&mut self, s: u32, dk: Slot, d_latent: Slot) {
        let rows = self.expanded(s);
        let latent = self.latent(s);
        if !rows.iter().all(Range::is_empty) && !self.share(self.survey.member).q.is_empty() {
            self.compute(&[], Op::Contract { dk, latent, d_latent, rows });
        }
    }

    /// No part of the gradient of the weights so far.
    pub fn clear_weights(&mut self) {
        for tensor in [Tensor::DUpK, Tensor::DUpV] {
            let slot = self.slot(Kind::Caller, tensor, 0);
            let rows = self.info(slot).rows;
            self.clear(&[], slot, rows);
        }
    }
}
