//! What plans of a trade must do: every element of the inputs has an identity, and every element of the results must be the right one, or, where a
//! head is on several ranks, the sum of the right ones. Padding is 0, and never travels.

use super::memory::{Buffer, Memory, POISON, weight};
use crate::holding::tokens;
use crate::partition::Side;
use crate::plan::trade::Trade;
use crate::plan::{Kind, Op, Pass, Plan, Slot, Tensor};

/// Identity of an element of tensor `number`: on its way to heads all ranks have the same, on the way back each its own.
fn identity(number: usize, from: u32, head: u32, token: u32) -> u64 {
    weight((number as u32) << 24 | head, from, token)
}

/// Tokens of padding get an identity that no result may have.
fn true_token(trade: &Trade, row: u32) -> Option<u32> {
    let mut base = 0;
    for s in &trade.problem.seqs {
        if row < base + s.q.padded {
            let inside = row - base;
            return (inside >= s.q.before && inside < s.q.before + s.q.len).then_some(row);
        }
        base += s.q.padded;
    }
    None
}

/// The row of whole tensors that every row of a side is.
fn rows_of(trade: &Trade, rank: u32, tensor: Tensor) -> Vec<u32> {
    match tensor {
        Tensor::Local => tokens(&trade.problem, rank, Side::Query),
        _ => (0..trade.rows()).collect(),
    }
}

/// The caller's inputs carry identities, everything else is poison.
pub(super) fn initial(trade: &Trade, plan: &Plan) -> Memory {
    let input = if plan.pass == Pass::ToHeads { Tensor::Local } else { Tensor::Whole };
    let fresh = |info: &crate::plan::SlotInfo| {
        let mut buffer = Buffer::new(info.slot, info.rows, info.heads, POISON);
        if info.slot.kind != Kind::Caller || info.slot.tensor != input {
            return buffer;
        }
        let number = usize::from(info.slot.index);
        let (from, first) = match input {
            Tensor::Local => (0, 0),
            _ => (plan.rank + 1, trade.share(number, plan.rank).start),
        };
        for (row, token) in rows_of(trade, plan.rank, input).into_iter().enumerate() {
            let token = true_token(trade, token).unwrap_or(u32::MAX);
            for head in 0..info.heads {
                buffer.put(row as u32, head, identity(number, from, first + head, token));
            }
        }
        buffer
    };
    Memory(plan.slots.iter().map(fresh).collect())
}

/// Every result of every rank: all rows, padding too.
pub(super) fn results(trade: &Trade, plans: &[Plan], memory: &[Memory]) -> Result<(), String> {
    for (plan, memory) in plans.iter().zip(memory) {
        for number in 0..trade.tensors.len() {
            result(trade, plan, memory, number)?;
        }
    }
    Ok(())
}

fn result(trade: &Trade, plan: &Plan, memory: &Memory, number: usize) -> Result<(), String> {
    let rank = plan.rank;
    let (tensor, heads) = match plan.pass {
        Pass::ToHeads => (Tensor::Whole, trade.share(number, rank)),
        _ => (Tensor::Local, 0..trade.tensors[number].heads),
    };
    let rows = rows_of(trade, rank, tensor);
    let slot = Slot::indexed(Kind::Caller, tensor, number as u32);
    let Some(buffer) = memory.find(slot) else {
        return Err(format!("rank {rank}: nobody wrote {slot:?}"));
    };
    for (row, token) in rows.into_iter().enumerate() {
        for head in heads.clone() {
            let from = match tensor {
                Tensor::Whole => 0..1,
                _ => 1..trade.problem.ranks + 1,
            };
            let want = match true_token(trade, token) {
                None => 0,
                Some(token) => from
                    .filter(|from| *from == 0 || trade.share(number, from - 1).contains(&head))
                    .fold(0, |sum: u64, from| {
                        sum.wrapping_add(identity(number, from, head, token))
                    }),
            };
            let (row, at) = (row as u32, head - heads.start);
            let got = buffer.read(row, at).map_err(|e| format!("rank {rank}: {e}"))?;
            if got != want {
                return Err(format!(
                    "rank {rank}: {slot:?} row {row} head {head} is not token {token}, each once"
                ));
            }
        }
    }
    Ok(())
}

/// Exactly the rows that others have travel: no padding, and nothing twice.
pub(super) fn needs(trade: &Trade, plans: &[Plan]) -> Result<(), String> {
    let p = &trade.problem;
    let true_rows = |rank: u32| -> u64 {
        let held = tokens(p, rank, Side::Query);
        held.into_iter().filter(|t| true_token(trade, *t).is_some()).count() as u64
    };
    let true_rows: Vec<u64> = (0..p.ranks).map(true_rows).collect();
    for plan in plans {
        let mut got = vec![0u64; trade.tensors.len()];
        for step in &plan.steps {
            let Op::Exchange { recvs, .. } = &step.op else { continue };
            for m in recvs {
                let number = match m.slot.kind {
                    Kind::Caller => u32::from(m.slot.index),
                    _ => u32::from(m.slot.index) / p.ranks,
                };
                got[number as usize] += u64::from(m.count());
            }
        }
        for (number, got) in got.into_iter().enumerate() {
            let others = (0..p.ranks).filter(|r| *r != plan.rank);
            let has = |rank: u32| !trade.share(number, rank).is_empty();
            let want: u64 = match plan.pass {
                Pass::ToHeads if !has(plan.rank) => 0,
                Pass::ToHeads => others.map(|r| true_rows[r as usize]).sum(),
                _ => others.filter(|r| has(*r)).map(|_| true_rows[plan.rank as usize]).sum(),
            };
            if got != want {
                return Err(format!(
                    "rank {}: receives {got} rows of tensor {number}, needs {want}",
                    plan.rank
                ));
            }
        }
    }
    Ok(())
}
