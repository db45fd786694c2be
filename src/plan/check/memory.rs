//! One rank's buffers, holding identities, and what compute steps do to them.

use crate::dtype::DType;
use crate::holding::holding;
use crate::mask::Slice;
use crate::partition::{Segment, Side};
use crate::plan::{Kind, Op, Pass, Plan, Rows, Slot, Step, Team, Tensor};
use crate::problem::Problem;

/// What a row holds that nobody wrote.
pub(super) const POISON: u64 = 0x7fff_dead_dead_dead;

/// Padding has this token.
const PAD: u32 = u32::MAX;

/// Identity of an element of an input; its low half is the token.
fn identity(tensor: Tensor, head: u32, token: u32) -> u64 {
    (tensor as u64) << 56 | u64::from(head) << 32 | u64::from(token)
}

/// Marks the identity of an element that was rounded to the format it travels in.
const ROUNDED: u64 = 1 << 55;

/// Weight of a triple (splitmix64's finaliser).
pub(super) fn weight(head: u32, query: u32, key: u32) -> u64 {
    // Counted from 1: the first query and key of head 0 must not weigh 0.
    let mut z = ((u64::from(head) << 32 | u64::from(query)) + 1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ u64::from(key).wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a sum of weights is multiplied by, so that results of different tensors differ.
pub(super) fn factor(tensor: Tensor) -> u64 {
    2 * tensor as u64 + 1
}

/// Global token index of the first true token of a sequence.
pub(super) fn first_token(p: &Problem, seq: usize, side: Side) -> u32 {
    p.seqs[..seq].iter().map(|s| s.extent(side).padded).sum::<u32>()
        + p.seqs[seq].extent(side).before
}

pub(super) fn side_of(tensor: Tensor) -> Side {
    if tensor.key_side() { Side::Key } else { Side::Query }
}

/// One slot's elements, `[row][head]`.
pub(super) struct Buffer {
    slot: Slot,
    heads: u32,
    data: Vec<u64>,
}

impl Buffer {
    pub fn new(slot: Slot, rows: u32, heads: u32, value: u64) -> Buffer {
        Buffer { slot, heads, data: vec![value; (rows * heads) as usize] }
    }

    /// All heads of some rows, in order.
    pub fn rows(&self, rows: &[Rows]) -> Vec<u64> {
        elements(rows, self.heads).map(|(row, head)| self.at(row, head)).collect()
    }

    /// Overwrites all heads of some rows, in order.
    pub fn put_rows(&mut self, rows: &[Rows], values: &[u64]) {
        for ((row, head), value) in elements(rows, self.heads).zip(values) {
            self.put(row, head, *value);
        }
    }

    /// Overwrites all heads of some rows with one value.
    pub fn set(&mut self, rows: &[Rows], value: u64) {
        elements(rows, self.heads).for_each(|(row, head)| self.put(row, head, value));
    }

    fn at(&self, row: u32, head: u32) -> u64 {
        self.data[row as usize * self.heads as usize + head as usize]
    }

    pub fn read(&self, row: u32, head: u32) -> Result<u64, String> {
        match self.at(row, head) {
            POISON => {
                Err(format!("reads {:?} row {row} head {head}, which nobody wrote", self.slot))
            }
            value => Ok(value),
        }
    }

    fn add(&mut self, row: u32, head: u32, value: u64) -> Result<(), String> {
        let sum = self.read(row, head)?.wrapping_add(value);
        self.put(row, head, sum);
        Ok(())
    }

    pub fn put(&mut self, row: u32, head: u32, value: u64) {
        self.data[row as usize * self.heads as usize + head as usize] = value;
    }
}

/// A rank's buffers, in the order of its plan's slots, which are sorted.
pub(super) struct Memory(pub Vec<Buffer>);

impl Memory {
    pub fn find(&self, slot: Slot) -> Option<&Buffer> {
        Some(&self.0[self.0.binary_search_by_key(&slot, |b| b.slot).ok()?])
    }

    fn index(&self, slot: Slot) -> usize {
        self.0.binary_search_by_key(&slot, |b| b.slot).expect("form check found it")
    }

    pub fn of(&self, slot: Slot) -> &Buffer {
        &self.0[self.index(slot)]
    }

    pub fn of_mut(&mut self, slot: Slot) -> &mut Buffer {
        let index = self.index(slot);
        &mut self.0[index]
    }
}

/// Of a plan of attention: inputs carry identities, everything else is poison.
pub(super) fn initial(plan: &Plan) -> Memory {
    let p = &*plan.problem;
    let inputs: &[Tensor] = match plan.pass {
        Pass::Forward => &[Tensor::Q, Tensor::K, Tensor::V, Tensor::Latent],
        Pass::Backward => {
            use Tensor::*;
            &[Q, K, V, Latent, Out, Lse, DOut]
        }
        Pass::ToHeads | Pass::ToSequence => unreachable!("trades have their own"),
    };
    let numbers = Slot::caller(Tensor::Sinks);
    let bias = Slot::caller(Tensor::Bias);
    let team = Team::new(p, plan.rank / p.inner, plan.options.pack);
    let mut out = Vec::new();
    for info in &plan.slots {
        let tensor = info.slot.tensor;
        let mut buffer = Buffer::new(info.slot, info.rows, info.heads, POISON);
        let side = side_of(tensor);
        if info.slot == numbers {
            buffer.set(&[Rows::range(0, 1)], identity(tensor, 0, 0));
        }
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
        if info.slot.kind == Kind::Caller && (inputs.contains(&tensor) || info.slot == bias) {
            fill(&holding(p, plan.rank, side).segments, 0);
            for (at, value) in buffer.data.iter_mut().enumerate().filter(|(_, v)| **v == POISON) {
                *value = identity(tensor, at as u32 % info.heads, PAD);
            }
        } else if info.saved && plan.pass == Pass::Backward {
            // What forward left: the team's rows, this rank's heads.
            let segments = if tensor.key_side() { &team.k.segments } else { &team.q.segments };
            let first = plan.share.side(tensor.key_side()).start;
            fill(segments, if tensor == Tensor::Latent { 0 } else { first });
            if matches!(info.dtype, DType::Fp8(_)) {
                buffer.data.iter_mut().filter(|v| **v != POISON).for_each(|v| *v |= ROUNDED);
            }
        }
        out.push(buffer);
    }
    Memory(out)
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
pub(super) fn elements(rows: &[Rows], heads: u32) -> impl Iterator<Item = (u32, u32)> {
    rows.iter().flat_map(|r| r.iter()).flat_map(move |row| (0..heads).map(move |h| (row, h)))
}

/// Runs one compute step of a rank.
pub(super) fn compute(plan: &Plan, memory: &mut Memory, step: &Step) -> Result<(), String> {
    match &step.op {
        Op::Exchange { .. } => unreachable!("exchanges are posted"),
        // Empty is 0 for sums and for −∞ alike.
        Op::Fill { slot, rows, .. } => {
            memory.of_mut(*slot).set(rows, 0);
            Ok(())
        }
        Op::Copy { src, src_head, dst, dst_head, heads, runs, add } => {
            let rounded = matches!(plan.info(*dst).dtype, DType::Fp8(_));
            let (src, dst) = (memory.index(*src), memory.index(*dst));
            for (r, i) in runs.iter().flat_map(|r| (0..r.rows).map(move |i| (r, i))) {
                for head in 0..*heads {
                    let value = memory.0[src].read(r.src + i * r.src_step, src_head + head)?;
                    let value = if rounded { value | ROUNDED } else { value };
                    let (row, head) = (r.dst + i * r.dst_step, dst_head + head);
                    match add {
                        true => memory.0[dst].add(row, head, value)?,
                        false => memory.0[dst].put(row, head, value),
                    }
                }
            }
            Ok(())
        }
        Op::Delta => {
            let inputs = [Tensor::Out, Tensor::DOut].map(|t| (Slot::caller(t), t));
            let delta = memory.index(Slot::of(Kind::Sum, Tensor::Delta));
            let info = plan.info(memory.0[delta].slot);
            for (row, head) in elements(&[Rows::range(0, info.rows)], info.heads) {
                let token = memory.token(&inputs, row, head, head, 0)?;
                memory.0[delta].put(row, head, identity(Tensor::Delta, head, token));
            }
            Ok(())
        }
        Op::Expand { latent, k, rows } => {
            for row in rows.iter().cloned().flatten() {
                let token = memory.latent(*latent, row)?;
                for (head, global) in plan.share.kv.clone().enumerate() {
                    for slot in [*k, Slot { tensor: Tensor::V, ..*k }] {
                        let made = identity(slot.tensor, global, token);
                        memory.of_mut(slot).put(row, head as u32, made);
                    }
                }
            }
            Ok(())
        }
        // Sums of weights stand for gradients; those of a head's up-projection are told apart by the token that they come from.
        Op::Contract { dk, latent, d_latent, rows } => {
            for row in rows.iter().cloned().flatten() {
                let token = memory.latent(*latent, row)?;
                for (head, global) in plan.share.kv.clone().enumerate() {
                    for (tensor, up) in [(Tensor::DK, Tensor::DUpK), (Tensor::DV, Tensor::DUpV)] {
                        let sum = memory.of(Slot { tensor, ..*dk }).read(row, head as u32)?;
                        let part = sum.wrapping_mul(factor(Tensor::DLatent));
                        memory.of_mut(*d_latent).add(row, 0, part)?;
                        let part = sum.wrapping_mul(weight(global, 0, token));
                        let up = Slot::caller(up);
                        for row in 0..plan.info(up).rows {
                            memory.of_mut(up).add(row, global, part)?;
                        }
                    }
                }
            }
            Ok(())
        }
        // A row's term has the weight of its (token, head); rows of padding add nothing.
        Op::SinkTerms => {
            let inputs = [
                (Slot::of(Kind::Sum, Tensor::Delta), Tensor::Delta),
                (Slot::caller(Tensor::Lse), Tensor::Lse),
            ];
            let terms = Slot::of(Kind::Sum, Tensor::SinkTerms);
            let info = plan.info(terms);
            for (row, head) in elements(&[Rows::range(0, info.rows)], info.heads) {
                memory.of(Slot::caller(Tensor::Sinks)).read(0, head)?;
                let term = match memory.token(&inputs, row, head, head, 0)? {
                    PAD => 0,
                    token => weight(head, token, 0),
                };
                memory.of_mut(terms).put(row, head, term);
            }
            Ok(())
        }
        // Sums stand for largest numbers too.
        Op::Reduce { src, dst, dst_row, dst_head, .. } => {
            let info = plan.info(*src);
            for head in 0..info.heads {
                let mut sum = 0u64;
                for row in 0..info.rows {
                    sum = sum.wrapping_add(memory.of(*src).read(row, head)?);
                }
                memory.of_mut(*dst).put(*dst_row, dst_head + head, sum);
            }
            Ok(())
        }
        Op::Attend { q, k, slices, first, last } => {
            let info = plan.info(*q);
            let all = [Rows::range(0, info.rows)];
            let acc = Slot::of(Kind::Acc, Tensor::Out);
            let mut state = Buffer::new(*q, info.rows, info.heads, 0);
            if !first {
                for (row, head) in elements(&all, info.heads) {
                    state.put(row, head, memory.of(acc).read(row, head)?);
                }
            }
            for s in slices {
                memory.triples(plan, s, &[(*q, Tensor::Q)], *k, |_, t| {
                    state.add(t.q_row, t.head, t.weight)
                })?;
            }
            origins(plan, memory, step.stage, (*q, Tensor::Q), *k, slices)?;
            for (row, head) in elements(&all, info.heads) {
                let sum = state.at(row, head);
                match last {
                    Some((out, lse)) => {
                        memory.of_mut(*out).put(row, head, sum.wrapping_mul(factor(Tensor::Out)));
                        memory.of_mut(*lse).put(row, head, sum.wrapping_mul(factor(Tensor::Lse)));
                        let top = Slot::of(Kind::Acc, Tensor::Top);
                        if memory.find(top).is_some() {
                            memory.of_mut(top).put(row, head, sum);
                        }
                    }
                    None => memory.of_mut(acc).put(row, head, sum),
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
            let [dq, dk, dv] =
                [Slot::of(Kind::Acc, Tensor::DQ), *dk, Slot { tensor: Tensor::DV, ..*dk }]
                    .map(|slot| memory.index(slot));
            for s in slices {
                memory.triples(plan, s, &queries, *k, |memory, t| {
                    let weight = |tensor| t.weight.wrapping_mul(factor(tensor));
                    memory.0[dq].add(t.q_row, t.head, weight(Tensor::DQ))?;
                    if let Some(slot) = plan.d_bias() {
                        let head = if plan.info(slot).heads == 1 { 0 } else { t.head };
                        memory.of_mut(slot).add(t.q_row, head, weight(Tensor::DBias))?;
                    }
                    memory.0[dk].add(t.k_row, t.kv_head, weight(Tensor::DK))?;
                    memory.0[dv].add(t.k_row, t.kv_head, weight(Tensor::DV))
                })?;
            }
            origins(plan, memory, step.stage, (*q, Tensor::Q), *k, slices)
        }
    }
}

/// If scores depend on tokens, the plan must know which token every row is that a slice touches.
fn origins(
    plan: &Plan,
    memory: &Memory,
    stage: u32,
    q: (Slot, Tensor),
    k: Slot,
    slices: &[Slice],
) -> Result<(), String> {
    let Some(origins) = &plan.origins else {
        return match plan.problem.score.needs_origins() {
            true => Err("scores depend on tokens, which the plan does not know".into()),
            false => Ok(()),
        };
    };
    if plan.share.q.is_empty() {
        return Ok(());
    }
    let told = |segments: &[Segment], rows: u32, side: Side| {
        let mut tokens = vec![PAD; rows as usize];
        for s in segments {
            let first = first_token(&plan.problem, s.seq as usize, side) + s.start;
            (0..s.len).for_each(|i| tokens[(s.offset + i) as usize] = first + i * s.step);
        }
        tokens
    };
    // Rows that see nothing too: those of tokens have a sink, those of padding have none.
    let all_rows = plan.info(q.0).rows;
    let keys = origins.keys.get(stage as usize).ok_or("a stage whose tokens are not known")?;
    let q_told = told(&origins.queries, plan.info(q.0).rows, Side::Query);
    let k_told = told(keys, plan.info(k).rows, Side::Key);
    let q_rows = (0..all_rows).map(|row| (q, row, &q_told));
    let k_rows = slices.iter().flat_map(|s| s.k..s.k + s.k_len);
    let k_rows = k_rows.map(|row| ((k, Tensor::K), row, &k_told));
    for ((slot, _), row, told) in q_rows.chain(k_rows) {
        let token = memory.of(slot).read(row, 0)? as u32;
        if told[row as usize] != token {
            return Err(format!(
                "{slot:?} row {row} is token {token}, the plan says {}",
                told[row as usize]
            ));
        }
    }
    // A bias for every query: that of the right query, and head.
    if let (Some(slot), Some(true)) = (plan.bias(), plan.problem.score.bias.map(|b| b.queries)) {
        let info = plan.info(slot);
        let per_head = plan.problem.score.bias.is_some_and(|b| b.heads);
        let first = if per_head { plan.share.q.start } else { 0 };
        for row in slices.iter().flat_map(|s| s.q..s.q + s.q_len) {
            for head in 0..info.heads {
                let want = identity(Tensor::Bias, first + head, q_told[row as usize]);
                if memory.of(slot).read(row, head)? != want {
                    let (head_is, token) = (first + head, q_told[row as usize]);
                    return Err(format!(
                        "{slot:?} row {row} head {head} is not Bias of head {head_is}, token {token}"
                    ));
                }
            }
        }
    }
    Ok(())
}

impl Memory {
    /// Calls `f` for the triples of a slice, after checking that all named slots hold the same query, or key, of the right head.
    fn triples(
        &mut self,
        plan: &Plan,
        s: &Slice,
        queries: &[(Slot, Tensor)],
        k: Slot,
        mut f: impl FnMut(&mut Memory, Triple) -> Result<(), String>,
    ) -> Result<(), String> {
        let map = plan.head_map();
        let keys = [(k, Tensor::K), (Slot { tensor: Tensor::V, ..k }, Tensor::V)];
        let rounded = if plan.problem.kv_wire.is_some() { ROUNDED } else { 0 };
        for head in 0..plan.share.q.len() as u32 {
            let kv_head = map.kv_of(head as usize) as u32;
            let tokens = (s.k..s.k + s.k_len)
                .map(|row| self.true_token(&keys, row, kv_head, map.kv_first + kv_head, rounded))
                .collect::<Result<Vec<u32>, String>>()?;
            for i in 0..s.q_len {
                let q_row = s.q + i;
                let query = self.true_token(queries, q_row, head, map.q_first + head, 0)?;
                for k_row in s.keys_of(i) {
                    let weight = weight(map.q_first + head, query, tokens[(k_row - s.k) as usize]);
                    f(self, Triple { q_row, k_row, head, kv_head, weight })?;
                }
            }
        }
        Ok(())
    }

    /// The true token whose latent a row is.
    fn latent(&self, slot: Slot, row: u32) -> Result<u32, String> {
        self.true_token(&[(slot, Tensor::Latent)], row, 0, 0, 0)
    }

    fn true_token(
        &self,
        slots: &[(Slot, Tensor)],
        row: u32,
        head: u32,
        global: u32,
        mark: u64,
    ) -> Result<u32, String> {
        match self.token(slots, row, head, global, mark)? {
            PAD => Err(format!("{:?} row {row} is padding", slots[0].0)),
            token => Ok(token),
        }
    }

    /// The token in a row, after checking that every slot has it there, with this global head and this mark.
    fn token(
        &self,
        slots: &[(Slot, Tensor)],
        row: u32,
        head: u32,
        global: u32,
        mark: u64,
    ) -> Result<u32, String> {
        let token = self.of(slots[0].0).read(row, head)? as u32;
        for (slot, tensor) in slots {
            if self.of(*slot).read(row, head)? != identity(*tensor, global, token) | mark {
                let how = if mark == 0 { "" } else { ", rounded" };
                return Err(format!(
                    "{slot:?} row {row} head {head} is not {tensor:?} of head {global}, token {token}{how}"
                ));
            }
        }
        Ok(token)
    }
}
