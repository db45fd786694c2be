//! The board against streams that run later and in any order: every rank's operations are queued, all of several exchanges, and then a
//! scheduler picks at random among those that no event holds back.

use super::Step;
use super::board::{Board, Lane, Seat};
use crate::error::{Error, Result, Status};
use crate::transport::tests::{Cut, Random, content};
use crate::transport::{Message, Piece};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

enum Op {
    Record(usize, u64),
    /// Waits for this recording of the event.
    Wait(usize, u64),
    Copy(Piece, *const u8),
    Write(Piece, Vec<u8>),
    Check(Piece, Vec<u8>, String),
}

// SAFETY: addresses into memory that the test keeps, used by the scheduler alone.
unsafe impl Send for Op {}

/// What a lane leaves out, to show that the scheduler would find it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    WaitReady,
    WaitTaken,
    MarkReady,
    MarkTaken,
}

struct World {
    size: u32,
    queues: Vec<Mutex<VecDeque<Op>>>,
    /// How often each event has been recorded: ready of a rank, then taken of (from, to).
    recorded: Vec<Mutex<u64>>,
}

impl World {
    fn new(size: u32) -> World {
        World {
            size,
            queues: (0..size).map(|_| Mutex::default()).collect(),
            recorded: (0..size + size * size).map(|_| Mutex::new(0)).collect(),
        }
    }

    fn lane(&self, rank: u32, fault: Fault) -> Queue<'_> {
        Queue { world: self, rank, fault }
    }

    /// Runs everything in a random order that the events allow. Panics where nothing can go on, or where a check fails.
    fn run(&self, seed: u64) {
        let mut random = Random::new(seed);
        let mut done = vec![0; self.recorded.len()];
        let mut queues: Vec<_> = self.queues.iter().map(|q| q.lock().unwrap()).collect();
        loop {
            let open = |q: &VecDeque<Op>| match q.front() {
                Some(Op::Wait(event, version)) => done[*event] >= *version,
                other => other.is_some(),
            };
            let ranks: Vec<usize> = (0..queues.len()).filter(|r| open(&queues[*r])).collect();
            if ranks.is_empty() {
                assert!(queues.iter().all(|q| q.is_empty()), "the streams wait in a circle");
                return;
            }
            match queues[ranks[random.below(ranks.len())]].pop_front().expect("not empty") {
                Op::Record(event, version) => done[event] = version,
                Op::Wait(..) => {}
                // SAFETY: the test's memory; nothing else runs.
                Op::Copy(to, from) => unsafe { to.ptr.copy_from(from, to.len) },
                // SAFETY: as above.
                Op::Write(to, bytes) => unsafe { to.ptr.copy_from(bytes.as_ptr(), to.len) },
                Op::Check(at, wanted, what) => {
                    // SAFETY: as above.
                    let got = unsafe { std::slice::from_raw_parts(at.ptr, at.len) };
                    assert!(got == wanted, "{what}");
                }
            }
        }
    }
}

struct Queue<'a> {
    world: &'a World,
    rank: u32,
    fault: Fault,
}

impl Queue<'_> {
    fn push(&mut self, op: Op) -> Result<()> {
        self.world.queues[self.rank as usize].lock().unwrap().push_back(op);
        Ok(())
    }

    fn record(&mut self, event: u32) -> Result<()> {
        let mut versions = self.world.recorded[event as usize].lock().unwrap();
        *versions += 1;
        self.push(Op::Record(event as usize, *versions))
    }

    fn wait(&mut self, event: u32) -> Result<()> {
        let version = *self.world.recorded[event as usize].lock().unwrap();
        self.push(Op::Wait(event as usize, version))
    }
}

impl Lane for Queue<'_> {
    fn mark_ready(&mut self) -> Result<()> {
        if self.fault == Fault::MarkReady { Ok(()) } else { self.record(self.rank) }
    }

    fn wait_ready(&mut self, peer: u32) -> Result<()> {
        if self.fault == Fault::WaitReady { Ok(()) } else { self.wait(peer) }
    }

    unsafe fn copy(&mut self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        self.push(Op::Copy(Piece { ptr: to, len: bytes }, from))
    }

    fn mark_taken(&mut self, peer: u32) -> Result<()> {
        if self.fault == Fault::MarkTaken {
            return Ok(());
        }
        self.record(self.world.size * (1 + peer) + self.rank)
    }

    fn wait_taken(&mut self, peer: u32) -> Result<()> {
        if self.fault == Fault::WaitTaken {
            return Ok(());
        }
        self.wait(self.world.size * (1 + self.rank) + peer)
    }
}

const STEP: Step = Step { index: 3, stage: 1, call: 7 };

/// One rank's part of `groups` random exchanges through the same memory; everything is only queued.
fn queue_groups(
    seat: &mut Seat,
    world: &World,
    rank: u32,
    memory: &mut [u8],
    seed: u64,
    groups: u64,
    fault: Fault,
) {
    const LARGEST: usize = 300;
    let mut random = Random::new(seed ^ (u64::from(rank) << 50));
    let mut lane = world.lane(rank, fault);
    for group in 0..groups {
        let seed = seed + (group << 8);
        let (mut sends, mut recvs, mut after) = (Vec::new(), Vec::new(), Vec::new());
        for peer in (0..world.size).filter(|p| *p != rank) {
            let place = |slot: u32, len| Piece {
                ptr: memory.as_ptr().cast_mut().wrapping_add((2 * peer + slot) as usize * LARGEST),
                len,
            };
            if let Some(bytes) = content(seed, rank, peer, LARGEST) {
                let place = place(0, bytes.len());
                let cut = Cut::new(bytes.clone(), &mut random);
                lane.push(Op::Write(place, bytes)).unwrap();
                sends.extend(cut.messages_at(peer, place.ptr));
                after.push(Op::Write(place, vec![0xee; place.len]));
            }
            if let Some(bytes) = content(seed, peer, rank, LARGEST) {
                let place = place(1, bytes.len());
                let cut = Cut::new(bytes.clone(), &mut random);
                recvs.extend(cut.messages_at(peer, place.ptr));
                let what = format!("rank {rank}, group {group}: wrong bytes from rank {peer}");
                after.push(Op::Check(place, bytes, what));
                after.push(Op::Write(place, vec![0xdd; place.len]));
            }
        }
        // SAFETY: the memory outlives the scheduler.
        unsafe { seat.exchange(&sends, &recvs, &mut lane, STEP) }.unwrap();
        after.into_iter().for_each(|op| lane.push(op).unwrap());
    }
}

fn seats(size: u32, timeout: Duration) -> Vec<Seat> {
    let board = Arc::new(Board::new(size));
    (0..size).map(|rank| Seat::new(&board, rank, timeout)).collect()
}

/// Several exchanges of all ranks, queued; and the memory that they use.
fn groups(size: u32, seed: u64, fault: Fault) -> (World, Vec<Vec<u8>>) {
    let world = World::new(size);
    let mut memory: Vec<Vec<u8>> = (0..size).map(|_| vec![0; 600 * size as usize]).collect();
    thread::scope(|scope| {
        let all = seats(size, Duration::from_secs(20)).into_iter().zip(&mut memory).enumerate();
        for (rank, (mut seat, memory)) in all {
            let world = &world;
            scope.spawn(move || {
                queue_groups(&mut seat, world, rank as u32, memory, seed, 6, fault);
            });
        }
    });
    (world, memory)
}

#[test]
fn random_exchanges_in_any_order() {
    for size in 1..=8 {
        for seed in 0..20 {
            let queued = groups(size, 1000 * seed + u64::from(size), Fault::None);
            queued.0.run(seed);
        }
    }
}

#[test]
fn a_lane_that_leaves_something_out_is_caught() {
    for fault in [Fault::WaitReady, Fault::WaitTaken, Fault::MarkReady, Fault::MarkTaken] {
        let caught = (0..20)
            .filter(|seed| {
                let queued = groups(4, *seed, fault);
                catch_unwind(AssertUnwindSafe(|| queued.0.run(*seed))).is_err()
            })
            .count();
        assert!(caught > 10, "{fault:?}: caught {caught} times of 20");
    }
}

/// Every rank in a thread; the results in rank order. Nothing runs.
fn on_all<R: Send>(
    size: u32,
    timeout: Duration,
    f: impl Fn(u32, Seat, &World) -> R + Sync,
) -> Vec<R> {
    let world = World::new(size);
    thread::scope(|scope| {
        let (f, world) = (&f, &world);
        let all: Vec<_> = (0..size)
            .zip(seats(size, timeout))
            .map(|(rank, seat)| scope.spawn(move || f(rank, seat, world)))
            .collect();
        all.into_iter().map(|h| h.join().unwrap()).collect()
    })
}

fn message(peer: u32, bytes: usize) -> Message {
    // The addresses are never used: nothing runs.
    let ptr = std::ptr::without_provenance_mut(4096);
    Message { peer, pieces: vec![Piece { ptr, len: bytes }] }
}

/// Sends `send` bytes to each of `peers` and receives `recv` from each.
fn swap(
    seat: &mut Seat,
    lane: &mut dyn Lane,
    peers: &[u32],
    send: usize,
    recv: usize,
) -> Result<()> {
    let all = |bytes| peers.iter().map(|p| message(*p, bytes)).collect::<Vec<_>>();
    // SAFETY: the lane's copies are never run.
    unsafe { seat.exchange(&all(send), &all(recv), lane, STEP) }
}

fn has(result: &Result<()>, status: Status, words: &[&str]) {
    let e = result.as_ref().expect_err("an error");
    assert_eq!(e.status, status, "{e}");
    words.iter().for_each(|w| assert!(e.text.contains(w), "{e}: {w} is missing"));
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn different_sizes_are_an_error_on_both() {
    let results = on_all(3, LONG, |rank, mut seat, world| {
        let lane = &mut world.lane(rank, Fault::None);
        match rank {
            0 => swap(&mut seat, lane, &[1], 100, 50),
            1 => swap(&mut seat, lane, &[0], 50, 101),
            _ => swap(&mut seat, lane, &[0], 1, 1),
        }
    });
    // Rank 2 waits for rank 0, and learns the cause.
    for r in &results {
        has(r, Status::Mismatch, &["rank 0 sends 100 bytes to rank 1", "101"]);
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_with_the_step() {
    let timeout = Duration::from_millis(150);
    let results = on_all(3, timeout, |rank, mut seat, world| {
        let lane = &mut world.lane(rank, Fault::None);
        let began = Instant::now();
        if rank == 2 {
            thread::sleep(2 * timeout);
        }
        let r = swap(&mut seat, lane, if rank == 2 { &[0, 1] } else { &[2] }, 8, 8);
        assert!(began.elapsed() < 4 * timeout);
        r
    });
    has(&results[0], Status::Timeout, &["rank 0: rank 2", "150 ms", "step 3 of call 7, stage 1"]);
    has(&results[1], Status::Timeout, &["rank 1: rank 2"]);
    // What the others posted was taken back; the late one learns that they gave up.
    has(&results[2], Status::Timeout, &["rank 2 did not come"]);
}

#[test]
fn a_rank_that_goes_is_named() {
    let results = on_all(4, LONG, |rank, mut seat, world| {
        let lane = &mut world.lane(rank, Fault::None);
        match rank {
            3 => {
                drop(seat);
                Ok(())
            }
            2 => swap(&mut seat, lane, &[1], 1, 1),
            1 => swap(&mut seat, lane, &[3], 1, 1),
            _ => {
                seat.give_up(Error::argument("rank 0 has had enough"));
                swap(&mut seat, lane, &[1], 1, 1)
            }
        }
    });
    has(&results[0], Status::InvalidArgument, &["had enough"]);
    has(&results[1], Status::PeerLost, &["rank 1: rank 3 left"]);
    has(&results[2], Status::PeerLost, &["rank 1: rank 3 left"]);
}

#[test]
fn giving_up_tells_why() {
    let results = on_all(2, LONG, |rank, mut seat, world| {
        let lane = &mut world.lane(rank, Fault::None);
        if rank == 0 {
            thread::sleep(Duration::from_millis(20));
            seat.give_up(Error::new(Status::Cuda, "rank 0: the kernel failed"));
            return Ok(());
        }
        swap(&mut seat, lane, &[0], 5, 5)
    });
    has(&results[1], Status::Cuda, &["the kernel failed"]);
}

#[test]
fn abort_reaches_all() {
    let results = on_all(3, LONG, |rank, mut seat, world| {
        let lane = &mut world.lane(rank, Fault::None);
        if rank == 1 {
            thread::sleep(Duration::from_millis(20));
            let abort = seat.aborter();
            thread::spawn(move || abort()).join().unwrap();
        }
        let r = swap(&mut seat, lane, if rank == 2 { &[1] } else { &[2] }, 5, 5);
        assert_eq!(seat.failed(), r.clone().err());
        r
    });
    results.iter().for_each(|r| has(r, Status::Aborted, &["rank 1 aborted"]));
}

/// A lane whose `at`th copy fails, or panics.
struct Breaks<'a>(Queue<'a>, u32, bool);

impl Lane for Breaks<'_> {
    fn mark_ready(&mut self) -> Result<()> {
        self.0.mark_ready()
    }
    fn wait_ready(&mut self, peer: u32) -> Result<()> {
        self.0.wait_ready(peer)
    }
    unsafe fn copy(&mut self, to: *mut u8, from: *const u8, bytes: usize) -> Result<()> {
        if self.1 == 0 {
            assert!(!self.2, "a bug in the lane");
            return Err(Error::new(Status::Cuda, "rank 0: the copy failed"));
        }
        self.1 -= 1;
        // SAFETY: the caller's promise.
        unsafe { self.0.copy(to, from, bytes) }
    }
    fn mark_taken(&mut self, peer: u32) -> Result<()> {
        self.0.mark_taken(peer)
    }
    fn wait_taken(&mut self, peer: u32) -> Result<()> {
        self.0.wait_taken(peer)
    }
}

/// The sender learns why, and its stream waits for what was enqueued of the receiver's copies before it failed.
#[test]
fn a_copy_that_fails() {
    for panics in [false, true] {
        let results = on_all(2, LONG, |rank, mut seat, world| {
            let queue = world.lane(rank, Fault::None);
            if rank == 1 {
                let mut lane = queue;
                let r = swap(&mut seat, &mut lane, &[0], 5, 5);
                let ops = world.queues[1].lock().unwrap();
                let taken = (world.size * 2) as usize;
                if !panics {
                    assert!(matches!(ops.back(), Some(Op::Wait(e, 1)) if *e == taken));
                }
                return r;
            }
            let mut lane = Breaks(queue, 0, panics);
            let once = AssertUnwindSafe(|| swap(&mut seat, &mut lane, &[1], 5, 5));
            let r = catch_unwind(once).unwrap_or_else(|e| Err(Error::from_panic(e)));
            assert!(seat.failed().is_some());
            r
        });
        if panics {
            has(&results[0], Status::Internal, &["a bug in the lane"]);
            has(&results[1], Status::Internal, &["rank 0: ended in a panic"]);
        } else {
            results.iter().for_each(|r| has(r, Status::Cuda, &["the copy failed"]));
        }
    }
}

#[test]
fn wrong_peers_do_no_harm() {
    on_all(2, LONG, |rank, mut seat, world| {
        let lane = &mut world.lane(rank, Fault::None);
        for peer in [rank, 2] {
            has(&swap(&mut seat, lane, &[peer], 1, 1), Status::InvalidArgument, &["0..2"]);
        }
        swap(&mut seat, lane, &[1 - rank], 1, 1).unwrap();
    });
}
