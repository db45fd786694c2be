//! Our scheduler: any cp size, packs, nested ranges of ranks, one micro-batch, so that no rank waits before the end.
//!
//! For a time T that is aimed at, every sample gets the fewest ranks on which it takes no longer than T alone and fits in memory: fewer ranks mean less
//! communication. The samples are then placed, those on most ranks first, each on the least loaded range that is wide enough: a wider range
//! is split, and what is placed on its parts runs after what all of it runs. The many short samples come last, one rank each, and even loads out
//! (longest processing time first). The best T is searched for; then the sizes of single samples on the busiest rank are changed as long as that helps.
//! All of it depends on the arguments alone: every rank finds the same schedule.

use super::cost::Cost;
use super::{Batch, Placement, Schedule};
use crate::error::{Error, Result};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Placements tried, in samples: 10 ms' worth at most for 1,000 samples on 512 ranks (`context-parallel schedule --compare`).
const EFFORT: usize = 60_000;

/// A range of ranks that no other range divides yet.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    /// Seconds that each of its ranks is busy.
    load: f64,
    first: u32,
    ranks: u32,
    /// The last pack on exactly this range, and the tokens of it that a rank holds; `u32::MAX`: there is none.
    pack: u32,
    tokens: u32,
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
        Leaf { load, first, ranks, pack: u32::MAX, tokens: u32::MAX }
    }

    /// Takes the first `ranks` off; the rest stays.
    fn split(&mut self, ranks: u32) -> Leaf {
        let part = Leaf::new(self.first, ranks, self.load);
        *self = Leaf::new(self.first + ranks, self.ranks - ranks, self.load);
        part
    }
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
        heap: BinaryHeap::new(),
        order: Vec::new(),
        tried: 0,
        best: Best { time: f64::INFINITY, sizes: Vec::new(), rule: Rule::Least, placed: Vec::new(), busiest: 0 },
    };
    if !search.ids.is_empty() {
        search.aim();
        search.refine();
    }
    let mut made = Schedule { placements: vec![Placement::default(); batch.lengths.len()], micro_batches: 1 };
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

    /// Fewest ranks for each sample within a time; with `tile`, as many as make equal ranges cover all ranks.
    fn sizes(&self, time: f64, tile: bool) -> Vec<u32> {
        let n = self.batch.ranks;
        let within = |(&l, &least): (&u32, &u32)| {
            let p = self.cost.ranks_within(l, least, n, time);
            if tile { n / (n / p) } else { p }
        };
        self.lengths.iter().zip(&self.least).map(within).collect()
    }

    /// Looks for the time to aim at.
    fn aim(&mut self) {
        let n = f64::from(self.batch.ranks);
        let work: f64 = self.lengths.iter().zip(&self.least).map(|(&l, &p)| f64::from(p) * self.cost.sample(l, p)).sum();
        let (mut low, mut high) = (work / n, self.place(self.sizes(f64::INFINITY, false), Rule::Least));
        for _ in 0..10 {
            if high - low < 0.002 * high {
                break;
            }
            let middle = (low * high).sqrt();
            if self.place(self.sizes(middle, false), Rule::Least) <= middle { high = middle } else { low = middle }
        }
        for step in [0, 1, -1, 2, -2, 3, 4, 6, 8, 11, 15, 20, 30] {
            let time = high * (1.0 + 0.01 * f64::from(step));
            for (tile, fit) in [(false, true), (true, false), (false, false)] {
                if self.more() {
                    let rule = if fit { Rule::Fit(time) } else { Rule::Least };
                    self.place(self.sizes(time, tile), rule);
                }
            }
        }
    }

    /// Changes the size of one sample on the busiest rank, as long as that helps.
    fn refine(&mut self) {
        let n = self.batch.ranks;
        'again: while self.more() {
            let busiest = self.best.busiest;
            let on_it: Vec<usize> = (0..self.ids.len())
                .filter(|&i| {
                    let p = &self.best.placed[i];
                    p.first <= busiest && busiest < p.first + p.ranks
                })
                .collect();
            let (before, rule) = (self.best.time, self.best.rule);
            for &i in &on_it {
                let p = self.best.sizes[i];
                let tile = if n / p > 1 { n / (n / p - 1) } else { n };
                for size in [p + 1, p - 1, 2 * p, tile] {
                    if size < self.least[i] || size > n || size == p || !self.more() {
                        continue;
                    }
                    let mut sizes = self.best.sizes.clone();
                    sizes[i] = size;
                    if self.place(sizes, rule) < before {
                        continue 'again;
                    }
                }
            }
            return;
        }
    }

    /// Places all samples with these sizes, keeps the schedule if it is the best so far, and says how long it takes.
    fn place(&mut self, sizes: Vec<u32>, rule: Rule) -> f64 {
        self.tried += 1;
        let mut order = std::mem::take(&mut self.order);
        order.clear();
        order.extend(0..sizes.len() as u32);
        order.sort_by_key(|&i| std::cmp::Reverse(sizes[i as usize]));
        self.leaves.clear();
        self.leaves.push(Leaf::new(0, self.batch.ranks, 0.0));
        let wide = order.partition_point(|&i| sizes[i as usize] > 1);
        for &i in &order[..wide] {
            let (i, p) = (i as usize, sizes[i as usize]);
            let v = self.cost.sample(self.lengths[i], p);
            let fits = self.leaves.iter().enumerate().filter(|(_, leaf)| leaf.ranks >= p);
            let narrow = |a: &Leaf, b: &Leaf| a.ranks.cmp(&b.ranks);
            let chosen = match rule {
                Rule::Least => fits.min_by(|(_, a), (_, b)| a.load.total_cmp(&b.load).then_with(|| narrow(a, b))),
                Rule::Fit(time) => fits.min_by(|(_, a), (_, b)| {
                    let full = |leaf: &Leaf| leaf.load + v + self.cost.pack(p) > time;
                    full(a).cmp(&full(b)).then_with(|| {
                        let by_load = a.load.total_cmp(&b.load);
                        if full(a) { by_load } else { by_load.reverse() }.then_with(|| narrow(a, b))
                    })
                }),
            };
            let at = chosen.expect("samples come in falling size").0;
            if self.leaves[at].ranks > p {
                let part = self.leaves[at].split(p);
                self.leaves.push(part);
            }
            let at = if self.leaves[at].ranks == p { at } else { self.leaves.len() - 1 };
            self.placed[i] = self.put(at, i, v);
        }
        let mut heap = std::mem::take(&mut self.heap);
        heap.clear();
        heap.extend(self.leaves.drain(..));
        heap
            .is_empty();
        for &i in &order[wide..] {
            let i = i as usize;
            let v = self.cost.sample(self.lengths[i], 1);
            let mut top = heap.peek_mut().expect("one leaf at least");
            if top.ranks > 1 {
                let mut part = top.split(1);
                drop(top);
                self.placed[i] = self.add(&mut part, i, v);
                heap.push(part);
            } else {
                self.placed[i] = self.add(&mut top, i, v);
            }
        }
        let (time, busiest) = heap.iter().fold((-1.0, u32::MAX), |(time, first), leaf| {
            if leaf.load > time || (leaf.load == time && leaf.first < first) { (leaf.load, leaf.first) } else { (time, first) }
        });
        self.heap = heap;
        self.order = order;
        if time < self.best.time {
            self.best = Best { time, sizes, rule, placed: self.placed.clone(), busiest };
        }
        time
    }

    fn put(&mut self, at: usize, i: usize, v: f64) -> Placement {
        let mut leaf = self.leaves[at];
        let placed = self.add(&mut leaf, i, v);
        self.leaves[at] = leaf;
        placed
    }

    /// Puts a sample on exactly this range: into its last pack, if it fits.
    fn add(&self, leaf: &mut Leaf, i: usize, v: f64) -> Placement {
        let share = share(self.lengths[i], leaf.ranks);
        if leaf.pack != u32::MAX && leaf.tokens + share <= self.batch.tokens_per_rank {
            leaf.tokens += share;
            leaf.load += v;
        } else {
            leaf.pack = leaf.pack.wrapping_add(1);
            leaf.tokens = share;
            leaf.load += v + self.cost.pack(leaf.ranks);
        }
        Placement { micro_batch: 0, first: leaf.first, ranks: leaf.ranks, pack: leaf.pack }
    }
}
