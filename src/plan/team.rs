//! P = u × b: teams of u consecutive ranks trade heads for sequence, b teams exchange keys and values.

use crate::backend::Run;
use crate::partition::{Segment, Side, holding, joins};
use crate::problem::Problem;
use std::ops::Range;

/// The heads a member of a team works on, as global indices. Shares differ by at most one query head; a key head that serves
/// query heads of several members is in several shares (its gradients are summed).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadShare {
    /// Query heads.
    pub q: Range<u32>,
    /// Key heads.
    pub kv: Range<u32>,
}

impl HeadShare {
    /// The share of member `member` of a team of `problem.inner`.
    pub fn of(problem: &Problem, member: u32) -> HeadShare {
        let cut =
            |j: u32| (u64::from(j) * u64::from(problem.heads) / u64::from(problem.inner)) as u32;
        let q = cut(member)..cut(member + 1);
        let group = problem.group();
        let kv = if q.is_empty() { 0..0 } else { q.start / group..q.end.div_ceil(group) };
        HeadShare { q, kv }
    }

    /// The query or the key heads.
    pub fn side(&self, key: bool) -> Range<u32> {
        if key { self.kv.clone() } else { self.q.clone() }
    }
}

/// One side of a team: its rows, and where each member's local rows are among them.
#[derive(Clone, Debug, Default)]
pub struct TeamSide {
    /// Rows of the team's buffers.
    pub rows: u32,
    /// True tokens, offsets counting team rows, sorted by (sequence, start).
    pub segments: Vec<Segment>,
    /// For every member: local row → team row.
    pub members: Vec<Vec<Run>>,
}

/// One of the b teams.
#[derive(Clone, Debug)]
pub struct Team {
    /// Its query rows.
    pub q: TeamSide,
    /// Its key rows.
    pub k: TeamSide,
}

impl Team {
    /// Team `team` of the problem. With `pack` the key rows are gathered even when the team is one rank.
    pub fn new(problem: &Problem, team: u32, pack: bool) -> Team {
        let direct = problem.inner == 1;
        let side = |side, direct| {
            if direct {
                direct_side(problem, team, side)
            } else {
                gathered_side(problem, team, side)
            }
        };
        Team { q: side(Side::Query, direct), k: side(Side::Key, direct && !pack) }
    }
}

/// A team of one works on the caller's rows as they are, padding rows included.
fn direct_side(problem: &Problem, rank: u32, side: Side) -> TeamSide {
    let held = holding(problem, rank, side);
    let mut segments = held.segments;
    segments.sort_by_key(|s| (s.seq, s.start));
    let identity = Run { src: 0, src_step: 1, dst: 0, dst_step: 1, rows: held.rows };
    TeamSide { rows: held.rows, segments, members: vec![vec![identity]] }
}

/// Members' tokens in sequence order without padding, so that neighbouring pieces become one segment.
fn gathered_side(problem: &Problem, team: u32, side: Side) -> TeamSide {
    let u = problem.inner;
    let members: Vec<Vec<Segment>> =
        (0..u).map(|a| holding(problem, team * u + a, side).segments).collect();
    let mut pieces: Vec<(u32, Segment)> = members
        .iter()
        .enumerate()
        .flat_map(|(a, list)| list.iter().map(move |s| (a as u32, *s)))
        .collect();
    pieces.sort_by_key(|(_, s)| (s.seq, s.start));
    // A team that is the whole group holds whole sequences: stripes interleave into step 1. (Not a team of one: its queries are
    // left as they are, and both sides must have the same step.)
    let whole = problem.teams() == 1 && u > 1;
    let mut out = TeamSide { members: vec![Vec::new(); u as usize], ..TeamSide::default() };
    let mut at = 0;
    while at < pieces.len() {
        let seq = pieces[at].1.seq;
        let end = at + pieces[at..].iter().take_while(|(_, s)| s.seq == seq).count();
        let base = out.rows;
        for (member, s) in &pieces[at..end] {
            let (dst, dst_step) = if whole { (base + s.start, s.step) } else { (out.rows, 1) };
            out.members[*member as usize].push(Run {
                src: s.offset,
                src_step: 1,
                dst,
                dst_step,
                rows: s.len,
            });
            let placed = Segment { offset: out.rows, ..*s };
            match out.segments.last_mut() {
                _ if whole => {}
                Some(last) if joins(last, &placed) => last.len += placed.len,
                _ => out.segments.push(placed),
            }
            out.rows += s.len;
        }
        if whole {
            let len = problem.seqs[seq as usize].extent(side).len;
            out.segments.push(Segment { seq, start: 0, step: 1, len, offset: base });
        }
        at = end;
    }
    for runs in &mut out.members {
        runs.sort_by_key(|r| r.src);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::tests::small;

    #[test]
    fn shares_cover_all_heads_and_keys_follow() {
        for (heads, kv_heads) in [(8, 8), (8, 2), (8, 1), (6, 3), (5, 5), (3, 1), (1, 1)] {
            for u in 1..=9 {
                let p = Problem { inner: u, stages: 0, ..small(u, heads, kv_heads) };
                let shares: Vec<_> = (0..u).map(|a| HeadShare::of(&p, a)).collect();
                assert_eq!(shares.iter().map(|s| s.q.len() as u32).sum::<u32>(), heads);
                for s in &shares {
                    for h in s.q.clone() {
                        assert!(s.kv.contains(&(h / (heads / kv_heads))));
                    }
                    assert!(s.q.is_empty() == s.kv.is_empty());
                }
            }
        }
    }

    #[test]
    fn a_team_of_neighbours_holds_two_long_segments() {
        let p = Problem { inner: 2, stages: 1, ..small(4, 4, 4) };
        let t = Team::new(&p, 0, false);
        let spans: Vec<_> = t.k.segments.iter().map(|s| (s.start, s.len, s.offset)).collect();
        assert_eq!(spans, [(0, 4, 0), (12, 4, 4)]);
        let rows: Vec<_> = t.k.members[1].iter().map(|r| (r.src, r.dst, r.rows)).collect();
        assert_eq!(rows, [(0, 2, 2), (2, 4, 2)]);
    }
}
