//! Sequence ↔ heads: plans proved over the corpus' partitions and formats, and run on threads with real tensors.

use crate::oracle::{Case, cases, mix};
use crate::ranks::{Fenced, Layout, Local, on_threads};
use context_parallel::backend::View;
use context_parallel::backend::cpu::{Cpu, Simd};
use context_parallel::dtype::DType;
use context_parallel::exec::{self, Dropout, Link, Memory, Scratch};
use context_parallel::holding::{holding, tokens};
use context_parallel::partition::Side;
use context_parallel::plan::account::{account, layout, workspace_bytes};
use context_parallel::plan::check::check;
use context_parallel::plan::trade::{Trade, Traded};
use context_parallel::plan::{Op, Options, Pass, Plan, Slot, Tensor};
use context_parallel::problem::CommType;
use context_parallel::transport::Transport;
use context_parallel::transport::delay::delay;
use context_parallel::transport::local::local_group;
use std::sync::Arc;
use std::time::Duration;

const PASSES: [Pass; 2] = [Pass::ToHeads, Pass::ToSequence];

/// Heads dealt out (0: what the tensors have), and the tensors' (heads, dim).
type Shape = (u32, &'static [(u32, u32)]);
const SHAPES: [Shape; 5] = [
    (0, &[(8, 4), (8, 4), (2, 3), (2, 3), (8, 1)]), // Mamba's z, x, B, C, dt
    (0, &[(6, 5), (3, 2), (1, 7)]),
    (0, &[(5, 8)]),
    (12, &[(4, 2), (6, 1)]),
    (0, &[(64, 2), (1, 1)]),
];

/// The tensors of a shape, each of another type.
fn trade(case: &Case, ranks: u32, (heads, tensors): Shape, first: usize) -> Arc<Trade> {
    let p = case.problem(ranks, CommType::A2a, None, DType::F32).unwrap();
    let of = |(i, (heads, dim)): (usize, &(u32, u32))| Traded {
        heads: *heads,
        dim: *dim,
        dtype: DType::ALL[(first + i) % 3],
    };
    let tensors = tensors.iter().enumerate().map(of).collect();
    let extents = p.seqs.iter().map(|s| s.q);
    Arc::new(Trade::new(ranks, p.partition.clone(), p.packed, extents, heads, tensors).unwrap())
}

#[test]
fn plans_are_proved_over_the_corpus() {
    let mut proved = 0;
    let (mut packs, mut places) = (0, 0);
    for (i, case) in cases().iter().enumerate() {
        if case.tokens(Side::Query) > 400 {
            continue;
        }
        for ranks in [1, 2, 3, 4, 7, 12] {
            let shape = SHAPES[(i + ranks as usize) % SHAPES.len()];
            let trade = trade(case, ranks, shape, i);
            for pass in PASSES {
                for (pack, same_pieces) in
                    [(false, false), (true, false), (false, true), (true, true)]
                {
                    let options = Options { pack, saved: false, same_pieces };
                    let mut plans = Plan::all_of_trade(&trade, pass, options);
                    // Ranks may differ in how their tensors lie.
                    for plan in plans.iter_mut().skip(1).step_by(2).filter(|_| i % 2 == 0) {
                        let other = Options { pack: !pack, ..options };
                        *plan = Plan::of_trade(&trade, plan.rank, pass, other);
                    }
                    check(&plans).unwrap_or_else(|e| {
                        panic!("{e}\n{} P {ranks} {shape:?} {pass:?} {options:?}", case.name)
                    });
                    let exchanges = |p: &Plan| {
                        p.steps.iter().filter(|s| matches!(s.op, Op::Exchange { .. })).count()
                    };
                    assert!(plans.iter().all(|p| exchanges(p) <= 1), "one grouped exchange");
                    let named = |kind: &str| {
                        let slots = plans.iter().flat_map(|p| &p.slots);
                        slots.filter(|s| format!("{:?}", s.slot).starts_with(kind)).count()
                    };
                    packs += named("Pack");
                    places += usize::from(ranks > 1 && named("Pack") == 0);
                    proved += 1;
                }
            }
        }
    }
    println!("{proved} sets of plans proved");
    assert!(proved > 1000 && packs > 0 && places > 0, "{proved} {packs} {places}");
}

/// The checker sees every kind of fault in a plan of a trade.
#[test]
fn planted_faults_are_found() {
    let case = cases().iter().find(|c| c.name == "pad_left").expect("the corpus has it");
    let trade = trade(case, 3, SHAPES[0], 1);
    let mut planted = 0;
    for pass in PASSES {
        let good = Plan::all_of_trade(&trade, pass, Options { pack: true, ..Options::default() });
        check(&good).unwrap();
        let mut bad = |what: String, plant: &dyn Fn(&mut Vec<Plan>)| {
            let mut plans = good.clone();
            plant(&mut plans);
            assert!(check(&plans).is_err(), "not seen: {pass:?}, {what}");
            planted += 1;
        };
        for at in 0..good[1].steps.len() {
            bad(format!("step {at} left out"), &|plans| {
                let step = plans[1].steps.remove(at);
                // What it signals has no signal then; take the waits away too, so that the fault is what is missing.
                for s in &mut plans[1].steps {
                    s.waits.retain(|e| Some(*e) != step.signal);
                }
            });
            match &good[1].steps[at].op {
                Op::Copy { heads: 1.., .. } => {
                    bad(format!("row of step {at}"), &|plans| {
                        let Op::Copy { runs, .. } = &mut plans[1].steps[at].op else { return };
                        runs[0].rows -= 1;
                    });
                    bad(format!("heads of step {at}"), &|plans| {
                        let Op::Copy { heads, .. } = &mut plans[1].steps[at].op else { return };
                        *heads -= 1;
                    });
                }
                Op::Exchange { .. } => {
                    bad(format!("order of messages in {at}"), &|plans| {
                        let Op::Exchange { sends, .. } = &mut plans[1].steps[at].op else { return };
                        sends.swap(0, 2);
                    });
                    bad(format!("wait of {at}"), &|plans| plans[1].steps[at].waits.clear());
                }
                Op::Fill { .. } => bad(format!("padding in {at}"), &|plans| {
                    let Op::Fill { rows, .. } = &mut plans[1].steps[at].op else { return };
                    rows[0].count -= 1;
                }),
                _ => {}
            }
        }
    }
    assert!(planted > 50, "{planted}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = &cases()[0];
    let p = case.problem(2, CommType::A2a, None, DType::F32).unwrap();
    let make = |heads: u32, tensors: &[(u32, u32)]| {
        let of = |(heads, dim): &(u32, u32)| Traded { heads: *heads, dim: *dim, dtype: DType::F32 };
        let tensors = tensors.iter().map(of).collect();
        let extents = p.seqs.iter().map(|s| s.q);
        Trade::new(2, p.partition.clone(), p.packed, extents, heads, tensors)
    };
    for (heads, tensors, text) in [
        (0, &[][..], "count: got 0 tensors, allowed 1 … 16"),
        (0, &[(1, 1); 17], "count: got 17 tensors"),
        (0, &[(4, 1), (3, 1)], "tensor 1: got 3 heads, which must divide the 4 heads"),
        (6, &[(6, 1), (4, 1)], "tensor 1: got 4 heads, which must divide the 6 heads"),
        (0, &[(4, 1), (0, 1)], "tensor 1: got 0 heads"),
        (0, &[(4, 0)], "tensor 0: got 0 elements"),
    ] {
        let error = make(heads, tensors).map(|_| ()).unwrap_err();
        assert!(error.text.contains(text), "{}", error.text);
    }
    let name = |slot: Slot| format!("{slot:?}");
    let plan = Plan::of_trade(
        &Arc::new(make(0, &[(4, 1), (2, 1)]).unwrap()),
        0,
        Pass::ToHeads,
        Options::default(),
    );
    let names: Vec<String> = plan.slots.iter().map(|s| name(s.slot)).collect();
    assert_eq!(names[..4], ["Local0", "Local1", "Whole0", "Whole1"]);
}

/// Heads of every rank: as attention deals them; groups follow the heads that they serve.
#[test]
fn shares() {
    let case = &cases()[0];
    let of = |ranks, shape, number| -> Vec<(u32, u32)> {
        let t = trade(case, ranks, shape, 0);
        (0..ranks).map(|r| t.share(number, r)).map(|s| (s.start, s.end)).collect()
    };
    assert_eq!(of(4, SHAPES[0], 0), [(0, 2), (2, 4), (4, 6), (6, 8)]);
    assert_eq!(of(4, SHAPES[0], 2), [(0, 1), (0, 1), (1, 2), (1, 2)]);
    assert_eq!(of(3, SHAPES[0], 0), [(0, 2), (2, 5), (5, 8)]);
    assert_eq!(of(3, SHAPES[0], 2), [(0, 1), (0, 2), (1, 2)]);
    assert_eq!(of(7, SHAPES[2], 0), [(0, 0), (0, 1), (1, 2), (0, 0), (2, 3), (3, 4), (4, 5)]);
    assert_eq!(of(3, SHAPES[3], 0), [(0, 2), (1, 3), (2, 4)]);
}

/// Small integers: exact in every type, and so are their sums over ranks.
fn value(number: usize, token: u32, head: u32, i: usize) -> f32 {
    let at = (((number as u64) << 32 | u64::from(token)) << 12 | u64::from(head)) << 8 | i as u64;
    (mix(at) % 15) as f32 - 7.0
}

fn is_true(trade: &Trade, token: u32) -> bool {
    let mut base = 0;
    trade.problem.seqs.iter().any(|s| {
        base += s.q.padded;
        let first = base - s.q.padded + s.q.before;
        (first..first + s.q.len).contains(&token)
    })
}

/// One rank: to heads, compared with the global tensors; then back, compared with what the sums must be.
fn rank(
    trade: &Arc<Trade>,
    rank: u32,
    [local_layout, whole_layout]: [Layout; 2],
    simd: Simd,
    mut transport: Box<dyn Transport>,
) -> Result<(), String> {
    let p = &trade.problem;
    let batch = if p.packed { 1 } else { p.seqs.len() };
    let held = tokens(p, rank, Side::Query);
    assert_eq!(held.len(), holding(p, rank, Side::Query).rows as usize);
    let tensor = |rows: usize, heads: usize, t: &Traded, layout: Layout| {
        Local::new(t.dtype, [batch, rows / batch, heads, t.dim as usize], layout)
    };
    let numbered = || trade.tensors.iter().enumerate();
    let locals = |fill: bool| -> Vec<Local> {
        let one = |(n, t): (usize, &Traded)| {
            let mut local = tensor(held.len(), t.heads as usize, t, local_layout);
            for (row, token) in held.iter().enumerate().filter(|_| fill) {
                for head in 0..t.heads {
                    let values: Vec<f32> =
                        (0..t.dim as usize).map(|i| value(n, *token, head, i)).collect();
                    // Padding of the input stays NaN: it goes nowhere.
                    if is_true(trade, *token) {
                        local.put(row, head as usize, &values);
                    }
                }
            }
            local
        };
        numbered().map(one).collect()
    };
    let (input, output) = (locals(true), locals(false));
    let rows = trade.rows() as usize;
    let wholes: Vec<Local> = numbered()
        .map(|(n, t)| tensor(rows, trade.share(n, rank).len(), t, whole_layout))
        .collect();
    let mut cpu = Cpu::new(1, simd).map_err(|e| e.to_string())?;
    let mut scratch = Scratch::default();
    for (pass, locals) in [(Pass::ToHeads, &input), (Pass::ToSequence, &output)] {
        let views: Vec<(Tensor, View)> = (locals.iter().map(|l| (Tensor::Local, l.view)))
            .chain(wholes.iter().map(|w| (Tensor::Whole, w.view)))
            .collect();
        let pack = wholes.iter().any(|w| !w.view.is_dense());
        let options = Options { pack, ..Options::default() };
        let plan = Plan::of_trade(trade, rank, pass, options);
        let layout = layout(&plan);
        let offsets: Vec<usize> =
            plan.slots.iter().map(|s| layout.get(&s.slot).copied().unwrap_or(0)).collect();
        let mut workspace = Fenced::new(workspace_bytes(&plan));
        let memory = Memory {
            dropout: Dropout::default(),
            caller: &views,
            offsets: &offsets,
            workspace: workspace.ptr(),
            saved: std::ptr::null_mut(),
        };
        let members: Vec<u32> = (0..p.ranks).collect();
        let timeout = Duration::from_secs(60);
        let link = Link { transport: &mut *transport, members: &members, timeout };
        // SAFETY: the buffers live until the end of this iteration or longer, and have the plan's sizes.
        let stats = unsafe { exec::run(&plan, &memory, &mut cpu, Some(link), &mut scratch) }
            .map_err(|e| format!("{pass:?}: {e}"))?;
        let want = account(&plan);
        if (stats.sent, stats.received) != (want.sent, want.received) {
            return Err(format!("{pass:?}: {stats:?}, the account says {want:?}"));
        }
        if !workspace.intact() || !wholes.iter().chain(locals).all(Local::gaps_untouched) {
            return Err(format!("{pass:?}: written where nothing belongs"));
        }
    }
    for (n, t) in numbered() {
        let mine = trade.share(n, rank);
        let same = |local: &Local, row: usize, head: u32, at: u32, token: u32, times: usize| {
            let mut got = vec![0.0; t.dim as usize];
            local.get(row, at as usize, &mut got);
            let alive = f32::from(u8::from(is_true(trade, token)));
            let want: Vec<f32> = (0..got.len())
                .map(|i| value(n, token, head, i) * alive * times as f32)
                .map(|x| if x == 0.0 { 0.0 } else { x })
                .collect();
            match got == want {
                true => Ok(()),
                false => {
                    Err(format!("tensor {n} token {token} head {head}: got {got:?}, want {want:?}"))
                }
            }
        };
        for row in 0..rows as u32 {
            for head in mine.clone() {
                same(&wholes[n], row as usize, head, head - mine.start, row, 1)?;
            }
        }
        for (row, token) in held.iter().enumerate() {
            for head in 0..t.heads {
                let holders = (0..p.ranks).filter(|r| trade.share(n, *r).contains(&head)).count();
                same(&output[n], row, head, head, *token, holders)?;
            }
        }
    }
    Ok(())
}

/// There and back over the corpus. Whole tensors equal the global ones; what comes back is the input, times the ranks that had the head.
#[test]
fn there_and_back_over_the_corpus() {
    let levels: Vec<Simd> = Simd::ALL.into_iter().filter(|s| s.available()).collect();
    let mut runs = 0;
    for (i, case) in cases().iter().enumerate() {
        let ranks: &[u32] = if crate::numbers::fast() { &[3] } else { &[1, 2, 3, 5, 8, 13] };
        for &ranks in ranks {
            runs += 1;
            let seed = mix((i as u64) << 8 | u64::from(ranks));
            let draw = |n: u32, below: usize| (seed >> (8 * n)) as usize % below;
            let shape = SHAPES[draw(0, SHAPES.len())];
            let layouts = [Layout::ALL[draw(1, 4)], Layout::ALL[draw(2, 4)]];
            let trade = trade(case, ranks, shape, draw(3, 3));
            on_threads(local_group(ranks), |r, t| {
                let t = if draw(4, 2) == 0 { delay(t, seed + u64::from(r)) } else { t };
                rank(&trade, r, layouts, levels[draw(5, levels.len())], t)
            })
            .unwrap_or_else(|e| panic!("{e}\n{} P {ranks} {shape:?} {layouts:?}", case.name));
        }
    }
    println!("{runs} runs");
}
