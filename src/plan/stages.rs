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
//! receiver's slices need; a distance at which nobody needs any has no stage. A relay passes on what the left neighbour sent instead, all rows, and gradients travel with them.

use super::build::Builder;
use super::needs;
use super::survey::Traffic;
use super::{Event, Kind, Message, Op, Rows, Slot, Tensor};
use crate::backend::Run;
use crate::dtype::DType;
use crate::mask::Slice;
use crate::problem::{Problem, Wire};

impl Builder<'_> {
    /// What travels between teams so that others can attend this team's keys.
    pub fn cargo(&self) -> &'static [Tensor] {
        match self.problem.latent {
            Some(_) => &[Tensor::Latent],
            None => &[Tensor::K, Tensor::V],
        }
    }

    /// The gradients of it, which go home.
    pub fn homebound(&self) -> &'static [Tensor] {
        match self.problem.latent {
            Some(_) => &[Tensor::DLatent],
            None => &[Tensor::DK, Tensor::DV],
        }
    }

    /// Where this team's own cargo is sent from.
    fn own_cargo(&mut self, tensor: Tensor) -> Slot {
        match self.coded(tensor) {
            Some(_) => self.slot(Kind::Code, tensor, 0),
            None => self.input(tensor),
        }
    }

    /// The keys that stage s attends, 0 being the own ones; their values lie in the same kind of slot.
    fn keys(&mut self, arrived: Option<Event>, s: u32) -> Slot {
        match s {
            _ if self.problem.latent.is_some() => self.expand(arrived, s),
            0 => self.own_keys(arrived),
            _ => self.stage_keys(s, arrived),
        }
    }

    /// The keys that stage 0 attends, there with the step before if not with `arrived`; their values lie in the same kind of slot.
    fn own_keys(&mut self, arrived: Option<Event>) -> Slot {
        for tensor in [Tensor::V, Tensor::K] {
            let own = self.input(tensor);
            if self.coded(tensor).is_some() {
                let (code, rows) = (self.own_cargo(tensor), self.survey.mine.k.rows);
                self.copy(&[arrived], code, own, vec![straight(rows)], false);
            }
        }
        self.input(Tensor::K)
    }

    /// The same of stage s.
    fn stage_keys(&mut self, s: u32, arrived: Option<Event>) -> Slot {
        for tensor in [Tensor::V, Tensor::K] {
            if self.coded(tensor).is_some() {
                let landed = Slot::indexed(Kind::Recv, tensor, s % 2);
                let rows = self.survey.stage(s).arriving.rows;
                let seen = self.slot_rows(Kind::Seen, tensor, 0, rows);
                self.copy(&[arrived], landed, seen, vec![straight(rows)], false);
            }
        }
        match self.coded(Tensor::K) {
            Some(_) => Slot::of(Kind::Seen, Tensor::K),
            None => Slot::indexed(Kind::Recv, Tensor::K, s % 2),
        }
    }

    /// Messages that bring the keys of stage s, both directions.
    fn key_messages(&mut self, s: u32) -> (Vec<Message>, Vec<Message>) {
        let stage = self.survey.stage(s);
        let (arriving, leaving) = (&stage.arriving, &stage.leaving);
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        for &tensor in self.cargo() {
            let own = self.own_cargo(tensor);
            let landing = self.slot_rows(Kind::Recv, tensor, s % 2, arriving.rows);
            let mut gathered = 0;
            for t in &leaving.transfers {
                let mut rows = match t.owner == self.survey.team {
                    true => needs::rows(&self.survey.mine.k.segments, &t.keys),
                    false => vec![Rows::range(0, t.rows)],
                };
                let slot = if t.owner != self.survey.team {
                    // A relay sends what the stage before brought.
                    Slot::indexed(Kind::Recv, tensor, (s - 1) % 2)
                } else if self.options.same_pieces && rows.len() > 1 {
                    rows = vec![Rows::range(gathered, t.rows)];
                    gathered += t.rows;
                    Slot::indexed(Kind::Send, tensor, s % 2)
                } else {
                    own
                };
                sends.push(Message { peer: self.peer_in(t.team), slot, rows });
            }
            for t in &arriving.transfers {
                recvs.push(Message {
                    peer: self.peer_in(t.team),
                    slot: landing,
                    rows: vec![Rows::range(t.base, t.rows)],
                });
            }
        }
        (sends, recvs)
    }

    /// Gathers the rows that stage s sends and that are not one run, where messages must be one piece. Own keys are there with `arrived`; the
    /// event says that the gathered ones are.
    fn gather_keys(&mut self, s: u32, arrived: Option<Event>) -> Option<Event> {
        if s > self.survey.count() || !self.options.same_pieces {
            return None;
        }
        let free = self.sending[s as usize % 2];
        let survey = self.survey;
        let before = std::mem::replace(&mut self.stage, s);
        let mut any = false;
        for &tensor in self.cargo() {
            let own = self.own_cargo(tensor);
            let mut runs = Vec::new();
            let mut at = 0;
            let mine = survey.stage(s).leaving.transfers.iter().filter(|t| t.owner == survey.team);
            for t in mine {
                let rows = needs::rows(&survey.mine.k.segments, &t.keys);
                for r in rows.iter().filter(|_| rows.len() > 1) {
                    let (src, dst, rows) = (r.first, at, r.count);
                    runs.push(Run { src, src_step: 1, dst, dst_step: 1, rows });
                    at += rows;
                }
            }
            if at > 0 {
                let send = self.slot_rows(Kind::Send, tensor, s % 2, at);
                self.copy(&[arrived, free], own, send, runs, false);
                any = true;
            }
        }
        self.stage = before;
        if any { self.computed() } else { None }
    }

    fn note_sending(&mut self, s: u32, exchange: Option<Event>) {
        let last = &mut self.sending[s as usize % 2];
        *last = exchange.or(*last);
    }

    /// Forward: attend own keys while stage 1 arrives, stage 1 while stage 2 arrives, …
    pub fn forward_stages(&mut self) {
        let n = self.survey.count();
        let arrived = self.trade_event();
        let (q, out, lse) =
            (self.input(Tensor::Q), self.output(Tensor::Out), self.output(Tensor::Lse));
        let survey = self.survey;
        if self.problem.score.max_logit.is_some() {
            self.slot(Kind::Acc, Tensor::Top, 0);
        }
        if self.problem.score.sinks.is_some() {
            self.slot(Kind::Caller, Tensor::Sinks, 0);
        }
        if self.problem.score.bias.is_some() {
            self.input(Tensor::Bias);
        }
        // A stage without work is skipped, so the last attend is the last one with work.
        let last = (1..=n).rev().find(|s| !survey.stage(*s).work.is_empty()).unwrap_or(0);
        if last > 0 {
            for tensor in [Tensor::Out, Tensor::Max, Tensor::Sum] {
                self.slot(Kind::Acc, tensor, 0);
            }
        }
        let ready = self.computed();
        let mut gathered = self.gather_keys(1, arrived);
        let mut next = self.push_keys(1, &[ready, gathered]);
        gathered = self.gather_keys(2, arrived);
        let slices = survey.own.clone();
        let own = self.keys(arrived, 0);
        let finish = (last == 0).then_some((out, lse));
        self.compute(&[arrived], Op::Attend { q, k: own, slices, first: true, last: finish });
        for s in 1..=n {
            let this = next;
            self.stage = s;
            // Stage s − 1 was read from the slot that stage s + 1 goes to; stage 0 from none.
            let free = if s > 1 { self.computed() } else { ready };
            next = self.push_keys(s + 1, &[free, gathered]);
            gathered = self.gather_keys(s + 2, arrived);
            let slices = survey.stage(s).work.clone();
            if !slices.is_empty() {
                let k = self.keys(this, s);
                let finish = (s == last).then_some((out, lse));
                self.compute(&[this], Op::Attend { q, k, slices, first: false, last: finish });
            }
        }
        self.stage = 0;
    }

    /// The exchange that brings the keys of stage s, if there is such a stage.
    fn push_keys(&mut self, s: u32, waits: &[Option<Event>]) -> Option<Event> {
        if s > self.survey.count() {
            return None;
        }
        self.stage = s;
        let (sends, recvs) = self.key_messages(s);
        let event = self.exchange(waits, sends, recvs);
        self.note_sending(s, event);
        self.stage = s - 1;
        event
    }

    /// Backward: keys arrive as in forward; the gradients of stage s−1 leave while stage s is computed.
    pub fn backward_stages(&mut self) {
        let n = self.survey.count();
        let arrived = self.trade_event();
        // The first exchange needs this rank's own keys, no gradients.
        let ready = if self.gathered(Tensor::K) { self.computed() } else { None };
        // Even without work they are there: what forward saved lies where it was.
        for &tensor in self.cargo() {
            self.own_cargo(tensor);
        }
        for tensor in [&[Tensor::DQ], self.homebound()].concat() {
            let acc = self.slot(Kind::Acc, tensor, 0);
            let rows = self.info(acc).rows;
            self.clear(&[], acc, rows);
        }
        if self.problem.latent.is_some() {
            self.clear_weights();
        }
        if let Some(bias) = self.problem.score.bias {
            self.input(Tensor::Bias);
            if bias.gradient {
                let acc = self.slot(Kind::Acc, Tensor::DBias, 0);
                let rows = self.info(acc).rows;
                self.clear(&[], acc, rows);
            }
        }
        let own_work = &self.survey.own;
        let (first_half, mut second_half) =
            if n > 0 { needs::halve(own_work) } else { (own_work.clone(), Vec::new()) };
        let mut gathered = self.gather_keys(1, arrived);
        let mut next = self.push_keys(1, &[ready, gathered]);
        gathered = self.gather_keys(2, arrived);
        let own = match self.problem.latent {
            Some(_) => None,
            None => Some((self.own_keys(arrived), self.slot(Kind::Acc, Tensor::DK, 0))),
        };
        self.attend_backward(arrived, 0, own, first_half);
        // Exchanges: X[s] brings the keys of stage s and returns the gradients of stage s−2.
        for s in 1..=n + 1 {
            let this = next;
            if self.problem.relay && s >= 3 {
                self.fold(this, s - 1);
            }
            next = self.push_keys_and_gradients(s + 1, &[ready, gathered]);
            gathered = self.gather_keys(s + 2, arrived);
            if s <= n {
                self.stage_gradients(this, s);
            } else {
                // Covers the last two returns.
                self.stage = 0;
                self.attend_backward(arrived, 0, own, std::mem::take(&mut second_half));
            }
            if !self.problem.relay && s >= 3 {
                self.reduce(this, s - 2);
            }
        }
        if n > 0 {
            self.reduce(next, n);
        }
        self.stage = 0;
        self.finish_gradients();
    }

    /// `X[s]`: keys of stage s, and the gradients of stage s−2 on their way home. `ready`: own keys are where they are sent from.
    fn push_keys_and_gradients(&mut self, s: u32, ready: &[Option<Event>]) -> Option<Event> {
        let n = self.survey.count();
        let (mut sends, mut recvs) =
            if s <= n { self.key_messages(s) } else { (Vec::new(), Vec::new()) };
        if s >= 3 {
            self.gradient_messages(s - 2, &mut sends, &mut recvs);
        }
        let computed = if s > 2 { vec![self.computed()] } else { ready.to_vec() };
        self.stage = s;
        let event = self.exchange(&computed, sends, recvs);
        self.note_sending(s, event);
        event
    }

    /// Converts the gradients of stage s to wire type and addresses them: to the owners, or to the next team of a relay.
    fn gradient_messages(&mut self, s: u32, sends: &mut Vec<Message>, recvs: &mut Vec<Message>) {
        let stage = self.survey.stage(s);
        let (arriving, leaving) = (&stage.arriving, &stage.leaving);
        let b = self.problem.teams();
        self.stage = s;
        for &tensor in self.homebound() {
            let wire = self.wired(tensor, s);
            if self.problem.relay {
                // What comes in belongs to the owner that the left neighbour just worked for.
                let rows = self.survey.left_rows[s as usize - 1];
                let landing = self.slot_rows(Kind::Return, tensor, s % 2, rows);
                sends.push(Message {
                    peer: self.peer_in((self.survey.team + 1) % b),
                    slot: wire,
                    rows: vec![Rows::range(0, arriving.rows)],
                });
                recvs.push(Message {
                    peer: self.peer_in((self.survey.team + b - 1) % b),
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
                    rows: vec![Rows::range(t.base, t.rows)],
                });
            }
            for t in &leaving.transfers {
                recvs.push(Message {
                    peer: self.peer_in(t.team),
                    slot: landing,
                    rows: vec![Rows::range(t.base, t.rows)],
                });
            }
        }
    }

    /// The fp32 gradients of stage s. One slot is enough when they are converted before the next stage is computed.
    fn part(&mut self, tensor: Tensor, s: u32) -> Slot {
        let index = if converts(self.problem) { 0 } else { s % 2 };
        self.slot_rows(Kind::Part, tensor, index, self.survey.stage(s).arriving.rows)
    }

    /// The gradients of stage s as they travel.
    fn wired(&mut self, tensor: Tensor, s: u32) -> Slot {
        let part = self.part(tensor, s);
        if !converts(self.problem) {
            return part;
        }
        let rows = self.survey.stage(s).arriving.rows;
        let wire = self.slot_rows(Kind::Wire, tensor, s % 2, rows);
        self.copy(&[], part, wire, vec![straight(rows)], false);
        wire
    }

    /// Attends stage s into fresh gradients.
    fn stage_gradients(&mut self, arrived: Option<Event>, s: u32) {
        let stage = self.survey.stage(s);
        self.stage = s;
        for &tensor in self.homebound() {
            // The exchange also took the gradients of stage s−2 away, from the same buffer if they travel as fp32.
            let part = self.part(tensor, s);
            self.clear(&[arrived], part, stage.arriving.rows);
        }
        if !stage.work.is_empty() {
            let keys = match self.problem.latent {
                Some(_) => None,
                None => Some((self.stage_keys(s, arrived), self.part(Tensor::DK, s))),
            };
            self.attend_backward(arrived, s, keys, stage.work.clone());
        }
    }

    /// Adds what slices of stage s give, 0 being the own keys, to the gradients `keys.1`; without `keys` they are expanded from latents.
    fn attend_backward(
        &mut self,
        arrived: Option<Event>,
        s: u32,
        keys: Option<(Slot, Slot)>,
        slices: Vec<Slice>,
    ) {
        let [q, d_out, lse, delta] =
            [Tensor::Q, Tensor::DOut, Tensor::Lse, Tensor::Delta].map(|t| self.input(t));
        if slices.is_empty() {
            return;
        }
        let (k, dk) = match keys {
            Some(keys) => keys,
            None => self.expand_with_gradients(arrived, s),
        };
        self.compute(&[arrived], Op::AttendBackward { q, d_out, lse, delta, k, dk, slices });
        if keys.is_none() {
            let d_latent = match s {
                0 => Slot::of(Kind::Acc, Tensor::DLatent),
                _ => self.part(Tensor::DLatent, s),
            };
            self.contract(s, dk, d_latent);
        }
    }

    /// Relay: adds the travelling gradients to those of stage s, which are for the same owner.
    fn fold(&mut self, arrived: Option<Event>, s: u32) {
        self.stage = s;
        for &tensor in self.homebound() {
            let rows = self.survey.stage(s).arriving.rows;
            let part = self.part(tensor, s);
            let landed = self.slot_rows(Kind::Return, tensor, (s - 1) % 2, rows);
            self.copy(&[arrived], landed, part, vec![straight(rows)], true);
        }
    }

    /// Adds gradients of this team's keys that came home from stage s.
    fn reduce(&mut self, arrived: Option<Event>, s: u32) {
        let whole;
        let owned = match self.problem.relay {
            true => {
                whole = self.whole();
                &whole
            }
            false => &self.survey.stage(s).leaving,
        };
        self.stage = s;
        for &tensor in self.homebound() {
            let acc = Slot::of(Kind::Acc, tensor);
            let landed = self.slot_rows(Kind::Return, tensor, s % 2, owned.rows);
            for t in &owned.transfers {
                let mut src = t.base;
                let mut runs = Vec::new();
                for r in needs::rows(&self.survey.mine.k.segments, &t.keys) {
                    runs.push(Run { src, src_step: 1, dst: r.first, dst_step: 1, rows: r.count });
                    src += r.count;
                }
                self.copy(&[arrived], landed, acc, runs, true);
            }
        }
    }

    /// All of this team's keys: what a relay brings home.
    fn whole(&self) -> Traffic {
        let mut home = Traffic::default();
        let team = self.survey.team;
        home.push(team, team, needs::everything(&self.survey.mine.k.segments));
        home
    }

    /// The one rounding at the end.
    fn finish_gradients(&mut self) {
        for tensor in [&[Tensor::DQ], self.homebound()].concat() {
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
        if self.problem.score.bias.is_some_and(|b| b.gradient) {
            let acc = Slot::of(Kind::Acc, Tensor::DBias);
            if self.problem.inner > 1 {
                let rows = self.info(acc).rows;
                let team = self.slot(Kind::Team, Tensor::DBias, 0);
                self.copy(&[], acc, team, vec![straight(rows)], false);
            } else {
                self.finish_bias(acc);
            }
        }
    }

    /// Where forward writes a result: the caller's tensor, or the team's.
    fn output(&mut self, tensor: Tensor) -> Slot {
        let kind = if self.problem.inner > 1 { Kind::Team } else { Kind::Caller };
        self.slot(kind, tensor, 0)
    }
}

/// Do partial gradients travel in another type than they are computed in?
pub(super) fn converts(problem: &Problem) -> bool {
    problem.wire == Wire::Storage && problem.dtype != DType::F32
}

fn straight(rows: u32) -> Run {
    Run { src: 0, src_step: 1, dst: 0, dst_step: 1, rows }
}
