//! A communicator and the thread that watches it. NCCL has no deadline: a rank that never comes, or dies, leaves the others' kernels waiting.
//!
//! Around every exchange two events are recorded on its stream. The deadline runs from the moment when the first one is reached, so that
//! computation which an exchange is ordered after does not count, however long it takes; and an exchange that waits behind another one
//! counts from when that is done. When the deadline passes, when NCCL reports an error that came late, or when the device fails, the first
//! cause is kept and the communicator is aborted, which frees the stream. Inside a capture no events are recorded: replays of a graph
//! are watched for NCCL's own errors only.

use super::api::{Api, Comm, IN_PROGRESS, SUCCESS};
use crate::driver::{CUstream, Device, Event, Relaxed};
use crate::error::{Error, Result, Status};
use crate::transport::device::Step;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long an abort waits for a call of NCCL that another thread is in. A non-blocking communicator's calls are shorter; a blocking one's
/// (the caller's) may be stuck, and then the abort is what frees it.
const PATIENCE: Duration = Duration::from_secs(1);

/// A communicator of one rank. Its calls and its abort exclude one another.
pub struct Watched {
    api: &'static Api,
    device: Arc<Device>,
    rank: u32,
    timeout: Duration,
    /// Null once aborted or taken.
    comm: AtomicPtr<c_void>,
    /// Held during every call that takes the communicator.
    calls: Mutex<()>,
    failed: Mutex<Option<Error>>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Exchanges that are not known to be done, oldest first.
    pending: VecDeque<Exchange>,
    /// Events to use again.
    free: Vec<(Event, Event)>,
    stop: bool,
}

impl Queue {
    /// Two events to record. None are made as long as exchanges finish about as fast as they come.
    fn events(&mut self, device: &Arc<Device>) -> Result<(Event, Event)> {
        if self.free.is_empty() {
            // Another thread may be capturing, and a question about an event would end that.
            let _relaxed = Relaxed::new()?;
            // An error here is one that the watchdog will find, too.
            while let Some(Ok(true)) = self.pending.front_mut().map(Exchange::advance) {
                self.retire();
            }
        }
        match self.free.pop() {
            Some(events) => Ok(events),
            None => Ok((Event::new(device)?, Event::new(device)?)),
        }
    }

    /// The oldest exchange is done.
    fn retire(&mut self) {
        let events = self.pending.pop_front().and_then(|e| e.events);
        self.free.extend(events);
    }
}

struct Exchange {
    step: Step,
    peers: Vec<u32>,
    state: State,
    /// Before and after it on the stream; none inside a capture.
    events: Option<(Event, Event)>,
}

/// How far an exchange is, and since when.
#[derive(Clone, Copy)]
enum State {
    /// The host is inside NCCL's calls.
    Entered(Instant),
    /// On the stream, behind other work.
    Enqueued,
    /// The stream has come to it.
    Begun(Instant),
}

impl Exchange {
    /// Asks the events how far it is; true: done.
    fn advance(&mut self) -> Result<bool> {
        let Some((begin, end)) = &self.events else { return Ok(false) };
        match self.state {
            State::Entered(_) => return Ok(false),
            State::Enqueued if !begin.is_done()? => return Ok(false),
            State::Enqueued => self.state = State::Begun(Instant::now()),
            State::Begun(_) => {}
        }
        end.is_done()
    }
}

impl Watched {
    /// A communicator, and the thread that watches it until [`Watchdog`] goes.
    pub fn new(
        api: &'static Api,
        device: &Arc<Device>,
        comm: Comm,
        rank: u32,
        timeout: Duration,
    ) -> Result<(Arc<Watched>, Watchdog)> {
        let watched = Arc::new(Watched {
            api,
            device: device.clone(),
            rank,
            timeout,
            comm: AtomicPtr::new(comm),
            calls: Mutex::new(()),
            failed: Mutex::new(None),
            queue: Mutex::default(),
            wake: Condvar::new(),
        });
        let seen = watched.clone();
        let thread = thread::Builder::new()
            .name("cp-nccl-watchdog".into())
            .spawn(move || seen.watch())
            .map_err(|e| Error::internal(format!("rank {rank}: NCCL's watchdog thread: {e}")))?;
        Ok((watched.clone(), Watchdog { watched, thread: Some(thread) }))
    }

    /// One call, or a group of them, that takes the communicator.
    pub fn with<T>(&self, f: impl FnOnce(&Api, Comm) -> Result<T>) -> Result<T> {
        let _in = lock(&self.calls);
        let comm = self.comm.load(Ordering::SeqCst);
        if comm.is_null() {
            return Err(self.error());
        }
        f(self.api, comm)
    }

    /// Is every exchange done?
    pub fn is_idle(&self) -> bool {
        let mut queue = lock(&self.queue);
        // An error is the watchdog's to find.
        while let Some(Ok(true)) = queue.pending.front_mut().map(Exchange::advance) {
            queue.retire();
        }
        queue.pending.is_empty()
    }

    /// Why the communicator is lost, once it is.
    pub fn failed(&self) -> Option<Error> {
        lock(&self.failed).clone()
    }

    /// The same for calls that need it.
    fn error(&self) -> Error {
        self.failed().unwrap_or_else(|| {
            Error::internal(format!("rank {}: the NCCL communicator is gone", self.rank))
        })
    }

    /// Loses the communicator: the first cause is kept, and what is in flight is aborted. From any thread. Returns the first cause.
    pub fn fail(&self, why: Error) -> Error {
        {
            let mut failed = lock(&self.failed);
            if let Some(first) = &*failed {
                return first.clone();
            }
            *failed = Some(why.clone());
        }
        let until = Instant::now() + PATIENCE;
        let _in = loop {
            match self.calls.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => break Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => break None,
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            }
        };
        let comm = self.take();
        if !comm.is_null() {
            let _current = self.device.enter();
            // SAFETY: taken, so nobody else uses it from now on; if a blocking call is still in it, aborting is what NCCL offers to end that.
            unsafe { (self.api.comm_abort)(comm) };
        }
        why
    }

    /// The communicator, for whoever ends it; null for everybody else from now on.
    pub fn take(&self) -> Comm {
        self.comm.swap(std::ptr::null_mut(), Ordering::SeqCst)
    }

    /// The host enters NCCL for an exchange on `stream`.
    ///
    /// # Safety
    /// `stream` is a stream of the current device.
    pub unsafe fn enter(
        &self,
        step: Step,
        peers: Vec<u32>,
        stream: CUstream,
        captured: bool,
    ) -> Result<()> {
        let mut queue = lock(&self.queue);
        let events = if captured { None } else { Some(queue.events(&self.device)?) };
        if let Some((begin, _)) = &events {
            // SAFETY: the caller's promise.
            unsafe { begin.record(stream)? };
        }
        let state = State::Entered(Instant::now());
        queue.pending.push_back(Exchange { step, peers, state, events });
        Ok(())
    }

    /// The exchange of the last `enter` is on the stream.
    ///
    /// # Safety
    /// As [`Watched::enter`], with the same stream.
    pub unsafe fn entered(&self, stream: CUstream) -> Result<()> {
        let mut queue = lock(&self.queue);
        let Some(last) = queue.pending.back_mut() else { return Ok(()) };
        match &last.events {
            Some((_, end)) => {
                // SAFETY: the caller's promise.
                unsafe { end.record(stream)? };
                last.state = State::Enqueued;
            }
            None => drop(queue.pending.pop_back()),
        }
        Ok(())
    }

    /// The error when the host has been inside NCCL for too long, for the exchange of the last `enter`.
    pub fn stuck(&self) -> Option<Error> {
        let queue = lock(&self.queue);
        queue.pending.back().and_then(|last| self.late(last))
    }

    fn watch(&self) {
        let _current = self.device.enter();
        // As in `events`.
        let _relaxed = Relaxed::new();
        let nap = (self.timeout / 20).clamp(Duration::from_millis(1), Duration::from_millis(100));
        loop {
            let queue = lock(&self.queue);
            let (queue, _) = self
                .wake
                .wait_timeout_while(queue, nap, |q| !q.stop)
                .unwrap_or_else(PoisonError::into_inner);
            if queue.stop || self.failed().is_some() {
                return;
            }
            drop(queue);
            if let Err(why) = self.look() {
                self.fail(why);
                return;
            }
        }
    }

    /// One look at the oldest exchanges and at NCCL's errors.
    fn look(&self) -> Result<()> {
        self.look_at_queue()?;
        // A call in progress has its own errors.
        let Ok(_in) = self.calls.try_lock() else { return Ok(()) };
        let comm = self.comm.load(Ordering::SeqCst);
        if comm.is_null() {
            return Ok(());
        }
        let mut state = SUCCESS;
        // SAFETY: it lives: whoever ends it holds the lock, or has set it to null.
        let code = unsafe { (self.api.comm_get_async_error)(comm, &mut state) };
        let bad = [code, state].into_iter().find(|c| ![SUCCESS, IN_PROGRESS].contains(c));
        let Some(bad) = bad else { return Ok(()) };
        // SAFETY: as above.
        let text = unsafe { self.api.explain(bad, comm) };
        Err(Error::new(Status::Nccl, format!("{}: {text}", self.place())))
    }

    fn look_at_queue(&self) -> Result<()> {
        let mut queue = lock(&self.queue);
        while let Some(oldest) = queue.pending.front_mut() {
            let done = oldest.advance().map_err(|e| {
                Error::new(e.status, format!("{}: {}", where_(self.rank, oldest), e.text))
            })?;
            if !done {
                return self.late(oldest).map_or(Ok(()), Err);
            }
            queue.retire();
        }
        Ok(())
    }

    /// The error of an exchange whose deadline has passed.
    fn late(&self, exchange: &Exchange) -> Option<Error> {
        let (since, what) = match exchange.state {
            State::Entered(since) => (since, "NCCL has not enqueued the exchange"),
            State::Enqueued => return None,
            State::Begun(since) => (since, "the exchange is not through"),
        };
        let waited = since.elapsed();
        (waited > self.timeout).then(|| {
            let text = format!(
                "{}: {what} after {:.1} s (deadline {:.1} s): a peer did not come, died, or exchanges something else",
                where_(self.rank, exchange),
                waited.as_secs_f64(),
                self.timeout.as_secs_f64(),
            );
            Error::new(Status::Timeout, text)
        })
    }

    /// Where the oldest exchange is, or that there is none.
    fn place(&self) -> String {
        match lock(&self.queue).pending.front() {
            Some(oldest) => where_(self.rank, oldest),
            None => format!("rank {}, no exchange pending", self.rank),
        }
    }
}

/// Ends the watching thread when dropped.
pub struct Watchdog {
    watched: Arc<Watched>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        lock(&self.watched.queue).stop = true;
        self.watched.wake.notify_all();
        let Some(thread) = self.thread.take() else { return };
        // It may be inside an abort; should that hang, the thread is left behind.
        let until = Instant::now() + 5 * PATIENCE;
        while !thread.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_micros(200));
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

/// `rank 1, call 7, step 5, stage 1, exchange with ranks 0 and 2`.
fn where_(rank: u32, exchange: &Exchange) -> String {
    let Step { index, stage, call } = exchange.step;
    let place = match exchange.step {
        super::WARM_UP => "warm-up".into(),
        _ => format!("call {call}, step {index}, stage {stage}"),
    };
    let names: Vec<String> = exchange.peers.iter().map(u32::to_string).collect();
    let peers = match names.split_last() {
        Some((last, [])) => format!("rank {last}"),
        Some((last, rest)) => format!("ranks {} and {last}", rest.join(", ")),
        None => "nobody".into(),
    };
    format!("rank {rank}, {place}, exchange with {peers}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
