//! No more rows travel than are needed. That no fewer do, the data flow shows.

use super::flow::may_see;
use crate::holding::holding;
use crate::partition::Side;
use crate::plan::{Kind, Op, Plan, Tensor};
use crate::problem::Problem;

/// Rows received, by kind and tensor, against the definition of the mask.
pub(super) fn check(plans: &[Plan]) -> Result<(), String> {
    let p = &*plans[0].problem;
    let needed = needed(p);
    let tokens = |rank: u32, side| -> u64 {
        holding(p, rank, side).segments.iter().map(|s| u64::from(s.len)).sum()
    };
    for plan in plans {
        let team = (plan.rank / p.inner) as usize;
        let ranks = team as u32 * p.inner..(team as u32 + 1) * p.inner;
        for (kind, tensor, got) in received(plan) {
            let side = if tensor.key_side() { Side::Key } else { Side::Query };
            let want = match kind {
                Kind::Recv => needed[team].iter().sum(),
                // A relay's gradients make the round of all teams and end with their owner: every owner's but the left neighbour's.
                Kind::Return if p.relay => {
                    let left = (team + needed.len() - 1) % needed.len();
                    (0..needed.len())
                        .filter(|o| *o != left)
                        .map(|o| needed[(o + 1) % needed.len()][o])
                        .sum()
                }
                Kind::Return => needed.iter().map(|reader| reader[team]).sum(),
                Kind::Team => {
                    ranks.clone().filter(|r| *r != plan.rank).map(|r| tokens(r, side)).sum()
                }
                // Heads that share a bias need all of it.
                Kind::Merge => u64::from(p.inner - 1) * tokens(plan.rank, side),
                Kind::Ranks => u64::from(p.ranks) - 1,
                _ => 0,
            };
            if got > want {
                return Err(format!(
                    "rank {}: receives {got} rows of {kind:?}{tensor:?}, needs {want}",
                    plan.rank
                ));
            }
        }
    }
    Ok(())
}

/// Number of keys of team `o` that queries of team `t` may see, as `[t][o]`; 0 for t = o. All keys with a relay.
fn needed(p: &Problem) -> Vec<Vec<u64>> {
    let b = p.teams() as usize;
    let mut out = vec![vec![0; b]; b];
    for (index, seq) in p.seqs.iter().enumerate() {
        let team_of = |side: Side, len: u32| {
            let mut team = vec![usize::MAX; len as usize];
            for rank in 0..p.ranks {
                let held = holding(p, rank, side).segments;
                for s in held.iter().filter(|s| s.seq as usize == index) {
                    (0..s.len).for_each(|i| {
                        team[(s.start + i * s.step) as usize] = (rank / p.inner) as usize;
                    });
                }
            }
            team
        };
        let (readers, owners) = (team_of(Side::Query, seq.q.len), team_of(Side::Key, seq.k.len));
        for (key, owner) in owners.iter().enumerate() {
            let mut seen = vec![p.relay; b];
            for (query, reader) in readers.iter().enumerate() {
                seen[*reader] |= may_see(p, index, query as u32, key as u32);
            }
            for (team, _) in seen.iter().enumerate().filter(|(t, seen)| **seen && t != owner) {
                out[team][*owner] += 1;
            }
        }
    }
    out
}

/// Rows that a plan receives, summed by (kind, tensor).
fn received(plan: &Plan) -> Vec<(Kind, Tensor, u64)> {
    let mut out: Vec<(Kind, Tensor, u64)> = Vec::new();
    for step in &plan.steps {
        let Op::Exchange { recvs, .. } = &step.op else { continue };
        for m in recvs {
            // What is packed goes on to the team buffer.
            let tensor = m.slot.tensor;
            let kind = match m.slot.kind {
                Kind::Pack | Kind::Code => Kind::Team,
                kind => kind,
            };
            match out.iter_mut().find(|(k, t, _)| (*k, *t) == (kind, tensor)) {
                Some(sum) => sum.2 += u64::from(m.count()),
                None => out.push((kind, tensor, u64::from(m.count()))),
            }
        }
    }
    out
}
