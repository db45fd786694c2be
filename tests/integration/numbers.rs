//! Numbers: every communication type against one rank.

use crate::plans::problem;
use crate::ranks::{Global, How, run};
use context_parallel::dtype::DType;
use context_parallel::problem::{CommType, Problem};

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
        })
        .collect()
}

#[test]
fn p_ranks_equal_one() {
    for (ranks, comm, inner) in [
        (5, CommType::P2p, 0),
        (5, CommType::AllGather, 0),
        (5, CommType::A2a, 0),
        (6, CommType::A2aP2p, 2),
        (6, CommType::A2aP2p, 3),
    ] {
        let p = Problem { dtype: DType::F32, ..problem(ranks, comm, inner, 33, 6, 3) };
        let one = Problem { ranks: 1, inner: 1, stages: 0, ..p.clone() };
        let g = Global {
            q: noise(1, 33 * 6 * 8),
            k: noise(2, 33 * 3 * 8),
            v: noise(3, 33 * 3 * 8),
            d_out: noise(4, 33 * 6 * 8),
        };
        let want = run(&one, How::default(), &g);
        for delay in [None, Some(7)] {
            let got = run(&p, How { delay, ..How::default() }, &g);
            for (name, a, b) in [
                ("out", &got.out, &want.out),
                ("lse", &got.lse, &want.lse),
                ("dq", &got.dq, &want.dq),
                ("dk", &got.dk, &want.dk),
                ("dv", &got.dv, &want.dv),
            ] {
                let worst = a
                    .iter()
                    .zip(b)
                    .map(|(x, y)| (x - y).abs())
                    .fold(0f32, |m, d| if d.is_nan() { f32::NAN } else { m.max(d) });
                assert!(worst < 1e-5, "{comm:?} {name} {worst}");
            }
        }
    }
}
