//! The balanced partition: what it promises, on packs of real document lengths and on whatever comes.
//! `cargo test --test integration balanced_packs -- --nocapture` prints the table.

use crate::plans::{problem, prove};
use crate::plans_random::Random;
use context_parallel::balance::{CHUNK, Dealt, balance};
use context_parallel::holding::{holding, stretches};
use context_parallel::mask::Mask;
use context_parallel::partition::{Partition, Segment, Side};
use context_parallel::plan::account::summary;
use context_parallel::plan::{Options, Pass, Plan};
use context_parallel::problem::{CommType, Extent, Problem, Sequence};
use std::sync::Arc;
use std::time::Instant;

/// Ranges of lengths and how many documents have them.
fn length_table() -> Vec<(u32, u32, u32)> {
    let text = include_str!("../data/doc_length_distribution.csv");
    let row = |line: &str| {
        let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
        let mut next = || numbers.next().unwrap().parse::<u32>().unwrap();
        (next().max(1), next(), next())
    };
    text.lines().skip(1).map(row).collect()
}

/// A pack of `total` tokens, no document longer than a quarter of it.
fn pack(r: &mut Random, table: &[(u32, u32, u32)], total: u32) -> Vec<Sequence> {
    let documents = table.iter().map(|row| row.2).sum();
    let mut out = Vec::new();
    let mut left = total;
    while left > 0 {
        let mut ticket = r.within(1, documents);
        let row = table.iter().find(|row| {
            let found = ticket <= row.2;
            ticket = ticket.wrapping_sub(row.2);
            found
        });
        let (low, high, _) = row.unwrap();
        let length = r.within(*low, *high);
        if length <= total / 4 {
            out.push(Sequence::square(length.min(left)));
            left -= length.min(left);
        }
    }
    out
}

/// What a partition costs, from the segments that ranks hold.
struct Cost {
    /// Most pairs of a rank over the mean.
    imbalance: f64,
    /// Key rows that move, over a ring's (P−1)·S.
    moved: f64,
    /// Key rows that the busiest rank sends, over a ring's (P−1)·S/P.
    sent: f64,
    segments: usize,
    rows: (u32, u32),
}

fn cost(p: &Problem) -> Cost {
    let held: Vec<_> = (0..p.ranks).map(|r| holding(p, r, Side::Query)).collect();
    let total: u64 = p.seqs.iter().map(|s| u64::from(s.q.padded)).sum();
    let ring = f64::from(p.ranks - 1) * total as f64;
    let seen = |s: &Segment| -> u64 {
        let n = |i: u32| u64::from(i);
        let causal = n(s.len) * (n(s.start) + 1 + n(s.start + s.len)) / 2;
        if p.mask.causal { causal } else { n(s.len) * n(p.seqs[s.seq as usize].k.len) }
    };
    let loads = held.iter().map(|h| h.segments.iter().map(seen).sum::<u64>());
    let (worst, all) = loads.fold((0, 0), |(worst, all), l| (l.max(worst), all + l));
    // Keys before the last row of every document that a rank has rows of.
    let mut reach = vec![vec![0; p.ranks as usize]; p.seqs.len()];
    for (r, h) in held.iter().enumerate() {
        for s in &h.segments {
            let end = if p.mask.causal { s.start + s.len } else { p.seqs[s.seq as usize].k.len };
            reach[s.seq as usize][r] = end.max(reach[s.seq as usize][r]);
        }
    }
    let sent = held.iter().enumerate().map(|(r, h)| -> u64 {
        let of = |s: &Segment| {
            let others = reach[s.seq as usize].iter().enumerate().filter(|(o, _)| *o != r);
            others.map(|(_, e)| u64::from(s.len.min(e.saturating_sub(s.start)))).sum::<u64>()
        };
        h.segments.iter().map(of).sum()
    });
    let (most, moved) = sent.fold((0, 0), |(most, all), s| (s.max(most), all + s));
    let rows = || held.iter().map(|h| h.rows);
    Cost {
        imbalance: worst as f64 / (all as f64 / f64::from(p.ranks)),
        moved: moved as f64 / ring,
        sent: most as f64 / (ring / f64::from(p.ranks)),
        segments: held.iter().map(|h| h.segments.len()).max().unwrap(),
        rows: (rows().min().unwrap(), rows().max().unwrap()),
    }
}

fn packed(ranks: u32, seqs: Vec<Sequence>, partition: Partition) -> Problem {
    Problem { packed: true, seqs, partition, ..problem(ranks, CommType::P2p, 0, 0, 8, 8) }
}

fn balanced(ranks: u32, seqs: Vec<Sequence>) -> Problem {
    let mut p = packed(ranks, seqs, Partition::Balanced);
    p.validate().unwrap();
    Dealt::default().resolve(&mut p);
    p
}

fn row(name: &str, values: &[f64], decimals: usize) {
    let worst = values.iter().fold(0.0, |a: f64, b| a.max(*b));
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    println!("    {name:<58} worst {worst:8.decimals$}   mean {mean:8.decimals$}");
}

/// Milliseconds.
fn best_of_three(f: impl Fn()) -> f64 {
    let time = || {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64() * 1e3
    };
    time().min(time()).min(time())
}

/// 100 packs, 8k tokens a rank.
#[test]
fn balanced_packs() {
    let table = length_table();
    for ranks in [8, 64] {
        let mut r = Random::new(4);
        let (mut costs, mut full, mut zigzag) = (Vec::new(), Vec::new(), Vec::new());
        let (mut times, mut planning, mut documents) = (Vec::new(), Vec::new(), Vec::new());
        let mut again = Vec::new();
        for i in 0..100 {
            let seqs = pack(&mut r, &table, ranks * 8192);
            documents.push(seqs.len() as f64);
            let docs: Vec<Extent> = seqs.iter().map(|s| s.q).collect();
            times.push(best_of_three(|| drop(std::hint::black_box(balance(&docs, ranks)))));
            let p = balanced(ranks, seqs.clone());
            p.validate().unwrap();
            for (rank, list) in balance(&docs, ranks).iter().enumerate() {
                assert_eq!(*list, stretches(&p, rank as u32, Side::Key), "the same every time");
                let small =
                    list.iter().find(|s| s.len < CHUNK && docs[s.seq as usize].padded >= 2 * CHUNK);
                assert!(small.is_none(), "pack {i}: {small:?}");
            }
            let c = cost(&p);
            assert!(c.rows.1 - c.rows.0 <= CHUNK, "pack {i}: {:?} rows", c.rows);
            assert!(c.imbalance <= 1.10, "pack {i}: {}", c.imbalance);
            assert!(c.moved <= 0.15, "pack {i}: {}", c.moved);
            assert!(c.segments <= 40, "pack {i}: {}", c.segments);
            if i < 800 / ranks / 4 {
                let p = Arc::new(p.clone());
                let plans = Plan::all(&p, Pass::Forward, Options::default());
                let s = summary(&plans);
                let pairs = s.worst.pairs as f64 * f64::from(ranks) / s.total.pairs as f64;
                let ring = f64::from(ranks - 1) * f64::from(ranks * 8192);
                let moved = s.total.received_key_rows as f64 / ring;
                assert!((pairs - c.imbalance).abs() < 1e-9, "plans compute what was counted here");
                assert!((moved - c.moved).abs() < 1e-9, "{moved}: plans move what was counted");
            }
            let dealt = Dealt::default();
            again.push(best_of_three(|| {
                let mut p = packed(ranks, seqs.clone(), Partition::Balanced);
                p.validate().unwrap();
                dealt.resolve(&mut p);
                std::hint::black_box(p.fingerprint());
            }));
            let rank = i % ranks;
            let p = Arc::new(p);
            let plan = || drop(std::hint::black_box(Plan::both(&p, rank, Options::default())));
            planning.push(best_of_three(plan));
            full.push(cost(&Problem { mask: Mask::FULL, ..(*p).clone() }));
            zigzag.push(cost(&packed(ranks, seqs, Partition::Zigzag)));
            costs.push(c);
        }
        let of = |f: fn(&Cost) -> f64| costs.iter().map(f).collect::<Vec<_>>();
        println!("P = {ranks}, 100 packs of {} tokens", ranks * 8192);
        row("documents in a pack", &documents, 0);
        row("pairs of the busiest rank / mean", &of(|c| c.imbalance), 3);
        row("key rows moved / a ring's", &of(|c| c.moved), 3);
        row("key rows sent by the busiest rank / a ring's", &of(|c| c.sent), 3);
        row("segments of a rank, at most", &of(|c| c.segments as f64), 0);
        row(
            "rows of the fullest rank − of the emptiest",
            &of(|c| f64::from(c.rows.1 - c.rows.0)),
            0,
        );
        row(
            "full mask: pairs of the busiest rank / mean",
            &full.iter().map(|c| c.imbalance).collect::<Vec<_>>(),
            3,
        );
        row(
            "zigzag: key rows moved / a ring's",
            &zigzag.iter().map(|c| c.moved).collect::<Vec<_>>(),
            3,
        );
        row(
            "zigzag: segments of a rank, at most",
            &zigzag.iter().map(|c| c.segments as f64).collect::<Vec<_>>(),
            0,
        );
        row("ms to deal the documents out", &times, 2);
        row("ms to make the same call's problem again, and its hash", &again, 3);
        row("ms to plan both passes of one rank then", &planning, 2);
        assert!(times.iter().sum::<f64>() < 100.0 * 100.0, "a disaster: {times:?} ms");
    }
}

/// Any lengths, any padding, any P: every position once, rows even, and nobody panics.
#[test]
fn balanced_whatever_comes() {
    let mut r = Random::new(9);
    for case in 0..3000 {
        let ranks = r.within(1, 17);
        let count = r.within(1, 40);
        let longest = r.of(&[1, 3, 40, 700, 9000]);
        let any = |r: &mut Random| {
            let padded = if r.one_in(5) { r.within(0, 2) } else { r.within(0, longest) };
            let before = if r.one_in(3) { r.within(0, padded) } else { 0 };
            let len = if r.one_in(3) { r.within(0, padded - before) } else { padded - before };
            let e = Extent { before, len, padded };
            Sequence { q: e, k: e }
        };
        let seqs: Vec<Sequence> = (0..count).map(|_| any(&mut r)).collect();
        let total: u32 = seqs.iter().map(|s| s.q.padded).sum();
        let p = balanced(ranks, seqs);
        p.validate().unwrap_or_else(|e| panic!("case {case}: {e}"));
        let rows = |rank| stretches(&p, rank, Side::Query).iter().map(|s| s.len).sum::<u32>();
        let (most, least) =
            ((0..ranks).map(rows).max().unwrap(), (0..ranks).map(rows).min().unwrap());
        let chunk = CHUNK.min(total / ranks / 2).max(1);
        assert!(
            most - least <= chunk,
            "case {case}: {least} to {most} rows, chunks of {chunk}: {p:?}"
        );
    }
}

/// One document is cut so that ranks compute alike, as zigzag does, and fewer keys move.
#[test]
fn balanced_one_document() {
    for ranks in [2, 3, 4, 8, 16] {
        let one = vec![Sequence::square(ranks * 8192)];
        let (c, z) =
            (cost(&balanced(ranks, one.clone())), cost(&packed(ranks, one, Partition::Zigzag)));
        println!(
            "P {ranks:2}: pairs {:.3}, moved {:.3} (zigzag {:.3}), segments {}",
            c.imbalance, c.moved, z.moved, c.segments
        );
        assert!(c.imbalance <= 1.10 && c.moved <= z.moved + 0.001, "P {ranks}");
    }
}

/// Plans over balanced lists are proved like all others, and an unresolved `Balanced` means the same.
#[test]
fn balanced_plans_are_proved() {
    for (ranks, comm, inner) in [
        (3, CommType::P2p, 0),
        (4, CommType::AllGather, 0),
        (4, CommType::A2a, 0),
        (6, CommType::A2aP2p, 2),
    ] {
        let seqs: Vec<Sequence> =
            [700, 31, 5, 0, 90, 212, 64].iter().map(|l| Sequence::square(*l)).collect();
        let p = balanced(ranks, seqs.clone());
        let inner = comm.inner(ranks, inner).unwrap();
        let stages = comm.default_stages(ranks / inner);
        prove(&Problem { inner, stages, ..p.clone() });
        let lazy = packed(ranks, seqs, Partition::Balanced);
        for rank in 0..ranks {
            assert_eq!(holding(&lazy, rank, Side::Key), holding(&p, rank, Side::Key));
        }
    }
}

#[test]
fn balanced_refuses_by_name() {
    let mut p = packed(4, vec![Sequence::square(10), Sequence::square(20)], Partition::Balanced);
    p.seqs[1].k = Extent::full(21);
    let error = p.validate().unwrap_err().to_string();
    assert!(error.contains("sequence 1 has 20 of 20 query rows and 21 of 21 key rows"), "{error}");
    let dense =
        Problem { partition: Partition::Balanced, ..problem(4, CommType::P2p, 0, 64, 2, 2) };
    let error = dense.validate().unwrap_err().to_string();
    assert!(error.contains("balanced deals out packed documents"), "{error}");
}
