//! What a rank knows before it plans either pass: its team, where all keys are, what every stage moves, and the slices to compute.

use super::Origins;
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
    /// Which tokens those rows are, if scores depend on it.
    pub tokens: Vec<Segment>,
}

/// Where the tokens of all teams are.
pub(super) struct Everyone {
    pub queries: Vec<Vec<Segment>>,
    pub keys: Vec<Vec<Segment>>,
}

impl Everyone {
    pub fn new(problem: &Problem) -> Everyone {
        let side = |side| -> Vec<Vec<Segment>> {
            (0..problem.teams()).map(|t| team_segments(problem, t, side)).collect()
        };
        let queries = side(Side::Query);
        let keys = if sides_are_alike(problem) { queries.clone() } else { side(Side::Key) };
        Everyone { queries, keys }
    }

    /// Distances 1 … b − 1 at which some team needs keys, ascending; a relay passes through all. A sliding window or documents that
    /// stay home leave out most. The same on every rank; where it would take long to be sure, a distance counts as needed.
    pub fn busy_distances(&self, problem: &Problem) -> Vec<u32> {
        let b = problem.teams();
        let mut patience = 100_000;
        let mut needed = |reader: u32, owner: u32| {
            let (queries, keys) = (&self.queries[reader as usize], &self.keys[owner as usize]);
            needs::any(problem, queries, keys, &mut patience)
        };
        let mut busy = |d: u32| problem.relay || (0..b).any(|t| needed(t, (t + b - d) % b));
        (1..b).filter(|d| busy(*d)).collect()
    }
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
        let (stages, left_rows) = (Vec::new(), Vec::new());
        let mut survey = Survey { problem, team, member, mine, stages, own, left_rows };
        if problem.teams() > 1 {
            survey.list_stages();
        }
        survey
    }

    /// A survey whose `n` stages move no rows, for the sizes of everything else. `work`: do the stages leave anything to compute?
    pub fn without_traffic(problem: &'a Problem, rank: u32, n: usize, work: bool) -> Survey<'a> {
        let (team, member) = (rank / problem.inner, rank % problem.inner);
        let slice = Slice { q: 0, q_len: 1, k: 0, k_len: 1, lo: 0, hi: 0 };
        let stage = || Stage {
            arriving: Traffic::default(),
            leaving: Traffic::default(),
            work: if work { vec![slice] } else { Vec::new() },
            tokens: Vec::new(),
        };
        let mine = Team::new(problem, team, false);
        // Only latents need more memory where there is own work.
        let own = match problem.latent {
            Some(_) => needs::own_slices(problem, &mine.q.segments, &mine.k.segments),
            None => Vec::new(),
        };
        Survey {
            problem,
            team,
            member,
            mine,
            stages: (0..n).map(|_| stage()).collect(),
            own,
            left_rows: vec![0; n],
        }
    }

    fn list_stages(&mut self) {
        let b = self.problem.teams();
        let everyone = Everyone::new(self.problem);
        let busy = everyone.busy_distances(self.problem);
        let Everyone { queries, mut keys } = everyone;
        keys[self.team as usize].clone_from(&self.mine.k.segments);
        for distances in stage_distances(&busy, self.problem.stages) {
            let (mut arriving, mut leaving) = (Traffic::default(), Traffic::default());
            for &d in distances {
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
            let mut tokens = Vec::new();
            if self.problem.score.needs_origins() {
                for t in &arriving.transfers {
                    needs::placed(&keys[t.owner as usize], &t.keys, t.base, &mut tokens);
                }
            }
            self.stages.push(Stage { arriving, leaving, work, tokens });
        }
    }

    /// Which tokens the rows are that attend steps see.
    pub fn origins(&self) -> Option<Origins> {
        self.problem.score.needs_origins().then(|| {
            let stages = self.stages.iter().map(|s| s.tokens.clone());
            Origins {
                queries: self.mine.q.segments.clone(),
                keys: std::iter::once(self.mine.k.segments.clone()).chain(stages).collect(),
            }
        })
    }

    /// Number of stages n: what the problem asks for, or fewer where there is less to move.
    pub fn count(&self) -> u32 {
        self.stages.len() as u32
    }

    /// Stage s in 1 … n.
    pub fn stage(&self, s: u32) -> &Stage {
        &self.stages[s as usize - 1]
    }
}

/// The distances of every stage: those that are needed, dealt out over at most `stages` stages as evenly as they go.
pub(super) fn stage_distances(busy: &[u32], stages: u32) -> impl Iterator<Item = &[u32]> {
    let n = busy.len().min(stages as usize);
    (0..n).map(move |s| &busy[s * busy.len() / n..(s + 1) * busy.len() / n])
}
