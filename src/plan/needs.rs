//! Which key rows one team needs of another, and the slices that they make.

use crate::mask::{Overlap, Slice};
use crate::partition::Segment;
use crate::plan::Rows;
use crate::problem::Problem;

/// Consecutive keys `from .. to` of an owner's segment that a team needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interval {
    /// Index into the owner's segments.
    pub segment: u32,
    /// First index within the segment.
    pub from: u32,
    /// One past the last.
    pub to: u32,
}

/// Keys of `owner` that some query of `reader` may see; both sorted by (sequence, start). The keys of an overlap are one interval without
/// holes, so this is exactly what is needed.
pub fn needed(problem: &Problem, reader: &[Segment], owner: &[Segment]) -> Vec<Interval> {
    let mut out: Vec<Interval> = Vec::new();
    let mut spans: Vec<(u32, u32)> = Vec::new();
    for_pairs(reader, owner, |qs, index, key| {
        let sight = problem.sight(key.seq);
        spans.clear();
        qs.iter().for_each(|q| sight.overlaps(q, key, |o| spans.push(o.k)));
        spans.sort_unstable();
        for &(from, to) in &spans {
            match out.last_mut() {
                Some(last) if last.segment == index && from <= last.to => last.to = last.to.max(to),
                _ => out.push(Interval { segment: index, from, to }),
            }
        }
    });
    out
}

/// Does some query of `reader` see a key of `owner`? Gives up with yes when `patience`, counted in overlaps that are tried, is over.
pub fn any(problem: &Problem, reader: &[Segment], owner: &[Segment], patience: &mut usize) -> bool {
    let mut at = 0;
    for key in owner {
        at += reader[at..].iter().take_while(|q| q.seq < key.seq).count();
        let sight = problem.sight(key.seq);
        for q in reader[at..].iter().take_while(|q| q.seq == key.seq) {
            if *patience == 0 || sight.any(q, key) {
                return true;
            }
            *patience = patience.saturating_sub(sight.tries(q));
        }
    }
    false
}

/// Every key of `owner`: what a relay passes on.
pub fn everything(owner: &[Segment]) -> Vec<Interval> {
    owner
        .iter()
        .enumerate()
        .map(|(i, s)| Interval { segment: i as u32, from: 0, to: s.len })
        .collect()
}

/// Calls `f(query segments of the sequence, index of key segment, key segment)` for every key segment that has any.
fn for_pairs(reader: &[Segment], owner: &[Segment], mut f: impl FnMut(&[Segment], u32, &Segment)) {
    let mut at = 0;
    for (index, key) in owner.iter().enumerate() {
        while at < reader.len() && reader[at].seq < key.seq {
            at += 1;
        }
        let count = reader[at..].iter().take_while(|q| q.seq == key.seq).count();
        if count > 0 {
            f(&reader[at..at + count], index as u32, key);
        }
    }
}

/// Number of rows in a list of intervals.
pub fn count(intervals: &[Interval]) -> u32 {
    intervals.iter().map(|i| i.to - i.from).sum()
}

/// The intervals as rows of the owner's buffer, neighbours joined.
pub fn rows(owner: &[Segment], intervals: &[Interval]) -> Vec<Rows> {
    let mut out: Vec<Rows> = Vec::new();
    for i in intervals {
        let first = owner[i.segment as usize].offset + i.from;
        match out.last_mut() {
            Some(last) if last.first + last.count == first => last.count += i.to - i.from,
            _ => out.push(Rows::range(first, i.to - i.from)),
        }
    }
    out
}

/// The intervals as segments of a buffer in which they lie one after another from row `base`.
pub fn placed(owner: &[Segment], intervals: &[Interval], base: u32, out: &mut Vec<Segment>) {
    let mut offset = base;
    for i in intervals {
        let s = owner[i.segment as usize];
        out.push(Segment { start: s.start + i.from * s.step, len: i.to - i.from, offset, ..s });
        offset += i.to - i.from;
    }
}

/// Slices of `reader` over the intervals of `owner`, which lie one after another from row `base` of a buffer.
pub fn slices(
    problem: &Problem,
    reader: &[Segment],
    owner: &[Segment],
    intervals: &[Interval],
    base: u32,
    out: &mut Vec<Slice>,
) {
    let mut at = 0;
    let mut row = base;
    // First row of each interval of a segment.
    let mut firsts: Vec<u32> = Vec::new();
    for_pairs(reader, owner, |qs, index, key| {
        let sight = problem.sight(key.seq);
        while at < intervals.len() && intervals[at].segment < index {
            row += intervals[at].to - intervals[at].from;
            at += 1;
        }
        let mine = intervals[at..].iter().take_while(|i| i.segment == index).count();
        let mine = &intervals[at..at + mine];
        at += mine.len();
        firsts.clear();
        for i in mine {
            firsts.push(row);
            row += i.to - i.from;
        }
        // Intervals are made of overlaps, so each lies in one, if these are the keys of this reader.
        let place = |o: &Overlap| mine.partition_point(|i| i.from <= o.k.0).checked_sub(1);
        for q in qs {
            sight.overlaps(q, key, |o| {
                let Some(n) = place(&o).filter(|n| o.k.1 <= mine[*n].to) else { return };
                let first = i64::from(firsts[n]) - i64::from(mine[n].from);
                out.push(o.slice(i64::from(q.offset), first));
            });
        }
    });
}

/// Slices of `reader` over the owner's own buffer.
pub fn own_slices(problem: &Problem, reader: &[Segment], owner: &[Segment]) -> Vec<Slice> {
    let mut out = Vec::new();
    for_pairs(reader, owner, |qs, _, key| {
        let sight = problem.sight(key.seq);
        for q in qs {
            let slice = |o: Overlap| o.slice(i64::from(q.offset), i64::from(key.offset));
            sight.overlaps(q, key, |o| out.push(slice(o)));
        }
    });
    sort(&mut out);
    out
}

/// Slices in the order that backends expect.
pub fn sort(slices: &mut [Slice]) {
    slices.sort_unstable_by_key(|s| (s.q, s.k));
}

/// Cuts a list of slices into two of about equal work, at query rows. The cut never splits a slice into empty parts.
pub fn halve(slices: &[Slice]) -> (Vec<Slice>, Vec<Slice>) {
    let half = slices.iter().map(Slice::pairs).sum::<u64>() / 2;
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let mut done = 0;
    for s in slices {
        let pairs = s.pairs();
        if done + pairs <= half {
            a.push(*s);
        } else if done >= half {
            b.push(*s);
        } else {
            // First row at which the running count reaches the half.
            let (mut low, mut high) = (0, s.q_len);
            while low < high {
                let middle = (low + high) / 2;
                if done + s.rows(0, middle).pairs() < half {
                    low = middle + 1
                } else {
                    high = middle
                }
            }
            if low > 0 {
                a.push(s.rows(0, low));
            }
            if low < s.q_len {
                b.push(s.rows(low, s.q_len));
            }
        }
        done += pairs;
    }
    // The rest of a cut slice may start after slices of the same rows.
    sort(&mut b);
    (a, b)
}
