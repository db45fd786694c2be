//! Proves all ranks' plans together, without tensors. Four proofs, each in its file:
//!
//! * **Form.** A plan is well formed by itself: named slots exist and are as large as what is touched, sums are in fp32, slices are
//!   sorted and tight, an event has one signal, and steps only wait for steps listed before them.
//! * **Hazards.** Steps on different lanes that touch the same rows, one of them writing, are ordered by events. So every order
//!   in which the lanes may really run gives what the listed order gives.
//! * **Needs.** No more rows travel than some query of the receiver may see, or, on the way home, than were lent.
//! * **Data flow and progress.** All ranks run their steps in listed order over 64-bit identities instead of numbers, exchanges under
//!   grouped rendezvous. In the end every output is the sum of exactly the allowed (head, query, key) triples, each once.
//!
//! The listed order is the strictest one: each exchange blocks all that follows. Lanes only relax it, so what makes progress here does
//! so on one host thread, and with NCCL on one queue.

mod flow;
mod form;
mod hazards;
mod memory;
mod needs;
mod trade;

use super::{Kind, Op, Plan, Rows, Slot, Step, Tensor};
use std::ops::Range;

/// Checks the plans of all ranks, in rank order. The error says which rank, which step, and what is wrong.
pub fn check(plans: &[Plan]) -> Result<(), String> {
    form::same_problem(plans)?;
    let touched: Vec<Vec<Vec<Access>>> =
        plans.iter().map(|p| p.steps.iter().map(|s| accesses(p, s)).collect()).collect();
    for (plan, touched) in plans.iter().zip(&touched) {
        form::check(plan, touched)?;
        hazards::check(plan, touched)?;
    }
    match &plans[0].trade {
        Some(trade) => trade::needs(trade, plans)?,
        None => needs::check(plans)?,
    }
    flow::check(plans)?;
    plans.iter().zip(&touched).try_for_each(|(plan, touched)| form::no_waste(plan, touched))
}

/// Rows of a slot that a step reads or writes.
struct Access {
    slot: Slot,
    rows: Vec<Rows>,
    write: bool,
}

fn ranges(rows: &[Range<u32>]) -> Vec<Rows> {
    rows.iter().map(|r| Rows::range(r.start, r.end - r.start)).collect()
}

/// Everything that a step touches. What it both reads and writes is listed as written.
fn accesses(plan: &Plan, step: &Step) -> Vec<Access> {
    let read = |slot: Slot, rows: Vec<Rows>| Access { slot, rows, write: false };
    let write = |slot: Slot, rows: Vec<Rows>| Access { slot, rows, write: true };
    // A slot that is missing has no rows; the form check names it.
    let rows_of = |slot: Slot| plan.slots.iter().find(|s| s.slot == slot).map_or(0, |s| s.rows);
    let all = |slot: Slot| vec![Rows::range(0, rows_of(slot))];
    let acc = |tensor| Slot::of(Kind::Acc, tensor);
    let beside = |slot: Slot, tensor| Slot { tensor, ..slot };
    match &step.op {
        Op::Exchange { sends, recvs } => {
            let sent = sends.iter().map(|m| read(m.slot, m.rows.clone()));
            sent.chain(recvs.iter().map(|m| write(m.slot, m.rows.clone()))).collect()
        }
        Op::Attend { q, k, slices, first, last } => {
            let keys: Vec<Rows> = slices.iter().map(|s| Rows::range(s.k, s.k_len)).collect();
            let mut out =
                vec![read(*q, all(*q)), read(*k, keys.clone()), read(beside(*k, Tensor::V), keys)];
            out.extend(plan.bias().map(|slot| read(slot, all(slot))));
            if let Some((o, lse)) = last {
                out.extend([write(*o, all(*o)), write(*lse, all(*lse))]);
                let there = |slot: &Slot| plan.slots.iter().any(|s| s.slot == *slot);
                let (top, sinks) = (acc(Tensor::Top), Slot::caller(Tensor::Sinks));
                out.extend(Some(top).filter(there).map(|slot| write(slot, all(slot))));
                out.extend(Some(sinks).filter(there).map(|slot| read(slot, all(slot))));
            }
            if !(*first && last.is_some()) {
                let state = [Tensor::Out, Tensor::Max, Tensor::Sum].map(acc);
                out.extend(state.map(|slot| write(slot, all(slot))));
            }
            out
        }
        Op::AttendBackward { q, d_out, lse, delta, k, dk, slices } => {
            let keys: Vec<Rows> = slices.iter().map(|s| Rows::range(s.k, s.k_len)).collect();
            let mut out: Vec<Access> =
                [*q, *d_out, *lse, *delta].into_iter().map(|slot| read(slot, all(slot))).collect();
            out.push(write(acc(Tensor::DQ), all(acc(Tensor::DQ))));
            out.extend(plan.bias().map(|slot| read(slot, all(slot))));
            out.extend(plan.d_bias().map(|slot| write(slot, all(slot))));
            out.extend([*k, beside(*k, Tensor::V)].map(|slot| read(slot, keys.clone())));
            out.extend([*dk, beside(*dk, Tensor::DV)].map(|slot| write(slot, keys.clone())));
            out
        }
        Op::Expand { latent, k, rows } => {
            let rows = ranges(rows);
            let weights = [Tensor::UpK, Tensor::UpV].map(Slot::caller);
            let mut out: Vec<Access> = weights.map(|slot| read(slot, all(slot))).into();
            out.push(read(*latent, rows.clone()));
            out.extend([*k, beside(*k, Tensor::V)].map(|slot| write(slot, rows.clone())));
            out
        }
        Op::Contract { dk, latent, d_latent, rows } => {
            let rows = ranges(rows);
            let weights = [Tensor::UpK, Tensor::UpV].map(Slot::caller);
            let mut out: Vec<Access> = weights.map(|slot| read(slot, all(slot))).into();
            out.extend(
                [*dk, beside(*dk, Tensor::DV), *latent].map(|slot| read(slot, rows.clone())),
            );
            out.push(write(*d_latent, rows));
            let gradients = [Tensor::DUpK, Tensor::DUpV].map(Slot::caller);
            out.extend(gradients.map(|slot| write(slot, all(slot))));
            out
        }
        Op::Delta => {
            let (out, d_out) = (Slot::caller(Tensor::Out), Slot::caller(Tensor::DOut));
            let delta = Slot::of(Kind::Sum, Tensor::Delta);
            vec![read(out, all(out)), read(d_out, all(d_out)), write(delta, all(delta))]
        }
        Op::SinkTerms => {
            let read_all = |slot| read(slot, all(slot));
            let sum = |tensor| Slot::of(Kind::Sum, tensor);
            vec![
                read_all(Slot::caller(Tensor::Sinks)),
                read_all(Slot::caller(Tensor::Lse)),
                read_all(sum(Tensor::Delta)),
                write(sum(Tensor::SinkTerms), all(sum(Tensor::SinkTerms))),
            ]
        }
        Op::Reduce { src, dst, dst_row, .. } => {
            vec![read(*src, all(*src)), write(*dst, vec![Rows::range(*dst_row, 1)])]
        }
        Op::Copy { src, dst, runs, .. } => {
            let from = runs.iter().map(|r| Rows { first: r.src, step: r.src_step, count: r.rows });
            let to = runs.iter().map(|r| Rows { first: r.dst, step: r.dst_step, count: r.rows });
            vec![read(*src, from.collect()), write(*dst, to.collect())]
        }
        Op::Fill { slot, rows, .. } => vec![write(*slot, rows.clone())],
    }
}
