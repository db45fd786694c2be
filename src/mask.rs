//! Masks as geometry: a mask is one [`Band`], and intersecting two [`Segment`]s with it gives a [`Slice`].
//!
//! ```text
//!             key position − query position ∈ [lo, hi]
//!     keys →
//!   q ■ ■ · · · ·      full              lo = −∞          hi = +∞
//!   u ■ ■ ■ · · ·      causal            lo = −∞          hi = 0
//!   e · ■ ■ ■ · ·      causal, window    lo = −left       hi = 0
//!   r · · ■ ■ ■ ·      bottom-right      both shifted by  len_k − len_q
//!   y
//! ```
//! Nothing downstream of this file knows the name of a mask.

use crate::partition::Segment;

/// "No limit" on either side of a band; far outside every position, and safe to add positions to.
pub const UNBOUNDED: i64 = 1 << 40;

/// What a query may see, before it is applied to a sequence. Windows count keys: `left` before the diagonal, `right` after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mask {
    /// Keys after the diagonal are hidden.
    pub causal: bool,
    /// The diagonal ends in the last query and the last key instead of starting at the first ones.
    pub bottom_right: bool,
    /// At most this many keys before the diagonal.
    pub left: Option<u32>,
    /// At most this many keys after the diagonal (with `causal`, 0).
    pub right: Option<u32>,
}

impl Mask {
    /// Everything sees everything.
    pub const FULL: Mask = Mask { causal: false, bottom_right: false, left: None, right: None };
    /// No query sees a later key.
    pub const CAUSAL: Mask = Mask { causal: true, ..Mask::FULL };

    /// The band for a sequence of `len_q` queries and `len_k` keys.
    pub fn band(&self, len_q: u32, len_k: u32) -> Band {
        let shift = if self.bottom_right { i64::from(len_k) - i64::from(len_q) } else { 0 };
        let right = if self.causal { Some(0) } else { self.right };
        Band {
            lo: self.left.map_or(-UNBOUNDED, |l| shift - i64::from(l)),
            hi: right.map_or(UNBOUNDED, |r| shift + i64::from(r)),
        }
    }
}

/// A query at position `q` sees the key at position `k` when `lo <= k − q <= hi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Band {
    /// Least difference.
    pub lo: i64,
    /// Greatest difference.
    pub hi: i64,
}

impl Band {
    /// May the query see the key?
    pub fn allows(&self, query: i64, key: i64) -> bool {
        (self.lo..=self.hi).contains(&(key - query))
    }
}

/// The one unit of attention work: rows `q .. q + q_len` of a query buffer against rows `k .. k + k_len` of a key buffer;
/// row `q + i` sees row `k + j` when `lo <= j − i <= hi`. Every row of the slice sees at least one key and every key is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slice {
    /// First query row.
    pub q: u32,
    /// Number of query rows.
    pub q_len: u32,
    /// First key row.
    pub k: u32,
    /// Number of key rows.
    pub k_len: u32,
    /// Least `j − i`.
    pub lo: i32,
    /// Greatest `j − i`.
    pub hi: i32,
}

impl Slice {
    /// Keys that row `q + i` sees, as a range of key rows (absolute, may be empty only for `i` outside the slice).
    pub fn keys_of(&self, i: u32) -> std::ops::Range<u32> {
        let lo = (i64::from(i) + i64::from(self.lo)).clamp(0, i64::from(self.k_len)) as u32;
        let hi = (i64::from(i) + i64::from(self.hi) + 1).clamp(i64::from(lo), i64::from(self.k_len))
            as u32;
        self.k + lo..self.k + hi
    }

    /// Number of (query, key) pairs, in closed form.
    pub fn pairs(&self) -> u64 {
        let (n, m) = (i64::from(self.q_len), i64::from(self.k_len));
        // Σ_i clamp(i + c, 0, m) counts the keys below a diagonal; a band is the difference of two.
        let below = |c: i64| -> i64 {
            let first = (-c).clamp(0, n); // first row with a positive count
            let full = (m - c).clamp(first, n); // first row that sees all m keys
            let ramp = full - first;
            ramp * (first + c) + ramp * (ramp - 1) / 2 + (n - full) * m
        };
        (below(i64::from(self.hi) + 1) - below(i64::from(self.lo))).max(0) as u64
    }

    /// Keys of the slice that the rows `from .. to` (relative to `q`) see, relative to `k`.
    fn keys_seen(&self, from: u32, to: u32) -> std::ops::Range<u32> {
        let lo = (i64::from(from) + i64::from(self.lo)).clamp(0, i64::from(self.k_len));
        let hi = (i64::from(to) - 1 + i64::from(self.hi) + 1).clamp(lo, i64::from(self.k_len));
        lo as u32..hi as u32
    }

    /// The part of the slice with the query rows `from .. to` (relative to `q`), its keys trimmed to what those rows see.
    pub fn rows(&self, from: u32, to: u32) -> Slice {
        let keys = self.keys_seen(from, to);
        let shift = i64::from(from) - i64::from(keys.start);
        Slice {
            q: self.q + from,
            q_len: to - from,
            k: self.k + keys.start,
            k_len: keys.end - keys.start,
            lo: clamp_bound(i64::from(self.lo) + shift, to - from, keys.end - keys.start),
            hi: clamp_bound(i64::from(self.hi) + shift, to - from, keys.end - keys.start),
        }
    }
}

/// Bounds beyond the slice mean the same as bounds at its edge; clamping makes equal slices compare equal and fit 32 bits.
fn clamp_bound(bound: i64, q_len: u32, k_len: u32) -> i32 {
    bound.clamp(-i64::from(q_len), i64::from(k_len)) as i32
}

/// What two segments of one sequence have to do with each other: index ranges within the segments, and the band between indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// First query index that sees a key of the other segment, and one past the last.
    pub q: (u32, u32),
    /// First key index that is seen, and one past the last.
    pub k: (u32, u32),
    /// Least (key index − query index).
    pub lo: i64,
    /// Greatest (key index − query index).
    pub hi: i64,
}

/// Intersects a query segment with a key segment of the same sequence. Both have the same step: positions are
/// `start + step·index`, so a band of positions stays a band of indices, divided by the step.
pub fn overlap(query: &Segment, key: &Segment, band: Band) -> Option<Overlap> {
    debug_assert!(query.seq == key.seq);
    debug_assert!(query.step == key.step || query.len <= 1 || key.len <= 1);
    let step = i64::from(if query.len > 1 { query.step } else { key.step });
    let between = i64::from(key.start) - i64::from(query.start);
    let (lo, hi) = (band.lo - between, band.hi - between);
    let (lo, hi) = match step {
        1 => (lo, hi), // nearly always; divisions would be most of the planner's time
        _ => (lo.div_euclid(step) + i64::from(lo.rem_euclid(step) != 0), hi.div_euclid(step)),
    };
    let (n, m) = (i64::from(query.len), i64::from(key.len));
    let (q0, q1) = ((-hi).max(0), (m - 1 - lo).min(n - 1) + 1);
    if lo > hi || q0 >= q1 {
        return None;
    }
    let (k0, k1) = ((q0 + lo).max(0), (q1 - 1 + hi).min(m - 1) + 1);
    if k0 >= k1 {
        return None;
    }
    Some(Overlap { q: (q0 as u32, q1 as u32), k: (k0 as u32, k1 as u32), lo, hi })
}

impl Overlap {
    /// The slice of this overlap, given the buffer rows of the segments' index 0. Key rows may be addressed in any buffer
    /// that holds the overlap's keys at consecutive rows.
    pub fn slice(&self, q_row: i64, k_row: i64) -> Slice {
        let (q_len, k_len) = (self.q.1 - self.q.0, self.k.1 - self.k.0);
        let shift = i64::from(self.q.0) - i64::from(self.k.0);
        Slice {
            q: (q_row + i64::from(self.q.0)) as u32,
            q_len,
            k: (k_row + i64::from(self.k.0)) as u32,
            k_len,
            lo: clamp_bound(self.lo + shift, q_len, k_len),
            hi: clamp_bound(self.hi + shift, q_len, k_len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: u32, step: u32, len: u32) -> Segment {
        Segment { seq: 0, start, step, len, offset: 0 }
    }

    /// Every pair of small segments and bands against a double loop.
    #[test]
    fn overlap_is_exactly_the_allowed_pairs() {
        let bounds = [-UNBOUNDED, -5, -2, -1, 0, 1, 3, UNBOUNDED];
        for step in [1, 2, 3] {
            for (qs, ks) in (0..9).flat_map(|a| (0..9).map(move |b| (a, b))) {
                for (ql, kl) in (0..6).flat_map(|a| (0..6).map(move |b| (a, b))) {
                    for (lo, hi) in bounds.iter().flat_map(|&a| bounds.iter().map(move |&b| (a, b)))
                    {
                        check(&segment(qs, step, ql), &segment(ks, step, kl), Band { lo, hi });
                    }
                }
            }
        }
    }

    fn check(q: &Segment, k: &Segment, band: Band) {
        let mut want = Vec::new();
        for i in 0..q.len {
            for j in 0..k.len {
                if band.allows(i64::from(q.start + i * q.step), i64::from(k.start + j * k.step)) {
                    want.push((i, j));
                }
            }
        }
        let slice = overlap(q, k, band).map(|o| o.slice(0, 0));
        let got: Vec<_> = slice
            .iter()
            .flat_map(|s| (0..s.q_len).flat_map(move |i| s.keys_of(i).map(move |j| (s.q + i, j))))
            .collect();
        assert_eq!(got, want, "{q:?} {k:?} {band:?} {slice:?}");
        assert_eq!(slice.map_or(0, |s| s.pairs()), want.len() as u64, "{slice:?}");
        if let Some(s) = slice {
            for cut in 0..=s.q_len {
                let (a, b) = (s.rows(0, cut), s.rows(cut, s.q_len));
                assert_eq!(a.pairs() + b.pairs(), s.pairs(), "{s:?} cut at {cut}: {a:?} {b:?}");
            }
        }
    }
}
