//! One rank against the definition: a few rows of every result in float64, by plain double loops, for one causal sequence.

use crate::check::{Whole, floor};
use crate::rank::shape;
use crate::report::RESULTS;
use crate::source::Source;
use context_parallel::dtype::DType;
use context_parallel::plan::Tensor;
use context_parallel::problem::Problem;
use half::{bf16, f16};

/// Rows that are looked at, evenly spread, the last one included.
pub const ROWS: u32 = 16;

/// The inputs of one query head, as stored, `[token, dim]`.
struct Head {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    d_out: Vec<f64>,
    dim_qk: usize,
    dim_v: usize,
    scale: f64,
}

impl Head {
    fn new(p: &Problem, source: &Source, head: u32) -> Head {
        let tensor = |tensor: Tensor| {
            let (_, dim) = shape(p, tensor);
            let head = if tensor.key_side() { head / p.group() } else { head };
            let mut row = vec![0.0; dim];
            let mut all = Vec::new();
            for token in 0..p.seqs[0].q.len {
                source.fill(p, tensor, token, head, &mut row);
                all.extend(row.iter().map(|x| stored(*x, p.dtype)));
            }
            all
        };
        let [q, k, v, d_out] = [Tensor::Q, Tensor::K, Tensor::V, Tensor::DOut].map(tensor);
        let (dim_qk, dim_v) = (p.dim_qk as usize, p.dim_v as usize);
        Head { q, k, v, d_out, dim_qk, dim_v, scale: f64::from(p.scale) }
    }

    fn score(&self, i: usize, j: usize) -> f64 {
        self.scale * dot(&self.q, &self.k, i, j, self.dim_qk)
    }

    /// O, LSE and dQ of a query.
    fn query(&self, i: usize) -> (Vec<f64>, f64, Vec<f64>) {
        let scores: Vec<f64> = (0..=i).map(|j| self.score(i, j)).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
        let lse = most + sum.ln();
        let mut out = vec![0.0; self.dim_v];
        for (j, s) in scores.iter().enumerate() {
            add(&mut out, (s - lse).exp(), &self.v, j);
        }
        let delta = dot(&out, &self.d_out, 0, i, self.dim_v);
        let mut dq = vec![0.0; self.dim_qk];
        for (j, s) in scores.iter().enumerate() {
            let d_prob = dot(&self.d_out, &self.v, i, j, self.dim_v);
            add(&mut dq, self.scale * (s - lse).exp() * (d_prob - delta), &self.k, j);
        }
        (out, lse, dq)
    }

    /// What a query head adds to dK and dV of a key, given O and LSE of all rows.
    fn key(&self, j: usize, out: &[f64], lse: &[f64], [dk, dv]: &mut [Vec<f64>; 2]) {
        for (i, lse) in lse.iter().enumerate().skip(j) {
            let p = (self.score(i, j) - lse).exp();
            let delta = dot(out, &self.d_out, i, i, self.dim_v);
            let d_prob = dot(&self.d_out, &self.v, i, j, self.dim_v);
            add(dv, p, &self.d_out, i);
            add(dk, self.scale * p * (d_prob - delta), &self.q, i);
        }
    }
}

fn stored(x: f32, dtype: DType) -> f64 {
    f64::from(match dtype {
        DType::F32 => x,
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::Fp8(_) => unreachable!("no tensor is stored so"),
    })
}

fn dot(a: &[f64], b: &[f64], i: usize, j: usize, dim: usize) -> f64 {
    a[i * dim..][..dim].iter().zip(&b[j * dim..][..dim]).map(|(x, y)| x * y).sum()
}

fn add(to: &mut [f64], factor: f64, rows: &[f64], row: usize) {
    let dim = to.len();
    to.iter_mut().zip(&rows[row * dim..][..dim]).for_each(|(x, y)| *x += factor * y);
}

/// The worst error of each result: for O, dQ, dK, dV relative, over the rows of one head; for the LSE absolute. dK and dV are made
/// from the LSE and O that the rank computed, which are compared themselves.
pub fn errors(p: &Problem, source: &Source, one: &Whole) -> [f64; 5] {
    let len = p.seqs[0].q.len;
    let cut = |n: u32| (u64::from(len) * u64::from(n) / u64::from(ROWS)) as usize;
    let mut rows: Vec<usize> = (1..=ROWS).filter_map(|n| cut(n).checked_sub(1)).collect();
    rows.dedup();
    let (mut out, mut dq, mut dk, mut dv) =
        (Worst::of(p, 0), Worst::of(p, 2), Worst::of(p, 3), Worst::of(p, 4));
    let mut lse_error = 0.0f64;
    for kv_head in 0..p.kv_heads {
        let zeros = || [p.dim_qk, p.dim_v].map(|n| vec![0.0; n as usize]);
        let mut keys: Vec<[Vec<f64>; 2]> = rows.iter().map(|_| zeros()).collect();
        for head in kv_head * p.group()..(kv_head + 1) * p.group() {
            let inputs = Head::new(p, source, head);
            let column = |result| -> Vec<f64> {
                (0..len as usize).flat_map(|row| one.row(p, result, row, head)).collect()
            };
            let (all_out, all_lse) = (column(0), column(1));
            for (row, key) in rows.iter().zip(&mut keys) {
                let (right, lse, d_query) = inputs.query(*row);
                out.add(&one.row(p, 0, *row, head), &right);
                dq.add(&one.row(p, 2, *row, head), &d_query);
                let error = (all_lse[*row] - lse).abs();
                lse_error = lse_error.max(if error.is_nan() { f64::INFINITY } else { error });
                inputs.key(*row, &all_out, &all_lse, key);
            }
            out.next_head();
            dq.next_head();
        }
        for (row, [d_key, d_value]) in rows.iter().zip(&keys) {
            dk.add(&one.row(p, 3, *row, kv_head), d_key);
            dv.add(&one.row(p, 4, *row, kv_head), d_value);
        }
        dk.next_head();
        dv.next_head();
    }
    [out.worst, lse_error, dq.worst, dk.worst, dv.worst]
}

/// The worst of ‖got − right‖ / ‖right‖ over heads; see [`floor`].
struct Worst {
    worst: f64,
    floor: f64,
    /// Squared, and the number of elements.
    error: f64,
    norm: f64,
    count: f64,
}

impl Worst {
    fn of(p: &Problem, result: usize) -> Worst {
        let floor = floor(p, RESULTS[result]);
        Worst { worst: 0.0, floor, error: 0.0, norm: 0.0, count: 0.0 }
    }

    fn add(&mut self, got: &[f64], right: &[f64]) {
        for (x, y) in got.iter().zip(right) {
            self.error += (x - y).powi(2);
            self.norm += y * y;
            self.count += 1.0;
        }
    }

    /// NaN counts as infinity.
    fn next_head(&mut self) {
        let size = self.norm.sqrt().max(self.floor * self.count.sqrt());
        let e = match self.error.sqrt() / size {
            _ if self.error == 0.0 => 0.0,
            e if e.is_nan() => f64::INFINITY,
            e => e,
        };
        *self = Worst {
            worst: self.worst.max(e),
            floor: self.floor,
            error: 0.0,
            norm: 0.0,
            count: 0.0,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_head_counts_and_nan_is_no_agreement() {
        let mut w = Worst { worst: 0.0, floor: 0.5, error: 0.0, norm: 0.0, count: 0.0 };
        w.add(&[1.5], &[1.0]);
        w.next_head();
        w.add(&[1.0], &[1.0]);
        w.next_head();
        assert_eq!(w.worst, 0.5);
        w.add(&[1.0], &[0.0]);
        w.next_head();
        assert_eq!(w.worst, 2.0, "the floor counts where nothing is right");
        w.add(&[f64::NAN], &[1.0]);
        w.next_head();
        assert_eq!(w.worst, f64::INFINITY);
    }
}
