//! Ranks are threads of one process: a receiver copies straight from the sender's memory.
//!
//! Every ordered pair of ranks has one slot, because a rank has at most one group in flight and a group has one stream per peer. The
//! sender posts its pieces there, the receiver copies them when it has posted the matching receive, the sender collects the slot.
//! That is a rendezvous in strict order per pair.

use super::roll::{Roll, lock};
use super::streams::{self, Streams};
use super::{Message, Piece, Transport};
use crate::error::{Error, Result, Status};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Longest sleep of one `wait`.
const NAP: Duration = Duration::from_millis(4);
/// Rounds of `test` before a sleep, if every rank can have a core.
const SPINS: u32 = 200;

/// What is in the slot of one ordered pair. Only the sender posts and collects; only the receiver copies.
enum State {
    Empty,
    Posted,
    /// The receiver reads the sender's memory right now.
    Copying,
    Done,
}

struct Slot {
    state: State,
    pieces: Vec<Piece>,
    bytes: usize,
}

struct Blob {
    members: u64,
    bytes: Vec<u8>,
}

struct Hub {
    size: u32,
    roll: Roll,
    /// Data of the ordered pair (from, to) at from · size + to.
    slots: Vec<Mutex<Slot>>,
    /// Allgather contributions of the ordered pair, at most two deep.
    blobs: Vec<Mutex<VecDeque<Blob>>>,
}

impl Hub {
    fn new(size: u32) -> Hub {
        let pairs = size as usize * size as usize;
        let slot = || Mutex::new(Slot { state: State::Empty, pieces: Vec::new(), bytes: 0 });
        Hub {
            size,
            roll: Roll::new(size),
            slots: (0..pairs).map(|_| slot()).collect(),
            blobs: (0..pairs).map(|_| Mutex::new(VecDeque::new())).collect(),
        }
    }

    fn pair(&self, from: u32, to: u32) -> usize {
        from as usize * self.size as usize + to as usize
    }

    fn slot(&self, from: u32, to: u32) -> MutexGuard<'_, Slot> {
        lock(&self.slots[self.pair(from, to)])
    }
}

struct Local {
    hub: Arc<Hub>,
    rank: u32,
    sends: Streams,
    recvs: Streams,
    in_flight: bool,
    failed: Option<Error>,
    spins: u32,
}

impl Local {
    fn usable(&self) -> Result<()> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        self.hub.roll.not_aborted()
    }

    /// Remembers the error and gives up what is in flight.
    fn fail<T>(&mut self, e: Error) -> Result<T> {
        self.leave(Some(e.clone()));
        self.failed.get_or_insert(e.clone());
        Err(e)
    }

    /// Takes back what was posted, waiting for a peer that is reading it, and tells the peers why.
    fn leave(&mut self, why: Option<Error>) {
        let hub = &self.hub;
        for s in self.sends.iter_mut().filter(|s| !s.done) {
            loop {
                let mut slot = hub.slot(self.rank, s.peer);
                if !matches!(slot.state, State::Copying) {
                    slot.state = State::Empty;
                    break;
                }
                drop(slot);
                hub.roll.sleep(self.rank, NAP);
            }
            s.done = true;
        }
        self.sends.clear();
        self.recvs.clear();
        self.in_flight = false;
        self.hub.roll.leave(self.rank, why);
    }

    /// Moves what can be moved. A peer's presence is read before its slot: what it finished before it left still counts.
    fn progress(&mut self) -> Result<bool> {
        let (hub, me) = (&self.hub, self.rank);
        let mut gone = None;
        for s in self.recvs.iter_mut().filter(|s| !s.done) {
            let here = hub.roll.is_here(s.peer);
            let mut slot = hub.slot(s.peer, me);
            match slot.state {
                // The reason reaches the sender when this rank gives up.
                State::Posted if slot.bytes != s.bytes => {
                    return Err(streams::lengths_differ(s.peer, slot.bytes, me, s.bytes));
                }
                State::Posted => {
                    slot.state = State::Copying;
                    let from = std::mem::take(&mut slot.pieces);
                    drop(slot);
                    // SAFETY: both sides keep their pieces valid while in flight (`start`); the sender does not touch or free
                    // its own while the state is Copying (`leave` waits), and the total lengths are equal.
                    unsafe { copy_pieces(&from, &s.pieces) };
                    let mut slot = hub.slot(s.peer, me);
                    slot.pieces = from;
                    slot.state = State::Done;
                    s.done = true;
                    drop(slot);
                    hub.roll.ring(s.peer);
                }
                _ if !here => gone = gone.or(Some(s.peer)),
                _ => {}
            }
        }
        for s in self.sends.iter_mut().filter(|s| !s.done) {
            let here = hub.roll.is_here(s.peer);
            let mut slot = hub.slot(me, s.peer);
            match slot.state {
                State::Done => {
                    slot.state = State::Empty;
                    s.done = true;
                }
                _ if !here => gone = gone.or(Some(s.peer)),
                _ => {}
            }
        }
        match gone {
            Some(peer) => Err(hub.roll.lost(me, peer)),
            None => Ok(self.recvs.all_done() && self.sends.all_done()),
        }
    }

    fn gather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        let (hub, me) = (Arc::clone(&self.hub), self.rank);
        let hash = streams::members_hash(members);
        for &to in members.iter().filter(|&&m| m != me) {
            lock(&hub.blobs[hub.pair(me, to)])
                .push_back(Blob { members: hash, bytes: mine.to_vec() });
            hub.roll.ring(to);
        }
        let mut got: Vec<Option<Blob>> = members.iter().map(|_| None).collect();
        loop {
            let mut missing = None;
            let mut gone = None;
            for (&from, blob) in members.iter().zip(&mut got) {
                if from == me || blob.is_some() {
                    continue;
                }
                let here = hub.roll.is_here(from);
                *blob = lock(&hub.blobs[hub.pair(from, me)]).pop_front();
                if blob.is_none() {
                    missing = missing.or(Some(from));
                    if !here {
                        gone = gone.or(Some(from));
                    }
                }
            }
            if let Some((&peer, _)) = members
                .iter()
                .zip(&got)
                .find(|(_, b)| b.as_ref().is_some_and(|b| b.members != hash))
            {
                return self.fail(streams::members_differ(me, peer, members));
            }
            let Some(missing) = missing else { break };
            if let Err(e) = self.usable() {
                return self.fail(e);
            }
            if let Some(peer) = gone {
                return self.fail(hub.roll.lost(me, peer));
            }
            let now = Instant::now();
            if now >= deadline {
                return self.fail(streams::not_come(me, missing, "an allgather"));
            }
            hub.roll.sleep(me, deadline - now);
        }
        let mut all = Vec::with_capacity(members.len() * mine.len());
        for (&from, blob) in members.iter().zip(&got) {
            let bytes = blob.as_ref().map_or(mine, |b| &b.bytes);
            if bytes.len() != mine.len() {
                return Err(streams::blobs_differ(me, mine.len(), from, bytes.len()));
            }
            all.extend_from_slice(bytes);
        }
        Ok(all)
    }
}

impl Transport for Local {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.hub.size
    }

    fn name(&self) -> &'static str {
        "local"
    }

    unsafe fn start(&mut self, sends: &[Message], recvs: &[Message]) -> Result<()> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if self.in_flight {
            return Err(streams::in_flight(self.rank, "start"));
        }
        streams::check_peers(self.rank, self.hub.size, sends, recvs)?;
        self.sends.fill(sends);
        self.recvs.fill(recvs);
        self.in_flight = true;
        for s in self.sends.iter() {
            let mut slot = self.hub.slot(self.rank, s.peer);
            slot.pieces.clear();
            slot.pieces.extend_from_slice(&s.pieces);
            slot.bytes = s.bytes;
            slot.state = State::Posted;
            drop(slot);
            self.hub.roll.ring(s.peer);
        }
        Ok(())
    }

    fn test(&mut self) -> Result<bool> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if !self.in_flight {
            return Ok(true);
        }
        match self.progress() {
            Ok(done) => {
                self.in_flight = !done;
                Ok(done)
            }
            Err(e) => self.fail(e),
        }
    }

    fn wait(&mut self) -> Result<bool> {
        for _ in 0..=self.spins {
            if self.test()? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        self.hub.roll.sleep(self.rank, NAP);
        self.test()
    }

    fn waiting_for(&self) -> Option<u32> {
        self.recvs.iter().chain(self.sends.iter()).find(|s| !s.done).map(|s| s.peer)
    }

    fn give_up(&mut self, why: Error) {
        let _ = self.fail::<()>(why);
    }

    fn cancel(&mut self) {
        self.leave(Some(streams::cancelled(Status::PeerLost, self.rank)));
        self.failed.get_or_insert(streams::cancelled(Status::Aborted, self.rank));
    }

    fn allgather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if self.in_flight {
            return Err(streams::in_flight(self.rank, "allgather"));
        }
        streams::check_members(self.rank, self.hub.size, members, mine)?;
        self.gather(members, mine, deadline)
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        let (hub, rank) = (Arc::clone(&self.hub), self.rank);
        Arc::new(move || hub.roll.abort(rank))
    }

    fn memory_bytes(&self) -> usize {
        let pair = size_of::<Mutex<Slot>>() + size_of::<Mutex<VecDeque<Blob>>>();
        let posted: usize =
            (0..self.hub.size).map(|to| self.hub.slot(self.rank, to).pieces.capacity()).sum();
        self.hub.size as usize * pair
            + posted * size_of::<Piece>()
            + self.sends.memory_bytes()
            + self.recvs.memory_bytes()
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.leave(None);
    }
}

/// Copies one byte stream cut into `from` onto one cut into `to`; the total lengths are equal.
///
/// # Safety
/// Every piece is valid for reading (`from`) or writing (`to`), and the two do not overlap.
unsafe fn copy_pieces(from: &[Piece], to: &[Piece]) {
    let (mut i, mut at) = (0, 0);
    for target in to {
        let mut filled = 0;
        while filled < target.len {
            let n = (from[i].len - at).min(target.len - filled);
            // SAFETY: both ranges lie within their pieces.
            unsafe {
                std::ptr::copy_nonoverlapping(from[i].ptr.add(at), target.ptr.add(filled), n)
            };
            filled += n;
            at += n;
            if at == from[i].len {
                (i, at) = (i + 1, 0);
            }
        }
    }
}

fn handle(hub: &Arc<Hub>, rank: u32) -> Box<dyn Transport> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    Box::new(Local {
        hub: Arc::clone(hub),
        rank,
        sends: Streams::default(),
        recvs: Streams::default(),
        in_flight: false,
        failed: None,
        spins: if hub.size as usize <= cores { SPINS } else { 0 },
    })
}

/// The transports of all ranks of a new group, to be moved into one thread each.
pub fn local_group(size: u32) -> Vec<Box<dyn Transport>> {
    let hub = Arc::new(Hub::new(size));
    (0..size).map(|rank| handle(&hub, rank)).collect()
}

/// What names a meeting of threads: the unique id of a group.
pub type Key = [u8; 128];

struct Meeting {
    size: u32,
    hub: Option<Arc<Hub>>,
    came: Vec<bool>,
    failed: Option<Error>,
    deadline: Instant,
    /// Set when all have come: the group lives as long as one of its transports.
    live: Weak<Hub>,
}

static MEETINGS: Mutex<Option<HashMap<Key, Meeting>>> = Mutex::new(None);
static MET: Condvar = Condvar::new();

/// Meets the other threads that call with the same `key`. All give the same `size` and each a rank of its own; otherwise all of them fail.
/// A rank that has not come by `deadline` is named in a `Timeout`. Blocks.
pub fn join(key: Key, rank: u32, size: u32, deadline: Instant) -> Result<Box<dyn Transport>> {
    if rank >= size {
        return Err(Error::argument(format!(
            "rank is {rank}; allowed is 0..{size}, the size of the group"
        )));
    }
    let mut guard = lock(&MEETINGS);
    let meetings = guard.get_or_insert_with(HashMap::new);
    let now = Instant::now();
    meetings.retain(|_, m| {
        m.live.strong_count() > 0 || m.hub.is_some() || (m.failed.is_some() && now < m.deadline)
    });
    let new = || Meeting {
        size,
        hub: Some(Arc::new(Hub::new(size))),
        came: vec![false; size as usize],
        failed: None,
        deadline,
        live: Weak::new(),
    };
    let m = meetings.entry(key).or_insert_with(new);
    if let Some(e) = &m.failed {
        return Err(e.clone());
    }
    let Some(hub) = m.hub.clone() else {
        return Err(Error::argument(format!(
            "rank {rank}: this unique id belongs to a group that is already complete"
        )));
    };
    if m.size != size {
        let text = format!(
            "rank {rank} joins a group of {size} ranks, others join it as a group of {}",
            m.size
        );
        return meeting_fails(m, Error::new(Status::Mismatch, text));
    }
    if m.came[rank as usize] {
        return meeting_fails(
            m,
            Error::new(
                Status::Mismatch,
                format!("rank {rank} joins the group twice; every rank joins once"),
            ),
        );
    }
    m.came[rank as usize] = true;
    m.deadline = m.deadline.max(deadline);
    if m.came.iter().all(|&c| c) {
        m.live = Arc::downgrade(&hub);
        m.hub = None;
        MET.notify_all();
        return Ok(handle(&hub, rank));
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        guard = MET.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        // The entry is gone when the group completed and its other transports were dropped already; `hub` keeps it alive here.
        let Some(m) = guard.as_mut().and_then(|all| all.get_mut(&key)) else {
            return Err(Error::internal(format!("rank {rank}: a meeting of threads vanished")));
        };
        if let Some(e) = &m.failed {
            return Err(e.clone());
        }
        if m.hub.is_none() {
            return Ok(handle(&hub, rank));
        }
        if Instant::now() >= deadline {
            let missing = m.came.iter().position(|&c| !c).unwrap_or(0) as u32;
            return meeting_fails(m, streams::not_come(rank, missing, "the group's init"));
        }
    }
}

fn meeting_fails<T>(m: &mut Meeting, e: Error) -> Result<T> {
    m.failed = Some(e.clone());
    m.hub = None;
    MET.notify_all();
    Err(e)
}
