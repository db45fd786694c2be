//! The attention matrix: queries down, keys across.

use super::{Canvas, FAINT, caption, colour, px};
use crate::holding::holding;
use crate::mask::Slice;
use crate::partition::{Segment, Side};
use crate::plan::needs::Interval;
use crate::plan::survey::Survey;
use crate::plan::team::team_segments;
use crate::plan::{Op, Plan};
use crate::problem::Problem;
use std::fmt::Write;

/// Pixels of the whole picture's matrices.
const SIZE: f64 = 720.0;
/// More panels than this, and more ranks in the legend, are left out.
const MOST: u32 = 16;

/// The attention matrix of one pass, from the plans of all ranks: every tile has the hue of the rank that computes it, and is the paler
/// the later the stage. The bars along the axes say who holds the queries and the keys. Where ranks trade heads, there is one
/// panel for every share of the heads. Sequences lie one after another, each in its border; those too small to be seen are grey.
pub fn attention_matrix(plans: &[Plan]) -> String {
    let Some(first) = plans.first() else { return Canvas::new(0.0).finish() };
    let p = &*first.problem;
    let panels = p.inner.min(MOST);
    let columns = (1..=panels).find(|c| c * c >= panels).unwrap_or(1);
    let rows = panels.div_ceil(columns);
    let gap = 46.0;
    let side = if columns == 1 { SIZE } else { (SIZE * 1.3 - gap) / f64::from(columns) - gap };
    let tokens = [total(p, Side::Query), total(p, Side::Key)];
    let scale = side / f64::from(tokens[0].max(tokens[1]).max(1));
    let height = f64::from(tokens[0]) * scale;
    let left = 56.0;
    let width = f64::from(columns) * (side + gap);
    let mut canvas = Canvas::new(left + width + 150.0);
    canvas.text(left, 28.0, r#"font-size="18" font-weight="bold""#, "Who computes which attention");
    canvas.text(left, 48.0, format!(r#"fill="{FAINT}""#), caption(plans));
    for panel in 0..panels {
        let x = left + f64::from(panel % columns) * (side + gap);
        let y = 104.0 + f64::from(panel / columns) * (height + gap + 24.0);
        draw_panel(&mut canvas, plans, panel, (x, y), scale);
    }
    canvas.height = 104.0 + f64::from(rows) * (height + gap + 24.0) - 24.0;
    let mut notes = Vec::new();
    if panels < p.inner {
        notes.push(format!("{} more shares of the heads are alike", p.inner - panels));
    }
    if visible(p, scale).contains(&false) {
        notes.push("grey: sequences too small to show".to_string());
    }
    if plans.iter().any(|plan| {
        holding(p, plan.rank, Side::Query).segments.iter().any(|s| blurs(s.step, scale))
    }) {
        notes.push("stripes are finer than the picture: the ranks' colours mix".to_string());
    }
    canvas.text(left, canvas.height - 12.0, format!(r#"fill="{FAINT}""#), notes.join(" · "));
    let bottom = legend(&mut canvas, first, left + width, 104.0);
    canvas.height = canvas.height.max(bottom);
    canvas.finish()
}

/// Hues by rank, lightness by stage.
fn legend(canvas: &mut Canvas, plan: &Plan, x: f64, mut y: f64) -> f64 {
    let (p, stages) = (&*plan.problem, plan.stages);
    canvas.text(x, y, r#"font-weight="bold""#, "computed by");
    for rank in 0..p.ranks.min(MOST) {
        y += 19.0;
        let fill = colour(rank, p.ranks, 0, 1);
        canvas.rect(x, y - 11.0, 14.0, 14.0, format!(r#"fill="{fill}""#));
        canvas.text(x + 21.0, y, "", format!("rank {rank}"));
    }
    if p.ranks > MOST {
        y += 19.0;
        canvas.text(x, y, format!(r#"fill="{FAINT}""#), format!("… to rank {}", p.ranks - 1));
    }
    y += 34.0;
    canvas.text(x, y, r#"font-weight="bold""#, "in stage");
    let shown = stages.min(7);
    for i in 0..=shown {
        let stage = i * stages / shown.max(1);
        y += 19.0;
        let fill = colour(0, p.ranks, stage, stages);
        canvas.rect(x, y - 11.0, 14.0, 14.0, format!(r#"fill="{fill}""#));
        let text = if stage == 0 { "0: own keys".into() } else { stage.to_string() };
        canvas.text(x + 21.0, y, "", text);
    }
    y + 20.0
}

fn total(p: &Problem, side: Side) -> u32 {
    p.seqs.iter().map(|s| s.extent(side).padded).sum()
}

/// Position of each sequence's first true token among all.
fn bases(p: &Problem, side: Side) -> Vec<u32> {
    let mut at = 0;
    let base = |s: &crate::problem::Sequence| {
        let e = s.extent(side);
        at += e.padded;
        at - e.padded + e.before
    };
    p.seqs.iter().map(base).collect()
}

/// Sequences that are drawn tile by tile: the longest, where a rank's part is at least half a pixel, and no more than some
/// tens of thousands of tiles in all.
fn visible(p: &Problem, scale: f64) -> Vec<bool> {
    let size = |i: usize| p.seqs[i].q.len.max(p.seqs[i].k.len);
    let mut order: Vec<usize> = (0..p.seqs.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(size(*i)));
    let most = (25_000 / (2 * p.teams() as usize * p.teams() as usize)).max(1);
    let large = |i: &usize| f64::from(size(*i)) * scale >= 0.5 * f64::from(p.teams());
    let mut out = vec![false; p.seqs.len()];
    order.into_iter().filter(large).take(most).for_each(|i| out[i] = true);
    out
}

/// All tiles of the ranks with one share of the heads.
fn draw_panel(canvas: &mut Canvas, plans: &[Plan], member: u32, at: (f64, f64), scale: f64) {
    let p = &*plans[0].problem;
    let (x, y) = at;
    let [height, width] = [Side::Query, Side::Key].map(|s| f64::from(total(p, s)) * scale);
    let share = &plans[member as usize].share.q;
    let title = match p.inner {
        1 => "keys →".to_string(),
        _ if share.is_empty() => "no heads".to_string(),
        _ => format!("heads {} … {}", share.start, share.end - 1),
    };
    canvas.text(x, y - 18.0, format!(r#"fill="{FAINT}""#), title);
    canvas.text(
        x + width,
        y - 18.0,
        format!(r#"fill="{FAINT}" text-anchor="end""#),
        total(p, Side::Key),
    );
    let turned =
        format!(r#"fill="{FAINT}" transform="rotate(-90 {} {})""#, px(x - 18.0), px(y + height));
    canvas.text(x - 18.0, y + height, turned, "← queries");
    canvas.rect(x, y, width, height, r##"fill="#f6f6f6""##);
    let bases = [bases(p, Side::Query), bases(p, Side::Key)];
    let visible = visible(p, scale);
    for team in 0..p.teams() {
        let plan = &plans[(team * p.inner + member) as usize];
        if !plan.share.q.is_empty() {
            draw_tiles(canvas, plan, &visible, &bases, at, scale);
        }
        holders(canvas, plan, &visible, &bases, at, scale);
    }
    for (i, s) in p.seqs.iter().enumerate() {
        let left = x + f64::from(bases[1][i]) * scale;
        let top = y + f64::from(bases[0][i]) * scale;
        let (w, h) = (f64::from(s.k.len) * scale, f64::from(s.q.len) * scale);
        let style = match visible[i] {
            true => r##"fill="none" stroke="#444444" stroke-width="0.8""##,
            false => r##"fill="#999999""##,
        };
        canvas.rect(left, top, w, h, style);
    }
}

/// Bars along the axes: a rank's queries and keys.
fn holders(
    canvas: &mut Canvas,
    plan: &Plan,
    visible: &[bool],
    bases: &[Vec<u32>; 2],
    at: (f64, f64),
    scale: f64,
) {
    let (p, rank) = (&*plan.problem, plan.rank);
    let mut d = String::new();
    for (side, bases) in [Side::Query, Side::Key].into_iter().zip(bases) {
        let held = holding(p, rank, side).segments;
        for s in held.iter().filter(|s| visible[s.seq as usize]) {
            let first = f64::from(bases[s.seq as usize] + s.start) * scale;
            let pieces = if s.step == 1 { 1 } else { s.len };
            if blurs(s.step, scale) {
                continue;
            }
            let length = if s.step == 1 { f64::from(s.len) * scale } else { scale };
            for i in 0..pieces {
                let from = first + f64::from(i * s.step) * scale;
                let (x, y, w, h) = match side {
                    Side::Query => (at.0 - 12.0, at.1 + from, 8.0, length),
                    Side::Key => (at.0 + from, at.1 - 12.0, length, 8.0),
                };
                let _ = write!(d, "M{} {}h{}v{}h{}z", px(x), px(y), px(w), px(h), px(-w));
            }
        }
    }
    canvas.path(&d, format!(r#"fill="{}""#, colour(rank, p.ranks, 0, 1)));
}

/// Consecutive rows of a buffer that hold evenly spaced tokens of one sequence.
struct Piece {
    row: u32,
    len: u32,
    seq: u32,
    start: u32,
    step: u32,
}

impl Piece {
    fn own(s: &Segment) -> Piece {
        Piece { row: s.offset, len: s.len, seq: s.seq, start: s.start, step: s.step }
    }

    fn arrived(row: u32, owner: &[Segment], i: &Interval) -> Piece {
        let s = &owner[i.segment as usize];
        let start = s.start + i.from * s.step;
        Piece { row, len: i.to - i.from, seq: s.seq, start, step: s.step }
    }
}

fn find(pieces: &[Piece], row: u32) -> Option<&Piece> {
    let index = pieces.partition_point(|p| p.row <= row).checked_sub(1)?;
    Some(&pieces[index]).filter(|p| row < p.row + p.len)
}

/// One rank's tiles, a path a stage.
fn draw_tiles(
    canvas: &mut Canvas,
    plan: &Plan,
    visible: &[bool],
    bases: &[Vec<u32>; 2],
    at: (f64, f64),
    scale: f64,
) {
    let p = &*plan.problem;
    let survey = Survey::new(p, plan.rank, plan.options.pack);
    let pieces = |segments: &[Segment]| -> Vec<Piece> {
        let mut out: Vec<Piece> = segments.iter().map(Piece::own).collect();
        out.sort_by_key(|p| p.row);
        out
    };
    let queries = pieces(&survey.mine.q.segments);
    let own = pieces(&survey.mine.k.segments);
    for stage in 0..=plan.stages {
        let mut d = String::new();
        let mut blurred = false;
        for step in plan.steps.iter().filter(|s| s.stage == stage) {
            let (Op::Attend { slices, .. } | Op::AttendBackward { slices, .. }) = &step.op else {
                continue;
            };
            let mut arrived = Vec::new();
            if stage > 0 {
                for t in &survey.stage(stage).arriving.transfers {
                    let owner = team_segments(p, t.owner, Side::Key);
                    let mut row = t.base;
                    for i in &t.keys {
                        arrived.push(Piece::arrived(row, &owner, i));
                        row += i.to - i.from;
                    }
                }
            }
            let keys = if stage > 0 { &arrived } else { &own };
            for s in slices {
                let (Some(q), Some(k)) = (find(&queries, s.q), find(keys, s.k)) else { continue };
                if !visible[q.seq as usize] {
                    continue;
                }
                let token = |piece: &Piece, row: u32, bases: &[u32]| {
                    bases[piece.seq as usize] + piece.start + (row - piece.row) * piece.step
                };
                let x = at.0 + f64::from(token(k, s.k, &bases[1])) * scale;
                let y = at.1 + f64::from(token(q, s.q, &bases[0])) * scale;
                let step = q.step.max(k.step);
                if step == 1 {
                    outline(&mut d, s, (x, y), scale);
                } else if !blurs(step, scale) {
                    cells(&mut d, s, (x, y), scale, step);
                } else {
                    outline(&mut d, s, (x, y), scale * f64::from(step));
                    blurred = true;
                }
            }
        }
        let fill = colour(plan.rank, p.ranks, stage, plan.stages);
        // Where stripes are finer than the picture, the ranks' colours mix.
        let opacity = if blurred { r#" fill-opacity="0.3""# } else { "" };
        canvas.path(&d, format!(r#"fill="{fill}"{opacity}"#));
    }
}

/// A slice as a polygon: in steps where a row is visible, else with straight edges.
fn outline(d: &mut String, s: &Slice, at: (f64, f64), scale: f64) {
    let (n, m) = (f64::from(s.q_len), f64::from(s.k_len));
    let (lo, hi) = (f64::from(s.lo), f64::from(s.hi));
    let mut points: Vec<(f64, f64)> = Vec::new();
    if scale >= 2.0 && (lo > 1.0 - n || hi < m - 1.0) {
        let mut left = Vec::new();
        for i in 0..s.q_len {
            let keys = s.keys_of(i);
            let (a, b) = (f64::from(keys.start - s.k), f64::from(keys.end - s.k));
            let y = f64::from(i);
            points.extend([(b, y), (b, y + 1.0)]);
            left.extend([(a, y), (a, y + 1.0)]);
        }
        left.reverse();
        points.extend(left);
    } else {
        let mut breaks = vec![0.0, n];
        breaks.extend([-lo, m - lo, -hi, m - hi].iter().filter(|y| **y > 0.0 && **y < n));
        breaks.sort_by(f64::total_cmp);
        breaks.dedup();
        points.extend(breaks.iter().map(|y| ((y + hi + 1.0).clamp(0.0, m), *y)));
        points.extend(breaks.iter().rev().map(|y| ((y + lo).clamp(0.0, m), *y)));
    }
    points.dedup();
    for (i, (x, y)) in points.iter().enumerate() {
        let command = if i == 0 { 'M' } else { 'L' };
        let _ = write!(d, "{command}{} {}", px(at.0 + x * scale), px(at.1 + y * scale));
    }
    d.push('z');
}

/// Are stripes too fine to be drawn cell by cell?
fn blurs(step: u32, scale: f64) -> bool {
    step > 1 && scale * f64::from(step) < 6.0
}

/// A striped slice, cell by cell.
fn cells(d: &mut String, s: &Slice, at: (f64, f64), scale: f64, step: u32) {
    for i in 0..s.q_len {
        for j in s.keys_of(i) {
            let x = at.0 + f64::from((j - s.k) * step) * scale;
            let y = at.1 + f64::from(i * step) * scale;
            let (w, x, y) = (px(scale), px(x), px(y));
            let _ = write!(d, "M{x} {y}h{w}v{w}h{}z", -w);
        }
    }
}
