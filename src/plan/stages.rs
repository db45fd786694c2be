//! Staged KV exchange: the one loop that is ring attention, all-gather attention and everything between.
//!
//! ```text
//!             comm lane                       compute lane
//!   X1    KV(1)                          attend own keys
//!   X2    KV(2)                          attend stage 1          (waits X1)
//!   X3    KV(3), dKV(1) back             attend stage 2          (waits X2)
//!   …
//!   Xn+2         dKV(n) back             rest of own keys
//! ```
//! Stage s holds the keys of teams at distances d: team t receives from t − d and sends to t + d, directly, only the rows that the
//! receiver's slices need. A relay passes on what the left neighbour sent instead, all rows, and gradients travel with them.

use super::build::Builder;
use super::needs::{self, Interval};
use super::{Event, Kind, Message, Op, Rows, Slot, Tensor};
use crate::backend::Run;
use crate::dtype::DType;
use crate::mask::Slice;
use crate::problem::Wire;
use std::rc::Rc;

/// What each stage moves, 1 … n; computed once, read by both passes' loops.
pub(super) struct Stages {
    arriving: Vec<Rc<Side>>,
    leaving: Vec<Rc<Side>>,
}

impl Stages {
    pub fn new() -> Stages {
        Stages { arriving: Vec::new(), leaving: Vec::new() }
    }
}

/// Keys of another team that arrive in a stage, or go out in it.
struct Transfer {
    /// The other team.
    team: u32,
    /// Team whose keys they are.
    owner: u32,
    /// Which of them.
    keys: Vec<Interval>,
    /// First row in the receiver's buffer (arriving), or in the buffer that their gradients return to (going out).
    base: u32,
}

impl Transfer {
    fn rows(&self) -> u32 {
        needs::count(&self.keys)
    }
}

/// Everything that stage s moves, in one direction.
#[derive(Default)]
pub(super) struct Side {
    transfers: Vec<Transfer>,
    rows: u32,
}

impl Side {
    fn push(&mut self, team: u32, owner: u32, keys: Vec<Interval>) {
        let transfer = Transfer { team, owner, keys, base: self.rows };
        self.rows += transfer.rows();
        self.transfers.push(transfer);
    }
}

impl Builder<'_> {
    /// Distances of stage s in 1 … n: as even as they go.
    fn distances(&self, s: u32) -> std::ops::RangeInclusive<u32> {
        let (n, others) = (self.problem.stages, self.problem.teams() - 1);
        (s - 1) * others / n + 1..=s * others / n
    }

    /// Works out every stage.
    pub fn list_stages(&mut self) {
        let n = self.problem.stages;
        let arriving = (1..=n).map(|s| Rc::new(self.list_arriving(s))).collect();
        let leaving = (1..=n).map(|s| Rc::new(self.list_leaving(s))).collect();
        self.stages = Stages { arriving, leaving };
    }

    fn arriving(&self, s: u32) -> Rc<Side> {
        self.stages.arriving[s as usize - 1].clone()
    }

    fn leaving(&self, s: u32) -> Rc<Side> {
        self.stages.leaving[s as usize - 1].clone()
    }

    /// What arrives in stage s.
    fn list_arriving(&self, s: u32) -> Side {
        let b = self.problem.teams();
        let mut side = Side::default();
        for d in self.distances(s) {
            let owner = (self.team + b - d) % b;
            let from = if self.problem.relay { (self.team + b - 1) % b } else { owner };
            side.push(from, owner, self.keys_for(self.team, owner));
        }
        side
    }

    /// What leaves in stage s.
    fn list_leaving(&self, s: u32) -> Side {
        let b = self.problem.teams();
        let mut side = Side::default();
        for d in self.distances(s) {
            if self.problem.relay {
                let owner = (self.team + b - (s - 1)) % b;
                side.push((self.team + 1) % b, owner, self.keys_for(self.team, owner));
            } else {
                let to = (self.team + d) % b;
                side.push(to, self.team, self.keys_for(to, self.team));
            }
        }
        side
    }

    /// Keys of `owner` that travel to `reader`.
    fn keys_for(&self, reader: u32, owner: u32) -> Vec<Interval> {
        let owner = &self.teams[owner as usize].k.segments;
        match self.problem.relay {
            true => needs::everything(owner),
            false => needs::needed(self.problem, &self.teams[reader as usize].q.segments, owner),
        }
    }

    /// The stage's slices over its receive buffer.
    fn stage_slices(&self, side: &Side) -> Vec<Slice> {
        let mut out = Vec::new();
        for t in &side.transfers {
            let owner = &self.teams[t.owner as usize].k.segments;
            needs::slices(self.problem, &self.mine().q.segments, owner, &t.keys, t.base, &mut out);
        }
        needs::sort(&mut out);
        out
    }

    /// Slices over this team's own keys.
    fn own_slices(&self) -> Vec<Slice> {
        needs::own_slices(self.problem, &self.mine().q.segments, &self.mine().k.segments)
    }

    /// Messages that bring the keys of stage s, both directions.
    fn key_messages(&mut self, s: u32) -> (Vec<Message>, Vec<Message>) {
        let (arriving, leaving) = (self.arriving(s), self.leaving(s));
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        for tensor in [Tensor::K, Tensor::V] {
            let own = self.input(tensor);
            let landing = self.slot_rows(Kind::Recv, tensor, s % 2, arriving.rows);
            for t in &leaving.transfers {
                let rows = match t.owner == self.team {
                    true => needs::rows(&self.mine().k.segments, &t.keys),
                    false => vec![Rows::range(0, t.rows())],
                };
                let slot = if t.owner == self.team {
                    own
                } else {
                    Slot::indexed(Kind::Recv, tensor, (s - 1) % 2)
                };
                sends.push(Message { peer: self.peer_in(t.team), slot, rows });
            }
            for t in &arriving.transfers {
                recvs.push(Message {
                    peer: self.peer_in(t.team),
                    slot: landing,
                    rows: vec![Rows::range(t.base, t.rows())],
                });
            }
        }
        (sends, recvs)
    }

    /// Forward: attend own keys while stage 1 arrives, stage 1 while stage 2 arrives, …
    pub fn forward_stages(&mut self) {
        let n = self.problem.stages;
        let arrived = self.trade_event();
        let (q, out, lse) =
            (self.input(Tensor::Q), self.output(Tensor::Out), self.output(Tensor::Lse));
        let own = self.input(Tensor::K);
        self.input(Tensor::V);
        let work: Vec<Vec<Slice>> = (1..=n).map(|s| self.stage_slices(&self.arriving(s))).collect();
        // A stage without work is skipped, so the last attend is the last one with work.
        let last = (1..=n).rev().find(|s| !work[*s as usize - 1].is_empty()).unwrap_or(0);
        if last > 0 {
            for tensor in [Tensor::Out, Tensor::Max, Tensor::Sum] {
                self.slot(Kind::Acc, tensor, 0);
            }
        }
        let ready = self.computed();
        let mut next = self.push_keys(1, &[ready]);
        let slices = self.own_slices();
        let finish = (last == 0).then_some((out, lse));
        self.compute(&[arrived], Op::Attend { q, k: own, slices, first: true, last: finish });
        for (s, slices) in (1..=n).zip(work) {
            let this = next;
            self.stage = s;
            let free = self.computed();
            next = self.push_keys(s + 1, &[free]);
            if !slices.is_empty() {
                let k = Slot::indexed(Kind::Recv, Tensor::K, s % 2);
                let finish = (s == last).then_some((out, lse));
                self.compute(&[this], Op::Attend { q, k, slices, first: false, last: finish });
            }
        }
        self.stage = 0;
    }

    /// The exchange that brings the keys of stage s, if there is such a stage.
    fn push_keys(&mut self, s: u32, waits: &[Option<Event>]) -> Option<Event> {
        if s > self.problem.stages {
            return None;
        }
        self.stage = s;
        let (sends, recvs) = self.key_messages(s);
        let event = self.exchange(waits, sends, recvs);
        self.stage = s - 1;
        event
    }

    /// Backward: keys arrive as in forward; the gradients of stage s−1 leave while stage s is computed.
    pub fn backward_stages(&mut self) {
        let n = self.problem.stages;
        let arrived = self.trade_event();
        self.input(Tensor::V);
        let own = (self.input(Tensor::K), self.slot(Kind::Acc, Tensor::DK, 0));
        for tensor in [Tensor::DQ, Tensor::DK, Tensor::DV] {
            let acc = self.slot(Kind::Acc, tensor, 0);
            let rows = self.info(acc).rows;
            self.clear(&[], acc, rows);
        }
        let (first_half, second_half) =
            if n > 0 { needs::halve(&self.own_slices()) } else { (self.own_slices(), Vec::new()) };
        let ready = self.computed();
        let mut next = self.push_keys(1, &[ready]);
        self.attend_backward(arrived, own.0, own.1, first_half);
        // Exchanges: X[s] brings the keys of stage s and returns the gradients of stage s−2.
        for s in 1..=n + 1 {
            let this = next;
            self.stage = s;
            if self.problem.relay && s >= 3 {
                self.fold(this, s - 1);
            }
            next = self.push_keys_and_gradients(s + 1);
            if s <= n {
                self.stage_gradients(this, s);
            }
            if !self.problem.relay && s >= 3 {
                self.reduce(this, s - 2);
            }
        }
        self.stage = 0;
        self.attend_backward(arrived, own.0, own.1, second_half);
        self.stage = n;
        if n > 0 {
            self.reduce(next, n);
        }
        self.stage = 0;
        self.finish_gradients();
    }

    /// X[s]: keys of stage s, and the gradients of stage s−2 on their way home.
    fn push_keys_and_gradients(&mut self, s: u32) -> Option<Event> {
        let n = self.problem.stages;
        let (mut sends, mut recvs) =
            if s <= n { self.key_messages(s) } else { (Vec::new(), Vec::new()) };
        if s >= 3 && s - 2 <= n {
            self.gradient_messages(s - 2, &mut sends, &mut recvs);
        }
        let computed = self.computed();
        self.exchange(&[computed], sends, recvs)
    }

    /// Converts the gradients of stage s to wire type and addresses them: to the owners, or to the next team of a relay.
    fn gradient_messages(&mut self, s: u32, sends: &mut Vec<Message>, recvs: &mut Vec<Message>) {
        let (arriving, leaving) = (self.arriving(s), self.leaving(s));
        let b = self.problem.teams();
        for tensor in [Tensor::DK, Tensor::DV] {
            let wire = self.wired(tensor, s, arriving.rows);
            if self.problem.relay {
                // What comes in belongs to the owner that the left neighbour just worked for.
                let (left, right) = ((self.team + b - 1) % b, (self.team + 1) % b);
                let owner = (left + b - s) % b;
                let rows = needs::count(&self.keys_for(left, owner));
                let landing = self.slot_rows(Kind::Return, tensor, s % 2, rows);
                sends.push(Message {
                    peer: self.peer_in(right),
                    slot: wire,
                    rows: vec![Rows::range(0, arriving.rows)],
                });
                recvs.push(Message {
                    peer: self.peer_in(left),
                    slot: landing,
                    rows: vec![Rows::range(0, rows)],
                });
                continue;
            }
            let landing = self.slot_rows(Kind::Return, tensor, s % 2, leaving.rows);
            for t in &arriving.transfers {
                sends.push(Message {
                    peer: self.peer_in(t.team),
                    slot: wire,
                    rows: vec![Rows::range(t.base, t.rows())],
                });
            }
            for t in &leaving.transfers {
                recvs.push(Message {
                    peer: self.peer_in(t.team),
                    slot: landing,
                    rows: vec![Rows::range(t.base, t.rows())],
                });
            }
        }
    }

    /// The stage's gradients as they travel; fp32 needs no conversion.
    fn wired(&mut self, tensor: Tensor, s: u32, rows: u32) -> Slot {
        let part = self.slot_rows(Kind::Part, tensor, s % 2, rows);
        if self.problem.wire == Wire::F32 || self.problem.dtype == DType::F32 {
            return part;
        }
        let wire = self.slot_rows(Kind::Wire, tensor, s % 2, rows);
        self.copy(&[], part, wire, vec![straight(rows)], false);
        wire
    }

    /// Attends stage s into fresh gradients.
    fn stage_gradients(&mut self, arrived: Option<Event>, s: u32) {
        let side = self.arriving(s);
        let slices = self.stage_slices(&side);
        for tensor in [Tensor::DK, Tensor::DV] {
            // The exchange also took the gradients of stage s−2 away, from the same buffer if they travel as fp32.
            let part = self.slot_rows(Kind::Part, tensor, s % 2, side.rows);
            self.clear(&[arrived], part, side.rows);
        }
        let (k, dk) = (
            Slot::indexed(Kind::Recv, Tensor::K, s % 2),
            Slot::indexed(Kind::Part, Tensor::DK, s % 2),
        );
        self.attend_backward(arrived, k, dk, slices);
    }

    fn attend_backward(&mut self, arrived: Option<Event>, k: Slot, dk: Slot, slices: Vec<Slice>) {
        let [q, d_out, lse, delta] =
            [Tensor::Q, Tensor::DOut, Tensor::Lse, Tensor::Delta].map(|t| self.input(t));
        if !slices.is_empty() {
            self.compute(&[arrived], Op::AttendBackward { q, d_out, lse, delta, k, dk, slices });
        }
    }

    /// Relay: adds the travelling gradients to those of stage s, which are for the same owner.
    fn fold(&mut self, arrived: Option<Event>, s: u32) {
        for tensor in [Tensor::DK, Tensor::DV] {
            let rows = self.arriving(s).rows;
            let part = self.slot_rows(Kind::Part, tensor, s % 2, rows);
            let landed = self.slot_rows(Kind::Return, tensor, (s - 1) % 2, rows);
            self.copy(&[arrived], landed, part, vec![straight(rows)], true);
        }
    }

    /// Adds gradients of this team's keys that came home from stage s.
    fn reduce(&mut self, arrived: Option<Event>, s: u32) {
        let owned = if self.problem.relay { Rc::new(self.whole()) } else { self.leaving(s) };
        for tensor in [Tensor::DK, Tensor::DV] {
            let acc = Slot::of(Kind::Acc, tensor);
            let landed = self.slot_rows(Kind::Return, tensor, s % 2, owned.rows);
            for t in &owned.transfers {
                let mut src = t.base;
                let mut runs = Vec::new();
                for r in needs::rows(&self.mine().k.segments, &t.keys) {
                    runs.push(Run { src, src_step: 1, dst: r.first, dst_step: 1, rows: r.count });
                    src += r.count;
                }
                self.copy(&[arrived], landed, acc, runs, true);
            }
        }
    }

    /// All of this team's keys: what a relay brings home.
    fn whole(&self) -> Side {
        let mut side = Side::default();
        side.push(self.team, self.team, needs::everything(&self.mine().k.segments));
        side
    }

    /// The one rounding at the end.
    fn finish_gradients(&mut self) {
        for tensor in [Tensor::DQ, Tensor::DK, Tensor::DV] {
            let acc = Slot::of(Kind::Acc, tensor);
            let rows = self.info(acc).rows;
            if self.problem.inner > 1 {
                let team = self.slot(Kind::Team, tensor, 0);
                self.copy(&[], acc, team, vec![straight(rows)], false);
            } else if !self.gathered(tensor) {
                let caller = self.slot(Kind::Caller, tensor, 0);
                self.copy(&[], acc, caller, vec![straight(rows)], false);
            }
        }
    }

    /// Where forward writes a result: the caller's tensor, or the team's.
    fn output(&mut self, tensor: Tensor) -> Slot {
        let kind = if self.problem.inner > 1 { Kind::Team } else { Kind::Caller };
        self.slot(kind, tensor, 0)
    }
}

fn straight(rows: u32) -> Run {
    Run { src: 0, src_step: 1, dst: 0, dst_step: 1, rows }
}
