//! Plans as JSON, for tools in any language.
//!
//! ```text
//! { "version": "0.1.0", "problem": Problem, "plans": [Plan, …] }
//!
//! Problem  { "fingerprint": "hex", "ranks", "inner", "stages", "relay", "partition": "zigzag" | "contiguous" | "striped" | List,
//!            "mask": { "causal", "bottom_right", "left": n | null, "right": n | null }, "slices": [Region, …] (none: the mask alone), "packed",
//!            "sequences": [ { "q": Extent, "k": Extent }, … ], "heads", "kv_heads", "dim_qk", "dim_v",
//!            "dtype": "fp32" | "bf16" | "fp16", "wire": "storage" | "fp32", "kv_wire": "storage" | "e4m3" | "e5m2", "scale",
//!            "latent": [dim, rope] | null }
//! Extent   { "before", "len", "padded" }: padding tokens, true tokens, all tokens
//! Region   [seq, first query, one past the last, first key, one past the last, lo | null, hi | null]: within it lo <= key − query <= hi
//! List     { "q": [per rank: [ { "seq", "start", "step", "len" }, … ], …], "k": likewise }
//! Plan     { "rank", "pass": "forward" | "backward", "pack", "saved", "stages": n, "heads": [from, to],
//!            "kv_heads": [from, to], "events": n, "slots": [Slot, …], "steps": [Step, …], "account": Account }
//! Slot     { "name", "kind", "tensor", "index", "rows", "heads", "dim", "dtype", "saved", "bytes" }
//! Step     { "lane": "compute" | "comm", "stage", "waits": [event, …], "signal": event | null, "op": name, … }, by op:
//!   exchange         "sends": [Message, …], "recvs": [Message, …]; Message { "peer", "slot", "rows": [Rows, …], "bytes" }
//!   attend           "q", "k", "slices": [Slice, …], "first", "out", "lse" (the last two null unless it is the last)
//!   attend_backward  "q", "d_out", "lse", "delta", "k", "dk", "slices"
//!   expand           "latent", "k", "rows": [Rows, …]
//!   contract         "dk", "latent", "d_latent", "rows": [Rows, …]
//!   delta            nothing
//!   copy             "src", "src_head", "dst", "dst_head", "heads", "add", "runs": [[src, src_step, dst, dst_step, rows], …]
//!   fill             "slot", "rows": [Rows, …], "value": "0" | "-inf"
//! Rows     [first, step, count]
//! Slice    [q, q_len, k, k_len, lo, hi]: row q + i sees row k + j when lo <= j − i <= hi
//! Account  { "sent", "received", "received_keys", "received_key_rows", "received_gradients", "received_heads", "pairs", "flops",
//!            "latent_flops", "workspace", "saved" }, in bytes where not rows, pairs or operations
//! ```
//! Slots are named as plans print them. Numbers are integers, but for `scale`. A slot that an op names without being in the
//! schema is implied: values lie beside keys, weights of latents are the caller's, state in `AccOut`, `AccMax`, `AccSum`, gradients of queries in `AccDQ`.

use super::account::account;
use super::{Lane, Message, Op, Pass, Plan, Rows, Step, Value};
use crate::backend::Run;
use crate::dtype::DType;
use crate::mask::Slice;
use crate::partition::{Partition, Stretch};
use crate::problem::{Extent, Problem, Wire};
use crate::regions::Region;
use std::fmt::{Display, Write};
use std::ops::Range;

/// The plans of one problem, in the schema above.
pub fn json(plans: &[Plan]) -> String {
    let problem = plans.first().map_or("null".into(), |p| problem(&p.problem));
    let plans = list(plans.iter().map(one));
    object(&[("version", text(env!("CARGO_PKG_VERSION"))), ("problem", problem), ("plans", plans)])
}

/// One plan with its problem, in the same schema.
pub fn plan(plan: &Plan) -> String {
    json(std::slice::from_ref(plan))
}

/// One problem, as in [`json`].
pub fn problem(p: &Problem) -> String {
    let extent = |e: Extent| {
        object(&[("before", num(e.before)), ("len", num(e.len)), ("padded", num(e.padded))])
    };
    let sequence = |s: &crate::problem::Sequence| object(&[("q", extent(s.q)), ("k", extent(s.k))]);
    let mask = object(&[
        ("causal", num(p.mask.causal)),
        ("bottom_right", num(p.mask.bottom_right)),
        ("left", option(p.mask.left)),
        ("right", option(p.mask.right)),
    ]);
    let partition = match &p.partition {
        Partition::Zigzag => text("zigzag"),
        Partition::Contiguous => text("contiguous"),
        Partition::Striped => text("striped"),
        Partition::Balanced => text("balanced"),
        Partition::List { q, k } => object(&[("q", stretches(q)), ("k", stretches(k))]),
    };
    object(&[
        ("fingerprint", text(format!("{:016x}", p.fingerprint()))),
        ("ranks", num(p.ranks)),
        ("inner", num(p.inner)),
        ("stages", num(p.stages)),
        ("relay", num(p.relay)),
        ("partition", partition),
        ("mask", mask),
        ("slices", list(p.regions.list().iter().map(region))),
        ("packed", num(p.packed)),
        ("sequences", list(p.seqs.iter().map(sequence))),
        ("heads", num(p.heads)),
        ("kv_heads", num(p.kv_heads)),
        ("dim_qk", num(p.dim_qk)),
        ("dim_v", num(p.dim_v)),
        ("dtype", dtype(p.dtype)),
        ("wire", text(if p.wire == Wire::F32 { "fp32" } else { "storage" })),
        ("kv_wire", text(p.kv_wire.map_or("storage", |f| f.name()))),
        ("scale", num(p.scale)),
        ("latent", p.latent.map_or("null".into(), |l| list([num(l.dim), num(l.rope)]))),
    ])
}

fn region(r: &Region) -> String {
    let limit = |x: Option<i32>| x.map_or("null".into(), num);
    let plain = [r.seq, r.q.0, r.q.1, r.k.0, r.k.1].map(num);
    list(plain.into_iter().chain([limit(r.lo), limit(r.hi)]))
}

fn stretches(lists: &[Vec<Stretch>]) -> String {
    let one = |s: &Stretch| {
        object(&[
            ("seq", num(s.seq)),
            ("start", num(s.start)),
            ("step", num(s.step)),
            ("len", num(s.len)),
        ])
    };
    list(lists.iter().map(|rank| list(rank.iter().map(one))))
}

fn one(plan: &Plan) -> String {
    let slots = plan.slots.iter().map(|s| {
        object(&[
            ("name", debug(s.slot)),
            ("kind", debug(s.slot.kind)),
            ("tensor", debug(s.slot.tensor)),
            ("index", num(s.slot.index)),
            ("rows", num(s.rows)),
            ("heads", num(s.heads)),
            ("dim", num(s.dim)),
            ("dtype", dtype(s.dtype)),
            ("saved", num(s.saved)),
            ("bytes", num(s.bytes())),
        ])
    });
    let a = account(plan);
    let cost = object(&[
        ("sent", num(a.sent)),
        ("received", num(a.received)),
        ("received_keys", num(a.received_keys)),
        ("received_key_rows", num(a.received_key_rows)),
        ("received_gradients", num(a.received_gradients)),
        ("received_heads", num(a.received_heads)),
        ("pairs", num(a.pairs)),
        ("flops", num(a.flops)),
        ("latent_flops", num(a.latent_flops)),
        ("workspace", num(a.workspace)),
        ("saved", num(a.saved)),
    ]);
    let range = |r: &std::ops::Range<u32>| format!("[{},{}]", r.start, r.end);
    object(&[
        ("rank", num(plan.rank)),
        ("pass", text(pass_name(plan.pass))),
        ("pack", num(plan.options.pack)),
        ("saved", num(plan.options.saved)),
        ("stages", num(plan.stages)),
        ("heads", range(&plan.share.q)),
        ("kv_heads", range(&plan.share.kv)),
        ("events", num(plan.events)),
        ("slots", list(slots)),
        ("steps", list(plan.steps.iter().map(|s| step(plan, s)))),
        ("account", cost),
    ])
}

fn pass_name(pass: Pass) -> &'static str {
    match pass {
        Pass::Forward => "forward",
        Pass::Backward => "backward",
        Pass::ToHeads => "to_heads",
        Pass::ToSequence => "to_sequence",
    }
}

fn step(plan: &Plan, step: &Step) -> String {
    let mut fields = vec![
        ("lane", text(if step.lane == Lane::Comm { "comm" } else { "compute" })),
        ("stage", num(step.stage)),
        ("waits", list(step.waits.iter().map(num))),
        ("signal", option(step.signal)),
    ];
    let messages = |list_of: &[Message]| {
        list(list_of.iter().map(|m| {
            object(&[
                ("peer", num(m.peer)),
                ("slot", debug(m.slot)),
                ("rows", rows(&m.rows)),
                ("bytes", num(m.count() as usize * plan.info(m.slot).row_bytes())),
            ])
        }))
    };
    match &step.op {
        Op::Exchange { sends, recvs } => fields.extend([
            ("op", text("exchange")),
            ("sends", messages(sends)),
            ("recvs", messages(recvs)),
        ]),
        Op::Attend { q, k, slices: work, first, last } => fields.extend([
            ("op", text("attend")),
            ("q", debug(q)),
            ("k", debug(k)),
            ("slices", slices(work)),
            ("first", num(first)),
            ("out", last.map_or("null".into(), |(out, _)| debug(out))),
            ("lse", last.map_or("null".into(), |(_, lse)| debug(lse))),
        ]),
        Op::AttendBackward { q, d_out, lse, delta, k, dk, slices: work } => fields.extend([
            ("op", text("attend_backward")),
            ("q", debug(q)),
            ("d_out", debug(d_out)),
            ("lse", debug(lse)),
            ("delta", debug(delta)),
            ("k", debug(k)),
            ("dk", debug(dk)),
            ("slices", slices(work)),
        ]),
        Op::Expand { latent, k, rows } => fields.extend([
            ("op", text("expand")),
            ("latent", debug(latent)),
            ("k", debug(k)),
            ("rows", ranges(rows)),
        ]),
        Op::Contract { dk, latent, d_latent, rows } => fields.extend([
            ("op", text("contract")),
            ("dk", debug(dk)),
            ("latent", debug(latent)),
            ("d_latent", debug(d_latent)),
            ("rows", ranges(rows)),
        ]),
        Op::SinkTerms => fields.push(("op", text("sink_terms"))),
        Op::Reduce { src, dst, dst_row, dst_head, max } => fields.extend([
            ("op", text("reduce")),
            ("src", debug(src)),
            ("dst", debug(dst)),
            ("dst_row", num(dst_row)),
            ("dst_head", num(dst_head)),
            ("max", num(max)),
        ]),
        Op::Delta => fields.push(("op", text("delta"))),
        Op::Copy { src, src_head, dst, dst_head, heads, runs, add } => fields.extend([
            ("op", text("copy")),
            ("src", debug(src)),
            ("src_head", num(src_head)),
            ("dst", debug(dst)),
            ("dst_head", num(dst_head)),
            ("heads", num(heads)),
            ("add", num(add)),
            ("runs", list(runs.iter().map(run))),
        ]),
        Op::Fill { slot, rows: filled, value } => fields.extend([
            ("op", text("fill")),
            ("slot", debug(slot)),
            ("rows", rows(filled)),
            ("value", text(if *value == Value::Zero { "0" } else { "-inf" })),
        ]),
    }
    object(&fields)
}

/// As `rows`, of consecutive ones.
fn ranges(rows: &[Range<u32>]) -> String {
    list(rows.iter().map(|r| format!("[{},1,{}]", r.start, r.len())))
}

fn rows(rows: &[Rows]) -> String {
    list(rows.iter().map(|r| format!("[{},{},{}]", r.first, r.step, r.count)))
}

fn run(r: &Run) -> String {
    format!("[{},{},{},{},{}]", r.src, r.src_step, r.dst, r.dst_step, r.rows)
}

fn slices(slices: &[Slice]) -> String {
    let one = |s: &Slice| format!("[{},{},{},{},{},{}]", s.q, s.q_len, s.k, s.k_len, s.lo, s.hi);
    list(slices.iter().map(one))
}

fn dtype(d: DType) -> String {
    text(d.name())
}

/// A number or a truth value.
fn num(value: impl Display) -> String {
    value.to_string()
}

fn option(value: Option<u32>) -> String {
    value.map_or("null".into(), num)
}

/// A name; none of ours needs escaping.
fn text(value: impl Display) -> String {
    format!("\"{value}\"")
}

fn debug(value: impl std::fmt::Debug) -> String {
    format!("\"{value:?}\"")
}

fn list(items: impl IntoIterator<Item = String>) -> String {
    let mut out = String::from("[");
    for (i, item) in items.into_iter().enumerate() {
        let _ = write!(out, "{}{item}", if i > 0 { "," } else { "" });
    }
    out + "]"
}

fn object(fields: &[(&str, String)]) -> String {
    let mut out = String::from("{");
    for (i, (name, value)) in fields.iter().enumerate() {
        let _ = write!(out, "{}\"{name}\":{value}", if i > 0 { "," } else { "" });
    }
    out + "}"
}
