//! Proves all ranks' plans together, without tensors.
//!
//! * **Data flow.** The plans run over 64-bit integers instead of numbers: every element of Q, K, V carries its identity, attending a
//!   (head, query, key) triple adds a pseudo-random weight that belongs to it. In the end every output must be the sum of exactly
//!   the allowed triples' weights, so each pair was computed once, with the right head, row and mask, and every copy, exchange,
//!   return and sum went where it should (a wrong plan passes with probability 2⁻⁶⁴). Rows that nobody wrote are poison.
//! * **Progress.** Exchanges complete only under grouped rendezvous on one queue per rank, which is what NCCL does.
//! * **Hazards.** Steps on different lanes that touch the same rows, one of them writing, must be ordered by events.
//! * **Needs.** Unless relayed, the key rows that travel are exactly those that some query of the receiver may see.

use super::{Event, Kind, Lane, Message, Op, Pass, Plan, Rows, Slot, Step, Tensor};
use crate::mask::Slice;
use crate::partition::{Side, holding};
use std::collections::{HashMap, HashSet};

/// Checks the plans of all ranks, in rank order. The error says which rank, which step, and what is wrong.
pub fn check(plans: &[Plan]) -> Result<(), String> {
    for plan in plans {
        hazards(plan)?;
        needs(plan)?;
    }
    let mut run = Run::new(plans);
    run.all()?;
    plans.iter().try_for_each(|plan| run.results(plan))
}

const POISON: u64 = 0x7fff_dead_dead_dead;

/// Identity of an element: which tensor, global head, global token. Padding has token `PAD`.
fn identity(tensor: Tensor, head: u32, token: u32) -> u64 {
    (tensor as u64) << 56 | u64::from(head) << 32 | u64::from(token)
}

const PAD: u32 = u32::MAX;

fn token_of(id: u64) -> u32 {
    id as u32
}

/// The weight that a triple adds to a tensor (splitmix64 finaliser).
fn weight(tensor: Tensor, head: u32, query: u32, key: u32) -> u64 {
    let mut z = identity(tensor, head, query).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ u64::from(key).wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What an output that no triple reaches is: distinguishable from poison and from an unwritten 0.
const EMPTY: u64 = 0;

struct Buffer {
    heads: usize,
    data: Vec<u64>,
}

impl Buffer {
    fn at(&mut self, row: u32, head: u32) -> &mut u64 {
        &mut self.data[row as usize * self.heads + head as usize]
    }
}

struct Run<'a> {
    plans: &'a [Plan],
    memory: Vec<HashMap<Slot, Buffer>>,
    signaled: Vec<HashSet<Event>>,
}

/// A posted send or receive: which rank, step and message.
#[derive(Clone, Copy)]
struct Posted {
    rank: usize,
    step: usize,
    message: usize,
}

impl<'a> Run<'a> {
    fn new(plans: &'a [Plan]) -> Run<'a> {
        let memory = plans.iter().map(initial).collect();
        Run { plans, memory, signaled: vec![HashSet::new(); plans.len()] }
    }

    /// Runs all lanes of all ranks to the end, or says who waits for what.
    fn all(&mut self) -> Result<(), String> {
        let lanes: Vec<[Vec<usize>; 2]> = self.plans.iter().map(lanes).collect();
        let mut at = vec![[0usize; 2]; lanes.len()];
        let mut posted: Vec<bool> = vec![false; lanes.len()];
        let mut open: Vec<usize> = vec![0; lanes.len()];
        let mut sends: HashMap<(usize, usize), Vec<Posted>> = HashMap::new();
        let mut recvs: HashMap<(usize, usize), Vec<Posted>> = HashMap::new();
        loop {
            let mut moved = false;
            for rank in 0..lanes.len() {
                while let Some(&index) = lanes[rank][0].get(at[rank][0]) {
                    let step = &self.plans[rank].steps[index];
                    if !step.waits.iter().all(|e| self.signaled[rank].contains(e)) {
                        break;
                    }
                    self.execute(rank, step)
                        .map_err(|e| format!("rank {rank}, step {index} ({step}): {e}"))?;
                    self.signaled[rank].extend(step.signal);
                    at[rank][0] += 1;
                    moved = true;
                }
                let Some(&index) = lanes[rank][1].get(at[rank][1]) else { continue };
                let step = &self.plans[rank].steps[index];
                let Op::Exchange { sends: out, recvs: into } = &step.op else {
                    return Err(format!("rank {rank}, step {index}: {step} is on the comm lane"));
                };
                if !posted[rank] && step.waits.iter().all(|e| self.signaled[rank].contains(e)) {
                    posted[rank] = true;
                    moved = true;
                    open[rank] = out.len() + into.len();
                    for (message, m) in into.iter().enumerate() {
                        self.poison(rank, m);
                        recvs.entry((m.peer as usize, rank)).or_default().push(Posted {
                            rank,
                            step: index,
                            message,
                        });
                    }
                    for (message, m) in out.iter().enumerate() {
                        sends.entry((rank, m.peer as usize)).or_default().push(Posted {
                            rank,
                            step: index,
                            message,
                        });
                    }
                }
            }
            for (pair, from) in &mut sends {
                let Some(to) = recvs.get_mut(pair) else { continue };
                let count = from.len().min(to.len());
                for (s, r) in from.drain(..count).zip(to.drain(..count)) {
                    self.transfer(s, r)?;
                    open[s.rank] -= 1;
                    open[r.rank] -= 1;
                    moved = true;
                }
            }
            for rank in 0..lanes.len() {
                if posted[rank] && open[rank] == 0 {
                    let step = &self.plans[rank].steps[lanes[rank][1][at[rank][1]]];
                    self.signaled[rank].extend(step.signal);
                    at[rank][1] += 1;
                    posted[rank] = false;
                    moved = true;
                }
            }
            if at.iter().zip(&lanes).all(|(a, l)| a[0] == l[0].len() && a[1] == l[1].len()) {
                return Ok(());
            }
            if !moved {
                return Err(self.stuck(&lanes, &at));
            }
        }
    }

    fn stuck(&self, lanes: &[[Vec<usize>; 2]], at: &[[usize; 2]]) -> String {
        let mut text = String::from("deadlock:");
        for (rank, (l, a)) in lanes.iter().zip(at).enumerate() {
            for lane in 0..2 {
                if let Some(&index) = l[lane].get(a[lane]) {
                    text += &format!(
                        "\n  rank {rank} waits at step {index}: {}",
                        self.plans[rank].steps[index]
                    );
                }
            }
        }
        text
    }

    fn poison(&mut self, rank: usize, m: &Message) {
        let buffer = self.memory[rank].get_mut(&m.slot).expect("slot exists");
        for row in m.rows.iter().flat_map(|r| r.iter()) {
            for head in 0..buffer.heads as u32 {
                *buffer.at(row, head) = POISON;
            }
        }
    }

    /// Moves one matched message.
    fn transfer(&mut self, s: Posted, r: Posted) -> Result<(), String> {
        let Op::Exchange { sends, .. } = &self.plans[s.rank].steps[s.step].op else {
            unreachable!("posted steps are exchanges")
        };
        let Op::Exchange { recvs, .. } = &self.plans[r.rank].steps[r.step].op else {
            unreachable!("posted steps are exchanges")
        };
        let (out, into) = (&sends[s.message], &recvs[r.message]);
        let (from, to) = (self.plans[s.rank].info(out.slot), self.plans[r.rank].info(into.slot));
        let same = out.count() == into.count()
            && from.heads == to.heads
            && from.dim == to.dim
            && from.dtype == to.dtype;
        if !same {
            return Err(format!(
                "rank {} sends {out} as {from:?}, rank {} receives {into} as {to:?}",
                s.rank, r.rank
            ));
        }
        let values: Vec<u64> = {
            let buffer = self.memory[s.rank].get_mut(&out.slot).expect("slot exists");
            let rows = out.rows.iter().flat_map(|r| r.iter());
            rows.flat_map(|row| (0..from.heads).map(move |h| (row, h)))
                .map(|(row, h)| *buffer.at(row, h))
                .collect()
        };
        if values.contains(&POISON) {
            return Err(format!("rank {} sends rows that nobody wrote: {out}", s.rank));
        }
        let buffer = self.memory[r.rank].get_mut(&into.slot).expect("slot exists");
        let rows = into.rows.iter().flat_map(|r| r.iter());
        for ((row, h), value) in
            rows.flat_map(|row| (0..to.heads).map(move |h| (row, h))).zip(values)
        {
            *buffer.at(row, h) = value;
        }
        Ok(())
    }

    fn read(&mut self, rank: usize, slot: Slot, row: u32, head: u32) -> Result<u64, String> {
        let value = *self.memory[rank]
            .get_mut(&slot)
            .ok_or_else(|| format!("no slot {slot:?}"))?
            .at(row, head);
        if value == POISON {
            Err(format!("reads {slot:?} row {row} head {head}, which nobody wrote"))
        } else {
            Ok(value)
        }
    }

    fn write(&mut self, rank: usize, slot: Slot, row: u32, head: u32, value: u64) {
        *self.memory[rank].get_mut(&slot).expect("slot exists").at(row, head) = value;
    }

    fn execute(&mut self, rank: usize, step: &Step) -> Result<(), String> {
        let plan = &self.plans[rank];
        match &step.op {
            Op::Exchange { .. } => Err("an exchange on the compute lane".into()),
            Op::Fill { slot, rows, .. } => {
                for row in rows.iter().flat_map(|r| r.iter()) {
                    for head in 0..plan.info(*slot).heads {
                        self.write(rank, *slot, row, head, EMPTY);
                    }
                }
                Ok(())
            }
            Op::Copy { src, src_head, dst, dst_head, heads, runs, add } => {
                for (r, i) in runs.iter().flat_map(|r| (0..r.rows).map(move |i| (r, i))) {
                    for head in 0..*heads {
                        let value =
                            self.read(rank, *src, r.src + i * r.src_step, src_head + head)?;
                        let (row, to) = (r.dst + i * r.dst_step, dst_head + head);
                        let old = if *add { self.read(rank, *dst, row, to)? } else { 0 };
                        self.write(rank, *dst, row, to, old.wrapping_add(value));
                    }
                }
                Ok(())
            }
            Op::Delta => {
                let slot = Slot::of(Kind::Sum, Tensor::Delta);
                for row in 0..plan.info(slot).rows {
                    for head in 0..plan.problem.heads {
                        let out = self.read(rank, Slot::caller(Tensor::Out), row, head)?;
                        let d_out = self.read(rank, Slot::caller(Tensor::DOut), row, head)?;
                        if token_of(out) != token_of(d_out) {
                            return Err(format!("delta of different rows at {row}"));
                        }
                        self.write(
                            rank,
                            slot,
                            row,
                            head,
                            identity(Tensor::Delta, head, token_of(out)),
                        );
                    }
                }
                Ok(())
            }
            Op::Attend { q, k, slices, first, last } => {
                let acc = Slot::of(Kind::Acc, Tensor::Out);
                let key_slots = [(*k, Tensor::K), (Slot { tensor: Tensor::V, ..*k }, Tensor::V)];
                let rows = plan.info(*q).rows;
                let heads = plan.info(*q).heads;
                let mut state = vec![EMPTY; rows as usize * heads as usize];
                if !first {
                    for (i, value) in state.iter_mut().enumerate() {
                        *value = self.read(rank, acc, i as u32 / heads, i as u32 % heads)?;
                    }
                }
                self.pairs(
                    rank,
                    slices,
                    &[(*q, Tensor::Q)],
                    &key_slots,
                    |_, head, i, _, query, key| {
                        let value = &mut state[i as usize * heads as usize + (head.0) as usize];
                        *value = value.wrapping_add(weight(Tensor::Out, head.1, query, key));
                        Ok(())
                    },
                )?;
                for (i, value) in state.into_iter().enumerate() {
                    let (row, head) = (i as u32 / heads, i as u32 % heads);
                    match last {
                        Some((out, lse)) => {
                            self.write(rank, *out, row, head, value);
                            self.write(rank, *lse, row, head, value);
                        }
                        None => self.write(rank, acc, row, head, value),
                    }
                }
                Ok(())
            }
            Op::AttendBackward { q, d_out, lse, delta, k, dk, slices } => {
                let queries = [
                    (*q, Tensor::Q),
                    (*d_out, Tensor::DOut),
                    (*lse, Tensor::Lse),
                    (*delta, Tensor::Delta),
                ];
                let keys = [(*k, Tensor::K), (Slot { tensor: Tensor::V, ..*k }, Tensor::V)];
                let (dk, dv) = (*dk, Slot { tensor: Tensor::DV, ..*dk });
                self.pairs(rank, slices, &queries, &keys, |run, head, i, j, query, key| {
                    for (slot, row, local) in [
                        (Slot::of(Kind::Acc, Tensor::DQ), i, head.0),
                        (dk, j, head.2),
                        (dv, j, head.2),
                    ] {
                        let old = run.read(rank, slot, row, local)?;
                        run.write(
                            rank,
                            slot,
                            row,
                            local,
                            old.wrapping_add(weight(slot.tensor, head.1, query, key)),
                        );
                    }
                    Ok(())
                })
            }
        }
    }

    /// Calls `f(self, (local head, global head, local key head), query row, key row, query token, key token)` for every triple of the slices,
    /// after checking that all named slots hold the same query, or key, of the right head.
    #[allow(clippy::type_complexity)]
    fn pairs(
        &mut self,
        rank: usize,
        slices: &[Slice],
        queries: &[(Slot, Tensor)],
        keys: &[(Slot, Tensor)],
        mut f: impl FnMut(&mut Self, (u32, u32, u32), u32, u32, u32, u32) -> Result<(), String>,
    ) -> Result<(), String> {
        let plan = &self.plans[rank];
        let map = plan.head_map();
        for s in slices {
            for head in 0..plan.share.q.len() as u32 {
                let kv = map.kv_of(head as usize) as u32;
                let global = map.q_first + head;
                for i in 0..s.q_len {
                    let query = self.same(rank, queries, s.q + i, head, global)?;
                    for j in s.keys_of(i) {
                        let key = self.same(rank, keys, j, kv, map.kv_first + kv)?;
                        f(self, (head, global, kv), s.q + i, j, query, key)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The token in a row, after checking that every slot has it there, with this global head.
    fn same(
        &mut self,
        rank: usize,
        slots: &[(Slot, Tensor)],
        row: u32,
        head: u32,
        global: u32,
    ) -> Result<u32, String> {
        let token = token_of(self.read(rank, slots[0].0, row, head)?);
        for (slot, tensor) in slots {
            let got = self.read(rank, *slot, row, head)?;
            if got != identity(*tensor, global, token) || token == PAD {
                return Err(format!(
                    "{slot:?} row {row} head {head} holds {got:#x}, not {tensor:?} of head {global}, token {token}"
                ));
            }
        }
        Ok(token)
    }

    /// Every result of a rank against the definition of the mask.
    fn results(&mut self, plan: &Plan) -> Result<(), String> {
        let p = &plan.problem;
        let rank = plan.rank as usize;
        let outputs: &[Tensor] = match plan.pass {
            Pass::Forward => &[Tensor::Out, Tensor::Lse],
            Pass::Backward => &[Tensor::DQ, Tensor::DK, Tensor::DV],
        };
        for &tensor in outputs {
            let side = if tensor.key_side() { Side::Key } else { Side::Query };
            let slot = Slot::caller(tensor);
            let heads = plan.info(slot).heads;
            let mut want = vec![EMPTY; plan.info(slot).rows as usize * heads as usize];
            let weighed = if tensor == Tensor::Lse { Tensor::Out } else { tensor };
            for s in &holding(p, plan.rank, side).segments {
                let seq = &p.seqs[s.seq as usize];
                let band = p.mask.band(seq.q.len, seq.k.len);
                let (q_base, k_base) =
                    (base(plan, s.seq, Side::Query), base(plan, s.seq, Side::Key));
                for i in 0..s.len {
                    let position = s.start + i * s.step;
                    let others = if side == Side::Query { 0..seq.k.len } else { 0..seq.q.len };
                    for other in others {
                        let (query, key) =
                            if side == Side::Query { (position, other) } else { (other, position) };
                        if !band.allows(i64::from(query), i64::from(key)) {
                            continue;
                        }
                        for head in 0..p.heads {
                            let row_head =
                                if side == Side::Query { head } else { head / p.group() };
                            let sum = &mut want[((s.offset + i) * heads + row_head) as usize];
                            *sum = sum.wrapping_add(weight(
                                weighed,
                                head,
                                q_base + query,
                                k_base + key,
                            ));
                        }
                    }
                }
            }
            for (i, want) in want.into_iter().enumerate() {
                let (row, head) = (i as u32 / heads, i as u32 % heads);
                let got =
                    self.read(rank, slot, row, head).map_err(|e| format!("rank {rank}: {e}"))?;
                if got != want {
                    return Err(format!(
                        "rank {rank}: {tensor:?} row {row} head {head} is not the sum of the allowed pairs, each once"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Global token index of the first true token of a sequence.
fn base(plan: &Plan, seq: u32, side: Side) -> u32 {
    let seqs = &plan.problem.seqs;
    seqs[..seq as usize].iter().map(|s| s.extent(side).padded).sum::<u32>()
        + seqs[seq as usize].extent(side).before
}

/// Inputs carry identities, everything else is poison.
fn initial(plan: &Plan) -> HashMap<Slot, Buffer> {
    let inputs: &[Tensor] = match plan.pass {
        Pass::Forward => &[Tensor::Q, Tensor::K, Tensor::V],
        Pass::Backward => {
            &[Tensor::Q, Tensor::K, Tensor::V, Tensor::Out, Tensor::Lse, Tensor::DOut]
        }
    };
    let mut out = HashMap::new();
    for info in &plan.slots {
        let tensor = info.slot.tensor;
        let mut buffer = Buffer {
            heads: info.heads as usize,
            data: vec![POISON; (info.rows * info.heads) as usize],
        };
        let given = info.slot.kind == Kind::Caller && inputs.contains(&tensor);
        if given {
            for head in 0..info.heads {
                for row in 0..info.rows {
                    *buffer.at(row, head) = identity(tensor, head, PAD);
                }
            }
            fill_tokens(
                plan,
                tensor,
                &holding_tokens(plan, tensor),
                |row, head, id| *buffer.at(row, head) = id,
                0..info.heads,
            );
        }
        out.insert(info.slot, buffer);
    }
    // What forward saved: the team's rows, this rank's heads.
    if plan.pass == Pass::Backward {
        for info in plan.slots.iter().filter(|s| s.saved) {
            let tensor = info.slot.tensor;
            let heads = plan.share.side(tensor.key_side());
            let buffer = out.get_mut(&info.slot).expect("just made");
            let team =
                super::Team::new(&plan.problem, plan.rank / plan.problem.inner, plan.options.pack);
            let side = if tensor.key_side() { &team.k } else { &team.q };
            let first = heads.start;
            fill_tokens(
                plan,
                tensor,
                &side.segments,
                |row, head, id| *buffer.at(row, head - first) = id,
                heads,
            );
        }
    }
    out
}

fn holding_tokens(plan: &Plan, tensor: Tensor) -> Vec<crate::partition::Segment> {
    holding(&plan.problem, plan.rank, if tensor.key_side() { Side::Key } else { Side::Query })
        .segments
}

fn fill_tokens(
    plan: &Plan,
    tensor: Tensor,
    segments: &[crate::partition::Segment],
    mut put: impl FnMut(u32, u32, u64),
    heads: std::ops::Range<u32>,
) {
    let side = if tensor.key_side() { Side::Key } else { Side::Query };
    for s in segments {
        let base = base(plan, s.seq, side);
        for i in 0..s.len {
            for head in heads.clone() {
                put(s.offset + i, head, identity(tensor, head, base + s.start + i * s.step));
            }
        }
    }
}

/// Indices of the steps of the compute and the comm lane.
fn lanes(plan: &Plan) -> [Vec<usize>; 2] {
    let of = |lane| (0..plan.steps.len()).filter(|i| plan.steps[*i].lane == lane).collect();
    [of(Lane::Compute), of(Lane::Comm)]
}

/// What a step reads or writes.
struct Access {
    slot: Slot,
    rows: Vec<Rows>,
    write: bool,
}

fn accesses(plan: &Plan, step: &Step) -> Vec<Access> {
    let all = |slot: Slot| vec![Rows::range(0, plan.info(slot).rows)];
    let whole = |slot: Slot, write| Access { slot, rows: all(slot), write };
    let acc = |tensor| Slot::of(Kind::Acc, tensor);
    match &step.op {
        Op::Exchange { sends, recvs } => {
            let access = |m: &Message, write| Access { slot: m.slot, rows: m.rows.clone(), write };
            sends
                .iter()
                .map(|m| access(m, false))
                .chain(recvs.iter().map(|m| access(m, true)))
                .collect()
        }
        Op::Attend { q, k, slices, first, last } => {
            let keys = slices.iter().map(|s| Rows::range(s.k, s.k_len)).collect::<Vec<_>>();
            let mut out = vec![whole(*q, false)];
            for tensor in [Tensor::K, Tensor::V] {
                out.push(Access { slot: Slot { tensor, ..*k }, rows: keys.clone(), write: false });
            }
            match last {
                Some((o, lse)) => out.extend([whole(*o, true), whole(*lse, true)]),
                None => out.push(whole(acc(Tensor::Out), true)),
            }
            if !first {
                out.push(whole(acc(Tensor::Out), false));
            }
            out
        }
        Op::AttendBackward { q, d_out, lse, delta, k, dk, slices } => {
            let keys = slices.iter().map(|s| Rows::range(s.k, s.k_len)).collect::<Vec<_>>();
            let mut out: Vec<Access> =
                [*q, *d_out, *lse, *delta].into_iter().map(|slot| whole(slot, false)).collect();
            out.push(whole(acc(Tensor::DQ), true));
            for (slot, write) in [
                (*k, false),
                (Slot { tensor: Tensor::V, ..*k }, false),
                (*dk, true),
                (Slot { tensor: Tensor::DV, ..*dk }, true),
            ] {
                out.push(Access { slot, rows: keys.clone(), write });
            }
            out
        }
        Op::Delta => [Tensor::Out, Tensor::DOut]
            .into_iter()
            .map(|t| whole(Slot::caller(t), false))
            .chain([whole(Slot::of(Kind::Sum, Tensor::Delta), true)])
            .collect(),
        Op::Copy { src, dst, runs, .. } => {
            let from = runs
                .iter()
                .map(|r| Rows { first: r.src, step: r.src_step, count: r.rows })
                .collect();
            let to = runs
                .iter()
                .map(|r| Rows { first: r.dst, step: r.dst_step, count: r.rows })
                .collect();
            vec![
                Access { slot: *src, rows: from, write: false },
                Access { slot: *dst, rows: to, write: true },
            ]
        }
        Op::Fill { slot, rows, .. } => {
            vec![Access { slot: *slot, rows: rows.clone(), write: true }]
        }
    }
}

fn overlap(a: &Access, b: &Access) -> Option<u32> {
    if a.slot != b.slot || !(a.write || b.write) {
        return None;
    }
    let rows: HashSet<u32> = a.rows.iter().flat_map(|r| r.iter()).collect();
    b.rows.iter().flat_map(|r| r.iter()).find(|row| rows.contains(row))
}

/// Steps of different lanes that conflict must be ordered by events; inside one exchange nothing may conflict.
fn hazards(plan: &Plan) -> Result<(), String> {
    // clock[i][lane] = how many steps of that lane are known to be done when step i starts.
    let mut clock: Vec<[usize; 2]> = Vec::new();
    let mut done = [[0usize; 2]; 2];
    let mut signaled: HashMap<Event, [usize; 2]> = HashMap::new();
    let mut place = Vec::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let lane = step.lane as usize;
        let mut now = done[lane];
        for event in &step.waits {
            let known = signaled.get(event).ok_or_else(|| {
                format!("rank {}: step {index} waits for e{event} before it is signaled", plan.rank)
            })?;
            now = [now[0].max(known[0]), now[1].max(known[1])];
        }
        place.push((lane, now[lane]));
        clock.push(now);
        now[lane] += 1;
        done[lane] = now;
        if let Some(event) = step.signal {
            signaled.insert(event, now);
        }
    }
    let accesses: Vec<Vec<Access>> = plan.steps.iter().map(|s| accesses(plan, s)).collect();
    for (i, a) in accesses.iter().enumerate() {
        if plan.steps[i].lane == Lane::Comm {
            for (x, first) in a.iter().enumerate() {
                if let Some(row) = a[x + 1..].iter().find_map(|second| overlap(first, second)) {
                    return Err(format!(
                        "rank {}: step {i} ({}) touches {:?} row {row} twice",
                        plan.rank, plan.steps[i], first.slot
                    ));
                }
            }
        }
        for (j, b) in accesses.iter().enumerate().skip(i + 1) {
            let (lane_i, n_i) = place[i];
            let ordered = lane_i == place[j].0 || clock[j][lane_i] > n_i;
            if ordered {
                continue;
            }
            if let Some((slot, row)) = a
                .iter()
                .flat_map(|x| b.iter().filter_map(move |y| Some((x.slot, overlap(x, y)?))))
                .next()
            {
                return Err(format!(
                    "rank {}: nothing orders step {i} ({}) and step {j} ({}), which both touch {slot:?} row {row}",
                    plan.rank, plan.steps[i], plan.steps[j]
                ));
            }
        }
    }
    Ok(())
}

/// Key rows received between teams against the definition: keys of other teams that some query of this team may see.
fn needs(plan: &Plan) -> Result<(), String> {
    let p = &plan.problem;
    if p.relay || plan.share.q.is_empty() {
        return Ok(());
    }
    let team = plan.rank / p.inner;
    let of_team =
        |t: u32, side| (0..p.inner).flat_map(move |a| holding(p, t * p.inner + a, side).segments);
    let queries: Vec<_> = of_team(team, Side::Query).collect();
    let mut want = 0;
    for other in (0..p.teams()).filter(|t| *t != team) {
        for key in of_team(other, Side::Key) {
            let seq = &p.seqs[key.seq as usize];
            let band = p.mask.band(seq.q.len, seq.k.len);
            let queries: Vec<_> = queries.iter().filter(|q| q.seq == key.seq).collect();
            let seen = |k: u32| {
                queries.iter().any(|q| {
                    (0..q.len).any(|i| band.allows(i64::from(q.start + i * q.step), i64::from(k)))
                })
            };
            want += (0..key.len).filter(|j| seen(key.start + j * key.step)).count() as u64;
        }
    }
    let got = super::account::account(plan).received_key_rows;
    if got == want {
        Ok(())
    } else {
        Err(format!("rank {}: receives {got} key rows, needs {want}", plan.rank))
    }
}
