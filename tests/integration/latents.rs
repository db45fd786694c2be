//! Latents: against the oracle on every communication type, and against attention on keys and values that were expanded before.

use crate::numbers::{Run, Stages, Tally, fast};
use crate::oracle::{Case, Results, cases, reference};
use crate::ranks::{How, run, shards};
use context_parallel::dtype::DType;
use context_parallel::plan::{HeadShare, Tensor};
use context_parallel::problem::{CommType, Problem};
use std::io::Write;

fn with_latents() -> impl Iterator<Item = &'static Case> {
    cases().iter().filter(|c| c.latent.is_some())
}

/// All communication types on 1 … 5 ranks (a2a+p2p on 4 and 6), and the relay; everything else is drawn.
#[test]
fn latents_on_every_communication_type() {
    let mut tally = Tally::default();
    for (n, case) in with_latents().enumerate() {
        for (c, comm) in CommType::ALL.into_iter().enumerate() {
            let ranks: &[u32] = if comm == CommType::A2aP2p { &[4, 6] } else { &[1, 2, 3, 4, 5] };
            for &ranks in ranks {
                if fast() && !(n + c + ranks as usize).is_multiple_of(5) {
                    continue;
                }
                let seed = (1 << 23) + (n * 64 + c * 16) as u64 + u64::from(ranks);
                let dtype = DType::ALL[(n + c + ranks as usize) % 3];
                tally.add(&Run::drawn(case, ranks, comm, dtype, seed));
                let mut relay = Run::plain(case, ranks, comm, dtype);
                relay.problem.relay =
                    relay.problem.teams() > 2 && relay.problem.stages + 1 == relay.problem.teams();
                relay.stages = if relay.problem.relay { Stages::Relay } else { Stages::Named };
                tally.add(&relay);
            }
        }
    }
    tally.end("latents");
}

/// The keys that come of latents are those that a caller would have expanded: outputs and dQ have the same bits, and the gradient of the latents is
/// what dK and dV contract to.
#[test]
fn latents_are_expanded_keys() {
    let mut text = String::from("d_latent against contracted dK, dV, worst relative L2 error: ");
    for dtype in DType::ALL {
        let mut worst = 0.0f64;
        for (n, case) in with_latents().enumerate() {
            for (c, comm) in CommType::ALL.into_iter().enumerate() {
                if fast() && (n + c) % 4 > 0 {
                    continue;
                }
                let problem = case.problem(4, comm, None, dtype).unwrap();
                let plain = Problem { latent: None, ..problem.clone() };
                let inputs = &reference(case, dtype).inputs;
                let of =
                    |p: &Problem| run(p, How::default(), inputs).unwrap_or_else(|e| panic!("{e}"));
                let (made, given) = (of(&problem), of(&plain));
                let what = format!("case {}, {}, {}", case.name, comm.name(), dtype.name());
                for (name, a, b) in [
                    ("o", &made.o, &given.o),
                    ("lse", &made.lse, &given.lse),
                    ("dq", &made.dq, &given.dq),
                ] {
                    let same = a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits());
                    assert!(same && a.len() == b.len(), "{what}: {name} has other bits");
                }
                let [error, size] = contracted(case, &given, &made, inputs);
                worst = worst.max(error / size);
            }
        }
        // Partial dK and dV are rounded on their way, so is the gradient itself.
        let allowed = if dtype == DType::F32 { 1e-6 } else { 0.02 };
        assert!(worst > 0.0 && worst < allowed, "{}: {worst}", dtype.name());
        text += &format!("{} {worst:.1e}; ", dtype.name());
    }
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// How far the gradient of the latents is from Σ up_kᵀ·dK + up_vᵀ·dV, and how large that is.
fn contracted(
    case: &Case,
    given: &Results<f32>,
    made: &Results<f32>,
    inputs: &crate::oracle::Inputs,
) -> [f64; 2] {
    let [dim, rope, nope] = case.latent_dims();
    let x = &inputs.latent;
    let (mut error, mut size) = (0.0, 0.0);
    for token in case.true_tokens(context_parallel::partition::Side::Key) {
        let mut sum = vec![0f64; dim + rope];
        for head in 0..case.heads {
            let at = token * case.heads + head;
            let (dk, dv) = (&given.dk[at * case.dim_qk..], &given.dv[at * case.dim_v..]);
            for (i, sum) in sum[..dim].iter_mut().enumerate() {
                let k = (0..nope).map(|n| (dk[n], x.up_k[(head * nope + n) * dim + i]));
                let v = (0..case.dim_v).map(|n| (dv[n], x.up_v[(head * case.dim_v + n) * dim + i]));
                *sum += k.chain(v).map(|(g, w)| f64::from(g) * f64::from(w)).sum::<f64>();
            }
            for (sum, g) in sum[dim..].iter_mut().zip(&dk[nope..case.dim_qk]) {
                *sum += f64::from(*g);
            }
        }
        for (i, sum) in sum.into_iter().enumerate() {
            error += (f64::from(made.d_latent[token * (dim + rope) + i]) - sum).powi(2);
            size += sum.powi(2);
        }
    }
    [error.sqrt(), size.sqrt()]
}

/// The same bits for any number of threads and whatever the network's timing.
#[test]
fn latents_have_the_same_bits() {
    for (n, case) in with_latents().enumerate() {
        let comm = CommType::ALL[n % 4];
        let problem = case.problem(4, comm, None, DType::ALL[n % 3]).unwrap();
        let inputs = &reference(case, problem.dtype).inputs;
        let of = |threads, delay| {
            let how = How { threads, delay, ..How::default() };
            let r = run(&problem, how, inputs).unwrap_or_else(|e| panic!("{e}"));
            [r.o, r.dq, r.d_latent, r.d_up_k, r.d_up_v]
                .map(|x| -> Vec<u32> { x.into_iter().map(f32::to_bits).collect() })
        };
        let first = of(1, None);
        for (threads, delay) in [(2, Some(1)), (3, None)] {
            assert!(of(threads, delay) == first, "case {}, {}", case.name, comm.name());
        }
    }
}

/// A rank's part of the gradient of the weights: of its own queries in a ring, of its own heads with a2a.
#[test]
fn a_rank_has_its_part_of_the_weights() {
    let case = with_latents().next().unwrap();
    let inputs = &reference(case, DType::F32).inputs;
    for comm in CommType::ALL {
        let problem = case.problem(4, comm, None, DType::F32).unwrap();
        let of = shards(&problem, How::default(), inputs).unwrap();
        for (rank, shard) in of.iter().enumerate() {
            let share = HeadShare::of(&problem, rank as u32 % problem.inner).kv;
            for tensor in [Tensor::DUpK, Tensor::DUpV] {
                let local = shard.get(tensor);
                for head in 0..case.heads {
                    let mut row = vec![f32::NAN; local.view.dim];
                    local.get(0, head, &mut row);
                    let mine = share.contains(&(head as u32));
                    let zero = row.iter().all(|x| *x == 0.0);
                    assert_eq!(zero, !mine, "{} rank {rank} {tensor:?} {head}", comm.name());
                }
            }
        }
    }
}
