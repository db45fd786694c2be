//! What a rank knows before it plans either pass: its team, where all keys are, what every stage moves, and the slices to compute.

use super::needs::{self, Interval};
use super::team::{Team, sides_are_alike, team_segments};
use crate::mask::Slice;
use crate::partition::{Segment, Side};
use crate::problem::Problem;

/// Keys of another team that arrive in a stage, or go out in it.
pub(super) struct Transfer {
    /// The other team.
    pub team: u32,
    /// Team whose keys they are.
    pub owner: u32,
    /// Which of them.
    pub keys: Vec<Interval>,
    /// First row in the receiver's buffer (arriving), or in the buffer that their gradients return to (leaving).
    pub base: u32,
    /// Number of rows.
    pub rows: u32,
}

/// Everything that a stage moves in one direction.
#[derive(Default)]
pub(super) struct Traffic {
    pub transfers: Vec<Transfer>,
    pub rows: u32,
}

impl Traffic {
    pub fn push(&mut self, team: u32, owner: u32, keys: Vec<Interval>) {
        let rows = needs::count(&keys);
        self.transfers.push(Transfer { team, owner, keys, base: self.rows, rows });
        self.rows += rows;
    }
}

/// One stage 1 … n.
pub(super) struct Stage {
    /// Keys that come in.
    pub arriving: Traffic,
    /// Keys that go out.
    pub leaving: Traffic,
    /// Slices over the rows that came in.
    pub work: Vec<Slice>,
}

pub(super) struct Survey<'a> {
    pub problem: &'a Problem,
    /// This rank's team, and its place in it.
    pub team: u32,
    pub member: u32,
    pub mine: Team,
    /// Stages 1 … n, stage s at s − 1.
    pub stages: Vec<Stage>,
    /// Slices over the team's own keys.
    pub own: Vec<Slice>,
    /// Relay only: rows that the left neighbour's gradients have in each stage.
    pub left_rows: Vec<u32>,
}

impl<'a> Survey<'a> {
    /// With `pack` the rank's own keys are gathered even in a team of one. How the others' lie is their business: keys are numbered
    /// in the order of positions, which is the same for all.
    pub fn new(problem: &'a Problem, rank: u32, pack: bool) -> Survey<'a> {
        let (team, member) = (rank / problem.inner, rank % problem.inner);
        let mine = Team::new(problem, team, pack);
        let own = needs::own_slices(problem, &mine.q.segments, &mine.k.segments);
        let stages = Vec::new();
        let mut survey = Survey { problem, team, member, mine, stages, own, left_rows: Vec::new() };
        if problem.stages > 0 {
            survey.list_stages();
        }
        survey
    }

    /// A survey whose stages move no rows, for the sizes of everything else. `work`: do the stages leave anything to compute?
    pub fn without_traffic(problem: &'a Problem, rank: u32, work: bool) -> Survey<'a> {
        let (team, member) = (rank / problem.inner, rank % problem.inner);
        let slice = Slice { q: 0, q_len: 1, k: 0, k_len: 1, lo: 0, hi: 0 };
        let stage = || Stage {
            arriving: Traffic::default(),
            leaving: Traffic::default(),
            work: if work { vec![slice] } else { Vec::new() },
        };
        Survey {
            problem,
            team,
            member,
            mine: Team::new(problem, team, false),
            stages: (0..problem.stages).map(|_| stage()).collect(),
            own: Vec::new(),
            left_rows: vec![0; problem.stages as usize],
        }
    }

    fn list_stages(&mut self) {
        let (n, b) = (self.problem.stages, self.problem.teams());
        let side = |side| -> Vec<Vec<Segment>> {
            (0..b).map(|t| team_segments(self.problem, t, side)).collect()
        };
        let queries = side(Side::Query);
        let mut keys =
            if sides_are_alike(self.problem) { queries.clone() } else { side(Side::Key) };
        keys[self.team as usize].clone_from(&self.mine.k.segments);
        for s in 1..=n {
            let (mut arriving, mut leaving) = (Traffic::default(), Traffic::default());
            for d in distances(b - 1, n, s) {
                let owner = (self.team + b - d) % b;
                if self.problem.relay {
                    let all = |team: u32| needs::everything(&keys[team as usize]);
                    let (left, right) = ((self.team + b - 1) % b, (self.team + 1) % b);
                    let (passed_on, returning) = ((owner + 1) % b, (owner + b - 1) % b);
                    arriving.push(left, owner, all(owner));
                    leaving.push(right, passed_on, all(passed_on));
                    self.left_rows.push(needs::count(&all(returning)));
                } else {
                    let to = (self.team + d) % b;
                    let needed = |reader: u32, owner: u32| {
                        needs::needed(
                            self.problem,
                            &queries[reader as usize],
                            &keys[owner as usize],
                        )
                    };
                    arriving.push(owner, owner, needed(self.team, owner));
                    leaving.push(to, self.team, needed(to, self.team));
                }
            }
            let mut work = Vec::new();
            for t in &arriving.transfers {
                let owner = &keys[t.owner as usize];
                let queries = &self.mine.q.segments;
                needs::slices(self.problem, queries, owner, &t.keys, t.base, &mut work);
            }
            needs::sort(&mut work);
            self.stages.push(Stage { arriving, leaving, work });
        }
    }

    /// Stage s in 1 … n.
    pub fn stage(&self, s: u32) -> &Stage {
        &self.stages[s as usize - 1]
    }
}

/// Distances whose keys stage s in 1 … n brings, when `others` teams are dealt out as evenly as they go.
pub(super) fn distances(others: u32, n: u32, s: u32) -> std::ops::RangeInclusive<u32> {
    (s - 1) * others / n + 1..=s * others / n
}
