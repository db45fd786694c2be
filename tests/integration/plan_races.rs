//! Races between lanes, found once more by a plain double loop: what the checker says about them is the same.

use crate::plan_faults::{good_plans, steps};
use context_parallel::mask::Slice;
use context_parallel::plan::check::check;
use context_parallel::plan::{Kind, Op, Plan, Slot, Step, Tensor};
use std::collections::HashSet;

/// What a step touches, row by row, written down once more and as plainly as possible.
fn touches(plan: &Plan, step: &Step) -> Vec<(Slot, u32, bool)> {
    let mut out = Vec::new();
    let mut add = |slot: Slot, rows: &mut dyn Iterator<Item = u32>, write: bool| {
        out.extend(rows.map(|row| (slot, row, write)));
    };
    let all = |slot: Slot| 0..plan.slots.iter().find(|s| s.slot == slot).unwrap().rows;
    let keys = |slices: &[Slice]| -> HashSet<u32> {
        slices.iter().flat_map(|s| s.k..s.k + s.k_len).collect()
    };
    let with = |slot: Slot, tensor| Slot { tensor, ..slot };
    match &step.op {
        Op::Exchange { sends, recvs } => {
            for (list, write) in [(sends, false), (recvs, true)] {
                for m in list {
                    add(m.slot, &mut m.rows.iter().flat_map(|r| r.iter()), write);
                }
            }
        }
        Op::Attend { q, k, slices, first, last } => {
            add(*q, &mut all(*q), false);
            for tensor in [Tensor::K, Tensor::V] {
                add(with(*k, tensor), &mut keys(slices).into_iter(), false);
            }
            if let Some((o, lse)) = last {
                add(*o, &mut all(*o), true);
                add(*lse, &mut all(*lse), true);
                let there = |slot: &Slot| plan.slots.iter().any(|s| s.slot == *slot);
                if let Some(slot) = Some(Slot::of(Kind::Acc, Tensor::Top)).filter(there) {
                    add(slot, &mut all(slot), true);
                }
                if let Some(slot) = Some(Slot::caller(Tensor::Sinks)).filter(there) {
                    add(slot, &mut all(slot), false);
                }
            }
            if !first || last.is_none() {
                let acc = Slot::of(Kind::Acc, Tensor::Out);
                add(acc, &mut all(acc), true);
            }
        }
        Op::AttendBackward { q, d_out, lse, delta, k, dk, slices } => {
            for slot in [*q, *d_out, *lse, *delta] {
                add(slot, &mut all(slot), false);
            }
            let dq = Slot::of(Kind::Acc, Tensor::DQ);
            add(dq, &mut all(dq), true);
            for (slot, write) in [
                (*k, false),
                (with(*k, Tensor::V), false),
                (*dk, true),
                (with(*dk, Tensor::DV), true),
            ] {
                add(slot, &mut keys(slices).into_iter(), write);
            }
        }
        Op::Expand { latent, k, rows } => {
            let rows = || rows.iter().cloned().flatten();
            add(*latent, &mut rows(), false);
            for slot in [*k, with(*k, Tensor::V)] {
                add(slot, &mut rows(), true);
            }
            for slot in [Tensor::UpK, Tensor::UpV].map(Slot::caller) {
                add(slot, &mut all(slot), false);
            }
        }
        Op::Contract { dk, latent, d_latent, rows } => {
            let rows = || rows.iter().cloned().flatten();
            for slot in [*dk, with(*dk, Tensor::DV), *latent] {
                add(slot, &mut rows(), false);
            }
            add(*d_latent, &mut rows(), true);
            for slot in [Tensor::DUpK, Tensor::DUpV].map(Slot::caller) {
                add(slot, &mut all(slot), true);
            }
        }
        Op::SinkTerms => {
            for (slot, write) in [
                (Slot::caller(Tensor::Sinks), false),
                (Slot::caller(Tensor::Lse), false),
                (Slot::of(Kind::Sum, Tensor::Delta), false),
                (Slot::of(Kind::Sum, Tensor::SinkTerms), true),
            ] {
                add(slot, &mut all(slot), write);
            }
        }
        Op::Reduce { src, dst, dst_row, .. } => {
            add(*src, &mut all(*src), false);
            add(*dst, &mut std::iter::once(*dst_row), true);
        }
        Op::Delta => {
            for (slot, write) in [
                (Slot::caller(Tensor::Out), false),
                (Slot::caller(Tensor::DOut), false),
                (Slot::of(Kind::Sum, Tensor::Delta), true),
            ] {
                add(slot, &mut all(slot), write);
            }
        }
        Op::Copy { src, dst, runs, .. } => {
            for r in runs {
                add(*src, &mut (0..r.rows).map(|i| r.src + i * r.src_step), false);
                add(*dst, &mut (0..r.rows).map(|i| r.dst + i * r.dst_step), true);
            }
        }
        Op::Fill { slot, rows, .. } => add(*slot, &mut rows.iter().flat_map(|r| r.iter()), true),
    }
    out
}

/// Pairs of steps that conflict and that no chain of lanes and events orders.
fn races(plan: &Plan) -> Vec<(usize, usize)> {
    let n = plan.steps.len();
    let direct = |i: usize, j: usize| {
        let (a, b) = (&plan.steps[i], &plan.steps[j]);
        i < j && (a.lane == b.lane || a.signal.is_some_and(|e| b.waits.contains(&e)))
    };
    let mut before: Vec<Vec<bool>> =
        (0..n).map(|i| (0..n).map(|j| direct(i, j)).collect()).collect();
    for m in 0..n {
        for i in 0..m {
            for j in m + 1..n {
                before[i][j] |= before[i][m] && before[m][j];
            }
        }
    }
    let touched: Vec<_> = plan.steps.iter().map(|s| touches(plan, s)).collect();
    let conflict = |i: usize, j: usize| {
        let rows: HashSet<(Slot, u32)> = touched[i].iter().map(|t| (t.0, t.1)).collect();
        let written: HashSet<(Slot, u32)> =
            touched[i].iter().filter(|t| t.2).map(|t| (t.0, t.1)).collect();
        touched[j]
            .iter()
            .any(|t| if t.2 { rows.contains(&(t.0, t.1)) } else { written.contains(&(t.0, t.1)) })
    };
    let pairs = (0..n).flat_map(|j| (0..j).map(move |i| (i, j)));
    pairs.filter(|(i, j)| !before[*i][*j] && conflict(*i, *j)).collect()
}

/// Every wait of every step, dropped in turn: the checker reports a hazard exactly if a race appears, by the double loop above.
#[test]
fn every_wait_that_is_needed_is_missed() {
    let (mut harmful, mut redundant) = (0, 0);
    for plans in good_plans() {
        for (rank, index) in steps(|s| !s.waits.is_empty())(&plans) {
            for wait in 0..plans[rank].steps[index].waits.len() {
                let mut faulty = plans.clone();
                faulty[rank].steps[index].waits.remove(wait);
                match (races(&faulty[rank]).first(), check(&faulty)) {
                    (Some((i, j)), Err(e)) => {
                        assert!(e.contains("nothing orders"), "{e}");
                        assert!(
                            e.contains(&format!("step {i} ("))
                                && e.contains(&format!("step {j} (")),
                            "{e}"
                        );
                        harmful += 1;
                    }
                    (None, Ok(())) => {
                        println!("not needed: {}", plans[rank].steps[index]);
                        redundant += 1;
                    }
                    (race, got) => {
                        panic!("step {index} wait {wait}: {race:?}, {got:?}\n{}", plans[rank])
                    }
                }
            }
        }
    }
    println!("waits dropped: {harmful} harmful, {redundant} redundant");
    assert!(harmful > 200 && redundant < 5, "waits that order nothing cost time");
}
