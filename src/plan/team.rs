//! P = u × b: teams of u consecutive ranks trade heads for sequence, b teams exchange keys and values.

use crate::backend::Run;
use crate::holding::holding;
use crate::partition::{Partition, Segment, Side, joins};
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
        HeadShare::cut(problem.heads, problem.kv_heads, problem.inner, member)
    }

    /// The share of member `member` of `members`, of so many query and key heads.
    pub fn cut(heads: u32, kv_heads: u32, members: u32, member: u32) -> HeadShare {
        let cut = |j: u32| (u64::from(j) * u64::from(heads) / u64::from(members)) as u32;
        let q = cut(member)..cut(member + 1);
        let group = heads / kv_heads;
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
    /// Team `team` of the problem. With `pack` the key rows are gathered even when the team is one rank, as always if they travel in another
    /// format than that in which they are stored.
    pub fn new(problem: &Problem, team: u32, pack: bool) -> Team {
        let pack = pack || problem.kv_wire.is_some();
        let make = |side, direct| match direct {
            true => direct_side(problem, team, side),
            false => gathered_side(problem, team, side),
        };
        let direct = problem.inner == 1;
        let q = make(Side::Query, direct);
        let k = match sides_are_alike(problem) && !(direct && pack) {
            true => q.clone(),
            false => make(Side::Key, direct && !pack),
        };
        Team { q, k }
    }
}

/// Are keys cut and dealt as queries are?
pub(super) fn sides_are_alike(problem: &Problem) -> bool {
    let lists = match &problem.partition {
        Partition::List { q, k } => q == k,
        _ => true,
    };
    lists && problem.seqs.iter().all(|s| s.q == s.k)
}

/// A team's true tokens on one side, sorted by (sequence, start): what others need to know of it. (Whether a team of one gathers
/// its rows moves them in its buffers, but not in this order.)
pub(super) fn team_segments(problem: &Problem, team: u32, side: Side) -> Vec<Segment> {
    match problem.inner {
        1 => sorted(holding(problem, team, side).segments),
        _ => gather(problem, team, side, |_, _| {}).1,
    }
}

fn sorted(mut segments: Vec<Segment>) -> Vec<Segment> {
    segments.sort_by_key(|s| (s.seq, s.start));
    segments
}

/// A team of one works on the caller's rows as they are, padding rows included.
fn direct_side(problem: &Problem, rank: u32, side: Side) -> TeamSide {
    let held = holding(problem, rank, side);
    let identity = Run { src: 0, src_step: 1, dst: 0, dst_step: 1, rows: held.rows };
    TeamSide { rows: held.rows, segments: sorted(held.segments), members: vec![vec![identity]] }
}

fn gathered_side(problem: &Problem, team: u32, side: Side) -> TeamSide {
    let mut members = vec![Vec::new(); problem.inner as usize];
    let (rows, segments) = gather(problem, team, side, |member, run| members[member].push(run));
    members.iter_mut().for_each(|runs: &mut Vec<Run>| runs.sort_by_key(|r| r.src));
    TeamSide { rows, segments, members }
}

/// Members' tokens in sequence order without padding, so that neighbouring pieces become one segment: the number of rows and the
/// segments. Calls `place(member, local row → team row)` for every piece.
fn gather(
    problem: &Problem,
    team: u32,
    side: Side,
    mut place: impl FnMut(usize, Run),
) -> (u32, Vec<Segment>) {
    let u = problem.inner;
    let held: Vec<Vec<Segment>> =
        (0..u).map(|a| sorted(holding(problem, team * u + a, side).segments)).collect();
    // A team that is the whole group holds whole sequences: stripes interleave into step 1. (Not a team of one: its queries are
    // left as they are, and both sides must have the same step.)
    let whole = problem.teams() == 1 && u > 1;
    let mut at = vec![0; held.len()];
    let mut pieces: Vec<(usize, Segment)> = Vec::new();
    let mut rows = 0;
    let mut segments: Vec<Segment> = Vec::new();
    for seq in 0..problem.seqs.len() as u32 {
        pieces.clear();
        for (member, list) in held.iter().enumerate() {
            let mine = list[at[member]..].iter().take_while(|s| s.seq == seq);
            pieces.extend(mine.map(|s| (member, *s)));
            at[member] += list[at[member]..].iter().take_while(|s| s.seq == seq).count();
        }
        pieces.sort_unstable_by_key(|(_, s)| s.start);
        let base = rows;
        for (member, s) in &pieces {
            let (dst, dst_step) = if whole { (base + s.start, s.step) } else { (rows, 1) };
            place(*member, Run { src: s.offset, src_step: 1, dst, dst_step, rows: s.len });
            let placed = Segment { offset: rows, ..*s };
            match segments.last_mut() {
                _ if whole => {}
                Some(last) if joins(last, &placed) => last.len += placed.len,
                _ => segments.push(placed),
            }
            rows += s.len;
        }
        if whole && rows > base {
            segments.push(Segment { seq, start: 0, step: 1, len: rows - base, offset: base });
        }
    }
    (rows, segments)
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
