//! All ranks' plans run over 64-bit integers instead of numbers.
//!
//! Every element of an input carries its identity: which tensor, head, token. Attending a (head, query, key) triple adds a
//! pseudo-random weight that belongs to the triple. In the end every output must be the sum of exactly the allowed triples' weights:
//! then each pair was computed once, with the right head, row and mask, and every copy, exchange, return and sum went where it
//! should (a wrong plan passes with probability 2⁻⁶⁴). Rows that nobody wrote are poison, and so are rows that are being received.

use super::memory::{self, Memory, POISON, factor, first_token, initial, side_of, weight};
use crate::holding::holding;
use crate::partition::Side;
use crate::plan::{Message, Op, Pass, Plan, Slot, SlotInfo, Tensor};
use crate::problem::Problem;
use crate::score::Reach;
use std::collections::{HashMap, VecDeque};

/// Runs all ranks and compares every result with the definition of the mask.
pub(super) fn check(plans: &[Plan]) -> Result<(), String> {
    let memory = |plan: &Plan| match &plan.trade {
        Some(trade) => super::trade::initial(trade, plan),
        None => initial(plan),
    };
    let mut flow =
        Flow { plans, memory: plans.iter().map(memory).collect(), posted: HashMap::new() };
    flow.run()?;
    if let Some(trade) = &plans[0].trade {
        return super::trade::results(trade, plans, &flow.memory);
    }
    let sums = Sums::new(&plans[0].problem);
    (0..plans.len()).try_for_each(|rank| flow.results(rank, &sums))
}

/// The mask in words, for query `i` and key `j` of sequence `index`; on purpose not the planner's [`crate::mask::Band`].
pub(super) fn may_see(p: &Problem, index: usize, i: u32, j: u32) -> bool {
    let seq = &p.seqs[index];
    let mut diagonal = i64::from(i);
    if p.mask.bottom_right {
        diagonal += i64::from(seq.k.len) - i64::from(seq.q.len);
    }
    let after = i64::from(j) - diagonal;
    !(p.mask.causal && after > 0)
        && p.mask.left.is_none_or(|left| after >= -i64::from(left))
        && p.mask.right.is_none_or(|right| after <= i64::from(right))
        && in_a_region(p, index, i, j)
}

/// The caller's regions in words.
fn in_a_region(p: &Problem, seq: usize, i: u32, j: u32) -> bool {
    let after = i64::from(j) - i64::from(i);
    p.regions.is_empty()
        || p.regions.list().iter().any(|r| {
            r.seq as usize == seq
                && (r.q.0..r.q.1).contains(&i)
                && (r.k.0..r.k.1).contains(&j)
                && r.lo.is_none_or(|lo| after >= i64::from(lo))
                && r.hi.is_none_or(|hi| after <= i64::from(hi))
        })
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
                if !may_see(p, index, i, j) {
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

impl Sums {
    /// Of latents, which every head's keys and values are made of.
    fn latents(&self, p: &Problem) -> Vec<u64> {
        let both = factor(Tensor::DK).wrapping_add(factor(Tensor::DV));
        let of = |heads: &[u64]| {
            heads.iter().fold(0u64, |sum, x| sum.wrapping_add(x.wrapping_mul(both)))
        };
        self.key.chunks_exact(p.kv_heads as usize).map(of).collect()
    }
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
                            memory::compute(&self.plans[rank], &mut self.memory[rank], step)
                                .map_err(|e| {
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
            self.memory[rank].of_mut(m.slot).set(&m.rows, POISON);
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
        let shape = |m: &Message, info: &SlotInfo| (m.count(), info.heads, info.dim, info.dtype);
        let tensor = (from.slot.tensor, to.slot.tensor);
        if tensor.0 != tensor.1 || shape(s.message, from) != shape(r.message, to) {
            return Err(format!(
                "mismatch: rank {} sends {} as {from:?}, rank {} receives {} as {to:?}",
                s.rank, s.message, r.rank, r.message
            ));
        }
        if self.plans[s.rank].options.same_pieces {
            let pieces = |m: &Message| -> Vec<(bool, u32)> {
                m.rows.iter().map(|r| (r.step == 1 || r.count == 1, r.count)).collect()
            };
            let (sent, received) = (pieces(s.message), pieces(r.message));
            if sent != received || sent.iter().any(|(consecutive, _)| !consecutive) {
                return Err(format!(
                    "pieces: rank {} sends {}, rank {} receives {}",
                    s.rank, s.message, r.rank, r.message
                ));
            }
        }
        let values = self.memory[s.rank].of(s.message.slot).rows(&s.message.rows);
        if values.contains(&POISON) {
            return Err(format!("rank {} sends rows that nobody wrote: {}", s.rank, s.message));
        }
        self.memory[r.rank].of_mut(r.message.slot).put_rows(&r.message.rows, &values);
        Ok(())
    }

    /// Numbers per head: those of this rank's rows and heads, or of everyone's.
    fn numbers(&self, rank: usize, sums: &Sums) -> Result<(), String> {
        let plan = &self.plans[rank];
        let p = &*plan.problem;
        let (tensor, reach) = match plan.pass {
            Pass::Forward => (Tensor::MaxLogit, p.score.max_logit),
            _ => (Tensor::DSinks, p.score.sinks),
        };
        let Some(reach) = reach else { return Ok(()) };
        let Some(buffer) = self.memory[rank].find(Slot::caller(tensor)) else {
            return Err(format!("rank {rank}: nobody wrote {tensor:?}"));
        };
        // Whose rows count: a rank's own, or its team's in forward, where they are computed with its share of heads.
        let (team, own) = (rank as u32 / p.inner, rank as u32);
        let counts = |holder: u32| match (reach, plan.pass) {
            (Reach::Group, _) => true,
            (Reach::Rank, Pass::Forward) => holder / p.inner == team,
            (Reach::Rank, _) => holder == own,
        };
        for head in 0..p.heads {
            let mine = reach == Reach::Group
                || plan.pass == Pass::Backward
                || plan.share.q.contains(&head);
            let mut want = 0u64;
            for holder in (0..p.ranks).filter(|r| mine && counts(*r)) {
                for s in holding(p, holder, Side::Query).segments {
                    let first = first_token(p, s.seq as usize, Side::Query) + s.start;
                    for token in (0..s.len).map(|i| first + i * s.step) {
                        want = want.wrapping_add(match plan.pass {
                            Pass::Forward => sums.query[(token * p.heads + head) as usize],
                            _ => weight(head, token, 0),
                        });
                    }
                }
            }
            if buffer.read(0, head).map_err(|e| format!("rank {rank}: {e}"))? != want {
                return Err(format!(
                    "rank {rank}: {tensor:?} of head {head} is not the sum of what its rows add"
                ));
            }
        }
        Ok(())
    }

    /// The gradient of the bias: of every row that batch entries do not share, and head that heads do not.
    fn bias(&self, rank: usize, sums: &Sums) -> Result<(), String> {
        let plan = &self.plans[rank];
        let p = &*plan.problem;
        let Some(bias) = p.score.bias.filter(|b| b.gradient && plan.pass == Pass::Backward) else {
            return Ok(());
        };
        let held = holding(p, rank as u32, Side::Query);
        let copies = if bias.batch || p.packed { 1 } else { p.seqs.len() as u32 };
        let (rows, heads) = (held.rows / copies, if bias.heads { p.heads } else { 1 });
        let mut want = vec![0u64; (rows * heads) as usize];
        for s in &held.segments {
            let first = first_token(p, s.seq as usize, Side::Query) + s.start;
            for (i, head) in (0..s.len).flat_map(|i| (0..p.heads).map(move |h| (i, h))) {
                let sum = sums.query[((first + i * s.step) * p.heads + head) as usize];
                let at = (s.offset + i) % rows * heads + if bias.heads { head } else { 0 };
                let want = &mut want[at as usize];
                *want = want.wrapping_add(sum.wrapping_mul(factor(Tensor::DBias)));
            }
        }
        let Some(buffer) = self.memory[rank].find(Slot::caller(Tensor::DBias)) else {
            return if want.is_empty() {
                Ok(())
            } else {
                Err(format!("rank {rank}: nobody wrote DBias"))
            };
        };
        for (at, want) in want.into_iter().enumerate() {
            let (row, head) = (at as u32 / heads, at as u32 % heads);
            if buffer.read(row, head).map_err(|e| format!("rank {rank}: {e}"))? != want {
                return Err(format!(
                    "rank {rank}: DBias row {row} head {head} is not the sum of the allowed pairs, each once"
                ));
            }
        }
        Ok(())
    }

    /// The gradients of up-projections: what this team's queries add through this rank's heads.
    fn weights(&self, rank: usize) -> Result<(), String> {
        let plan = &self.plans[rank];
        let p = &*plan.problem;
        if p.latent.is_none() || plan.pass != Pass::Backward {
            return Ok(());
        }
        let mut want = vec![0u64; p.heads as usize];
        for (index, seq) in p.seqs.iter().enumerate() {
            let (q_base, k_base) =
                (first_token(p, index, Side::Query), first_token(p, index, Side::Key));
            let team = rank as u32 / p.inner;
            let held = (team * p.inner..(team + 1) * p.inner)
                .flat_map(|r| holding(p, r, Side::Query).segments)
                .filter(|s| s.seq as usize == index);
            for i in held.flat_map(|s| (0..s.len).map(move |i| s.start + i * s.step)) {
                for j in (0..seq.k.len).filter(|j| may_see(p, index, i, *j)) {
                    for head in plan.share.kv.clone() {
                        let of_key = weight(head, 0, k_base + j);
                        let pair = weight(head, q_base + i, k_base + j).wrapping_mul(of_key);
                        let want = &mut want[head as usize];
                        *want = want.wrapping_add(pair);
                    }
                }
            }
        }
        for (tensor, of) in [(Tensor::DUpK, Tensor::DK), (Tensor::DUpV, Tensor::DV)] {
            let Some(buffer) = self.memory[rank].find(Slot::caller(tensor)) else {
                return Err(format!("rank {rank}: nobody wrote {tensor:?}"));
            };
            let rows = Plan::weight_rows(p, tensor);
            for (row, head) in (0..rows).flat_map(|row| (0..p.heads).map(move |h| (row, h))) {
                let want = want[head as usize].wrapping_mul(factor(of));
                if buffer.read(row, head).map_err(|e| format!("rank {rank}: {e}"))? != want {
                    return Err(format!(
                        "rank {rank}: {tensor:?} of head {head} is not the sum of what its team's queries add"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Every result of a rank: all rows, padding too.
    fn results(&self, rank: usize, sums: &Sums) -> Result<(), String> {
        let plan = &self.plans[rank];
        let p = &*plan.problem;
        self.numbers(rank, sums)?;
        self.bias(rank, sums)?;
        self.weights(rank)?;
        let outputs: &[Tensor] = match plan.pass {
            Pass::Forward => &[Tensor::Out, Tensor::Lse],
            Pass::Backward if p.latent.is_some() => &[Tensor::DQ, Tensor::DLatent],
            Pass::Backward => &[Tensor::DQ, Tensor::DK, Tensor::DV],
            Pass::ToHeads | Pass::ToSequence => &[],
        };
        for &tensor in outputs {
            let (side, slot) = (side_of(tensor), Slot::caller(tensor));
            let held = holding(p, rank as u32, side);
            let latents;
            let (heads, sums) = match side {
                Side::Query => (p.heads, &sums.query),
                Side::Key if tensor == Tensor::DLatent => {
                    latents = sums.latents(p);
                    (1, &latents)
                }
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
            let Some(buffer) = self.memory[rank].find(slot) else {
                match want.is_empty() {
                    true => continue,
                    false => return Err(format!("rank {rank}: nobody wrote {tensor:?}")),
                }
            };
            for (at, want) in want.into_iter().enumerate() {
                let (row, head) = (at as u32 / heads, at as u32 % heads);
                let got = buffer.read(row, head).map_err(|e| format!("rank {rank}: {e}"))?;
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
