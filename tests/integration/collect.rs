//! Rows shifted and gathered through a group.

use crate::plans::problem;
use context_parallel::balance::Dealt;
use context_parallel::collect::{Args, Rows, gather, shift};
use context_parallel::error::{Result, Status};
use context_parallel::group::Group;
use context_parallel::holding::tokens;
use context_parallel::partition::{Partition, Side};
use context_parallel::problem::{CommType, Extent, Problem, Sequence};
use context_parallel::rows::{NONE, shifted};
use context_parallel::transport::delay::delay;
use context_parallel::transport::local::local_group;
use std::time::Duration;

fn packed(ranks: u32, partition: Partition) -> Problem {
    let extents = [(3, 13, 20), (0, 1, 1), (0, 0, 4), (0, 31, 31), (7, 2, 9)];
    let of = |(before, len, padded)| {
        let e = Extent { before, len, padded };
        Sequence { q: e, k: e }
    };
    let seqs = extents.map(of).to_vec();
    let p = problem(ranks, CommType::P2p, 0, 0, 2, 2);
    let mut p = Problem { packed: true, seqs, partition, ..p };
    p.validate().unwrap();
    Dealt::default().resolve(&mut p);
    p
}

/// What every rank's thread returns.
fn on_ranks<T: Send>(ranks: u32, seed: u64, work: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let transports = local_group(ranks);
    std::thread::scope(|scope| {
        let of = |(r, t)| {
            let work = &work;
            scope.spawn(move || {
                let t = delay(t, seed + r as u64);
                work(Group::new(t, Duration::from_secs(20)))
            })
        };
        let threads: Vec<_> = transports.into_iter().enumerate().map(of).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Rows of three numbers: the token, the rank, a constant.
fn local(p: &Problem, rank: u32) -> Vec<[u32; 3]> {
    tokens(p, rank, Side::Query).into_iter().map(|t| [t, rank, 7]).collect()
}

/// # Safety
/// The vectors outlive the call, as they do here.
fn args(p: &Problem, local: &mut [[u32; 3]], out: &mut [[u32; 3]]) -> Args {
    let rows = |list: &mut [[u32; 3]]| Rows { ptr: list.as_mut_ptr().cast(), count: list.len() };
    let (local, out) = (rows(local), rows(out));
    Args { problem: p.clone(), side: Side::Query, row_bytes: 12, local, out }
}

#[test]
fn rows_are_shifted_and_gathered() {
    let partitions =
        [Partition::Zigzag, Partition::Contiguous, Partition::Striped, Partition::Balanced];
    for ranks in 1..6 {
        for (n, partition) in partitions.iter().enumerate() {
            let p = packed(ranks, partition.clone());
            on_ranks(ranks, n as u64, |group| {
                let rank = group.rank();
                let mut mine = local(&p, rank);
                for by in [1, 2, -3, 0, 40] {
                    let mut out = vec![[NONE; 3]; mine.len()];
                    // SAFETY: vectors of this frame.
                    unsafe { shift(&group, by, Ok(args(&p, &mut mine, &mut out))).unwrap() };
                    let want = shifted(&p, rank, Side::Query, by);
                    let got: Vec<u32> = out.iter().map(|row| row[0]).collect();
                    assert_eq!(got, want, "rank {rank} of {ranks}, by {by}, {partition:?}");
                }
                let mut whole = vec![[NONE; 3]; 65];
                // SAFETY: vectors of this frame.
                unsafe { gather(&group, Ok(args(&p, &mut mine, &mut whole))).unwrap() };
                let got: Vec<u32> = whole.iter().map(|row| row[0]).collect();
                assert_eq!(got, (0..65).collect::<Vec<_>>(), "rank {rank}, {partition:?}");
                assert!(whole.iter().all(|row| tokens(&p, row[1], Side::Query).contains(&row[0])));
                assert_eq!(mine, local(&p, rank));
            });
        }
    }
}

/// A subset in another order is a group of its own: its rank 0 is the parent's last.
#[test]
fn rows_are_gathered_in_a_subset() {
    let p = packed(2, Partition::Zigzag);
    on_ranks(3, 1, |parent| {
        if parent.rank() == 1 {
            return;
        }
        let group = parent.subset(&[2, 0]).unwrap();
        let mut mine = local(&p, group.rank());
        let mut whole = vec![[NONE; 3]; 65];
        // SAFETY: vectors of this frame.
        unsafe { gather(&group, Ok(args(&p, &mut mine, &mut whole))).unwrap() };
        assert!(whole.iter().enumerate().all(|(i, row)| row[0] == i as u32 && row[2] == 7));
    });
}

/// A rank that comes with too few rows, or asks for another shift, is told so, and so are the others; the group stays usable.
#[test]
fn wrong_rows_are_refused_everywhere() {
    let p = packed(3, Partition::Striped);
    on_ranks(3, 5, |group| {
        let rank = group.rank();
        let mut mine = local(&p, rank);
        let mut out = vec![[NONE; 3]; mine.len()];
        let less = usize::from(rank == 1);
        let kept = mine.len() - less;
        // SAFETY: vectors of this frame.
        let result: Result<()> =
            unsafe { shift(&group, 1, Ok(args(&p, &mut mine[..kept], &mut out))) };
        let error = result.unwrap_err();
        let (status, words) = match rank {
            1 => (Status::InvalidArgument, "local_rows: got "),
            _ => (Status::Mismatch, "rank 1 refused cp_group_shift: local_rows: got "),
        };
        assert!(error.status == status && error.text.contains(words), "{error}");
        let by = if rank == 2 { 2 } else { 1 };
        // SAFETY: vectors of this frame.
        let error = unsafe { shift(&group, by, Ok(args(&p, &mut mine, &mut out))) }.unwrap_err();
        assert_eq!(error.status, Status::Mismatch, "{error}");
        assert!(out.iter().all(|row| row[0] == NONE), "nothing has moved");
        // SAFETY: vectors of this frame.
        unsafe { shift(&group, 1, Ok(args(&p, &mut mine, &mut out))).unwrap() };
    });
}
