//! Work lists against a double loop over all pairs, read from the blob as kernels read it.

use super::*;
use crate::mask::{Mask, overlap};
use crate::partition::Segment;
use crate::regions::{Region, Regions};
use std::collections::BTreeMap;

const FORWARD: Tiling = Tiling { q_rows: 128, k_rows: 64 };
const BACKWARD: Tiling = Tiling { q_rows: 64, k_rows: 128 };
/// Tiles that are no power of two, and small ones.
const OTHERS: [Tiling; 2] = [Tiling { q_rows: 64, k_rows: 96 }, Tiling { q_rows: 32, k_rows: 32 }];

/// Numbers for tests; xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % u64::from(n)) as u32
    }
}

fn read<T: Words>(blob: &[u8], at: u64, count: u32) -> Vec<T> {
    assert_eq!(at as usize % ALIGN, 0);
    let bytes = &blob[at as usize..][..count as usize * size_of::<T>()];
    // SAFETY: `T` is made of 32-bit numbers, for which any bits are fine.
    bytes
        .chunks(size_of::<T>())
        .map(|b| unsafe { b.as_ptr().cast::<T>().read_unaligned() })
        .collect()
}

/// The lists of a step, as a kernel sees them.
struct Lists {
    tiles: Vec<params::Tile>,
    parts: Vec<params::Part>,
    slices: Vec<Slice>,
    used: [Option<Vec<bool>>; 2],
    turns: Vec<u32>,
}

impl Lists {
    fn new(blob: &[u8], work: &AttendWork, rows: [u32; 2], tiling: Tiling) -> Lists {
        let parts: Vec<params::Part> = read(blob, work.parts, work.part_count);
        let table: Vec<params::Slice> =
            read(blob, work.slices, parts.iter().map(|p| p.slice + p.slices).max().unwrap_or(0));
        let slice = |s: &params::Slice| Slice {
            q: s.q,
            q_len: s.q_len,
            k: s.k,
            k_len: s.k_len,
            lo: s.lo,
            hi: s.hi,
        };
        let bits = |at: Option<u64>, rows: u32| {
            at.map(|at| {
                let words: Vec<u32> = read(blob, at, rows.div_ceil(32));
                (0..rows as usize)
                    .map(|r| words[r / 32] >> (r % 32) & 1 == 1)
                    .collect::<Vec<bool>>()
            })
        };
        let turns: usize = parts
            .iter()
            .map(|p| (p.end.div_ceil(tiling.q_rows) - p.begin / tiling.q_rows) as usize)
            .sum();
        Lists {
            tiles: read(blob, work.tiles, work.tile_count),
            slices: table.iter().map(slice).collect(),
            used: [bits(work.q_used, rows[0]), bits(work.k_used, rows[1])],
            turns: work.turns.map_or(Vec::new(), |at| read(blob, at, turns as u32)),
            parts,
        }
    }

    fn parts_of(&self, tile: &params::Tile) -> &[params::Part] {
        &self.parts[tile.part as usize..][..tile.parts as usize]
    }

    /// Keys that a query row sees in a part; it is in at most one of its slices.
    fn keys(&self, part: &params::Part, row: u32) -> Range<u32> {
        let slices = &self.slices[part.slice as usize..][..part.slices as usize];
        let mut own = slices.iter().filter(|s| s.q <= row && row < s.q + s.q_len);
        let keys = own.next().map_or(0..0, |s| s.keys_of(row - s.q));
        assert!(own.next().is_none(), "row {row} is in two slices of {part:?}");
        keys
    }
}

/// Every pair that the slices allow, as a row of keys for every query.
fn allowed(slices: &[Slice], rows: [u32; 2]) -> Vec<Vec<u8>> {
    let mut pairs = vec![vec![0; rows[1] as usize]; rows[0] as usize];
    for s in slices {
        for i in 0..s.q_len {
            for key in s.keys_of(i) {
                pairs[(s.q + i) as usize][key as usize] += 1;
            }
        }
    }
    assert!(pairs.iter().flatten().all(|n| *n <= 1), "the slices overlap");
    pairs
}

fn check_forward(slices: &[Slice], rows: [u32; 2], always: bool, tiling: Tiling) -> AttendWork {
    let mut builder = TableBuilder::new(tiling, BACKWARD);
    let work = builder.forward(slices, rows[0], rows[1], always);
    let blob = builder.finish();
    let bound = forward_bound(tiling, rows[0] as usize, rows[1] as usize, limits(slices, rows));
    assert!(blob.len() <= bound, "{} bytes, bound {bound}", blob.len());
    let lists = Lists::new(&blob, &work, rows, tiling);
    let want = allowed(slices, rows);
    let mut got = vec![vec![0u8; rows[1] as usize]; rows[0] as usize];
    let mut owners = vec![0; rows[0] as usize];
    let mut costs = Vec::new();
    for tile in &lists.tiles {
        assert!(tile.rows >= 1 && tile.rows <= tiling.q_rows);
        let own = tile.row..tile.row + tile.rows;
        own.clone().for_each(|row| owners[row as usize] += 1);
        let mut cost = 0;
        for part in lists.parts_of(tile) {
            assert!(part.begin < part.end && part.end <= rows[1], "{part:?}");
            cost += (part.end - part.begin).div_ceil(tiling.k_rows);
            let seen: Vec<Range<u32>> = own.clone().map(|row| lists.keys(part, row)).collect();
            for (row, keys) in own.clone().zip(&seen) {
                for key in keys.clone() {
                    assert!((part.begin..part.end).contains(&key), "{part:?} row {row} key {key}");
                    got[row as usize][key as usize] += 1;
                }
            }
            let some = seen.iter().filter(|keys| !keys.is_empty());
            let begin = some.clone().map(|keys| keys.start).min();
            let end = some.map(|keys| keys.end).max();
            assert_eq!((begin, end), (Some(part.begin), Some(part.end)), "not trimmed");
            let full = seen.iter().map(|k| k.start).max().unwrap()
                ..seen.iter().map(|k| k.end).min().unwrap();
            match full.is_empty() {
                true => assert_eq!(part.full_begin, part.full_end),
                false => assert_eq!(full, part.full_begin..part.full_end),
            }
        }
        costs.push((std::cmp::Reverse(cost), tile.row));
    }
    assert_eq!(got, want);
    assert!(costs.is_sorted(), "longest first, then in order of rows");
    assert_eq!(work.visits, costs.iter().map(|c| u64::from(c.0.0)).sum::<u64>());
    match always {
        true => assert!(owners.iter().all(|n| *n == 1)),
        false => assert!(owners.iter().all(|n| *n <= 1)),
    }
    check_bitmaps(&lists, slices, rows, 0, 1, 1);
    work
}

fn check_backward(slices: &[Slice], rows: [u32; 2], tiling: Tiling) -> AttendWork {
    let mut builder = TableBuilder::new(FORWARD, tiling);
    let work = builder.backward(slices, rows[0], rows[1], true);
    let blob = builder.finish();
    let bound =
        backward_bound(tiling, rows[0] as usize, rows[1] as usize, limits(slices, rows), true);
    assert!(blob.len() <= bound, "{} bytes, bound {bound}", blob.len());
    let lists = Lists::new(&blob, &work, rows, tiling);
    let want = allowed(slices, rows);
    let mut got = vec![vec![0u8; rows[1] as usize]; rows[0] as usize];
    let mut owners = vec![0; rows[1] as usize];
    let (mut costs, mut adds) = (Vec::new(), BTreeMap::new());
    for tile in &lists.tiles {
        assert!(tile.rows >= 1 && tile.rows <= tiling.k_rows);
        let own = tile.row..tile.row + tile.rows;
        own.clone().for_each(|row| owners[row as usize] += 1);
        let mut cost = 0;
        for part in lists.parts_of(tile) {
            assert!(part.begin < part.end && part.end <= rows[0], "{part:?}");
            let visited = part.begin / tiling.q_rows..part.end.div_ceil(tiling.q_rows);
            cost += visited.len();
            let (mut runs, mut run, mut hull) = (Vec::new(), 0, (u32::MAX, 0));
            for row in 0..rows[0] {
                let keys = lists.keys(part, row);
                let keys = keys.start.max(own.start)..keys.end.min(own.end);
                for key in keys.clone() {
                    got[row as usize][key as usize] += 1;
                    hull = (hull.0.min(row), hull.1.max(row + 1));
                }
                run = if keys == own { run + 1 } else { 0 };
                runs.push(run);
            }
            assert_eq!(hull, (part.begin, part.end), "not trimmed");
            assert_eq!(part.full_end - part.full_begin, *runs.iter().max().unwrap(), "{part:?}");
            if part.full_end > part.full_begin {
                let run = runs[part.full_end as usize - 1];
                assert!(run >= part.full_end - part.full_begin, "{part:?}: not all are full");
            }
            for (n, query_tile) in visited.enumerate() {
                let next: &mut u32 = adds.entry(query_tile).or_default();
                assert_eq!(lists.turns[part.turn as usize + n], *next, "{part:?}");
                *next += 1;
            }
        }
        costs.push((std::cmp::Reverse(cost), tile.row));
    }
    assert_eq!(got, want);
    assert!(costs.is_sorted(), "longest first, then in order of rows");
    assert!(owners.iter().all(|n| *n <= 1));
    assert_eq!(work.turn_count as u64, work.visits);
    assert_eq!(work.counters(3, true)[1], work.turn_count as usize);
    assert!(work.counters(3, false)[0] >= adds.keys().max().map_or(0, |t| 3 * (*t as usize + 1)));
    check_bitmaps(&lists, slices, rows, 1, 0, tiling.q_rows);
    work
}

/// A bitmap is there exactly if a tile or a part meets a row that is in no slice, and then it is right.
fn check_bitmaps(
    lists: &Lists,
    slices: &[Slice],
    rows: [u32; 2],
    own: usize,
    other: usize,
    grid: u32,
) {
    let mut used = rows.map(|n| vec![false; n as usize]);
    for s in slices {
        used[0][s.q as usize..(s.q + s.q_len) as usize].fill(true);
        used[1][s.k as usize..(s.k + s.k_len) as usize].fill(true);
    }
    let hole = |side: usize, range: Range<u32>| {
        used[side][range.start as usize..range.end as usize].contains(&false)
    };
    let own_hole = lists.tiles.iter().any(|tile| hole(own, tile.row..tile.row + tile.rows));
    let other_hole = lists.parts.iter().any(|p| hole(other, p.begin / grid * grid..p.end));
    assert_eq!(lists.used[own].is_some(), own_hole);
    assert_eq!(lists.used[other].is_some(), other_hole);
    for (bitmap, used) in lists.used.iter().zip(&used) {
        assert!(bitmap.as_ref().is_none_or(|bits| bits == used));
    }
}

fn limits(slices: &[Slice], rows: [u32; 2]) -> SliceLimits {
    let most = |rows: u32, range: fn(&Slice) -> Range<u32>| {
        let mut depth = vec![0; rows as usize];
        for s in slices {
            range(s).for_each(|r| depth[r as usize] += 1);
        }
        depth.into_iter().max().unwrap_or(0)
    };
    SliceLimits {
        count: slices.len(),
        per_query: most(rows[0], |s| s.q..s.q + s.q_len),
        per_key: most(rows[1], |s| s.k..s.k + s.k_len),
    }
}

fn check(slices: &[Slice], rows: [u32; 2]) -> [AttendWork; 2] {
    check_forward(slices, rows, false, FORWARD);
    [check_forward(slices, rows, true, FORWARD), check_backward(slices, rows, BACKWARD)]
}

/// Slices of two lists of segments, each of which lies in its buffer where its `offset` says; and the rows of the buffers.
fn slices(q: &[Segment], k: &[Segment], mask: Mask, len: impl Fn(u32) -> u32) -> Vec<Slice> {
    let mut out = Vec::new();
    for a in q {
        for b in k.iter().filter(|b| b.seq == a.seq) {
            let band = mask.band(len(a.seq), len(a.seq));
            out.extend(overlap(a, b, band).map(|o| o.slice(a.offset.into(), b.offset.into())));
        }
    }
    out.sort_by_key(|s| (s.q, s.k));
    out
}

/// What `rank` of `ranks` holds of sequences of these lengths in the zigzag partition, from row `offset` on.
fn zigzag(lengths: &[u32], ranks: u32, rank: u32, mut offset: u32) -> Vec<Segment> {
    let mut out = Vec::new();
    for (seq, &len) in lengths.iter().enumerate() {
        for chunk in [rank, 2 * ranks - 1 - rank] {
            let cut = |c: u32| (u64::from(c) * u64::from(len) / u64::from(2 * ranks)) as u32;
            let (start, end) = (cut(chunk), cut(chunk + 1));
            if start < end {
                out.push(Segment { seq: seq as u32, start, step: 1, len: end - start, offset });
                offset += end - start;
            }
        }
    }
    out
}

fn rows_of(segments: &[Segment]) -> u32 {
    segments.iter().map(|s| s.offset + s.len).max().unwrap_or(0)
}

/// Keys of all ranks but one, as an all-gather lays them out.
fn others(lengths: &[u32], ranks: u32, rank: u32) -> Vec<Segment> {
    let mut keys = Vec::new();
    for distance in 1..ranks {
        let offset = rows_of(&keys);
        keys.extend(zigzag(lengths, ranks, (rank + ranks - distance) % ranks, offset));
    }
    keys
}

fn window(left: u32, right: u32) -> Mask {
    Mask { left: Some(left), right: Some(right), ..Mask::FULL }
}

#[test]
fn one_sequence() {
    for mask in [Mask::FULL, Mask::CAUSAL, window(100, 0), window(30, 70), window(0, 0)] {
        for len in [1, 63, 64, 65, 128, 300, 512] {
            let all = [Segment { seq: 0, start: 0, step: 1, len, offset: 0 }];
            check(&slices(&all, &all, mask, |_| len), [len, len]);
        }
    }
}

#[test]
fn zigzag_and_striped_ranks() {
    for mask in [Mask::FULL, Mask::CAUSAL, window(100, 0), window(30, 70)] {
        for (ranks, len) in [(2, 512), (4, 1000), (4, 1024), (7, 777)] {
            for rank in 0..ranks {
                let q = zigzag(&[len], ranks, rank, 0);
                check(&slices(&q, &q, mask, |_| len), [rows_of(&q); 2]);
                let k = others(&[len], ranks, rank);
                check(&slices(&q, &k, mask, |_| len), [rows_of(&q), rows_of(&k)]);
                let striped = |rank: u32, offset| Segment {
                    seq: 0,
                    start: rank,
                    step: ranks,
                    len: (len - rank).div_ceil(ranks),
                    offset,
                };
                let (q, mut k, mut offset) = (striped(rank, 0), Vec::new(), 0);
                for owner in 0..ranks {
                    k.push(striped(owner, offset));
                    offset += k[owner as usize].len;
                }
                check(&slices(&[q], &k, mask, |_| len), [q.len, offset]);
            }
        }
    }
}

#[test]
fn random_segments() {
    let mut random = Random(7);
    for _ in 0..200 {
        let r = &mut random;
        let side = |r: &mut Random| {
            let (mut segments, mut offset) = (Vec::new(), r.below(3) * r.below(90));
            let longest = [5, 40, 300][r.below(3) as usize];
            for seq in 0..1 + r.below(6) {
                let mut start = r.below(20);
                for _ in 0..r.below(4) {
                    let len = 1 + r.below(longest);
                    segments.push(Segment { seq, start, step: 1, len, offset });
                    start += len + r.below(2) * r.below(100);
                    offset += len + r.below(2) * r.below(2) * r.below(40);
                }
            }
            (segments, offset + r.below(2) * r.below(200))
        };
        let ((q, q_rows), (k, k_rows)) = (side(r), side(r));
        let mask = match r.below(4) {
            0 => Mask::FULL,
            1 => Mask::CAUSAL,
            2 => window(r.below(200), 0),
            _ => window(r.below(50), r.below(50)),
        };
        let work = slices(&q, &k, mask, |_| 1000);
        check(&work, [q_rows, k_rows]);
        for tiling in OTHERS {
            check_forward(&work, [q_rows, k_rows], true, tiling);
            check_backward(&work, [q_rows, k_rows], tiling);
        }
    }
}

/// Slices that a caller's regions make: several of the same rows, whose boxes overlap and whose pairs do not.
fn region_slices(
    q: &[Segment],
    k: &[Segment],
    regions: &Regions,
    mask: Mask,
    len: u32,
) -> Vec<Slice> {
    let mut out = Vec::new();
    for a in q {
        for b in k {
            let sight = regions.sight(0, mask.band(len, len));
            sight.overlaps(a, b, |o| out.push(o.slice(a.offset.into(), b.offset.into())));
        }
    }
    out.sort_by_key(|s| (s.q, s.k));
    out
}

#[test]
fn regions_of_a_caller() {
    let mut random = Random(11);
    let mut boxes = 0;
    for round in 0..60 {
        let len = 100 + random.below(400);
        let mut list: Vec<Region> = match round % 3 {
            // Bands side by side, some of them missing, all in one box.
            0 => {
                let width = 5 + random.below(60) as i32;
                let bands = (-(len as i32)..len as i32).step_by(width as usize);
                let band = |lo: i32| Region {
                    lo: Some(lo),
                    hi: Some(lo + width - 1),
                    ..Region::full(0, (0, len), (0, len))
                };
                bands.map(band).collect()
            }
            // Blocks.
            1 => {
                let size = 6 + random.below(len / 8);
                let at = |i: u32| (i * size, (i * size + size).min(len));
                let n = len.div_ceil(size);
                (0..n).flat_map(|i| (0..n).map(move |j| Region::full(0, at(i), at(j)))).collect()
            }
            // Anything.
            _ => {
                let mut range = || {
                    let (a, b) = (random.below(len), random.below(len));
                    (a.min(b), a.max(b) + 1)
                };
                let mut any = || Region { lo: None, hi: None, seq: 0, q: range(), k: range() };
                (0..30).map(|_| any()).collect()
            }
        };
        list.retain(|_| random.below(3) > 0);
        if round % 3 == 2 {
            let mut kept = Vec::new();
            for mut r in list {
                if random.below(2) == 0 {
                    r.lo = Some(random.below(2 * len) as i32 - len as i32);
                }
                kept.push(r);
                if Regions::new(&kept).validate(&[(len, len)]).is_err() {
                    kept.pop();
                }
            }
            list = kept;
        }
        let regions = Regions::new(&list);
        regions.validate(&[(len, len)]).unwrap();
        let mask = if random.below(2) == 0 { Mask::FULL } else { Mask::CAUSAL };
        let (q, k) = (zigzag(&[len], 3, 1, 0), others(&[len], 3, 1));
        for k in [&q, &k] {
            let work = region_slices(&q, k, &regions, mask, len);
            let meet = |a: u32, n: u32, b: u32, m: u32| a < b + m && b < a + n;
            let both = |s: &Slice, t: &Slice| {
                meet(s.q, s.q_len, t.q, t.q_len) && meet(s.k, s.k_len, t.k, t.k_len)
            };
            let pairs = work
                .iter()
                .enumerate()
                .flat_map(|(i, s)| work[i + 1..].iter().map(move |t| (s, t)));
            boxes += pairs.filter(|(s, t)| both(s, t)).count();
            check(&work, [rows_of(&q), rows_of(k)]);
            for tiling in OTHERS {
                check_forward(&work, [rows_of(&q), rows_of(k)], true, tiling);
                check_backward(&work, [rows_of(&q), rows_of(k)], tiling);
            }
        }
    }
    assert!(boxes > 500, "{boxes} pairs of slices have boxes that overlap");
}

#[test]
fn short_documents_share_tiles() {
    // Alone: 64 tiles of 128 queries; documents of 14 in 64 + 14 keys or so make two tiles of keys, or three.
    let lengths = vec![14; 585];
    let all = zigzag(&lengths, 1, 0, 0);
    for mask in [Mask::FULL, Mask::CAUSAL] {
        let [forward, backward] = check(&slices(&all, &all, mask, |_| 14), [8192; 2]);
        assert_eq!(forward.tile_count, 64);
        assert!(forward.visits <= 64 * 3, "{forward:?}");
        assert!(backward.visits <= 64 * 3 + 64, "{backward:?}");
        assert!(forward.part_count <= 65, "{forward:?}");
    }
    // With far-away keys in between, the documents of a tile see two places, not everything between them.
    let lengths: Vec<u32> = (0..200).map(|i| if i % 2 == 0 { 14 } else { 500 }).collect();
    let q = zigzag(&lengths, 4, 1, 0);
    let k = others(&lengths, 4, 1);
    let work = slices(&q, &k, Mask::FULL, |s| lengths[s as usize]);
    let [forward, _] = check(&work, [rows_of(&q), rows_of(&k)]);
    // Three owners, so three places, in each of which a tile of queries sees the documents it has rows of.
    assert_eq!(forward.part_count, 3 * forward.tile_count, "{forward:?}");
    assert!(forward.visits <= u64::from(forward.part_count) * 4, "{forward:?}");
}

#[test]
fn visible_keys_of_many_owners_are_one_slice() {
    // Zigzag, causal: a late chunk sees everything that arrives, an early one what its predecessors hold.
    let (ranks, len) = (8, 8 * 2 * 160);
    for rank in 0..ranks {
        let q = zigzag(&[len], ranks, rank, 0);
        let mut k = others(&[len], ranks, rank);
        // Only needed rows arrive: no late chunk of an earlier rank.
        let mut offset = 0;
        k.retain_mut(|s| {
            let needed = s.start < q[1].start;
            s.offset = offset;
            offset += if needed { s.len } else { 0 };
            needed
        });
        let work = slices(&q, &k, Mask::CAUSAL, |_| len);
        let [forward, _] = check(&work, [rows_of(&q), offset]);
        let pairs: u64 = work.iter().map(Slice::pairs).sum();
        let tile = u64::from(FORWARD.q_rows * FORWARD.k_rows);
        assert!(work.len() > 2 || rank == 0);
        // Two query chunks of 160 rows make 3 tiles, of which one is in both: no more than 6 key tiles are begun and not needed.
        assert!(forward.part_count <= 4, "{forward:?}");
        assert!(forward.visits * tile <= pairs * 384 / 320 + 6 * tile + offset as u64 * 128);
    }
}

#[test]
fn nothing_to_do() {
    let [forward, backward] = check(&[], [300, 100]);
    assert_eq!((forward.tile_count, forward.visits), (3, 0));
    assert_eq!((backward.tile_count, backward.visits), (0, 0));
    assert_eq!(check_forward(&[], [300, 100], false, FORWARD).tile_count, 0);
    check(&[], [0, 0]);
}

#[test]
fn lists_of_a_plan_share_one_blob() {
    let all = [Segment { seq: 0, start: 0, step: 1, len: 200, offset: 0 }];
    let work = slices(&all, &all, Mask::CAUSAL, |_| 200);
    let build = || {
        let mut builder = TableBuilder::new(FORWARD, BACKWARD);
        let a = builder.forward(&work, 200, 200, true);
        let b = builder.backward(&work, 200, 200, false);
        let run = Run { src: 3, src_step: 1, dst: 0, dst_step: 2, rows: 5 };
        let c = builder.runs(&[run, Run { rows: 0, ..run }, Run { src: 90, ..run }]);
        let d = builder.rows([(7, 1, 2), (50, 3, 4)]);
        (builder.finish(), a, b, c, d)
    };
    let (blob, a, b, c, d) = build();
    assert_eq!(build(), (blob.clone(), a, b, c, d));
    assert_eq!(Lists::new(&blob, &a, [200, 200], FORWARD).tiles.len(), 2);
    assert_eq!((b.turns, b.counters(9, true)), (None, [0; 2]));
    assert_eq!((c.run_count, c.row_count, d.run_count, d.row_count), (2, 10, 2, 6));
    let runs: Vec<params::Run> = read(&blob, c.runs, 2);
    assert_eq!((runs[0].before, runs[1].before, runs[1].src, runs[1].dst_step), (0, 5, 90, 2));
    let rows: Vec<params::Run> = read(&blob, d.runs, 2);
    assert_eq!((rows[1].before, rows[1].dst, rows[1].dst_step), (2, 50, 3));
}

/// 300 documents on 64 ranks: one peer's keys at a time, and all at once. `cargo test --release -- --ignored --nocapture time_of`
#[test]
#[ignore = "a measurement"]
fn time_of_300_documents_on_64_ranks() {
    let mut random = Random(3);
    let lengths: Vec<u32> = (0..300).map(|_| 14 + random.below(8000)).collect();
    let q = zigzag(&lengths, 64, 17, 0);
    for (peers, k) in [(1, zigzag(&lengths, 64, 16, 0)), (63, others(&lengths, 64, 17))] {
        for mask in [Mask::FULL, Mask::CAUSAL] {
            let work = slices(&q, &k, mask, |s| lengths[s as usize]);
            let mut builder = TableBuilder::new(FORWARD, BACKWARD);
            let forward =
                |builder: &mut TableBuilder| builder.forward(&work, rows_of(&q), rows_of(&k), true);
            forward(&mut builder);
            let start = std::time::Instant::now();
            let a = forward(&mut builder);
            let middle = std::time::Instant::now();
            let b = builder.backward(&work, rows_of(&q), rows_of(&k), true);
            println!(
                "{peers} peers, {} slices, {}×{} rows: forward {:?} ({} parts, {} visits), backward {:?} ({} parts, {} visits)",
                work.len(),
                rows_of(&q),
                rows_of(&k),
                middle - start,
                a.part_count,
                a.visits,
                middle.elapsed(),
                b.part_count,
                b.visits,
            );
        }
    }
}
