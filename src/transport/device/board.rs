//! Where ranks that are threads meet to exchange device memory: the hosts' half, which knows nothing of CUDA.
//!
//! Every ordered pair of ranks has one slot. An exchange of a rank is: mark its stream (what it sends is ready) and post the pieces of all
//! sends; serve the receives as they come in any order: wait on the stream for the sender's mark, enqueue the copies, mark them as taken,
//! say so in the slot; collect what was taken, and let the stream wait for those marks. No rank waits for anybody before all its sends
//! are posted, and all that a stream waits for was enqueued before: neither hosts nor streams can wait in a circle.
//!
//! When a host's part of an exchange ends, well or not, its stream's later work is ordered behind every read of what it sent.

use super::Step;
use crate::error::{Error, Result, Status};
use crate::transport::roll::{Roll, lock};
use crate::transport::streams::{self, Streams};
use crate::transport::{Message, Piece};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Rounds of looking before a sleep, if every rank can have a core.
const SPINS: u32 = 500;

/// The stream of one rank in an exchange. Everything is enqueued; nothing waits on the host.
pub(super) trait Lane {
    /// Marks the work so far: what this rank sends is ready.
    fn mark_ready(&mut self) -> Result<()>;

    /// Later work waits for the mark of what `peer` sends.
    fn wait_ready(&mut self, peer: u32) -> Result<()>;

    /// Copies between memories of devices.
    ///
    /// # Safety
    /// Both ranges stay valid until the copy is done.
    unsafe fn copy(&mut self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()>;

    /// Marks the work so far: what `peer` sent has been taken.
    fn mark_taken(&mut self, peer: u32) -> Result<()>;

    /// Later work waits for the mark of what `peer` took.
    fn wait_taken(&mut self, peer: u32) -> Result<()>;
}

/// What is in the slot of one ordered pair. Only the sender posts and collects; only the receiver takes, and holds the lock meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Empty,
    Posted,
    /// Copies are enqueued, and marked.
    Taken,
    /// The receiver failed in the middle: some copies may be enqueued. It leaves the group.
    Torn,
}

struct Slot {
    state: State,
    pieces: Vec<Piece>,
    bytes: usize,
}

/// One per group.
pub(super) struct Board {
    roll: Roll,
    /// The ordered pair (from, to) at from · size + to.
    slots: Vec<Mutex<Slot>>,
}

impl Board {
    pub fn new(size: u32) -> Board {
        let slot = || Mutex::new(Slot { state: State::Empty, pieces: Vec::new(), bytes: 0 });
        Board { roll: Roll::new(size), slots: (0..size * size).map(|_| slot()).collect() }
    }

    fn slot(&self, from: u32, to: u32) -> &Mutex<Slot> {
        &self.slots[from as usize * self.roll.size() as usize + to as usize]
    }
}

/// One rank's place at the board.
pub(super) struct Seat {
    board: Arc<Board>,
    rank: u32,
    timeout: Duration,
    sends: Streams,
    recvs: Streams,
    failed: Option<Error>,
    spins: u32,
}

impl Seat {
    pub fn new(board: &Arc<Board>, rank: u32, timeout: Duration) -> Seat {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Seat {
            board: Arc::clone(board),
            rank,
            timeout,
            sends: Streams::default(),
            recvs: Streams::default(),
            failed: None,
            spins: if board.roll.size() as usize <= cores { SPINS } else { 0 },
        }
    }

    /// Returns when every peer has enqueued what it takes from this rank, and this rank what it takes from them; the transport is lost
    /// after an error.
    ///
    /// # Safety
    /// The pieces are valid for `lane`'s copies, and for those of the peers' lanes, until work that `lane` is given later begins.
    pub unsafe fn exchange(
        &mut self,
        sends: &[Message],
        recvs: &[Message],
        lane: &mut dyn Lane,
        step: Step,
    ) -> Result<()> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        streams::check_peers(self.rank, self.board.roll.size(), sends, recvs)?;
        self.sends.fill(sends);
        self.recvs.fill(recvs);
        let mut run = Run { seat: self, lane };
        match run.meet(step).and_then(|()| run.end()) {
            Ok(()) => Ok(()),
            Err(e) => run.seat.fail(e),
        }
    }

    /// An error since the last call.
    pub fn failed(&self) -> Option<Error> {
        self.usable().err()
    }

    /// Later calls fail with `why`, and so do peers that wait for this rank. Nothing is in flight between calls.
    pub fn give_up(&mut self, why: Error) {
        let _ = self.fail::<()>(why);
    }

    pub fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        let (board, rank) = (Arc::clone(&self.board), self.rank);
        Arc::new(move || board.roll.abort(rank))
    }

    fn usable(&self) -> Result<()> {
        match &self.failed {
            Some(e) => Err(e.clone()),
            None => self.board.roll.not_aborted(),
        }
    }

    fn fail<T>(&mut self, e: Error) -> Result<T> {
        self.board.roll.leave(self.rank, Some(e.clone()));
        self.failed.get_or_insert(e.clone());
        Err(e)
    }

    fn post_sends(&self) {
        for s in self.sends.iter() {
            let mut slot = lock(self.board.slot(self.rank, s.peer));
            slot.pieces.clear();
            slot.pieces.extend_from_slice(&s.pieces);
            slot.bytes = s.bytes;
            slot.state = State::Posted;
            drop(slot);
            self.board.roll.ring(s.peer);
        }
    }

    /// Takes what has come and sees what was taken; true when nothing is left. That a peer is here is asked before its slot is looked at:
    /// what it did before it left still counts.
    fn progress(&mut self, lane: &mut dyn Lane) -> Result<bool> {
        let Seat { board, rank, sends, recvs, .. } = self;
        let me = *rank;
        let mut gone = None;
        for s in recvs.iter_mut().filter(|s| !s.done) {
            let here = board.roll.is_here(s.peer);
            let mut slot = lock(board.slot(s.peer, me));
            if slot.state == State::Posted {
                if slot.bytes != s.bytes {
                    // The sender learns it when this rank leaves.
                    return Err(streams::lengths_differ(s.peer, slot.bytes, me, s.bytes));
                }
                // SAFETY: both sides keep their pieces valid for the lanes' copies (`exchange`); the lengths are equal.
                unsafe { take(&mut slot, s.peer, &s.pieces, lane)? };
                s.done = true;
                drop(slot);
                board.roll.ring(s.peer);
            } else if !here {
                gone = gone.or(Some(s.peer));
            }
        }
        for s in sends.iter_mut().filter(|s| !s.done) {
            let here = board.roll.is_here(s.peer);
            // Waits for a receiver that is enqueueing its copies right now.
            let mut slot = lock(board.slot(me, s.peer));
            if slot.state == State::Taken {
                slot.state = State::Empty;
                s.done = true;
            } else if !here {
                gone = gone.or(Some(s.peer));
            }
        }
        match gone {
            Some(peer) => Err(board.roll.lost(me, peer)),
            None => Ok(recvs.all_done() && sends.all_done()),
        }
    }

    fn late(&self, step: Step) -> Error {
        let mut open = self.recvs.iter().chain(self.sends.iter()).filter(|s| !s.done);
        let peer = open.next().map_or("?".into(), |s| s.peer.to_string());
        Error::new(
            Status::Timeout,
            format!(
                "rank {}: rank {peer} did not come to its part of an exchange within {} ms (step {} of call {}, stage {})",
                self.rank,
                self.timeout.as_millis(),
                step.index,
                step.call,
                step.stage
            ),
        )
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.board.roll.leave(self.rank, None);
    }
}

/// An exchange under way. However it ends, nothing of it stays on the board.
struct Run<'a> {
    seat: &'a mut Seat,
    lane: &'a mut dyn Lane,
}

impl Run<'_> {
    fn meet(&mut self, step: Step) -> Result<()> {
        if self.seat.sends.iter().next().is_some() {
            self.lane.mark_ready()?;
            self.seat.post_sends();
        }
        let deadline = Instant::now() + self.seat.timeout;
        let mut spins = self.seat.spins;
        loop {
            self.seat.usable()?;
            if self.seat.progress(self.lane)? {
                return Ok(());
            }
            if spins > 0 {
                spins -= 1;
                std::hint::spin_loop();
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.seat.late(step));
            }
            self.seat.board.roll.sleep(self.seat.rank, left);
        }
    }

    /// Takes back what nobody took, and lets the stream wait for the rest.
    fn end(&mut self) -> Result<()> {
        let mut result = Ok(());
        for s in self.seat.sends.iter_mut() {
            if !s.done {
                let mut slot = lock(self.seat.board.slot(self.seat.rank, s.peer));
                s.done = matches!(slot.state, State::Taken | State::Torn);
                slot.state = State::Empty;
            }
            if s.done {
                result = result.and(self.lane.wait_taken(s.peer));
            }
        }
        self.seat.sends.clear();
        self.seat.recvs.clear();
        result
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let why = Error::internal(format!(
                "rank {}: ended in a panic in the middle of an exchange",
                self.seat.rank
            ));
            let _ = self.seat.fail::<()>(why);
        }
        let _ = self.end();
    }
}

/// Enqueues the copies of what `peer` posted, and marks them.
///
/// # Safety
/// The pieces on both sides are valid for the lane's copies, and of equal total length.
unsafe fn take(slot: &mut Slot, peer: u32, to: &[Piece], lane: &mut dyn Lane) -> Result<()> {
    slot.state = State::Torn;
    let copied = lane.wait_ready(peer).and_then(|()| {
        // SAFETY: the caller's promise.
        unsafe { copy_streams(&slot.pieces, to, lane) }
    });
    // After an error too: the sender must not overwrite what the copies that were enqueued still read.
    let marked = lane.mark_taken(peer);
    copied.and(marked)?;
    slot.state = State::Taken;
    Ok(())
}

/// Copies one byte stream cut into `from` onto one cut into `to`, in runs as long as both sides allow. The lengths are equal, no piece is
/// empty.
///
/// # Safety
/// As [`Lane::copy`].
unsafe fn copy_streams(from: &[Piece], to: &[Piece], lane: &mut dyn Lane) -> Result<()> {
    let mut run = (std::ptr::null_mut::<u8>(), std::ptr::null::<u8>(), 0);
    let (mut i, mut at) = (0, 0);
    for target in to {
        let mut filled = 0;
        while filled < target.len {
            let n = (from[i].len - at).min(target.len - filled);
            let (into, source) =
                (target.ptr.wrapping_add(filled), from[i].ptr.wrapping_add(at).cast_const());
            if run.2 > 0 && run.0.wrapping_add(run.2) == into && run.1.wrapping_add(run.2) == source
            {
                run.2 += n;
            } else {
                // SAFETY: the caller's promise; ranges lie within pieces that follow each other.
                unsafe { copy_run(run, lane)? };
                run = (into, source, n);
            }
            filled += n;
            at += n;
            if at == from[i].len {
                (i, at) = (i + 1, 0);
            }
        }
    }
    // SAFETY: as above.
    unsafe { copy_run(run, lane) }
}

/// # Safety
/// As [`Lane::copy`].
unsafe fn copy_run(
    (to, from, bytes): (*mut u8, *const u8, usize),
    lane: &mut dyn Lane,
) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { lane.copy(to, from, bytes) }
}
