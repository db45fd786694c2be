//! Plans as text: one line a step, and all ranks side by side.

use super::{Kind, Lane, Message, Op, Pass, Plan, Rows, Step, Tensor};
use std::fmt;
use std::ops::Range;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.problem;
        writeln!(
            f,
            "{:?} plan of rank {} of {} (u {} × b {}), heads {}..{} on key heads {}..{}",
            self.pass,
            self.rank,
            p.ranks,
            p.inner,
            p.teams(),
            self.share.q.start,
            self.share.q.end,
            self.share.kv.start,
            self.share.kv.end
        )?;
        writeln!(
            f,
            "s stage · <e waits for event · >e signals it · →rank:slot[rows] sends · ←rank:slot[rows] receives · .h from head"
        )?;
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f, "{index:>4} {step}")?;
        }
        write!(f, "slots [rows, heads, dim], * kept between the passes:")?;
        for s in self.slots.iter().filter(|s| s.slot.kind != Kind::Caller && s.bytes() > 0) {
            write!(
                f,
                " {:?}[{},{},{}]{}",
                s.slot,
                s.rows,
                s.heads,
                s.dim,
                if s.saved { "*" } else { "" }
            )?;
        }
        writeln!(f)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lane = match self.lane {
            Lane::Compute => "compute",
            Lane::Comm => "   comm",
        };
        write!(f, "{lane} s{:<3}", self.stage)?;
        for event in &self.waits {
            write!(f, "<e{event} ")?;
        }
        write!(f, "{}", self.op)?;
        match self.signal {
            Some(event) => write!(f, " >e{event}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Exchange { sends, recvs } => {
                write!(f, "exchange")?;
                for m in sends {
                    write!(f, " →{m}")?;
                }
                for m in recvs {
                    write!(f, " ←{m}")?;
                }
                Ok(())
            }
            Op::Attend { q, k, slices, first, last } => {
                write!(f, "attend {q:?}·{k:?}{}", Work(slices))?;
                if *first {
                    write!(f, " first")?;
                }
                match last {
                    Some((out, lse)) => write!(f, " last→{out:?},{lse:?}"),
                    None => Ok(()),
                }
            }
            Op::AttendBackward { q, k, dk, slices, .. } => {
                write!(f, "grads {q:?}·{k:?}→{dk:?}{}", Work(slices))
            }
            Op::Expand { latent, k, rows } => {
                write!(f, "expand {latent:?}→{k:?} ({} rows)", count(rows))
            }
            Op::Contract { dk, latent, d_latent, rows } => {
                write!(f, "contract {dk:?}·{latent:?}→{d_latent:?} ({} rows)", count(rows))
            }
            Op::Delta => write!(f, "delta"),
            Op::SinkTerms => write!(f, "sink terms"),
            Op::Reduce { src, dst, dst_row, dst_head, max } => {
                let verb = if *max { "largest" } else { "sum" };
                write!(f, "{verb} of {src:?}→{dst:?}[{dst_row}].h{dst_head}")
            }
            Op::Copy { src, src_head, dst, dst_head, heads, runs, add } => {
                let rows: u32 = runs.iter().map(|r| r.rows).sum();
                let verb = if *add { "add" } else { "copy" };
                write!(f, "{verb} {src:?}.h{src_head}→{dst:?}.h{dst_head} ×{heads} ({rows} rows)")
            }
            Op::Fill { slot, rows, value } => {
                write!(
                    f,
                    "fill {slot:?} {value:?} ({} rows)",
                    rows.iter().map(|r| r.count).sum::<u32>()
                )
            }
        }
    }
}

fn count(rows: &[Range<u32>]) -> usize {
    rows.iter().map(Range::len).sum()
}

struct Work<'a>(&'a [crate::mask::Slice]);

impl fmt::Display for Work<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            " {} slices {} pairs",
            self.0.len(),
            self.0.iter().map(|s| s.pairs()).sum::<u64>()
        )
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:?}[", self.peer, self.slot)?;
        for (i, r) in self.rows.iter().take(4).enumerate() {
            write!(f, "{}{r}", if i > 0 { "," } else { "" })?;
        }
        write!(f, "{}]", if self.rows.len() > 4 { ",…" } else { "" })
    }
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let after = u64::from(self.count) * u64::from(self.step) + u64::from(self.count.min(1));
        let end =
            u64::from(self.first) + after - u64::from(self.step) * u64::from(self.count.min(1));
        write!(f, "{}..{end}", self.first)?;
        if self.step > 1 { write!(f, "/{}", self.step) } else { Ok(()) }
    }
}

/// Marks of the table's numbers, in the order of a cell.
const MARKS: [char; 4] = ['⇄', '↓', '↩', 'A'];

/// What one rank does in one stage, in the order of [`MARKS`]: rows that come in, and pairs attended.
fn cell(plan: &Plan, stage: impl Fn(u32) -> bool) -> [u64; 4] {
    let [mut traded, mut keys, mut home, mut pairs] = [0; 4];
    for step in plan.steps.iter().filter(|s| stage(s.stage)) {
        match &step.op {
            Op::Attend { slices, .. } | Op::AttendBackward { slices, .. } => {
                pairs += slices.iter().map(|s| s.pairs()).sum::<u64>();
            }
            Op::Exchange { recvs, .. } => {
                for m in recvs {
                    let rows = u64::from(m.count());
                    match (m.slot.kind, m.slot.tensor) {
                        (Kind::Recv, Tensor::K | Tensor::Latent) => keys += rows,
                        (Kind::Return, Tensor::DK | Tensor::DLatent) => home += rows,
                        (Kind::Team | Kind::Code | Kind::Merge | Kind::Pack, _) => traded += rows,
                        _ => {} // V and dV come with K and dK
                    }
                }
            }
            _ => {}
        }
    }
    [traded, keys, home, pairs]
}

/// Columns of a rank that are wider than this go on below.
const WIDTH: usize = 150;

/// All ranks' plans as a table: one row a stage, one column a rank.
pub fn table(plans: &[Plan]) -> String {
    let Some(first) = plans.first() else { return String::new() };
    let last = plans.iter().flat_map(|p| p.steps.iter().map(|s| s.stage)).max().unwrap_or(0);
    let (title, verb) = match first.pass {
        Pass::Forward => ("forward", "attends"),
        Pass::Backward => ("backward", "differentiates"),
        Pass::ToHeads => ("sequence to heads", "attends"),
        Pass::ToSequence => ("heads to sequence", "attends"),
    };
    let mut out = format!("{title}: A {verb} so many (query, key) pairs, ↓ key rows arrive");
    for (mark, text) in [('⇄', ", ⇄ rows traded for heads"), ('↩', ", ↩ gradient rows come home")]
    {
        let at = MARKS.iter().position(|m| *m == mark).expect("a mark");
        if plans.iter().any(|p| cell(p, |_| true)[at] > 0) {
            out += text;
        }
    }
    out.push('\n');
    let columns: Vec<Vec<String>> = plans.iter().map(|p| column(p, last)).collect();
    let labels: Vec<String> = std::iter::once("stage".to_string())
        .chain((0..=last).map(|stage| stage.to_string()))
        .chain(std::iter::once("all".to_string()))
        .collect();
    let mut at = 0;
    while at < columns.len() {
        let mut width = 5;
        let fits = |c: &&Vec<String>| {
            width += 3 + c[0].chars().count();
            width <= WIDTH
        };
        let count = columns[at..].iter().take_while(fits).count().max(1);
        for (row, label) in labels.iter().enumerate() {
            let cells: Vec<&str> =
                columns[at..at + count].iter().map(|c| c[row].as_str()).collect();
            out += format!("{label:>5}   {}", cells.join("   ")).trim_end();
            out.push('\n');
        }
        at += count;
    }
    out
}

/// A rank's column: heading, stages, sum; all of one width, its numbers right-aligned.
fn column(plan: &Plan, last: u32) -> Vec<String> {
    let mut cells: Vec<[u64; 4]> = (0..=last).map(|stage| cell(plan, |s| s == stage)).collect();
    cells.push(cell(plan, |_| true));
    let width = |mark: usize| cells.iter().map(|c| c[mark].max(1).ilog10() as usize + 1).max();
    let shown: Vec<(usize, usize)> = (0..4)
        .filter(|mark| cells.iter().any(|c| c[*mark] > 0))
        .map(|mark| (mark, width(mark).unwrap_or(1)))
        .collect();
    let line = |cell: &[u64; 4]| {
        let number = |(mark, width): &(usize, usize)| match cell[*mark] {
            0 => " ".repeat(width + 1),
            n => format!("{}{n:>width$}", MARKS[*mark]),
        };
        shown.iter().map(number).collect::<Vec<_>>().join(" ")
    };
    let mut lines = vec![format!("rank {}", plan.rank)];
    lines.extend(cells.iter().map(|c| match line(c) {
        text if text.trim().is_empty() => "·".into(),
        text => text,
    }));
    let width = lines.iter().map(|l| l.chars().count()).max().unwrap_or(0);
    lines.iter().map(|l| format!("{l:<width$}")).collect()
}
