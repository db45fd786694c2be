//! `DefaultDynamicCPScheduler` of Megatron-LM's `dev` branch (`next_hdp_group_packing_aware`, read at commit d48bd6b): the assignments it makes,
//! held to fixtures made by running it. Its alignment to virtual pipeline stages is not offered.

use super::{Batch, Placement, Schedule};
use crate::error::{Error, Result};

/// Ranks that run one pack.
struct Group {
    first: u32,
    ranks: u32,
    ids: Vec<u32>,
    /// Σ L/p.
    tokens: f64,
    /// Σ L²/p.
    load: f64,
}

/// Micro-batches in which every rank runs one pack of at most M tokens. cp sizes are powers of two, at least `min_cp`; a sample takes more ranks than it
/// needs where that lowers the largest L²/p, which may not pass 1.05·M times the longest sample of the micro-batch.
pub fn dynamic(batch: &Batch, min_cp: u32) -> Result<Schedule> {
    batch.check()?;
    if !min_cp.is_power_of_two() || min_cp > batch.ranks {
        return Err(Error::argument(format!(
            "min_cp_size: got {min_cp}, allowed: powers of two up to {} ranks",
            batch.ranks
        )));
    }
    let mut rest = batch.longest_first();
    let mut made =
        Schedule { placements: vec![Placement::default(); batch.lengths.len()], micro_batches: 0 };
    while !rest.is_empty() {
        let mut left = Vec::new();
        let mut groups = fill(batch, min_cp, &rest, &mut left)?;
        if !expand(batch, &mut groups)? {
            groups = vec![everywhere(batch, &rest, &mut left)];
        }
        for group in groups {
            for id in group.ids {
                made.placements[id as usize] = Placement {
                    micro_batch: made.micro_batches,
                    first: group.first,
                    ranks: group.ranks,
                    pack: 0,
                };
            }
        }
        rest = left;
        made.micro_batches += 1;
    }
    Ok(made)
}

/// Places what fits; the longest first.
fn fill(batch: &Batch, min_cp: u32, ids: &[u32], left: &mut Vec<u32>) -> Result<Vec<Group>> {
    let length = |id: u32| batch.lengths[id as usize];
    let most_tokens = f64::from(batch.tokens_per_rank);
    let cap = f64::from(length(ids[0])) * most_tokens * 1.05;
    let mut groups: Vec<Group> = Vec::new();
    let mut free = batch.ranks;
    for &id in ids {
        let l = f64::from(length(id));
        let needed = batch.power_of_two(length(id)).max(min_cp);
        if groups.is_empty() && needed > batch.ranks {
            return Err(Error::unsupported(format!(
                "lengths[{id}]: got {l}, which Megatron's dynamic scheduler gives {needed} ranks; there are {}",
                batch.ranks
            )));
        }
        let top = groups.iter().fold(0.0, |m: f64, g| m.max(g.load));
        // Largest load after the placement, cp size, and the group, if it is one that exists.
        let mut best: Option<(f64, u32, Option<usize>)> = None;
        let mut consider = |load: f64, ranks: u32, group: Option<usize>| {
            // The first sample defines the cap and is not held to it.
            if (load <= cap || top == 0.0) && best.is_none_or(|b| load < b.0) {
                best = Some((load, ranks, group));
            }
        };
        let mut ranks = needed;
        while ranks <= batch.ranks {
            let cost = l * l / f64::from(ranks);
            for (g, group) in groups.iter().enumerate() {
                if group.ranks == ranks && group.tokens + l / f64::from(ranks) <= most_tokens {
                    consider(top.max(group.load + cost), ranks, Some(g));
                }
            }
            if free >= ranks {
                consider(top.max(cost), ranks, None);
            }
            if groups.is_empty() {
                break;
            }
            ranks *= 2;
        }
        match best {
            None => left.push(id),
            Some((_, ranks, Some(g))) => {
                let group = &mut groups[g];
                group.ids.push(id);
                group.tokens += l / f64::from(ranks);
                group.load += l * l / f64::from(ranks);
            }
            Some((_, ranks, None)) => {
                let tokens = l / f64::from(ranks);
                groups.push(Group {
                    first: batch.ranks - free,
                    ranks,
                    ids: vec![id],
                    tokens,
                    load: l * l / f64::from(ranks),
                });
                free -= ranks;
            }
        }
    }
    Ok(groups)
}

/// Doubles the first of the smallest groups that has room to its right until no rank is idle; false if none has.
fn expand(batch: &Batch, groups: &mut [Group]) -> Result<bool> {
    let mut free = batch.ranks - groups.iter().map(|g| g.ranks).sum::<u32>();
    while free > 0 {
        let size = groups.iter().map(|g| g.ranks).min().unwrap_or(batch.ranks);
        let more = (2 * size).min(batch.ranks) - size;
        let fits = |g: &Group| g.ranks == size && g.first + size + more <= batch.ranks;
        let Some(at) = groups.iter().position(fits) else { return Ok(false) };
        if more > free {
            return Err(Error::unsupported(format!(
                "scheduler: Megatron's dynamic scheduler fails on {} ranks with these samples: {free} ranks stay idle, and it grows a group by {more}",
                batch.ranks
            )));
        }
        groups[at].ranks += more;
        groups[at + 1..].iter_mut().for_each(|g| g.first += more);
        free -= more;
    }
    Ok(true)
}

/// The last resort: one pack on all ranks, of as many samples as fit.
fn everywhere(batch: &Batch, ids: &[u32], left: &mut Vec<u32>) -> Group {
    left.clear();
    let mut group = Group { first: 0, ranks: batch.ranks, ids: Vec::new(), tokens: 0.0, load: 0.0 };
    for &id in ids {
        let tokens = f64::from(batch.lengths[id as usize]) / f64::from(batch.ranks);
        if group.tokens + tokens <= f64::from(batch.tokens_per_rank) {
            group.tokens += tokens;
            group.ids.push(id);
        } else {
            left.push(id);
        }
    }
    group
}
