//! Masks by slices that come with a call: every communication type and number of ranks against the oracle, what is computed and moved
//! against a count of pairs, and ranks that do not agree.

use crate::layers::{Batch, PATIENCE, comm, config, layer, one, ranks};
use crate::numbers::{Run, Tally};
use crate::oracle::{cases, mix};
use crate::plans::{problem, prove};
use crate::plans_random::Random;
use crate::ranks::Layout;
use context_parallel::dtype::DType;
use context_parallel::error::Status;
use context_parallel::mask::Mask;
use context_parallel::partition::{Partition, Side};
use context_parallel::plan::account::summary;
use context_parallel::plan::{Options, Pass, Plan};
use context_parallel::problem::{CommType, Problem, Sequence};
use context_parallel::regions::{Region, Regions};
use std::collections::HashSet;
use std::sync::Arc;

/// The cases with slices on 1 … 5 ranks, every communication type, and the relay.
#[test]
fn slices_on_every_type_and_number_of_ranks() {
    let mut tally = Tally::default();
    for (index, case) in cases().iter().enumerate().filter(|(_, c)| c.is("slices")) {
        for ranks in 1..=5 {
            for (kind, comm) in CommType::ALL.into_iter().enumerate() {
                let seed = (index * 20 + kind * 5) as u64 + u64::from(ranks);
                let dtype = DType::ALL[mix(seed) as usize % 3];
                tally.add(&Run::drawn(case, ranks, comm, dtype, seed));
            }
            if ranks > 2 {
                let mut run = Run::plain(case, ranks, CommType::P2p, DType::F32);
                run.problem.relay = true;
                tally.add(&run);
            }
        }
    }
    tally.end("slices");
}

/// Which pairs of one sequence are visible, by a double loop.
fn visible(p: &Problem) -> HashSet<(u32, u32)> {
    let sees = |i: u32, j: u32| {
        let after = i64::from(j) - i64::from(i);
        (!p.mask.causal || after <= 0)
            && p.mask.left.is_none_or(|left| after >= -i64::from(left))
            && p.regions.list().iter().any(|r| r.allows(i, j))
    };
    let len = p.seqs[0].q.len;
    (0..len).flat_map(|i| (0..len).map(move |j| (i, j))).filter(|(i, j)| sees(*i, *j)).collect()
}

/// Blocks of one size, of which some are visible.
pub fn blocks(r: &mut Random, len: u32, size: u32) -> Regions {
    let at = |i: u32| (i * size, (i * size + size).min(len));
    let n = len.div_ceil(size);
    let all = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
    let some: Vec<Region> = all
        .filter(|(i, j)| i == j || r.one_in(4))
        .map(|(i, j)| Region::full(0, at(i), at(j)))
        .collect();
    Regions::new(&some)
}

/// All ranks together compute each visible pair once, and a team receives a key exactly if one of its queries sees it.
#[test]
fn pairs_and_rows_are_those_of_the_regions() {
    let mut r = Random::new(5);
    for round in 0..24 {
        let len = r.within(40, 150);
        let comm = CommType::ALL[round % 4];
        let base = problem(r.of(&[2, 3, 4, 6]), comm, 0, len, 4, 2);
        let size = r.within(3, 20);
        let p = Problem {
            regions: blocks(&mut r, len, size),
            mask: r.of(&[Mask::FULL, Mask::CAUSAL, Mask { left: Some(17), ..Mask::CAUSAL }]),
            partition: r.of(&[Partition::Zigzag, Partition::Contiguous, Partition::Striped]),
            ..base
        };
        prove(&p);
        let plans = Plan::all(&Arc::new(p.clone()), Pass::Forward, Options::default());
        let total = summary(&plans).total;
        let pairs = visible(&p);
        assert_eq!(total.pairs, 4 * pairs.len() as u64, "{p:?}");
        let team_of = |position: u32, side| {
            let holds = |rank: &u32| {
                let held = context_parallel::holding::holding(&p, *rank, side).segments;
                held.iter().any(|s| (0..s.len).any(|i| s.start + i * s.step == position))
            };
            (0..p.ranks).find(holds).unwrap() / p.inner
        };
        let team = |side| (0..len).map(|x| team_of(x, side)).collect::<Vec<u32>>();
        let (readers, owners) = (team(Side::Query), team(Side::Key));
        let needed: HashSet<(u32, u32)> = pairs
            .iter()
            .map(|(i, j)| (readers[*i as usize], *j))
            .filter(|(reader, j)| *reader != owners[*j as usize])
            .collect();
        // Every member of a team that has key heads receives the team's keys.
        let members = plans[..p.inner as usize].iter().filter(|plan| !plan.share.kv.is_empty());
        assert_eq!(
            total.received_key_rows,
            needed.len() as u64 * members.count() as u64,
            "{} {p:?}",
            comm.name()
        );
    }
}

/// Documents of one long sequence, said by slices, move and cost what a packed batch of them does where ranks hold whole documents.
#[test]
fn documents_that_stay_home_move_nothing() {
    let docs = [(0, 100), (100, 200), (200, 300), (300, 400)];
    let list: Vec<Region> =
        docs.iter().map(|d| Region { hi: Some(0), ..Region::full(0, *d, *d) }).collect();
    let p = Problem {
        regions: Regions::new(&list),
        mask: Mask::FULL,
        partition: Partition::Contiguous,
        ..problem(4, CommType::P2p, 0, 400, 2, 1)
    };
    prove(&p);
    for pass in [Pass::Forward, Pass::Backward] {
        let total = summary(&Plan::all(&Arc::new(p.clone()), pass, Options::default())).total;
        assert_eq!((total.received, total.pairs), (0, 2 * 4 * 100 * 101 / 2));
    }
    // A shared prompt is all that travels.
    let mut shared = list.clone();
    shared.push(Region::full(0, (100, 400), (10, 30)));
    let p = Problem { regions: Regions::new(&shared), ..p };
    let total = summary(&Plan::all(&Arc::new(p), Pass::Forward, Options::default())).total;
    assert_eq!(total.received_key_rows, 3 * 20);
}

/// A rank whose slices are wrong gets its error, a rank with others makes all of them notice; nobody waits. Their order says nothing.
#[test]
fn ranks_with_other_slices_are_noticed() {
    let (seqs, inputs) = one(33);
    let list = [Region::full(0, (0, 20), (0, 20)), Region::full(0, (20, 33), (5, 33))];
    let errors = ranks(3, PATIENCE, |rank, group| {
        let mut layer = layer(config());
        layer.set_group(&group, Ok(comm(CommType::P2p)))?;
        let of = |list: &[Region]| {
            Batch::within(&layer, &seqs, &Regions::new(list), &inputs, Layout::Dense)
        };
        let (same, other) = (of(&list), of(&list[..1]));
        let turned = of(&[list[1], list[0]]);
        let mut good = if rank == 1 { turned } else { same };
        good.both(&mut layer)?;
        let mut differs = other;
        let e = if rank == 2 { &mut differs } else { &mut good }.forward(&mut layer).unwrap_err();
        assert_eq!(e.status, Status::Mismatch, "{e}");
        assert!(e.text.contains("rank"), "{e}");
        // Backward of other slices than forward's.
        let mut mixed =
            Batch::within(&layer, &seqs, &Regions::new(&list[..1]), &inputs, Layout::Dense);
        mixed.context = good.context;
        let e = if rank == 0 { &mut mixed } else { &mut good }.backward(&mut layer).unwrap_err();
        assert_eq!(e.status == Status::InvalidArgument, rank == 0, "{e}");
        assert!(e.text.contains("context: belongs to problem"), "{e}");
        let mut args = good.args(Pass::Forward);
        if rank == 1 {
            args.regions = Regions::new(&[list[0], Region::full(0, (19, 33), (0, 34))]);
        }
        // SAFETY: the batch outlives the call.
        let e = unsafe { layer.forward(Ok(args)).unwrap_err() };
        good.both(&mut layer)?;
        Ok(e)
    });
    for (rank, e) in errors.iter().enumerate() {
        let (status, word) = match rank {
            1 => (Status::InvalidArgument, "slices[1]: got keys 0 … 34"),
            _ => (Status::Mismatch, "rank 1"),
        };
        assert_eq!(e.status, status, "rank {rank}: {e}");
        assert!(e.text.contains(word), "rank {rank}: {e}");
    }
}

/// Documents, a shared prompt, and blocks: what a batch of a thousand slices is made of.
pub fn thousand(kind: &str, len: u32) -> Regions {
    let piece = len / 1000;
    let at = |i: u32| (i * piece, (i + 1) * piece);
    let causal = |q, k| Region { hi: Some(0), ..Region::full(0, q, k) };
    let list: Vec<Region> = match kind {
        "documents" => (0..1000).map(|i| causal(at(i), at(i))).collect(),
        "prompt" => std::iter::once(Region::full(0, (piece, len), (0, piece)))
            .chain((0..999).map(|i| causal(at(i), at(i))))
            .collect(),
        _ => {
            let mut r = Random::new(9);
            let size = len / 64;
            let at = |i: u32| (i * size, (i + 1) * size);
            let lower = (0..64).flat_map(|i| (0..=i).map(move |j| (i, j)));
            lower.filter(|_| !r.one_in(2)).map(|(i, j)| causal(at(i), at(j))).take(1000).collect()
        }
    };
    Regions::new(&list)
}

/// A list that covers a million squares is checked in no time; one of bands that all cross is refused when it is too long.
#[test]
fn long_lists_are_checked() {
    let at = |i: u32| (10 * i, 10 * i + 10);
    let squares: Vec<Region> =
        (0..300).flat_map(|i| (0..300).map(move |j| Region::full(0, at(i), at(j)))).collect();
    assert_eq!(Regions::new(&squares).validate(&[(3000, 3000)]), Ok(()));
    // A wide one does not make the narrow ones, which many queries share, be compared with each other.
    let narrow = (0..200_000).map(|i| Region::full(0, (1, 9), (i, i + 1)));
    let wide = Region::full(0, (0, 1), (0, 200_000));
    let columns: Vec<Region> = narrow.chain([wide]).collect();
    assert_eq!(Regions::new(&columns).validate(&[(9, 200_000)]), Ok(()));
    let diagonal =
        |d: i32| Region { lo: Some(d), hi: Some(d), ..Region::full(0, (0, 40_000), (0, 40_000)) };
    let some: Vec<Region> = (0..2000).map(diagonal).collect();
    assert_eq!(Regions::new(&some).validate(&[(40_000, 40_000)]), Ok(()));
    let seqs = vec![Sequence::square(40_000)];
    let p = Problem { regions: Regions::new(&some), seqs, ..problem(2, CommType::P2p, 0, 1, 2, 1) };
    assert_eq!(p.validate(), Ok(()));
}
