//! `plan`: what every rank would do, what that costs, and the proof that it is right. Nothing is computed.

use crate::args::{Command, Failure, Given, failed, opt, usage};
use crate::cost::{self, Cost};
use crate::json::Object;
use crate::shape::{self, Case};
use crate::text::{self, bold, dim, good};
use context_parallel::dtype::DType;
use context_parallel::plan::{Options, Pass, Plan, check::check, json, print, svg};
use context_parallel::problem::Problem;

pub const COMMAND: Command = Command {
    name: "plan",
    about: "what every rank sends, computes and holds, step by step: as a table, as JSON, as a picture, with a proof",
    options: &[
        shape::SPLIT,
        ("what is computed", shape::MASK),
        shape::LENGTHS,
        ("the attention layer", shape::HEADS),
        (
            "output",
            &[
                opt("pass", "PASS", "only forward, or only backward (default: both)"),
                opt("rank", "R", "every step of one rank, instead of the table of all"),
                opt(
                    "check",
                    "",
                    "prove the plans of all ranks together: every allowed pair once, no deadlock, no overwrite",
                ),
                opt("json", "", "everything, as JSON"),
                opt(
                    "svg",
                    "FILE",
                    "pictures of forward, or of --pass: the attention matrix to FILE, the lanes over time to FILE-lanes",
                ),
            ],
        ),
    ],
    examples: &[
        (
            "plan --cp 4 --seq 16 --heads 4 --kv-heads 2 --check",
            "small enough to follow with a pencil",
        ),
        (
            "plan --cp 8 --seq 128k --window 4096,0 --partition contiguous",
            "a sliding window moves only its edge",
        ),
        (
            "plan --cp 8 --comm a2a+p2p --inner 2 --seq 32k --stages 1",
            "teams of two trade heads; the rest in one stage",
        ),
        ("plan --cp 16 --seq 256k --memory-cap 2G", "the fewest stages that fit"),
        ("plan --cp 2 --cu-seqlens 0,100,300,310 --svg plan.svg", "packed documents, drawn"),
        (
            "plan --cp 4 --seq 600 --slices 0:200/0:200,200:600/0:200,200:400/200:400,400:600/400:600",
            "a prompt and two answers that share it",
        ),
    ],
    notes: "Numbers may end in k, m or g: 128k = 131072. Default storage type: bf16.",
};

/// Ranks that a table shows.
const MOST_COLUMNS: usize = 16;

/// Triples of (query, key, head) that --check follows one by one; some tens of seconds.
const MOST_TRIPLES: u64 = 4_000_000_000;

pub fn run(given: &Given) -> Result<(), Failure> {
    let kinds = shape::comm_types(given, "p2p")?;
    let [kind] = kinds[..] else {
        return Err(usage("--comm: plan shows one communication type at a time"));
    };
    let ranks = given.small("cp", 4, 1..=4096)?;
    let seqs = shape::sequences(given, 8192)?;
    let case = Case {
        config: shape::config(given, DType::Bf16)?,
        comm: shape::comm(given, kind)?,
        seqs,
        regions: shape::regions(given)?,
    };
    let problem = case.problem(ranks).map_err(|e| usage(e.text))?;
    let both = [Pass::Forward, Pass::Backward];
    let passes = given.word("pass", both.to_vec(), "forward, backward", |w| match w {
        "forward" => Some(vec![Pass::Forward]),
        "backward" => Some(vec![Pass::Backward]),
        _ => None,
    })?;
    let rank = match given.flag("rank") {
        true => Some(given.small("rank", 0, 0..=ranks - 1)?),
        false => None,
    };
    let plans = both.map(|pass| Plan::all(&problem, pass, Options::default()));
    let cost = Cost::of(&problem, &plans);
    let chosen: Vec<&[Plan]> =
        passes.iter().map(|p| &plans[usize::from(*p == Pass::Backward)][..]).collect();
    let proved = if given.flag("check") { Some(prove(&problem, &cost, &chosen)?) } else { None };
    if let Some(file) = given.text("svg") {
        pictures(file, &chosen, given.flag("json"))?;
    }
    if given.flag("json") {
        let all = chosen.iter().flat_map(|plans| plans.iter());
        let asked: Vec<Plan> = all.filter(|p| rank.is_none_or(|r| r == p.rank)).cloned().collect();
        let made = as_json(&problem, case.comm.kind.name(), &cost, &asked, proved.is_some());
        text::out(&(made + "\n"));
        return Ok(());
    }
    let mut out = headline(&problem, case.comm.kind.name());
    for plans in &chosen {
        match rank {
            Some(rank) => out += &format!("\n{}", plans[rank as usize]),
            None => out += &format!("\n{}", table(plans)),
        }
    }
    out += &format!("\n{}\n{}", bold("Cost"), cost.table());
    if let Some(proved) = proved {
        out += &format!("\n{} {proved}\n", good("✓"));
    }
    text::out(&out);
    Ok(())
}

/// Proves the chosen passes. The text says what was proved.
fn prove(p: &Problem, cost: &Cost, chosen: &[&[Plan]]) -> Result<String, Failure> {
    let triples = cost.triples() * chosen.len() as u64;
    if triples > MOST_TRIPLES {
        return Err(usage(format!(
            "--check follows every (query, key, head) one by one: here {}, at most {}. A shorter --seq or fewer heads prove the same plan's form",
            text::count(triples),
            text::count(MOST_TRIPLES)
        )));
    }
    for plans in chosen {
        check(plans).map_err(|e| {
            failed(format!("the plan is wrong, which is a bug in this library: {e}"))
        })?;
    }
    Ok(format!(
        "Proved, for all {} ranks together: each of the {} allowed (query, key) pairs is computed exactly once per head and pass; sends match\n  \
         receives in peer, rows and order; the exchanges make progress even if each waits for both sides; nothing is overwritten while\n  \
         something still reads it; no row travels that nobody needs.",
        p.ranks,
        text::grouped(cost.pairs())
    ))
}

fn pictures(file: &str, chosen: &[&[Plan]], quiet: bool) -> Result<(), Failure> {
    let (stem, end) = match file.rsplit_once('.') {
        Some((stem, end)) if !end.contains('/') => (stem, format!(".{end}")),
        _ => (file, String::new()),
    };
    let lanes = format!("{stem}-lanes{end}");
    for (name, picture) in
        [(file, svg::attention_matrix(chosen[0])), (&lanes, svg::lanes(chosen[0]))]
    {
        std::fs::write(name, picture).map_err(|e| failed(format!("--svg {name}: {e}")))?;
        if !quiet {
            eprintln!("wrote {name}");
        }
    }
    Ok(())
}

/// What is planned, in one line.
fn headline(p: &Problem, kind: &str) -> String {
    format!("{} · {}\n", bold(&format!("{} ranks, {kind}", p.ranks)), cost::describe(p))
}

/// The step × rank table, in blocks of ranks that fit the terminal; at most sixteen ranks.
fn table(plans: &[Plan]) -> String {
    let limit = text::width().unwrap_or(150).max(60);
    let shown = plans.len().min(MOST_COLUMNS);
    let fits =
        |block: &[Plan]| print::table(block).lines().skip(1).all(|l| l.chars().count() <= limit);
    let (mut out, mut at) = (String::new(), 0);
    while at < shown {
        let end = (at + 1..=shown)
            .rev()
            .find(|end| *end == at + 1 || fits(&plans[at..*end]))
            .unwrap_or(at + 1);
        let block = print::table(&plans[at..end]);
        // The legend once.
        match block.split_once('\n') {
            Some((_, rest)) if at > 0 => out += &format!("\n{rest}"),
            _ => out += &block,
        }
        at = end;
    }
    if shown < plans.len() {
        out += &dim(&format!(
            "ranks {shown} … {} likewise; --rank R shows any one, --json all\n",
            plans.len() - 1
        ));
    }
    out
}

/// The plans as the library writes them (see `plan/json.rs`), and what was found out about them.
fn as_json(p: &Problem, kind: &str, cost: &Cost, plans: &[Plan], proved: bool) -> String {
    Object::default()
        .text("comm", kind)
        .text("summary", &cost::describe(p))
        .raw("cost", cost.json())
        .raw("proved", proved)
        .raw("plan", json::json(plans))
        .end()
}
