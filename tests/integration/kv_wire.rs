//! Keys and values as 8-bit numbers on the wire: what is computed is attention of the rounded K and V, whoever holds them; what travels is as small as it should
//! be; and what the rounding costs.

use crate::numbers::{Run, Stages, Tally};
use crate::oracle::{Case, Inputs, Results, Tensor, attended, cases, inputs, mix, reference};
use crate::ranks::{How, Layout, run};
use context_parallel::dtype::{DType, Fp8};
use context_parallel::plan::account::{ALIGN, Account, account};
use context_parallel::plan::{Kind, Op, Options, Pass, Plan, Tensor as Role, check};
use context_parallel::problem::{CommType, Problem};
use std::io::Write;
use std::sync::Arc;

fn coded() -> impl Iterator<Item = (usize, &'static Case)> {
    cases().iter().filter(|c| c.kv_wire.is_some()).enumerate()
}

/// Every case on every communication type and the relay, on 1 … 5 ranks, against the oracle.
#[test]
fn right_on_every_communication_type() {
    let mut tally = Tally::default();
    for (n, case) in coded() {
        for (c, comm) in CommType::ALL.into_iter().enumerate() {
            for ranks in 1..=5 {
                let dtype = DType::ALL[(n + c + ranks as usize) % 3];
                let mut plain = Run::plain(case, ranks, comm, dtype);
                plain.how.saved = (n + c + ranks as usize).is_multiple_of(2);
                tally.add(&plain);
                if plain.problem.teams() > 1 {
                    plain.stages = Stages::Relay;
                    plain.problem.relay = true;
                    plain.problem.stages = plain.problem.teams() - 1;
                    tally.add(&plain);
                }
            }
        }
    }
    tally.end("keys and values in 8 bits");
}

fn bits(results: &Results<f32>) -> Vec<Vec<u32>> {
    let all = Tensor::ALL.map(|t| results.get(t).to_vec());
    let rest = [&results.d_sinks, &results.max_logit, &results.d_bias].map(|v| v.to_vec());
    all.into_iter().chain(rest).map(|v| v.iter().map(|x| x.to_bits()).collect()).collect()
}

/// The same bits as with K and V that are rounded before the call: so every rank attends what its peers do, its own keys included, backward
/// attends what forward did, and nothing is rounded twice.
#[test]
fn the_bits_of_attention_over_rounded_keys() {
    for (n, case) in coded() {
        for (c, comm) in CommType::ALL.into_iter().enumerate() {
            for ranks in [1, 2, 4, 5] {
                let seed = (1 << 30) + (n * 64 + c * 8) as u64 + u64::from(ranks);
                let dtype = DType::ALL[mix(seed) as usize % 3];
                let drawn = Run::drawn(case, ranks, comm, dtype, seed);
                let given = inputs(case, dtype);
                let seen = attended(case, &given, dtype);
                let got = run(&drawn.problem, drawn.how, &given).unwrap();
                let before = Problem { kv_wire: None, ..drawn.problem.clone() };
                // Rows lie as they do where they are coded: gathered.
                let want = run(&before, How { pack: true, ..drawn.how }, &seen).unwrap();
                assert!(bits(&got) == bits(&want), "{drawn}");
            }
        }
    }
}

/// A NaN or an infinity in V shows in every row that sees it, on whatever rank: in the elements of its block.
#[test]
fn what_is_not_finite_stays_so() {
    let case = cases().iter().find(|c| c.name == "kv_e4m3_causal").unwrap();
    let width = case.kv_heads * case.dim_v;
    let (token, head) = (40, 1);
    for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for comm in CommType::ALL {
            for format in Fp8::ALL {
                let mut problem = case.problem(3, comm, None, DType::Bf16).unwrap();
                problem.kv_wire = Some(format);
                let mut given: Inputs = inputs(case, DType::Bf16);
                given.v[token * width + head * case.dim_v + 33] = x;
                let got = run(&problem, How::default(), &given).unwrap();
                for row in token..150 {
                    let o = &got.o[row * width..][head * case.dim_v..][..case.dim_v];
                    let (left, right) = o.split_at(32);
                    assert!(left.iter().all(|x| x.is_finite()), "{format:?} {comm:?} {x} {row}");
                    assert!(right.iter().all(|x| x.is_nan()), "{format:?} {comm:?} {x} {row}");
                }
            }
        }
    }
}

fn problem(ranks: u32, comm: CommType, dtype: DType, kv_wire: Option<Fp8>) -> Arc<Problem> {
    let case = cases().iter().find(|c| c.name == "kv_e4m3_causal").unwrap();
    let shape = Case { heads: 8, kv_heads: 8, dim_qk: 128, dim_v: 128, ..case.clone() };
    Arc::new(Problem { kv_wire, ..shape.problem(ranks, comm, None, dtype).unwrap() })
}

fn total(problem: &Arc<Problem>, pass: Pass, saved: bool) -> Account {
    let plans = Plan::all(problem, pass, Options { saved, ..Options::default() });
    check::check(&plans).unwrap();
    let sum = |field: fn(&Account) -> u64| plans.iter().map(|p| field(&account(p))).sum();
    Account {
        received: sum(|a| a.received),
        received_keys: sum(|a| a.received_keys),
        received_gradients: sum(|a| a.received_gradients),
        received_heads: sum(|a| a.received_heads),
        saved: sum(|a| a.saved),
        ..Account::default()
    }
}

/// A byte an element and one for 32 of them: of bf16 and 128 elements 132/256 of the bytes between teams. A head exchange also moves Q and O.
#[test]
fn bytes_on_the_wire() {
    for comm in [CommType::P2p, CommType::AllGather, CommType::A2aP2p] {
        for (dtype, bytes) in [(DType::Bf16, 256), (DType::F16, 256), (DType::F32, 512)] {
            for pass in [Pass::Forward, Pass::Backward] {
                let plain = total(&problem(4, comm, dtype, None), pass, false);
                let small = total(&problem(4, comm, dtype, Some(Fp8::E4m3)), pass, false);
                assert!(plain.received_keys > 0);
                assert_eq!(
                    small.received_keys * bytes,
                    plain.received_keys * 132,
                    "{comm:?} {dtype:?}"
                );
                assert_eq!(small.received_gradients, plain.received_gradients);
                if comm != CommType::A2aP2p {
                    assert_eq!(
                        small.received - small.received_keys,
                        plain.received - plain.received_keys
                    );
                }
            }
        }
    }
    // Q, K, V in; O and its LSE out: of 4 tensors of equal size two shrink.
    let of = |kv_wire, pass| total(&problem(4, CommType::A2a, DType::Bf16, kv_wire), pass, true);
    let (plain, small) = (of(None, Pass::Forward), of(Some(Fp8::E5m2), Pass::Forward));
    let row = |q_like: u64, kv: u64| 2 * q_like + 2 * kv + 4;
    assert_eq!(small.received_heads * row(256, 256), plain.received_heads * row(256, 132));
    // Saved are Q, LSE, and K and V as they travel.
    let all = |bytes: [u64; 4]| -> u64 {
        bytes.map(|b| (b * 300 * 2).next_multiple_of(ALIGN as u64)).iter().sum()
    };
    assert_eq!(plain.saved, 4 * all([256, 256, 256, 4]));
    assert_eq!(small.saved, 4 * all([256, 132, 132, 4]));
    let (plain, small) = (of(None, Pass::Backward), of(Some(Fp8::E5m2), Pass::Backward));
    assert_eq!(small.received, plain.received, "K and V are saved, gradients travel as they do");
}

/// Nothing that is not coded travels between teams, and nothing coded is attended.
#[test]
fn only_codes_travel() {
    for comm in CommType::ALL {
        let problem = problem(4, comm, DType::F32, Some(Fp8::E5m2));
        for plan in [Pass::Forward, Pass::Backward]
            .iter()
            .flat_map(|pass| Plan::all(&problem, *pass, Options::default()))
        {
            for info in &plan.slots {
                let keys = matches!(info.slot.tensor, Role::K | Role::V);
                let stored = matches!(info.slot.kind, Kind::Caller | Kind::Team | Kind::Seen);
                assert_eq!(info.dtype == DType::Fp8(Fp8::E5m2), keys && !stored, "{info:?}");
            }
        }
    }
}

/// The checker finds keys that are attended as they are stored by some and as they travelled by others, or before they are decoded.
#[test]
fn keys_that_are_not_rounded_are_found() {
    for (comm, pass) in
        CommType::ALL.into_iter().flat_map(|c| [(c, Pass::Forward), (c, Pass::Backward)])
    {
        let problem = problem(4, comm, DType::F32, Some(Fp8::E4m3));
        let fault = |plant: &dyn Fn(&mut Plan)| {
            let mut plans = Plan::all(&problem, pass, Options::default());
            plans.iter_mut().for_each(plant);
            check::check(&plans).unwrap_err()
        };
        let uncoded = fault(&|plan| {
            for info in plan.slots.iter_mut().filter(|s| matches!(s.dtype, DType::Fp8(_))) {
                (info.dtype, info.dim) = (DType::F32, 128);
            }
        });
        assert!(uncoded.ends_with(", rounded"), "{uncoded}");
        let coded = fault(&|plan| {
            for step in &mut plan.steps {
                if let Op::Attend { k, .. } | Op::AttendBackward { k, .. } = &mut step.op {
                    k.kind = Kind::Code;
                }
            }
        });
        assert!(coded.contains("is attended as e4m3"), "{coded}");
    }
}

/// ‖rounded − exact‖ / ‖exact‖ of a result, both in float64.
fn cost(case: &Case, dtype: DType, format: Fp8) -> [f64; 4] {
    let named = |kv_wire: Option<Fp8>, name: &str| Case {
        kv_wire,
        name: format!("{} {name}", case.name),
        ..case.clone()
    };
    let (rounded, exact) = (
        reference(&named(Some(format), format.name()), dtype),
        reference(&named(None, "exact"), dtype),
    );
    let (a, b) = (&rounded.exact.right, &exact.exact.right);
    [(&a.o, &b.o), (&a.dq, &b.dq), (&a.dk, &b.dk), (&a.dv, &b.dv)].map(|(a, b)| {
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())
    })
}

/// What rounding keys and values costs against exact ones, as it is said in `tests/data/README.md`:
/// `cargo test --test integration what_rounding_costs -- --nocapture`.
#[test]
fn what_rounding_costs() {
    let mut text =
        String::from("relative L2 norm of the change         O       dQ       dK       dV\n");
    for format in Fp8::ALL {
        let mut worst = [0f64; 4];
        for name in [
            "kv_e4m3_causal",
            "kv_e5m2_documents_gqa",
            "kv_e4m3_window_padded",
            "kv_e5m2_striped_full",
        ] {
            let case = cases().iter().find(|c| c.name == name).unwrap();
            let cost = cost(case, DType::Bf16, format);
            text += &format!("{:4} {name:28}", format.name());
            text += &cost.map(|x| format!(" {x:8.4}")).concat();
            text += "\n";
            worst = std::array::from_fn(|i| worst[i].max(cost[i]));
        }
        // What three (two) mantissa bits leave: a step of 1/8 (1/4) is an error of 1/16 (1/8) at most, about 1/38 (1/19) in the mean square.
        let (least, most) = if format == Fp8::E4m3 { (0.01, 0.1) } else { (0.02, 0.2) };
        assert!(worst.iter().all(|x| (least..most).contains(x)), "{format:?} {worst:?}");
    }
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Strided inputs, and layouts of all kinds.
#[test]
fn inputs_may_be_strided() {
    let case = cases().iter().find(|c| c.name == "kv_e4m3_window_padded").unwrap();
    for layout in Layout::ALL {
        let mut run = Run::plain(case, 3, CommType::A2aP2p, DType::F16);
        run.how.layout = layout;
        run.check().unwrap();
    }
}
