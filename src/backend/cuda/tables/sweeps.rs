//! One tile's work: which rows of the other side each slice makes it go over, and which slices share a part.
//!
//! ```text
//!              keys →                        a part is one sweep over [begin, end)
//!     tile  ┌  ■ ■ ■ · · · · · · · · ·       documents A, B, C: one part, though no row sees all of it,
//!     of    │  · · · ■ ■ ■ · · · · · ·       because three sweeps would be three tiles of keys, each mostly empty
//!     query │  · · · · · · ■ ■ ■ · · ·
//!     rows  └  · · · · · · · · · · · · …  ■  document D, far away: a part of its own
//! ```

use crate::mask::Slice;
use std::ops::Range;

/// Which rows a tile owns; it goes over the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Tiles own queries and go over keys, in tiles of this many that start at a part's first key.
    Forward { k_rows: u32 },
    /// Tiles own keys and go over queries, in tiles of this many on a fixed grid.
    Backward { q_rows: u32 },
}

/// No sweep.
const NONE: u32 = u32::MAX;

/// What one slice means to one tile.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    /// Index of the slice.
    pub slice: u32,
    /// The sweep that came into its part before it; [`NONE`] for the first.
    before: u32,
    /// Rows of the other side that the tile's rows in the slice see or are seen by.
    pub other: (u32, u32),
    /// Of those, the ones that pair with all of the tile's rows in the slice; maybe none (end <= begin).
    full: (u32, u32),
    /// How many of the tile's rows are in the slice.
    owned: u32,
    /// Query rows of the slice.
    queries: (u32, u32),
}

impl Sweep {
    /// `tile` are rows of the owned side; at least one is in the slice. None when none of them is in a pair.
    pub fn new(side: Side, index: u32, s: &Slice, tile: &Range<u32>) -> Option<Sweep> {
        let (n, m) = (i64::from(s.q_len), i64::from(s.k_len));
        let (lo, hi) = (i64::from(s.lo), i64::from(s.hi));
        let (base, first, last, other, full, len) = match side {
            Side::Forward { .. } => {
                let (first, last) = inside(tile, s.q, s.q_len);
                // Row i sees keys i + lo … i + hi; both ends grow with i.
                (s.k, first, last, (first + lo, last + hi + 1), (last + lo, first + hi + 1), m)
            }
            Side::Backward { .. } => {
                let (first, last) = inside(tile, s.k, s.k_len);
                // Key j is seen by rows j − hi … j − lo.
                (s.q, first, last, (first - hi, last - lo + 1), (last - hi, first - lo + 1), n)
            }
        };
        let clamp = |(a, b): (i64, i64)| {
            let (a, b) = (a.clamp(0, len), b.clamp(0, len));
            (base + a as u32, base + b.max(a) as u32)
        };
        let (other, full) = (clamp(other), clamp(full));
        let owned = (last - first + 1) as u32;
        let queries = (s.q, s.q + s.q_len);
        (other.0 < other.1).then_some(Sweep {
            slice: index,
            before: NONE,
            other,
            full,
            owned,
            queries,
        })
    }
}

/// First and last row of `tile` that lie in `start .. start + len`, relative to `start`.
fn inside(tile: &Range<u32>, start: u32, len: u32) -> (i64, i64) {
    let first = tile.start.max(start) - start;
    let last = tile.end.min(start + len) - 1 - start;
    (i64::from(first), i64::from(last))
}

/// Sweeps made together.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Rows of the other side to go over.
    pub other: (u32, u32),
    /// Backward: the longest run of rows that see every key of the tile, and the run that may still grow. Forward: both are the keys
    /// that every query of the sweeps so far sees.
    full: (u32, u32),
    run: (u32, u32),
    owned: u32,
    /// From the first to the last query row of the slices.
    queries: (u32, u32),
    /// Its sweep that came last.
    last: u32,
}

impl Part {
    fn of(side: Side, sweep: &Sweep, tile_rows: u32) -> Part {
        let full = match side {
            Side::Backward { .. } if sweep.owned < tile_rows => (0, 0),
            _ => sweep.full,
        };
        let Sweep { other, owned, queries, .. } = *sweep;
        Part { other, full, run: full, owned, queries, last: NONE }
    }

    /// This part and a sweep that starts no earlier than its last.
    fn with(&self, side: Side, sweep: &Sweep, tile_rows: u32) -> Part {
        let one = Part::of(side, sweep, tile_rows);
        let (full, run) = match side {
            Side::Forward { .. } => {
                let both = (self.full.0.max(one.full.0), self.full.1.min(one.full.1));
                (both, both)
            }
            Side::Backward { .. } => {
                let run = match one.full {
                    none if len(none) == 0 => self.run,
                    next if next.0 == self.run.1 => (self.run.0, next.1),
                    next => next,
                };
                (if len(run) > len(self.full) { run } else { self.full }, run)
            }
        };
        Part {
            other: (self.other.0.min(one.other.0), self.other.1.max(one.other.1)),
            full,
            run,
            owned: self.owned + one.owned,
            queries: (self.queries.0.min(one.queries.0), self.queries.1.max(one.queries.1)),
            last: self.last,
        }
    }

    /// Rows of the other side that need no mask; (x, x) when there are none.
    pub fn full(&self, side: Side, tile_rows: u32) -> (u32, u32) {
        let whole = match side {
            // Every row of the tile is in one of the slices, so that all of them see `full`.
            Side::Forward { .. } => self.owned == tile_rows,
            Side::Backward { .. } => true,
        };
        if whole && len(self.full) > 0 { self.full } else { (self.other.0, self.other.0) }
    }

    /// First inner tile and one past the last, on the grid that the side has.
    pub fn visits(&self, side: Side) -> Range<u32> {
        match side {
            Side::Forward { k_rows } => 0..(self.other.1 - self.other.0).div_ceil(k_rows),
            Side::Backward { q_rows } => self.other.0 / q_rows..self.other.1.div_ceil(q_rows),
        }
    }

    /// About how long the part takes, in eighths of an inner tile: an inner tile costs a little more when it has to be masked, and so
    /// does starting a part.
    fn cost(&self, side: Side, tile_rows: u32) -> u32 {
        let visits = self.visits(side);
        let (origin, step) = match side {
            Side::Forward { k_rows } => (self.other.0, k_rows),
            Side::Backward { q_rows } => (0, q_rows),
        };
        let full = self.full(side, tile_rows);
        let unmasked = ((full.1 - origin) / step).saturating_sub((full.0 - origin).div_ceil(step));
        9 * visits.len() as u32 - unmasked + 2
    }
}

fn len(range: (u32, u32)) -> u32 {
    range.1.saturating_sub(range.0)
}

/// A sweep is compared with this many parts before it, nearest first. Sweeps come in order of their ranges, so what is close in range is
/// close in the list.
const LOOK_BACK: usize = 8;

/// The sweeps of one tile, distributed over parts.
#[derive(Default)]
pub struct Groups {
    /// The parts.
    pub parts: Vec<Part>,
    sweeps: Vec<Sweep>,
    order: Vec<(u32, u32)>,
}

impl Groups {
    /// Distributes greedily, in the order of the sweeps' ranges, each into the part where it costs least. Slices of a part have no query
    /// row in common.
    pub fn fill(&mut self, side: Side, tile_rows: u32, sweeps: impl Iterator<Item = Sweep>) {
        self.parts.clear();
        self.sweeps.clear();
        self.sweeps.extend(sweeps);
        self.order.clear();
        self.order.extend(self.sweeps.iter().zip(0..).map(|(s, index)| (s.other.0, index)));
        self.order.sort_unstable();
        for &(_, index) in &self.order {
            let sweep = self.sweeps[index as usize];
            let (at, part) = self.place(side, tile_rows, &sweep);
            self.sweeps[index as usize].before = part.last;
            let part = Part { last: index, ..part };
            if at == self.parts.len() {
                self.parts.push(part);
            } else {
                self.parts[at] = part;
            }
        }
    }

    /// The part, maybe a new one, that a sweep costs least in, and what it becomes.
    fn place(&self, side: Side, tile_rows: u32, sweep: &Sweep) -> (usize, Part) {
        let alone = Part::of(side, sweep, tile_rows);
        let mut best = (alone.cost(side, tile_rows), self.parts.len(), alone);
        let step = match side {
            Side::Forward { k_rows } => k_rows,
            Side::Backward { q_rows } => q_rows,
        };
        for (index, part) in self.parts.iter().enumerate().rev().take(LOOK_BACK) {
            // Further apart there is a tile between the two that neither needs.
            if sweep.other.0 >= part.other.1 + 2 * step || !self.apart(part, sweep) {
                continue;
            }
            let union = part.with(side, sweep, tile_rows);
            let visits = |p: &Part| p.visits(side).len();
            let more = union.cost(side, tile_rows).saturating_sub(part.cost(side, tile_rows));
            if more < best.0 && visits(&union) <= visits(part) + visits(&alone) {
                best = (more, index, union);
            }
        }
        (best.1, best.2)
    }

    /// Has the sweep no query row in common with the slices of a part?
    fn apart(&self, part: &Part, sweep: &Sweep) -> bool {
        let disjoint = |a: (u32, u32)| a.1 <= sweep.queries.0 || sweep.queries.1 <= a.0;
        disjoint(part.queries) || self.sweeps_of(part).all(|s| disjoint(s.queries))
    }

    fn sweeps_of(&self, part: &Part) -> impl Iterator<Item = &Sweep> {
        let sweep = |index: u32| (index != NONE).then(|| &self.sweeps[index as usize]);
        std::iter::successors(sweep(part.last), move |s| sweep(s.before))
    }

    /// Indices of a part's slices, in order.
    pub fn slices_of(&self, part: &Part, out: &mut Vec<u32>) {
        out.clear();
        out.extend(self.sweeps_of(part).map(|s| s.slice));
        out.sort_unstable();
    }
}
