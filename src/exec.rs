//! Runs one rank's plan: binds slots to memory, compute steps to the backend, exchanges to the transport. Nothing is decided here.
//!
//! Compute steps run one after another on the calling thread (and the backend's workers). Exchanges form one queue: each is started
//! as soon as the one before it is complete, and progresses whenever the backend calls back and whenever a step waits for an event.

use crate::backend::cpu::Cpu;
use crate::backend::{Backward, CopyRows, Delta, Forward, Output, State, View};
use crate::dtype::DType;
use crate::error::{Error, Result, Status};
use crate::plan::{Event, Kind, Message, Op, Plan, Rows, Slot, Tensor, Value};
use crate::transport::{self, Piece, Transport};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Memory that a plan's slots are bound to.
pub struct Memory<'a> {
    /// The caller's tensors.
    pub caller: &'a [(Tensor, View)],
    /// Offsets of all other slots, from [`crate::plan::account::layout`], in the order of `plan.slots`.
    pub offsets: &'a [usize],
    /// At least the plan's workspace bytes, aligned to [`crate::plan::account::ALIGN`].
    pub workspace: *mut u8,
    /// At least the plan's saved bytes, aligned likewise; may be null when there are none.
    pub saved: *mut u8,
}

/// The way to the other ranks. `None` for a plan without exchanges.
pub struct Link<'a> {
    /// Moves bytes.
    pub transport: &'a mut dyn Transport,
    /// Transport rank of every rank of the plan.
    pub members: &'a [u32],
    /// How long an exchange may take from when it is waited for.
    pub timeout: Duration,
}

/// What a run moved and how long it waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes handed to the transport.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Nanoseconds in which the compute lane stood still for an event: exposed communication.
    pub exposed_ns: u64,
}

/// Vectors that a run fills anew; kept between runs so that they are not allocated again.
#[derive(Default)]
pub struct Scratch {
    views: Vec<View>,
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
    views.clear();
    for (info, offset) in plan.slots.iter().zip(memory.offsets) {
        views.push(match info.slot.kind {
            Kind::Caller => {
                match memory.caller.iter().find(|(tensor, _)| *tensor == info.slot.tensor) {
                    Some((_, view)) => *view,
                    None => {
                        return Err(Error::internal(format!(
                            "the plan needs {:?}, which was not bound",
                            info.slot
                        )));
                    }
                }
            }
            _ => {
                let base = if info.saved { memory.saved } else { memory.workspace };
                View::dense(
                    base.wrapping_add(*offset),
                    info.dtype,
                    info.rows as usize,
                    info.heads as usize,
                    info.dim as usize,
                )
            }
        });
    }
    scratch.signaled.clear();
    scratch.signaled.resize(plan.events as usize, false);
    scratch.queue.clear();
    let slots = Slots { plan, views: &views };
    let mut comm = Comm { slots: &slots, link, scratch, in_flight: None, stats: Stats::default() };
    // SAFETY: the caller's promise.
    let result = unsafe { steps(plan, &slots, cpu, &mut comm) };
    let stats = comm.stats;
    if let Err(e) = &result {
        comm.give_up(e);
    }
    drop(comm);
    scratch.views = views;
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
        unsafe { compute(plan, &step.op, slots, cpu, comm)? };
        if let Some(event) = step.signal {
            comm.scratch.signaled[event as usize] = true;
        }
        comm.progress()?;
    }
    comm.drain()
}

/// # Safety
/// As [`run`].
unsafe fn compute(
    plan: &Plan,
    op: &Op,
    slots: &Slots,
    cpu: &mut Cpu,
    comm: &mut Comm,
) -> Result<()> {
    let values = |k: &Slot| slots.view(Slot { tensor: Tensor::V, ..*k });
    let acc = |tensor| slots.view(Slot::of(Kind::Acc, tensor));
    let (heads, scale) = (plan.head_map(), plan.problem.scale);
    match op {
        Op::Exchange { .. } => unreachable!("exchanges are queued"),
        Op::Attend { q, k, slices, first, last } => {
            let whole = *first && last.is_some();
            let state = (!whole).then(|| State {
                out: acc(Tensor::Out),
                max: acc(Tensor::Max),
                sum: acc(Tensor::Sum),
            });
            let last = last.map(|(out, lse)| Output { out: slots.view(out), lse: slots.view(lse) });
            let work = Forward {
                q: slots.view(*q),
                k: slots.view(*k),
                v: values(k),
                slices,
                heads,
                scale,
                state,
                first: *first,
                last,
            };
            // SAFETY: the caller's promise.
            unsafe { cpu.forward(&work, &mut || comm.progress()) }
        }
        Op::AttendBackward { q, d_out, lse, delta, k, dk, slices } => {
            let work = Backward {
                q: slots.view(*q),
                k: slots.view(*k),
                v: values(k),
                d_out: slots.view(*d_out),
                lse: slots.view(*lse),
                delta: slots.view(*delta),
                slices,
                heads,
                scale,
                dq: acc(Tensor::DQ),
                dk: slots.view(*dk),
                dv: slots.view(Slot { tensor: Tensor::DV, ..*dk }),
            };
            // SAFETY: the caller's promise.
            unsafe { cpu.backward(&work, &mut || comm.progress()) }
        }
        Op::Delta => {
            let delta = slots.view(Slot::of(Kind::Sum, Tensor::Delta));
            let caller = |tensor| slots.view(Slot::caller(tensor));
            // SAFETY: the caller's promise.
            unsafe {
                cpu.delta(&Delta { out: caller(Tensor::Out), d_out: caller(Tensor::DOut), delta })
            };
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

/// Views of a plan's slots.
struct Slots<'a> {
    plan: &'a Plan,
    /// In the order of `plan.slots`, which is sorted.
    views: &'a [View],
}

impl Slots<'_> {
    fn view(&self, slot: Slot) -> View {
        let index = self.plan.slots.binary_search_by_key(&slot, |s| s.slot);
        self.views[index.unwrap_or_else(|_| panic!("plan has no slot {slot:?}"))]
    }

    /// The bytes of a message's rows, appended as pieces.
    fn pieces(&self, m: &Message, out: &mut Vec<Piece>) {
        let view = self.view(m.slot);
        let row_bytes = view.heads * view.dim * view.dtype.size();
        for r in &m.rows {
            if r.step == 1 {
                out.push(Piece {
                    ptr: view.at(r.first as usize, 0),
                    len: r.count as usize * row_bytes,
                });
            } else {
                out.extend(
                    r.iter().map(|row| Piece { ptr: view.at(row as usize, 0), len: row_bytes }),
                );
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

/// Resolves the messages of an exchange to bytes, reusing what the vectors hold. Messages to one peer become one stream.
fn fill_messages(
    slots: &Slots,
    from: &[Message],
    members: &[u32],
    to: &mut Vec<transport::Message>,
) {
    let mut used = 0;
    for m in from {
        let peer = members[m.peer as usize];
        let at = match to[..used].iter().position(|t| t.peer == peer) {
            Some(at) => at,
            None => {
                if used == to.len() {
                    to.push(transport::Message { peer, pieces: Vec::new() });
                }
                to[used].peer = peer;
                to[used].pieces.clear();
                used += 1;
                used - 1
            }
        };
        slots.pieces(m, &mut to[at].pieces);
    }
    to.truncate(used);
}
