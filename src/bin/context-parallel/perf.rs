//! `perf`: time, rate, bytes, exposed communication and error, size by size, next to one rank on the same cores.

use crate::args::{Command, Failure, Given, opt, usage};
use crate::check::{self, Whole};
use crate::json::{Object, array};
use crate::rank::{self, Job};
use crate::report::Report;
use crate::row::{COLUMNS, Row};
use crate::shape::{self, Case};
use crate::source::Source;
use crate::text::{self, Columns, dim};
use crate::{cost, launch, place, probe};
use context_parallel::dtype::DType;
use context_parallel::plan::{Options, Pass, Plan, account::account};
use context_parallel::problem::Problem;
use std::io::IsTerminal;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const COMMAND: Command = Command {
    name: "perf",
    about: "time forward and backward for a range of lengths, next to one rank on the same cores",
    options: &[
        (
            "what is run",
            &[
                opt("min-seq", "L", "shortest sequence (default 1k)"),
                opt("max-seq", "L", "longest; every length is twice the one before (default 4k)"),
                opt("iters", "N", "timed runs; the median is shown (default 5)"),
                opt("warmup", "N", "runs before that (default 1)"),
                opt("threads", "N", "threads of each rank (default: cores / ranks, at least 1)"),
                opt(
                    "processes",
                    "",
                    "ranks are processes over shared memory (default: threads of this process)",
                ),
                opt(
                    "timeout",
                    "SECONDS",
                    "how long a rank waits for another before it gives up (default 60)",
                ),
                opt(
                    "device",
                    "NAME",
                    "cpu or cuda: ranks share the devices in turns (default cpu)",
                ),
                opt(
                    "transport",
                    "NAME",
                    "on CUDA: auto, local (threads), nccl, staged (default auto)",
                ),
                opt("sm-margin", "N", "on CUDA: multiprocessors that kernels leave to others"),
                opt("deterministic", "", "on CUDA: dQ is added in a fixed order"),
                opt("no-check", "", "do not compare the results with one rank's"),
                opt("json", "", "one JSON object at the end instead of the table"),
            ],
        ),
        shape::SPLIT,
        ("what is computed", shape::MASK),
        shape::LENGTHS,
        ("the attention layer", shape::HEADS),
    ],
    examples: &[
        ("perf", "all four communication types on this machine's cores"),
        (
            "perf --cp 2 --comm p2p,a2a --min-seq 2k --max-seq 16k --dtype bf16",
            "two types, four lengths",
        ),
        ("perf --cp 4 --processes --seq 4k --iters 9", "one length, processes over shared memory"),
        ("perf --cp 2 --window 512,0 --seq 8k --json", "for a program"),
        (
            "perf --device cuda --cp 8 --dtype bf16 --seq 64k --heads 64 --kv-heads 8",
            "eight virtual ranks on the devices of this machine",
        ),
    ],
    notes: "Numbers may end in k, m or g: 8k = 8192. With --seq, --lens or --cu-seqlens one size is run.\n\
            Columns: GFLOP/s per rank counts what the mask allows; sent is the mean of a rank; exposed is the share of the time in which\n\
            ranks stood waiting for rows; vs one is one rank's time on the same cores divided by this (100 % = context parallelism is free).",
};

/// What all ranks run.
pub fn job(given: &Given) -> Result<Job, Failure> {
    probe::simd()?;
    let place = place::place(given)?;
    // CUDA's kernels have no fp32.
    let usual = if place == place::Place::Cpu { DType::F32 } else { DType::Bf16 };
    let mut config = shape::config(given, usual)?;
    config.deterministic = given.flag("deterministic");
    let default = probe::cores().clamp(2, 4) as u32;
    let ranks = given.small("cp", default, 2..=1024)?;
    let mut cases = Vec::new();
    for seq in sizes(given)? {
        for kind in shape::comm_types(given, "all")? {
            let seqs = shape::sequences(given, seq)?;
            let case = Case {
                config: config.clone(),
                comm: shape::comm(given, kind)?,
                seqs,
                regions: shape::regions(given)?,
            };
            case.problem(ranks).map_err(|e| usage(format!("{}: {}", kind.name(), e.text)))?;
            cases.push(case);
        }
    }
    let threads = given.number("threads", (probe::cores() / u64::from(ranks)).max(1), 1..=1024)?;
    Ok(Job {
        cases,
        ranks,
        source: Source::Random,
        threads: threads as usize,
        warmup: given.number("warmup", 1, 0..=1000)? as usize,
        iters: given.number("iters", 5, 1..=100_000)? as usize,
        gather: !given.flag("no-check"),
        timeout: Duration::from_secs(given.number("timeout", 60, 1..=86_400)?),
        place,
    })
}

fn sizes(given: &Given) -> Result<Vec<u32>, Failure> {
    let most = u32::MAX / 4;
    let one = ["seq", "lens", "cu-seqlens"].into_iter().find(|o| given.flag(o));
    let range = ["min-seq", "max-seq"].into_iter().find(|o| given.flag(o));
    match (one, range) {
        (Some(one), Some(range)) => {
            return Err(usage(format!("--{range}: --{one} says the length already")));
        }
        (Some(_), None) => return Ok(vec![1]),
        _ => {}
    }
    let least = given.small("min-seq", 1 << 10, 1..=most)?;
    let last = given.small("max-seq", least.max(4 << 10), 1..=most)?;
    if last < least {
        return Err(usage(format!("--max-seq: got {last}, less than --min-seq {least}")));
    }
    Ok(std::iter::successors(Some(least), |n| n.checked_mul(2))
        .take_while(|n| *n <= last)
        .collect())
}

/// What is remembered of a size that was run on one rank.
struct Alone {
    problem: Arc<Problem>,
    seconds: [f64; 2],
    whole: Option<Whole>,
}

pub fn run(given: &Given) -> Result<(), Failure> {
    let job = job(given)?;
    let (json, processes) = (given.flag("json"), given.flag("processes"));
    let columns = Columns::new(&COLUMNS);
    if !json {
        text::out(
            &(preamble(&job, processes)? + &columns.line(&COLUMNS.map(|(head, ..)| dim(head)))),
        );
    }
    let threads = (probe::cores() as usize).min(job.threads * job.ranks as usize);
    let mut rows: Vec<Row> = Vec::new();
    let mut alone: Option<Alone> = None;
    let mut progress = Progress::new(job.cases.len());
    progress.next(&job, 0);
    let mut on_case = |index: usize, reports: Vec<Report>| {
        let case = &job.cases[index];
        let mut made = Vec::new();
        let one = case.alone()?;
        if alone.as_ref().is_none_or(|a| a.problem != one) {
            let report = rank::alone(&job, case, threads)?;
            let (row, seconds) = one_rank(&one, &report);
            let whole = job.gather.then(|| check::gather(&one, std::slice::from_ref(&report)));
            alone = Some(Alone { problem: one, seconds, whole });
            made.push(row);
        }
        made.extend(alone.as_ref().map(|a| many(&job, case, &reports, a)).transpose()?);
        progress.clear();
        for row in made {
            if !json {
                text::out(&columns.line(&row.cells()));
            }
            rows.push(row);
        }
        progress.next(&job, index + 1);
        Ok(())
    };
    match processes {
        true => launch::processes(&job, "perf", given, &[], &mut on_case)?,
        false => launch::threads(&job, &mut on_case)?,
    }
    finish(&job, &rows, json, processes)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median over the runs of the slowest rank's time.
fn slowest(reports: &[Report], pass: usize) -> f64 {
    let runs = reports[0].passes[pass].seconds.len();
    let of_run = |i: usize| reports.iter().map(|r| r.passes[pass].seconds[i]).fold(0.0, f64::max);
    median((0..runs).map(of_run).collect())
}

fn flops(p: &Arc<Problem>) -> [f64; 2] {
    [Pass::Forward, Pass::Backward].map(|pass| {
        let plans = Plan::all(p, pass, Options::default());
        plans.iter().map(|plan| account(plan).flops as f64).sum()
    })
}

/// Longest sequence of the problem, or all tokens where they are packed.
fn length(p: &Problem) -> u64 {
    let lens = p.seqs.iter().map(|s| u64::from(s.q.padded));
    if p.packed { lens.sum() } else { lens.max().unwrap_or(0) }
}

fn one_rank(p: &Arc<Problem>, report: &Report) -> (Row, [f64; 2]) {
    let seconds = [0, 1].map(|pass| slowest(std::slice::from_ref(report), pass));
    let total = flops(p);
    let row = Row {
        seq: length(p),
        comm: "one rank",
        dtype: p.dtype,
        stages: None,
        seconds,
        rate: [0, 1].map(|i| total[i] / seconds[i] * 1e-9),
        sent: [0, 0],
        exposed: [0.0, 0.0],
        versus: [1.0, 1.0],
        errors: None,
        agrees: true,
    };
    (row, seconds)
}

fn many(job: &Job, case: &Case, reports: &[Report], one: &Alone) -> Result<Row, Failure> {
    let p = case.problem(job.ranks)?;
    let seconds = [0, 1].map(|pass| slowest(reports, pass));
    let total = flops(&p);
    let exposed = |pass: usize| {
        let time: f64 = reports.iter().flat_map(|r| &r.passes[pass].seconds).sum();
        reports.iter().map(|r| r.passes[pass].exposed).sum::<f64>() / time
    };
    let sent = |pass: usize| {
        reports.iter().map(|r| r.passes[pass].sent).sum::<u64>() / u64::from(job.ranks)
    };
    let errors =
        one.whole.as_ref().map(|whole| check::errors(&p, &check::gather(&p, reports), whole));
    Ok(Row {
        seq: length(&p),
        comm: case.comm.kind.name(),
        dtype: p.dtype,
        stages: Some(p.stages),
        seconds,
        rate: [0, 1].map(|i| total[i] / f64::from(job.ranks) / seconds[i] * 1e-9),
        sent: [0, 1].map(sent),
        exposed: [0, 1].map(exposed),
        versus: [0, 1].map(|i| one.seconds[i] / seconds[i]),
        errors,
        agrees: errors.is_none_or(|e| check::agree(&e, p.dtype)),
    })
}

fn preamble(job: &Job, processes: bool) -> Result<String, Failure> {
    let p = job.cases[0].problem(job.ranks)?;
    let (cores, want) = (probe::cores(), job.threads as u64 * u64::from(job.ranks));
    let over = if want > cores {
        format!(
            " — {want} threads take turns on {cores} cores, so waiting includes waiting for a core"
        )
    } else {
        String::new()
    };
    let line = |text: String| dim(&format!("# {text}")) + "\n";
    let device = job.place.describe()?.map_or(String::new(), |d| line(format!("on CUDA: {d}; ranks may share a device, then one rank's time is that of the same work alone")));
    Ok([
        format!("context-parallel perf {} · {}, {cores} cores, {}", env!("CARGO_PKG_VERSION"), probe::cpu_name(), probe::simd_name()),
        format!(
            "{} ranks as {}, {} each{over}",
            job.ranks,
            if processes { "processes over shared memory" } else { "threads of one process" },
            text::plural(job.threads as u64, "thread")
        ),
        format!("one rank alone has {}", text::plural(want.min(cores), "thread")),
        cost::layer(&p),
        format!("median of {} after {} warm-up; error: the worst of O, dQ, dK, dV, relative to one rank", job.iters, job.warmup),
    ]
    .map(line)
    .concat()
        + &device
        + "\n")
}

fn finish(job: &Job, rows: &[Row], json: bool, processes: bool) -> Result<(), Failure> {
    let dtype = job.cases[0].config.dtype;
    let wrong: Vec<String> =
        rows.iter().filter(|r| !r.agrees).map(|r| format!("{} at {}", r.comm, r.seq)).collect();
    if json {
        let p = job.cases[0].problem(job.ranks)?;
        let out = Object::default()
            .text("version", env!("CARGO_PKG_VERSION"))
            .text("cpu", &probe::cpu_name())
            .raw("cores", probe::cores())
            .text("simd", probe::simd_name())
            .maybe("device", job.place.describe()?.as_deref())
            .raw("ranks", job.ranks)
            .text("ranks_are", if processes { "processes" } else { "threads" })
            .raw("threads_per_rank", job.threads)
            .raw("iters", job.iters)
            .raw("warmup", job.warmup)
            .raw("problem", cost::problem_json(&p))
            .raw("rows", array(rows.iter().map(Row::json)))
            .end();
        text::out(&(out + "\n"));
    } else if job.gather && wrong.is_empty() {
        let limit = check::tolerance(dtype)[0];
        text::out(&dim(&format!(
            "\n# all results equal one rank's up to the rounding of {} (below {limit:.0e})\n",
            dtype.name()
        )));
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => {
            Err(crate::args::failed(format!("other results than one rank's: {}", wrong.join(", "))))
        }
    }
}

/// What is being run now, on stderr: on a terminal always, elsewhere every ten seconds.
struct Progress {
    total: usize,
    began: Instant,
    told: Instant,
    terminal: bool,
}

impl Progress {
    fn new(total: usize) -> Progress {
        let now = Instant::now();
        Progress { total, began: now, told: now, terminal: std::io::stderr().is_terminal() }
    }

    fn next(&mut self, job: &Job, index: usize) {
        let Some(case) = job.cases.get(index) else { return };
        let what = format!(
            "[{}/{}] {} tokens, {}, {:.0} s so far",
            index + 1,
            self.total,
            case.seqs.iter().map(|s| u64::from(s.q.padded)).sum::<u64>(),
            case.comm.kind.name(),
            self.began.elapsed().as_secs_f64()
        );
        if self.terminal {
            eprint!("\r\x1b[K{what}");
        } else if self.told.elapsed() > Duration::from_secs(10) {
            self.told = Instant::now();
            eprintln!("{what}");
        }
    }

    fn clear(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
