//! `schedule`: which samples run on which ranks.

use crate::args::{Command, Failure, Given, opt, usage};
use crate::compare;
use crate::json::{Object, array};
use crate::text::{self, Align, bold, dim};
use context_parallel::schedule::cost::Cost;
use context_parallel::schedule::{Batch, Placement, Schedule, dynamic, megatron, nested};

pub const COMMAND: Command = Command {
    name: "schedule",
    about: "which samples of a batch run on which ranks, and on how many; the same for Megatron's schedulers, compared",
    options: &[
        (
            "the samples",
            &[
                opt("lengths", "LIST", "their tokens, separated by commas"),
                opt(
                    "documents",
                    "FILE",
                    "draw them instead: rows of \"[least, most]\",count,… as in tests/data/doc_length_distribution.csv",
                ),
                opt("tokens", "N", "tokens of a batch that is drawn (default 256k)"),
                opt("seed", "N", "which batches are drawn (default 1)"),
            ],
        ),
        (
            "the ranks",
            &[
                opt("ranks", "N", "how many, dp·cp in Megatron's words (default 8)"),
                opt(
                    "tokens-per-rank",
                    "M",
                    "most tokens a rank holds at once, Megatron's max-seqlen-per-dp-cp-rank (default 8k)",
                ),
            ],
        ),
        (
            "how",
            &[
                opt(
                    "scheduler",
                    "NAME",
                    "nested (default; ours does too), megatron (BalancedCPScheduler), dynamic (its dev branch), dp-balanced",
                ),
                opt(
                    "cp",
                    "P",
                    "smallest cp size of dynamic, the cp size of dp-balanced (default 1)",
                ),
                opt(
                    "cost",
                    "LIST",
                    "seconds per pair,token,wired token,further rank,call (default: a layer of Llama 3 8B on H100s)",
                ),
            ],
        ),
        (
            "comparison",
            &[
                opt(
                    "compare",
                    "",
                    "nested against megatron and dynamic on many batches drawn from --documents; fails if it is ever slower than megatron",
                ),
                opt(
                    "batches",
                    "N",
                    "how many (default 1000); without --ranks for each of several sizes",
                ),
            ],
        ),
        ("output", &[opt("json", "", "everything, as JSON")]),
    ],
    examples: &[
        (
            "schedule --lengths 60k,9000,3000,3000,700,500,80 --ranks 8",
            "one long sample, a few short ones",
        ),
        (
            "schedule --lengths 60k,9000,3000,3000,700,500,80 --ranks 8 --scheduler megatron",
            "what Megatron makes of them",
        ),
        (
            "schedule --documents tests/data/doc_length_distribution.csv --compare --batches 20",
            "how much faster, and how far from the best possible",
        ),
    ],
    notes: "Numbers may end in k, m or g: 128k = 131072. Times are of one layer, forward and backward, by the model that\n\
            `cargo doc` describes at context_parallel::schedule::cost; only their ratios matter.",
};

/// Packs that the table shows.
const MOST_PACKS: usize = 100;
/// Samples of a pack that it names.
const MOST_NAMES: usize = 8;

pub fn run(given: &Given) -> Result<(), Failure> {
    let cost = cost(given)?;
    if given.flag("compare") {
        return compare::run(given, &cost);
    }
    let (ranks, tokens_per_rank) = compare::size(given)?;
    let lengths = match (given.list("lengths")?, given.text("documents")) {
        (Some(lengths), None) => lengths,
        (None, Some(file)) => {
            let tokens = given.number("tokens", 256 << 10, 1..=1 << 30)?;
            let longest = u64::from(ranks) * u64::from(tokens_per_rank);
            compare::Documents::read(file)?.batch(
                given.number("seed", 1, 0..=u64::MAX)?,
                tokens,
                longest,
            )
        }
        _ => return Err(usage("schedule: needs either --lengths or --documents")),
    };
    let batch = Batch { lengths: &lengths, ranks, tokens_per_rank };
    let (name, made) = scheduled(given, &batch, &cost).map_err(|e| usage(e.text))?;
    text::out(&if given.flag("json") {
        json(name, &made, &batch, &cost)
    } else {
        table(name, &made, &batch, &cost)
    });
    Ok(())
}

fn cost(given: &Given) -> Result<Cost, Failure> {
    let Some(list) = given.text("cost") else { return Ok(Cost::default()) };
    let numbers: Vec<f64> = list.split(',').filter_map(|w| w.trim().parse().ok()).collect();
    let [pair, token, wire, rank, call] = numbers[..] else {
        return Err(usage(format!(
            "--cost: got {list:?}, want five numbers: pair,token,wire,rank,call"
        )));
    };
    let cost = Cost { pair, token, wire, rank, call };
    cost.check().map_err(|e| usage(format!("--cost: {}", e.text)))?;
    Ok(cost)
}

fn scheduled(
    given: &Given,
    batch: &Batch,
    cost: &Cost,
) -> Result<(&'static str, Schedule), context_parallel::error::Error> {
    let wrong = |_| context_parallel::error::Error::argument("--cp or --scheduler: see --help");
    let cp = given.small("cp", 1, 1..=1 << 16).map_err(wrong)?;
    Ok(match given.text("scheduler").unwrap_or("nested") {
        "nested" | "ours" => ("nested", nested::nested(batch, cost)?),
        "megatron" => ("megatron", megatron::balanced(batch)?),
        "dynamic" => ("dynamic", dynamic::dynamic(batch, cp)?),
        "dp-balanced" | "dp_balanced" => ("dp-balanced", megatron::dp_balanced(batch, cp)?),
        other => {
            return Err(context_parallel::error::Error::argument(format!(
                "--scheduler: got {other:?}, want one of nested, megatron, dynamic, dp-balanced"
            )));
        }
    })
}

/// Packs in the order in which they run, with the ids of their samples.
fn packs(made: &Schedule, batch: &Batch) -> Vec<(Placement, Vec<u32>)> {
    let at = |id: &u32| made.placements[*id as usize];
    made.order(batch.lengths)
        .chunk_by(|a, b| at(a) == at(b))
        .map(|ids| (at(&ids[0]), ids.to_vec()))
        .collect()
}

fn table(name: &str, made: &Schedule, batch: &Batch, cost: &Cost) -> String {
    let all = packs(made, batch);
    let head = ["micro-batch", "ranks", "pack", "tokens a rank", "takes", "samples (tokens)"];
    let mut rows = vec![head.map(dim).to_vec()];
    for (p, ids) in all.iter().take(MOST_PACKS) {
        let tokens: u64 = ids.iter().map(|&i| u64::from(batch.lengths[i as usize])).sum();
        let time = cost.pack(p.ranks)
            + ids.iter().map(|&i| cost.sample(batch.lengths[i as usize], p.ranks)).sum::<f64>();
        let mut names: Vec<String> = ids
            .iter()
            .take(MOST_NAMES)
            .map(|&i| format!("{i} ({})", batch.lengths[i as usize]))
            .collect();
        if ids.len() > MOST_NAMES {
            names.push(format!("and {} more", ids.len() - MOST_NAMES));
        }
        let ranks = match p.ranks {
            1 => p.first.to_string(),
            _ => format!("{} … {}", p.first, p.first + p.ranks - 1),
        };
        rows.push(vec![
            p.micro_batch.to_string(),
            ranks,
            p.pack.to_string(),
            text::grouped(tokens.div_ceil(u64::from(p.ranks))),
            text::seconds(time),
            names.join(", "),
        ]);
    }
    use Align::{Left, Right};
    let mut out = text::columns(&[Right, Left, Right, Right, Right, Left], &rows);
    if all.len() > MOST_PACKS {
        out += &dim(&format!("  and {} more packs (--json has all)\n", all.len() - MOST_PACKS));
    }
    let time = cost.seconds(made, batch);
    let bound = cost.bound(batch);
    let busy: f64 =
        cost.loads(made, batch).iter().flatten().sum::<f64>() / (time * f64::from(batch.ranks));
    let sum = batch.lengths.iter().map(|&l| u64::from(l)).sum();
    out += &format!(
        "\n  {}: {}, {} tokens, on {}: {}, {}\n  takes {}; ranks are busy {:.1} % of it; no schedule takes less than {}\n",
        bold(name),
        text::plural(batch.lengths.len() as u64, "sample"),
        text::grouped(sum),
        text::plural(u64::from(batch.ranks), "rank"),
        text::plural(u64::from(made.micro_batches), "micro-batch").replace("batchs", "batches"),
        text::plural(all.len() as u64, "pack"),
        bold(&text::seconds(time)),
        100.0 * busy,
        text::seconds(bound),
    );
    out
}

fn json(name: &str, made: &Schedule, batch: &Batch, cost: &Cost) -> String {
    let packs = packs(made, batch).into_iter().map(|(p, ids)| {
        Object::default()
            .raw("micro_batch", p.micro_batch)
            .raw("first_rank", p.first)
            .raw("ranks", p.ranks)
            .raw("pack", p.pack)
            .raw("samples", array(ids))
            .end()
    });
    let groups = made.sample_id_groups(batch.lengths, batch.ranks);
    let groups = groups.iter().map(|ranks| array(ranks.iter().map(array)));
    Object::default()
        .text("scheduler", name)
        .raw("ranks", batch.ranks)
        .raw("tokens_per_rank", batch.tokens_per_rank)
        .raw("lengths", array(batch.lengths))
        .raw("micro_batches", made.micro_batches)
        .raw("packs", array(packs))
        .raw("sample_id_groups", array(groups))
        .float("seconds", cost.seconds(made, batch))
        .float("bound", cost.bound(batch))
        .end()
        + "\n"
}
