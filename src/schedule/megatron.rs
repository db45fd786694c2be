//! Megatron-LM's own assignments, for those who compare or who must not change: `BalancedCPScheduler` as released with megatron-core 0.16.1
//! (hybrid context parallelism), and `DpBalancedScheduler`. Both are held to fixtures made by running Megatron (tests/data/megatron_schedules.txt).

use super::{Batch, Placement, Schedule};
use crate::error::{Error, Result};
use std::collections::VecDeque;

/// Loads within this part of the largest count as even.
const SLACK: f64 = 0.05;

/// Consecutive ranks that run the same samples one after another.
struct Group {
    first: u32,
    ranks: u32,
    ids: Vec<u32>,
    load: f64,
}

/// Megatron's measure of work: L²/p.
fn work(length: u32, ranks: u32) -> f64 {
    let l = f64::from(length);
    l * l / f64::from(ranks)
}

/// `BalancedCPScheduler`: cp sizes are powers of two, just large enough for the sample; each micro-batch is a set of groups of ranks, filled until
/// their L²/p is even within 5 %; every sample is a pack of its own. Where Megatron stops with an assertion or an index error, so does this.
pub fn balanced(batch: &Batch) -> Result<Schedule> {
    batch.check()?;
    let mut rest = batch.longest_first();
    let mut made =
        Schedule { placements: vec![Placement::default(); batch.lengths.len()], micro_batches: 0 };
    while !rest.is_empty() {
        let mut groups = Vec::new();
        rest = fill(batch, &rest, &mut groups);
        trim(batch, &mut groups, &mut rest);
        expand(batch, &mut groups)?;
        for group in groups {
            for (pack, id) in group.ids.iter().enumerate() {
                made.placements[*id as usize] = Placement {
                    micro_batch: made.micro_batches,
                    first: group.first,
                    ranks: group.ranks,
                    pack: pack as u32,
                };
            }
        }
        made.micro_batches += 1;
    }
    Ok(made)
}

/// The samples in order, cut into as many buckets as there are cp sizes, of about equal work.
fn buckets(batch: &Batch, ids: &[u32]) -> VecDeque<VecDeque<u32>> {
    let length = |id: u32| batch.lengths[id as usize];
    let cost = |id: u32| work(length(id), batch.power_of_two(length(id)));
    let mut sizes: Vec<u32> = ids.iter().map(|&id| batch.power_of_two(length(id))).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let target = ids.iter().map(|&id| cost(id)).sum::<f64>() / sizes.len() as f64;
    let mut made = VecDeque::new();
    let (mut bucket, mut load, mut left) = (VecDeque::new(), 0.0, sizes.len());
    for (i, &id) in ids.iter().enumerate() {
        // Megatron counts a closed bucket twice here, once in what is left and once in what is made.
        let reserved = ids.len() - i <= left.saturating_sub(made.len());
        if !bucket.is_empty() && (load + cost(id) > target * 1.1 || reserved) {
            made.push_back(std::mem::take(&mut bucket));
            load = 0.0;
            left = left.saturating_sub(1);
        }
        bucket.push_back(id);
        load += cost(id);
    }
    if !bucket.is_empty() {
        made.push_back(bucket);
    }
    made
}

/// Places samples until the groups are even or none fits; what remains, in order.
fn fill(batch: &Batch, ids: &[u32], groups: &mut Vec<Group>) -> Vec<u32> {
    let mut buckets = buckets(batch, ids);
    let mut free = batch.ranks;
    let mut first_size = None;
    let mut even_is_enough = false;
    while !buckets.is_empty() {
        let size = |id: u32| batch.power_of_two(batch.lengths[id as usize]);
        let fits = |id: u32| free >= size(id) || groups.iter().any(|g| g.ranks == size(id));
        let Some(bucket) = buckets.iter_mut().find(|b| b.front().is_some_and(|&id| fits(id)))
        else {
            break;
        };
        let id = bucket.pop_front().expect("found by its front");
        let ranks = size(id);
        let cost = work(batch.lengths[id as usize], ranks);
        // An unused group has load 0, so it is always the least loaded one.
        if free >= ranks {
            groups.push(Group { first: batch.ranks - free, ranks, ids: vec![id], load: cost });
            free -= ranks;
        } else {
            let same = groups.iter_mut().filter(|g| g.ranks == ranks);
            let least =
                same.min_by(|a, b| a.load.total_cmp(&b.load)).expect("a group of this size");
            least.ids.push(id);
            least.load += cost;
        }
        while buckets.front().is_some_and(VecDeque::is_empty) {
            buckets.pop_front();
        }
        even_is_enough |= ranks < *first_size.get_or_insert(ranks);
        let (least, most) = extremes(groups, free);
        if even_is_enough && !buckets.is_empty() && most - least <= SLACK * most {
            break;
        }
    }
    buckets.into_iter().flatten().collect()
}

/// Smallest and largest load of a rank.
fn extremes(groups: &[Group], free: u32) -> (f64, f64) {
    let idle = if free > 0 { 0.0 } else { f64::INFINITY };
    groups.iter().fold((idle, 0.0), |(least, most), g| (g.load.min(least), g.load.max(most)))
}

/// Takes last samples off the most loaded group as long as that evens loads out.
fn trim(batch: &Batch, groups: &mut [Group], rest: &mut Vec<u32>) {
    let used: u32 = groups.iter().map(|g| g.ranks).sum();
    loop {
        let (least, most) = extremes(groups, batch.ranks - used);
        if most - least <= SLACK * most || least == 0.0 {
            return;
        }
        let group =
            groups.iter().position(|g| g.load == most).expect("someone has the largest load");
        let Group { ranks, ref ids, load, .. } = groups[group];
        let &[.., _, last] = &ids[..] else { return };
        let lighter = load - work(batch.lengths[last as usize], ranks);
        groups[group].load = lighter;
        let (low, high) = extremes(groups, 0);
        if high - low >= most - least {
            groups[group].load = load;
            return;
        }
        groups[group].ids.pop();
        rest.push(last);
    }
}

/// Doubles the first of the smallest groups until no rank is idle.
fn expand(batch: &Batch, groups: &mut [Group]) -> Result<()> {
    let mut free = batch.ranks - groups.iter().map(|g| g.ranks).sum::<u32>();
    while free > 0 {
        let refused = |why: String| {
            let ranks = batch.ranks;
            Error::unsupported(format!(
                "scheduler: Megatron's balanced scheduler fails on {ranks} ranks with these samples: {why}"
            ))
        };
        let Some(size) = groups.iter().map(|g| g.ranks).min() else {
            return Err(refused(
                "the longest needs more ranks, rounded up to a power of two".into(),
            ));
        };
        let more = (2 * size).min(batch.ranks) - size;
        if more > free {
            return Err(refused(format!(
                "{free} ranks stay idle, and its smallest group can only grow by {more}"
            )));
        }
        let at = groups.iter().position(|g| g.ranks == size).expect("the smallest is there");
        groups[at].ranks += more;
        groups[at + 1..].iter_mut().for_each(|g| g.first += more);
        free -= more;
    }
    Ok(())
}

/// `DpBalancedScheduler`: one cp size for all; samples are packed in their order until a pack is full, and the last packs give single samples away until
/// the number of packs is a multiple of ranks / cp.
pub fn dp_balanced(batch: &Batch, cp: u32) -> Result<Schedule> {
    batch.check()?;
    if cp == 0 || !batch.ranks.is_multiple_of(cp) {
        return Err(Error::argument(format!(
            "cp_size: got {cp}, allowed: divisors of {} ranks",
            batch.ranks
        )));
    }
    let most = u64::from(cp) * u64::from(batch.tokens_per_rank);
    let mut packs: Vec<Vec<u32>> = Vec::new();
    let mut sum = 0;
    for (id, &length) in batch.lengths.iter().enumerate() {
        if u64::from(length) > most {
            return Err(Error::argument(format!(
                "lengths[{id}]: got {length}, allowed up to {most}: cp_size {cp}"
            )));
        }
        if packs.is_empty() || sum + u64::from(length) > most {
            packs.push(Vec::new());
            sum = 0;
        }
        sum += u64::from(length);
        packs.last_mut().expect("one is open").push(id as u32);
    }
    let dp = (batch.ranks / cp) as usize;
    let mut from = packs.len();
    while !packs.len().is_multiple_of(dp) {
        while from > 0 && packs[from - 1].len() < 2 {
            from -= 1;
        }
        if from == 0 {
            let text = format!(
                "lengths: got {} samples, too few for {dp} ranks of a data-parallel group",
                batch.lengths.len()
            );
            return Err(Error::argument(text));
        }
        let last = packs[from - 1].pop().expect("two or more");
        packs.push(vec![last]);
    }
    let mut made = Schedule {
        placements: vec![Placement::default(); batch.lengths.len()],
        micro_batches: (packs.len() / dp) as u32,
    };
    for (i, pack) in packs.iter().enumerate() {
        for &id in pack {
            let (micro_batch, first) = ((i / dp) as u32, (i % dp) as u32 * cp);
            made.placements[id as usize] = Placement { micro_batch, first, ranks: cp, pack: 0 };
        }
    }
    Ok(made)
}
