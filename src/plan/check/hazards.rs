//! Steps of different lanes that conflict are ordered by events; inside one exchange nothing conflicts.

use super::Access;
use crate::plan::{Event, Lane, Plan, Slot};
use std::collections::HashMap;

/// Checks one rank: other ranks never touch its slots.
pub(super) fn check(plan: &Plan, touched: &[Vec<Access>]) -> Result<(), String> {
    let touched: Vec<Vec<Touch>> =
        touched.iter().map(|list| list.iter().map(Touch::new).collect()).collect();
    let clocks = clocks(plan);
    for (j, later) in plan.steps.iter().enumerate() {
        if later.lane == Lane::Comm {
            for (x, a) in touched[j].iter().enumerate() {
                if let Some(row) = touched[j][x + 1..].iter().find_map(|b| a.conflict(b)) {
                    return Err(format!(
                        "rank {}: step {j} ({later}) touches {:?} row {row} twice",
                        plan.rank, a.slot
                    ));
                }
            }
        }
        for (i, earlier) in plan.steps[..j].iter().enumerate() {
            let lane = earlier.lane as usize;
            if earlier.lane == later.lane || clocks[j].known[lane] > clocks[i].place {
                continue;
            }
            let both = touched[i].iter().flat_map(|a| touched[j].iter().map(move |b| (a, b)));
            if let Some((slot, row)) =
                both.filter_map(|(a, b)| Some((a.slot, a.conflict(b)?))).next()
            {
                return Err(format!(
                    "rank {}: nothing orders step {i} ({earlier}) and step {j} ({later}), which both touch {slot:?} row {row}",
                    plan.rank
                ));
            }
        }
    }
    Ok(())
}

/// What is known when a step starts.
struct Clock {
    /// Steps of its own lane before it.
    place: usize,
    /// How many steps of each lane are done.
    known: [usize; 2],
}

/// Vector clocks: a step knows what its lane knows, and what the steps that it waits for knew, and they.
fn clocks(plan: &Plan) -> Vec<Clock> {
    let mut done = [[0usize; 2]; 2];
    let mut signaled: HashMap<Event, [usize; 2]> = HashMap::new();
    let mut out = Vec::new();
    for step in &plan.steps {
        let lane = step.lane as usize;
        let mut known = done[lane];
        for event in &step.waits {
            let other = signaled.get(event).copied().unwrap_or([0, 0]);
            known = [known[0].max(other[0]), known[1].max(other[1])];
        }
        let place = known[lane];
        out.push(Clock { place, known });
        known[lane] += 1;
        done[lane] = known;
        if let Some(event) = step.signal {
            signaled.insert(event, known);
        }
    }
    out
}

/// An access as a set of rows, one bit a row.
struct Touch {
    slot: Slot,
    write: bool,
    bits: Vec<u64>,
}

impl Touch {
    fn new(access: &Access) -> Touch {
        let mut bits = Vec::new();
        for row in access.rows.iter().flat_map(|r| r.iter()) {
            let word = row as usize / 64;
            if word >= bits.len() {
                bits.resize(word + 1, 0);
            }
            bits[word] |= 1u64 << (row % 64);
        }
        Touch { slot: access.slot, write: access.write, bits }
    }

    /// A row that both touch, one of them writing.
    fn conflict(&self, other: &Touch) -> Option<u32> {
        if self.slot != other.slot || !(self.write || other.write) {
            return None;
        }
        let common = self.bits.iter().zip(&other.bits).map(|(a, b)| a & b);
        let (word, bits) = common.enumerate().find(|(_, bits)| *bits != 0)?;
        Some(word as u32 * 64 + bits.trailing_zeros())
    }
}
