//! A plan is well formed by itself.

use super::Access;
use crate::dtype::{DType, Fp8};
use crate::mask::Slice;
use crate::plan::{Event, Kind, Lane, Op, Plan, Slot, SlotInfo, Step, Tensor, Value};
use std::collections::HashSet;

/// The plans are those of all ranks of one problem and pass, in rank order.
pub(super) fn same_problem(plans: &[Plan]) -> Result<(), String> {
    let Some(first) = plans.first() else { return Err("no plans".into()) };
    if plans.len() != first.problem.ranks as usize {
        return Err(format!("{} plans for {} ranks", plans.len(), first.problem.ranks));
    }
    for (rank, plan) in plans.iter().enumerate() {
        let same = plan.rank as usize == rank
            && plan.problem == first.problem
            && plan.trade == first.trade
            && plan.pass == first.pass
            && plan.options.saved == first.options.saved
            && plan.options.same_pieces == first.options.same_pieces;
        if !same {
            return Err(format!("plan {rank} is not rank {rank}'s of the same problem and pass"));
        }
    }
    Ok(())
}

/// Everything that needs no other rank and no data.
pub(super) fn check(plan: &Plan, touched: &[Vec<Access>]) -> Result<(), String> {
    if !plan.slots.is_sorted_by(|a, b| a.slot < b.slot) {
        return Err(format!("rank {}: slots are not sorted", plan.rank));
    }
    let mut signaled = HashSet::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let wrong =
            |what: String| Err(format!("rank {}, step {index} ({step}): {what}", plan.rank));
        if let Err(what) = events(plan, step, &mut signaled)
            .and_then(|()| bounds(plan, &touched[index]))
            .and_then(|()| meaning(plan, step))
        {
            return wrong(what);
        }
    }
    Ok(())
}

/// One signal an event, and it comes before every wait.
fn events(plan: &Plan, step: &Step, signaled: &mut HashSet<Event>) -> Result<(), String> {
    if let Some(event) = step.waits.iter().find(|e| !signaled.contains(e)) {
        return Err(format!("waits for e{event} before it is signaled"));
    }
    if let Some(event) = step.signal {
        if event >= plan.events {
            return Err(format!("e{event} is beyond the plan's {} events", plan.events));
        }
        if !signaled.insert(event) {
            return Err(format!("e{event} is signaled twice"));
        }
    }
    Ok(())
}

fn find(plan: &Plan, slot: Slot) -> Result<&SlotInfo, String> {
    plan.slots.iter().find(|s| s.slot == slot).ok_or_else(|| format!("no slot {slot:?}"))
}

/// Named slots exist and have the rows.
fn bounds(plan: &Plan, touched: &[Access]) -> Result<(), String> {
    for access in touched {
        let info = find(plan, access.slot)?;
        for r in access.rows.iter().filter(|r| r.count > 0) {
            let last = u64::from(r.first) + u64::from(r.count - 1) * u64::from(r.step);
            if last >= u64::from(info.rows) {
                return Err(format!("{:?} has {} rows, not row {last}", access.slot, info.rows));
            }
        }
    }
    Ok(())
}

/// What no data would show: lanes, types, the order and tightness of slices.
fn meaning(plan: &Plan, step: &Step) -> Result<(), String> {
    let lane = if matches!(step.op, Op::Exchange { .. }) { Lane::Comm } else { Lane::Compute };
    if step.lane != lane {
        return Err("is on the wrong lane".into());
    }
    match &step.op {
        Op::Exchange { sends, recvs } => {
            for m in sends.iter().chain(recvs) {
                if m.peer >= plan.problem.ranks || m.peer == plan.rank {
                    return Err(format!("rank {} is no peer", m.peer));
                }
                if m.count() == 0 || find(plan, m.slot)?.row_bytes() == 0 {
                    return Err(format!("{m} is empty"));
                }
            }
            Ok(())
        }
        Op::Attend { slices, .. } | Op::AttendBackward { slices, .. } => {
            stored(plan, &step.op)?;
            score_slots(plan, &step.op)?;
            same_rows(plan, &step.op, slices)?;
            if !slices.is_sorted_by_key(|s| (s.q, s.k)) {
                return Err("slices are not sorted by (q, k)".into());
            }
            slices.iter().try_for_each(tight)
        }
        Op::Expand { latent, k, .. } => {
            latent_shapes(plan, *latent, *k, Slot { tensor: Tensor::V, ..*k }, plan.problem.dtype)
        }
        Op::Contract { dk, latent, d_latent, .. } => {
            latent_shapes(plan, *latent, *dk, Slot { tensor: Tensor::DV, ..*dk }, DType::F32)?;
            let (from, to) = (find(plan, *latent)?, find(plan, *d_latent)?);
            if (from.dim, 1, DType::F32) != (to.dim, to.heads, to.dtype) {
                return Err(format!("{from:?} and {to:?} do not fit"));
            }
            Ok(())
        }
        Op::Delta => Ok(()),
        Op::SinkTerms => {
            let sum = |tensor| find(plan, Slot::of(Kind::Sum, tensor));
            let (terms, delta) = (sum(Tensor::SinkTerms)?, sum(Tensor::Delta)?);
            match (terms.rows, terms.heads) == (delta.rows, delta.heads) {
                true => Ok(()),
                false => Err(format!("{terms:?} and {delta:?} have other rows or heads")),
            }
        }
        Op::Reduce { dst, max, .. } if *max != (dst.tensor == Tensor::MaxLogit) => {
            Err(format!("{dst:?} is reduced the wrong way"))
        }
        Op::Reduce { src, dst, dst_head, .. } => {
            let (from, to) = (find(plan, *src)?, find(plan, *dst)?);
            if dst_head + from.heads > to.heads || (from.dim, to.dim) != (1, 1) {
                return Err(format!("{src:?} has {} heads, {dst:?} {}", from.heads, to.heads));
            }
            match from.dtype == DType::F32 && to.dtype == DType::F32 {
                true => Ok(()),
                false => Err(format!("{src:?} and {dst:?} must be fp32")),
            }
        }
        Op::Copy { src, src_head, dst, dst_head, heads, add, .. } => {
            let (from, to) = (find(plan, *src)?, find(plan, *dst)?);
            if src_head + heads > from.heads || dst_head + heads > to.heads {
                return Err(format!("{src:?} has {} heads, {dst:?} {}", from.heads, to.heads));
            }
            if *add && (to.dtype != DType::F32 || matches!(from.dtype, DType::Fp8(_))) {
                return Err(format!("adds {src:?} into {dst:?}, which is not fp32, or coded"));
            }
            let lengths_fit = match (from.dtype, to.dtype) {
                (DType::Fp8(a), DType::Fp8(b)) => a == b && from.dim == to.dim,
                (DType::Fp8(_), _) => from.dim == Fp8::bytes(to.dim),
                (_, DType::Fp8(_)) => to.dim == Fp8::bytes(from.dim),
                _ => from.dim == to.dim,
            };
            if !lengths_fit {
                return Err(format!("{src:?} and {dst:?} have rows of different lengths"));
            }
            Ok(())
        }
        Op::Fill { slot, value, .. } => {
            let least = matches!(slot.tensor, Tensor::Lse | Tensor::MaxLogit);
            let empty = if least { Value::NegInf } else { Value::Zero };
            if *value == empty { Ok(()) } else { Err(format!("{slot:?} must be {empty:?}")) }
        }
    }
}

/// A latent is one head, and what is made of it has this rank's heads.
fn latent_shapes(plan: &Plan, latent: Slot, k: Slot, v: Slot, dtype: DType) -> Result<(), String> {
    let p = &plan.problem;
    let Some(shape) = p.latent else { return Err("the problem has no latents".into()) };
    let info = find(plan, latent)?;
    if (info.heads, info.dim, info.dtype) != (1, shape.width(), p.dtype) {
        return Err(format!("{info:?} is no latent"));
    }
    let heads = plan.share.kv.len() as u32;
    for (slot, dim) in [(k, p.dim_qk), (v, p.dim_v)] {
        let info = find(plan, slot)?;
        if (info.heads, info.dim, info.dtype) != (heads, dim, dtype) {
            return Err(format!("{info:?} is not made of {latent:?}"));
        }
    }
    Ok(())
}

/// Nothing is computed with numbers as they travel.
fn stored(plan: &Plan, op: &Op) -> Result<(), String> {
    let (Op::Attend { q, k, .. } | Op::AttendBackward { q, k, .. }) = op else { return Ok(()) };
    for slot in [*q, *k, Slot { tensor: Tensor::V, ..*k }] {
        let got = find(plan, slot)?.dtype;
        if got != plan.problem.dtype {
            return Err(format!("{slot:?} is attended as {}", got.name()));
        }
    }
    Ok(())
}

/// What scores depend on is there: the executor takes a slot that is not there for a feature that is not asked for.
fn score_slots(plan: &Plan, op: &Op) -> Result<(), String> {
    let score = &plan.problem.score;
    let has = |slot: Slot| plan.slots.iter().any(|s| s.slot == slot);
    let finishes = matches!(op, Op::Attend { last: Some(_), .. });
    for (what, asked, there) in [
        ("bias", score.bias.is_some(), plan.bias().is_some()),
        (
            "gradient of the bias",
            matches!(op, Op::AttendBackward { .. }) && score.bias.is_some_and(|b| b.gradient),
            plan.d_bias().is_some(),
        ),
        ("sinks", finishes && score.sinks.is_some(), has(Slot::caller(Tensor::Sinks))),
        (
            "largest scores",
            finishes && score.max_logit.is_some(),
            has(Slot::of(Kind::Acc, Tensor::Top)),
        ),
    ] {
        if asked && !there {
            return Err(format!("has no slot for the {what}"));
        }
    }
    Ok(())
}

/// Everything with a row per query has as many, and no slice goes beyond them.
fn same_rows(plan: &Plan, op: &Op, slices: &[Slice]) -> Result<(), String> {
    let acc = |tensor| Slot::of(Kind::Acc, tensor);
    let (q, beside) = match op {
        Op::Attend { q, first: true, last: Some((out, lse)), .. } => (q, vec![*out, *lse]),
        Op::Attend { q, last: Some((out, lse)), .. } => (q, vec![*out, *lse, acc(Tensor::Out)]),
        Op::Attend { q, .. } => (q, vec![acc(Tensor::Out)]),
        Op::AttendBackward { q, d_out, lse, delta, .. } => {
            (q, vec![*d_out, *lse, *delta, acc(Tensor::DQ)])
        }
        _ => return Ok(()),
    };
    let rows = find(plan, *q)?.rows;
    let one_for_all = plan.problem.score.bias.is_some_and(|b| !b.queries);
    let bias = plan.bias().filter(|_| !one_for_all).into_iter().chain(plan.d_bias());
    let beside = beside.into_iter().chain(bias.filter(|_| !slices.is_empty()));
    for slot in beside {
        if find(plan, slot)?.rows != rows {
            return Err(format!("{slot:?} has other rows than {q:?}"));
        }
    }
    match slices.iter().find(|s| u64::from(s.q) + u64::from(s.q_len) > u64::from(rows)) {
        Some(s) => Err(format!("{s:?} goes beyond the {rows} rows of {q:?}")),
        None => Ok(()),
    }
}

/// Every row of a slice sees a key, every key is seen.
fn tight(s: &Slice) -> Result<(), String> {
    let rows_see = (0..s.q_len).all(|i| !s.keys_of(i).is_empty());
    // Bounds grow with the row, so the first key is seen by the first row, if at all, and the last by the last.
    let keys_seen =
        s.q_len > 0 && s.keys_of(0).start == s.k && s.keys_of(s.q_len - 1).end == s.k + s.k_len;
    if rows_see && keys_seen { Ok(()) } else { Err(format!("{s:?} is not tight")) }
}

/// No slot is larger than the rows that steps touch: the account's memory is what is needed. (What is saved is as large as forward
/// leaves it.)
pub(super) fn no_waste(plan: &Plan, touched: &[Vec<Access>]) -> Result<(), String> {
    let mut used = vec![0; plan.slots.len()];
    for access in touched.iter().flatten() {
        let index = plan.slots.binary_search_by_key(&access.slot, |s| s.slot);
        let used = &mut used[index.expect("bounds found it")];
        let end = |r: &crate::plan::Rows| r.first + (r.count - 1) * r.step + 1;
        *used = access.rows.iter().filter(|r| r.count > 0).map(end).fold(*used, u32::max);
    }
    for (info, used) in plan.slots.iter().zip(used) {
        let ours = info.slot.kind != Kind::Caller && !info.saved;
        if ours && info.bytes() > 0 && info.rows > used {
            return Err(format!(
                "rank {}: {:?} has {} rows, but only {used} are used",
                plan.rank, info.slot, info.rows
            ));
        }
    }
    Ok(())
}
