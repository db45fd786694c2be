//! A mask that comes with the call: the caller's own [`Region`]s of a sequence instead of all of it. Packed documents inside one sequence,
//! prefix-LM, answers that share a prompt, blocks: all are lists of rectangles, each with a band, as MagiAttention's slices are.
//!
//! ```text
//!     prompt A B, two answers c d and e f       regions (q × k, band)
//!         A B c d e f
//!     A   ■ · · · · ·                           0..2 × 0..2   causal
//!     B   ■ ■ · · · ·                           2..6 × 0..2
//!     c   ■ ■ ■ · · ·                           2..4 × 2..4   causal
//!     d   ■ ■ ■ ■ · ·                           4..6 × 4..6   causal
//!     e   ■ ■ · · ■ ·
//!     f   ■ ■ · · ■ ■
//! ```
//! The layer's own mask (causal, window) holds too: bands intersect, so layers with a window and layers without share one list. A pair that
//! were in two regions would count twice; [`Regions::validate`] refuses it.

use crate::error::{Error, Result};
use crate::mask::{Band, Overlap, UNBOUNDED, overlap};
use crate::partition::Segment;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// Queries `q.0 .. q.1` of a sequence see its keys `k.0 .. k.1` as far as `lo <= key − query <= hi`. Positions count from the first true token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Region {
    /// Index of the sequence.
    pub seq: u32,
    /// First query, and one past the last.
    pub q: (u32, u32),
    /// First key, and one past the last.
    pub k: (u32, u32),
    /// Least key − query; `None`: no limit.
    pub lo: Option<i32>,
    /// Greatest key − query; `None`: no limit.
    pub hi: Option<i32>,
}

impl Region {
    /// A whole rectangle.
    pub fn full(seq: u32, q: (u32, u32), k: (u32, u32)) -> Region {
        Region { seq, q, k, lo: None, hi: None }
    }

    fn band(&self) -> Band {
        Band { lo: self.lo.map_or(-UNBOUNDED, i64::from), hi: self.hi.map_or(UNBOUNDED, i64::from) }
    }

    /// May the query see the key, as far as this region goes?
    pub fn allows(&self, query: u32, key: u32) -> bool {
        let inside = |r: (u32, u32), x: u32| r.0 <= x && x < r.1;
        inside(self.q, query)
            && inside(self.k, key)
            && self.band().allows(i64::from(query), i64::from(key))
    }

    /// A (query, key) that both allow.
    fn shared(&self, other: &Region) -> Option<(u32, u32)> {
        let both = |a: (u32, u32), b: (u32, u32)| (a.0.max(b.0).into(), a.1.min(b.1).into());
        let (q, k): ((i64, i64), (i64, i64)) = (both(self.q, other.q), both(self.k, other.k));
        if q.0 >= q.1 || k.0 >= k.1 {
            return None;
        }
        // Between the corners every difference key − query occurs.
        let (a, b) = (self.band(), other.band());
        let lo = a.lo.max(b.lo).max(k.0 - (q.1 - 1));
        let hi = a.hi.min(b.hi).min(k.1 - 1 - q.0);
        let query = q.0.max(k.0 - lo);
        (lo <= hi).then_some((query as u32, (query + lo) as u32))
    }

    /// What it makes of an overlap of two segments of its sequence, under the layer's band.
    fn overlap(&self, query: &Segment, key: &Segment, band: Band) -> Option<Overlap> {
        if self.k.0 >= end(key) || self.k.1 <= key.start {
            return None; // nearly all
        }
        let (i, query) = clip(query, self.q)?;
        let (j, key) = clip(key, self.k)?;
        let mine = self.band();
        let band = Band { lo: mine.lo.max(band.lo), hi: mine.hi.min(band.hi) };
        let o = overlap(&query, &key, band)?;
        let shift = i64::from(j) - i64::from(i);
        Some(Overlap {
            q: (o.q.0 + i, o.q.1 + i),
            k: (o.k.0 + j, o.k.1 + j),
            lo: o.lo + shift,
            hi: o.hi + shift,
        })
    }
}

/// `seq/q0:q1/k0:k1/lo:hi`, without a number where there is no limit.
impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = |x: Option<i32>| x.map_or(String::new(), |x| x.to_string());
        let Region { seq, q, k, lo, hi } = self;
        write!(f, "{seq}/{}:{}/{}:{}", q.0, q.1, k.0, k.1)?;
        match (lo, hi) {
            (None, None) => Ok(()),
            _ => write!(f, "/{}:{}", limit(*lo), limit(*hi)),
        }
    }
}

impl Region {
    /// Reads what `Display` writes; the sequence and its slash may be left out (0).
    pub fn parse(text: &str) -> Option<Region> {
        let mut parts: Vec<&str> = text.split('/').collect();
        let seq = match parts.first()?.contains(':') {
            true => 0,
            false => parts.remove(0).parse().ok()?,
        };
        let range = |text: &str| {
            let (from, to) = text.split_once(':')?;
            Some((from.parse().ok()?, to.parse().ok()?))
        };
        let limit = |text: &str| match text {
            "" => Some(None),
            number => number.parse().ok().map(Some),
        };
        let (lo, hi) = match parts.get(2) {
            None => (None, None),
            Some(band) => {
                let (lo, hi) = band.split_once(':')?;
                (limit(lo)?, limit(hi)?)
            }
        };
        let [q, k] = [range(parts.first()?)?, range(parts.get(1)?)?];
        (parts.len() <= 3).then_some(Region { seq, q, k, lo, hi })
    }
}

/// One past the last position of a segment.
fn end(s: &Segment) -> u32 {
    s.start + s.len.saturating_sub(1) * s.step + s.len.min(1)
}

/// The tokens of a segment within a range, and how many come before them.
fn clip(s: &Segment, range: (u32, u32)) -> Option<(u32, Segment)> {
    let before = |position: u32| match (position.saturating_sub(s.start), s.step) {
        (distance, 1) => distance.min(s.len), // nearly always, as in `overlap`
        (distance, step) => distance.div_ceil(step).min(s.len),
    };
    let (first, last) = (before(range.0), before(range.1));
    (first < last)
        .then(|| (first, Segment { start: s.start + first * s.step, len: last - first, ..*s }))
}

/// The regions of a call, in whatever order the caller has them. None at all: the layer's mask is everything.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    /// Sorted.
    list: Arc<[Region]>,
    /// Where each stood in the caller's list.
    numbers: Arc<[u32]>,
    /// One past the last query of a sequence's regions up to this one.
    reach: Arc<[u32]>,
}

impl PartialEq for Regions {
    fn eq(&self, other: &Regions) -> bool {
        Arc::ptr_eq(&self.list, &other.list) || self.list == other.list
    }
}

impl Eq for Regions {}

impl Hash for Regions {
    fn hash<H: Hasher>(&self, h: &mut H) {
        self.list.hash(h);
    }
}

/// Pairs of regions that a list is searched for a pair of tokens in common, at most: a second or so. Lists that go over a query's keys once,
/// in whatever pieces, are far from it.
const MOST_COMPARED: usize = 1 << 27;

impl Regions {
    /// Of a caller's list.
    pub fn new(list: &[Region]) -> Regions {
        let mut order: Vec<u32> = (0..list.len() as u32).collect();
        order.sort_by_key(|i| list[*i as usize]);
        let sorted: Arc<[Region]> = order.iter().map(|i| list[*i as usize]).collect();
        let mut reach: Vec<u32> = sorted.iter().map(|r| r.q.1).collect();
        for i in 1..sorted.len() {
            if sorted[i].seq == sorted[i - 1].seq {
                reach[i] = reach[i].max(reach[i - 1]);
            }
        }
        Regions { list: sorted, numbers: order.into(), reach: reach.into() }
    }

    /// Is the layer's mask everything?
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All of them, sorted by sequence, queries, keys.
    pub fn list(&self) -> &[Region] {
        &self.list
    }

    /// Checks them against the sequences' true lengths, as (queries, keys). The error names the slice, as the caller counts.
    pub fn validate(&self, lengths: &[(u32, u32)]) -> Result<()> {
        for (r, number) in self.list.iter().zip(self.numbers.iter()) {
            let bad = |text: String| Err(Error::argument(format!("slices[{number}]: {text}")));
            let Some(&(q_len, k_len)) = lengths.get(r.seq as usize) else {
                return bad(format!("got sequence {}, there are {}", r.seq, lengths.len()));
            };
            for (what, range, len) in [("queries", r.q, q_len), ("keys", r.k, k_len)] {
                if range.0 >= range.1 || range.1 > len {
                    return bad(format!(
                        "got {what} {} … {} (begin … end), allowed begin < end <= {len}, the true tokens of sequence {}",
                        range.0, range.1, r.seq
                    ));
                }
            }
            if let (Some(lo), Some(hi)) = (r.lo, r.hi)
                && lo > hi
            {
                return bad(format!("got lo {lo} and hi {hi}, allowed lo <= hi"));
            }
        }
        let mut first = 0;
        for of_seq in self.list.chunk_by(|a, b| a.seq == b.seq) {
            self.disjoint(first, of_seq)?;
            first += of_seq.len();
        }
        Ok(())
    }

    /// Have the regions of a sequence, from number `first` in the list, no pair of tokens in common? Goes over the queries, and compares
    /// those whose keys may meet.
    fn disjoint(&self, first: usize, of_seq: &[Region]) -> Result<()> {
        // Those that the sweep is in, by first key, among equal ones by place in the list; those whose widths have the same number of binary
        // digits together, so that few are looked at which end before a key.
        let mut open: Vec<BTreeSet<(u32, usize)>> = vec![BTreeSet::new(); 33];
        let digits = |r: &Region| (u32::BITS - (r.k.1 - r.k.0).leading_zeros()) as usize;
        let mut ends: BinaryHeap<Reverse<(u32, usize)>> = BinaryHeap::new();
        let mut compared = 0;
        for (i, r) in of_seq.iter().enumerate() {
            while let Some(Reverse((_, at))) = ends.peek().filter(|e| e.0.0 <= r.q.0).copied() {
                open[digits(&of_seq[at])].remove(&(of_seq[at].k.0, at));
                ends.pop();
            }
            for (digits, open) in open.iter().enumerate().filter(|(_, open)| !open.is_empty()) {
                let widest = ((1u64 << digits) - 1) as u32;
                let from = (r.k.0.saturating_sub(widest), 0);
                for &(_, other) in open.range(from..(r.k.1, 0)) {
                    if let Some((query, key)) = of_seq[other].shared(r) {
                        let (a, b) = (self.numbers[first + other], self.numbers[first + i]);
                        let (a, b) = (a.min(b), a.max(b));
                        return Err(Error::argument(format!(
                            "slices[{a}] and slices[{b}] both let query {query} of sequence {} see key {key}; allowed once",
                            r.seq
                        )));
                    }
                    compared += 1;
                }
            }
            if compared > MOST_COMPARED {
                return Err(Error::unsupported(format!(
                    "slices: of sequence {} more than {MOST_COMPARED} pairs have queries and keys in common and only bands that keep them apart; allowed are fewer",
                    r.seq
                )));
            }
            open[digits(r)].insert((r.k.0, i));
            ends.push(Reverse((r.q.1, i)));
        }
        Ok(())
    }

    /// What the queries of a sequence see, given the layer's band for it.
    pub fn sight(&self, seq: u32, band: Band) -> Sight<'_> {
        if self.list.is_empty() {
            return Sight { band, regions: None };
        }
        let from = self.list.partition_point(|r| r.seq < seq);
        let to = from + self.list[from..].partition_point(|r| r.seq == seq);
        Sight { band, regions: Some((&self.list[from..to], &self.reach[from..to])) }
    }
}

/// What the queries of one sequence see of its keys: the layer's band, within the caller's regions if there are any.
#[derive(Clone, Copy)]
pub struct Sight<'a> {
    band: Band,
    /// Those of the sequence, with their reach.
    regions: Option<(&'a [Region], &'a [u32])>,
}

impl<'a> Sight<'a> {
    /// Regions that queries of the segment may be in, and few others.
    fn meeting(&self, query: &Segment) -> &'a [Region] {
        let Some((list, reach)) = self.regions else { return &[] };
        let to = list.partition_point(|r| r.q.0 < end(query));
        let from = reach[..to].partition_point(|last| *last <= query.start);
        &list[from..to]
    }

    /// How many overlaps have to be tried to know all of a segment of queries with one of keys.
    pub fn tries(&self, query: &Segment) -> usize {
        self.meeting(query).len().max(1)
    }

    /// Calls `f` for all that a segment of queries and a segment of keys have to do with each other. No two overlaps have a pair in common.
    #[inline]
    pub fn overlaps(&self, query: &Segment, key: &Segment, mut f: impl FnMut(Overlap)) {
        match self.regions {
            None => overlap(query, key, self.band).into_iter().for_each(f),
            Some(_) => self.within(query, key, &mut f),
        }
    }

    /// Apart, so that what is nearly always asked stays short.
    #[cold]
    fn within(&self, query: &Segment, key: &Segment, f: &mut dyn FnMut(Overlap)) {
        let regions = self.meeting(query).iter();
        regions.filter_map(|r| r.overlap(query, key, self.band)).for_each(f);
    }

    /// Is there any?
    pub fn any(&self, query: &Segment, key: &Segment) -> bool {
        match self.regions {
            None => overlap(query, key, self.band).is_some(),
            Some(_) => {
                let mut regions = self.meeting(query).iter();
                regions.any(|r| r.overlap(query, key, self.band).is_some())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small numbers, well enough mixed.
    struct Mix(u64);

    impl Mix {
        fn below(&mut self, n: u32) -> u32 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((self.0 >> 33) % u64::from(n)) as u32
        }

        fn region(&mut self, len: u32) -> Region {
            let mut range = || {
                let (a, b) = (self.below(len), self.below(len));
                (a.min(b), a.max(b) + 1)
            };
            let (q, k) = (range(), range());
            let mut limit =
                || (self.below(2) == 0).then(|| self.below(2 * len) as i32 - len as i32);
            let (lo, hi) = (limit(), limit());
            let hi = hi.filter(|hi| lo.is_none_or(|lo| lo <= *hi));
            Region { seq: 0, q, k, lo, hi }
        }
    }

    /// Segments with steps and bands, against a double loop.
    #[test]
    fn overlaps_are_exactly_the_allowed_pairs() {
        let mut mix = Mix(1);
        let mut pairs = 0;
        for _ in 0..20_000 {
            let r = mix.region(12);
            let step = 1 + mix.below(3);
            let mut segment =
                || Segment { seq: 0, start: mix.below(8), step, len: 1 + mix.below(5), offset: 0 };
            let (q, k) = (segment(), segment());
            let band = Band { lo: -i64::from(mix.below(12)), hi: i64::from(mix.below(12)) };
            let regions = Regions::new(&[Region { seq: 1, ..r }, r]);
            let mut got: Vec<(u32, u32)> = Vec::new();
            regions.sight(0, band).overlaps(&q, &k, |o| {
                let s = o.slice(0, 0);
                got.extend((0..s.q_len).flat_map(|i| s.keys_of(i).map(move |j| (s.q + i, j))));
            });
            let sees = |i: u32, j: u32| {
                let (i, j) = (q.start + i * q.step, k.start + j * k.step);
                r.allows(i, j) && band.allows(i.into(), j.into())
            };
            let all = (0..q.len).flat_map(|i| (0..k.len).map(move |j| (i, j)));
            let want: Vec<_> = all.filter(|(i, j)| sees(*i, *j)).collect();
            assert_eq!(got, want, "{r} {q:?} {k:?} {band:?}");
            pairs += want.len();
        }
        assert!(pairs > 10_000, "{pairs} pairs");
    }

    /// A list is refused exactly when a pair of tokens is in two regions, and the error names such a pair.
    #[test]
    fn shared_pairs_are_found() {
        let (mut mix, mut refused) = (Mix(2), 0);
        for round in 0..3000 {
            let list: Vec<Region> = (0..1 + round % 5).map(|_| mix.region(9)).collect();
            let count = |i, j| list.iter().filter(|r| r.allows(i, j)).count();
            let twice =
                (0..9).flat_map(|i| (0..9).map(move |j| (i, j))).any(|(i, j)| count(i, j) > 1);
            match Regions::new(&list).validate(&[(9, 9)]) {
                Ok(()) => assert!(!twice, "{list:?}"),
                Err(e) => {
                    let words: Vec<u32> = e
                        .to_string()
                        .split(|c: char| !c.is_ascii_digit())
                        .filter_map(|word| word.parse().ok())
                        .collect();
                    let [a, b, query, _, key] = words[..] else { panic!("{e}") };
                    assert!(a < b, "{e}");
                    for n in [a, b] {
                        assert!(list[n as usize].allows(query, key), "{e}: {list:?}");
                    }
                    refused += 1;
                }
            }
        }
        assert!((500..2900).contains(&refused), "{refused} of 3000");
    }

    #[test]
    fn ranges_are_checked() {
        let says = |text: &str, want: &str| {
            let list: Vec<Region> = text.split(' ').map(|r| Region::parse(r).unwrap()).collect();
            let e = Regions::new(&list).validate(&[(8, 9), (3, 3)]).unwrap_err().to_string();
            assert!(e.contains(want), "{text}: {e}");
        };
        says(
            "1/0:2/0:3 0:4/5:10",
            "slices[1]: got keys 5 … 10 (begin … end), allowed begin < end <= 9",
        );
        says("0:9/0:9", "slices[0]: got queries 0 … 9");
        says("4:4/0:9", "slices[0]: got queries 4 … 4");
        says("2/0:1/0:1", "slices[0]: got sequence 2, there are 2");
        says("0:8/0:9/3:2", "slices[0]: got lo 3 and hi 2");
        says(
            "0:8/0:4 4:8/3:9/:-2",
            "slices[0] and slices[1] both let query 7 of sequence 0 see key 3",
        );
        says("0:8/0:4 0:8/0:4", "slices[0] and slices[1]");
    }

    #[test]
    fn text_is_read_back() {
        for text in ["0/0:5/1:9", "3/0:5/1:9/:0", "0/2:5/1:9/-3:", "0/2:5/1:9/-3:4"] {
            assert_eq!(Region::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Region::parse("1:2/3:4"), Some(Region::full(0, (1, 2), (3, 4))));
        for text in ["", "1", "1:2", "0/1:2", "1:2/3:4/5", "1:2/3:4/5:6/7", "a/1:2/3:4", "1:2/3:-4"]
        {
            assert_eq!(Region::parse(text), None, "{text}");
        }
    }

    /// The order of the caller's list says nothing.
    #[test]
    fn lists_are_sets() {
        let [a, b] = [Region::full(0, (0, 4), (0, 4)), Region::full(0, (4, 8), (0, 4))];
        assert_eq!(Regions::new(&[a, b]), Regions::new(&[b, a]));
        assert_ne!(Regions::new(&[a, b]), Regions::new(&[a]));
    }
}
