//! Ranks as real processes: this test binary started again, with the part to play in its environment.

use super::{all_pairs, finish, random_groups, soon, status};
use crate::error::{Result, Status};
use crate::transport::bootstrap::{Kind, init, init_from_env, unique_id};
use crate::transport::{Message, Piece, Transport};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PART: &str = "CONTEXT_PARALLEL_TEST_PART";
const ID: &str = "CONTEXT_PARALLEL_TEST_ID";
const TIMEOUT: Duration = Duration::from_secs(20);

/// Children that do not outlive the test, whatever happens.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for c in &mut self.0 {
            let _ = c.kill();
            let _ = c.wait();
        }
    }
}

impl Children {
    /// Starts one process for each of `ranks`, as torchrun would for a job of `size`.
    fn start(part: &str, ranks: impl IntoIterator<Item = u32>, size: u32, id: &str) -> Children {
        static JOB: AtomicU32 = AtomicU32::new(0);
        let job = format!("{}.{}", std::process::id(), JOB.fetch_add(1, Ordering::SeqCst));
        let start = |rank: u32| {
            Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "transport::tests::processes::play",
                    "--nocapture",
                    "--test-threads=1",
                ])
                .envs([
                    (PART, part),
                    (ID, id),
                    ("MASTER_ADDR", "localhost"),
                    ("MASTER_PORT", "29500"),
                ])
                .envs([
                    ("RANK", &rank.to_string()),
                    ("WORLD_SIZE", &size.to_string()),
                    ("TORCHELASTIC_RUN_ID", &job),
                ])
                .env("RUST_BACKTRACE", "0")
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        Children(ranks.into_iter().map(start).collect())
    }

    /// What each printed after "RESULT ", once all have ended; a child that was killed printed nothing.
    fn results(mut self) -> Vec<String> {
        let deadline = soon(25);
        let mut all = Vec::new();
        for c in std::mem::take(&mut self.0) {
            let mut c = Children(vec![c]);
            while c.0[0].try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "a child did not end");
                thread::sleep(Duration::from_millis(5));
            }
            let Some(child) = c.0.pop() else { continue };
            let output = child.wait_with_output().unwrap();
            let out = String::from_utf8_lossy(&output.stdout).into_owned();
            let result = out
                .lines()
                .find_map(|l| l.split_once("RESULT "))
                .map_or(String::new(), |(_, r)| r.to_string());
            if result.is_empty() && output.status.code().is_some() {
                eprintln!("a child failed:\n{out}\n{}", String::from_utf8_lossy(&output.stderr));
            }
            all.push(result);
        }
        all
    }
}

/// Exchanges `bytes` with every other rank again and again until something fails; rank `victim` dies in the middle of the third round.
fn until_death(t: &mut dyn Transport, bytes: usize, victim: u32) -> Result<()> {
    let (me, size) = (t.rank(), t.size() as usize);
    let mut memory = vec![me as u8; bytes * (size + 1)];
    let base = memory.as_mut_ptr();
    let messages = |own: bool| -> Vec<Message> {
        let others = (0..size).filter(|&p| p != me as usize);
        let piece =
            |p| Piece { ptr: base.wrapping_add(if own { 0 } else { (p + 1) * bytes }), len: bytes };
        others.map(|p| Message { peer: p as u32, pieces: vec![piece(p)] }).collect()
    };
    for round in 0.. {
        // SAFETY: `memory` outlives the group; send and receive pieces lie apart in it.
        unsafe { t.start(&messages(true), &messages(false)) }?;
        if round == 2 && me == victim {
            t.test()?;
            // SAFETY: kills this process and nothing else.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        finish(t, soon(20))?;
    }
    Ok(())
}

/// A child's part. Without one in the environment this is an ordinary test run, and there is nothing to do.
#[test]
fn play() {
    let Ok(part) = std::env::var(PART) else { return };
    // Under mpirun (by hand) these two are not there, and not needed.
    let number = |name: &str| std::env::var(name).map_or(0, |v| v.parse::<u32>().unwrap());
    let (rank, size) = (number("RANK"), number("WORLD_SIZE"));
    let with_id = || {
        let hex = std::env::var(ID).unwrap();
        let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
        init(&std::array::from_fn(byte), rank, size, Kind::Auto, TIMEOUT)
    };
    let result: Result<()> = match part.as_str() {
        "groups" => init_from_env(Kind::Auto, TIMEOUT).map(|mut t| {
            assert_eq!(t.name(), "shm");
            random_groups(&mut *t, 5, 10, 5000);
            // A second group, while the first is there.
            let mut second = init_from_env(Kind::Shm, TIMEOUT).unwrap();
            random_groups(&mut *second, 6, 4, 1 << 20);
            random_groups(&mut *t, 7, 2, 100);
        }),
        "id" => with_id().map(|mut t| random_groups(&mut *t, 9, 6, 5000)),
        "join" => with_id().map(drop),
        "die" => init_from_env(Kind::Auto, TIMEOUT).and_then(|mut t| until_death(&mut *t, 300_000, 2)),
        "die in allgather" => init_from_env(Kind::Auto, TIMEOUT).and_then(|mut t| {
            let members: Vec<u32> = (0..size).collect();
            t.allgather(&members, &[1], soon(20))?;
            if rank == 2 {
                // SAFETY: kills this process and nothing else.
                unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            }
            t.allgather(&members, &[2], soon(20)).map(drop)
        }),
        "run" => init_from_env(Kind::Auto, TIMEOUT).and_then(|mut t| {
            println!("STARTED");
            until_death(&mut *t, 300_000, u32::MAX)
        }),
        "come" => init_from_env(Kind::Auto, Duration::from_millis(600)).map(drop),
        "speed" => init_from_env(Kind::Auto, TIMEOUT).map(|mut t| {
            all_pairs(&mut *t, 64, 10);
            let began = Instant::now();
            all_pairs(&mut *t, 64, 500);
            let small = began.elapsed() / 500;
            let began = Instant::now();
            let mut memory = vec![1u8; 32 << 20];
            let (left, right) = ((rank + size - 1) % size, (rank + 1) % size);
            for _ in 0..8 {
                let piece = |at| vec![Piece { ptr: memory.as_mut_ptr().wrapping_add(at), len: 16 << 20 }];
                let (from, to) = {
                    let mut piece = piece;
                    (piece(0), piece(16 << 20))
                };
                // SAFETY: `memory` outlives the group.
                unsafe { t.start(&[Message { peer: right, pieces: from }], &[Message { peer: left, pieces: to }]) }.unwrap();
                finish(&mut *t, soon(20)).unwrap();
            }
            let rate = 8.0 * 16.777e6 / began.elapsed().as_secs_f64() / 1e9;
            println!("RESULT exchange of 64 bytes among all {small:?}, ring of 16 MiB {rate:.2} GB/s per rank");
        }),
        other => panic!("unknown part {other}"),
    };
    match result {
        Ok(()) => println!("RESULT ok"),
        Err(e) => println!("RESULT {} | {e}", e.status as i32),
    }
}

#[test]
fn random_groups_between_processes() {
    for size in 1..=4 {
        let results =
            Children::start(if size == 1 { "come" } else { "groups" }, 0..size, size, "").results();
        assert!(results.iter().all(|r| r == "ok"), "{size}: {results:?}");
    }
}

fn hex(id: &[u8; 128]) -> String {
    id.iter().map(|b| format!("{b:02x}")).collect()
}

/// Rank 0 lives here, the others are children.
#[test]
fn unique_id_between_processes() {
    let id = unique_id().unwrap();
    let children = Children::start("id", 1..4, 4, &hex(&id));
    let mut t = init(&id, 0, 4, Kind::Auto, TIMEOUT).unwrap();
    assert_eq!(t.name(), "shm");
    random_groups(&mut *t, 9, 6, 5000);
    assert_eq!(children.results(), ["ok"; 3]);
}

#[test]
fn threads_and_processes_do_not_mix() {
    let id = unique_id().unwrap();
    let children = Children::start("join", 2..3, 3, &hex(&id));
    let here = thread::scope(|s| {
        let one = s.spawn(|| init(&id, 1, 3, Kind::Auto, TIMEOUT));
        [init(&id, 0, 3, Kind::Auto, TIMEOUT), one.join().unwrap()]
    });
    for r in &here {
        assert_eq!(status(r), Status::Unsupported);
    }
    let there = children.results();
    assert!(
        there[0].starts_with("4 |") && there[0].contains("3 ranks in 2 processes"),
        "{there:?}"
    );

    let id = unique_id().unwrap();
    let children = Children::start("join", 1..2, 2, &hex(&id));
    // The child asks for Auto.
    let here = init(&id, 0, 2, Kind::Local, TIMEOUT);
    assert_eq!(status(&here), Status::Mismatch);
    assert!(children.results()[0].contains("rank 1 asks for a group of kind auto"));
}

#[test]
fn killed_rank_is_named() {
    for part in ["die", "die in allgather"] {
        let began = Instant::now();
        let results = Children::start(part, 0..4, 4, "").results();
        for (rank, r) in results.iter().enumerate().filter(|&(rank, _)| rank != 2) {
            assert!(
                r.starts_with("13 |") && r.contains("rank 2 (process") && r.contains("died"),
                "{part}, rank {rank}: {r:?}"
            );
        }
        assert_eq!(results[2], "", "rank 2 was killed");
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }
}

#[test]
fn rank_that_never_comes_is_named() {
    for missing in [0, 2] {
        let results = Children::start("come", (0..4).filter(|&r| r != missing), 4, "").results();
        for r in &results {
            assert!(
                r.starts_with("12 |") && r.contains(&format!("rank {missing} did not come")),
                "{results:?}"
            );
        }
    }
}

/// What groups could leave behind: names in the file system, processes.
fn leftovers(of: &[u32]) -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["/dev/shm", "/tmp"] {
        for name in std::fs::read_dir(folder)
            .unwrap()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
        {
            if name.contains("context_parallel")
                || of.iter().any(|pid| name.contains(&pid.to_string()))
            {
                found.push(format!("{folder}/{name}"));
            }
        }
    }
    for pid in of.iter().filter(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists()) {
        found.push(format!("process {pid}"));
    }
    found
}

#[test]
fn nothing_stays_when_all_are_killed() {
    use std::io::{BufRead, BufReader};
    let before = leftovers(&[]);
    let mut children = Children::start("run", 0..4, 4, "");
    let pids: Vec<u32> = children.0.iter().map(Child::id).collect();
    for c in &mut children.0 {
        let out = BufReader::new(c.stdout.take().unwrap());
        assert!(out.lines().map_while(|l| l.ok()).any(|l| l.contains("STARTED")));
    }
    thread::sleep(Duration::from_millis(50));
    assert!(!leftovers(&pids).is_empty(), "the processes are there");
    drop(children);
    assert_eq!(leftovers(&pids), before);
}

/// Prints how fast it is here; only a gross slowdown fails.
#[test]
fn speed_between_processes() {
    for size in [2, 4] {
        let results = Children::start("speed", 0..size, size, "").results();
        eprintln!("{size} processes: {}", results[0]);
        assert!(results.iter().all(|r| r.starts_with("exchange")), "{results:?}");
    }
}
