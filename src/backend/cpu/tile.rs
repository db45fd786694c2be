//! Cutting a step into tiles, and packing rows into operands.
//!
//! A *tile* is a fixed range of query rows together with all query heads of one key head; its *lanes* are the pairs (row, head),
//! row-major, so that heads that share keys sit side by side. Panels of 32 lanes go through the kernels together, each lane with
//! its own range of keys: a panel may hold rows of several documents.

use super::kernels::{Kernels, LANES};
use crate::backend::{HeadMap, View};
use crate::mask::Slice;
use std::ops::Range;

/// Lanes of a tile, unless one row alone has more.
const TILE_LANES: usize = 256;

/// Keys of a block.
pub const KEYS: usize = 128;

/// Slices whose keys are at most this far apart are worked on together.
const GAP: u32 = 32;

/// Which slices touch which tile and which blocks of keys touch which tile. Rebuilt for every step, without allocating once grown.
#[derive(Default)]
pub struct Tiling {
    /// Query rows of a tile.
    pub tile_rows: usize,
    /// Number of tiles.
    pub tiles: usize,
    rows: usize,
    slices: Vec<Slice>,
    /// `list[starts[t] .. starts[t + 1]]` are the slices of tile `t`.
    starts: Vec<u32>,
    list: Vec<u32>,
    /// Key rows that some slice covers; all others may hold anything.
    seen: Vec<i32>,
    /// `spans[span_starts[t] .. span_starts[t + 1]]` are the key blocks of tile `t`, as sorted disjoint ranges.
    span_starts: Vec<u32>,
    spans: Vec<Range<u32>>,
    /// Tiles that a key block has to do with, as a range that may hold others.
    tiles_of: Vec<Range<u32>>,
}

impl Tiling {
    /// Cuts `rows` query rows, of which at most `group` heads share a key head.
    pub fn build(&mut self, slices: &[Slice], rows: usize, key_rows: usize, group: usize) {
        self.tile_rows = (TILE_LANES / group.max(1)).max(1);
        self.tiles = rows.div_ceil(self.tile_rows);
        self.rows = rows;
        self.slices.clear();
        self.slices.extend_from_slice(slices);
        let tiles_of = |s: &Slice| {
            let last = (s.q + s.q_len).saturating_sub(1) as usize;
            s.q as usize / self.tile_rows..if s.q_len == 0 { 0 } else { last / self.tile_rows + 1 }
        };
        self.starts.clear();
        self.starts.resize(self.tiles + 1, 0);
        for s in slices {
            tiles_of(s).for_each(|t| self.starts[t + 1] += 1);
        }
        for t in 0..self.tiles {
            self.starts[t + 1] += self.starts[t];
        }
        self.list.clear();
        self.list.resize(self.starts[self.tiles] as usize, 0);
        // Fill from the back, so that `starts` ends up where it began and every list is in order.
        for (i, s) in slices.iter().enumerate() {
            for t in tiles_of(s) {
                self.list[self.starts[t] as usize] = i as u32;
                self.starts[t] += 1;
            }
        }
        self.starts.rotate_right(1);
        self.starts[0] = 0;
        self.seen.clear();
        self.seen.resize(key_rows + 1, 0);
        for s in slices.iter().filter(|s| s.k_len > 0) {
            self.seen[s.k as usize] += 1;
            self.seen[(s.k + s.k_len) as usize] -= 1;
        }
        for key in 0..key_rows {
            self.seen[key + 1] += self.seen[key];
        }
    }

    /// For the backward pass: which key blocks have to do with which tiles.
    pub fn build_blocks(&mut self, key_rows: usize) {
        self.span_starts.clear();
        self.spans.clear();
        self.tiles_of.clear();
        self.tiles_of.resize(key_rows.div_ceil(KEYS), Range { start: u32::MAX, end: 0 });
        for t in 0..self.tiles {
            let first = self.spans.len();
            self.span_starts.push(first as u32);
            for i in self.starts[t]..self.starts[t + 1] {
                let s = self.trimmed(t, self.list[i as usize]);
                if s.k_len > 0 {
                    let keys = KEYS as u32;
                    self.spans.push(s.k / keys..(s.k + s.k_len).div_ceil(keys));
                }
            }
            self.spans[first..].sort_unstable_by_key(|s| s.start);
            let mut end = first;
            for i in first..self.spans.len() {
                let span = self.spans[i].clone();
                if end > first && span.start <= self.spans[end - 1].end {
                    let merged = &mut self.spans[end - 1];
                    merged.end = merged.end.max(span.end);
                } else {
                    self.spans[end] = span;
                    end += 1;
                }
            }
            self.spans.truncate(end);
            for span in &self.spans[first..] {
                for block in &mut self.tiles_of[span.start as usize..span.end as usize] {
                    *block = block.start.min(t as u32)..t as u32 + 1;
                }
            }
        }
        self.span_starts.push(self.spans.len() as u32);
    }

    /// Query rows of a tile.
    pub fn rows_of(&self, tile: usize) -> Range<usize> {
        tile * self.tile_rows..((tile + 1) * self.tile_rows).min(self.rows)
    }

    /// Does some slice cover this key row?
    pub fn key_seen(&self, key: usize) -> bool {
        self.seen[key] > 0
    }

    /// Tiles that a key block may have to do with; ask [`Tiling::turn`] about each.
    pub fn tiles_of(&self, block: usize) -> Range<usize> {
        self.tiles_of[block].start as usize..self.tiles_of[block].end as usize
    }

    /// How many key blocks come before this one in the tile, `None` if the tile has nothing to do with it.
    pub fn turn(&self, tile: usize, block: usize) -> Option<u32> {
        let (block, mut before) = (block as u32, 0);
        for span in
            &self.spans[self.span_starts[tile] as usize..self.span_starts[tile + 1] as usize]
        {
            if span.contains(&block) {
                return Some(before + block - span.start);
            }
            before += span.end - span.start;
        }
        None
    }

    fn trimmed(&self, tile: usize, slice: u32) -> Slice {
        let s = &self.slices[slice as usize];
        let rows = self.rows_of(tile);
        let from = (rows.start as u32).saturating_sub(s.q);
        s.rows(from, (rows.end as u32 - s.q).min(s.q_len))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.starts.capacity() + self.list.capacity() + self.seen.capacity())
            + 4 * self.span_starts.capacity()
            + 8 * (self.spans.capacity() + self.tiles_of.capacity())
            + size_of::<Slice>() * self.slices.capacity()
    }
}

/// The slices of one tile, joined into groups in which every row sees one range of keys, and the keys lie close together.
#[derive(Default)]
pub struct Groups {
    slices: Vec<Slice>,
    next: usize,
    first_row: u32,
    /// Keys of the group.
    pub keys: Range<usize>,
    /// What each row of the tile sees of them; empty ranges are `0..0`.
    pub rows: Vec<Range<u32>>,
    /// Rows of the tile that are in some slice.
    pub seen: Vec<bool>,
    /// Panels of the tile for which the backward pass has a dQ.
    pub touched: Vec<bool>,
}

impl Groups {
    /// Starts on a tile, of whose keys only those in `keys` count.
    pub fn load(&mut self, tiling: &Tiling, tile: usize, keys: Range<usize>) {
        let rows = tiling.rows_of(tile);
        self.first_row = rows.start as u32;
        self.rows.resize(rows.len(), 0..0);
        self.seen.clear();
        self.seen.resize(rows.len(), false);
        self.slices.clear();
        self.next = 0;
        let (from, to) = (keys.start as u32, keys.end as u32);
        for i in tiling.starts[tile]..tiling.starts[tile + 1] {
            let s = tiling.trimmed(tile, tiling.list[i as usize]);
            if s.k_len > 0 && s.k < to && s.k + s.k_len > from {
                let row = s.q as usize - rows.start;
                self.seen[row..row + s.q_len as usize].fill(true);
                self.slices.push(s);
            }
        }
        self.slices.sort_unstable_by_key(|s| (s.k, s.q));
    }

    /// Goes on to the next group, of the keys given to `load` those that its rows see; false at the end.
    pub fn next(&mut self, keys: Range<usize>) -> bool {
        let (from, to) = (keys.start as u32, keys.end as u32);
        let clamp = |r: Range<u32>| r.start.max(from)..r.end.min(to);
        self.rows.fill(0..0);
        let (mut start, mut end) = (u32::MAX, 0);
        while let Some(s) = self.slices.get(self.next) {
            let row0 = (s.q - self.first_row) as usize;
            if end > 0 {
                let joins = |i: u32| {
                    let (have, new) = (&self.rows[row0 + i as usize], clamp(s.keys_of(i)));
                    have.is_empty() || new.is_empty() || have.end == new.start
                };
                if s.k > end + GAP || !(0..s.q_len).all(joins) {
                    break;
                }
            }
            for i in 0..s.q_len {
                let (have, new) = (&mut self.rows[row0 + i as usize], clamp(s.keys_of(i)));
                if !new.is_empty() {
                    (start, end) = (start.min(new.start), end.max(new.end));
                    let fresh = have.start >= have.end;
                    *have = if fresh { new } else { have.start..new.end };
                }
            }
            self.next += 1;
        }
        self.keys = start as usize..end as usize;
        end > 0
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        size_of::<Slice>() * self.slices.capacity() + 10 * self.rows.capacity()
    }
}

/// Query heads that a key head serves, all local.
pub fn heads_of(map: HeadMap, kv: usize, heads: usize) -> Range<usize> {
    let first = (map.kv_first as usize + kv) * map.group as usize;
    let local = |h: usize| h.saturating_sub(map.q_first as usize).min(heads);
    local(first)..local(first + map.group as usize)
}

/// What the 32 lanes of a panel see of a block of keys, relative to the block's first key.
pub struct Bounds {
    /// First key of every lane.
    pub lo: [i32; LANES],
    /// One past the last key of every lane.
    pub hi: [i32; LANES],
    /// Union of all lanes.
    pub keys: Range<usize>,
    /// Every lane sees all of `keys`.
    pub full: bool,
}

impl Bounds {
    /// For the lanes from `first` on, `heads` of them per row. Lanes beyond the tile see whatever the others do; their results are
    /// not used.
    pub fn new(rows: &[Range<u32>], first: usize, heads: usize, block: Range<usize>) -> Bounds {
        let (from, to) = (block.start as u32, block.end as u32);
        let mut bounds = Bounds { lo: [0; LANES], hi: [0; LANES], keys: 0..0, full: false };
        let (mut lo, mut hi, mut max_lo, mut min_hi) = (i32::MAX, 0, 0, i32::MAX);
        let lanes = (rows.len() * heads - first).min(LANES);
        let (mut row, mut head) = (first / heads, first % heads);
        for lane in 0..lanes {
            let (a, b) = (rows[row].start.clamp(from, to), rows[row].end.clamp(from, to));
            let (a, b) = if a < b { ((a - from) as i32, (b - from) as i32) } else { (0, 0) };
            (bounds.lo[lane], bounds.hi[lane]) = (a, b);
            if a < b {
                (lo, hi) = (lo.min(a), hi.max(b));
            }
            (max_lo, min_hi) = (max_lo.max(a), min_hi.min(b));
            head += 1;
            if head == heads {
                (row, head) = (row + 1, 0);
            }
        }
        if lo < hi {
            bounds.lo[lanes..].fill(lo);
            bounds.hi[lanes..].fill(hi);
            bounds.keys = lo as usize..hi as usize;
            bounds.full = max_lo <= lo && min_hi >= hi;
        }
        bounds
    }

    /// The bounds of every lane, relative to a key of the block.
    pub fn relative_to(&self, key: usize) -> ([i32; LANES], [i32; LANES]) {
        let key = key as i32;
        (self.lo.map(|x| x - key), self.hi.map(|x| x - key))
    }
}

/// Units between packed rows of `dim` numbers: an odd number of cache lines, so that the rows of a tile spread over the cache.
pub fn stride(dim: usize) -> usize {
    (dim.div_ceil(16) | 1) * 16
}

/// Asks for one row of a view to be fetched into the cache: rows of a head lie far apart, and no hardware guesses the next one.
pub fn prefetch(view: &View, row: usize, head: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let at = view.at(row, head);
        for byte in (0..view.dim * view.dtype.size()).step_by(64) {
            // SAFETY: a prefetch may be given any address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(byte).cast()) };
        }
    }
}

/// Packs rows of one head.
pub struct Packer<'a> {
    /// The instruction set's loops.
    pub kernels: &'a Kernels,
    /// Source.
    pub view: &'a View,
}

impl Packer<'_> {
    /// One row as units.
    ///
    /// # Safety
    /// `to` has room for the row; the row, when given, lies in the view and is readable.
    pub unsafe fn row(&self, row: Option<(usize, usize)>, to: *mut u32) {
        let dim = self.view.dim;
        // SAFETY: the caller's promise.
        unsafe {
            match row {
                None => to.write_bytes(0, dim / self.kernels.pairs),
                Some((row, head)) => {
                    let from = self.view.at(row, head);
                    if self.kernels.pairs == 2 {
                        from.copy_to_nonoverlapping(to.cast::<u8>(), dim * 2);
                    } else {
                        (self.kernels.widen)(self.view.dtype, from, to.cast::<f32>(), dim);
                    }
                }
            }
        }
    }

    /// Rows of one head as they are contracted *over*: with pairs, two rows side by side, `[rows/2][stride]`.
    ///
    /// # Safety
    /// As for [`Packer::row`]; `rows` gives the row for each of `count` (a multiple of `pairs`), `None` for zeros.
    pub unsafe fn contracted(
        &self,
        count: usize,
        rows: impl Fn(usize) -> Option<(usize, usize)>,
        to: *mut u32,
    ) {
        let (dim, stride) = (self.view.dim, stride(self.view.dim));
        let zeros = [0u16; 256];
        for i in (0..count).step_by(self.kernels.pairs) {
            // SAFETY: the caller's promise; a row has at most 256 numbers.
            unsafe {
                if self.kernels.pairs == 1 {
                    self.row(rows(i), to.add(i * stride));
                    continue;
                }
                let at = |row: Option<(usize, usize)>| {
                    row.map_or(zeros.as_ptr(), |(r, h)| {
                        self.view.at(r, h).cast::<u16>().cast_const()
                    })
                };
                (self.kernels.interleave)(
                    at(rows(i)),
                    at(rows(i + 1)),
                    dim,
                    to.add(i / 2 * stride),
                );
            }
        }
    }
}
