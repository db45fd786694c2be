//! The last percent: samples that run on one rank are moved and exchanged between the busiest rank and idler ones.

use super::super::cost::Cost;
use super::super::{Batch, Placement};
use super::LOOK_BACK;

/// Most exchanges, and most ranks and samples looked at for them.
const STEPS: usize = 1000;
const LOOKS: usize = 100_000;
/// So many of the idlest ranks are tried as partners.
const PARTNERS: usize = 8;

struct Ranks<'a> {
    cost: &'a Cost,
    lengths: &'a [u32],
    tokens: u32,
    /// Seconds of each rank in packs on several ranks.
    base: Vec<f64>,
    /// Samples that run on this rank alone, longest first.
    lists: Vec<Vec<u32>>,
    loads: Vec<f64>,
}

/// Lowers the largest load as long as a move or an exchange does, and packs each rank's own samples anew. `lengths` and `placed`: longest first.
pub fn even(batch: &Batch, cost: &Cost, lengths: &[u32], placed: &mut [Placement]) {
    let mut ranks = Ranks::new(batch, cost, lengths, placed);
    let mut looks = 0;
    for _ in 0..STEPS {
        looks += ranks.loads.len() + lengths.len() / ranks.loads.len();
        if looks > LOOKS || !ranks.step() {
            break;
        }
    }
    for (rank, list) in ranks.lists.iter().enumerate() {
        for (&i, pack) in list.iter().zip(ranks.packs(list)) {
            placed[i as usize] = Placement { micro_batch: 0, first: rank as u32, ranks: 1, pack };
        }
    }
}

impl<'a> Ranks<'a> {
    fn new(batch: &Batch, cost: &'a Cost, lengths: &'a [u32], placed: &[Placement]) -> Ranks<'a> {
        let n = batch.ranks as usize;
        let (mut base, mut lists) = (vec![0.0; n], vec![Vec::new(); n]);
        let mut wide = Vec::new();
        for (i, p) in placed.iter().enumerate() {
            match p.ranks {
                1 => lists[p.first as usize].push(i as u32),
                _ => wide.push((p.first, p.ranks, p.pack, lengths[i])),
            }
        }
        wide.sort_unstable();
        for pack in wide.chunk_by(|a, b| (a.0, a.1, a.2) == (b.0, b.1, b.2)) {
            let (first, ranks, ..) = pack[0];
            let time = cost.pack(ranks) + pack.iter().map(|p| cost.sample(p.3, ranks)).sum::<f64>();
            base[first as usize..(first + ranks) as usize].iter_mut().for_each(|b| *b += time);
        }
        let mut made =
            Ranks { cost, lengths, tokens: batch.tokens_per_rank, base, lists, loads: Vec::new() };
        made.loads = (0..n).map(|r| made.load(r, &made.lists[r])).collect();
        made
    }

    fn time(&self, i: u32) -> f64 {
        self.cost.sample(self.lengths[i as usize], 1)
    }

    /// The pack of each sample: the first of the last ones with room.
    fn packs(&self, list: &[u32]) -> Vec<u32> {
        let mut room: Vec<u32> = Vec::new();
        let mut pack = |&i: &u32| {
            let length = self.lengths[i as usize];
            let from = room.len().saturating_sub(LOOK_BACK);
            let at = room[from..].iter().position(|&r| r >= length).map(|at| from + at);
            let at = at.unwrap_or_else(|| {
                room.push(self.tokens);
                room.len() - 1
            });
            room[at] -= length;
            at as u32
        };
        list.iter().map(&mut pack).collect()
    }

    /// Seconds of a rank with these samples of its own.
    fn load(&self, rank: usize, list: &[u32]) -> f64 {
        let packs = self.packs(list).into_iter().max().map_or(0, |last| last + 1);
        self.base[rank]
            + list.iter().map(|&i| self.time(i)).sum::<f64>()
            + f64::from(packs) * self.cost.pack(1)
    }

    /// Takes load off the busiest rank; false if nothing does.
    fn step(&mut self) -> bool {
        let n = self.loads.len();
        let busiest =
            (0..n).rev().max_by(|&a, &b| self.loads[a].total_cmp(&self.loads[b])).expect("a rank");
        let mut idle: Vec<usize> = (0..n).filter(|&r| r != busiest).collect();
        let by_load =
            |&a: &usize, &b: &usize| self.loads[a].total_cmp(&self.loads[b]).then(a.cmp(&b));
        if idle.len() > PARTNERS {
            idle.select_nth_unstable_by(PARTNERS, by_load);
            idle.truncate(PARTNERS);
        }
        idle.sort_unstable_by(by_load);
        for partner in idle {
            let Some((give, take)) = self.exchange(busiest, partner) else { continue };
            let mut lists = [self.lists[busiest].clone(), self.lists[partner].clone()];
            lists[0].retain(|&i| i != give);
            lists[1].push(give);
            if let Some(take) = take {
                lists[1].retain(|&i| i != take);
                lists[0].push(take);
            }
            lists.iter_mut().for_each(|list| list.sort_unstable());
            let loads = [self.load(busiest, &lists[0]), self.load(partner, &lists[1])];
            if loads[0].max(loads[1]) < self.loads[busiest] * (1.0 - 1e-12) {
                let [a, b] = lists;
                (self.lists[busiest], self.lists[partner]) = (a, b);
                (self.loads[busiest], self.loads[partner]) = (loads[0], loads[1]);
                return true;
            }
        }
        false
    }

    /// A sample to give and one to take, or none, that come closest to evening the two out.
    fn exchange(&self, from: usize, to: usize) -> Option<(u32, Option<u32>)> {
        let gap = self.loads[from] - self.loads[to];
        let mut best = (gap / 2.0, None);
        let theirs = &self.lists[to];
        for &give in &self.lists[from] {
            let mut consider = |take: Option<u32>| {
                let moved = self.time(give) - take.map_or(0.0, |i| self.time(i));
                if (moved - gap / 2.0).abs() < best.0 {
                    best = ((moved - gap / 2.0).abs(), Some((give, take)));
                }
            };
            consider(None);
            // Longest first: the neighbours of what would be just right.
            let right = self.time(give) - gap / 2.0;
            let at = theirs.partition_point(|&i| self.time(i) > right);
            theirs[at.saturating_sub(1)..theirs.len().min(at + 1)]
                .iter()
                .for_each(|&i| consider(Some(i)));
        }
        best.1
    }
}
