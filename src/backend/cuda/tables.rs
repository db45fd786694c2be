//! Slices to the kernels' work lists (`kernels/params.h`): tiles of one side, longest first, each with the parts of the other side that
//! it goes over. Pure: numbers in, bytes out, the same bytes for the same numbers.
//!
//! All lists of a plan lie in one blob, which travels to the device in one copy; what launches need to know is where in it their lists are.

mod sweeps;
#[cfg(test)]
mod tests;
mod tokens;

use super::params;
use crate::backend::Run;
use crate::mask::Slice;
use std::ops::Range;
use sweeps::{Groups, Side, Sweep};
pub use tokens::{Sequences, TokenWork, tokens_bound};

/// Every list starts at a multiple of this many bytes: kernels read them in vectors.
pub const ALIGN: usize = 16;

/// Rows of a kernel's tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tiling {
    /// Query rows.
    pub q_rows: u32,
    /// Key rows.
    pub k_rows: u32,
}

/// Where the lists of an attend step lie in the blob, in bytes, and what a launch needs to know of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttendWork {
    /// `cp_tile[]`.
    pub tiles: u64,
    /// `cp_part[]`.
    pub parts: u64,
    /// `cp_slice[]`.
    pub slices: u64,
    /// Bitmap of the query rows that are in some slice; none when the kernel meets no others.
    pub q_used: Option<u64>,
    /// The same for key rows.
    pub k_used: Option<u64>,
    /// `uint32_t[]`, for deterministic backward steps.
    pub turns: Option<u64>,
    /// Number of tiles; 0: nothing to launch.
    pub tile_count: u32,
    /// Number of parts.
    pub part_count: u32,
    /// Inner tiles that all tiles go over: what the step costs.
    pub visits: u64,
    /// Tiles that the query rows are cut into.
    pub query_tiles: u32,
    /// Number of turns.
    pub turn_count: u32,
    /// Which tokens the rows are, if scores depend on that.
    pub tokens: Option<TokenWork>,
}

impl AttendWork {
    /// Counters (`uint32_t`) that a deterministic backward step needs, for dQ and, if heads share it, for the gradient of a bias; 0 if it is not
    /// deterministic.
    pub fn counters(&self, heads: usize, shared_bias: bool) -> [usize; 2] {
        match (self.turns, shared_bias) {
            (None, _) => [0; 2],
            (Some(_), false) => [self.query_tiles as usize * heads, 0],
            (Some(_), true) => [self.query_tiles as usize * heads, self.turn_count as usize],
        }
    }
}

/// Where the runs of a row-wise step lie in the blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowsWork {
    /// `cp_run[]`.
    pub runs: u64,
    /// Number of runs.
    pub run_count: u32,
    /// Rows of all runs together; 0: nothing to launch.
    pub row_count: u32,
}

/// Builds the lists of all steps of a plan.
pub struct TableBuilder {
    forward: Tiling,
    backward: Tiling,
    blob: Vec<u8>,
    scratch: Scratch,
}

/// Vectors that every step fills anew.
#[derive(Default)]
struct Scratch {
    slices: Vec<Slice>,
    /// Slices by tile: those of tile t are `of_tile[start[t] .. start[t + 1]]`.
    start: Vec<u32>,
    of_tile: Vec<u32>,
    groups: Groups,
    together: Vec<u32>,
    /// Where in `table` each slice was written last.
    placed: Vec<u32>,
    /// Tiles with their cost.
    tiles: Vec<(u32, params::Tile)>,
    parts: Vec<params::Part>,
    table: Vec<params::Slice>,
    turns: Vec<u32>,
    adds: Vec<u32>,
    /// Bitmaps of the query and key rows that are in some slice.
    used: [Vec<u32>; 2],
}

impl TableBuilder {
    /// For kernels with these tiles.
    pub fn new(forward: Tiling, backward: Tiling) -> TableBuilder {
        TableBuilder { forward, backward, blob: Vec::new(), scratch: Scratch::default() }
    }

    /// Lists of a forward step: query tiles that go over keys. With `always` every query row is in a tile, also those that see nothing:
    /// the first step makes the state, the last one writes the output.
    pub fn forward(
        &mut self,
        slices: &[Slice],
        q_rows: u32,
        k_rows: u32,
        always: bool,
    ) -> AttendWork {
        let side = Side::Forward { k_rows: self.forward.k_rows };
        let visits = self.scratch.fill(side, slices, self.forward.q_rows, q_rows, always);
        self.write(side, visits, q_rows, k_rows)
    }

    /// Lists of a backward step: key tiles that go over queries.
    pub fn backward(
        &mut self,
        slices: &[Slice],
        q_rows: u32,
        k_rows: u32,
        deterministic: bool,
    ) -> AttendWork {
        let side = Side::Backward { q_rows: self.backward.q_rows };
        let visits = self.scratch.fill(side, slices, self.backward.k_rows, k_rows, false);
        let query_tiles = q_rows.div_ceil(self.backward.q_rows);
        let (mut turns, mut turn_count) = (None, 0);
        if deterministic {
            self.scratch.take_turns(side, query_tiles);
            turns = Some(put(&mut self.blob, &self.scratch.turns));
            turn_count = self.scratch.turns.len() as u32;
        }
        let work = self.write(side, visits, q_rows, k_rows);
        AttendWork { turns, query_tiles, turn_count, ..work }
    }

    /// Appends the lists in scratch to the blob.
    fn write(&mut self, side: Side, visits: u64, q_rows: u32, k_rows: u32) -> AttendWork {
        let (s, blob) = (&mut self.scratch, &mut self.blob);
        let needed = s.mark_used(side, [q_rows, k_rows]);
        let mut used = |n: usize| needed[n].then(|| put(blob, &s.used[n]));
        let (q_used, k_used) = (used(0), used(1));
        AttendWork {
            tiles: put_all(blob, s.tiles.iter().map(|(_, tile)| *tile)),
            parts: put(blob, &s.parts),
            slices: put(blob, &s.table),
            q_used,
            k_used,
            turns: None,
            tile_count: s.tiles.len() as u32,
            part_count: s.parts.len() as u32,
            visits,
            query_tiles: 0,
            turn_count: 0,
            tokens: None,
        }
    }

    /// Runs of a copy.
    pub fn runs(&mut self, runs: &[Run]) -> RowsWork {
        self.rows_work(runs.iter().map(|run| params::Run {
            src: run.src,
            src_step: run.src_step,
            dst: run.dst,
            dst_step: run.dst_step,
            rows: run.rows,
            before: 0,
        }))
    }

    /// Rows of a fill, as (first, step, count).
    pub fn rows(&mut self, rows: impl IntoIterator<Item = (u32, u32, u32)>) -> RowsWork {
        self.rows_work(rows.into_iter().map(|(dst, dst_step, rows)| params::Run {
            dst,
            dst_step,
            rows,
            ..params::Run::default()
        }))
    }

    fn rows_work(&mut self, runs: impl Iterator<Item = params::Run>) -> RowsWork {
        let (mut run_count, mut before) = (0, 0);
        let counted = runs.filter(|run| run.rows > 0).map(|run| {
            let run = params::Run { before, ..run };
            (run_count, before) = (run_count + 1, before + run.rows);
            run
        });
        let runs = put_all(&mut self.blob, counted);
        RowsWork { runs, run_count, row_count: before }
    }

    /// The blob so far.
    pub fn bytes(&self) -> &[u8] {
        &self.blob
    }

    /// The blob; it belongs at a multiple of [`ALIGN`] bytes.
    pub fn finish(self) -> Vec<u8> {
        self.blob
    }
}

/// A struct of 32-bit numbers.
trait Words: Copy {}
impl Words for u32 {}
impl Words for f32 {}
impl Words for params::Token {}
impl Words for params::Sequence {}
impl Words for params::Tile {}
impl Words for params::Part {}
impl Words for params::Slice {}
impl Words for params::Run {}

/// Appends a list, and says where it starts.
fn put<T: Words>(blob: &mut Vec<u8>, items: &[T]) -> u64 {
    put_all(blob, items.iter().copied())
}

fn put_all<T: Words>(blob: &mut Vec<u8>, items: impl Iterator<Item = T>) -> u64 {
    blob.resize(blob.len().next_multiple_of(ALIGN), 0);
    let at = blob.len();
    blob.reserve(items.size_hint().0 * size_of::<T>());
    for item in items {
        let bytes = std::ptr::from_ref(&item).cast::<u8>();
        // SAFETY: a struct of 32-bit numbers has no padding: all its bytes are written.
        blob.extend_from_slice(unsafe { std::slice::from_raw_parts(bytes, size_of::<T>()) });
    }
    at as u64
}

impl Scratch {
    /// Makes tiles, parts and slices of a step, tiles in launch order. Returns the number of inner tiles.
    fn fill(
        &mut self,
        side: Side,
        slices: &[Slice],
        tile_rows: u32,
        rows: u32,
        always: bool,
    ) -> u64 {
        coalesce(slices, &mut self.slices);
        self.table.clear();
        self.placed.clear();
        self.placed.resize(self.slices.len(), UNPLACED);
        self.tiles.clear();
        self.parts.clear();
        self.sort_by_tile(side, tile_rows, rows);
        let mut visits = 0;
        for t in 0..rows.div_ceil(tile_rows) as usize {
            let whole = t as u32 * tile_rows..rows.min((t as u32 + 1) * tile_rows);
            let mine = &self.of_tile[self.start[t] as usize..self.start[t + 1] as usize];
            let ranges = mine.iter().map(|s| own_rows(side, &self.slices[*s as usize]));
            let (first, last) =
                ranges.fold((u32::MAX, 0), |(a, b), r| (a.min(r.start), b.max(r.end)));
            let own = if always { whole } else { whole.start.max(first)..whole.end.min(last) };
            if own.start < own.end {
                visits += self.tile(side, t, own);
            }
        }
        self.tiles.sort_unstable_by_key(|(cost, tile)| (std::cmp::Reverse(*cost), tile.row));
        visits
    }

    /// Sorts the slices' indices by the tiles that they have rows in; within a tile in order.
    fn sort_by_tile(&mut self, side: Side, tile_rows: u32, rows: u32) {
        let tiles_of = |s: &Slice| {
            let own = own_rows(side, s);
            (own.start / tile_rows) as usize..own.end.div_ceil(tile_rows) as usize
        };
        // Counts, then ends, then (filling from the back) starts.
        self.start.clear();
        self.start.resize(rows.div_ceil(tile_rows) as usize + 1, 0);
        for s in &self.slices {
            self.start[tiles_of(s)].iter_mut().for_each(|count| *count += 1);
        }
        let mut end = 0;
        for count in &mut self.start {
            end += *count;
            *count = end;
        }
        self.of_tile.resize(end as usize, 0);
        for (index, s) in self.slices.iter().enumerate().rev() {
            for at in &mut self.start[tiles_of(s)] {
                *at -= 1;
                self.of_tile[*at as usize] = index as u32;
            }
        }
    }

    /// Makes tile `t`, which owns the rows `own`.
    fn tile(&mut self, side: Side, t: usize, own: Range<u32>) -> u64 {
        let mine = &self.of_tile[self.start[t] as usize..self.start[t + 1] as usize];
        let sweep = |index: &u32| Sweep::new(side, *index, &self.slices[*index as usize], &own);
        let rows = own.end - own.start;
        self.groups.fill(side, rows, mine.iter().filter_map(sweep));
        let first = self.parts.len() as u32;
        let mut visits = 0;
        for part in &self.groups.parts {
            visits += part.visits(side).len() as u32;
            let (full_begin, full_end) = part.full(side, rows);
            self.groups.slices_of(part, &mut self.together);
            self.parts.push(params::Part {
                begin: part.other.0,
                end: part.other.1,
                full_begin,
                full_end,
                slice: place(&self.together, &self.slices, &mut self.placed, &mut self.table),
                slices: self.together.len() as u32,
                turn: 0,
                reserved: 0,
            });
        }
        let parts = self.parts.len() as u32 - first;
        let tile = params::Tile { row: own.start, rows, part: first, parts };
        self.tiles.push((visits, tile));
        u64::from(visits)
    }

    /// Numbers the adds to every query tile, in the order of the list.
    fn take_turns(&mut self, side: Side, query_tiles: u32) {
        let Side::Backward { q_rows } = side else { return };
        self.turns.clear();
        self.adds.clear();
        self.adds.resize(query_tiles as usize, 0);
        for (_, tile) in &self.tiles {
            let parts = tile.part as usize..(tile.part + tile.parts) as usize;
            for part in &mut self.parts[parts] {
                part.turn = self.turns.len() as u32;
                let visited = part.begin / q_rows..part.end.div_ceil(q_rows);
                for adds in &mut self.adds[visited.start as usize..visited.end as usize] {
                    self.turns.push(*adds);
                    *adds += 1;
                }
            }
        }
    }

    /// Makes the bitmaps; for queries and for keys, does the kernel meet a row that is in no slice?
    fn mark_used(&mut self, side: Side, rows: [u32; 2]) -> [bool; 2] {
        for (used, rows) in self.used.iter_mut().zip(rows) {
            used.clear();
            used.resize(rows.div_ceil(32) as usize, 0);
        }
        for s in &self.slices {
            set(&mut self.used[0], s.q..s.q + s.q_len);
            set(&mut self.used[1], s.k..s.k + s.k_len);
        }
        let mut tiles = self.tiles.iter().map(|(_, t)| t.row..t.row + t.rows);
        let mut parts = self.parts.iter().map(|p| match side {
            Side::Forward { .. } => p.begin..p.end,
            // The first query tile is read from its start.
            Side::Backward { q_rows } => p.begin / q_rows * q_rows..p.end,
        });
        let [q, k] = &self.used;
        match side {
            Side::Forward { .. } => [tiles.any(|r| !all_set(q, r)), parts.any(|r| !all_set(k, r))],
            Side::Backward { .. } => [parts.any(|r| !all_set(q, r)), tiles.any(|r| !all_set(k, r))],
        }
    }
}

/// In `placed`: not in the table.
const UNPLACED: u32 = u32::MAX;

/// Index in the table of slices that lie there one after another: where they are already, as for neighbouring tiles, or at its end.
fn place(
    list: &[u32],
    slices: &[Slice],
    placed: &mut [u32],
    table: &mut Vec<params::Slice>,
) -> u32 {
    let first = placed[list[0] as usize];
    let there = |(n, slice): (usize, &u32)| placed[*slice as usize] == first + n as u32;
    if first != UNPLACED && list.iter().enumerate().all(there) {
        return first;
    }
    let first = table.len() as u32;
    for slice in list {
        placed[*slice as usize] = table.len() as u32;
        table.push(params::Slice::of(&slices[*slice as usize]));
    }
    first
}

/// Rows of the side that tiles own.
fn own_rows(side: Side, s: &Slice) -> Range<u32> {
    match side {
        Side::Forward { .. } => s.q..s.q + s.q_len,
        Side::Backward { .. } => s.k..s.k + s.k_len,
    }
}

/// Joins slices of the same queries whose keys lie side by side, where every query sees across the seam: keys of several owners that all
/// are visible become one slice, and a tile goes over them once.
fn coalesce(slices: &[Slice], out: &mut Vec<Slice>) {
    out.clear();
    for s in slices {
        match out.last_mut() {
            Some(last)
                if (last.q, last.q_len, last.k + last.k_len) == (s.q, s.q_len, s.k)
                    && i64::from(last.hi) >= i64::from(last.k_len) - 1
                    && i64::from(s.lo) <= 1 - i64::from(s.q_len) =>
            {
                last.hi = s.hi + last.k_len as i32;
                last.k_len += s.k_len;
            }
            _ => out.push(*s),
        }
    }
}

/// The words of a bitmap that a range of rows touches, each with a mask of its bits in the range.
fn words(rows: Range<u32>) -> impl Iterator<Item = (usize, u32)> {
    (rows.start / 32..rows.end.div_ceil(32)).map(move |word| {
        let (first, end) = (rows.start.max(32 * word), rows.end.min(32 * word + 32));
        (word as usize, u32::MAX >> (32 - (end - first)) << (first % 32))
    })
}

/// Sets the bits of a range that is not empty.
fn set(bitmap: &mut [u32], rows: Range<u32>) {
    words(rows).for_each(|(word, mask)| bitmap[word] |= mask);
}

/// Are all bits of a range set?
fn all_set(bitmap: &[u32], rows: Range<u32>) -> bool {
    words(rows).all(|(word, mask)| bitmap[word] & mask == mask)
}

/// How many slices a step may have, for bounds on its lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceLimits {
    /// Slices.
    pub count: usize,
    /// Slices that one query row is in.
    pub per_query: usize,
    /// Slices that one key row is in.
    pub per_key: usize,
}

impl SliceLimits {
    /// Nothing is known but the number.
    pub fn count(count: usize) -> SliceLimits {
        SliceLimits { count, per_query: count, per_key: count }
    }

    /// Most pairs of a slice and a tile that has rows in it: each slice has a first tile, and every further one is a seam that it crosses.
    fn in_tiles(&self, tiles: usize, per_row: usize) -> usize {
        self.count + per_row.min(self.count) * tiles.saturating_sub(1)
    }
}

/// Most bytes of the lists of a forward step within the limits.
pub fn forward_bound(tiling: Tiling, q_rows: usize, k_rows: usize, slices: SliceLimits) -> usize {
    let tiles = q_rows.div_ceil(tiling.q_rows as usize);
    lists(q_rows, k_rows, tiles, slices.in_tiles(tiles, slices.per_query))
}

/// Most bytes of the lists of a backward step within the limits.
pub fn backward_bound(
    tiling: Tiling,
    q_rows: usize,
    k_rows: usize,
    slices: SliceLimits,
    deterministic: bool,
) -> usize {
    let tiles = k_rows.div_ceil(tiling.k_rows as usize);
    let turns = if deterministic { turns_bound(tiling, q_rows, k_rows, slices) } else { 0 };
    lists(q_rows, k_rows, tiles, slices.in_tiles(tiles, slices.per_key)) + turns
}

/// Most bytes of the turns of a deterministic backward step, or of a counter for each.
pub fn turns_bound(tiling: Tiling, q_rows: usize, k_rows: usize, slices: SliceLimits) -> usize {
    let (a, b) = (q_rows.div_ceil(tiling.q_rows as usize), k_rows.div_ceil(tiling.k_rows as usize));
    let (in_a, in_b) = (slices.in_tiles(a, slices.per_query), slices.in_tiles(b, slices.per_key));
    // Slices cover disjoint rectangles. Of the a × b squares that tiles make, a slice fills some, and those are its alone; the others that
    // it has a share in lie along its edges.
    4 * (a * b + 2 * (in_a + in_b)) + ALIGN
}

/// Most bytes of the runs of a row-wise step.
pub fn runs_bound(runs: usize) -> usize {
    runs * size_of::<params::Run>() + ALIGN
}

fn lists(q_rows: usize, k_rows: usize, tiles: usize, in_tiles: usize) -> usize {
    let bitmaps = 4 * (q_rows.div_ceil(32) + k_rows.div_ceil(32));
    tiles * size_of::<params::Tile>()
        + in_tiles * (size_of::<params::Part>() + size_of::<params::Slice>())
        + bitmaps
        + 5 * ALIGN
}
