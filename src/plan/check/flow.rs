//! All ranks' plans run over 64-bit integers instead of numbers.
//!
//! Every element of an input carries its identity: which tensor, head, token. Attending a (head, query, key) triple adds a
//! pseudo-random weight that belongs to the triple. In the end every output must be the sum of exactly the allowed triples' weights:
//! then each pair was computed once, with the right head, row and mask, and every copy, exchange, return and sum went where it
//! should (a wrong plan passes with probability 2⁻⁶⁴). Rows that nobody wrote are poison, and so are rows that are being received.

use crate::mask::Slice;
use crate::partition::{Segment, Side, holding};
use crate::plan::{Kind, Message, Op, Pass, Plan, Rows, Slot, Step, Team, Tensor};
use crate::problem::{Problem, Sequence};
use std::collections::{HashMap, VecDeque};

/// Runs all ranks and compares every result with the definition of the mask.
pub(super) fn check(plans: &[Plan]) -> Result<(), String> {
    let mut flow =
        Flow { plans, memory: plans.iter().map(initial).collect(), posted: HashMap::new() };
    flow.run()?;
    let sums = Sums::new(&plans[0].problem);
    (0..plans.len()).try_for_each(|rank| flow.results(rank, &sums))
}

/// The mask in words, for query `i` and key `j` of a sequence; on purpose not the planner's [`crate::mask::Band`].
pub(super) fn may_see(p: &Problem, seq: &Sequence, i: u32, j: u32) -> bool {
    let mut diagonal = i64::from(i);
    if p.mask.bottom_right {
        diagonal += i64::from(seq.k.len) - i64::from(seq.q.len);
    }
    let after = i64::from(j) - diagonal;
    !(p.mask.causal && after > 0)
        && p.mask.left.is_none_or(|left| after >= -i64::from(left))
        && p.mask.right.is_none_or(|right| after <= i64::from(right))
}

const POISON: u64 = 0x7fff_dead_dead_dead;

/// Padding has this token.
const PAD: u32 = u32::MAX;

/// Identity of an element of an input.
fn identity(tensor: Tensor, head: u32, token: u32) -> u64 {
    (tensor as u64) << 56 | u64::from(head) << 32 | u64::from(token)
}

fn token_of(id: u64) -> u32 {
    id as u32
}

/// Weight of a triple (splitmix64's finaliser).
fn weight(head: u32, query: u32, key: u32) -> u64 {
    let mut z = (u64::from(head) << 32 | u64::from(query)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ u64::from(key).wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a sum of weights is multiplied by, so that results of different tensors differ.
fn factor(tensor: Tensor) -> u64 {
    2 * tensor as u64 + 1
}

/// What every output must be, before its factor: sums of the weights of all allowed triples, `[token][head]`.
struct Sums {
    query: Vec<u64>,
    key: Vec<u64>,
}

impl Sums {
    fn new(p: &Problem) -> Sums {
        let tokens =
            |side: Side| p.seqs.iter().map(|s| s.extent(side).padded as usize).sum::<usize>();
        let mut out = Sums {
            query: vec![0; tokens(Side::Query) * p.heads as usize],
            key: vec![0; tokens(Side::Key) * p.kv_heads as usize],
        };
        for (index, seq) in p.seqs.iter().enumerate() {
            let (q_base, k_base) =
                (first_token(p, index, Side::Query), first_token(p, index, Side::Key));
            for (i, j) in (0..seq.q.len).flat_map(|i| (0..seq.k.len).map(move |j| (i, j))) {
                if !may_see(p, seq, i, j) {
                    continue;
                }
                for head in 0..p.heads {
                    let w = weight(head, q_base + i, k_base + j);
                    let query = &mut out.query[((q_base + i) * p.heads + head) as usize];
                    *query = query.wrapping_add(w);
                    let kv_head = head / (p.heads / p.kv_heads);
                    let key = &mut out.key[((k_base + j) * p.kv_heads + kv_head) as usize];
                    *key = key.wrapping_add(w);
                }
            }
        }
        out
    }
}

/// Global token index of the first true token of a sequence.
fn first_token(p: &Problem, seq: usize, side: Side) -> u32 {
    p.seqs[..seq].iter().map(|s| s.extent(side).padded).sum::<u32>()
        + p.seqs[seq].extent(side).before
}

fn side_of(tensor: Tensor) -> Side {
    if tensor.key_side() { Side::Key } else { Side::Query }
}

/// One slot's elements, `[row][head]`.
struct Buffer {
    heads: u32,
    data: Vec<u64>,
}

impl Buffer {
    fn at(&self, row: u32, head: u32) -> u64 {
        self.data[(row * self.heads + head) as usize]
    }

    fn put(&mut self, row: u32, head: u32, value: u64) {
        self.data[(row * self.heads + head) as usize] = value;
    }
}

type Memory = HashMap<Slot, Buffer>;

/// Inputs carry identities, everything else is poison.
fn initial(plan: &Plan) -> Memory {
    let p = &*plan.problem;
    let inputs: &[Tensor] = match plan.pass {
        Pass::Forward => &[Tensor::Q, Tensor::K, Tensor::V],
        Pass::Backward => {
            &[Tensor::Q, Tensor::K, Tensor::V, Tensor::Out, Tensor::Lse, Tensor::DOut]
        }
    };
    let team = Team::new(p, plan.rank / p.inner, plan.options.pack);
    let mut out = Memory::new();
    for info in &plan.slots {
        let tensor = info.slot.tensor;
        let mut buffer =
            Buffer { heads: info.heads, data: vec![POISON; (info.rows * info.heads) as usize] };
        let side = side_of(tensor);
        let mut fill = |segments: &[Segment], first_head: u32| {
            for s in segments {
                let first = first_token(p, s.seq as usize, side) + s.start;
                for (i, head) in (0..s.len).flat_map(|i| (0..info.heads).map(move |h| (i, h))) {
                    buffer.put(
                        s.offset + i,
                        head,
                        identity(tensor, first_head + head, first + i * s.step),
                    );
                }
            }
        };
        if info.slot.kind == Kind::Caller && inputs.contains(&tensor) {
            fill(&holding(p, plan.rank, side).segments, 0);
            for (at, value) in buffer.data.iter_mut().enumerate().filter(|(_, v)| **v == POISON) {
                *value = identity(tensor, at as u32 % info.heads, PAD);
            }
        } else if info.saved && plan.pass == Pass::Backward {
            // What forward left: the team's rows, this rank's heads.
            let segments = if tensor.key_side() { &team.k.segments } else { &team.q.segments };
            fill(segments, plan.share.side(tensor.key_side()).start);
        }
        out.insert(info.slot, buffer);
    }
    out
}

/// A posted send or receive.
#[derive(Clone, Copy)]
struct Posted<'a> {
    rank: usize,
    message: &'a Message,
}

struct Flow<'a> {
    plans: &'a [Plan],
    memory: Vec<Memory>,
    /// Per (sender, receiver): sends and receives that wait for each other.
    posted: HashMap<(usize, usize), [VecDeque<Posted<'a>>; 2]>,
}

impl<'a> Flow<'a> {
    /// Runs all ranks to the end, or says who waits for what.
    fn run(&mut self) -> Result<(), String> {
        let ranks = self.plans.len();
        let mut at = vec![0; ranks];
        // Messages of the exchange that a rank is in; none when it is in none.
        let mut open: Vec<Option<usize>> = vec![None; ranks];
        loop {
            let mut moved = false;
            for rank in 0..ranks {
                let steps = &self.plans[rank].steps;
                while let Some(step) = steps.get(at[rank]) {
                    match (&step.op, open[rank]) {
                        (Op::Exchange { sends, recvs }, None) => {
                            open[rank] = Some(sends.len() + recvs.len());
                            self.post(rank, sends, recvs, &mut open)?;
                            moved = true;
                        }
                        (Op::Exchange { .. }, Some(0)) => {
                            open[rank] = None;
                            at[rank] += 1;
                            moved = true;
                        }
                        (Op::Exchange { .. }, Some(_)) => break,
                        _ => {
                            self.compute(rank, step).map_err(|e| {
                                format!("rank {rank}, step {} ({step}): {e}", at[rank])
                            })?;
                            at[rank] += 1;
                            moved = true;
                        }
                    }
                }
            }
            if (0..ranks).all(|rank| at[rank] == self.plans[rank].steps.len()) {
                return Ok(());
            }
            if !moved {
                return Err(self.stuck(&at));
            }
        }
    }

    fn stuck(&self, at: &[usize]) -> String {
        let mut text = String::from("deadlock:");
        for (plan, at) in self.plans.iter().zip(at) {
            if let Some(step) = plan.steps.get(*at) {
                text += &format!("\n  rank {} waits at step {at}: {step}", plan.rank);
            }
        }
        text
    }

    /// Posts an exchange and moves every message that has its counterpart, in order between two ranks.
    fn post(
        &mut self,
        rank: usize,
        sends: &'a [Message],
        recvs: &'a [Message],
        open: &mut [Option<usize>],
    ) -> Result<(), String> {
        for m in recvs {
            let buffer = self.memory[rank].get_mut(&m.slot).expect("form check found it");
            for (row, head) in elements(&m.rows, buffer.heads) {
                buffer.put(row, head, POISON);
            }
        }
        let all = sends.iter().map(|m| (m, 0)).chain(recvs.iter().map(|m| (m, 1)));
        for (message, direction) in all {
            let peer = message.peer as usize;
            let pair = if direction == 0 { (rank, peer) } else { (peer, rank) };
            let queues = self.posted.entry(pair).or_default();
            queues[direction].push_back(Posted { rank, message });
            let [out, into] = queues;
            if let (Some(s), Some(r)) = (out.front().copied(), into.front().copied()) {
                out.pop_front();
                into.pop_front();
                self.transfer(s, r)?;
                for rank in [s.rank, r.rank] {
                    open[rank] = open[rank].map(|n| n - 1);
                }
            }
        }
        Ok(())
    }

    /// Moves one matched message.
    fn transfer(&mut self, s: Posted, r: Posted) -> Result<(), String> {
        let (from, to) =
            (self.plans[s.rank].info(s.message.slot), self.plans[r.rank].info(r.message.slot));
        let shape = |m: &Message, info: &crate::plan::SlotInfo| {
            (m.count(), info.heads, info.dim, info.dtype)
        };
        let tensor = (from.slot.tensor, to.slot.tensor);
        if tensor.0 != tensor.1 || shape(s.message, from) != shape(r.message, to) {
            return Err(format!(
                "mismatch: rank {} sends {} as {from:?}, rank {} receives {} as {to:?}",
                s.rank, s.message, r.rank, r.message
            ));
        }
        let source = &self.memory[s.rank][&s.message.slot];
        let values: Vec<u64> =
            elements(&s.message.rows, from.heads).map(|(row, head)| source.at(row, head)).collect();
        if values.contains(&POISON) {
            return Err(format!("rank {} sends rows that nobody wrote: {}", s.rank, s.message));
        }
        let buffer = self.memory[r.rank].get_mut(&r.message.slot).expect("form check found it");
        for ((row, head), value) in elements(&r.message.rows, to.heads).zip(values) {
            buffer.put(row, head, value);
        }
        Ok(())
    }

    fn read(&self, rank: usize, slot: Slot, row: u32, head: u32) -> Result<u64, String> {
        match self.memory[rank][&slot].at(row, head) {
            POISON => Err(format!("reads {slot:?} row {row} head {head}, which nobody wrote")),
            value => Ok(value),
        }
    }

    fn write(&mut self, rank: usize, slot: Slot, row: u32, head: u32, value: u64) {
        self.memory[rank].get_mut(&slot).expect("form check found it").put(row, head, value);
    }

    fn compute(&mut self, rank: usize, step: &Step) -> Result<(), String> {
        let plan = &self.plans[rank];
        match &step.op {
            Op::Exchange { .. } => unreachable!("exchanges are posted"),
            // Empty is 0 for sums and for −∞ alike.
            Op::Fill { slot, rows, .. } => {
                for (row, head) in elements(rows, plan.info(*slot).heads) {
                    self.write(rank, *slot, row, head, 0);
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
                    for head in 0..plan.info(slot).heads {
                        let token = self.token(
                            rank,
                            &[
                                (Slot::caller(Tensor::Out), Tensor::Out),
                                (Slot::caller(Tensor::DOut), Tensor::DOut),
                            ],
                            row,
                            head,
                            head,
                        )?;
                        self.write(rank, slot, row, head, identity(Tensor::Delta, head, token));
                    }
                }
                Ok(())
            }
            Op::Attend { q, k, slices, first, last } => {
                self.attend(rank, *q, *k, slices, *first, *last)
            }
            Op::AttendBackward { q, d_out, lse, delta, k, dk, slices } => {
                let queries = [
                    (*q, Tensor::Q),
                    (*d_out, Tensor::DOut),
                    (*lse, Tensor::Lse),
                    (*delta, Tensor::Delta),
                ];
                let dq = Slot::of(Kind::Acc, Tensor::DQ);
                let dv = Slot { tensor: Tensor::DV, ..*dk };
                for s in slices {
                    for t in self.triples(rank, s, &queries, *k)? {
                        for (slot, row, head) in [
                            (dq, t.q_row, t.head),
                            (*dk, t.k_row, t.kv_head),
                            (dv, t.k_row, t.kv_head),
                        ] {
                            let old = self.read(rank, slot, row, head)?;
                            let new = old.wrapping_add(t.weight.wrapping_mul(factor(slot.tensor)));
                            self.write(rank, slot, row, head, new);
                        }
                    }
                }
                Ok(())
            }
        }
    }

    fn attend(
        &mut self,
        rank: usize,
        q: Slot,
        k: Slot,
        slices: &[Slice],
        first: bool,
        last: Option<(Slot, Slot)>,
    ) -> Result<(), String> {
        let acc = Slot::of(Kind::Acc, Tensor::Out);
        let info = *self.plans[rank].info(q);
        let all = [Rows::range(0, info.rows)];
        let mut state =
            Buffer { heads: info.heads, data: vec![0; (info.rows * info.heads) as usize] };
        if !first {
            for (row, head) in elements(&all, info.heads) {
                state.put(row, head, self.read(rank, acc, row, head)?);
            }
        }
        for s in slices {
            for t in self.triples(rank, s, &[(q, Tensor::Q)], k)? {
                state.put(t.q_row, t.head, state.at(t.q_row, t.head).wrapping_add(t.weight));
            }
        }
        for (row, head) in elements(&all, info.heads) {
            let sum = state.at(row, head);
            match last {
                Some((out, lse)) => {
                    self.write(rank, out, row, head, sum.wrapping_mul(factor(Tensor::Out)));
                    self.write(rank, lse, row, head, sum.wrapping_mul(factor(Tensor::Lse)));
                }
                None => self.write(rank, acc, row, head, sum),
            }
        }
        Ok(())
    }

    /// The triples of a slice, after checking that all named slots hold the same query, or key, of the right head.
    fn triples(
        &self,
        rank: usize,
        s: &Slice,
        queries: &[(Slot, Tensor)],
        k: Slot,
    ) -> Result<Vec<Triple>, String> {
        let plan = &self.plans[rank];
        let map = plan.head_map();
        let keys = [(k, Tensor::K), (Slot { tensor: Tensor::V, ..k }, Tensor::V)];
        let mut out = Vec::new();
        for head in 0..plan.share.q.len() as u32 {
            let kv_head = map.kv_of(head as usize) as u32;
            let key_tokens = (s.k..s.k + s.k_len)
                .map(|row| self.true_token(rank, &keys, row, kv_head, map.kv_first + kv_head))
                .collect::<Result<Vec<u32>, String>>()?;
            for i in 0..s.q_len {
                let q_row = s.q + i;
                let query = self.true_token(rank, queries, q_row, head, map.q_first + head)?;
                out.extend(s.keys_of(i).map(|k_row| {
                    let key = key_tokens[(k_row - s.k) as usize];
                    Triple {
                        q_row,
                        k_row,
                        head,
                        kv_head,
                        weight: weight(map.q_first + head, query, key),
                    }
                }));
            }
        }
        Ok(out)
    }

    fn true_token(
        &self,
        rank: usize,
        slots: &[(Slot, Tensor)],
        row: u32,
        head: u32,
        global: u32,
    ) -> Result<u32, String> {
        match self.token(rank, slots, row, head, global)? {
            PAD => Err(format!("{:?} row {row} is padding", slots[0].0)),
            token => Ok(token),
        }
    }

    /// The token in a row, after checking that every slot has it there, with this global head.
    fn token(
        &self,
        rank: usize,
        slots: &[(Slot, Tensor)],
        row: u32,
        head: u32,
        global: u32,
    ) -> Result<u32, String> {
        let token = token_of(self.read(rank, slots[0].0, row, head)?);
        for (slot, tensor) in slots {
            if self.read(rank, *slot, row, head)? != identity(*tensor, global, token) {
                return Err(format!(
                    "{slot:?} row {row} head {head} is not {tensor:?} of head {global}, token {token}"
                ));
            }
        }
        Ok(token)
    }

    /// Every result of a rank: all rows, padding too.
    fn results(&self, rank: usize, sums: &Sums) -> Result<(), String> {
        let plan = &self.plans[rank];
        let p = &*plan.problem;
        let outputs: &[Tensor] = match plan.pass {
            Pass::Forward => &[Tensor::Out, Tensor::Lse],
            Pass::Backward => &[Tensor::DQ, Tensor::DK, Tensor::DV],
        };
        for &tensor in outputs {
            let (side, slot) = (side_of(tensor), Slot::caller(tensor));
            let held = holding(p, rank as u32, side);
            let (heads, sums) = match side {
                Side::Query => (p.heads, &sums.query),
                Side::Key => (p.kv_heads, &sums.key),
            };
            let mut want = vec![0; (held.rows * heads) as usize];
            for s in &held.segments {
                let first = first_token(p, s.seq as usize, side) + s.start;
                for (i, head) in (0..s.len).flat_map(|i| (0..heads).map(move |h| (i, h))) {
                    want[((s.offset + i) * heads + head) as usize] = sums
                        [((first + i * s.step) * heads + head) as usize]
                        .wrapping_mul(factor(tensor));
                }
            }
            if !self.memory[rank].contains_key(&slot) && !want.is_empty() {
                return Err(format!("rank {rank}: nobody wrote {tensor:?}"));
            }
            for (at, want) in want.into_iter().enumerate() {
                let (row, head) = (at as u32 / heads, at as u32 % heads);
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

/// One (head, query, key), in local rows and heads.
struct Triple {
    q_row: u32,
    k_row: u32,
    head: u32,
    kv_head: u32,
    weight: u64,
}

/// (row, head) of some rows, in order.
fn elements(rows: &[Rows], heads: u32) -> impl Iterator<Item = (u32, u32)> {
    rows.iter().flat_map(|r| r.iter()).flat_map(move |row| (0..heads).map(move |h| (row, h)))
}
