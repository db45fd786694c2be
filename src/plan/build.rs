//! The builder that the planner's parts push steps into, and the order in which they do it.

use super::survey::Survey;
use super::team::HeadShare;
use super::{
    Event, Kind, Lane, Message, Op, Options, Pass, Plan, Rows, Slot, SlotInfo, Step, Tensor, Value,
};
use crate::backend::Run;
use crate::dtype::{DType, Fp8};
use crate::holding::holding;
use crate::partition::Side;
use crate::problem::{Problem, Wire};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Plans one pass of the surveyed rank: trade heads, go through the stages, trade back.
pub(super) fn plan(
    problem: &Arc<Problem>,
    rank: u32,
    survey: &Survey,
    pass: Pass,
    options: Options,
) -> Plan {
    let mut b = Builder::new(survey, rank, options);
    match pass {
        Pass::Forward => {
            b.trade_in(&[&[Tensor::Q], b.cargo(), &[Tensor::Bias]].concat());
            b.forward_stages();
            b.trade_out(&[Tensor::Out, Tensor::Lse]);
            b.max_logit();
        }
        Pass::Backward => {
            b.delta();
            let kept = [&[Tensor::Q], b.cargo(), &[Tensor::Lse]].concat();
            let new = [Tensor::DOut, Tensor::Delta, Tensor::Bias];
            // A team of one saves nothing: rows that a launch asked to pack are packed again.
            match options.saved && problem.inner > 1 {
                true => b.trade_in(&new),
                false => b.trade_in(&[kept.as_slice(), &new].concat()),
            }
            b.backward_stages();
            b.trade_out(&[&[Tensor::DQ], b.homebound(), &[Tensor::DBias]].concat());
            // Last, so that no rank waits at the beginning for all others.
            b.sink_gradient();
        }
        Pass::ToHeads | Pass::ToSequence => unreachable!("`Plan::of_trade` plans these"),
    }
    Plan {
        problem: problem.clone(),
        trade: None,
        rank,
        pass,
        options,
        stages: survey.count(),
        share: b.share(survey.member),
        origins: survey.origins(),
        slots: b.slots.into_values().collect(),
        steps: b.steps,
        events: b.events.len() as u32,
    }
}

pub(super) struct Builder<'a> {
    pub problem: &'a Problem,
    pub options: Options,
    pub survey: &'a Survey<'a>,
    /// Rows of the caller's tensors, queries and keys.
    local_rows: [u32; 2],
    slots: BTreeMap<Slot, SlotInfo>,
    steps: Vec<Step>,
    /// What is known after each step: how many steps of each lane are done.
    known: Vec<[usize; 2]>,
    /// Step that signals each event.
    events: Vec<usize>,
    /// Stage that new steps are marked with.
    pub stage: u32,
    /// The exchange that reads each of the two `Send` slots.
    pub sending: [Option<Event>; 2],
}

impl<'a> Builder<'a> {
    fn new(survey: &'a Survey<'a>, rank: u32, options: Options) -> Builder<'a> {
        let rows = |side| holding(survey.problem, rank, side).rows;
        Builder {
            problem: survey.problem,
            options,
            survey,
            local_rows: [rows(Side::Query), rows(Side::Key)],
            slots: BTreeMap::new(),
            steps: Vec::new(),
            known: Vec::new(),
            events: Vec::new(),
            stage: 0,
            sending: [None; 2],
        }
    }

    pub fn share(&self, member: u32) -> HeadShare {
        HeadShare::of(self.problem, member)
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.peer_in(self.survey.team)
    }

    /// A member's heads of a tensor. A bias that all heads share is everyone's.
    pub fn heads_of(&self, member: u32, tensor: Tensor) -> Range<u32> {
        let share = self.share(member);
        match tensor {
            Tensor::Bias | Tensor::DBias if !self.problem.score.bias.is_some_and(|b| b.heads) => {
                0..u32::from(!share.q.is_empty())
            }
            // One head, which every member with heads works on.
            Tensor::Latent | Tensor::DLatent => 0..u32::from(!share.q.is_empty()),
            _ => share.side(tensor.key_side()),
        }
    }

    /// The rank in this rank's place of another team.
    pub fn peer_in(&self, team: u32) -> u32 {
        team * self.problem.inner + self.survey.member
    }

    /// Are the rows of this side gathered into team buffers, or used where the caller has them?
    pub fn gathered(&self, tensor: Tensor) -> bool {
        let bias = self.problem.score.bias;
        match tensor {
            // One row for all queries is there already.
            Tensor::Bias => self.problem.inner > 1 && bias.is_some_and(|b| b.queries),
            Tensor::DBias => self.problem.inner > 1 && bias.is_some_and(|b| b.gradient),
            _ => self.problem.inner > 1 || (self.packs_keys() && tensor.key_side()),
        }
    }

    /// Does a team of one gather its keys too? Those that are attended are not the caller's if they travel in another format.
    fn packs_keys(&self) -> bool {
        self.options.pack || self.problem.kv_wire.is_some()
    }

    /// The format in which a tensor travels, if it is another than that in which it is stored.
    pub fn coded(&self, tensor: Tensor) -> Option<Fp8> {
        self.problem.kv_wire.filter(|_| matches!(tensor, Tensor::K | Tensor::V))
    }

    /// Where the stages find an input: the caller's tensor, or the team's.
    pub fn input(&mut self, tensor: Tensor) -> Slot {
        match self.gathered(tensor) {
            true => self.slot(Kind::Team, tensor, 0),
            false if tensor == Tensor::Delta => self.slot(Kind::Sum, tensor, 0),
            false => self.slot(Kind::Caller, tensor, 0),
        }
    }

    /// A slot with as many rows as its kind always has.
    pub fn slot(&mut self, kind: Kind, tensor: Tensor, index: u32) -> Slot {
        let key = usize::from(tensor.key_side());
        let rows = match kind {
            Kind::Ranks => self.problem.ranks,
            Kind::Caller if tensor.per_head() => 1,
            Kind::Caller if tensor.weights() => Plan::weight_rows(self.problem, tensor),
            Kind::Caller if tensor == Tensor::DBias => self.local_rows[0] / self.bias_copies(),
            Kind::Caller | Kind::Sum => self.local_rows[key],
            Kind::Team | Kind::Code | Kind::Acc => {
                if key == 1 {
                    self.survey.mine.k.rows
                } else {
                    self.survey.mine.q.rows
                }
            }
            Kind::Split | Kind::Merge => {
                self.member_runs(self.survey.member, tensor).iter().map(|r| r.rows).sum()
            }
            Kind::Pack => self.member_runs(index, tensor).iter().map(|r| r.rows).sum(),
            Kind::Send | Kind::Recv | Kind::Seen | Kind::Part | Kind::Wire | Kind::Return => 0,
        };
        self.slot_rows(kind, tensor, index, rows)
    }

    /// A slot with at least this many rows.
    pub fn slot_rows(&mut self, kind: Kind, tensor: Tensor, index: u32, rows: u32) -> Slot {
        let slot = Slot::indexed(kind, tensor, index);
        if let Some(known) = self.slots.get_mut(&slot) {
            known.rows = known.rows.max(rows);
            return slot;
        }
        let p = self.problem;
        let biases = matches!(tensor, Tensor::Bias | Tensor::DBias);
        let latent = matches!(tensor, Tensor::Latent | Tensor::DLatent);
        let heads = match kind {
            Kind::Caller | Kind::Sum if latent => 1,
            Kind::Caller | Kind::Sum | Kind::Ranks if biases => {
                if p.score.bias.is_some_and(|b| b.heads) { p.heads } else { 1 }
            }
            Kind::Caller | Kind::Sum | Kind::Ranks if tensor.key_side() => p.kv_heads,
            Kind::Caller | Kind::Sum | Kind::Ranks => p.heads,
            Kind::Split | Kind::Merge => self.heads_of(index, tensor).len() as u32,
            _ => self.heads_of(self.survey.member, tensor).len() as u32,
        };
        let dim = match tensor {
            Tensor::Q | Tensor::K | Tensor::DQ | Tensor::DK => p.dim_qk,
            Tensor::V | Tensor::Out | Tensor::DOut | Tensor::DV => p.dim_v,
            Tensor::Bias | Tensor::DBias => p.bias_columns(),
            Tensor::Latent | Tensor::DLatent => p.latent.map_or(0, |l| l.width()),
            Tensor::UpK | Tensor::UpV | Tensor::DUpK | Tensor::DUpV => {
                p.latent.map_or(0, |l| l.dim)
            }
            Tensor::Local | Tensor::Whole => unreachable!("attention has no such tensor"),
            _ => 1,
        };
        let gradient = matches!(tensor, Tensor::DK | Tensor::DV | Tensor::DLatent | Tensor::DBias);
        let wired = gradient && kind != Kind::Caller;
        let dtype = match kind {
            Kind::Part | Kind::Acc | Kind::Sum => DType::F32,
            Kind::Seen if gradient => DType::F32,
            _ if matches!(tensor, Tensor::DUpK | Tensor::DUpV) => DType::F32,
            _ if dim == 1 && !biases => DType::F32,
            _ if wired && p.wire == Wire::F32 => DType::F32,
            _ => p.dtype,
        };
        let travels = !matches!(kind, Kind::Caller | Kind::Team | Kind::Seen);
        let (dtype, dim) = match self.coded(tensor) {
            Some(format) if travels => (DType::Fp8(format), Fp8::bytes(dim)),
            _ => (dtype, dim),
        };
        use Tensor::{K, Latent, Lse, Q, V};
        let kept = match self.coded(tensor) {
            Some(_) => kind == Kind::Code,
            None => kind == Kind::Team && matches!(tensor, Q | K | V | Latent | Lse),
        };
        let saved = self.options.saved && p.inner > 1 && kept;
        self.slots.insert(slot, SlotInfo { slot, rows, heads, dim, dtype, saved });
        slot
    }

    /// How many batch entries of a bias gradient are summed into one.
    pub fn bias_copies(&self) -> u32 {
        let p = self.problem;
        match p.score.bias {
            Some(bias) if !bias.batch && !p.packed => p.seqs.len() as u32,
            _ => 1,
        }
    }

    pub fn info(&self, slot: Slot) -> SlotInfo {
        self.slots[&slot]
    }

    /// Local row → team row of a member of this rank's team.
    pub fn member_runs(&self, member: u32, tensor: Tensor) -> &'a [Run] {
        let mine = &self.survey.mine;
        let side = if tensor.key_side() { &mine.k } else { &mine.q };
        &side.members[member as usize]
    }

    /// Pushes a step. Waits that its lane, or another of its waits, already implies are left out.
    fn push(&mut self, lane: Lane, waits: &[Option<Event>], op: Op) {
        let before = self.steps.iter().rposition(|s| s.lane == lane);
        let mut known = before.map_or([0; 2], |index| self.known[index]);
        let mut needed = Vec::new();
        for event in waits.iter().flatten() {
            let then = self.known[self.events[*event as usize]];
            if then[0] > known[0] || then[1] > known[1] {
                known = [known[0].max(then[0]), known[1].max(then[1])];
                needed.push(*event);
            }
        }
        known[lane as usize] += 1;
        self.known.push(known);
        self.steps.push(Step { lane, stage: self.stage, waits: needed, signal: None, op });
    }

    /// Pushes a compute step.
    pub fn compute(&mut self, waits: &[Option<Event>], op: Op) {
        self.push(Lane::Compute, waits, op);
    }

    /// An event for "everything on the compute lane up to here".
    pub fn computed(&mut self) -> Option<Event> {
        let index = self.steps.iter().rposition(|s| s.lane == Lane::Compute)?;
        Some(self.signal(index))
    }

    /// The event of a step.
    fn signal(&mut self, index: usize) -> Event {
        if self.steps[index].signal.is_none() {
            self.steps[index].signal = Some(self.events.len() as Event);
            self.events.push(index);
        }
        self.steps[index].signal.expect("just made")
    }

    /// The head exchange's event, if there was one: the last on the comm lane so far.
    pub fn trade_event(&self) -> Option<Event> {
        self.steps.iter().rev().find(|s| s.lane == Lane::Comm).and_then(|s| s.signal)
    }

    /// Pushes a grouped exchange; messages without bytes are left out on both sides. `None` if nothing is left.
    pub fn exchange(
        &mut self,
        waits: &[Option<Event>],
        sends: Vec<Message>,
        recvs: Vec<Message>,
    ) -> Option<Event> {
        let full = |list: Vec<Message>| -> Vec<Message> {
            list.into_iter().filter(|m| m.count() > 0 && self.info(m.slot).heads > 0).collect()
        };
        let (sends, recvs) = (full(sends), full(recvs));
        if sends.is_empty() && recvs.is_empty() {
            return None;
        }
        self.push(Lane::Comm, waits, Op::Exchange { sends, recvs });
        Some(self.signal(self.steps.len() - 1))
    }

    /// Copies all heads of some rows.
    pub fn copy(
        &mut self,
        waits: &[Option<Event>],
        src: Slot,
        dst: Slot,
        runs: Vec<Run>,
        add: bool,
    ) {
        let heads = self.info(src).heads;
        self.copy_heads(waits, (src, 0), (dst, 0), heads, runs, add);
    }

    /// Copies some heads of some rows.
    pub fn copy_heads(
        &mut self,
        waits: &[Option<Event>],
        src: (Slot, u32),
        dst: (Slot, u32),
        heads: u32,
        runs: Vec<Run>,
        add: bool,
    ) {
        if heads > 0 && runs.iter().any(|r| r.rows > 0) {
            self.compute(
                waits,
                Op::Copy {
                    src: src.0,
                    src_head: src.1,
                    dst: dst.0,
                    dst_head: dst.1,
                    heads,
                    runs,
                    add,
                },
            );
        }
    }

    /// Fills all rows of a slot.
    pub fn clear(&mut self, waits: &[Option<Event>], slot: Slot, count: u32) {
        if count > 0 && self.info(slot).heads > 0 {
            self.compute(
                waits,
                Op::Fill { slot, rows: vec![Rows::range(0, count)], value: Value::Zero },
            );
        }
    }

    /// Backward's Σ O∘dO, over the caller's rows.
    fn delta(&mut self) {
        for tensor in [Tensor::Out, Tensor::DOut] {
            self.slot(Kind::Caller, tensor, 0);
        }
        self.slot(Kind::Sum, Tensor::Delta, 0);
        self.compute(&[], Op::Delta);
    }
}
