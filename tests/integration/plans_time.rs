//! How long planning takes. Only printed: `cargo test --release planning_time -- --nocapture`.

use crate::plans::problem;
use crate::plans_random::Random;
use crate::slices;
use context_parallel::dtype::DType;
use context_parallel::partition::Partition;
use context_parallel::plan::trade::{Trade, Traded};
use context_parallel::plan::{Options, Pass, Plan, fewest_stages};
use context_parallel::problem::{CommType, Problem, Sequence};
use std::sync::Arc;
use std::time::Instant;

/// 300 documents of 14 to about 1700 tokens, most of them short, packed.
pub fn documents(ranks: u32, comm: CommType) -> Problem {
    let mut r = Random::new(1);
    let lengths = (0..300).map(|_| {
        let most = 14 << r.within(0, 7);
        Sequence::square(r.within(14, most))
    });
    let seqs = lengths.collect();
    Problem { packed: true, seqs, ..problem(ranks, comm, 0, 0, 32, 8) }
}

#[test]
fn planning_time() {
    let mut cases: Vec<(String, Problem)> = Vec::new();
    for ranks in [8, 16, 32, 64] {
        for comm in CommType::ALL {
            let inner = if comm == CommType::A2aP2p { 8 } else { 0 };
            let p = problem(ranks, comm, inner, 131072, 32, 8);
            cases.push((format!("one causal sequence, {ranks} ranks, {}", comm.name()), p));
        }
    }
    for comm in CommType::ALL {
        cases.push((format!("300 documents, 64 ranks, {}", comm.name()), documents(64, comm)));
    }
    for kind in ["documents", "prompt", "blocks"] {
        for partition in [Partition::Zigzag, Partition::Striped] {
            let regions = slices::thousand(kind, 128_000);
            let name = format!("1,000 slices ({kind}), 64 ranks, p2p, {partition:?}");
            let p = Problem { regions, partition, ..problem(64, CommType::P2p, 0, 128_000, 32, 8) };
            let start = Instant::now();
            p.validate().unwrap();
            println!("{:8.3} ms  validation: {name}", start.elapsed().as_secs_f64() * 1e3);
            cases.push((name, p));
        }
    }
    for (name, p) in cases {
        let p = Arc::new(p);
        let mut times: Vec<f64> = (0..15)
            .map(|i| {
                let start = Instant::now();
                std::hint::black_box(Plan::both(&p, i % p.ranks, Options::default()));
                start.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{:8.3} ms  both passes of one rank, best of 15: {name}", times[0]);
    }
    // Mamba's z, x, B, C, dt: 64 heads of 64, 8 groups of 128.
    for (name, p) in [
        ("one sequence, 64 ranks", problem(64, CommType::A2a, 0, 131072, 32, 8)),
        ("300 documents, 64 ranks", documents(64, CommType::A2a)),
    ] {
        let tensors = [(64, 64), (64, 64), (8, 128), (8, 128), (64, 1)];
        let of = |(heads, dim)| Traded { heads, dim, dtype: DType::Bf16 };
        let extents: Vec<_> = p.seqs.iter().map(|s| s.q).collect();
        let time = |i: u32| {
            let start = Instant::now();
            let tensors = tensors.map(of).to_vec();
            let extents = extents.iter().copied();
            let trade = Trade::new(64, p.partition.clone(), p.packed, extents, 0, tensors);
            let trade = Arc::new(trade.unwrap());
            std::hint::black_box(Plan::of_trade(&trade, i, Pass::ToHeads, Options::default()));
            std::hint::black_box(Plan::of_trade(&trade, i, Pass::ToSequence, Options::default()));
            start.elapsed().as_secs_f64() * 1e3
        };
        let best = (0..15).map(time).fold(f64::MAX, f64::min);
        println!("{best:8.3} ms  both directions of a trade, best of 15: {name}");
    }
    for (name, p) in [
        ("one causal sequence", problem(64, CommType::P2p, 0, 131072, 32, 8)),
        ("300 documents", documents(64, CommType::P2p)),
    ] {
        let start = Instant::now();
        let stages = fewest_stages(&p, 1 << 40, false);
        println!(
            "{:8.3} ms  fewest stages on 64 ranks: {name}, {stages:?}",
            start.elapsed().as_secs_f64() * 1e3
        );
    }
}
