//! One set of checks for every transport: random groups against expected bytes, and what happens when a rank misbehaves.

mod bootstrap;
mod processes;
mod user;

use super::delay::delay;
use super::local::{join, local_group};
use super::{Message, Piece, Transport, shm};
use crate::error::{Error, Result, Status};
use std::thread;
use std::time::{Duration, Instant};

pub(super) type Ranks = Vec<Box<dyn Transport>>;

pub(super) fn soon(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

/// xorshift64*, so that a failing seed can be run again.
pub(super) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// Bytes in memory, cut into pieces at random; one to three messages.
pub(super) struct Cut {
    pub memory: Vec<u8>,
    cuts: Vec<Vec<usize>>,
}

impl Cut {
    pub fn new(memory: Vec<u8>, random: &mut Random) -> Cut {
        let mut left = memory.len();
        let messages = 1 + random.below(3);
        let mut cuts: Vec<Vec<usize>> = Vec::new();
        for last in (0..messages).rev() {
            let mut pieces = Vec::new();
            for last_piece in (0..random.below(4)).rev() {
                let n = if last == 0 && last_piece == 0 { left } else { random.below(left + 1) };
                pieces.push(n);
                left -= n;
            }
            cuts.push(pieces);
        }
        cuts[0].push(left);
        Cut { memory, cuts }
    }

    fn messages(&mut self, peer: u32) -> Vec<Message> {
        let at = self.memory.as_mut_ptr();
        self.messages_at(peer, at)
    }

    /// The same cuts of as much memory elsewhere.
    pub fn messages_at(&self, peer: u32, mut at: *mut u8) -> Vec<Message> {
        let mut piece = |len: usize| {
            let p = Piece { ptr: at, len };
            at = at.wrapping_add(len);
            p
        };
        self.cuts
            .iter()
            .map(|c| Message { peer, pieces: c.iter().map(|&n| piece(n)).collect() })
            .collect()
    }
}

/// What rank `from` sends rank `to` in a group: any rank can tell.
pub(super) fn content(seed: u64, from: u32, to: u32, largest: usize) -> Option<Vec<u8>> {
    let mut random = Random::new(seed ^ (u64::from(from) << 20) ^ (u64::from(to) << 40));
    random.below(2);
    let len = match random.below(8) {
        0 | 1 => return None,
        2 => 0,
        3 => random.below(16),
        4 => largest,
        _ => random.below(largest + 1),
    };
    Some((0..len).map(|_| random.below(256) as u8).collect())
}

pub(super) fn finish(t: &mut dyn Transport, deadline: Instant) -> Result<()> {
    while !t.wait()? {
        assert!(
            Instant::now() < deadline,
            "rank {} is stuck waiting for {:?}",
            t.rank(),
            t.waiting_for()
        );
    }
    Ok(())
}

/// One rank's part of `groups` random groups with allgathers between them.
pub(super) fn random_groups(t: &mut dyn Transport, seed: u64, groups: u64, largest: usize) {
    let (me, size) = (t.rank(), t.size());
    let deadline = soon(25);
    let mut random = Random::new(seed ^ (u64::from(me) << 50));
    for group in 0..groups {
        let seed = seed + (group << 8);
        let (mut sends, mut recvs) = (Vec::new(), Vec::new());
        for peer in (0..size).filter(|&p| p != me) {
            if let Some(bytes) = content(seed, me, peer, largest) {
                sends.push((peer, Cut::new(bytes, &mut random)));
            }
            if let Some(bytes) = content(seed, peer, me, largest) {
                recvs.push((peer, Cut::new(vec![0x55; bytes.len()], &mut random), bytes));
            }
        }
        let first = if sends.is_empty() { 0 } else { random.below(sends.len()) };
        sends.rotate_left(first);
        let out: Vec<Message> = sends.iter_mut().flat_map(|(p, c)| c.messages(*p)).collect();
        let into: Vec<Message> = recvs.iter_mut().flat_map(|(p, c, _)| c.messages(*p)).collect();
        // SAFETY: `sends` and `recvs` live until the group is complete, or the test has failed with the transport dropped first.
        unsafe { t.start(&out, &into) }.unwrap();
        for _ in 0..random.below(3) {
            t.test().unwrap();
        }
        finish(t, deadline).unwrap();
        for (peer, got, wanted) in &recvs {
            assert!(
                got.memory == *wanted,
                "rank {me}, group {group}, seed {seed:#x}: wrong bytes from rank {peer}"
            );
        }
        let members: Vec<u32> =
            (0..size).filter(|m| group % 3 != 1 || m % 2 == group as u32 % 2).collect();
        if members.contains(&me) {
            let blob = |r: u32| [r as u8, group as u8, seed as u8];
            let all = t.allgather(&members, &blob(me), deadline).unwrap();
            assert_eq!(
                all,
                members.iter().flat_map(|&m| blob(m)).collect::<Vec<u8>>(),
                "rank {me}, group {group}"
            );
        }
    }
}

/// Runs `f` on every rank in a thread of its own and returns the results in rank order.
pub(super) fn on_all<R: Send>(ranks: Ranks, f: impl Fn(Box<dyn Transport>) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let f = &f;
        let all: Vec<_> = ranks.into_iter().map(|t| scope.spawn(move || f(t))).collect();
        all.into_iter().map(|h| h.join().unwrap()).collect()
    })
}

/// A group of one stream to and one from a peer, run to its end.
pub(super) fn swap(t: &mut dyn Transport, peer: u32, send: usize, recv: usize) -> Result<()> {
    let (mut out, mut into) = (vec![1u8; send], vec![0u8; recv]);
    let m = |v: &mut Vec<u8>| {
        vec![Message { peer, pieces: vec![Piece { ptr: v.as_mut_ptr(), len: v.len() }] }]
    };
    // SAFETY: both vectors outlive the group: after an error of `wait` nothing touches them any more.
    unsafe { t.start(&m(&mut out), &m(&mut into)) }?;
    finish(t, soon(20))
}

/// Every rank exchanges `bytes` with every other, `rounds` times.
pub(super) fn all_pairs(t: &mut dyn Transport, bytes: usize, rounds: usize) {
    let (me, size) = (t.rank(), t.size());
    let mut out = vec![me as u8; bytes];
    let mut into = vec![0u8; bytes * size as usize];
    for _ in 0..rounds {
        let (from, into_base) = (out.as_mut_ptr(), into.as_mut_ptr());
        let peers = || (0..size).filter(|&p| p != me);
        let message = |peer, ptr| Message { peer, pieces: vec![Piece { ptr, len: bytes }] };
        let sends: Vec<Message> = peers().map(|p| message(p, from)).collect();
        let recvs: Vec<Message> =
            peers().map(|p| message(p, into_base.wrapping_add(p as usize * bytes))).collect();
        // SAFETY: `out` and `into` outlive the group.
        unsafe { t.start(&sends, &recvs) }.unwrap();
        finish(t, soon(20)).unwrap();
        for p in peers() {
            assert!(into[p as usize * bytes..][..bytes].iter().all(|&b| b == p as u8));
        }
        into.fill(0xee);
    }
}

/// The checks that every transport of this process must pass; `make` gives a new group of a size.
pub(super) fn battery(make: &dyn Fn(u32) -> Ranks) {
    for size in 1..=8 {
        for seed in 0..4 {
            on_all(make(size), |mut t| {
                random_groups(&mut *t, seed * 1000 + u64::from(size), 6, 5000)
            });
        }
    }
    mismatched_lengths(make(3));
    mismatched_allgather(make(3));
    dropped_rank(make(4));
    cause_spreads(make(3));
    late_rank(make(3));
    aborted(make(3));
    cancelled(make(2));
    bad_arguments(make(2));
}

fn status<T>(r: &Result<T>) -> Status {
    r.as_ref().err().map_or(Status::Ok, |e| e.status)
}

fn mismatched_lengths(ranks: Ranks) {
    let errors: Vec<Result<()>> = on_all(ranks, |mut t| match t.rank() {
        0 => swap(&mut *t, 1, 100, 50),
        1 => swap(&mut *t, 0, 50, 101),
        _ => t.allgather(&[0, 1, 2], &[0], soon(10)).map(drop),
    });
    for (rank, e) in errors.iter().enumerate() {
        assert_eq!(status(e), Status::Mismatch, "rank {rank}: {e:?}");
        let text = &e.as_ref().unwrap_err().text;
        assert!(
            text.contains("rank 0 sends 100 bytes to rank 1") && text.contains("101"),
            "rank {rank}: {text}"
        );
    }
}

fn mismatched_allgather(ranks: Ranks) {
    let errors: Vec<Result<Vec<u8>>> = on_all(ranks, |mut t| {
        let bytes = vec![7; if t.rank() == 1 { 3 } else { 2 }];
        let first = t.allgather(&[0, 1, 2], &bytes, soon(10));
        // The size of one call does not disturb the next.
        assert_eq!(t.allgather(&[0, 1, 2], &[t.rank() as u8], soon(10)).unwrap(), [0, 1, 2]);
        let others = t.allgather(if t.rank() == 0 { &[0, 1] } else { &[0, 1, 2] }, &[1], soon(10));
        assert_eq!(status(&others), Status::Mismatch, "{others:?}");
        first
    });
    for (rank, e) in errors.iter().enumerate() {
        assert_eq!(status(e), Status::Mismatch, "rank {rank}: {e:?}");
        let text = &e.as_ref().unwrap_err().text;
        assert!(text.contains("rank 1 gives 3 bytes"), "rank {rank}: {text}");
    }
}

fn dropped_rank(ranks: Ranks) {
    let errors: Vec<Result<()>> = on_all(ranks, |mut t| match t.rank() {
        3 => {
            drop(t);
            Ok(())
        }
        2 => t.allgather(&[2, 3], &[1], soon(20)).map(drop),
        r => swap(&mut *t, 3, 10 + r as usize, 10),
    });
    for (rank, e) in errors[..3].iter().enumerate() {
        assert_eq!(status(e), Status::PeerLost, "rank {rank}: {e:?}");
        assert!(e.as_ref().unwrap_err().text.contains("rank 3"), "rank {rank}: {e:?}");
    }
}

/// Rank 2 is lost; rank 0 waits only for rank 1, which waits for rank 2: both name rank 2.
fn cause_spreads(ranks: Ranks) {
    let errors: Vec<Result<()>> = on_all(ranks, |mut t| match t.rank() {
        2 => {
            drop(t);
            Ok(())
        }
        1 => swap(&mut *t, 2, 1, 1),
        _ => swap(&mut *t, 1, 1, 1),
    });
    for e in &errors[..2] {
        assert_eq!(status(e), Status::PeerLost, "{e:?}");
        assert!(e.as_ref().unwrap_err().text.contains("rank 2"), "{e:?}");
    }
}

fn late_rank(ranks: Ranks) {
    let errors: Vec<Result<Vec<u8>>> = on_all(ranks, |mut t| {
        if t.rank() == 2 {
            thread::sleep(Duration::from_millis(400));
            return Ok(vec![]);
        }
        let began = Instant::now();
        let e = t.allgather(&[0, 1, 2], &[1], Instant::now() + Duration::from_millis(150));
        assert!(began.elapsed() < Duration::from_millis(390), "{:?}", began.elapsed());
        assert_eq!(e, t.allgather(&[0, 1, 2], &[1], soon(1)), "a lost group stays lost");
        e
    });
    for e in &errors[..2] {
        assert_eq!(status(e), Status::Timeout, "{e:?}");
        assert!(e.as_ref().unwrap_err().text.contains("rank 2 did not come"), "{e:?}");
    }
}

fn aborted(ranks: Ranks) {
    let abort = ranks[1].aborter();
    let killer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        abort();
    });
    let errors: Vec<Result<()>> = on_all(ranks, |mut t| match t.rank() {
        0 => swap(&mut *t, 1, 1, 1),
        1 => t.allgather(&[0, 1, 2], &[1], soon(20)).map(drop),
        _ => {
            thread::sleep(Duration::from_millis(60));
            swap(&mut *t, 0, 1, 1)
        }
    });
    killer.join().unwrap();
    for e in &errors {
        assert_eq!(status(e), Status::Aborted, "{e:?}");
        assert!(e.as_ref().unwrap_err().text.contains("rank 1"), "{e:?}");
    }
}

/// After a cancel the memory is free for anything, while the peer goes on reading its mail.
fn cancelled(ranks: Ranks) {
    on_all(ranks, |mut t| {
        if t.rank() == 1 {
            thread::sleep(Duration::from_millis(20));
            let e = swap(&mut *t, 0, 1 << 20, 1 << 20);
            assert_eq!(status(&e), Status::PeerLost, "{e:?}");
            return;
        }
        let mut memory = vec![0u8; 2 << 20];
        let whole = Piece { ptr: memory.as_mut_ptr(), len: 1 << 20 };
        // SAFETY: the second half begins after 1 MiB.
        let other = Piece { ptr: unsafe { whole.ptr.add(1 << 20) }, len: 1 << 20 };
        let m = |p| [Message { peer: 1, pieces: vec![p] }];
        // SAFETY: the memory lives until after `cancel`.
        unsafe { t.start(&m(whole), &m(other)) }.unwrap();
        assert_eq!(t.waiting_for(), Some(1));
        t.test().unwrap();
        t.cancel();
        drop(memory);
        assert_eq!(status(&t.test()), Status::Aborted);
        thread::sleep(Duration::from_millis(50));
    });
}

fn bad_arguments(ranks: Ranks) {
    on_all(ranks, |mut t| {
        let me = t.rank();
        let to = |peer| [Message { peer, pieces: vec![] }];
        // SAFETY: no pieces.
        let own = unsafe { t.start(&to(me), &[]) };
        // SAFETY: no pieces.
        let beyond = unsafe { t.start(&[], &to(2)) };
        for e in [own, beyond] {
            assert_eq!(status(&e), Status::InvalidArgument, "{e:?}");
        }
        for members in [&[][..], &[1, 0], &[0, 0], &[1 - me], &[0, 1, 2]] {
            assert_eq!(
                status(&t.allgather(members, &[1], soon(1))),
                Status::InvalidArgument,
                "{members:?}"
            );
        }
        assert_eq!(status(&t.allgather(&[0, 1], &[0; 4097], soon(1))), Status::InvalidArgument);
        // None of this did harm.
        let peer = 1 - me;
        // SAFETY: no pieces.
        unsafe { t.start(&to(peer), &to(peer)) }.unwrap();
        // SAFETY: no pieces.
        assert_eq!(status(&unsafe { t.start(&[], &[]) }), Status::InvalidUsage);
        assert_eq!(status(&t.allgather(&[0, 1], &[1], soon(1))), Status::InvalidUsage);
        finish(&mut *t, soon(10)).unwrap();
        assert_eq!(t.allgather(&[0, 1], &[me as u8; 4096], soon(10)).unwrap().len(), 8192);
    });
}

#[test]
fn local_battery() {
    battery(&local_group);
}

#[test]
fn delay_battery() {
    battery(&|size| local_group(size).into_iter().map(|t| delay(t, 42)).collect());
}

#[test]
fn local_64_ranks() {
    let began = Instant::now();
    on_all(local_group(64), |mut t| {
        all_pairs(&mut *t, 64, 3);
        for _ in 0..3 {
            let members: Vec<u32> = (0..64).collect();
            t.allgather(&members, &[1; 32], soon(10)).unwrap();
        }
    });
    let took = began.elapsed();
    eprintln!("64 ranks, 3 exchanges and 3 allgathers: {took:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

/// Without waiting for the exchange the receive buffer holds poison, and the late reading of send pieces shows what was overwritten.
#[test]
fn delay_punishes_haste() {
    let mut seen = [false; 2];
    for seed in 0..32 {
        let ranks = local_group(2).into_iter().map(|t| delay(t, seed)).collect();
        let results = on_all(ranks, |mut t| {
            let peer = 1 - t.rank();
            let (mut out, mut into) = (vec![1u8; 8], vec![0u8; 8]);
            let m = |v: &mut Vec<u8>| {
                [Message { peer, pieces: vec![Piece { ptr: v.as_mut_ptr(), len: 8 }] }]
            };
            let (sends, recvs) = (m(&mut out), m(&mut into));
            // SAFETY: both vectors outlive the group.
            unsafe { t.start(&sends, &recvs) }.unwrap();
            let early = into[0];
            // SAFETY: as a hasty plan would, but this thread is the only one that reads `out` before the inner start.
            unsafe { sends[0].pieces[0].ptr.write_bytes(9, 8) };
            finish(&mut *t, soon(10)).unwrap();
            (early, into[0])
        });
        for (early, late) in results {
            assert_eq!(early, 0xff);
            seen[usize::from(late == 9)] = true;
        }
    }
    assert!(seen[1], "no overwritten send was ever seen");
}

#[test]
fn join_by_key() {
    let key = [7u8; 128];
    let meet = |key: [u8; 128], calls: &[(u32, u32)], ms: u64| -> Vec<Result<Box<dyn Transport>>> {
        thread::scope(|s| {
            let spawn = |&(rank, size)| {
                s.spawn(move || join(key, rank, size, Instant::now() + Duration::from_millis(ms)))
            };
            let all: Vec<_> = calls.iter().map(spawn).collect();
            all.into_iter().map(|h| h.join().unwrap()).collect()
        })
    };
    let text = |r: &Result<Box<dyn Transport>>| {
        r.as_ref().err().map(|e: &Error| e.text.clone()).unwrap_or_default()
    };
    for _ in 0..2 {
        let ranks: Ranks =
            meet(key, &[(0, 3), (1, 3), (2, 3)], 9000).into_iter().map(|r| r.unwrap()).collect();
        let late = join(key, 1, 3, soon(1));
        assert!(text(&late).contains("already complete"), "{}", text(&late));
        on_all(ranks, |mut t| all_pairs(&mut *t, 10, 1));
    }
    for r in meet([8; 128], &[(0, 3), (1, 3), (1, 3)], 9000) {
        assert!(text(&r).contains("rank 1 joins the group twice"), "{}", text(&r));
    }
    for r in meet([9; 128], &[(0, 3), (1, 4), (2, 3)], 9000) {
        assert_eq!(r.as_ref().err().unwrap().status, Status::Mismatch);
        assert!(text(&r).contains("group of 4"), "{}", text(&r));
    }
    for r in meet([10; 128], &[(0, 3), (2, 3)], 100) {
        assert_eq!(r.as_ref().err().unwrap().status, Status::Timeout);
        assert!(text(&r).contains("rank 1 did not come"), "{}", text(&r));
    }
    assert!(text(&join(key, 3, 3, soon(1))).contains("allowed is 0..3"));
}

/// Every rank a thread with a mapping of its own.
fn shm_group(size: u32) -> Ranks {
    let fd = shm::create(size).unwrap();
    let own = |rank| shm::attach(fd.try_clone().unwrap(), rank, size).unwrap();
    (0..size).map(own).collect()
}

#[test]
fn shm_battery() {
    battery(&shm_group);
}

/// Streams much longer than a ring, so that both sides take turns.
#[test]
fn shm_long_streams() {
    for seed in 0..3 {
        on_all(shm_group(3), |mut t| random_groups(&mut *t, 77 + seed, 4, 3 << 20));
    }
}

#[test]
fn shm_64_ranks() {
    let began = Instant::now();
    on_all(shm_group(64), |mut t| {
        all_pairs(&mut *t, 64, 3);
        for _ in 0..3 {
            let members: Vec<u32> = (0..64).collect();
            t.allgather(&members, &[1; 32], soon(10)).unwrap();
        }
        assert!(t.memory_bytes() < 2 << 20, "{}", t.memory_bytes());
    });
    let took = began.elapsed();
    eprintln!("shm: 64 ranks, 3 exchanges and 3 allgathers: {took:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}
