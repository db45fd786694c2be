//! Numbers on CUDA: the corpus over virtual ranks on one device, over every device transport, against the float64 oracle. The same tests run
//! on the software GPU (in CI) and on real ones.
//!
//! `CP_SEED` chooses what is drawn; without it a fixed one. On the software GPU the order in which everything runs comes from SOFTGPU_SEED.

use crate::cuda_ranks::{OnCuda, run};
use crate::numbers::{Run, Tally, fast};
use crate::oracle::{Case, cases, mix, reference};
use crate::ranks::panic_text;
use context_parallel::dtype::DType;
use context_parallel::partition::Side;
use context_parallel::problem::CommType;
use context_parallel::transport::device::join::Way;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Numbers of virtual ranks.
const RANKS: [u32; 6] = [1, 2, 3, 4, 5, 8];
/// Longer cases take minutes on the software GPU.
const LONGEST: usize = 256;

fn seed() -> u64 {
    std::env::var("CP_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0)
}

fn check(run_: &Run, on: OnCuda) -> Result<[f64; 5], String> {
    let inputs = &reference(run_.case, run_.problem.dtype).inputs;
    let got = catch_unwind(AssertUnwindSafe(|| run(&run_.problem, run_.how, on, inputs)))
        .unwrap_or_else(|e| Err(panic_text(&*e)));
    got.and_then(|got| run_.compare(got)).map_err(|e| format!("{e}\n    in {run_} {on:?}"))
}

/// Every short case meets every communication type and every way once, in bf16 and fp16 in turns, on numbers of ranks in turns; everything
/// else is drawn.
fn corpus(way: Way) {
    let ways = [Way::Local, Way::Nccl, Way::Staged];
    let turn = ways.iter().position(|w| *w == way).expect("one of the three");
    let mut tally = Tally::default();
    let fits = |c: &&Case| c.tokens(Side::Query).max(c.tokens(Side::Key)) <= LONGEST;
    let short = cases().iter().filter(fits);
    for (index, case) in short.enumerate().filter(|(_, c)| !fast() || c.is("fast")) {
        for (kind, comm) in CommType::ALL.into_iter().enumerate() {
            // A third of the combinations per way: all of them over the three.
            if (index + kind + seed() as usize) % 3 != turn {
                continue;
            }
            let number = mix(seed().wrapping_mul(7919) + (index * 4 + kind) as u64) as usize;
            let dtype = [DType::Bf16, DType::F16][(index + kind) % 2];
            let ranks = RANKS[(index + 2 * kind + turn + seed() as usize) % RANKS.len()];
            let drawn = Run::drawn(case, ranks, comm, dtype, (number % 100_003) as u64);
            let on =
                OnCuda { way, deterministic: number & 16 == 0, margin: (number as u32 >> 5) & 1 };
            let result = check(&drawn, on);
            tally.note(&drawn, result);
        }
    }
    assert!(tally.runs > 10, "{} runs", tally.runs);
    tally.end(&format!("corpus on CUDA over {way:?}, seed {}", seed()));
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn corpus_local() {
    corpus(Way::Local);
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn corpus_nccl() {
    corpus(Way::Nccl);
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn corpus_staged() {
    corpus(Way::Staged);
}

/// Keys and values that travel as 8-bit numbers.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn keys_in_8_bits() {
    over_every_way(|c| c.kv_wire.is_some(), 31).end("keys and values in 8 bits on CUDA");
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn latents() {
    over_every_way(|c| c.latent.is_some(), 29).end("latents on CUDA");
}

/// The short ones of some cases on every communication type over every way; `mix` decides what is drawn.
fn over_every_way(wanted: impl Fn(&Case) -> bool, mix: usize) -> Tally {
    let mut tally = Tally::default();
    let fits = |c: &&Case| c.tokens(Side::Key) <= LONGEST && wanted(c);
    for (index, case) in cases().iter().filter(fits).enumerate() {
        for (kind, comm) in CommType::ALL.into_iter().enumerate() {
            for (turn, way) in [Way::Local, Way::Nccl, Way::Staged].into_iter().enumerate() {
                let number = seed() as usize + index + kind + turn;
                let dtype = [DType::Bf16, DType::F16][number % 2];
                let ranks = RANKS[(number + kind) % 5];
                let drawn = Run::drawn(case, ranks, comm, dtype, (number * mix) as u64);
                tally.note(&drawn, check(&drawn, OnCuda { way, deterministic: true, margin: 0 }));
            }
        }
    }
    tally
}

/// A small step of three ranks over each way, in which planted faults of the driver and of NCCL have to show: see tests/softgpu/api_faults.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn scenario() {
    let case = cases().iter().find(|c| c.name == "causal_101_sbhd").expect("in the corpus");
    let only = std::env::var("CP_SCENARIO_WAY").ok();
    for way in [Way::Local, Way::Nccl, Way::Staged] {
        if only.as_ref().is_some_and(|w| *w != format!("{way:?}")) {
            continue;
        }
        for comm in [CommType::P2p, CommType::A2a] {
            let run = Run::plain(case, 3, comm, DType::Bf16);
            let on = OnCuda { way, deterministic: true, margin: 0 };
            check(&run, on).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}
