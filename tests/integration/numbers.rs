//! Numbers: every communication type, on every number of ranks, against the float64 oracle; what every run must have in common.
//!
//! A full cross product would take days. Every case meets every communication type in every storage type, on two numbers
//! of ranks; everything else (stages, wire type, layout, threads, SIMD level, delays …) is drawn from a hash of the run's
//! number, so that the same run is the same on every machine. `the_sample_covers` asserts what that reaches.
//! `CP_TEST=fast` runs the cases tagged `fast`, each on one number of ranks per combination.

use crate::oracle::{Case, Inputs, Results, Tensor, cases, leakage, mix, reference};
use crate::ranks::{How, Layout, panic_text, run};
use context_parallel::backend::cpu::Simd;
use context_parallel::dtype::DType;
use context_parallel::partition::Side;
use context_parallel::problem::{CommType, Problem, Wire};
use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Numbers of ranks: all small ones, and larger ones of every kind.
const RANKS: [u32; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 33, 64];

/// Only the inner loop's share?
pub fn fast() -> bool {
    std::env::var("CP_TEST").is_ok_and(|word| word == "fast")
}

/// How the KV stages are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stages {
    Named,
    One,
    Middle,
    Most,
    Relay,
}

/// One run, with all that is needed to repeat it.
#[derive(Clone)]
pub struct Run {
    pub case: &'static Case,
    pub comm: CommType,
    pub stages: Stages,
    pub problem: Problem,
    pub how: How,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.problem;
        let h = &self.how;
        write!(
            f,
            "case {} P {} comm {} inner {} stages {} relay {} partition {:?} dtype {} wire {:?} pack {} saved {} layout {:?} simd {} threads {} delay {:?}",
            self.case.name,
            p.ranks,
            self.comm.name(),
            p.inner,
            p.stages,
            p.relay,
            self.case.dealing,
            p.dtype.name(),
            p.wire,
            h.pack,
            h.saved,
            h.layout,
            h.simd.name(),
            h.threads,
            h.delay
        )
    }
}

impl Run {
    /// A case with everything at its default.
    pub fn plain(case: &'static Case, ranks: u32, comm: CommType, dtype: DType) -> Run {
        let problem = case
            .problem(ranks, comm, None, dtype)
            .unwrap_or_else(|e| panic!("case {}: {e}", case.name));
        Run { case, comm, stages: Stages::Named, problem, how: How::default() }
    }

    /// Everything else drawn from `seed`.
    pub fn drawn(case: &'static Case, ranks: u32, comm: CommType, dtype: DType, seed: u64) -> Run {
        let mut run = Run::plain(case, ranks, comm, dtype);
        let mut n = 0;
        let mut draw = |below: usize| {
            n += 1;
            (mix(seed * 64 + n) >> 32) as usize % below
        };
        let p = &mut run.problem;
        if comm == CommType::A2aP2p {
            let divisors: Vec<u32> = (1..=ranks).filter(|u| ranks.is_multiple_of(*u)).collect();
            p.inner = divisors[draw(divisors.len())];
        }
        let teams = p.teams();
        let kinds = [Stages::Named, Stages::One, Stages::Middle, Stages::Most, Stages::Relay];
        run.stages = if teams > 1 { kinds[draw(kinds.len())] } else { Stages::Named };
        p.stages = match run.stages {
            Stages::Named => comm.default_stages(teams),
            Stages::One => 1,
            Stages::Middle => teams / 2,
            Stages::Most | Stages::Relay => teams - 1,
        };
        p.relay = run.stages == Stages::Relay;
        p.wire = [Wire::Storage, Wire::F32][draw(2)];
        let levels: Vec<Simd> = Simd::ALL.into_iter().filter(|s| s.available()).collect();
        run.how = How {
            pack: draw(2) == 1,
            saved: draw(2) == 1,
            layout: Layout::ALL[draw(4)],
            simd: levels[draw(levels.len())],
            threads: 1 + draw(2),
            delay: (draw(2) == 1).then_some(seed),
        };
        run
    }

    fn run(&self) -> Result<Results<f32>, String> {
        self.run_on(&reference(self.case, self.problem.dtype).inputs)
    }

    fn run_on(&self, inputs: &Inputs) -> Result<Results<f32>, String> {
        catch_unwind(AssertUnwindSafe(|| run(&self.problem, self.how, inputs)))
            .unwrap_or_else(|e| Err(panic_text(&*e)))
            .map_err(|e| format!("{e}\n    in {self}"))
    }

    /// Runs, and compares with the oracle: the largest error of each tensor as a share of what is allowed.
    pub fn check(&self) -> Result<[f64; 5], String> {
        self.compare(self.run()?)
    }

    /// The largest error of each tensor as a share of what is allowed.
    pub fn compare(&self, got: Results<f32>) -> Result<[f64; 5], String> {
        let reference = reference(self.case, self.problem.dtype);
        let mut worst = [0.0; 5];
        let made = |t: &Tensor| self.case.latent.is_some() && matches!(t, Tensor::Dk | Tensor::Dv);
        for (share, tensor) in worst.iter_mut().zip(Tensor::ALL).filter(|(_, t)| !made(t)) {
            *share = reference
                .check(tensor, got.get(tensor))
                .map_err(|e| format!("{e}\n    in {self}"))?;
        }
        // The gradients of latents and weights stand for those of keys.
        let latent = reference.check_latent(&got).map_err(|e| format!("{e}\n    in {self}"))?;
        worst[3] = latent.max(worst[3]);
        reference.check_bias(&got.d_bias).map_err(|e| format!("{e}\n    in {self}"))?;
        reference
            .check_numbers(&got.d_sinks, &got.max_logit)
            .map_err(|e| format!("{e}\n    in {self}"))?;
        Ok(worst)
    }
}

/// Counts runs, keeps the worst of each tensor and the first failures.
#[derive(Default)]
pub struct Tally {
    pub runs: usize,
    worst: HashMap<(DType, Tensor), f64>,
    failures: Vec<String>,
    failed: usize,
}

impl Tally {
    pub fn add(&mut self, run: &Run) {
        self.note(run, run.check());
    }

    /// Counts a run that was made elsewhere.
    pub fn note(&mut self, run: &Run, result: Result<[f64; 5], String>) {
        self.runs += 1;
        match result {
            Ok(worst) => {
                for (share, tensor) in worst.into_iter().zip(Tensor::ALL) {
                    let known = self.worst.entry((run.problem.dtype, tensor)).or_insert(0.0);
                    *known = known.max(share);
                }
            }
            Err(text) => self.fail(text),
        }
    }

    fn fail(&mut self, text: String) {
        self.failed += 1;
        if self.failures.len() < 10 {
            self.failures.push(text);
        }
    }

    /// Prints the totals, past the test runner's capture; panics if anything failed.
    pub fn end(self, what: &str) {
        let mut text = format!("{what}: {} runs", self.runs);
        for dtype in DType::ALL {
            let shares: Vec<String> = Tensor::ALL
                .iter()
                .filter_map(|t| self.worst.get(&(dtype, *t)).map(|x| format!("{t:?} {x:.2}")))
                .collect();
            if !shares.is_empty() {
                text += &format!("; {} worst error/allowed {}", dtype.name(), shares.join(" "));
            }
        }
        let _ = writeln!(std::io::stdout(), "{text}");
        assert!(
            self.failed == 0,
            "{} of {} runs failed, the first are\n{}",
            self.failed,
            self.runs,
            self.failures.join("\n")
        );
    }
}

/// The runs of one communication type.
fn sample(comm: CommType) -> Vec<Run> {
    let kind = CommType::ALL.iter().position(|c| *c == comm).expect("one of the four");
    let mut runs = Vec::new();
    for (index, case) in cases().iter().enumerate() {
        for (d, dtype) in DType::ALL.into_iter().enumerate() {
            // Twelve combinations of type and dtype, twelve numbers of ranks: a Latin square over the cases.
            let combination = kind * 3 + d;
            let rounds = if !fast() { 2 } else { usize::from(case.is("fast")) };
            for round in 0..rounds {
                let ranks = RANKS[(index + combination + round * 5) % RANKS.len()];
                let seed = ((index * 12 + combination) * 3 + round) as u64;
                runs.push(Run::drawn(case, ranks, comm, dtype, seed));
            }
        }
    }
    runs
}

fn corpus(comm: CommType) {
    let mut tally = Tally::default();
    sample(comm).iter().for_each(|run| tally.add(run));
    tally.end(&format!("corpus over {}", comm.name()));
}

#[test]
fn corpus_p2p() {
    corpus(CommType::P2p);
}

#[test]
fn corpus_all_gather() {
    corpus(CommType::AllGather);
}

#[test]
fn corpus_a2a() {
    corpus(CommType::A2a);
}

#[test]
fn corpus_a2a_p2p() {
    corpus(CommType::A2aP2p);
}

/// Every pair of choices that could go wrong together is somewhere in the sample.
#[test]
fn the_sample_covers() {
    let mut counts: HashMap<String, usize> = HashMap::new();
    for comm in CommType::ALL {
        for run in sample(comm) {
            let (p, h) = (&run.problem, &run.how);
            let (comm, dtype) = (comm.name(), p.dtype.name());
            let words = [
                format!("{comm} {dtype} P {}", p.ranks),
                format!("{comm} {dtype} {}", h.simd.name()),
                format!("{comm} {dtype} {:?}", p.wire),
                format!("{comm} {dtype} {:?}", run.stages),
                format!("{comm} {dtype} {:?}", h.layout),
                format!("{comm} pack {} saved {}", h.pack, h.saved),
                format!("{comm} {:?} {:?}", run.stages, p.wire),
                format!("{comm} {:?} {:?}", run.stages, run.case.dealing),
                format!("{comm} {:?} threads {}", h.layout, h.threads),
                format!("{comm} {:?} delayed {}", run.stages, h.delay.is_some()),
                format!("{comm} {:?} {:?}", run.case.format, h.layout),
                format!("{comm} {} {dtype}", run.case.name),
            ];
            words.into_iter().for_each(|w| *counts.entry(w).or_default() += 1);
        }
    }
    let at_least = |word: String, least: usize| {
        let n = counts.get(&word).copied().unwrap_or(0);
        assert!(n >= least, "{word}: {n} runs, not at least {least}");
    };
    if fast() {
        return;
    }
    for comm in CommType::ALL.map(CommType::name) {
        for dtype in DType::ALL.map(DType::name) {
            RANKS.iter().for_each(|p| at_least(format!("{comm} {dtype} P {p}"), 14));
            for simd in Simd::ALL.into_iter().filter(|s| s.available()) {
                at_least(format!("{comm} {dtype} {}", simd.name()), 20);
            }
            for wire in [Wire::Storage, Wire::F32] {
                at_least(format!("{comm} {dtype} {wire:?}"), 30);
            }
            for layout in Layout::ALL {
                at_least(format!("{comm} {dtype} {layout:?}"), 20);
            }
            cases().iter().for_each(|c| at_least(format!("{comm} {} {dtype}", c.name), 2));
        }
        for (pack, saved) in [(false, false), (false, true), (true, false), (true, true)] {
            at_least(format!("{comm} pack {pack} saved {saved}"), 30);
        }
        let kinds = [Stages::Named, Stages::One, Stages::Middle, Stages::Most, Stages::Relay];
        for stages in if comm == "a2a" { &kinds[..1] } else { &kinds[..] } {
            for dtype in DType::ALL.map(DType::name) {
                at_least(format!("{comm} {dtype} {stages:?}"), 8);
            }
            for wire in [Wire::Storage, Wire::F32] {
                at_least(format!("{comm} {stages:?} {wire:?}"), 10);
            }
            for delayed in [false, true] {
                at_least(format!("{comm} {stages:?} delayed {delayed}"), 10);
            }
            for dealing in ["Zigzag", "Contiguous", "Striped", "List"] {
                at_least(format!("{comm} {stages:?} {dealing}"), 1);
            }
        }
        for layout in Layout::ALL {
            (1..=2).for_each(|n| at_least(format!("{comm} {layout:?} threads {n}"), 20));
            for format in ["Bshd", "Sbhd", "Thd"] {
                at_least(format!("{comm} {format} {layout:?}"), 5);
            }
        }
    }
}

/// S = 1000 over 64 ranks: nothing divides.
#[test]
fn a_thousand_tokens_on_64_ranks() {
    let mut tally = Tally::default();
    for case in cases().iter().filter(|c| c.name.ends_with("1000") || c.name == "full_1000_sbhd") {
        for comm in CommType::ALL {
            for dtype in [DType::F32, DType::Bf16] {
                let wires = [Wire::Storage, Wire::F32];
                for wire in if fast() { &wires[..1] } else { &wires[..] } {
                    let mut run = Run::plain(case, 64, comm, dtype);
                    run.problem.wire = *wire;
                    tally.add(&run);
                }
            }
        }
    }
    assert_eq!(tally.runs, if fast() { 16 } else { 32 });
    tally.end("1000 tokens on 64 ranks");
}

/// Fewer tokens than ranks, so that most hold nothing; and rows that see no key.
#[test]
fn empty_ranks_and_blind_rows() {
    let mut tally = Tally::default();
    for (n, case) in cases().iter().filter(|c| c.is("tiny") || c.is("blind")).enumerate() {
        for (c, comm) in CommType::ALL.into_iter().enumerate() {
            let all = [7, 16, 33, 64];
            for ranks in if fast() { &all[(n + c) % 4..][..1] } else { &all[..] } {
                let dtype = DType::ALL[(n + c) % 3];
                tally.add(&Run::plain(case, *ranks, comm, dtype));
                let seed = (1 << 20) + (n * 64 + c * 8) as u64 * 64 + u64::from(*ranks);
                tally.add(&Run::drawn(case, *ranks, comm, dtype, seed));
            }
        }
    }
    tally.end("empty ranks and blind rows");
}

fn case(name: &str) -> &'static Case {
    cases().iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no case {name}"))
}

/// Where the bits of two results differ first.
fn difference(a: &Results<f32>, b: &Results<f32>) -> Option<String> {
    Tensor::ALL.into_iter().find_map(|t| {
        let (a, b) = (a.get(t), b.get(t));
        let i = (0..a.len()).find(|i| a[*i].to_bits() != b[*i].to_bits())?;
        Some(format!("{t:?}[{i}] is {} and {}", a[i], b[i]))
    })
}

/// Whatever the network's and the threads' timing: same inputs, same P, same bits.
#[test]
fn same_bits_whatever_the_timing() {
    let mut tally = Tally::default();
    let names = ["causal_257", "gqa_8_2", "thd_1_2_14_33_5", "bottom_right_short_k", "dim_72_40"];
    for (n, case) in names.into_iter().map(case).enumerate() {
        for (c, comm) in CommType::ALL.into_iter().enumerate() {
            for (r, ranks) in [1, 2, 3, 6, 12].into_iter().enumerate() {
                if fast() && (n + c + r) % 4 > 0 {
                    continue;
                }
                let dtype = DType::ALL[(n + c + r) % 3];
                let mut run = Run::plain(case, ranks, comm, dtype);
                let first = match run.run() {
                    Ok(first) => first,
                    Err(text) => {
                        tally.fail(text);
                        continue;
                    }
                };
                for (threads, delay) in
                    [(1, None), (2, Some(1)), (3, Some(2)), (1, Some(3)), (3, None)]
                {
                    run.how = How { threads, delay, ..run.how };
                    tally.runs += 1;
                    match run.run().map(|again| difference(&first, &again)) {
                        Ok(None) => {}
                        Ok(Some(text)) => tally.fail(format!("another run: {text}\n    in {run}")),
                        Err(text) => tally.fail(text),
                    }
                }
            }
        }
    }
    tally.end("same bits");
}

/// A changed key changes the rows that may see it, and no other, through the whole stack.
#[test]
fn nothing_leaks() {
    let mut tally = Tally::default();
    let names = [
        "causal_33",
        "window_causal_7",
        "window_7_3",
        "thd_1_2_14_33_5",
        "thd_padded_between",
        "bottom_right_short_k",
        "pad_left",
        "causal_101_list",
    ];
    for (n, case) in names.into_iter().map(case).enumerate() {
        for (c, comm) in CommType::ALL.into_iter().enumerate() {
            for ranks in [4, 7] {
                if fast() && (n + c) % 4 > 0 {
                    continue;
                }
                let dtype = [DType::F32, DType::Bf16][(n + c) % 2];
                let seed = (1 << 21) + (n * 64 + c * 8) as u64 + u64::from(ranks);
                let run = Run::drawn(case, ranks, comm, dtype, seed);
                for tensor in [Tensor::O, Tensor::Dq] {
                    tally.runs += 1;
                    let leaks = catch_unwind(AssertUnwindSafe(|| {
                        leakage(case, dtype, tensor, |inputs| {
                            run.run_on(inputs)
                                .unwrap_or_else(|e| panic!("{e}"))
                                .get(tensor)
                                .to_vec()
                        })
                    }));
                    if let Err(text) = leaks.unwrap_or_else(|e| Err(panic_text(&*e))) {
                        tally.fail(format!("{text}\n    in {run}"));
                    }
                }
            }
        }
    }
    tally.end("leakage");
}

/// A changed query (Q and dO) changes the gradients of the keys that it may see, and of no other.
#[test]
fn no_gradient_leaks() {
    let mut tally = Tally::default();
    let names =
        ["causal_33_gqa3", "window_7_3", "thd_1_2_14_33_5", "bottom_right_short_k", "pad_left"];
    for (n, case) in names.into_iter().map(case).enumerate() {
        for (c, comm) in CommType::ALL.into_iter().enumerate() {
            for ranks in [4, 7] {
                if fast() && (n + c) % 4 > 0 {
                    continue;
                }
                let dtype = [DType::F32, DType::Bf16][(n + c) % 2];
                let seed = (1 << 22) + (n * 64 + c * 8) as u64 + u64::from(ranks);
                let run = Run::drawn(case, ranks, comm, dtype, seed);
                tally.runs += 1;
                if let Err(text) = gradient_leakage(&run) {
                    tally.fail(text);
                }
            }
        }
    }
    tally.end("leakage of gradients");
}

fn gradient_leakage(run: &Run) -> Result<(), String> {
    let case = run.case;
    let before = run.run()?;
    let inputs = &reference(case, run.problem.dtype).inputs;
    let queries: Vec<(usize, usize)> = (0..case.seqs.len())
        .flat_map(|seq| (0..case.seqs[seq].q.len as usize).map(move |i| (seq, i)))
        .collect();
    for n in 0..3 {
        let (seq, i) = queries[n * (queries.len() - 1) / 2];
        let head = n % case.heads;
        let row = (case.first(seq, Side::Query) + i) * case.heads + head;
        let mut changed = inputs.clone();
        changed.q[row * case.dim_qk..][..case.dim_qk].iter_mut().for_each(|x| *x *= 0.5);
        changed.d_o[row * case.dim_v..][..case.dim_v].fill(2000.0);
        let after = run.run_on(&changed)?;
        let kv_head = head / (case.heads / case.kv_heads);
        for tensor in [Tensor::Dk, Tensor::Dv] {
            let dim = tensor.shape(case).1;
            for key in 0..case.tokens(Side::Key) {
                for h in 0..case.kv_heads {
                    let bits = |r: &Results<f32>| -> Vec<u32> {
                        let at = (key * case.kv_heads + h) * dim;
                        r.get(tensor)[at..at + dim].iter().map(|x| x.to_bits()).collect()
                    };
                    let first = case.first(seq, Side::Key);
                    let inside = (first..first + case.seqs[seq].k.len as usize).contains(&key);
                    let seen = h == kv_head && inside && case.sees(seq, i, key - first);
                    let same = bits(&before) == bits(&after);
                    // dO is so large that its product with any weight shows, unless the weight is nothing in the storage type.
                    let must = seen && key == first + i;
                    if (!seen && !same) || (must && same && tensor == Tensor::Dv) {
                        return Err(format!(
                            "{tensor:?} of key {key}, head {h}: seen {seen}, unchanged {same}, when query {i} of sequence {seq}, head {head} was changed\n    in {run}"
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}
