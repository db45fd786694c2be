//! Ranks are threads of one process, each with a device of its own or several on one: a receiver's stream copies straight from the
//! sender's memory. The hosts meet at a `board`; streams wait for events, hosts for each other, never a host for a device.
//!
//! Events are made once: one per rank ("what I send is ready") and one per ordered pair ("I have taken it"). Recording them again from
//! exchange to exchange is safe because a stream waits for what an event marked when the wait was enqueued, and a rank comes to its next
//! exchange only after all its peers have enqueued their waits of this one.

use super::board::{Board, Lane, Seat};
use super::{DeviceTransport, Step};
use crate::driver::{self, CUdeviceptr, CUstream, Device, Event};
use crate::error::{Error, Result, Status};
use crate::transport::roll::lock;
use crate::transport::{Message, Transport};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

/// What the ranks of a group share.
struct Shared {
    board: Arc<Board>,
    size: u32,
    /// Recorded by the rank. All events are there before the rank's first exchange.
    ready: Vec<OnceLock<Event>>,
    /// Of the ordered pair (from, to) at from · size + to: recorded by `to`.
    taken: Vec<OnceLock<Event>>,
}

impl Shared {
    fn new(size: u32) -> Shared {
        let events = |n: u32| (0..n).map(|_| OnceLock::new()).collect();
        Shared {
            board: Arc::new(Board::new(size)),
            size,
            ready: events(size),
            taken: events(size * size),
        }
    }

    fn taken(&self, from: u32, to: u32) -> &OnceLock<Event> {
        &self.taken[from as usize * self.size as usize + to as usize]
    }
}

struct Local {
    shared: Arc<Shared>,
    rank: u32,
    seat: Seat,
}

/// One rank's stream, and the events.
struct OnStream<'a> {
    shared: &'a Shared,
    rank: u32,
    stream: CUstream,
}

fn event(slot: &OnceLock<Event>) -> Result<&Event> {
    slot.get().ok_or_else(|| Error::internal("cuda local: a peer's event is not there"))
}

impl Lane for OnStream<'_> {
    fn mark_ready(&mut self) -> Result<()> {
        // SAFETY: the stream is one of the current device (`exchange`), which this rank's events are of.
        unsafe { event(&self.shared.ready[self.rank as usize])?.record(self.stream) }
    }

    fn wait_ready(&mut self, peer: u32) -> Result<()> {
        // SAFETY: as above; the events live as long as `shared`.
        unsafe { driver::wait(self.stream, event(&self.shared.ready[peer as usize])?.raw()) }
    }

    unsafe fn copy(&mut self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise; with unified addressing the addresses tell the devices.
        unsafe {
            driver::copy_on_device(to as CUdeviceptr, from as CUdeviceptr, bytes, self.stream)
        }
    }

    fn mark_taken(&mut self, peer: u32) -> Result<()> {
        // SAFETY: as in `mark_ready`.
        unsafe { event(self.shared.taken(peer, self.rank))?.record(self.stream) }
    }

    fn wait_taken(&mut self, peer: u32) -> Result<()> {
        // SAFETY: as in `wait_ready`.
        unsafe { driver::wait(self.stream, event(self.shared.taken(self.rank, peer))?.raw()) }
    }
}

impl DeviceTransport for Local {
    fn name(&self) -> &'static str {
        "cuda local"
    }

    fn same_pieces(&self) -> bool {
        false
    }

    fn capturable(&self) -> Result<()> {
        Err(super::not_capturable(self.rank, self.name(), "the ranks' host threads meet in it"))
    }

    fn meets(&self) -> bool {
        true
    }

    unsafe fn exchange(
        &mut self,
        sends: &[Message],
        recvs: &[Message],
        stream: CUstream,
        step: Step,
    ) -> Result<()> {
        let mut lane = OnStream { shared: &self.shared, rank: self.rank, stream };
        // SAFETY: the caller's promise.
        unsafe { self.seat.exchange(sends, recvs, &mut lane, step) }
    }

    fn failed(&self) -> Option<Error> {
        self.seat.failed()
    }

    fn give_up(&mut self, why: Error) {
        self.seat.give_up(why);
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        self.seat.aborter()
    }

    fn memory_bytes(&self) -> usize {
        0
    }
}

/// Groups that are being made. Rank 0 owns what a group shares until the others have found it here.
struct Meetings {
    /// Number of the last one.
    last: u64,
    open: Vec<(u64, Weak<Shared>)>,
}

static MEETINGS: Mutex<Meetings> = Mutex::new(Meetings { last: 0, open: Vec::new() });

/// Makes the transport of the ranks of `control`, which are threads of this process. Collective over all of them: one small allgather. It
/// fails on all ranks if it fails on one. `timeout` bounds this call and the hosts' part of every exchange.
pub fn make(
    device: &Arc<Device>,
    control: &mut dyn Transport,
    timeout: Duration,
) -> Result<Box<dyn DeviceTransport>> {
    let (rank, size) = (control.rank(), control.size());
    let events = (0..size).map(|_| Event::new(device)).collect::<Result<Vec<Event>>>();
    let open = (rank == 0).then(|| open_meeting(size));
    let mine = Card {
        process: process(),
        meeting: open.as_ref().map_or(0, |(number, _)| *number),
        ordinal: u64::from(device.ordinal),
        failed: u64::from(events.is_err()),
    };
    let members: Vec<u32> = (0..size).collect();
    let all = control.allgather(&members, &mine.encode(), Instant::now() + timeout)?;
    let cards: Vec<Card> = all.chunks(Card::BYTES).map(Card::decode).collect();
    let mut events = events?;
    if let Some(peer) = cards.iter().position(|c| c.process != mine.process) {
        return Err(Error::unsupported(format!(
            "rank {rank}: the transport `cuda local` is for ranks that are threads of one process; rank {peer} is in another"
        )));
    }
    if let Some(peer) = cards.iter().position(|c| c.failed != 0) {
        return Err(Error::new(
            Status::Cuda,
            format!("rank {rank}: rank {peer} could not make its events; its own error says why"),
        ));
    }
    for card in &cards {
        device.reach(card.ordinal as u32)?;
    }
    let shared = match open {
        Some((_, shared)) => shared,
        None => find_meeting(cards[0].meeting).ok_or_else(|| {
            Error::new(Status::PeerLost, format!("rank {rank}: rank 0 left the group"))
        })?,
    };
    for peer in (0..size).filter(|p| *p != rank) {
        let _ = events.pop().map(|e| shared.taken(peer, rank).set(e));
    }
    let _ = events.pop().map(|e| shared.ready[rank as usize].set(e));
    let seat = Seat::new(&shared.board, rank, timeout);
    Ok(Box::new(Local { shared, rank, seat }))
}

fn open_meeting(size: u32) -> (u64, Arc<Shared>) {
    let shared = Arc::new(Shared::new(size));
    let mut meetings = lock(&MEETINGS);
    meetings.open.retain(|(_, m)| m.strong_count() > 0);
    meetings.last += 1;
    let number = meetings.last;
    meetings.open.push((number, Arc::downgrade(&shared)));
    (number, shared)
}

fn find_meeting(number: u64) -> Option<Arc<Shared>> {
    let meetings = lock(&MEETINGS);
    meetings.open.iter().find(|(n, _)| *n == number).and_then(|(_, m)| m.upgrade())
}

/// Tells processes apart, also across hosts and containers.
fn process() -> u64 {
    static PROCESS: OnceLock<u64> = OnceLock::new();
    *PROCESS.get_or_init(|| RandomState::new().hash_one(std::process::id()))
}

/// What a rank shows the others.
struct Card {
    process: u64,
    /// Of rank 0.
    meeting: u64,
    ordinal: u64,
    failed: u64,
}

impl Card {
    const BYTES: usize = 32;

    fn encode(&self) -> [u8; Card::BYTES] {
        let mut out = [0; Card::BYTES];
        let words = [self.process, self.meeting, self.ordinal, self.failed];
        for (to, word) in out.chunks_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    fn decode(bytes: &[u8]) -> Card {
        let word =
            |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().expect("eight bytes"));
        Card { process: word(0), meeting: word(1), ordinal: word(2), failed: word(3) }
    }
}
