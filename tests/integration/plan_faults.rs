//! Faults planted in good plans: the checker must catch every one, and say what it is.

use crate::plans::problem;
use crate::plans_latent::latent;
use context_parallel::dtype::{DType, Fp8};
use context_parallel::mask::{Mask, Slice};
use context_parallel::plan::check::check;
use context_parallel::plan::{
    Kind, Lane, Message, Op, Options, Pass, Plan, Rows, Slot, SlotInfo, Step, Tensor, Value,
};
use context_parallel::problem::{CommType, Extent, Problem, Sequence, Wire};
use context_parallel::score::{BiasShape, Reach, Score};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Small plans that between them have every kind of step and slot.
pub fn good_plans() -> Vec<Vec<Plan>> {
    let plain = Options::default();
    let ring = problem(4, CommType::P2p, 0, 19, 2, 1);
    let window = Mask { left: Some(3), ..Mask::CAUSAL };
    let padded = Extent { before: 1, len: 7, padded: 10 };
    let batch = vec![Sequence { q: padded, k: padded }, Sequence::square(10)];
    let whole = Some(Reach::Group);
    let bias = Some(BiasShape { batch: false, heads: true, queries: true, gradient: true });
    let score = Score { softcap: 2.0, sinks: whole, max_logit: whole, bias, ..Score::default() };
    let mut out = Vec::new();
    for (p, options) in [
        (ring.clone(), plain),
        (Problem { wire: Wire::F32, dtype: DType::F32, ..ring.clone() }, plain),
        (Problem { relay: true, ..ring.clone() }, plain),
        (Problem { mask: window, stages: 2, ..ring }, plain),
        (problem(3, CommType::AllGather, 0, 14, 2, 2), plain),
        (
            Problem { seqs: batch.clone(), ..problem(2, CommType::P2p, 0, 10, 2, 1) },
            Options { pack: true, ..plain },
        ),
        // Three heads over two members: uneven shares, and one key head in both.
        (Problem { seqs: batch, ..problem(4, CommType::A2aP2p, 2, 10, 3, 1) }, plain),
        (problem(3, CommType::A2a, 0, 12, 6, 3), Options { saved: true, ..plain }),
        (Problem { kv_wire: Some(Fp8::E4m3), ..problem(3, CommType::P2p, 0, 13, 2, 1) }, plain),
        (
            Problem { kv_wire: Some(Fp8::E5m2), ..problem(4, CommType::A2aP2p, 2, 11, 3, 1) },
            Options { saved: true, ..plain },
        ),
        (Problem { score, ..problem(4, CommType::A2aP2p, 2, 11, 3, 1) }, plain),
        (latent(3, CommType::P2p, 0, 13, 2), plain),
        (latent(4, CommType::A2aP2p, 2, 11, 3), plain),
    ] {
        p.validate().unwrap();
        let p = Arc::new(p);
        for pass in [Pass::Forward, Pass::Backward] {
            let plans = Plan::all(&p, pass, options);
            check(&plans).unwrap();
            out.push(plans);
        }
    }
    out
}

/// Plants a fault at every place that `places` lists, one at a time; every one must be reported with one of `texts`.
/// `plant` says whether it changed anything that matters.
pub fn every<P: Copy + std::fmt::Debug>(
    name: &str,
    places: impl Fn(&[Plan]) -> Vec<P>,
    plant: impl Fn(&mut Vec<Plan>, P) -> bool,
    texts: &[&str],
) {
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for plans in good_plans() {
        for place in places(&plans) {
            let mut faulty = plans.clone();
            if !plant(&mut faulty, place) {
                continue;
            }
            let show = || {
                let p = &plans[0].problem;
                format!("{name} at {place:?}, {:?} {p:?}\n{}", plans[0].pass, plans[0])
            };
            let Err(error) = check(&faulty) else { panic!("not caught: {}", show()) };
            let Some(text) = texts.iter().find(|t| error.contains(**t)) else {
                panic!("{error:?} is none of {texts:?}: {}", show())
            };
            *seen.entry(text).or_default() += 1;
        }
    }
    println!("{name}: {seen:?}");
    assert!(
        texts.iter().all(|t| seen.contains_key(t)),
        "{name} should also show as {texts:?}: {seen:?}"
    );
}

/// (rank, step) of all steps that `wanted` picks.
pub fn steps(wanted: impl Fn(&Step) -> bool) -> impl Fn(&[Plan]) -> Vec<(usize, usize)> {
    move |plans| {
        let of = |(rank, plan): (usize, &Plan)| {
            let picked = plan.steps.iter().enumerate().filter(|(_, s)| wanted(s));
            picked.map(|(i, _)| (rank, i)).collect::<Vec<_>>()
        };
        plans.iter().enumerate().flat_map(of).collect()
    }
}

/// Removes a step but keeps its waits and signal, so that only its doing is missing.
fn drop_step(plan: &mut Plan, index: usize) {
    let step = plan.steps.remove(index);
    if let Some(next) = plan.steps[index..].iter_mut().find(|s| s.lane == step.lane) {
        next.waits.extend(&step.waits);
    }
    let Some(event) = step.signal else { return };
    let before = plan.steps[..index].iter_mut().rev().find(|s| s.lane == step.lane);
    match before {
        Some(before) if before.signal.is_none() => {
            before.signal = Some(event);
        }
        other => {
            let instead = other.and_then(|s| s.signal);
            for s in &mut plan.steps {
                s.waits.retain(|e| *e != event || instead.is_some());
                s.waits.iter_mut().filter(|e| **e == event).for_each(|e| *e = instead.unwrap());
            }
        }
    }
}

fn is_copy(step: &Step, adds: bool) -> bool {
    matches!(step.op, Op::Copy { add, .. } if add == adds)
}

fn exchange(step: &mut Step) -> (&mut Vec<Message>, &mut Vec<Message>) {
    match &mut step.op {
        Op::Exchange { sends, recvs } => (sends, recvs),
        op => panic!("{op} is no exchange"),
    }
}

/// (rank, step, message) of all sends, or receives.
fn messages(received: bool) -> impl Fn(&[Plan]) -> Vec<(usize, usize, usize)> {
    move |plans| {
        let mut out = Vec::new();
        for (rank, index) in steps(|s| s.lane == Lane::Comm)(plans) {
            let mut step = plans[rank].steps[index].clone();
            let (sends, recvs) = exchange(&mut step);
            let count = if received { recvs.len() } else { sends.len() };
            out.extend((0..count).map(|m| (rank, index, m)));
        }
        out
    }
}

/// Where the receive of a send is: counted per pair of ranks, in order.
fn counterpart(plans: &[Plan], place: (usize, usize, usize)) -> (usize, usize, usize) {
    let (rank, index, message) = place;
    let peer_of = |(rank, index, m): (usize, usize, usize), received: bool| {
        let mut step = plans[rank].steps[index].clone();
        let (sends, recvs) = exchange(&mut step);
        if received { recvs[m].peer as usize } else { sends[m].peer as usize }
    };
    let to = peer_of((rank, index, message), false);
    let sent = messages(false)(plans);
    let same = |p: &(usize, usize, usize)| p.0 == rank && peer_of(*p, false) == to;
    let nth = sent.iter().filter(|p| same(p)).position(|p| *p == place).unwrap();
    let received = messages(true)(plans);
    *received.iter().filter(|p| p.0 == to && peer_of(**p, true) == rank).nth(nth).unwrap()
}

fn slot_of(plan: &mut Plan, slot: Slot) -> &mut SlotInfo {
    plan.slots.iter_mut().find(|s| s.slot == slot).unwrap()
}

#[test]
fn messages_that_are_missing_or_swapped() {
    every(
        "send dropped",
        messages(false),
        |plans, (rank, index, m)| {
            exchange(&mut plans[rank].steps[index]).0.remove(m);
            true
        },
        &["deadlock", "mismatch"],
    );
    every(
        "receive dropped",
        messages(true),
        |plans, (rank, index, m)| {
            exchange(&mut plans[rank].steps[index]).1.remove(m);
            true
        },
        &["deadlock", "mismatch", "nobody wrote", "of head"],
    );
    every(
        "message dropped on both sides",
        messages(false),
        |plans, place| {
            let (to, at, m) = counterpart(plans, place);
            exchange(&mut plans[to].steps[at]).1.remove(m);
            exchange(&mut plans[place.0].steps[place.1]).0.remove(place.2);
            true
        },
        &["nobody wrote", "of head", "is not the sum"],
    );
    every(
        "two messages to one peer swapped",
        |plans| {
            let pairs = |(rank, index, m): (usize, usize, usize)| {
                (0..m).map(move |other| (rank, index, other, m))
            };
            messages(false)(plans).into_iter().flat_map(pairs).collect()
        },
        |plans, (rank, index, a, b)| {
            let sends = exchange(&mut plans[rank].steps[index]).0;
            sends.swap(a, b);
            sends[a].peer == sends[b].peer
        },
        &["mismatch"],
    );
    every(
        "exchanges of one rank in another order",
        |plans| {
            let next = |(rank, index): (usize, usize)| {
                let later =
                    plans[rank].steps[index + 1..].iter().position(|s| s.lane == Lane::Comm)?;
                Some((rank, index, index + 1 + later))
            };
            steps(|s| s.lane == Lane::Comm)(plans).into_iter().filter_map(next).collect()
        },
        |plans, (rank, a, b)| {
            let op = plans[rank].steps[a].op.clone();
            plans[rank].steps[a].op = std::mem::replace(&mut plans[rank].steps[b].op, op);
            true
        },
        &["deadlock", "mismatch", "nothing orders", "nobody wrote"],
    );
}

#[test]
fn rows_that_go_wrong() {
    every(
        "received a row off",
        |plans| messages(true)(plans).into_iter().flat_map(|p| [(p, 1), (p, -1)]).collect(),
        |plans, ((rank, index, m), by)| {
            let rows = &mut exchange(&mut plans[rank].steps[index]).1[m].rows[0];
            rows.first = rows.first.wrapping_add_signed(by);
            true
        },
        &["nobody wrote", "twice", "not row", "of head", "is not the sum"],
    );
    every(
        "sent a row off",
        |plans| messages(false)(plans).into_iter().flat_map(|p| [(p, 1), (p, -1)]).collect(),
        |plans, ((rank, index, m), by)| {
            let rows = &mut exchange(&mut plans[rank].steps[index]).0[m].rows[0];
            rows.first = rows.first.wrapping_add_signed(by);
            true
        },
        &["of head", "is not the sum", "nobody wrote", "not row", "touches"],
    );
    every(
        "last row neither sent nor received",
        messages(false),
        |plans, place| {
            let (to, at, m) = counterpart(plans, place);
            // A relay passes on rows that its last reader does not need.
            if plans[0].problem.relay {
                return false;
            }
            let shorten = |message: &mut Message| {
                let last = message.rows.iter_mut().rfind(|r| r.count > 0).unwrap();
                last.count -= 1;
                message.count() > 0
            };
            shorten(&mut exchange(&mut plans[to].steps[at]).1[m])
                && shorten(&mut exchange(&mut plans[place.0].steps[place.1]).0[place.2])
        },
        &["nobody wrote", "of head", "is not the sum"],
    );
    every(
        "a key too many sent and received",
        messages(false),
        |plans, place| {
            let (to, at, m) = counterpart(plans, place);
            let slot = exchange(&mut plans[to].steps[at]).1[m].slot;
            let own = exchange(&mut plans[place.0].steps[place.1]).0[place.2].slot;
            if slot.kind != Kind::Recv || plans[0].problem.relay || own.kind == Kind::Recv {
                return false;
            }
            let end = plans[to].info(slot).rows;
            slot_of(&mut plans[to], slot).rows += 1;
            exchange(&mut plans[to].steps[at]).1[m].rows.push(Rows::range(end, 1));
            exchange(&mut plans[place.0].steps[place.1]).0[place.2].rows.push(Rows::range(0, 1));
            true
        },
        &["needs"],
    );
    every(
        "copied a row off",
        |plans| {
            let copies = steps(|s| matches!(s.op, Op::Copy { .. }))(plans);
            copies.into_iter().flat_map(|p| [(p, 0), (p, 1), (p, 2)]).collect()
        },
        |plans, ((rank, index), what)| {
            if plans[0].problem.relay {
                // A relay carries rows that are always 0.
                return false;
            }
            let Op::Copy { runs, .. } = &mut plans[rank].steps[index].op else { unreachable!() };
            match what {
                0 => runs[0].src += 1,
                1 => runs[0].dst += 1,
                _ => runs[0].rows -= 1,
            }
            true
        },
        &["not row", "nobody wrote", "is not the sum", "of head", "the plan says"],
    );
}

/// The (query row, key row) pairs of a list of slices, sorted.
fn pairs(slices: &[Slice]) -> Vec<(u32, u32)> {
    let rows = slices.iter().flat_map(|s| (0..s.q_len).map(move |i| (s, i)));
    let mut out: Vec<_> = rows.flat_map(|(s, i)| s.keys_of(i).map(move |j| (s.q + i, j))).collect();
    out.sort_unstable();
    out
}

fn slices(step: &mut Step) -> Option<&mut Vec<Slice>> {
    match &mut step.op {
        Op::Attend { slices, .. } | Op::AttendBackward { slices, .. } => Some(slices),
        _ => None,
    }
}

#[test]
fn slices_that_are_wrong() {
    let each = |plans: &[Plan]| -> Vec<(usize, usize, usize)> {
        let attends = steps(|s| slices(&mut s.clone()).is_some_and(|list| !list.is_empty()))(plans);
        let count =
            |rank: usize, i: usize| slices(&mut plans[rank].steps[i].clone()).unwrap().len();
        attends.into_iter().flat_map(|(r, i)| (0..count(r, i)).map(move |s| (r, i, s))).collect()
    };
    let changes: [fn(&mut Slice); 14] = [
        |s| s.q += 1,
        |s| s.q = s.q.wrapping_sub(1),
        |s| s.k += 1,
        |s| s.k = s.k.wrapping_sub(1),
        |s| s.q_len += 1,
        |s| s.q_len -= 1,
        |s| s.k_len += 1,
        |s| s.k_len -= 1,
        |s| s.lo -= 1,
        |s| s.lo += 1,
        |s| s.hi -= 1,
        |s| s.hi += 1,
        |s| (s.lo, s.hi) = (s.lo + 1, s.hi + 1),
        |s| (s.lo, s.hi) = (s.lo - 1, s.hi - 1),
    ];
    every(
        "slice changed",
        |plans| each(plans).into_iter().flat_map(|p| (0..14).map(move |c| (p, c))).collect(),
        |plans, ((rank, index, at), change)| {
            let list = slices(&mut plans[rank].steps[index]).unwrap();
            let before = pairs(list);
            changes[change](&mut list[at]);
            // A bound beyond the slice's edge means the same as one at it.
            list[at].q > 1 << 20 || list[at].k > 1 << 20 || pairs(list) != before
        },
        &[
            "is not the sum",
            "not tight",
            "not row",
            "goes beyond",
            "nobody wrote",
            "is padding",
            "not sorted",
        ],
    );
    every(
        "slice dropped",
        each,
        |plans, (rank, index, at)| {
            slices(&mut plans[rank].steps[index]).unwrap().remove(at);
            true
        },
        &["is not the sum"],
    );
    every(
        "slice done twice",
        each,
        |plans, (rank, index, at)| {
            let list = slices(&mut plans[rank].steps[index]).unwrap();
            list.insert(at, list[at]);
            true
        },
        &["is not the sum"],
    );
}

#[test]
fn steps_that_are_missing_or_wrong() {
    every(
        "fill dropped",
        steps(|s| matches!(s.op, Op::Fill { .. })),
        |plans, (rank, index)| {
            drop_step(&mut plans[rank], index);
            true
        },
        &["nobody wrote", "is not the sum"],
    );
    every(
        "filled with the wrong value",
        steps(|s| matches!(s.op, Op::Fill { .. })),
        |plans, (rank, index)| {
            let Op::Fill { value, .. } = &mut plans[rank].steps[index].op else { unreachable!() };
            *value = if *value == Value::Zero { Value::NegInf } else { Value::Zero };
            true
        },
        &["must be"],
    );
    every(
        "sum dropped",
        steps(|s| is_copy(s, true)),
        |plans, (rank, index)| {
            drop_step(&mut plans[rank], index);
            true
        },
        &["is not the sum"],
    );
    every(
        "overwritten instead of added",
        steps(|s| is_copy(s, true)),
        |plans, (rank, index)| {
            let Op::Copy { add, src, .. } = &mut plans[rank].steps[index].op else {
                unreachable!()
            };
            *add = false;
            // Where members' heads meet, only one of two sums may have something before it.
            src.kind == Kind::Return
        },
        &["is not the sum"],
    );
    every(
        "added instead of overwritten",
        steps(|s| is_copy(s, false)),
        |plans, (rank, index)| {
            let Op::Copy { add, .. } = &mut plans[rank].steps[index].op else { unreachable!() };
            *add = true;
            true
        },
        &["not fp32", "nobody wrote"],
    );
    every(
        "copy dropped",
        steps(|s| is_copy(s, false)),
        |plans, (rank, index)| {
            drop_step(&mut plans[rank], index);
            true
        },
        &["nobody wrote", "is not the sum", ", rounded"],
    );
    every(
        "wrong head in a copy",
        |plans| {
            let copies = steps(|s| matches!(s.op, Op::Copy { .. }))(plans);
            copies.into_iter().flat_map(|p| (0..4).map(move |w| (p, w))).collect()
        },
        |plans, ((rank, index), what)| {
            let Op::Copy { src_head, dst_head, .. } = &mut plans[rank].steps[index].op else {
                unreachable!()
            };
            let head = if what < 2 { src_head } else { dst_head };
            *head = if what % 2 == 0 { *head + 1 } else { head.wrapping_sub(1) };
            *head < 1 << 20
        },
        &["heads", "of head", "is not the sum", "nobody wrote"],
    );
    every(
        "attend dropped",
        steps(|s| slices(&mut s.clone()).is_some_and(|list| !list.is_empty())),
        |plans, (rank, index)| {
            drop_step(&mut plans[rank], index);
            true
        },
        &["is not the sum", "nobody wrote"],
    );
    every(
        "state started anew, or not at all",
        steps(|s| matches!(s.op, Op::Attend { .. })),
        |plans, (rank, index)| {
            let Op::Attend { first, .. } = &mut plans[rank].steps[index].op else { unreachable!() };
            *first = !*first;
            true
        },
        &["is not the sum", "nobody wrote", "no slot"],
    );
    every(
        "result not written, or too early",
        steps(|s| matches!(s.op, Op::Attend { .. })),
        |plans, (rank, index)| {
            let out = plans[rank].steps.iter().find_map(|s| match &s.op {
                Op::Attend { last, .. } => *last,
                _ => None,
            });
            let Op::Attend { last, .. } = &mut plans[rank].steps[index].op else { unreachable!() };
            *last = if last.is_some() { None } else { out };
            true
        },
        &["is not the sum", "nobody wrote", "no slot"],
    );
    every(
        "step on the other lane",
        steps(|_| true),
        |plans, (rank, index)| {
            let lane = &mut plans[rank].steps[index].lane;
            *lane = if *lane == Lane::Comm { Lane::Compute } else { Lane::Comm };
            true
        },
        &["wrong lane"],
    );
}

/// Scores that depend on tokens need the right ones.
#[test]
fn tokens_that_are_not_there() {
    let places = |plans: &[Plan]| -> Vec<(usize, usize, usize)> {
        let origins = plans.iter().enumerate().filter_map(|(r, p)| Some((r, p.origins.as_ref()?)));
        let lists = origins.flat_map(|(r, o)| (0..=o.keys.len()).map(move |list| (r, list, o)));
        lists
            .flat_map(|(r, list, o)| {
                let segments = if list == 0 { &o.queries } else { &o.keys[list - 1] };
                (0..segments.len()).map(move |s| (r, list, s))
            })
            .collect()
    };
    every(
        "a segment one token later",
        places,
        |plans, (r, list, s)| {
            let origins = plans[r].origins.as_mut().unwrap();
            let list = if list == 0 { &mut origins.queries } else { &mut origins.keys[list - 1] };
            list[s].start += 1;
            !plans[r].share.q.is_empty()
        },
        &["the plan says"],
    );
}

/// Numbers per head.
#[test]
fn numbers_that_are_not_reduced() {
    let reduces = |s: &Step| matches!(s.op, Op::Reduce { .. } | Op::SinkTerms);
    every(
        "a reduction left out",
        steps(reduces),
        |plans, (rank, index)| {
            drop_step(&mut plans[rank], index);
            true
        },
        &["nobody wrote", "is not the sum"],
    );
    every(
        "another row of the ranks'",
        steps(|s| matches!(s.op, Op::Reduce { dst, .. } if dst.kind == Kind::Ranks)),
        |plans, (rank, index)| {
            let ranks = plans[rank].problem.ranks;
            let Op::Reduce { dst_row, .. } = &mut plans[rank].steps[index].op else { panic!() };
            *dst_row = (*dst_row + 1) % ranks;
            true
        },
        &["nobody wrote", "is not the sum"],
    );
}

/// A feature whose slot is missing would not be computed, and nobody would notice.
#[test]
fn features_that_are_left_out() {
    let kinds = [
        Slot::caller(Tensor::Sinks),
        Slot::caller(Tensor::Bias),
        Slot::of(Kind::Team, Tensor::Bias),
        Slot::of(Kind::Acc, Tensor::Top),
    ];
    every(
        "a slot that is missing",
        |plans| (0..plans.len()).flat_map(|r| (0..kinds.len()).map(move |k| (r, k))).collect(),
        |plans, (rank, kind)| {
            let before = plans[rank].slots.len();
            plans[rank].slots.retain(|s| s.slot != kinds[kind]);
            before != plans[rank].slots.len()
        },
        &["no slot"],
    );
    every(
        "the sum instead of the largest, or the reverse",
        steps(|s| matches!(s.op, Op::Reduce { .. })),
        |plans, (rank, index)| {
            let Op::Reduce { max, .. } = &mut plans[rank].steps[index].op else { panic!() };
            *max = !*max;
            true
        },
        &["the wrong way"],
    );
    every(
        "queries that are said to be padding",
        |plans| {
            let with = plans.iter().enumerate().filter_map(|(r, p)| Some((r, p.origins.as_ref()?)));
            with.flat_map(|(r, o)| (0..o.queries.len()).map(move |s| (r, s))).collect()
        },
        |plans, (rank, segment): (usize, usize)| {
            plans[rank].origins.as_mut().unwrap().queries.remove(segment);
            !plans[rank].share.q.is_empty()
        },
        &["the plan says"],
    );
}

/// Names of buffers in a step, receive buffers and the like.
fn staged(step: &mut Step) -> Vec<&mut Slot> {
    let all: Vec<&mut Slot> = match &mut step.op {
        Op::Exchange { sends, recvs } => {
            sends.iter_mut().chain(recvs).map(|m| &mut m.slot).collect()
        }
        Op::Attend { k, .. } => vec![k],
        Op::AttendBackward { k, dk, .. } => vec![k, dk],
        Op::Copy { src, dst, .. } => vec![src, dst],
        Op::Fill { slot, .. } => vec![slot],
        Op::Reduce { src, dst, .. } => vec![src, dst],
        Op::Expand { latent, .. } => vec![latent],
        Op::Contract { latent, d_latent, .. } => vec![latent, d_latent],
        Op::Delta | Op::SinkTerms => vec![],
    };
    let staged = [Kind::Recv, Kind::Part, Kind::Wire, Kind::Return];
    all.into_iter().filter(|s| staged.contains(&s.kind)).collect()
}

#[test]
fn slots_that_are_confused() {
    every(
        "the other slot of a pair, once",
        |plans| {
            let all = steps(|s| !staged(&mut s.clone()).is_empty())(plans);
            let count = |(r, i): (usize, usize)| staged(&mut plans[r].steps[i].clone()).len();
            all.into_iter().flat_map(|p| (0..count(p)).map(move |n| (p, n))).collect()
        },
        |plans, ((rank, index), n)| {
            let mut list = staged(&mut plans[rank].steps[index]);
            list[n].index = 1 - list[n].index;
            true
        },
        &[
            "twice",
            "nobody wrote",
            "no slot",
            "not row",
            "nothing orders",
            "is not the sum",
            ", rounded",
        ],
    );
    // Two stages in one slot, everywhere: right on one queue, wrong on two.
    for kind in [Kind::Recv, Kind::Part, Kind::Wire, Kind::Return] {
        every(
            &format!("one {kind:?} slot instead of two"),
            |plans| {
                // A relay receives and sends at once, so one slot is wrong even there.
                let p = &plans[0].problem;
                vec![(); usize::from(p.stages > 2 && !p.relay)]
            },
            |plans, ()| {
                let mut changed = false;
                for plan in plans {
                    use Tensor::{DK, DLatent, DV, K, Latent, V};
                    for tensor in [K, V, DK, DV, Latent, DLatent] {
                        let [even, odd] = [0, 1].map(|i| Slot::indexed(kind, tensor, i));
                        let Some(at) = plan.slots.iter().position(|s| s.slot == odd) else {
                            continue;
                        };
                        if !plan.slots.iter().any(|s| s.slot == even) {
                            continue;
                        }
                        let rows = plan.slots.remove(at).rows;
                        let one = slot_of(plan, even);
                        one.rows = one.rows.max(rows);
                        changed = true;
                    }
                    let steps = plan.steps.iter_mut().flat_map(staged);
                    steps.filter(|s| s.kind == kind).for_each(|s| s.index = 0);
                }
                changed
            },
            &["nothing orders"],
        );
    }
    every(
        "slot larger than used",
        |plans| (0..plans[0].slots.len()).collect(),
        |plans, slot| {
            let info = &mut plans[0].slots[slot];
            info.rows += 1;
            // Other kinds are touched as a whole, whatever their size.
            exact(info.slot.kind) && info.row_bytes() > 0
        },
        &["rows, but only"],
    );
}

/// Are the rows of such slots named one by one in steps?
fn exact(kind: Kind) -> bool {
    use Kind::{Merge, Part, Recv, Return, Split, Wire};
    matches!(kind, Recv | Part | Wire | Return | Split | Merge)
}

/// A return that both sides forget: the messages, and the sum that reads them.
#[test]
fn a_missing_return() {
    every(
        "return forgotten",
        messages(false),
        |plans, place| {
            let (to, at, m) = counterpart(plans, place);
            let slot = exchange(&mut plans[to].steps[at]).1[m].slot;
            if slot.kind != Kind::Return {
                return false;
            }
            let sum = plans[to].steps[at..]
                .iter()
                .position(|s| matches!(&s.op, Op::Copy { src, add: true, .. } if *src == slot));
            exchange(&mut plans[to].steps[at]).1.remove(m);
            exchange(&mut plans[place.0].steps[place.1]).0.remove(place.2);
            drop_step(&mut plans[to], at + sum.unwrap());
            true
        },
        &["is not the sum", "nobody wrote"],
    );
}

/// Plans that are not each other's.
#[test]
fn plans_of_different_problems() {
    let plans = &good_plans()[0];
    assert!(check(&plans[..3]).unwrap_err().contains("3 plans for 4 ranks"));
    let mut turned = plans.clone();
    turned.rotate_left(1);
    assert!(check(&turned).unwrap_err().contains("not rank 0's"));
    assert!(check(&[]).is_err());
}
