//! Plain attention: what a careful single-rank implementation in the storage type computes. Its error is the yardstick.

use super::Results;
use super::case::Case;
use super::inputs::{Inputs, round};
use super::latent;
use context_parallel::dtype::DType;
use context_parallel::partition::Side;

/// How to compute. [`Variation::of`] is plain attention; the metric's own tests plant errors by changing a field.
pub struct Variation<'a> {
    /// Multiplies q·k.
    pub scale: f32,
    /// May query `i` of a sequence see its key `j`?
    pub sees: &'a dyn Fn(usize, usize, usize) -> bool,
    /// Type of the running sums of O, dQ, dK and dV.
    pub accumulator: DType,
}

impl<'a> Variation<'a> {
    /// No error planted.
    pub fn of(case: &Case, sees: &'a dyn Fn(usize, usize, usize) -> bool) -> Variation<'a> {
        Variation { scale: case.scale, sees, accumulator: DType::F32 }
    }
}

/// fp32 scores, softmax (libm's exp) and sums; P and dS rounded to the storage type before the products, D from the rounded O, one
/// final multiplication with the scale and rounding. The forward product takes exp(s − max), which is divided by its sum at the end; the backward product exp(s − LSE).
pub fn plain(case: &Case, x: &Inputs, dtype: DType, how: &Variation) -> Results<f32> {
    let mut out = Results::empty(case, 0.0, f32::NEG_INFINITY);
    for seq in 0..case.seqs.len() {
        for head in 0..case.heads {
            for i in 0..case.seqs[seq].q.len as usize {
                row(case, x, dtype, how, (seq, head, i), &mut out);
            }
        }
    }
    for (gradient, scale) in
        [(&mut out.dq, how.scale), (&mut out.dk, how.scale), (&mut out.dv, 1.0)]
    {
        gradient.iter_mut().for_each(|g| *g = round(scale * *g, dtype));
    }
    out.d_bias.iter_mut().for_each(|g| *g = round(*g, dtype));
    latent::plain(case, x, dtype, &mut out);
    out
}

fn row(
    case: &Case,
    x: &Inputs,
    dtype: DType,
    how: &Variation,
    (seq, head, i): (usize, usize, usize),
    out: &mut Results<f32>,
) {
    let (dqk, dv) = (case.dim_qk, case.dim_v);
    let kv_head = head / (case.heads / case.kv_heads);
    let query = (case.first(seq, Side::Query) + i) * case.heads + head;
    let (q, d_o) = (&x.q[query * dqk..][..dqk], &x.d_o[query * dv..][..dv]);
    let first_key = case.first(seq, Side::Key);
    let keys: Vec<usize> = (0..case.seqs[seq].k.len as usize)
        .filter(|&j| (how.sees)(seq, i, j))
        .map(|j| (first_key + j) * case.kv_heads + kv_head)
        .collect();
    let sink = case.sinks.map(|_| x.sinks[head]);
    if keys.is_empty() {
        out.lse[query] = sink.unwrap_or(f32::NEG_INFINITY);
        return;
    }
    let k = |key: usize| &x.k[key * dqk..][..dqk];
    let v = |key: usize| &x.v[key * dv..][..dv];
    let add = |sums: &mut [f32], factor: f32, row: &[f32]| {
        sums.iter_mut().zip(row).for_each(|(s, x)| *s = round(*s + factor * x, how.accumulator));
    };
    let slope = case.slopes.get(head).copied().unwrap_or(0.0);
    let score = |key: usize| -> (f32, f32) {
        let j = key / case.kv_heads - first_key;
        let (mut score, mut derivative) = (how.scale * dot(q, k(key)), 1.0);
        if case.softcap > 0.0 {
            let t = (score / case.softcap).tanh();
            (score, derivative) = (case.softcap * t, 1.0 - t * t);
        }
        let bias = case.bias.map_or(0.0, |_| x.bias[case.bias_row(seq, head, i) + j]);
        (score - slope * case.distance(seq, i, j) as f32 + bias, derivative)
    };
    let kept = |key: usize| match case.dropout > 0.0 {
        true if case.keeps(seq, head, i, key / case.kv_heads - first_key) => {
            1.0 / (1.0 - case.dropout)
        }
        true => 0.0,
        false => 1.0,
    };

    let scores: Vec<(f32, f32)> = keys.iter().map(|&key| score(key)).collect();
    let max = scores.iter().map(|s| s.0).fold(sink.unwrap_or(f32::NEG_INFINITY), f32::max);
    let mut sum = sink.map_or(0.0, |s| (s - max).exp());
    let mut o = vec![0.0; dv];
    for (&key, (s, _)) in keys.iter().zip(&scores) {
        let p = (s - max).exp();
        sum += p;
        add(&mut o, round(p * kept(key), dtype), v(key));
    }
    let lse = max + sum.ln();
    o.iter_mut().for_each(|o| *o = round(*o / sum, dtype));
    let delta = dot(&o, d_o);
    out.o[query * dv..][..dv].copy_from_slice(&o);
    out.lse[query] = lse;

    for (&key, (s, derivative)) in keys.iter().zip(&scores) {
        let p = (s - lse).exp();
        let slant = p * (kept(key) * dot(d_o, v(key)) - delta);
        if case.bias.is_some_and(|b| b.gradient) {
            let j = key / case.kv_heads - first_key;
            out.d_bias[case.bias_row(seq, head, i) + j] += slant;
        }
        let ds = round(slant * derivative, dtype);
        let p = round(p * kept(key), dtype);
        add(&mut out.dq[query * dqk..][..dqk], ds, k(key));
        add(&mut out.dk[key * dqk..][..dqk], ds, q);
        add(&mut out.dv[key * dv..][..dv], p, d_o);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
