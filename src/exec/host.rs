//! A plan on the calling thread, to its end.
//!
//! Compute steps run one after another on the calling thread (and the backend's workers). Exchanges form one queue: each is started
//! as soon as the one before it is complete, and progresses whenever the backend calls back and whenever a step waits for an event.

use super::{Memory, PerSequence, Slots, Stats, bind, fill_messages};
use crate::backend::cpu::Cpu;
use crate::backend::{CopyRows, Reduce, View};
use crate::dtype::DType;
use crate::error::{Error, Result, Status};
use crate::plan::{Event, Op, Plan, Rows, Step, Value};
use crate::transport::{self, Transport};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The way to the other ranks. `None` for a plan without exchanges.
pub struct Link<'a> {
    /// Moves bytes.
    pub transport: &'a mut dyn Transport,
    /// Transport rank of every rank of the plan.
    pub members: &'a [u32],
    /// How long an exchange may take from when it is waited for.
    pub timeout: Duration,
}

/// Vectors that a run fills anew; kept between runs so that they are not allocated again.
#[derive(Default)]
pub struct Scratch {
    views: Vec<View>,
    sequences: PerSequence,
    signaled: Vec<bool>,
    queue: VecDeque<usize>,
    sends: Vec<transport::Message>,
    recvs: Vec<transport::Message>,
}

/// Runs the plan to the end. After an error nothing is in flight any more.
///
/// # Safety
/// Every view and both buffers point to memory that is valid, unaliased where written, and large enough for the plan.
pub unsafe fn run(
    plan: &Plan,
    memory: &Memory,
    cpu: &mut Cpu,
    link: Option<Link>,
    scratch: &mut Scratch,
) -> Result<Stats> {
    let mut views = std::mem::take(&mut scratch.views);
    bind(plan, memory, &mut views)?;
    scratch.signaled.clear();
    scratch.signaled.resize(plan.events as usize, false);
    scratch.queue.clear();
    let mut sequences = std::mem::take(&mut scratch.sequences);
    sequences.fill(plan);
    let slots = Slots { plan, dropout: memory.dropout, sequences: &sequences, views: &views };
    let mut comm = Comm { slots: &slots, link, scratch, in_flight: None, stats: Stats::default() };
    // SAFETY: the caller's promise.
    let result = unsafe { steps(plan, &slots, cpu, &mut comm) };
    let stats = comm.stats;
    if let Err(e) = &result {
        comm.give_up(e);
    }
    drop(comm);
    scratch.views = views;
    scratch.sequences = sequences;
    result.map(|()| stats)
}

/// # Safety
/// As [`run`].
unsafe fn steps(plan: &Plan, slots: &Slots, cpu: &mut Cpu, comm: &mut Comm) -> Result<()> {
    for (index, step) in plan.steps.iter().enumerate() {
        if matches!(step.op, Op::Exchange { .. }) {
            comm.scratch.queue.push_back(index);
            comm.progress()?;
            continue;
        }
        for event in &step.waits {
            comm.wait(*event)?;
        }
        // SAFETY: the caller's promise; the plan's events order this step after everything it reads.
        unsafe { compute(step, slots, cpu, comm)? };
        if let Some(event) = step.signal {
            comm.scratch.signaled[event as usize] = true;
        }
        comm.progress()?;
    }
    comm.drain()
}

/// # Safety
/// As [`run`].
unsafe fn compute(step: &Step, slots: &Slots, cpu: &mut Cpu, comm: &mut Comm) -> Result<()> {
    match &step.op {
        Op::Exchange { .. } => unreachable!("exchanges are queued"),
        Op::Attend { q, k, slices, first, last } => {
            let work = slots.forward(step.stage, (*q, *k), slices, *first, *last);
            // SAFETY: the caller's promise.
            unsafe { cpu.forward(&work, &mut || comm.progress()) }
        }
        Op::AttendBackward { q, d_out, lse, delta, k, dk, slices } => {
            let work = slots.backward(step.stage, [*q, *d_out, *lse, *delta, *k, *dk], slices);
            // SAFETY: the caller's promise.
            unsafe { cpu.backward(&work, &mut || comm.progress()) }
        }
        Op::Expand { latent, k, rows } => {
            let work = slots.expand(*latent, *k, rows);
            // SAFETY: the caller's promise.
            unsafe { cpu.expand(&work, &mut || comm.progress()) }
        }
        Op::Contract { dk, latent, d_latent, rows } => {
            let work = slots.contract(*dk, *latent, *d_latent, rows);
            // SAFETY: the caller's promise.
            unsafe { cpu.contract(&work, &mut || comm.progress()) }
        }
        Op::Delta => {
            // SAFETY: the caller's promise.
            unsafe { cpu.delta(&slots.delta()) };
            Ok(())
        }
        Op::SinkTerms => {
            // SAFETY: the caller's promise.
            unsafe { cpu.sink_terms(&slots.sink_terms()) };
            Ok(())
        }
        Op::Reduce { src, dst, dst_row, dst_head, max } => {
            let (src, dst) = (slots.view(*src), slots.view(*dst));
            let (dst_row, dst_head) = (*dst_row as usize, *dst_head as usize);
            // SAFETY: the caller's promise.
            unsafe { cpu.reduce(&Reduce { src, dst, dst_row, dst_head, max: *max }) };
            Ok(())
        }
        Op::Copy { src, src_head, dst, dst_head, heads, runs, add } => {
            let (src, dst) = (slots.view(*src), slots.view(*dst));
            let (src_head, dst_head, heads) =
                (*src_head as usize, *dst_head as usize, *heads as usize);
            // SAFETY: the caller's promise.
            unsafe {
                cpu.copy_rows(&CopyRows { src, src_head, dst, dst_head, heads, runs, add: *add })
            };
            Ok(())
        }
        Op::Fill { slot, rows, value } => {
            // SAFETY: the caller's promise.
            unsafe { fill(slots.view(*slot), rows, *value) };
            Ok(())
        }
    }
}

/// # Safety
/// The view points to writable memory.
unsafe fn fill(view: View, rows: &[Rows], value: Value) {
    for row in rows.iter().flat_map(|r| r.iter()) {
        for head in 0..view.heads {
            let at = view.at(row as usize, head);
            match value {
                // SAFETY: `dim` elements of the row and head, inside the view. All-zero bytes are 0 in every type.
                Value::Zero => unsafe { at.write_bytes(0, view.dim * view.dtype.size()) },
                Value::NegInf => {
                    debug_assert!(view.dtype == DType::F32);
                    for i in 0..view.dim {
                        // SAFETY: as above; fp32 statistics are aligned to 4 bytes.
                        unsafe { at.cast::<f32>().add(i).write(f32::NEG_INFINITY) };
                    }
                }
            }
        }
    }
}

/// The comm lane.
struct Comm<'a, 'b> {
    slots: &'a Slots<'a>,
    link: Option<Link<'b>>,
    scratch: &'a mut Scratch,
    in_flight: Option<usize>,
    stats: Stats,
}

impl Comm<'_, '_> {
    /// Moves the queue on without blocking.
    fn progress(&mut self) -> Result<()> {
        loop {
            if self.in_flight.is_none() && !self.start_next()? {
                return Ok(());
            }
            let Some(link) = &mut self.link else { return Ok(()) };
            if !link.transport.test()? {
                return Ok(());
            }
            self.complete();
        }
    }

    /// Starts the first queued exchange. False when there is none. Its events are already there: plans list steps in order.
    fn start_next(&mut self) -> Result<bool> {
        let Some(index) = self.scratch.queue.pop_front() else { return Ok(false) };
        let step = &self.slots.plan.steps[index];
        debug_assert!(step.waits.iter().all(|e| self.scratch.signaled[*e as usize]));
        let Op::Exchange { sends, recvs } = &step.op else {
            unreachable!("only exchanges are queued")
        };
        let Some(link) = &mut self.link else {
            return Err(Error::internal("the plan exchanges, but no group is linked"));
        };
        fill_messages(self.slots, sends, link.members, &mut self.scratch.sends);
        fill_messages(self.slots, recvs, link.members, &mut self.scratch.recvs);
        let bytes =
            |list: &[transport::Message]| list.iter().map(|m| m.bytes() as u64).sum::<u64>();
        self.stats.sent += bytes(&self.scratch.sends);
        self.stats.received += bytes(&self.scratch.recvs);
        self.in_flight = Some(index);
        // SAFETY: the pieces lie in the run's memory, which outlives the run; `give_up` cancels on errors.
        unsafe { link.transport.start(&self.scratch.sends, &self.scratch.recvs)? };
        Ok(true)
    }

    /// Blocks until an event is signaled, or the deadline passes.
    fn wait(&mut self, event: Event) -> Result<()> {
        self.until(|comm| comm.scratch.signaled[event as usize])
    }

    /// Blocks until the queue is empty.
    fn drain(&mut self) -> Result<()> {
        self.until(|comm| comm.in_flight.is_none() && comm.scratch.queue.is_empty())
    }

    fn until(&mut self, done: impl Fn(&Self) -> bool) -> Result<()> {
        self.progress()?;
        if done(self) {
            return Ok(());
        }
        let start = Instant::now();
        while !done(self) {
            let Some(link) = &mut self.link else {
                return Err(Error::internal("an event that no step signals"));
            };
            if self.in_flight.is_some() && link.transport.wait()? {
                self.complete();
            }
            self.progress()?;
            let timeout = self.link.as_ref().map_or(Duration::ZERO, |l| l.timeout);
            if !done(self) && start.elapsed() > timeout {
                return Err(self.late(timeout));
            }
        }
        self.stats.exposed_ns += start.elapsed().as_nanos() as u64;
        Ok(())
    }

    /// Who was waited for, and in which step.
    fn late(&self, timeout: Duration) -> Error {
        let plan = self.slots.plan;
        let (Some(index), Some(link)) = (self.in_flight, &self.link) else {
            return Error::internal("waits for an event, but nothing is in flight");
        };
        let peer = link.transport.waiting_for();
        let text = format!(
            "rank {}: rank {} did not end its part of an exchange within {} ms (step {index} of the {:?} plan, stage {})",
            link.transport.rank(),
            peer.map_or("?".into(), |p| p.to_string()),
            timeout.as_millis(),
            plan.pass,
            plan.steps[index].stage
        );
        Error::new(Status::Timeout, text)
    }

    /// After an error nothing stays in flight, and peers that wait for this rank learn why they wait in vain.
    fn give_up(&mut self, why: &Error) {
        self.in_flight = None;
        if let Some(link) = &mut self.link {
            link.transport.give_up(why.clone());
        }
    }

    fn complete(&mut self) {
        if let Some(event) =
            self.in_flight.take().and_then(|index| self.slots.plan.steps[index].signal)
        {
            self.scratch.signaled[event as usize] = true;
        }
    }
}

/// A panic is a bug, but even then no peer may go on reading memory that is about to be freed, or wait in vain.
impl Drop for Comm<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.give_up(&Error::internal("a rank ended in a panic in the middle of a call"));
        }
    }
}
