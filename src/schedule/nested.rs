//! Our scheduler: any cp size, packs, nested ranges of ranks, one micro-batch, so that no rank waits before the end.
//!
//! For a time T that is aimed at, every sample gets the fewest ranks on which it takes no longer than T alone and fits in memory: fewer ranks mean less
//! communication. The samples are then placed, those on most ranks first, each on the least loaded range that is wide enough: a wider range
//! is split, and what is placed on its parts runs after what all of it runs. The many short samples come last, one rank each, and even loads out
//! (longest processing time first). The best T is searched for; then the sizes of one or two samples are changed as long as that helps, and samples on
//! one rank are exchanged between ranks (`even`).
//! All of it depends on the arguments alone: every rank finds the same schedule.

mod even;

use super::cost::Cost;
use super::{Batch, Placement, Schedule};
use crate::error::{Error, Result};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Placements tried, in samples: 10 ms' worth at most for 1,000 samples on 512 ranks (`context-parallel schedule --compare`).
const EFFORT: usize = 60_000;

/// So many packs of a range are looked into for room. More would be quadratic in its samples, and it is the last that have room.
const LOOK_BACK: usize = 64;

/// So many of the longest samples are tried in pairs.
const WIDE: usize = 8;

/// A range of ranks that no other range divides yet.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    /// Seconds that each of its ranks is busy.
    load: f64,
    first: u32,
    ranks: u32,
    /// Its packs, the last one first: an index into `Search::packs`, or `u32::MAX`.
    packs: u32,
    /// No pack of it has more room than this.
    space: u32,
}

/// Least load first, as a `BinaryHeap` wants it.
impl Ord for Leaf {
    fn cmp(&self, other: &Leaf) -> Ordering {
        other.load.total_cmp(&self.load).then(other.first.cmp(&self.first))
    }
}

impl PartialOrd for Leaf {
    fn partial_cmp(&self, other: &Leaf) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Leaf {
    fn eq(&self, other: &Leaf) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Leaf {}

impl Leaf {
    fn new(first: u32, ranks: u32, load: f64) -> Leaf {
        Leaf { load, first, ranks, packs: u32::MAX, space: u32::MAX }
    }

    /// Takes the first `ranks` off; the rest stays.
    fn split(&mut self, ranks: u32) -> Leaf {
        let part = Leaf::new(self.first, ranks, self.load);
        *self = Leaf::new(self.first + ranks, self.ranks - ranks, self.load);
        part
    }
}

/// Samples that run in one call.
struct Pack {
    /// Counts the range's packs.
    number: u32,
    /// Most tokens of it that a rank holds.
    tokens: u32,
    /// The range's pack before this one.
    next: u32,
}

/// Which range a sample on several ranks goes to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// The least loaded.
    Least,
    /// The most loaded that stays within this time.
    Fit(f64),
}

/// Tokens of a sample that a rank holds at most: zigzag cuts it into 2·p chunks.
fn share(length: u32, ranks: u32) -> u32 {
    if ranks == 1 { length } else { 2 * length.div_ceil(2 * ranks) }
}

/// What becomes of a number of ranks p.
#[derive(Clone, Copy)]
enum Round {
    /// It stays.
    No,
    /// As many ranges of p fit on n ranks, so wide that they cover all: n/⌊n/p⌋.
    Tile,
    /// The smallest of n, n/2, n/4, … that is enough: parts of parts, with nothing left over.
    Halve,
    /// The smallest of n, 2n/3, n/2, n/3, n/4, … that is enough.
    Third,
}

/// The smallest of n, n/2, n/4, … that is no less than p; n is.
fn halved(n: u32, p: u32) -> u32 {
    std::iter::successors(Some(n), |&size| Some(size / 2))
        .take_while(|&size| size >= p)
        .last()
        .unwrap_or(n)
}

struct Search<'a> {
    batch: &'a Batch<'a>,
    cost: &'a Cost,
    /// Longest first.
    ids: Vec<u32>,
    lengths: Vec<u32>,
    /// Fewest ranks that hold each, in that order.
    least: Vec<u32>,
    /// What was made last.
    placed: Vec<Placement>,
    leaves: Vec<Leaf>,
    packs: Vec<Pack>,
    heap: BinaryHeap<Leaf>,
    order: Vec<u32>,
    tried: usize,
    best: Best,
}

struct Best {
    time: f64,
    sizes: Vec<u32>,
    rule: Rule,
    placed: Vec<Placement>,
    busiest: u32,
}

/// Schedules the batch in one micro-batch.
pub fn nested(batch: &Batch, cost: &Cost) -> Result<Schedule> {
    batch.check()?;
    cost.check()?;
    let ids = batch.longest_first();
    let lengths: Vec<u32> = ids.iter().map(|&i| batch.lengths[i as usize]).collect();
    let (n, m) = (batch.ranks, batch.tokens_per_rank);
    if let Some(&longest) = lengths.first()
        && longest > m
        && share(longest, n) > m
    {
        return Err(Error::argument(format!(
            "lengths[{}]: got {longest}, allowed up to {}: {n} ranks with {m} tokens (tokens_per_rank) each, cut into two equal chunks a rank",
            ids[0],
            u64::from(n) * u64::from(m / 2 * 2)
        )));
    }
    let least = lengths.iter().map(|&l| if l <= m { 1 } else { l.div_ceil(m / 2 * 2) });
    let mut search = Search {
        batch,
        cost,
        least: least.collect(),
        placed: vec![Placement::default(); ids.len()],
        ids,
        lengths,
        leaves: Vec::new(),
        packs: Vec::new(),
        heap: BinaryHeap::new(),
        order: Vec::new(),
        tried: 0,
        best: Best {
            time: f64::INFINITY,
            sizes: Vec::new(),
            rule: Rule::Least,
            placed: Vec::new(),
            busiest: 0,
        },
    };
    if !search.ids.is_empty() {
        search.aim();
        search.refine();
        even::even(batch, cost, &search.lengths, &mut search.best.placed);
    }
    let mut made =
        Schedule { placements: vec![Placement::default(); batch.lengths.len()], micro_batches: 1 };
    if search.ids.is_empty() {
        made.micro_batches = 0;
    }
    for (id, placed) in search.ids.iter().zip(&search.best.placed) {
        made.placements[*id as usize] = *placed;
    }
    Ok(made)
}

impl Search<'_> {
    /// May another placement be tried?
    fn more(&self) -> bool {
        self.tried * self.ids.len().max(16) < EFFORT
    }

    /// Ranks for each sample: the fewest within a time, rounded, and at least `floor`.
    fn sizes(&self, time: f64, round: Round, floor: u32) -> Vec<u32> {
        let n = self.batch.ranks;
        let within = |(&l, &least): (&u32, &u32)| {
            let p = self.cost.ranks_within(l, least, n, time).max(floor);
            match round {
                Round::No => p,
                Round::Tile => n / (n / p),
                Round::Halve => halved(n, p),
                Round::Third if 2 * n / 3 >= p => halved(2 * n / 3, p).min(halved(n, p)),
                Round::Third => n,
            }
        };
        self.lengths.iter().zip(&self.least).map(within).collect()
    }

    /// Looks for the time to aim at.
    fn aim(&mut self) {
        let n = self.batch.ranks;
        let work = self
            .lengths
            .iter()
            .zip(&self.least)
            .map(|(&l, &p)| f64::from(p) * self.cost.sample(l, p));
        let mut low = work.sum::<f64>() / f64::from(n);
        let all = f64::INFINITY;
        let mut high = self.place(self.sizes(all, Round::No, 1), Rule::Least);
        for round in [Round::Halve, Round::Third] {
            high = high.min(self.place(self.sizes(all, round, 1), Rule::Least));
        }
        for _ in 0..10 {
            if high - low < 0.002 * high || (self.tried >= 8 && !self.more()) {
                break;
            }
            let middle = (low * high).sqrt();
            let made = self.place_within(self.sizes(middle, Round::No, 1), Rule::Least, middle);
            if made <= middle { high = middle } else { low = middle }
        }
        for round in [Round::Halve, Round::Third] {
            self.place(self.sizes(high, round, 1), Rule::Least);
        }
        // Where packs cost much beside their samples, few wide ones are better; where wires cost nothing, all ranks for each.
        let few = self.ids.len() * n as usize <= 1 << 14 || self.cost.pack(1) > 0.01 * high;
        let mut floor = if few { 2.min(n) } else { n };
        while floor <= n && self.more() {
            self.place(self.sizes(all, Round::Halve, floor), Rule::Least);
            self.place(self.sizes(high, Round::Halve, floor), Rule::Least);
            floor = if floor < n { (2 * floor).min(n) } else { n + 1 };
        }
        for step in [0, 1, -1, 2, -2, 3, 4, 6, 8, 11, 15, 20, 30] {
            let time = high * (1.0 + 0.01 * f64::from(step));
            for (round, rule) in
                [(Round::No, Rule::Fit(time)), (Round::Tile, Rule::Least), (Round::No, Rule::Least)]
            {
                if self.more() {
                    self.place(self.sizes(time, round, 1), rule);
                }
            }
        }
    }

    /// Changes the sizes of one or two samples, as long as that helps.
    fn refine(&mut self) {
        while self.more() {
            let better = self.changes().into_iter().any(|change| {
                let mut sizes = self.best.sizes.clone();
                change.iter().for_each(|&(i, size)| sizes[i] = size);
                let before = self.best.time;
                self.more() && self.place(sizes, self.best.rule) < before
            });
            if !better {
                return;
            }
        }
    }

    /// Changes worth a try: of a sample on the busiest rank; and of two wide samples, so that they run beside each other on all ranks.
    fn changes(&self) -> Vec<Vec<(usize, u32)>> {
        let n = self.batch.ranks;
        let (sizes, placed, busiest) = (&self.best.sizes, &self.best.placed, self.best.busiest);
        let mut made = Vec::new();
        let mut push = |change: Vec<(usize, u32)>| {
            let new = change.iter().any(|&(i, p)| p != sizes[i]);
            if new && change.iter().all(|&(i, p)| self.least[i] <= p && p <= n) {
                made.push(change);
            }
        };
        let on_it = |p: &Placement| p.first <= busiest && busiest < p.first + p.ranks;
        for i in (0..sizes.len()).filter(|&i| on_it(&placed[i])) {
            let p = sizes[i];
            let tile = if n / p > 1 { n / (n / p - 1) } else { n };
            for size in [p + 1, p - 1, 2 * p, tile] {
                push(vec![(i, size)]);
            }
        }
        // The longest come first.
        let wide = sizes.iter().take(WIDE).take_while(|&&p| p > 1).count();
        for i in 0..wide {
            for j in i + 1..wide {
                for p in [self.least[i], n.saturating_sub(self.least[j])] {
                    push(vec![(i, p), (j, n.saturating_sub(p))]);
                }
                push(vec![(i, self.least[i]), (j, n)]);
                push(vec![(i, n), (j, self.least[j])]);
            }
        }
        made
    }

    /// Places all samples with these sizes, keeps the schedule if it is the best so far, and says how long it takes: infinitely, if longer than the best.
    fn place(&mut self, sizes: Vec<u32>, rule: Rule) -> f64 {
        self.place_within(sizes, rule, 0.0)
    }

    /// The same, but up to `time` it says how long, the best or not.
    fn place_within(&mut self, sizes: Vec<u32>, rule: Rule, time: f64) -> f64 {
        let limit = self.best.time.max(time);
        self.tried += 1;
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        order.extend(0..sizes.len() as u32);
        order.sort_by_key(|&i| std::cmp::Reverse(sizes[i as usize]));
        self.packs.clear();
        self.leaves.clear();
        self.leaves.push(Leaf::new(0, self.batch.ranks, 0.0));
        let wide = order.partition_point(|&i| sizes[i as usize] > 1);
        for &i in &order[..wide] {
            let (i, p) = (i as usize, sizes[i as usize]);
            let v = self.cost.sample(self.lengths[i], p);
            let mut best: Option<(usize, bool, f64, u32)> = None;
            for (at, leaf) in self.leaves.iter().enumerate().filter(|(_, leaf)| leaf.ranks >= p) {
                let after = if leaf.ranks == p {
                    self.after(leaf, i, v)
                } else {
                    leaf.load + v + self.cost.pack(p)
                };
                let (full, rank) = match rule {
                    Rule::Fit(time) if after <= time => (false, -after),
                    _ => (true, after),
                };
                if best.is_none_or(|b| (full, rank, leaf.ranks) < (b.1, b.2, b.3)) {
                    best = Some((at, full, rank, leaf.ranks));
                }
            }
            let at = best.expect("samples come in falling size").0;
            let mut leaf = self.leaves[at];
            if leaf.load + v > limit {
                self.order = order;
                return f64::INFINITY;
            }
            if leaf.ranks > p {
                leaf = self.leaves[at].split(p);
                self.add(&mut leaf, i, v);
                self.leaves.push(leaf);
            } else {
                self.add(&mut leaf, i, v);
                self.leaves[at] = leaf;
            }
        }
        let mut heap = std::mem::take(&mut self.heap);
        heap.clear();
        heap.extend(self.leaves.drain(..));
        for &i in &order[wide..] {
            let i = i as usize;
            let v = self.cost.sample(self.lengths[i], 1);
            let mut top = heap.peek_mut().expect("one leaf at least");
            // The least loaded.
            if top.load + v > limit {
                drop(top);
                (self.heap, self.order) = (heap, order);
                return f64::INFINITY;
            }
            if top.ranks == 1 {
                self.add(&mut top, i, v);
            } else {
                let mut part = top.split(1);
                drop(top);
                self.add(&mut part, i, v);
                heap.push(part);
            }
        }
        let (time, busiest) = heap.iter().fold((-1.0, u32::MAX), |(time, first), leaf| {
            if leaf.load > time || (leaf.load == time && leaf.first < first) {
                (leaf.load, leaf.first)
            } else {
                (time, first)
            }
        });
        self.heap = heap;
        self.order = order;
        if time < self.best.time {
            self.best = Best { time, sizes, rule, placed: self.placed.clone(), busiest };
        }
        time
    }

    /// The last of the range's packs with room for so many tokens more.
    fn room(&self, leaf: &Leaf, share: u32) -> Option<usize> {
        let most = self.batch.tokens_per_rank.checked_sub(share)?;
        let mut at = if share <= leaf.space { leaf.packs } else { u32::MAX };
        for _ in 0..LOOK_BACK {
            let pack = self.packs.get(at as usize)?;
            if pack.tokens <= most {
                return Some(at as usize);
            }
            at = pack.next;
        }
        None
    }

    /// The load of this range after a sample with cost `v`.
    fn after(&self, leaf: &Leaf, i: usize, v: f64) -> f64 {
        let room = self.room(leaf, share(self.lengths[i], leaf.ranks)).is_some();
        leaf.load + v + if room { 0.0 } else { self.cost.pack(leaf.ranks) }
    }

    /// Puts a sample on exactly this range.
    fn add(&mut self, leaf: &mut Leaf, i: usize, v: f64) {
        let share = share(self.lengths[i], leaf.ranks);
        leaf.load += v;
        let at = self.room(leaf, share).unwrap_or_else(|| {
            // The samples that follow are no longer; most are no shorter.
            leaf.space = leaf.space.min(share - 1).max(self.batch.tokens_per_rank - share);
            let number = self.packs.get(leaf.packs as usize).map_or(0, |last| last.number + 1);
            self.packs.push(Pack { number, tokens: 0, next: leaf.packs });
            leaf.packs = self.packs.len() as u32 - 1;
            leaf.load += self.cost.pack(leaf.ranks);
            self.packs.len() - 1
        });
        self.packs[at].tokens += share;
        let pack = self.packs[at].number;
        self.placed[i] = Placement { micro_batch: 0, first: leaf.first, ranks: leaf.ranks, pack };
    }
}
