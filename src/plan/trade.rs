//! Sequence ↔ heads as a call of its own: one grouped exchange of several tensors, for layers that need whole sequences (Mamba's convolution
//! and scan), and its transpose.
//!
//! ```text
//!   local: this rank's rows × all heads            whole: all rows × this rank's heads
//!   ┌────┬────┐ rank 0                             ┌────┐┌────┐
//!   │ a0 │ a1 │            ToHeads ──▶             │ a0 ││ a1 │   rows: the padded sequences one after
//!   ├────┼────┤ rank 1     ◀── ToSequence          │ b0 ││ b1 │   another; padding is exactly 0
//!   │ b0 │ b1 │                                    └────┘└────┘
//! ```
//! Heads are dealt as attention deals them: the call's `heads` evenly, and of a tensor with fewer (the groups of B and C) those that serve a rank's
//! share. Such a head may be on several ranks; on the way back their rows are summed in rank order, in fp32, which is the transpose of giving it to
//! all. What arrives lands in place where the caller's whole tensors are dense.

use super::heads::{packed, reverse, scattered, unpack};
use super::team::HeadShare;
use super::{
    Event, Kind, Lane, Message, Op, Options, Pass, Plan, Rows, Slot, SlotInfo, Step, Tensor, Value,
};
use crate::backend::Run;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::holding::holding;
use crate::mask::Mask;
use crate::partition::{Partition, Side};
use crate::problem::{Extent, Fnv, Problem, Sequence, Wire};
use crate::regions::Regions;
use crate::score::Score;
use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

/// Most tensors of one call.
pub const MOST_TENSORS: usize = 16;

/// One tensor of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Traded {
    /// Heads in all; divides the call's.
    pub heads: u32,
    /// Elements per row and head.
    pub dim: u32,
    /// Storage type.
    pub dtype: DType,
}

/// What a call trades: the same on all ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Trade {
    /// Where the tokens are, on the query side, and how many heads are dealt out; the rest of it says nothing here.
    pub problem: Arc<Problem>,
    /// The tensors.
    pub tensors: Vec<Traded>,
}

impl Trade {
    /// A call among `ranks`; the error names what does not fit. `heads` 0: the most that a tensor has.
    pub fn new(
        ranks: u32,
        partition: Partition,
        packed: bool,
        extents: impl Iterator<Item = Extent>,
        heads: u32,
        tensors: Vec<Traded>,
    ) -> Result<Trade> {
        let bad = |text: String| Err(Error::argument(text));
        if tensors.is_empty() || tensors.len() > MOST_TENSORS {
            return bad(format!(
                "count: got {} tensors, allowed 1 … {MOST_TENSORS}",
                tensors.len()
            ));
        }
        let heads = match heads {
            0 => tensors.iter().map(|t| t.heads).max().unwrap_or(0),
            n => n,
        };
        for (i, t) in tensors.iter().enumerate() {
            if t.heads == 0 || !heads.is_multiple_of(t.heads) {
                return bad(format!(
                    "tensor {i}: got {} heads, which must divide the {heads} heads that are dealt out to the ranks",
                    t.heads
                ));
            }
            if t.dim == 0 {
                return bad(format!("tensor {i}: got 0 elements per head"));
            }
        }
        // Buffers for a member are numbered in 16 bits.
        if ranks as usize * tensors.len() > usize::from(u16::MAX) {
            return Err(Error::unsupported(format!(
                "ranks: got {ranks} with {} tensors; at most {} together",
                tensors.len(),
                u16::MAX
            )));
        }
        // Of a caller's list only the query side counts.
        let partition = match partition {
            Partition::List { q, .. } => Partition::List { k: q.clone(), q },
            other => other,
        };
        let problem = Problem {
            ranks,
            inner: ranks,
            stages: 0,
            relay: false,
            partition,
            mask: Mask::FULL,
            packed,
            seqs: extents.map(|e| Sequence { q: e, k: e }).collect(),
            regions: Regions::default(),
            heads,
            kv_heads: heads,
            dim_qk: 8,
            dim_v: 8,
            dtype: DType::F32,
            wire: Wire::Storage,
            kv_wire: None,
            scale: 1.0,
            score: Score::default(),
            latent: None,
        };
        problem.validate()?;
        Ok(Trade { problem: Arc::new(problem), tensors })
    }

    /// 64 bits that ranks compare.
    pub fn fingerprint(&self) -> u64 {
        let mut h = Fnv::default();
        (self.problem.fingerprint(), &self.tensors).hash(&mut h);
        h.finish()
    }

    /// The heads of tensor `number` that a rank has of whole sequences.
    pub fn share(&self, number: usize, rank: u32) -> Range<u32> {
        share(self.problem.heads, self.tensors[number].heads, self.problem.ranks, rank)
    }

    /// Is a head of tensor `number` on several ranks?
    pub fn shared(&self, number: usize) -> bool {
        let total: usize = (0..self.problem.ranks).map(|r| self.share(number, r).len()).sum();
        total > self.tensors[number].heads as usize
    }

    /// Rows of whole tensors: all padded sequences.
    pub fn rows(&self) -> u32 {
        self.problem.seqs.iter().map(|s| s.q.padded).sum()
    }

    /// Rows of whole tensors that are padding.
    fn padding(&self) -> Vec<Rows> {
        let mut base = 0;
        let tokens = self.problem.seqs.iter().map(|s| {
            base += s.q.padded;
            (base - s.q.padded + s.q.before, s.q.len)
        });
        gaps(tokens, self.rows())
    }

    /// Local row → row of the whole tensors, for the true tokens of a rank, in the order of its rows.
    pub fn runs(&self, rank: u32) -> Vec<Run> {
        let mut base = vec![0u32];
        for s in &self.problem.seqs {
            base.push(base[base.len() - 1] + s.q.padded);
        }
        let mut out: Vec<Run> = Vec::new();
        for s in holding(&self.problem, rank, Side::Query).segments {
            let dst = base[s.seq as usize] + self.problem.seqs[s.seq as usize].q.before + s.start;
            let run = Run { src: s.offset, src_step: 1, dst, dst_step: s.step, rows: s.len };
            match out.last_mut() {
                // Documents without padding between them.
                Some(last)
                    if last.dst_step == 1
                        && run.dst_step == 1
                        && last.src + last.rows == run.src
                        && last.dst + last.rows == run.dst =>
                {
                    last.rows += run.rows;
                }
                _ => out.push(run),
            }
        }
        out
    }
}

/// The heads of a tensor with `of` heads that `rank` of `ranks` has when `heads` heads, a multiple of `of`, are dealt out.
pub fn share(heads: u32, of: u32, ranks: u32, rank: u32) -> Range<u32> {
    HeadShare::cut(heads, of, ranks, rank).kv
}

impl Plan {
    /// Plans one rank of a trade; `pass` is [`Pass::ToHeads`] or [`Pass::ToSequence`]. `options.pack`: not all whole tensors are dense.
    pub fn of_trade(trade: &Arc<Trade>, rank: u32, pass: Pass, options: Options) -> Plan {
        let mut b = Builder {
            trade,
            rank,
            options,
            local_rows: holding(&trade.problem, rank, Side::Query).rows,
            runs: (0..trade.problem.ranks).map(|r| trade.runs(r)).collect(),
            slots: BTreeMap::new(),
            steps: Vec::new(),
            events: 0,
        };
        match pass {
            Pass::ToHeads => b.deal_heads(),
            _ => b.deal_rows(),
        }
        Plan {
            origins: None,
            problem: trade.problem.clone(),
            trade: Some(trade.clone()),
            rank,
            pass,
            options,
            slots: b.slots.into_values().collect(),
            steps: b.steps,
            events: b.events,
            stages: 0,
            share: HeadShare::of(&trade.problem, rank),
        }
    }

    /// The plans of all ranks.
    pub fn all_of_trade(trade: &Arc<Trade>, pass: Pass, options: Options) -> Vec<Plan> {
        let ranks = 0..trade.problem.ranks;
        ranks.map(|rank| Plan::of_trade(trade, rank, pass, options)).collect()
    }
}

struct Builder<'a> {
    trade: &'a Trade,
    rank: u32,
    options: Options,
    local_rows: u32,
    /// Of every rank.
    runs: Vec<Vec<Run>>,
    slots: BTreeMap<Slot, SlotInfo>,
    steps: Vec<Step>,
    events: Event,
}

impl Builder<'_> {
    fn deal_heads(&mut self) {
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        let me = self.rank;
        let gapless = packed(self.mine(), false);
        for n in 0..self.trade.tensors.len() {
            let (local, whole) = (self.local(n), self.whole(n));
            for peer in self.peers() {
                let heads = self.trade.share(n, peer);
                let split = self.buffer(Kind::Split, n, peer, me, heads.len());
                self.copy(None, (local, heads.start), (split, 0), heads.len(), gapless.clone());
                sends.push(Message { peer, slot: split, rows: self.cut(me) });
                recvs.push(match self.in_place(peer) {
                    true => Message { peer, slot: whole, rows: self.whole_rows(peer) },
                    false => self.packed_message(n, peer),
                });
            }
        }
        let arrived = self.exchange(sends, recvs);
        let padding = self.trade.padding();
        for n in 0..self.trade.tensors.len() {
            let (local, whole) = (self.local(n), self.whole(n));
            let heads = self.trade.share(n, me);
            self.copy(None, (local, heads.start), (whole, 0), heads.len(), self.mine().to_vec());
            self.clear(whole, padding.clone());
        }
        for n in 0..self.trade.tensors.len() {
            for peer in self.peers().filter(|peer| !self.in_place(*peer)).collect::<Vec<_>>() {
                let pack = self.packed_message(n, peer).slot;
                let runs = unpack(&self.runs[peer as usize]);
                let heads = self.trade.share(n, me).len();
                let whole = self.whole(n);
                self.copy(arrived, (pack, 0), (whole, 0), heads, runs);
            }
        }
    }

    fn deal_rows(&mut self) {
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        let me = self.rank;
        for n in 0..self.trade.tensors.len() {
            let whole = self.whole(n);
            for peer in self.peers() {
                sends.push(match self.in_place(peer) {
                    true => Message { peer, slot: whole, rows: self.whole_rows(peer) },
                    false => {
                        let message = self.packed_message(n, peer);
                        let runs = unpack(&self.runs[peer as usize]).iter().map(reverse).collect();
                        let heads = self.trade.share(n, me).len();
                        self.copy(None, (whole, 0), (message.slot, 0), heads, runs);
                        message
                    }
                });
                let count = self.trade.share(n, peer).len();
                let merge = self.buffer(Kind::Merge, n, peer, me, count);
                recvs.push(Message { peer, slot: merge, rows: self.cut(me) });
            }
        }
        let arrived = self.exchange(sends, recvs);
        let spread = packed(self.mine(), true);
        let own: Vec<Run> = self.mine().iter().map(reverse).collect();
        let padding = gaps(self.mine().iter().map(|r| (r.src, r.rows)), self.local_rows);
        for n in 0..self.trade.tensors.len() {
            let (local, whole) = (self.local(n), self.whole(n));
            let shared = self.trade.shared(n);
            let dst = if shared { self.sum(n) } else { local };
            let empty =
                if shared { vec![Rows::range(0, self.local_rows)] } else { padding.clone() };
            self.clear(dst, empty);
            for peer in 0..self.trade.problem.ranks {
                let heads = self.trade.share(n, peer);
                let (waits, src, runs) = match peer == me {
                    true => (None, whole, own.clone()),
                    false => {
                        let merge = self.buffer(Kind::Merge, n, peer, me, heads.len());
                        (arrived, merge, spread.clone())
                    }
                };
                self.push_copy(waits, (src, 0), (dst, heads.start), heads.len(), runs, shared);
            }
            if dst != local {
                let all = Run { src: 0, src_step: 1, dst: 0, dst_step: 1, rows: self.local_rows };
                let heads = self.trade.tensors[n].heads as usize;
                self.copy(None, (dst, 0), (local, 0), heads, vec![all]);
            }
        }
    }

    fn peers(&self) -> impl Iterator<Item = u32> + use<> {
        let me = self.rank;
        (0..self.trade.problem.ranks).filter(move |r| *r != me)
    }

    fn mine(&self) -> &[Run] {
        &self.runs[self.rank as usize]
    }

    /// Do a peer's rows travel straight from or to the whole tensors?
    fn in_place(&self, peer: u32) -> bool {
        !(self.options.pack || self.options.same_pieces && scattered(&self.runs[peer as usize]))
    }

    fn whole_rows(&self, peer: u32) -> Vec<Rows> {
        let rows = |r: &Run| Rows { first: r.dst, step: r.dst_step, count: r.rows };
        self.runs[peer as usize].iter().map(rows).collect()
    }

    /// Rows of a buffer with a rank's rows and no others, cut as the other side of the message is.
    fn cut(&self, of: u32) -> Vec<Rows> {
        let runs = &self.runs[of as usize];
        let mut at = 0;
        let mut next = |count: u32| {
            at += count;
            Rows::range(at - count, count)
        };
        match self.options.same_pieces && !scattered(runs) {
            true => runs.iter().map(|r| next(r.rows)).collect(),
            false => vec![next(runs.iter().map(|r| r.rows).sum())],
        }
    }

    /// The message of a peer's rows of this rank's heads, gathered.
    fn packed_message(&mut self, n: usize, peer: u32) -> Message {
        let heads = self.trade.share(n, self.rank).len();
        let slot = self.buffer(Kind::Pack, n, peer, peer, heads);
        Message { peer, slot, rows: self.cut(peer) }
    }

    fn local(&mut self, n: usize) -> Slot {
        let slot = Slot::indexed(Kind::Caller, Tensor::Local, n as u32);
        self.slot(slot, self.local_rows, self.trade.tensors[n].heads as usize)
    }

    fn whole(&mut self, n: usize) -> Slot {
        let slot = Slot::indexed(Kind::Caller, Tensor::Whole, n as u32);
        self.slot(slot, self.trade.rows(), self.trade.share(n, self.rank).len())
    }

    /// Where shared heads are summed: in place if that is fp32.
    fn sum(&mut self, n: usize) -> Slot {
        if self.trade.tensors[n].dtype == DType::F32 {
            return self.local(n);
        }
        let slot = Slot::indexed(Kind::Sum, Tensor::Local, n as u32);
        self.slot(slot, self.local_rows, self.trade.tensors[n].heads as usize)
    }

    /// A buffer of tensor `n` for `peer`, with the rows of rank `rows_of`.
    fn buffer(&mut self, kind: Kind, n: usize, peer: u32, rows_of: u32, heads: usize) -> Slot {
        let index = n as u32 * self.trade.problem.ranks + peer;
        let rows = self.runs[rows_of as usize].iter().map(|r| r.rows).sum();
        self.slot(Slot::indexed(kind, Tensor::Whole, index), rows, heads)
    }

    fn slot(&mut self, slot: Slot, rows: u32, heads: usize) -> Slot {
        let ranks = self.trade.problem.ranks;
        let number = match slot.kind {
            Kind::Caller | Kind::Sum => u32::from(slot.index),
            _ => u32::from(slot.index) / ranks,
        };
        let Traded { dim, dtype, .. } = self.trade.tensors[number as usize];
        let dtype = if slot.kind == Kind::Sum { DType::F32 } else { dtype };
        let heads = heads as u32;
        self.slots.insert(slot, SlotInfo { slot, rows, heads, dim, dtype, saved: false });
        slot
    }

    fn push(&mut self, lane: Lane, waits: Option<Event>, op: Op) {
        let waits = waits.into_iter().collect();
        self.steps.push(Step { lane, stage: 0, waits, signal: None, op });
    }

    fn clear(&mut self, slot: Slot, rows: Vec<Rows>) {
        let rows: Vec<Rows> = rows.into_iter().filter(|r| r.count > 0).collect();
        if !rows.is_empty() && self.slots[&slot].heads > 0 {
            self.push(Lane::Compute, None, Op::Fill { slot, rows, value: Value::Zero });
        }
    }

    fn copy(
        &mut self,
        waits: Option<Event>,
        src: (Slot, u32),
        dst: (Slot, u32),
        heads: usize,
        runs: Vec<Run>,
    ) {
        self.push_copy(waits, src, dst, heads, runs, false);
    }

    fn push_copy(
        &mut self,
        waits: Option<Event>,
        (src, src_head): (Slot, u32),
        (dst, dst_head): (Slot, u32),
        heads: usize,
        runs: Vec<Run>,
        add: bool,
    ) {
        if heads > 0 && runs.iter().any(|r| r.rows > 0) {
            // One wait is enough for all that follows on the lane.
            let waits = waits.filter(|e| !self.steps.iter().any(|s| s.waits.contains(e)));
            let heads = heads as u32;
            let op = Op::Copy { src, src_head, dst, dst_head, heads, runs, add };
            self.push(Lane::Compute, waits, op);
        }
    }

    /// The one exchange, after all that was copied so far; messages without bytes are left out.
    fn exchange(&mut self, sends: Vec<Message>, recvs: Vec<Message>) -> Option<Event> {
        let full = |list: Vec<Message>| -> Vec<Message> {
            list.into_iter().filter(|m| m.count() > 0 && self.slots[&m.slot].heads > 0).collect()
        };
        let (sends, recvs) = (full(sends), full(recvs));
        if sends.is_empty() && recvs.is_empty() {
            return None;
        }
        let copied = self.steps.last_mut().map(|last| {
            last.signal = Some(self.events);
            self.events += 1;
            self.events - 1
        });
        self.push(Lane::Comm, copied, Op::Exchange { sends, recvs });
        let arrived = self.events;
        self.steps.last_mut().expect("just pushed").signal = Some(arrived);
        self.events += 1;
        Some(arrived)
    }
}

/// The rows below `rows` that none of the ascending (first, count) has.
fn gaps(taken: impl Iterator<Item = (u32, u32)>, rows: u32) -> Vec<Rows> {
    let (mut out, mut at) = (Vec::new(), 0);
    for (first, count) in taken.chain([(rows, 0)]) {
        if first > at {
            out.push(Rows::range(at, first - at));
        }
        at = first + count;
    }
    out
}
