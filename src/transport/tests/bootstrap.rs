//! The three doors, with threads as ranks.

use super::{Ranks, all_pairs, on_all, status};
use crate::error::{Result, Status};
use crate::transport::Transport;
use crate::transport::bootstrap::{Kind, init, init_from_allgather, unique_id};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

type Joined = Result<Box<dyn Transport>>;

const LONG: Duration = Duration::from_secs(20);

/// Each call (rank, size, kind, timeout) in a thread of its own, all with one id.
fn meet(calls: &[(u32, u32, Kind, Duration)]) -> Vec<Joined> {
    let id = unique_id().unwrap();
    thread::scope(|s| {
        let spawn =
            |&(rank, size, kind, timeout)| s.spawn(move || init(&id, rank, size, kind, timeout));
        let all: Vec<_> = calls.iter().map(spawn).collect();
        all.into_iter().map(|h| h.join().unwrap()).collect()
    })
}

fn text(r: &Joined) -> String {
    r.as_ref().err().map(|e| e.text.clone()).unwrap_or_default()
}

#[test]
fn by_unique_id() {
    for (kind, name) in [(Kind::Auto, "local"), (Kind::Local, "local"), (Kind::Shm, "shm")] {
        for size in [1, 2, 5, 64] {
            let calls: Vec<_> = (0..size).map(|r| (r, size, kind, LONG)).collect();
            let ranks: Ranks = meet(&calls).into_iter().map(|r| r.unwrap()).collect();
            assert!(
                ranks.iter().enumerate().all(|(i, t)| t.rank() == i as u32 && t.size() == size)
            );
            assert!(size == 1 || ranks.iter().all(|t| t.name() == name), "{kind:?}");
            on_all(ranks, |mut t| all_pairs(&mut *t, 100, 2));
        }
    }
}

#[test]
fn disagreement_reaches_all() {
    let auto = Kind::Auto;
    for (calls, words) in [
        (
            [(0, 3, auto), (1, 4, auto), (2, 3, auto)],
            "rank 1 joins a group of 4 ranks, rank 0 a group of 3",
        ),
        ([(0, 3, auto), (1, 3, auto), (1, 3, auto)], "rank 1 joins the group twice"),
        ([(0, 3, auto), (1, 3, auto), (2, 3, Kind::Shm)], "rank 2 asks for a group of kind shm"),
    ] {
        let began = Instant::now();
        for r in meet(&calls.map(|(rank, size, kind)| (rank, size, kind, LONG))) {
            // A rank that comes when the others have failed already finds nobody.
            match status(&r) {
                Status::PeerLost => assert!(text(&r).contains("rank 0"), "{}", text(&r)),
                s => assert_eq!(
                    (s, text(&r).contains(words)),
                    (Status::Mismatch, true),
                    "{}",
                    text(&r)
                ),
            }
        }
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn missing_rank_is_named_by_all() {
    for (first, others) in [(150, 150), (10_000, 150), (150, 10_000)] {
        let calls = [(0, 4, first), (1, 4, others), (3, 4, others)];
        let all = meet(
            &calls.map(|(rank, size, ms)| (rank, size, Kind::Auto, Duration::from_millis(ms))),
        );
        for (rank, r) in all.iter().enumerate() {
            assert!(text(r).contains("rank 2"), "rank {rank}: {}", text(r));
            assert_eq!(status(r), Status::Timeout, "rank {rank}: {}", text(r));
        }
    }
    let id = unique_id().unwrap();
    let r = init(&id, 1, 2, Kind::Auto, Duration::from_millis(50));
    assert_eq!(status(&r), Status::Timeout);
    assert!(text(&r).contains("rank 0 did not come"), "{}", text(&r));
}

#[test]
fn wrong_arguments() {
    let id = unique_id().unwrap();
    for (rank, size) in [(0, 0), (2, 2), (7, 3)] {
        let r = init(&id, rank, size, Kind::Auto, LONG);
        assert_eq!(status(&r), Status::InvalidArgument);
        assert!(text(&r).contains(&format!("rank is {rank}, size is {size}")), "{}", text(&r));
    }
    let r = init(&[0; 128], 0, 2, Kind::Auto, LONG);
    assert!(
        status(&r) == Status::InvalidArgument && text(&r).contains("not a unique id"),
        "{}",
        text(&r)
    );
    let mut far = id;
    far[8] ^= 1;
    let r = init(&far, 1, 2, Kind::Auto, LONG);
    assert!(
        status(&r) == Status::Unsupported && text(&r).contains("context_parallel_mpi.h"),
        "{}",
        text(&r)
    );
    let mut other = id;
    other[20] ^= 1;
    let r = init(&other, 1, 2, Kind::Auto, LONG);
    assert!(status(&r) == Status::PeerLost && text(&r).contains("nobody listens"), "{}", text(&r));
    let r = init(&other, 0, 2, Kind::Auto, LONG);
    assert!(
        status(&r) == Status::InvalidArgument && text(&r).contains("makes the id"),
        "{}",
        text(&r)
    );
    assert!(init(&id, 0, 1, Kind::Shm, LONG).is_ok());
    assert!(init(&id, 0, 2, Kind::Shm, LONG).is_err(), "an id serves one group");
}

#[test]
fn by_allgather() {
    let size = 4;
    let board = Mutex::new(vec![Vec::new(); size]);
    let barrier = Barrier::new(size);
    let gather = |rank: usize, mine: &[u8]| {
        board.lock().unwrap()[rank] = mine.to_vec();
        barrier.wait();
        let all = board.lock().unwrap().concat();
        barrier.wait();
        all
    };
    for kind in [Kind::Auto, Kind::Shm] {
        let ranks: Ranks = thread::scope(|s| {
            let join = |rank: usize| {
                let mut callback = move |mine: &[u8]| Ok(gather(rank, mine));
                init_from_allgather(rank as u32, size as u32, kind, LONG, &mut callback).unwrap()
            };
            let all: Vec<_> = (0..size).map(|r| s.spawn(move || join(r))).collect();
            all.into_iter().map(|h| h.join().unwrap()).collect()
        });
        on_all(ranks, |mut t| all_pairs(&mut *t, 100, 2));
    }
    let short = init_from_allgather(1, 2, Kind::Auto, LONG, &mut |mine| Ok(mine.to_vec()));
    assert!(text(&short).contains("returned 136 bytes; 272 are wanted"), "{}", text(&short));
    let far =
        init_from_allgather(0, 2, Kind::Auto, LONG, &mut |mine| Ok([mine, &[9; 136]].concat()));
    assert!(
        status(&far) == Status::Unsupported && text(&far).contains("rank 1 runs on another host"),
        "{}",
        text(&far)
    );
}
