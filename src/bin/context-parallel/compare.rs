//! `schedule --compare`: random batches of documents, all schedulers judged by one cost.

use crate::args::{Failure, Given, failed, usage};
use crate::json::{Object, array};
use crate::text::{self, Align, Columns, bold, dim};
use context_parallel::schedule::cost::Cost;
use context_parallel::schedule::{Batch, Schedule, dynamic, megatron, nested};
use std::time::Instant;

/// Ranks, and tokens per rank.
pub fn size(given: &Given) -> Result<(u32, u32), Failure> {
    Ok((given.small("ranks", 8, 1..=1 << 16)?, given.small("tokens-per-rank", 8192, 1..=1 << 30)?))
}

/// How long documents are: rows of shortest, longest, and how many of a corpus are that long.
pub struct Documents(Vec<(u64, u64, u64)>);

/// SplitMix64 (Steele, Lea, Flood, 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

impl Documents {
    /// Reads `"[least, most]",count,…` under one line of headings.
    pub fn read(path: &str) -> Result<Documents, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| failed(format!("--documents: {path}: {e}")))?;
        let row = |line: &str| {
            let (range, rest) = line.strip_prefix("\"[")?.split_once("]\",")?;
            let (least, most) = range.split_once(", ")?;
            let count = rest.split(',').next()?;
            let (least, most): (u64, u64) = (least.parse().ok()?, most.parse().ok()?);
            (least <= most && most > 0).then_some((least.max(1), most, count.parse().ok()?))
        };
        let rows: Option<Vec<_>> = text.lines().skip(1).map(row).collect();
        match rows {
            Some(rows) if rows.iter().any(|r: &(u64, u64, u64)| r.2 > 0) => Ok(Documents(rows)),
            _ => Err(failed(format!(
                "--documents: {path}: wants lines of \"[least, most]\",count under one of headings"
            ))),
        }
    }

    /// Documents until there are so many tokens, the last one cut. A row is drawn by its count, a length evenly within it; what is longer than
    /// `longest` is drawn again.
    pub fn batch(&self, seed: u64, tokens: u64, longest: u64) -> Vec<u32> {
        let mut random = Random(seed.wrapping_mul(0xd134_2543_de82_ef95));
        let all = self.0.iter().map(|r| r.2).sum();
        let mut lengths = Vec::new();
        let mut left = tokens;
        while left > 0 {
            let mut at = random.below(all);
            let row = self.0.iter().find(|r| {
                let here = at < r.2;
                at = at.wrapping_sub(if here { 0 } else { r.2 });
                here
            });
            let &(least, most, _) = row.expect("below the sum");
            let length = least + random.below(most - least + 1);
            if length <= longest || least > longest && self.0.iter().all(|r| r.0 > longest) {
                let length = length.min(left).min(longest);
                lengths.push(length as u32);
                left -= length;
            }
        }
        lengths
    }
}

/// Ranks, tokens per rank, tokens of a batch.
const SIZES: [(u32, u32, u64); 6] = [
    (8, 8 << 10, 256 << 10),
    (8, 32 << 10, 1 << 20),
    (32, 8 << 10, 1 << 20),
    (64, 8 << 10, 2 << 20),
    (512, 8 << 10, 1800 << 10),
    (512, 8 << 10, 4 << 20),
];

/// Sums over the batches of one size.
#[derive(Default)]
struct Row {
    samples: usize,
    ours: f64,
    bound: f64,
    /// Megatron's schedule; the same with its samples in packs; the dev branch's.
    theirs: [f64; 3],
    /// Our time on the batches that Megatron and the dev branch schedule.
    beside: [f64; 3],
    least_gain: f64,
    worst_distance: f64,
    slower: usize,
    refused: [usize; 2],
    /// How long scheduling took, each time.
    seconds: Vec<f64>,
}

pub fn run(given: &Given, cost: &Cost) -> Result<(), Failure> {
    let Some(file) = given.text("documents") else {
        return Err(usage("--compare: needs --documents, a file of document lengths"));
    };
    let documents = Documents::read(file)?;
    let seed = given.number("seed", 1, 0..=u64::MAX)?;
    let batches = given.number("batches", 1000, 1..=1_000_000)?;
    let sizes = match given.text("ranks") {
        None => SIZES.to_vec(),
        Some(_) => {
            let (ranks, tokens_per_rank) = size(given)?;
            vec![(ranks, tokens_per_rank, given.number("tokens", 256 << 10, 1..=1 << 30)?)]
        }
    };
    let print = !given.flag("json");
    use Align::Right;
    let columns = Columns::new(&[
        ("ranks", Right, 5),
        ("tokens a rank", Right, 13),
        ("a batch", Right, 9),
        ("samples", Right, 7),
        ("megatron", Right, 8),
        ("least", Right, 6),
        ("packed", Right, 6),
        ("dynamic", Right, 7),
        ("bound", Right, 6),
        ("worst", Right, 6),
        ("slower", Right, 6),
        ("refused", Right, 7),
        ("scheduled in", Right, 12),
        ("99 % in", Right, 8),
    ]);
    if print {
        text::out(&format!(
            "{} batches of each size, seed {seed}, documents of {file}\n\
             megatron, packed, dynamic: their time over ours (sums of all batches; least: of any batch). bound, worst: our time over the least possible.\n\
             scheduled in: the median; 99 % in: of a hundred batches all but one.\n\n{}",
            text::grouped(batches),
            columns.line(
                &[
                    "ranks",
                    "tokens a rank",
                    "a batch",
                    "samples",
                    "megatron",
                    "least",
                    "packed",
                    "dynamic",
                    "bound",
                    "worst",
                    "slower",
                    "refused",
                    "scheduled in",
                    "99 % in",
                ]
                .map(dim)
            )
        ));
    }
    let mut slower = 0;
    let mut rows = Vec::new();
    for (ranks, tokens_per_rank, tokens) in sizes {
        let longest = u64::from(ranks) * u64::from(tokens_per_rank / 2 * 2).max(1);
        let mut row = Row { least_gain: f64::INFINITY, ..Row::default() };
        for i in 0..batches {
            let lengths = documents.batch(seed.wrapping_add(i << 32), tokens, longest);
            row.add(&Batch { lengths: &lengths, ranks, tokens_per_rank }, cost)?;
        }
        row.seconds.sort_by(f64::total_cmp);
        slower += row.slower;
        let mean = batches as f64;
        if print {
            text::out(&columns.line(&[
                ranks.to_string(),
                text::grouped(tokens_per_rank.into()),
                text::grouped(tokens),
                text::grouped((row.samples as f64 / mean).round() as u64),
                bold(&format!("{:.3}", row.gain(0))),
                format!("{:.3}", row.least_gain),
                format!("{:.3}", row.gain(1)),
                format!("{:.3}", row.gain(2)),
                format!("{:.4}", row.ours / row.bound),
                format!("{:.4}", row.worst_distance),
                row.slower.to_string(),
                format!("{}/{}", row.refused[0], row.refused[1]),
                text::seconds(row.within(0.5)),
                text::seconds(row.within(0.99)),
            ]));
        }
        rows.push(
            Object::default()
                .raw("ranks", ranks)
                .raw("tokens_per_rank", tokens_per_rank)
                .raw("tokens", tokens)
                .float("samples", row.samples as f64 / mean)
                .float("megatron_over_ours", row.gain(0))
                .float("least", row.least_gain)
                .float("megatron_packed_over_ours", row.gain(1))
                .float("dynamic_over_ours", row.gain(2))
                .float("ours_over_bound", row.ours / row.bound)
                .float("worst_over_bound", row.worst_distance)
                .raw("slower", row.slower)
                .raw("refused_by_megatron", row.refused[0])
                .raw("refused_by_dynamic", row.refused[1])
                .float("scheduling_seconds", row.within(0.5))
                .float("scheduling_seconds_of_99_percent", row.within(0.99))
                .end(),
        );
    }
    if !print {
        text::out(
            &(Object::default()
                .raw("seed", seed)
                .raw("batches", batches)
                .raw("sizes", array(rows))
                .end()
                + "\n"),
        );
    }
    match slower {
        0 => Ok(()),
        n => Err(failed(format!(
            "schedule: ours is slower than Megatron's on {}",
            text::plural(n as u64, "batch").replace("batchs", "batches")
        ))),
    }
}

impl Row {
    /// The time within which this part of the batches was scheduled.
    fn within(&self, part: f64) -> f64 {
        self.seconds[((self.seconds.len() - 1) as f64 * part) as usize]
    }

    fn gain(&self, whose: usize) -> f64 {
        self.theirs[whose] / self.beside[whose]
    }

    fn add(&mut self, batch: &Batch, cost: &Cost) -> Result<(), Failure> {
        let start = Instant::now();
        let made = nested::nested(batch, cost)?;
        let took = start.elapsed().as_secs_f64();
        made.check(batch)?;
        let ours = cost.seconds(&made, batch);
        let bound = cost.bound(batch);
        self.samples += batch.lengths.len();
        self.seconds.push(took);
        self.ours += ours;
        self.bound += bound;
        self.worst_distance = self.worst_distance.max(ours / bound);
        let mut judge = |whose: usize, schedule: &Schedule| -> Result<f64, Failure> {
            schedule.check(batch)?;
            let time = cost.seconds(schedule, batch);
            self.theirs[whose] += time;
            self.beside[whose] += ours;
            Ok(time / ours)
        };
        match megatron::balanced(batch) {
            Ok(theirs) => {
                let gain = judge(0, &theirs)?.min(judge(1, &packed(theirs, batch))?);
                self.least_gain = self.least_gain.min(gain);
                self.slower += usize::from(gain < 1.0);
            }
            Err(_) => self.refused[0] += 1,
        }
        match dynamic::dynamic(batch, 1) {
            Ok(theirs) => drop(judge(2, &theirs)?),
            Err(_) => self.refused[1] += 1,
        }
        Ok(())
    }
}

/// Megatron's schedule with its samples in packs, which it does not make: each joins the one before it on the same ranks while that has room.
fn packed(mut made: Schedule, batch: &Batch) -> Schedule {
    let mut last = None;
    let (mut pack, mut tokens) = (0, 0);
    for id in made.order(batch.lengths) {
        let p = &mut made.placements[id as usize];
        let length = u64::from(batch.lengths[id as usize]);
        let here = Some((p.micro_batch, p.first, p.ranks));
        if last != here {
            (pack, tokens) = (0, length);
        } else if tokens + length <= u64::from(p.ranks) * u64::from(batch.tokens_per_rank) {
            tokens += length;
        } else {
            (pack, tokens) = (pack + 1, length);
        }
        p.pack = pack;
        last = here;
    }
    made
}
