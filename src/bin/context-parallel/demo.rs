//! `demo`: a text, a few processes, and every way to exchange keys and values, against one rank.

use crate::args::{Command, Failure, Given, failed, opt, usage};
use crate::launch;
use crate::place::Place;
use crate::rank::{self, Job};
use crate::report::Report;
use crate::shape::{self, Case};
use crate::source::Source;
use crate::text::{self, Align, Columns, bad, bold, dim};
use crate::{check, oracle, probe};
use context_parallel::attention::Comm;
use context_parallel::dtype::DType;
use context_parallel::holding::stretches;
use context_parallel::partition::{Side, Stretch};
use context_parallel::plan::{Options, Pass, Plan, account::account};
use context_parallel::problem::{CommType, Problem, Sequence};
use context_parallel::regions::Regions;
use std::sync::Arc;
use std::time::Duration;

/// The text that ships with the tool.
const TEXT: &str = include_str!("demo.txt");

pub const COMMAND: Command = Command {
    name: "demo",
    about: "watch a few processes compute exact causal attention over a text, each way of exchanging checked against one rank",
    options: &[
        (
            "the text and the ranks",
            &[
                opt(
                    "text",
                    "FILE",
                    "whose bytes become the tokens (default: a text that ships with the tool)",
                ),
                opt("seq-limit", "L", "use at most the first L bytes (default 16k)"),
                opt("ranks", "N", "processes, 2 to 64 (default 4)"),
                opt("threads", "N", "threads of each process (default: cores / ranks, at least 1)"),
                opt(
                    "timeout",
                    "SECONDS",
                    "how long a rank waits for another before it gives up (default 60)",
                ),
            ],
        ),
        ("the attention layer", shape::HEADS),
        ("what travels", &[shape::KV_WIRE]),
    ],
    examples: &[
        ("demo", "four processes, 8 query heads on 2 key heads, fp32"),
        ("demo --ranks 3 --heads 6 --kv-heads 3 --dtype bf16", "nothing needs to divide anything"),
        ("demo --text README.md --seq-limit 2k", "your own text"),
    ],
    notes: "Every byte is a token. A fixed, seeded table makes it a vector; queries and keys are turned by their position (RoPE).\n\
            The command fails if any result differs from one rank's by more than rounding. With --kv-wire one rank rounds keys and values too, and its\n\
            line shows what that costs.",
};

/// What all ranks run, from the options and the text.
pub fn job(given: &Given, mut bytes: Vec<u8>) -> Result<Job, Failure> {
    probe::simd()?;
    let config = shape::config(given, DType::F32)?;
    let ranks = given.small("ranks", 4, 2..=64)?;
    bytes.truncate(given.number("seq-limit", 16 << 10, 1..=1 << 24)? as usize);
    let seqs = vec![Sequence::square(bytes.len() as u32)];
    let case = |kind| Case {
        config: config.clone(),
        comm: Comm::of(kind),
        seqs: seqs.clone(),
        regions: Regions::default(),
    };
    let threads = given.number("threads", (probe::cores() / u64::from(ranks)).max(1), 1..=1024)?;
    Ok(Job {
        cases: CommType::ALL.into_iter().map(case).collect(),
        ranks,
        source: Source::Text(bytes),
        threads: threads as usize,
        warmup: 0,
        iters: 1,
        gather: true,
        timeout: Duration::from_secs(given.number("timeout", 60, 1..=86_400)?),
        place: Place::Cpu,
    })
}

pub fn run(given: &Given) -> Result<(), Failure> {
    let bytes = match given.text("text") {
        None => TEXT.as_bytes().to_vec(),
        Some(file) => std::fs::read(file).map_err(|e| failed(format!("--text {file}: {e}")))?,
    };
    if bytes.is_empty() {
        return Err(failed(format!("--text {}: is empty", given.text("text").unwrap_or(""))));
    }
    let job = job(given, bytes)?;
    let problem = job.cases[0].problem(job.ranks).map_err(|e| usage(e.text))?;
    let Source::Text(bytes) = &job.source else { unreachable!("a demo's source is a text") };
    introduce(&job, &problem, bytes);

    let columns = Columns::new(&COLUMNS);
    text::out(&format!(
        "{}\n{}",
        bold("The same attention, five times"),
        columns.line(&COLUMNS.map(|(head, ..)| dim(head)))
    ));
    let threads = (probe::cores() as usize).min(job.threads * job.ranks as usize);
    let alone = rank::alone(&job, &job.cases[0], threads)?;
    let one = check::gather(&*job.cases[0].alone()?, std::slice::from_ref(&alone));
    let exact = oracle::errors(&*job.cases[0].alone()?, &job.source, &one);
    let dtype = job.cases[0].config.dtype;
    // Keys and values in 8 bits are another problem than the exact one: its line says by how much.
    let rounded = job.cases[0].config.kv_wire.is_some();
    text::out(&columns.line(&first_row(&alone, &exact, dtype, rounded)));
    let mut wrong = Vec::new();
    if !rounded && !check::agree(&exact, dtype) {
        wrong.push("one rank differs from float64".to_string());
    }
    launch::processes(&job, "demo", given, bytes, &mut |index, reports| {
        let (row, fault) = row(&job, &job.cases[index], &reports, &one)?;
        text::out(&columns.line(&row));
        wrong.extend(fault);
        Ok(())
    })?;
    finish(&job, &wrong)
}

const COLUMNS: [(&str, Align, usize); 12] = [
    ("", Align::Left, 10),
    ("stages", Align::Right, 6),
    ("sent fwd", Align::Right, 8),
    ("sent bwd", Align::Right, 8),
    ("forward", Align::Right, 7),
    ("backward", Align::Right, 8),
    ("O", Align::Right, 6),
    ("LSE", Align::Right, 6),
    ("dQ", Align::Right, 6),
    ("dK", Align::Right, 6),
    ("dV", Align::Right, 6),
    ("", Align::Left, 1),
];

fn introduce(job: &Job, p: &Problem, bytes: &[u8]) {
    let cores = probe::cores();
    let mut out = format!(
        "{} {} · exact attention over a sequence that is split across ranks\n\n",
        bold("context-parallel"),
        env!("CARGO_PKG_VERSION")
    );
    out += &format!(
        "{}  {} bytes; every byte is a token and may look at all bytes up to itself (causal)\n",
        bold("The text "),
        text::grouped(bytes.len() as u64)
    );
    out += &format!(
        "{}  {}, {}, {} elements each, {}; forward and backward\n",
        bold("The layer"),
        text::plural(p.heads.into(), "query head"),
        text::plural(p.kv_heads.into(), "key head"),
        p.dim_qk,
        p.dtype.name()
    );
    out += &format!(
        "{}  {} processes with {} each, over shared memory, on {} ({}){}\n\n",
        bold("The ranks"),
        job.ranks,
        text::plural(job.threads as u64, "thread"),
        text::plural(cores, "core"),
        probe::simd_name(),
        if u64::from(job.ranks) > cores {
            " — more ranks than cores, so they take turns"
        } else {
            ""
        }
    );
    out += &format!(
        "{} {} chunks; rank r holds chunks r and {}−r (zigzag), so that all have equal work\n",
        bold("Who holds what:"),
        2 * job.ranks,
        2 * job.ranks - 1
    );
    text::out(&(out + &chunks(p, bytes) + "\n"));
}

/// The text's chunks in order, with their ranks and first words.
fn chunks(p: &Problem, bytes: &[u8]) -> String {
    let mut all: Vec<(Stretch, u32)> = (0..p.ranks)
        .flat_map(|r| stretches(p, r, Side::Query).into_iter().map(move |s| (s, r)))
        .collect();
    all.sort_by_key(|(s, _)| s.start);
    let digits = bytes.len().to_string().len();
    let room = text::width().unwrap_or(100).saturating_sub(2 * digits + 24).clamp(16, 80);
    let line = |(s, r): &(Stretch, u32)| {
        let (from, to) = (s.start as usize, (s.start + s.len) as usize);
        let words = String::from_utf8_lossy(&bytes[from..to.min(from + 4 * room)])
            .chars()
            .map(|c| if c.is_control() || c.is_whitespace() { ' ' } else { c })
            .collect::<String>();
        let mut words = words.split_whitespace().collect::<Vec<_>>().join(" ");
        if words.chars().count() > room {
            words = words.chars().take(room - 1).collect::<String>() + "…";
        }
        let bar = text::rank(*r, &format!("▌rank {r:<2}"));
        let span = dim(&format!("{from:>digits$} – {:<digits$}", to - 1));
        format!("  {bar} {span}  {}\n", text::rank(*r, &words))
    };
    if all.len() <= 16 {
        return all.iter().map(line).collect();
    }
    let last = all.len() - 4;
    let middle = dim(&format!("  … {} more chunks …\n", all.len() - 8));
    all[..4].iter().map(line).collect::<String>()
        + &middle
        + &all[last..].iter().map(line).collect::<String>()
}

/// One rank's line: what the others are compared to, itself compared to float64.
fn first_row(alone: &Report, exact: &[f64; 5], dtype: DType, rounded: bool) -> Vec<String> {
    let mut row = vec![bold("one rank"), String::new(), String::new(), String::new()];
    row.extend([0, 1].map(|pass| text::seconds(alone.passes[pass].seconds[0])));
    match rounded {
        true => row.extend(exact.map(text::error)),
        false => row.extend(shown(exact, dtype)),
    }
    row.push(if rounded { "≈".to_string() } else { mark(check::agree(exact, dtype)) });
    row
}

/// Errors; those that are too large stand out.
fn shown(errors: &[f64; 5], dtype: DType) -> Vec<String> {
    let cell = |(e, limit): (&f64, f64)| {
        if *e <= limit { text::error(*e) } else { bad(&text::error(*e)) }
    };
    errors.iter().zip(check::tolerance(dtype)).map(cell).collect()
}

fn mark(right: bool) -> String {
    if right { text::good("✓") } else { bad("✗") }
}

/// One line of the table, and what is wrong with it.
fn row(
    job: &Job,
    case: &Case,
    reports: &[Report],
    one: &check::Whole,
) -> Result<(Vec<String>, Option<String>), Failure> {
    let p = case.problem(job.ranks)?;
    let name = case.comm.kind.name();
    let errors = check::errors(&p, &check::gather(&p, reports), one);
    let slowest =
        |pass: usize| reports.iter().map(|r| r.passes[pass].seconds[0]).fold(0.0, f64::max);
    let sent = |pass: usize| {
        reports.iter().map(|r| r.passes[pass].sent).sum::<u64>() / u64::from(job.ranks)
    };
    let equal = check::agree(&errors, p.dtype);
    let planned = as_planned(&p, reports);
    let fault = match (equal, planned) {
        (false, _) => Some(format!("{name} differs from one rank")),
        (_, false) => Some(format!("{name} moved other bytes than its plan says")),
        _ => None,
    };
    let stages = if p.stages == 0 { "–".into() } else { p.stages.to_string() };
    let mut row = vec![bold(name), stages];
    row.extend([0, 1].map(|pass| text::bytes(sent(pass))));
    row.extend([0, 1].map(|pass| text::seconds(slowest(pass))));
    row.extend(shown(&errors, p.dtype));
    row.push(mark(fault.is_none()));
    Ok((row, fault))
}

/// Every rank moved exactly the bytes of its plan.
fn as_planned(p: &Arc<Problem>, reports: &[Report]) -> bool {
    [Pass::Forward, Pass::Backward].into_iter().enumerate().all(|(i, pass)| {
        reports.iter().enumerate().all(|(rank, report)| {
            let a = account(&Plan::new(p, rank as u32, pass, Options::default()));
            (a.sent, a.received) == (report.passes[i].sent, report.passes[i].received)
        })
    })
}

fn finish(job: &Job, wrong: &[String]) -> Result<(), Failure> {
    let case = &job.cases[0];
    let limit = check::tolerance(case.config.dtype)[0];
    let inner = CommType::A2aP2p.inner(job.ranks, 0).unwrap_or(1);
    let teams = match inner {
        1 => format!("both; but {} ranks make no even teams, so here as p2p", job.ranks),
        u => format!("both: teams of {u} trade, keys and values go between teams"),
    };
    text::out(&dim(&format!(
        "\n  p2p         keys and values arrive from one rank at a time; their gradients go home the same way\n  \
           all_gather  they arrive from all ranks at once\n  \
           a2a         ranks trade: the whole sequence for a share of the heads, and back\n  \
           a2a+p2p     {teams}\n\n  \
         Sent is the mean of a rank, and equal to the plan's account to the byte. Times are the slowest rank's first call.\n  \
         O … dV: the worst error of a head, relative (LSE: absolute, as it is a logarithm): of the four against one rank, 64\n  \
         rows at a time; of one rank against float64 double loops, over {} rows.\n",
        oracle::ROWS,
    )));
    if !wrong.is_empty() {
        text::out("\n");
        return Err(failed(format!("{} (allowed is {limit:.0e})", wrong.join("; "))));
    }
    text::out(&format!(
        "\n{} All four give the answer of one rank, forward and backward, up to the rounding of {} (allowed {limit:.0e}).\n",
        text::good("✓"),
        case.config.dtype.name()
    ));
    let (cp, seq) = (job.ranks, case.seqs[0].q.len);
    let plan = format!("context-parallel plan --cp {cp} --seq {seq}");
    let perf = format!("context-parallel perf --cp {cp}");
    let width = plan.len().max(perf.len());
    text::out(&dim(&format!(
        "  Next: {plan:<width$}   who sends what to whom, and what it costs\n"
    )));
    text::out(&dim(&format!(
        "        {perf:<width$}   how fast, for longer and longer sequences\n"
    )));
    Ok(())
}
