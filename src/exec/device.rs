//! A plan on CUDA streams: everything is enqueued, and the host goes on.
//!
//! The compute lane is the caller's stream, the comm lane the group's. It is forked from the caller's stream at the start and joined to it at
//! the end, so that to the caller a call is work on one stream, and a capture of that stream captures all of it. Plan events become CUDA events.

use super::{Memory, PerSequence, Slots, Stats, bind, fill_messages};
use crate::backend::cuda::{
    AttendWork, Cuda, RowsWork, Sequences, Shape, SliceLimits, Staging, TableBuilder, TokenWork,
    backward_bound, forward_bound, runs_bound, tokens_bound, turns_bound,
};
use crate::backend::{CopyRows, Reduce, View};
use crate::driver::{self, CUdeviceptr, CUstream, Event};
use crate::error::{Error, Result};
use crate::plan::account::ALIGN;
use crate::plan::{self, Lane, Op, Plan, Rows, Slot, Value};
use crate::score::Score;
use crate::transport;
use crate::transport::device::{DeviceTransport, Step};

/// Where a plan runs; it decides what is prepared beside the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// On the calling thread.
    Host,
    /// On a device, with kernels of this shape.
    Device {
        /// The compiled shape that the head dimensions are padded to.
        shape: &'static Shape,
        /// What several blocks add to is added to in a fixed order.
        deterministic: bool,
    },
}

impl Target {
    /// Most bytes of the work lists of `steps` attend steps, each of at most `segments` slices over `rows` query and `keys` key rows, where a row
    /// is in at most `per_row` of them, and of as many copies of as many runs; with features of scores also which tokens the rows are.
    pub fn most_tables(
        self,
        steps: usize,
        segments: usize,
        per_row: usize,
        inner: usize,
        [rows, keys]: [usize; 2],
        score: &Score,
    ) -> usize {
        let Target::Device { shape, deterministic } = self else { return 0 };
        let per_row = per_row.min(segments);
        let limits = SliceLimits { count: segments, per_query: per_row, per_key: per_row };
        let forward = forward_bound(shape.forward(), rows, keys, limits);
        let backward = backward_bound(shape.backward(), rows, keys, limits, deterministic);
        // A stage gathers, clears, converts and sums keys and values; the head exchange copies up to six tensors in and three out, for every
        // member and perhaps packed; padding cuts a document's rows in two.
        let copies = (8 * steps + 2 * 9 * inner) * runs_bound(2 * segments);
        let tokens = match score.needs_origins() {
            true => tokens_bound(steps, [rows, keys], score.slopes.len()),
            false => 0,
        };
        // Heads that share the gradient of a bias add to it in turns.
        let counters = match deterministic && score.bias.is_some_and(|b| b.gradient) {
            true => turns_bound(shape.backward(), rows, keys, limits),
            false => 0,
        };
        steps * forward.max(backward) + copies + tokens + counters
    }
}

/// The kernels' work lists of a plan, and where they lie in the workspace.
pub struct Tables {
    blob: Vec<u8>,
    /// One per step.
    works: Vec<Work>,
    /// Where the caller's numbers for sequences go.
    sequences: Sequences,
    /// Where the blob goes, after the slots.
    at: usize,
    /// Where the counters of the deterministic order are, after the blob.
    counters: usize,
    bytes: usize,
}

/// What a step needs of the tables.
enum Work {
    None,
    Attend(AttendWork),
    Rows(RowsWork),
}

impl Tables {
    /// The tables of a plan whose slots take the first `slots` bytes of the workspace. `None` on the host.
    pub fn new(plan: &Plan, target: Target, slots: usize) -> Option<Tables> {
        let Target::Device { shape, deterministic } = target else { return None };
        let mut builder = TableBuilder::new(shape.forward(), shape.backward());
        let rows = |slot: &Slot| plan.info(*slot).rows;
        let heads = plan.share.q.len();
        let shared_bias = plan.d_bias().is_some_and(|slot| plan.info(slot).heads == 1);
        let mut tokens = Tokens::new(plan);
        let mut counters = 0;
        let mut works = Vec::with_capacity(plan.steps.len());
        for step in &plan.steps {
            works.push(match &step.op {
                Op::Attend { q, k, slices, first, last } => {
                    let always = *first || last.is_some();
                    let work = builder.forward(slices, rows(q), rows(k), always);
                    let tokens = tokens.step(step.stage, [rows(q), rows(k)], &mut builder);
                    Work::Attend(AttendWork { tokens, ..work })
                }
                Op::AttendBackward { q, k, slices, .. } => {
                    let work = builder.backward(slices, rows(q), rows(k), deterministic);
                    let [of_queries, of_bias] = work.counters(heads, shared_bias);
                    counters = counters.max((of_queries + of_bias) * size_of::<u32>());
                    let tokens = tokens.step(step.stage, [rows(q), rows(k)], &mut builder);
                    Work::Attend(AttendWork { tokens, ..work })
                }
                Op::Copy { runs, .. } => Work::Rows(builder.runs(runs)),
                Op::Fill { rows, .. } => {
                    Work::Rows(builder.rows(rows.iter().map(|r| (r.first, r.step, r.count))))
                }
                Op::Exchange { .. }
                | Op::Expand { .. }
                | Op::Contract { .. }
                | Op::Delta
                | Op::SinkTerms
                | Op::Reduce { .. } => Work::None,
            });
        }
        let blob = builder.finish();
        let at = slots;
        let after = at + blob.len().next_multiple_of(ALIGN);
        let bytes = after + counters.next_multiple_of(ALIGN);
        Some(Tables { blob, works, sequences: tokens.sequences, at, counters: after, bytes })
    }

    /// Bytes of the lists in host memory.
    pub fn bytes(&self) -> usize {
        self.blob.len()
    }

    /// Bytes of workspace, slots included.
    pub fn workspace(&self) -> usize {
        self.bytes
    }
}

/// The tables of tokens while a plan's are built: of queries once, of keys once per stage.
struct Tokens<'a> {
    plan: &'a Plan,
    work: Option<TokenWork>,
    sequences: Sequences,
    keys: Vec<Option<u64>>,
}

impl Tokens<'_> {
    fn new(plan: &Plan) -> Tokens<'_> {
        let stages = plan.origins.as_ref().map_or(0, |o| o.keys.len());
        Tokens { plan, work: None, sequences: Sequences::default(), keys: vec![None; stages] }
    }

    /// Those of an attend step; none if no score depends on them.
    fn step(
        &mut self,
        stage: u32,
        [q_rows, k_rows]: [u32; 2],
        builder: &mut TableBuilder,
    ) -> Option<TokenWork> {
        let origins = self.plan.origins.as_ref()?;
        let work = *self.work.get_or_insert_with(|| {
            let mut of = PerSequence::default();
            of.fill(self.plan);
            let slopes = &self.plan.problem.score.slopes;
            let of = (&of.diagonals[..], &of.padding[..]);
            let (work, sequences) = builder.tokens(&origins.queries, q_rows, of, slopes);
            self.sequences = sequences;
            work
        });
        let stage = stage as usize;
        let positions = || builder.positions(&origins.keys[stage], k_rows);
        let keys = *self.keys[stage].get_or_insert_with(positions);
        Some(TokenWork { keys, ..work })
    }
}

/// The way to the other ranks. `None` for a plan without exchanges.
pub struct DeviceLink<'a> {
    /// Moves bytes.
    pub transport: &'a mut dyn DeviceTransport,
    /// Transport rank of every rank of the plan.
    pub members: &'a [u32],
    /// The comm lane.
    pub stream: CUstream,
    /// Number of the call on the group.
    pub call: u64,
}

/// What calls use again: events, staging slots, vectors.
pub struct Scratch {
    staging: Staging,
    events: Vec<Event>,
    views: Vec<View>,
    sequences: PerSequence,
    /// The table of sequences with the numbers of a call.
    numbers: Vec<u8>,
    sends: Vec<transport::Message>,
    recvs: Vec<transport::Message>,
}

impl Scratch {
    /// Nothing is allocated yet.
    pub fn new(staging: Staging) -> Scratch {
        let (events, views, sends, recvs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (sequences, numbers) = (PerSequence::default(), Vec::new());
        Scratch { staging, events, views, sequences, numbers, sends, recvs }
    }

    /// Allocates for calls with tables of at most so many bytes and so many events, so that they allocate nothing.
    pub fn reserve(&mut self, cuda: &Cuda, table_bytes: usize, events: usize) -> Result<()> {
        self.staging.reserve(table_bytes)?;
        while self.events.len() < events {
            self.events.push(Event::new(cuda.device())?);
        }
        Ok(())
    }
}

/// Enqueues the plan on `stream`. The device is current. After an error peers have been told, where they can be.
///
/// # Safety
/// Every view and both buffers are device memory that is valid, unaliased where written, and large enough for the plan until the enqueued
/// work is done; `stream` is a stream of the current device, which is `cuda`'s.
pub unsafe fn enqueue(
    plan: &Plan,
    tables: &Tables,
    memory: &Memory,
    cuda: &Cuda,
    stream: CUstream,
    mut link: Option<DeviceLink>,
    scratch: &mut Scratch,
) -> Result<Stats> {
    let mut views = std::mem::take(&mut scratch.views);
    let mut sequences = std::mem::take(&mut scratch.sequences);
    sequences.fill(plan);
    let result = bind(plan, memory, &mut views).and_then(|()| {
        let slots = Slots { plan, dropout: memory.dropout, sequences: &sequences, views: &views };
        let run = Run { slots, tables, memory, cuda, stream };
        // SAFETY: the caller's promise.
        unsafe { run.steps(link.as_mut(), scratch) }
    });
    scratch.views = views;
    scratch.sequences = sequences;
    if let (Err(e), Some(link)) = (&result, &mut link) {
        link.transport.give_up(e.clone());
    }
    result
}

struct Run<'a> {
    slots: Slots<'a>,
    tables: &'a Tables,
    memory: &'a Memory<'a>,
    cuda: &'a Cuda,
    stream: CUstream,
}

impl Run<'_> {
    /// # Safety
    /// As [`enqueue`].
    unsafe fn steps(
        &self,
        mut link: Option<&mut DeviceLink>,
        scratch: &mut Scratch,
    ) -> Result<Stats> {
        let plan = self.slots.plan;
        // Two more than the plan's: the fork and the join.
        let (fork, join) = (plan.events as usize, plan.events as usize + 1);
        scratch.reserve(self.cuda, 0, join + 1)?;
        let comm = link.as_ref().map_or(self.stream, |l| l.stream);
        // SAFETY: streams of the current device, and the caller's promise about all memory; here and below.
        unsafe {
            let captured = driver::is_capturing(self.stream)?;
            if let (true, Some(link)) = (captured, &link) {
                link.transport.capturable()?;
            }
            let Tables { blob, sequences, .. } = self.tables;
            sequences.write(self.memory.dropout.ids, &mut scratch.numbers);
            let patch = (sequences.at as usize, &scratch.numbers[..]);
            scratch.staging.upload(blob, patch, self.tables(), self.stream, captured)?;
            let Some(link) = link.as_mut() else { return self.lanes(None, comm, scratch) };
            scratch.events[fork].record(self.stream)?;
            driver::wait(comm, scratch.events[fork].raw())?;
            let result = self.lanes(Some(&mut **link), comm, scratch);
            // NCCL's watchdog may have seen a peer fail meanwhile.
            let result = result.and_then(|s| link.transport.failed().map_or(Ok(s), Err));
            // After an error too: what is on the comm lane still uses the memory, which whoever follows on the caller's stream may reuse.
            let events = &scratch.events;
            let joined = events[join].record(comm);
            let joined = joined.and_then(|()| driver::wait(self.stream, events[join].raw()));
            result.and_then(|stats| joined.map(|()| stats))
        }
    }

    /// Enqueues every step on its lane.
    ///
    /// # Safety
    /// As [`enqueue`].
    unsafe fn lanes(
        &self,
        mut link: Option<&mut DeviceLink>,
        comm: CUstream,
        scratch: &mut Scratch,
    ) -> Result<Stats> {
        let plan = self.slots.plan;
        let Scratch { events, sends, recvs, .. } = scratch;
        let mut stats = Stats::default();
        // SAFETY: streams of the current device, and the caller's promise about all memory.
        unsafe {
            for (index, (step, work)) in plan.steps.iter().zip(&self.tables.works).enumerate() {
                let lane = if step.lane == Lane::Comm { comm } else { self.stream };
                for event in &step.waits {
                    driver::wait(lane, events[*event as usize].raw())?;
                }
                if let Op::Exchange { sends: out, recvs: into } = &step.op {
                    let Some(link) = link.as_mut() else {
                        return Err(Error::internal("the plan exchanges, but no group is linked"));
                    };
                    fill_messages(&self.slots, out, link.members, sends);
                    fill_messages(&self.slots, into, link.members, recvs);
                    stats.sent += sends.iter().map(|m| m.bytes() as u64).sum::<u64>();
                    stats.received += recvs.iter().map(|m| m.bytes() as u64).sum::<u64>();
                    let at = Step { index: index as u32, stage: step.stage, call: link.call };
                    link.transport.exchange(sends, recvs, comm, at)?;
                } else {
                    self.compute(step, work)?;
                }
                if let Some(event) = step.signal {
                    events[event as usize].record(lane)?;
                }
            }
        }
        Ok(stats)
    }

    /// Address of the tables on the device.
    fn tables(&self) -> CUdeviceptr {
        self.memory.workspace as CUdeviceptr + self.tables.at as CUdeviceptr
    }

    /// # Safety
    /// As [`enqueue`].
    unsafe fn compute(&self, step: &plan::Step, work: &Work) -> Result<()> {
        let (slots, cuda, stream, tables) = (&self.slots, self.cuda, self.stream, self.tables());
        // SAFETY: the caller's promise; the plan's events order this step after everything it reads.
        unsafe {
            match (&step.op, work) {
                (Op::Attend { q, k, slices, first, last }, Work::Attend(work)) => {
                    let step = slots.forward(step.stage, (*q, *k), slices, *first, *last);
                    cuda.forward(&step, work, tables, stream)
                }
                (
                    Op::AttendBackward { q, d_out, lse, delta, k, dk, slices },
                    Work::Attend(work),
                ) => {
                    let step =
                        slots.backward(step.stage, [*q, *d_out, *lse, *delta, *k, *dk], slices);
                    let counters =
                        self.memory.workspace as CUdeviceptr + self.tables.counters as CUdeviceptr;
                    cuda.backward(&step, work, tables, counters, stream)
                }
                (Op::Delta, _) => cuda.delta(&slots.delta(), stream),
                (Op::SinkTerms, _) => cuda.sink_terms(&slots.sink_terms(), stream),
                (Op::Reduce { src, dst, dst_row, dst_head, max }, _) => {
                    let (src, dst) = (slots.view(*src), slots.view(*dst));
                    let (dst_row, dst_head) = (*dst_row as usize, *dst_head as usize);
                    let step = Reduce { src, dst, dst_row, dst_head, max: *max };
                    cuda.reduce(&step, stream)
                }
                (Op::Copy { src, src_head, dst, dst_head, heads, runs, add }, Work::Rows(work)) => {
                    let step = CopyRows {
                        src: slots.view(*src),
                        dst: slots.view(*dst),
                        src_head: *src_head as usize,
                        dst_head: *dst_head as usize,
                        heads: *heads as usize,
                        runs,
                        add: *add,
                    };
                    cuda.copy_rows(&step, work, tables, stream)
                }
                (Op::Fill { slot, rows, value }, Work::Rows(work)) => {
                    let view = slots.view(*slot);
                    match rows.as_slice() {
                        [Rows { first, step: 1, count }]
                            if view.is_dense() && *value == Value::Zero =>
                        {
                            let row = view.heads * view.dim * view.dtype.size();
                            let from = view.at(*first as usize, 0) as CUdeviceptr;
                            driver::clear(from, *count as usize * row, stream)
                        }
                        _ => cuda.fill(&view, work, *value == Value::NegInf, tables, stream),
                    }
                }
                _ => Err(Error::internal("a step without its tables")),
            }
        }
    }
}
