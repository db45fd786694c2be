//! Plans as text: one line a step, and all ranks side by side.

use super::{Kind, Lane, Message, Op, Plan, Rows, Slot, Step};
use std::fmt;

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
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        write!(f, "slots:")?;
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
            Op::Delta => write!(f, "delta"),
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

/// What one rank does in one stage, in a few letters: `A` attends, `D` computes gradients, with the number of pairs; `↓n` key rows
/// arrive, `↩n` gradient rows come home, `⇄n` rows are traded for heads.
fn cell(plan: &Plan, stage: u32) -> String {
    let mut pairs = 0u64;
    let (mut keys, mut returns, mut traded) = (0, 0, 0);
    let mut letter = ' ';
    for step in plan.steps.iter().filter(|s| s.stage == stage) {
        match &step.op {
            Op::Attend { slices, .. } => {
                letter = 'A';
                pairs += slices.iter().map(|s| s.pairs()).sum::<u64>();
            }
            Op::AttendBackward { slices, .. } => {
                letter = 'D';
                pairs += slices.iter().map(|s| s.pairs()).sum::<u64>();
            }
            Op::Exchange { recvs, .. } => {
                for m in recvs {
                    let is = |slot: Slot, kind, tensor| slot.kind == kind && slot.tensor == tensor;
                    if is(m.slot, Kind::Recv, super::Tensor::K) {
                        keys += m.count();
                    } else if is(m.slot, Kind::Return, super::Tensor::DK) {
                        returns += m.count();
                    } else if matches!(m.slot.kind, Kind::Team | Kind::Merge) {
                        traded += m.count();
                    }
                }
            }
            _ => {}
        }
    }
    let mut out = String::new();
    for (mark, count) in [('⇄', traded), ('↓', keys), ('↩', returns)] {
        if count > 0 {
            out += &format!("{mark}{count} ");
        }
    }
    if pairs > 0 {
        out += &format!("{letter}{pairs}");
    }
    if out.is_empty() { "·".into() } else { out.trim_end().into() }
}

/// All ranks' plans as a table: one row a stage, one column a rank. Legend in the first line.
pub fn table(plans: &[Plan]) -> String {
    let last = plans.iter().flat_map(|p| p.steps.iter().map(|s| s.stage)).max().unwrap_or(0);
    let mut rows = vec![
        std::iter::once("stage".to_string())
            .chain(plans.iter().map(|p| format!("rank {}", p.rank)))
            .collect::<Vec<_>>(),
    ];
    for stage in 0..=last {
        rows.push(
            std::iter::once(stage.to_string())
                .chain(plans.iter().map(|p| cell(p, stage)))
                .collect(),
        );
    }
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    let mut out = String::from(
        "A attend, D gradients (pairs) · ↓ key rows in, ↩ gradient rows home, ⇄ rows traded for heads\n",
    );
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, w)| format!("{cell}{}", " ".repeat(w - cell.chars().count())))
            .collect();
        out += line.join("  ").trim_end();
        out.push('\n');
    }
    out
}
