//! The error contract. Rows that see nothing, keys that nobody sees, and padding are exactly 0 (LSE: −inf). Of the others, in token
//! order and per head, buckets of 64 rows (the last takes the remainder, so 64 to 127; all, if there are fewer) satisfy, in L2 norm,
//!
//! ```text
//! ‖got − oracle‖ ≤ k·‖plain − oracle‖ + 4·ε·‖oracle‖ + 1e-7·‖terms‖        k = 2 forward, 3 backward
//! ```
//! with ε 2^-8 (bf16), 2^-11 (fp16), 2^-24 (fp32), and `terms` the oracle's sums over the same visible pairs with every term made
//! positive, before they cancel: O: Σ P·|V|. dV: Σ P·|dO|. dQ: |scale|·Σ P·(Σ|dO·V| + Σ|dO·O|)·|K|. dK: the same with |Q|.
//! The LSE is within 1e-5, row by row.

use super::Results;
use super::case::Case;
use super::exact::{Exact, exact};
use super::inputs::{Inputs, inputs};
use super::plain::{Variation, plain};
use super::wire::attended;
use context_parallel::dtype::DType;
use context_parallel::partition::Side;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tensor {
    O,
    Lse,
    Dq,
    Dk,
    Dv,
    DLatent,
}

impl Tensor {
    /// The five of plain attention.
    pub const ALL: [Tensor; 5] = [Tensor::O, Tensor::Lse, Tensor::Dq, Tensor::Dk, Tensor::Dv];

    /// Which side's tokens it has rows for.
    pub fn side(self) -> Side {
        match self {
            Tensor::O | Tensor::Lse | Tensor::Dq => Side::Query,
            Tensor::Dk | Tensor::Dv | Tensor::DLatent => Side::Key,
        }
    }

    /// Heads and elements per head.
    pub fn shape(self, case: &Case) -> (usize, usize) {
        match self {
            Tensor::O => (case.heads, case.dim_v),
            Tensor::Lse => (case.heads, 1),
            Tensor::Dq => (case.heads, case.dim_qk),
            Tensor::Dk => (case.kv_heads, case.dim_qk),
            Tensor::Dv => (case.kv_heads, case.dim_v),
            Tensor::DLatent => (1, case.latent.map_or(0, |l| l.width() as usize)),
        }
    }
}

/// A case in one storage type, with all that results are compared to.
pub struct Reference {
    pub case: Case,
    pub dtype: DType,
    pub inputs: Inputs,
    pub exact: Exact,
    pub plain: Results<f32>,
}

/// The reference of a case, computed at its first use in this process. Threads that ask for different cases do not wait for each other.
pub fn reference(case: &Case, dtype: DType) -> Arc<Reference> {
    type Entry = Arc<OnceLock<Arc<Reference>>>;
    static CACHE: OnceLock<Mutex<HashMap<(String, DType), Entry>>> = OnceLock::new();
    let cache = CACHE.get_or_init(Default::default);
    let entry = {
        let mut map = cache.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        map.entry((case.name.clone(), dtype)).or_default().clone()
    };
    entry.get_or_init(|| Arc::new(Reference::new(case, dtype))).clone()
}

impl Reference {
    fn new(case: &Case, dtype: DType) -> Reference {
        let inputs = inputs(case, dtype);
        let attended = attended(case, &inputs, dtype);
        let exact = exact(case, &attended);
        let sees = |seq, i, j| case.sees(seq, i, j);
        let plain = plain(case, &attended, dtype, &Variation::of(case, &sees));
        Reference { case: case.clone(), dtype, inputs, exact, plain }
    }

    /// Checks a global tensor. Returns the largest error as a share of its bound (at most 1), or a line that says where and by how much
    /// the contract is broken.
    pub fn check(&self, tensor: Tensor, got: &[f32]) -> Result<f64, String> {
        let (heads, dim) = tensor.shape(&self.case);
        let rows = self.case.tokens(tensor.side());
        let at = |head: usize| {
            format!("case {}, {}, {tensor:?}, head {head}", self.case.name, self.dtype.name())
        };
        if got.len() != rows * heads * dim {
            return Err(format!("{}: {} elements, not {}", at(0), got.len(), rows * heads * dim));
        }
        let mut worst = 0.0f64;
        for head in 0..heads {
            let mut live = Vec::new();
            for row in 0..rows {
                let first = (row * heads + head) * dim;
                let alive = match tensor.side() {
                    Side::Query if tensor == Tensor::Lse => {
                        self.exact.right.lse[row * heads + head] != f64::NEG_INFINITY
                    }
                    Side::Query => self.exact.sees[row],
                    Side::Key => self.exact.seen[row],
                };
                let nothing = if tensor == Tensor::Lse { f32::NEG_INFINITY } else { 0.0 };
                let bad = got[first..first + dim].iter().find(|x| **x != nothing);
                match bad {
                    _ if alive => live.push(row),
                    Some(x) => {
                        let role = if self.is_padding(tensor.side(), row) {
                            "padding"
                        } else {
                            "nothing to see"
                        };
                        return Err(format!(
                            "{}, row {row} ({role}): got {x}, not {nothing}",
                            at(head)
                        ));
                    }
                    None => {}
                }
            }
            let ratio = if tensor == Tensor::Lse {
                self.check_lse(got, head, &live)
            } else {
                self.check_buckets(tensor, got, head, &live)
            };
            worst = worst.max(ratio.map_err(|text| format!("{}, {text}", at(head)))?);
        }
        Ok(worst)
    }

    /// Checks the numbers per head. The gradient of a sink sums exp(sink − LSE)·Σ dO·O over rows; O is rounded once before, which is all
    /// that can go wrong: ε·terms. Returns the largest error as a share of its bound.
    pub fn check_numbers(&self, d_sinks: &[f32], max_logit: &[f32]) -> Result<f64, String> {
        let (right, terms) = (&self.exact.right, &self.exact.terms);
        let mut worst = 0.0f64;
        let mut check = |what: &str, head: usize, got: f32, right: f64, bound: f64| {
            let error = if f64::from(got) == right { 0.0 } else { (f64::from(got) - right).abs() };
            if error.is_nan() || error > bound {
                return Err(format!(
                    "case {}, {}, {what}, head {head}: got {got}, right is {right}, allowed ±{bound:.3e}",
                    self.case.name,
                    self.dtype.name()
                ));
            }
            worst = worst.max(if error > 0.0 { error / bound } else { 0.0 });
            Ok(())
        };
        if d_sinks.len() != right.d_sinks.len() || max_logit.len() != right.max_logit.len() {
            return Err(format!(
                "case {}: {} d_sinks, {} max_logit",
                self.case.name,
                d_sinks.len(),
                max_logit.len()
            ));
        }
        for (head, got) in d_sinks.iter().enumerate() {
            let bound = (epsilon(self.dtype) + 1e-6) * terms.d_sinks[head];
            check("d_sinks", head, *got, right.d_sinks[head], bound)?;
        }
        for (head, got) in max_logit.iter().enumerate() {
            check("max_logit", head, *got, right.max_logit[head], LSE_BOUND)?;
        }
        Ok(worst)
    }

    /// Checks the gradient of the bias, in buckets of 64 of its rows; what no query and key use is exactly 0.
    pub fn check_bias(&self, got: &[f32]) -> Result<f64, String> {
        let (right, terms, plain) =
            (&self.exact.right.d_bias, &self.exact.terms.d_bias, &self.plain.d_bias);
        let at = format!("case {}, {}, d_bias", self.case.name, self.dtype.name());
        if got.len() != right.len() {
            return Err(format!("{at}: {} elements, not {}", got.len(), right.len()));
        }
        let width = 64 * self.case.bias_dims()[3].max(1);
        let mut worst = 0.0f64;
        for first in (0..got.len()).step_by(width) {
            let elements = first..(first + width).min(got.len());
            if let Some(i) = elements.clone().find(|&i| terms[i] == 0.0 && got[i] != 0.0) {
                return Err(format!("{at}, element {i}: got {}, not 0", got[i]));
            }
            let share = self.bucket(elements, got, [right, terms], plain);
            worst = worst
                .max(share.map_err(|text| format!("{at}, rows from element {first}: {text}"))?);
        }
        Ok(worst)
    }

    /// Checks the gradients of latents and of their weights, these per head in buckets of 64 rows. Without latents there is nothing to check.
    pub fn check_latent(&self, got: &Results<f32>) -> Result<f64, String> {
        if self.case.latent.is_none() {
            return Ok(0.0);
        }
        let mut worst = self.check(Tensor::DLatent, &got.d_latent)?;
        let (right, terms, plain) = (&self.exact.right, &self.exact.terms, &self.plain);
        let [dim, _, nope] = self.case.latent_dims();
        for (name, rows, got, right, terms, plain) in [
            ("d_up_k", nope, &got.d_up_k, &right.d_up_k, &terms.d_up_k, &plain.d_up_k),
            ("d_up_v", self.case.dim_v, &got.d_up_v, &right.d_up_v, &terms.d_up_v, &plain.d_up_v),
        ] {
            if got.len() != right.len() {
                return Err(format!("{name}: {} elements, not {}", got.len(), right.len()));
            }
            for first in (0..rows * self.case.heads).step_by(rows) {
                let all: Vec<usize> = (first..first + rows).collect();
                for rows in buckets(&all) {
                    let elements = rows[0] * dim..(rows[rows.len() - 1] + 1) * dim;
                    let share = self.bucket(elements, got, [right, terms], plain);
                    worst = worst.max(share.map_err(|text| {
                        let (case, dtype) = (&self.case.name, self.dtype.name());
                        format!("case {case}, {dtype}, {name}, row {}: {text}", rows[0])
                    })?);
                }
            }
        }
        Ok(worst)
    }

    /// The error of some elements of a gradient, as a share of what is allowed.
    fn bucket(
        &self,
        elements: Range<usize>,
        got: &[f32],
        [right, terms]: [&[f64]; 2],
        plain: &[f32],
    ) -> Result<f64, String> {
        let [mut error, mut plain_error, mut size, mut term_size] = [0.0f64; 4];
        for i in elements {
            error += (f64::from(got[i]) - right[i]).powi(2);
            plain_error += (f64::from(plain[i]) - right[i]).powi(2);
            size += right[i].powi(2);
            term_size += terms[i].powi(2);
        }
        let bound = 3.0 * plain_error.sqrt()
            + 4.0 * epsilon(self.dtype) * size.sqrt()
            + 1e-7 * term_size.sqrt();
        let error = error.sqrt();
        if error.is_nan() || error > bound {
            return Err(format!("error {error:.3e}, allowed {bound:.3e}"));
        }
        Ok(if bound > 0.0 { error / bound } else { 0.0 })
    }

    fn is_padding(&self, side: Side, row: usize) -> bool {
        !self.case.true_tokens(side).contains(&row)
    }

    fn check_lse(&self, got: &[f32], head: usize, live: &[usize]) -> Result<f64, String> {
        let mut worst = 0.0f64;
        for &row in live {
            let (x, right) = (
                got[row * self.case.heads + head],
                self.exact.right.lse[row * self.case.heads + head],
            );
            let error = (f64::from(x) - right).abs();
            if error.is_nan() || error > LSE_BOUND {
                return Err(format!("row {row}: got {x}, right is {right}, allowed ±{LSE_BOUND}"));
            }
            worst = worst.max(error / LSE_BOUND);
        }
        Ok(worst)
    }

    fn check_buckets(
        &self,
        tensor: Tensor,
        got: &[f32],
        head: usize,
        live: &[usize],
    ) -> Result<f64, String> {
        let (heads, dim) = tensor.shape(&self.case);
        let (right, terms) = (self.exact.right.get(tensor), self.exact.terms.get(tensor));
        let plain = self.plain.get(tensor);
        let mut worst = 0.0f64;
        for rows in buckets(live) {
            let [mut error, mut plain_error, mut size, mut term_size] = [0.0f64; 4];
            for &row in rows {
                for i in (row * heads + head) * dim..(row * heads + head + 1) * dim {
                    error += (f64::from(got[i]) - right[i]).powi(2);
                    plain_error += (f64::from(plain[i]) - right[i]).powi(2);
                    size += right[i].powi(2);
                    term_size += terms[i].powi(2);
                }
            }
            let factor = if tensor == Tensor::O { 2.0 } else { 3.0 };
            let bound = factor * plain_error.sqrt()
                + 4.0 * epsilon(self.dtype) * size.sqrt()
                + 1e-7 * term_size.sqrt();
            let error = error.sqrt();
            if error.is_nan() || error > bound {
                return Err(format!(
                    "rows {}..={} ({}): error {error:.3e}, allowed {bound:.3e} (plain attention {:.3e}, oracle's norm {:.3e})",
                    rows[0],
                    rows[rows.len() - 1],
                    rows.len(),
                    plain_error.sqrt(),
                    size.sqrt()
                ));
            }
            if bound > 0.0 {
                worst = worst.max(error / bound);
            }
        }
        Ok(worst)
    }
}

/// Absolute, row by row.
const LSE_BOUND: f64 = 1e-5;

/// Half the distance from 1 to the next value.
fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::Bf16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        DType::Fp8(_) => unreachable!("no tensor is stored so"),
    }
}

/// Pieces of 64; a shorter last piece joins the one before.
fn buckets(rows: &[usize]) -> impl Iterator<Item = &[usize]> {
    let n = if rows.is_empty() { 0 } else { (rows.len() / 64).max(1) };
    (0..n).map(move |i| &rows[i * 64..if i + 1 == n { rows.len() } else { (i + 1) * 64 }])
}
