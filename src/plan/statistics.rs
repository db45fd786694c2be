//! Numbers per head: gradients of sinks, largest scores. Every rank computes its part; if all want the whole, parts go to everyone
//! in one exchange and are put together in the order of ranks.

use super::build::Builder;
use super::{Kind, Message, Op, Rows, Slot, Tensor, Value};
use crate::score::Reach;

impl Builder<'_> {
    /// Forward, after the last attend: the largest visible score of every head, −∞ for heads of others.
    pub fn max_logit(&mut self) {
        let Some(reach) = self.problem.score.max_logit else { return };
        let top = self.slot(Kind::Acc, Tensor::Top, 0);
        let heads = self.share(self.survey.member).q;
        let (dst, dst_row) = self.part_of(Tensor::MaxLogit, reach);
        if heads.len() < self.problem.heads as usize {
            let rows = vec![Rows::range(dst_row, 1)];
            self.compute(&[], Op::Fill { slot: dst, rows, value: Value::NegInf });
        }
        if !heads.is_empty() {
            let dst_head = heads.start;
            self.compute(&[], Op::Reduce { src: top, dst, dst_row, dst_head, max: true });
        }
        self.put_together(Tensor::MaxLogit, reach, true);
    }

    /// Backward, from Σ O∘dO: d_sink = −Σ exp(sink − LSE)·Σ O∘dO over this rank's own rows, all heads: nothing is exchanged for it.
    pub fn sink_gradient(&mut self) {
        let Some(reach) = self.problem.score.sinks else { return };
        for tensor in [Tensor::Sinks, Tensor::Lse] {
            self.slot(Kind::Caller, tensor, 0);
        }
        let src = self.slot(Kind::Sum, Tensor::SinkTerms, 0);
        self.compute(&[], Op::SinkTerms);
        let (dst, dst_row) = self.part_of(Tensor::DSinks, reach);
        self.compute(&[], Op::Reduce { src, dst, dst_row, dst_head: 0, max: false });
        self.put_together(Tensor::DSinks, reach, false);
    }

    /// Where this rank's part goes.
    fn part_of(&mut self, tensor: Tensor, reach: Reach) -> (Slot, u32) {
        match self.is_exchanged(reach) {
            true => (self.slot(Kind::Ranks, tensor, 0), self.rank()),
            false => (self.slot(Kind::Caller, tensor, 0), 0),
        }
    }

    fn is_exchanged(&self, reach: Reach) -> bool {
        reach == Reach::Group && self.problem.ranks > 1
    }

    /// Everyone's parts to everyone.
    fn put_together(&mut self, tensor: Tensor, reach: Reach, max: bool) {
        if !self.is_exchanged(reach) {
            return;
        }
        let (src, me) = (self.slot(Kind::Ranks, tensor, 0), self.rank());
        let peers = (0..self.problem.ranks).filter(|r| *r != me);
        let row = |peer, row| Message { peer, slot: src, rows: vec![Rows::range(row, 1)] };
        let (sends, recvs) = peers.map(|peer| (row(peer, me), row(peer, peer))).unzip();
        let computed = self.computed();
        let arrived = self.exchange(&[computed], sends, recvs);
        let dst = self.slot(Kind::Caller, tensor, 0);
        self.compute(&[arrived], Op::Reduce { src, dst, dst_row: 0, dst_head: 0, max });
    }
}
