//! Lanes over time, under a cost model of two numbers.

use super::{Canvas, FAINT, caption, colour};
use crate::plan::{Lane, Message, Op, Pass, Plan, Step, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

/// The steps of all ranks over time: a lane for computing and below it a lane for exchanges. Time is counted in (query, key, head)
/// pairs; a row that is moved costs as many pairs as make all moving half of all computing, and an exchange starts when
/// its last peer comes to it. This shows the order of things and where lanes wait for each other, not how fast anything is.
pub fn lanes(plans: &[Plan]) -> String {
    let Some(first) = plans.first() else { return Canvas::new(0.0).finish() };
    let p = &*first.problem;
    let costs = Costs::new(plans);
    let times = times(plans, &costs);
    let end = times.iter().flatten().map(|t| t.1).fold(1e-9, f64::max);
    let small = plans.len() > 16;
    let (compute, comm, gap) = if small { (7.0, 5.0, 3.0) } else { (20.0, 15.0, 9.0) };
    let (left, width, top) = (70.0, 1080.0, 112.0);
    let mut canvas = Canvas::new(left + width + 30.0);
    canvas.text(
        left,
        28.0,
        r#"font-size="18" font-weight="bold""#,
        "What each rank does over time",
    );
    canvas.text(left, 48.0, format!(r#"fill="{FAINT}""#), caption(plans));
    let model = format!(
        "time = pairs attended and rows moved (a row moved = {:.0} pairs), not a prediction",
        costs.row
    );
    canvas.text(left, 66.0, format!(r#"fill="{FAINT}""#), model);
    let legend = match first.pass {
        Pass::ToHeads | Pass::ToSequence => "above: copies · below: the exchange",
        Pass::Forward => {
            "above: attend the keys of a stage · below: exchange, K: their keys move · paler = later stage · grey = copies"
        }
        Pass::Backward => {
            "above: gradients of a stage · below: exchange, K: its keys move, d: its gradients go home · paler = later stage · grey = copies"
        }
    };
    canvas.text(left, 84.0, format!(r#"fill="{FAINT}""#), legend);
    // Of many ranks, the boxes of one colour are one path: smaller to store.
    let mut boxes: BTreeMap<String, String> = BTreeMap::new();
    for (plan, times) in plans.iter().zip(&times) {
        let y = top + f64::from(plan.rank) * (compute + comm + gap);
        if !small || plan.rank % 4 == 0 {
            let style = r#"text-anchor="end""#;
            canvas.text(left - 10.0, y + compute * 0.5 + 8.0, style, format!("rank {}", plan.rank));
        }
        canvas.rect(left, y, width, compute, r##"fill="#f4f4f4""##);
        canvas.rect(left, y + compute + 1.0, width, comm - 1.0, r##"fill="#f4f4f4""##);
        for (step, (from, to)) in plan.steps.iter().zip(times) {
            let (x, w) = (left + from / end * width, (to - from) / end * width);
            if w < if small { 0.4 } else { 0.05 } {
                continue;
            }
            let (y, h) = match step.lane {
                Lane::Compute => (y, compute),
                Lane::Comm => (y + compute + 1.0, comm - 1.0),
            };
            let fill = match step.op {
                Op::Copy { .. }
                | Op::Fill { .. }
                | Op::Expand { .. }
                | Op::Contract { .. }
                | Op::Delta
                | Op::SinkTerms
                | Op::Reduce { .. } => "#9a9a9a".to_string(),
                _ => colour(plan.rank, p.ranks, step.stage.min(plan.stages), plan.stages),
            };
            if small {
                let d = boxes.entry(fill).or_default();
                let _ = write!(d, "M{:.1} {y}h{w:.1}v{h}h-{w:.1}z", x);
                continue;
            }
            canvas.rect(
                x,
                y,
                w,
                h,
                format!(r##"fill="{fill}" stroke="#ffffff" stroke-width="0.7""##),
            );
            let text = label(step);
            if w > 7.0 * text.chars().count() as f64 + 2.0 {
                let style = r##"text-anchor="middle" font-size="10" fill="#111111""##;
                canvas.text(x + w / 2.0, y + h / 2.0 + 3.5, style, text);
            }
        }
    }
    for (fill, d) in boxes {
        canvas.path(&d, format!(r#"fill="{fill}""#));
    }
    canvas.height = top + plans.len() as f64 * (compute + comm + gap) + 14.0;
    canvas.finish()
}

/// A word for a step's box.
fn label(step: &Step) -> String {
    match &step.op {
        Op::Attend { .. } | Op::AttendBackward { .. } => step.stage.to_string(),
        Op::Exchange { .. } if step.stage == 0 => "heads".to_string(),
        Op::Exchange { sends, recvs } => {
            let moves = |some: [Tensor; 2]| {
                sends.iter().chain(recvs).any(|m| some.contains(&m.slot.tensor))
            };
            let keys = moves([Tensor::K, Tensor::Latent]).then(|| format!("K{}", step.stage));
            let home = moves([Tensor::DK, Tensor::DLatent])
                .then(|| format!("d{}", step.stage.saturating_sub(2)));
            keys.into_iter().chain(home).collect::<Vec<_>>().join(" ")
        }
        _ => String::new(),
    }
}

/// What things cost, in pairs.
struct Costs {
    /// A row of keys and values, moved.
    row: f64,
    /// Bytes of such a row.
    row_bytes: f64,
}

impl Costs {
    fn new(plans: &[Plan]) -> Costs {
        let p = &*plans[0].problem;
        let share = f64::from(plans.iter().map(|p| p.share.kv.len() as u32).max().unwrap_or(1));
        let row_bytes = share * f64::from(p.dim_qk + p.dim_v) * p.dtype.size() as f64;
        let mut unit = Costs { row: 1.0, row_bytes };
        let (mut pairs, mut rows) = (0.0, 0.0);
        for plan in plans {
            for step in &plan.steps {
                match step.lane {
                    Lane::Compute
                        if matches!(step.op, Op::Attend { .. } | Op::AttendBackward { .. }) =>
                    {
                        pairs += unit.of(plan, step);
                    }
                    Lane::Comm => rows += unit.of(plan, step),
                    Lane::Compute => {}
                }
            }
        }
        unit.row = if rows > 0.0 { 0.5 * pairs / rows } else { 1.0 };
        unit
    }

    fn of(&self, plan: &Plan, step: &Step) -> f64 {
        let heads = plan.share.q.len() as f64;
        let moved = |bytes: usize| bytes as f64 / self.row_bytes * self.row;
        match &step.op {
            Op::Attend { slices, .. } => {
                heads * slices.iter().map(|s| s.pairs() as f64).sum::<f64>()
            }
            // Five products instead of two.
            Op::AttendBackward { slices, .. } => {
                2.5 * heads * slices.iter().map(|s| s.pairs() as f64).sum::<f64>()
            }
            Op::Exchange { sends, recvs } => {
                let bytes = |list: &[Message]| {
                    list.iter().map(|m| m.count() as usize * plan.info(m.slot).row_bytes()).sum()
                };
                moved(bytes(sends)).max(moved(bytes(recvs)))
            }
            // Memory is some twenty times as fast as a network.
            Op::Copy { dst, runs, .. } => {
                let rows: usize = runs.iter().map(|r| r.rows as usize).sum();
                0.05 * moved(rows * plan.info(*dst).row_bytes())
            }
            Op::Fill { slot, rows, .. } => {
                let rows: usize = rows.iter().map(|r| r.count as usize).sum();
                0.05 * moved(rows * plan.info(*slot).row_bytes())
            }
            // Next to a stage's pairs it is little, and what it takes is not pairs.
            Op::Expand { .. } | Op::Contract { .. } => 0.0,
            Op::Delta | Op::SinkTerms | Op::Reduce { .. } => 0.0,
        }
    }
}

/// Start and end of every step of every rank.
fn times(plans: &[Plan], costs: &Costs) -> Vec<Vec<(f64, f64)>> {
    let peers = meetings(plans);
    let mut starts: Vec<Vec<Option<f64>>> =
        plans.iter().map(|p| vec![None; p.steps.len()]).collect();
    let mut ends = starts.clone();
    loop {
        let mut moved = false;
        for (rank, plan) in plans.iter().enumerate() {
            let mut free = [Some(0.0f64); 2];
            let mut events: Vec<Option<f64>> = vec![None; plan.events as usize];
            for (index, step) in plan.steps.iter().enumerate() {
                let lane = step.lane as usize;
                let known = step.waits.iter().map(|e| events[*e as usize]);
                let ready = known.fold(free[lane], |a, b| Some(a?.max(b?)));
                if starts[rank][index].is_none() && ready.is_some() {
                    starts[rank][index] = ready;
                    moved = true;
                }
                if ends[rank][index].is_none() {
                    // An exchange goes on when all that are in it have come.
                    let all = peers[rank][index].iter().map(|(r, s)| starts[*r][*s]);
                    let met = all.fold(starts[rank][index], |a, b| Some(a?.max(b?)));
                    if let Some(met) = met {
                        ends[rank][index] = Some(met + costs.of(plan, step));
                        moved = true;
                    }
                }
                free[lane] = ends[rank][index];
                if let Some(event) = step.signal {
                    events[event as usize] = ends[rank][index];
                }
            }
        }
        if !moved {
            break;
        }
    }
    // What never gets to run, in plans that deadlock, takes no time.
    let span = |(start, end): (Option<f64>, Option<f64>)| match (start, end) {
        (Some(start), Some(end)) => (start, end),
        _ => (0.0, 0.0),
    };
    let of_rank =
        |(a, b): (Vec<Option<f64>>, Vec<Option<f64>>)| a.into_iter().zip(b).map(span).collect();
    starts.into_iter().zip(ends).map(of_rank).collect()
}

/// The (rank, step) that every exchange meets: messages between two ranks are matched in order.
fn meetings(plans: &[Plan]) -> Vec<Vec<Vec<(usize, usize)>>> {
    let mut sent: HashMap<(u32, u32), Vec<(usize, usize)>> = HashMap::new();
    let mut received = sent.clone();
    for (rank, plan) in plans.iter().enumerate() {
        for (index, step) in plan.steps.iter().enumerate() {
            let Op::Exchange { sends, recvs } = &step.op else { continue };
            for m in sends {
                sent.entry((plan.rank, m.peer)).or_default().push((rank, index));
            }
            for m in recvs {
                received.entry((m.peer, plan.rank)).or_default().push((rank, index));
            }
        }
    }
    let mut out: Vec<Vec<Vec<(usize, usize)>>> =
        plans.iter().map(|p| vec![Vec::new(); p.steps.len()]).collect();
    for (pair, from) in &sent {
        for (a, b) in from.iter().zip(received.get(pair).into_iter().flatten()) {
            out[a.0][a.1].push(*b);
            out[b.0][b.1].push(*a);
        }
    }
    out
}
