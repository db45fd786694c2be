//! Head exchange: inside a team, every member gives away the heads of the others and receives their rows of its own heads.
//!
//! ```text
//!   caller, local rows × all heads          team rows × own heads
//!   ┌────┬────┐ member 0                    ┌────┐┌────┐
//!   │ a0 │ a1 │          trade_in  ──▶       │ a0 ││ a1 │
//!   ├────┼────┤ member 1  ◀── trade_out     │ b0 ││ b1 │
//!   │ b0 │ b1 │                             └────┘└────┘
//! ```
//! Giving away needs a copy (heads are interleaved); what arrives lands in place. Trading out is the reverse. With a team of one
//! nothing is exchanged, and rows are gathered only where a launch asks for it.

use super::build::Builder;
use super::{Event, Kind, Message, Op, Rows, Slot, Tensor, Value};
use crate::backend::Run;

/// Pieces up to which a message is not worth packing.
const MOST_PIECES: usize = 16;

impl Builder<'_> {
    /// Brings the caller's tensors into team buffers.
    pub fn trade_in(&mut self, tensors: &[Tensor]) {
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        for &tensor in tensors {
            if !self.gathered(tensor) {
                continue;
            }
            let from = if tensor == Tensor::Delta { Kind::Sum } else { Kind::Caller };
            let src = self.slot(from, tensor, 0);
            let team = self.arriving(tensor);
            let dense = packed(self.member_runs(self.survey.member, tensor), false);
            // Latents go to all alike: one copy is enough.
            let mut alike = None;
            for member in 0..self.problem.inner {
                let heads = self.heads_of(member, tensor);
                let count = heads.len() as u32;
                if member == self.survey.member {
                    let runs = self.member_runs(member, tensor).to_vec();
                    self.copy_heads(&[], (src, heads.start), (team, 0), count, runs, false);
                    continue;
                }
                let split = match alike {
                    Some(split) if tensor == Tensor::Latent && count > 0 => split,
                    _ => {
                        let split = self.slot(Kind::Split, tensor, member);
                        let runs = dense.clone();
                        self.copy_heads(&[], (src, heads.start), (split, 0), count, runs, false);
                        alike = alike.or(Some(split).filter(|_| count > 0));
                        split
                    }
                };
                sends.push(self.to_member(member, tensor, split));
                recvs.push(self.team_rows(member, tensor, team));
            }
        }
        let packed = self.computed();
        let arrived = self.exchange(&[packed], sends, recvs);
        for &tensor in tensors {
            let members = if self.gathered(tensor) { self.packed_members(tensor) } else { vec![] };
            for member in members {
                let (pack, team) = (self.slot(Kind::Pack, tensor, member), self.arriving(tensor));
                let runs = unpack(self.member_runs(member, tensor));
                self.copy(&[arrived], pack, team, runs, false);
            }
        }
    }

    /// The team's buffer that an input arrives in.
    fn arriving(&mut self, tensor: Tensor) -> Slot {
        let kind = if self.coded(tensor).is_some() { Kind::Code } else { Kind::Team };
        self.slot(kind, tensor, 0)
    }

    /// Brings results from team buffers to the caller's tensors; gradients of shared key heads are summed in member order.
    pub fn trade_out(&mut self, tensors: &[Tensor]) {
        let tensors: Vec<Tensor> = tensors.iter().copied().filter(|t| self.gathered(*t)).collect();
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        let me = self.survey.member;
        for &tensor in &tensors {
            let team = self.result(tensor);
            for member in self.packed_members(tensor) {
                let pack = self.slot(Kind::Pack, tensor, member);
                let runs = unpack(self.member_runs(member, tensor)).iter().map(reverse).collect();
                self.copy(&[], team, pack, runs, false);
            }
            for member in (0..self.problem.inner).filter(|m| *m != me) {
                let merge = self.slot(Kind::Merge, tensor, member);
                sends.push(self.team_rows(member, tensor, team));
                recvs.push(self.to_member(member, tensor, merge));
            }
        }
        let computed = self.computed();
        let arrived = self.exchange(&[computed], sends, recvs);
        for tensor in tensors {
            self.merge(arrived, tensor);
        }
    }

    /// Puts the members' heads of a tensor side by side.
    fn merge(&mut self, arrived: Option<Event>, tensor: Tensor) {
        let caller = self.slot(Kind::Caller, tensor, 0);
        let shared = self.heads_are_shared(tensor) || self.sums_batch(tensor);
        let dst = if shared { self.slot(Kind::Sum, tensor, 0) } else { caller };
        let spread = packed(self.member_runs(self.survey.member, tensor), true);
        let local = self.info(dst).rows;
        match shared {
            true => self.clear(&[], dst, local),
            false => self.fill_padding(tensor, caller),
        }
        for member in 0..self.problem.inner {
            let heads = self.heads_of(member, tensor);
            let (count, to) = (heads.len() as u32, (dst, heads.start));
            if member == self.survey.member {
                let runs = self.member_runs(member, tensor).iter().map(reverse).collect();
                let team = self.result(tensor);
                self.copy_heads(&[], (team, 0), to, count, runs, shared);
            } else {
                let merge = self.slot(Kind::Merge, tensor, member);
                self.copy_heads(&[arrived], (merge, 0), to, count, spread.clone(), shared);
            }
        }
        if tensor == Tensor::DBias && shared {
            self.finish_bias(dst);
        } else if shared {
            let all = Run { src: 0, src_step: 1, dst: 0, dst_step: 1, rows: local };
            self.copy(&[], dst, caller, vec![all], false);
        }
    }

    /// The gradient of a bias that batch entries share is the sum over them.
    fn sums_batch(&self, tensor: Tensor) -> bool {
        tensor == Tensor::DBias && self.bias_copies() > 1
    }

    /// From fp32 sums of this rank's rows and all heads to the caller's gradient of the bias.
    pub fn finish_bias(&mut self, sums: Slot) {
        let caller = self.slot(Kind::Caller, Tensor::DBias, 0);
        let rows = self.info(caller).rows;
        let run = |src| Run { src, src_step: 1, dst: 0, dst_step: 1, rows };
        for entry in 1..self.bias_copies() {
            self.copy(&[], sums, sums, vec![run(entry * rows)], true);
        }
        self.copy(&[], sums, caller, vec![run(0)], false);
    }

    /// Where the stages left a result: the team buffer, or the fp32 accumulator where that is what travels.
    fn result(&mut self, tensor: Tensor) -> Slot {
        let only_packed = self.problem.inner == 1;
        self.slot(if only_packed { Kind::Acc } else { Kind::Team }, tensor, 0)
    }

    /// Does a head belong to several members' shares?
    fn heads_are_shared(&self, tensor: Tensor) -> bool {
        let p = self.problem;
        let all = match tensor {
            Tensor::DBias => u32::from(!p.score.bias.is_some_and(|b| b.heads)),
            Tensor::Latent | Tensor::DLatent => 1,
            _ => p.kv_heads,
        };
        let total: u32 = (0..p.inner).map(|m| self.heads_of(m, tensor).len() as u32).sum();
        (tensor.key_side() || (tensor == Tensor::DBias && all > 0)) && total > all
    }

    /// A whole Split or Merge buffer, to or from the member it is for. It holds this rank's tokens, so it is cut as they lie in team buffers.
    fn to_member(&self, member: u32, tensor: Tensor, slot: Slot) -> Message {
        let me = self.survey.member;
        let mut at = 0;
        let mut next = |count: u32| {
            at += count;
            Rows::range(at - count, count)
        };
        let rows = match self.options.same_pieces && !self.scattered(me, tensor) {
            true => self.member_runs(me, tensor).iter().map(|r| next(r.rows)).collect(),
            false => vec![Rows::range(0, self.info(slot).rows)],
        };
        Message { peer: self.survey.team * self.problem.inner + member, slot, rows }
    }

    /// A member's rows of a team buffer, or of the buffer that they are packed in.
    fn team_rows(&mut self, member: u32, tensor: Tensor, slot: Slot) -> Message {
        let peer = self.survey.team * self.problem.inner + member;
        if self.options.same_pieces && self.scattered(member, tensor) {
            let pack = self.slot(Kind::Pack, tensor, member);
            return Message { peer, slot: pack, rows: vec![Rows::range(0, self.info(pack).rows)] };
        }
        let rows = self.member_runs(member, tensor).iter().map(|r| Rows {
            first: r.dst,
            step: r.dst_step,
            count: r.rows,
        });
        Message { peer, slot, rows: rows.collect() }
    }

    /// Do a member's tokens lie in team buffers in so many pieces that a message of them is packed?
    fn scattered(&self, member: u32, tensor: Tensor) -> bool {
        scattered(self.member_runs(member, tensor))
    }

    /// The other members whose rows are packed.
    fn packed_members(&self, tensor: Tensor) -> Vec<u32> {
        let others = (0..self.problem.inner).filter(|m| *m != self.survey.member);
        others.filter(|m| self.options.same_pieces && self.scattered(*m, tensor)).collect()
    }

    /// Results of padding rows are exactly 0, their LSE −∞.
    fn fill_padding(&mut self, tensor: Tensor, caller: Slot) {
        let mut rows = Vec::new();
        let mut at = 0;
        for run in self.member_runs(self.survey.member, tensor) {
            if run.src > at {
                rows.push(Rows::range(at, run.src - at));
            }
            at = run.src + run.rows;
        }
        let total = self.info(caller).rows;
        if total > at {
            rows.push(Rows::range(at, total - at));
        }
        if !rows.is_empty() {
            let value = if tensor == Tensor::Lse { Value::NegInf } else { Value::Zero };
            self.compute(&[], Op::Fill { slot: caller, rows, value });
        }
    }
}

/// Do rows lie in so many pieces that a message of them is packed?
pub(super) fn scattered(runs: &[Run]) -> bool {
    runs.len() > MOST_PIECES || runs.iter().any(|r| r.dst_step > 1 && r.rows > 1)
}

/// Local rows ↔ the same rows without gaps, neighbours joined.
pub(super) fn packed(runs: &[Run], back: bool) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::new();
    let mut at = 0;
    for r in runs {
        match out.last_mut() {
            Some(last) if last.src + last.rows == r.src => last.rows += r.rows,
            _ => out.push(Run { src: r.src, src_step: 1, dst: at, dst_step: 1, rows: r.rows }),
        }
        at += r.rows;
    }
    if back {
        out.iter_mut().for_each(|r| *r = reverse(r));
    }
    out
}

/// Rows without gaps → team rows.
pub(super) fn unpack(runs: &[Run]) -> Vec<Run> {
    let mut at = 0;
    let mut next = |r: &Run| {
        at += r.rows;
        Run { src: at - r.rows, src_step: 1, ..*r }
    };
    runs.iter().map(&mut next).collect()
}

pub(super) fn reverse(r: &Run) -> Run {
    Run { src: r.dst, src_step: r.dst_step, dst: r.src, dst_step: r.src_step, rows: r.rows }
}
