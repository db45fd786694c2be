//! How many stages fit into a memory cap.

use super::account::{ALIGN, workspace_bytes};
use super::needs::{self, Interval};
use super::stages::converts;
use super::survey::{Everyone, Survey, stage_distances};
use super::{Kind, Options, Pass, Plan, SlotInfo, build};
use crate::error::{Error, Result, Status};
use crate::problem::Problem;
use std::sync::Arc;

/// Resolves a stage count that the caller left open: the fewest stages with which every rank's workspace, forward and backward,
/// stays within `cap` bytes. `saved` as in [`Options`]. `problem.stages` is not read. Fails with [`Status::OutOfMemory`] if no count fits.
pub fn fewest_stages(problem: &Problem, cap: u64, saved: bool) -> Result<u32> {
    let peaks = peaks(problem, saved);
    let least = peaks.iter().min().copied().unwrap_or(0);
    // More stages need less memory, but not always: two large distances may come to share a slot, or cease to.
    match peaks.iter().position(|peak| *peak <= cap) {
        Some(_) if problem.relay || problem.teams() == 1 => Ok(problem.teams() - 1),
        Some(index) => Ok(index as u32 + 1),
        None => Err(Error::new(
            Status::OutOfMemory,
            format!("memory cap: got {cap} bytes; the least that a rank can do with is {least}"),
        )),
    }
}

/// Largest workspace of any rank and pass, in bytes, for 1, 2, … b − 1 stages (a relay: for b − 1; one team: for none).
/// Exact, but much cheaper than the plans: only the stages' slots change with their number.
pub fn peaks(problem: &Problem, saved: bool) -> Vec<u64> {
    let b = problem.teams();
    let options = Options { saved, ..Options::default() };
    if b == 1 {
        let alone = Arc::new(Problem { stages: 0, ..problem.clone() });
        let plans = |pass| Plan::all(&alone, pass, options);
        let all = plans(Pass::Forward).into_iter().chain(plans(Pass::Backward));
        return vec![all.map(|p| workspace_bytes(&p) as u64).max().unwrap_or(0)];
    }
    let problem = &Arc::new(problem.clone());
    let everyone = Everyone::new(problem);
    let busy = everyone.busy_distances(problem);
    let rows = arriving_rows(problem, &everyone, &busy);
    let counts = if problem.relay { b - 1..b } else { 1..b };
    let mut out = vec![0; counts.len()];
    for rank in 0..problem.ranks {
        let team = rank / problem.inner;
        let arriving = |d: u32| rows[team as usize][d as usize];
        let leaving = |d: u32| match problem.relay {
            // What comes home in a relay, a stage at a time, is as many rows as the left neighbour had in it.
            true => rows[((team + b - 1) % b) as usize][d as usize],
            false => rows[((team + d) % b) as usize][d as usize],
        };
        let work = busy.iter().any(|d| arriving(*d) > 0);
        let survey = Survey::without_traffic(problem, rank, busy.len(), work);
        // A relay also passes on keys that it does not attend.
        let attended = |d: u32| match problem.relay {
            true if needs::count(&needed(problem, &everyone, team, d)) == 0 => 0,
            _ => arriving(d),
        };
        let traffic: Vec<_> = counts
            .clone()
            .map(|n| {
                let apart = problem.kv_wire.is_some() || problem.latent.is_some();
                let seen = if apart { stage_rows(&busy, n, attended) } else { [0; 2] };
                (
                    stage_rows(&busy, n, arriving),
                    stage_rows(&busy, n, leaving),
                    seen[0].max(seen[1]),
                )
            })
            .collect();
        for pass in [Pass::Forward, Pass::Backward] {
            let slots = build::plan(problem, rank, &survey, pass, options).slots;
            for (peak, (rows, homes, seen)) in out.iter_mut().zip(&traffic) {
                let bytes = |s: &SlotInfo| {
                    let rows = match s.slot.kind {
                        Kind::Part if converts(problem) => rows[0].max(rows[1]),
                        Kind::Seen => s.rows.max(*seen),
                        Kind::Recv | Kind::Part | Kind::Wire => rows[s.slot.index as usize],
                        Kind::Return => homes[s.slot.index as usize],
                        _ => s.rows,
                    };
                    SlotInfo { rows, ..*s }.bytes().next_multiple_of(ALIGN) as u64
                };
                let own = slots.iter().filter(|s| s.slot.kind != Kind::Caller && !s.saved);
                *peak = own.map(bytes).sum::<u64>().max(*peak);
            }
        }
    }
    out
}

/// Rows of the two slots that at most n stages take turns in: the largest even and the largest odd stage.
fn stage_rows(busy: &[u32], n: u32, rows: impl Fn(u32) -> u32) -> [u32; 2] {
    let mut out = [0; 2];
    for (i, distances) in stage_distances(busy, n).enumerate() {
        let slot = &mut out[(i + 1) % 2];
        *slot = distances.iter().map(|d| rows(*d)).sum::<u32>().max(*slot);
    }
    out
}

/// Keys at distance d that team t needs.
fn needed(problem: &Problem, everyone: &Everyone, team: u32, d: u32) -> Vec<Interval> {
    let b = problem.teams();
    let owner = &everyone.keys[((team + b - d) % b) as usize];
    needs::needed(problem, &everyone.queries[team as usize], owner)
}

/// Key rows that team t receives from distance d, as `[t][d]`.
fn arriving_rows(problem: &Problem, everyone: &Everyone, busy: &[u32]) -> Vec<Vec<u32>> {
    let b = problem.teams();
    let from = |team: u32, d: u32| {
        needs::count(&match problem.relay {
            true => needs::everything(&everyone.keys[((team + b - d) % b) as usize]),
            false => needed(problem, everyone, team, d),
        })
    };
    let of = |team: u32| {
        let mut rows = vec![0; b as usize];
        busy.iter().for_each(|d| rows[*d as usize] = from(team, *d));
        rows
    };
    (0..b).map(of).collect()
}
