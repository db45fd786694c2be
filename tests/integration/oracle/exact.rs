//! The float64 oracle: attention and its gradients by a double loop over positions.

use super::Results;
use super::case::Case;
use super::inputs::Inputs;
use super::latent;
use context_parallel::partition::Side;

/// The right results, and how large the terms are that were summed to get them.
pub struct Exact {
    /// Right to fifteen digits.
    pub right: Results<f64>,
    /// The same sums with every term made positive: what rounding errors are proportional to when the terms cancel. LSE: unused.
    pub terms: Results<f64>,
    /// Which key tokens are seen by any query.
    pub seen: Vec<bool>,
    /// Which query tokens see any key. (A row with a sink has an LSE without.)
    pub sees: Vec<bool>,
}

pub fn exact(case: &Case, x: &Inputs) -> Exact {
    let mut out = Exact {
        right: Results::empty(case, 0.0, f64::NEG_INFINITY),
        terms: Results::empty(case, 0.0, 0.0),
        seen: vec![false; case.tokens(Side::Key)],
        sees: vec![false; case.tokens(Side::Query)],
    };
    for seq in 0..case.seqs.len() {
        for head in 0..case.heads {
            for i in 0..case.seqs[seq].q.len as usize {
                row(case, x, seq, head, i, &mut out);
            }
        }
    }
    latent::exact(case, x, &mut out);
    out
}

/// One query row: its own outputs, and what it adds to the gradients of the keys it sees.
fn row(case: &Case, x: &Inputs, seq: usize, head: usize, i: usize, out: &mut Exact) {
    let (dqk, dv) = (case.dim_qk, case.dim_v);
    let scale = f64::from(case.scale);
    let kv_head = head / (case.heads / case.kv_heads);
    let query = (case.first(seq, Side::Query) + i) * case.heads + head;
    let (q, d_o) = (&x.q[query * dqk..][..dqk], &x.d_o[query * dv..][..dv]);
    let first_key = case.first(seq, Side::Key);
    let keys: Vec<usize> = (0..case.seqs[seq].k.len as usize)
        .filter(|&j| case.sees(seq, i, j))
        .map(|j| (first_key + j) * case.kv_heads + kv_head)
        .collect();
    let sink = case.sinks.map(|_| f64::from(x.sinks[head]));
    if keys.is_empty() {
        out.right.lse[query] = sink.unwrap_or(f64::NEG_INFINITY);
        return;
    }
    out.sees[query / case.heads] = true;
    let k = |key: usize| &x.k[key * dqk..][..dqk];
    let v = |key: usize| &x.v[key * dv..][..dv];
    let positions: Vec<usize> =
        (0..case.seqs[seq].k.len as usize).filter(|&j| case.sees(seq, i, j)).collect();
    let slope = case.slopes.get(head).map_or(0.0, |s| f64::from(*s));

    // Every score, and its derivative by scale·q·k.
    let (mut scores, mut derivatives) = (Vec::new(), Vec::new());
    for (&key, &j) in keys.iter().zip(&positions) {
        let mut score = scale * dot(q, k(key));
        let mut derivative = 1.0;
        if case.softcap > 0.0 {
            let cap = f64::from(case.softcap);
            let t = (score / cap).tanh();
            (score, derivative) = (cap * t, 1.0 - t * t);
        }
        let bias = case.bias.map_or(0.0, |_| f64::from(x.bias[case.bias_row(seq, head, i) + j]));
        scores.push(score - slope * case.distance(seq, i, j) as f64 + bias);
        derivatives.push(derivative);
    }
    let max = scores.iter().copied().fold(sink.unwrap_or(f64::NEG_INFINITY), f64::max);
    let sum: f64 =
        scores.iter().map(|s| (s - max).exp()).sum::<f64>() + sink.map_or(0.0, |s| (s - max).exp());
    let lse = max + sum.ln();
    let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
    // What a weight is multiplied by: 0 where it is dropped.
    let kept: Vec<f64> = positions
        .iter()
        .map(|&j| match case.dropout > 0.0 {
            true if case.keeps(seq, head, i, j) => 1.0 / (1.0 - f64::from(case.dropout)),
            true => 0.0,
            false => 1.0,
        })
        .collect();
    out.right.lse[query] = lse;
    if let Some(top) = out.right.max_logit.get_mut(head) {
        *top = scores.iter().copied().fold(*top, f64::max);
    }

    for ((&key, p), kept) in keys.iter().zip(&p).zip(&kept) {
        out.seen[key / case.kv_heads] = true;
        add(&mut out.right.o[query * dv..][..dv], p * kept, v(key));
        add_terms(&mut out.terms.o[query * dv..][..dv], p * kept, v(key));
    }
    let o = &out.right.o[query * dv..][..dv];
    let delta: f64 = o.iter().zip(d_o).map(|(o, g)| o * f64::from(*g)).sum();
    let delta_terms: f64 = o.iter().zip(d_o).map(|(o, g)| (o * f64::from(*g)).abs()).sum();
    if let Some(sink) = sink {
        out.right.d_sinks[head] -= (sink - lse).exp() * delta;
        out.terms.d_sinks[head] += (sink - lse).exp() * delta_terms;
    }
    for (n, &key) in keys.iter().enumerate() {
        let (p, kept, factor) = (p[n], kept[n], scale * derivatives[n]);
        if let Some(bias) =
            case.bias.filter(|b| b.gradient).map(|_| case.bias_row(seq, head, i) + positions[n])
        {
            out.right.d_bias[bias] += p * (kept * dot(d_o, v(key)) - delta);
            out.terms.d_bias[bias] += p * (kept * dot_terms(d_o, v(key)) + delta_terms);
        }
        let ds = factor * p * (kept * dot(d_o, v(key)) - delta);
        let ds_terms = factor.abs() * p * (kept * dot_terms(d_o, v(key)) + delta_terms);
        add(&mut out.right.dq[query * dqk..][..dqk], ds, k(key));
        add_terms(&mut out.terms.dq[query * dqk..][..dqk], ds_terms, k(key));
        add(&mut out.right.dk[key * dqk..][..dqk], ds, q);
        add_terms(&mut out.terms.dk[key * dqk..][..dqk], ds_terms, q);
        add(&mut out.right.dv[key * dv..][..dv], p * kept, d_o);
        add_terms(&mut out.terms.dv[key * dv..][..dv], p * kept, d_o);
    }
}

fn add(sums: &mut [f64], factor: f64, row: &[f32]) {
    sums.iter_mut().zip(row).for_each(|(s, x)| *s += factor * f64::from(*x));
}

/// The same, with positive terms.
fn add_terms(sums: &mut [f64], factor: f64, row: &[f32]) {
    sums.iter_mut().zip(row).for_each(|(s, x)| *s += factor * f64::from(x.abs()));
}

pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn dot_terms(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) * f64::from(*b)).abs()).sum()
}
