//! Plans whose keys and values are made of latents: proved, and what they cost.

use crate::plan_faults::{every, steps};
use crate::plans::{problem, prove};
use context_parallel::dtype::DType;
use context_parallel::mask::Mask;
use context_parallel::partition::Partition;
use context_parallel::plan::account::{Account, summary};
use context_parallel::plan::{Op, Options, Pass, Plan};
use context_parallel::problem::{CommType, Extent, Latent, Problem, Sequence, Wire};
use context_parallel::score::{Reach, Score};
use std::io::Write;
use std::sync::Arc;

/// A problem of `heads` heads with a small latent.
pub fn latent(ranks: u32, comm: CommType, inner: u32, len: u32, heads: u32) -> Problem {
    let p = problem(ranks, comm, inner, len, heads, heads);
    Problem { dim_qk: 24, dim_v: 16, latent: Some(Latent { dim: 32, rope: 8 }), ..p }
}

#[test]
fn every_communication_type_is_proved() {
    let masks = [Mask::CAUSAL, Mask::FULL, Mask { left: Some(3), ..Mask::CAUSAL }];
    let padded = Extent { before: 2, len: 9, padded: 12 };
    let docs = vec![
        Sequence::square(1),
        Sequence { q: padded, k: padded },
        Sequence::square(0),
        Sequence { q: Extent::full(4), k: Extent::full(7) },
    ];
    for ranks in [1, 2, 3, 4, 5, 6] {
        for (comm, inner) in [
            (CommType::P2p, 0),
            (CommType::AllGather, 0),
            (CommType::A2a, 0),
            (CommType::A2aP2p, if ranks % 2 == 0 { 2 } else { 0 }),
        ] {
            for mask in masks {
                for partition in [Partition::Zigzag, Partition::Contiguous, Partition::Striped] {
                    for (seqs, packed) in
                        [(vec![Sequence::square(17)], false), (docs.clone(), true)]
                    {
                        let base = latent(ranks, comm, inner, 17, 3);
                        let p =
                            Problem { mask, partition: partition.clone(), seqs, packed, ..base };
                        prove(&p);
                        if p.stages > 1 {
                            prove(&Problem { relay: true, ..p.clone() });
                            prove(&Problem { stages: p.stages - 1, wire: Wire::F32, ..p.clone() });
                        }
                        let score =
                            Score { sinks: Some(Reach::Group), softcap: 2.0, ..Score::default() };
                        prove(&Problem { score, ..p });
                    }
                }
            }
        }
    }
}

/// What expands or contracts the wrong rows, of the wrong latents, or not at all.
#[test]
fn faults_of_latents_are_found() {
    let made =
        |s: &context_parallel::plan::Step| matches!(s.op, Op::Expand { .. } | Op::Contract { .. });
    every(
        "a row that is left out",
        steps(made),
        |plans, (rank, step): (usize, usize)| {
            let plan = &mut plans[rank];
            // Half of a rank's own queries may not see all of its keys.
            let all_seen = plan.pass == Pass::Forward || plan.steps[step].stage > 0;
            let (Op::Expand { rows, .. } | Op::Contract { rows, .. }) = &mut plan.steps[step].op
            else {
                return false;
            };
            rows.last_mut().unwrap().end -= 1;
            all_seen
        },
        &["nobody wrote", "is not the sum"],
    );
    every(
        "contracted twice",
        steps(|s| matches!(s.op, Op::Contract { .. })),
        |plans, (rank, step): (usize, usize)| {
            let again = plans[rank].steps[step].clone();
            plans[rank].steps.insert(step, again);
            plans[rank].steps[step].signal = None;
            true
        },
        &["is not the sum"],
    );
    every(
        "contracted with other latents",
        steps(|s| matches!(s.op, Op::Contract { .. })),
        |plans, (rank, step): (usize, usize)| {
            let Op::Contract { latent, .. } = plans[rank].steps[step].op else { return false };
            let expands = |s: &context_parallel::plan::Step| matches!(s.op, Op::Expand { latent: l, .. } if l != latent);
            let Some(other) = plans[rank].steps.iter().find(|s| expands(s)).cloned() else {
                return false;
            };
            let Op::Expand { latent: other, .. } = other.op else { return false };
            let Op::Contract { latent, .. } = &mut plans[rank].steps[step].op else { return false };
            *latent = other;
            true
        },
        &["is not the sum", "not row", "nothing orders"],
    );
}

fn total(p: &Problem, pass: Pass) -> Account {
    let options = Options { same_pieces: true, ..Options::default() };
    summary(&Plan::all(&Arc::new(p.clone()), pass, options)).total
}

/// DeepSeek-V3's shape: 128 heads of 192 and 128 elements, latents of 512 + 64.
fn deepseek(ranks: u32, comm: CommType, inner: u32) -> Problem {
    let dims = Latent { dim: 512, rope: 64 };
    let p = problem(ranks, comm, inner, 64 * ranks, 128, 128);
    Problem { dim_qk: 192, dim_v: 128, dtype: DType::Bf16, latent: Some(dims), ..p }
}

/// 576 elements a token instead of 128 · (192 + 128), whoever receives them, in a ring; and what the head exchange of a2a makes of it: each member
/// receives whole latents instead of its share of heads, so the fewer heads a member has, the less is saved, and below two it costs.
#[test]
fn latents_move_a_seventieth() {
    let mut text = String::from("bytes of keys and values, latents / expanded: ");
    for (comm, ranks, inner) in [
        (CommType::P2p, 8, 0),
        (CommType::AllGather, 8, 0),
        (CommType::A2a, 8, 0),
        (CommType::A2a, 64, 0),
        (CommType::A2aP2p, 16, 4),
    ] {
        let p = deepseek(ranks, comm, inner);
        let plain = Problem { latent: None, ..p.clone() };
        let [f, b] = [Pass::Forward, Pass::Backward].map(|pass| {
            let (a, plain) = (total(&p, pass), total(&plain, pass));
            let of_keys = |a: &Account| a.received_keys + a.received_gradients;
            if inner == 0 && comm != CommType::A2a {
                assert_eq!(of_keys(&a) * 128 * 320, of_keys(&plain) * 576, "{comm:?} {pass:?}");
                assert_eq!(a.received_key_rows, plain.received_key_rows);
                assert_eq!(a.received, of_keys(&a), "nothing else travels");
            }
            (a.received, plain.received, a.latent_flops as f64 / a.flops as f64)
        });
        text += &format!(
            "{} P {ranks}: {:.4} forward, {:.4} backward, all that is received; ",
            comm.name(),
            f.0 as f64 / f.1 as f64,
            b.0 as f64 / b.1 as f64
        );
        assert!(f.0 < f.1 && b.0 < b.1);
    }
    let _ = writeln!(std::io::stdout(), "{text}");
    // Per token a member of a2a gets 576 elements instead of its heads' 320 each: with one head of 64 it is more.
    let heads = |heads: u32, ranks: u32| {
        let p = Problem { heads, kv_heads: heads, ..deepseek(ranks, CommType::A2a, 0) };
        let keys = |p: &Problem| {
            let q = u64::from(p.heads / ranks) * 192 + u64::from(p.heads / ranks) * 128;
            let tokens = u64::from(p.seqs[0].k.len) * u64::from(ranks - 1);
            // Without queries and outputs, in bf16, and the LSE in fp32.
            let lse = u64::from(p.heads / ranks) * 4;
            total(p, Pass::Forward).received - tokens * (2 * q + lse)
        };
        let tokens = u64::from(p.seqs[0].k.len) * u64::from(ranks - 1);
        (keys(&p) / tokens / 2, keys(&Problem { latent: None, ..p.clone() }) / tokens / 2)
    };
    assert_eq!(heads(128, 8), (576, 16 * 320));
    assert_eq!(heads(128, 64), (576, 2 * 320));
    assert_eq!(heads(64, 64), (576, 320), "break-even is at 1.8 heads a member");
}

/// Keys and values of one stage at a time: what a rank needs does not grow with the number of stages.
#[test]
fn memory_holds_one_stage() {
    let at = |stages| {
        let p = Problem { stages, ..deepseek(8, CommType::P2p, 0) };
        let plans = Plan::all(&Arc::new(p), Pass::Backward, Options::default());
        let rows = |plan: &Plan| {
            let k = plan.slots.iter().filter(|s| format!("{:?}", s.slot) == "SeenK");
            k.map(|s| s.rows).max().unwrap()
        };
        plans.iter().map(rows).max().unwrap()
    };
    assert_eq!(at(7), 64);
    assert_eq!(at(1), 7 * 64);
}
