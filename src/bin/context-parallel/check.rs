//! Many ranks against one.

use crate::rank::{dtype, shape, side};
use crate::report::{RESULTS, Report};
use context_parallel::dtype::DType;
use context_parallel::holding::tokens;
use context_parallel::plan::Tensor;
use context_parallel::problem::Problem;
use half::{bf16, f16};

/// Rows in a piece whose error is one number: single rows scatter.
const PIECE: usize = 64;

/// Global tensors, `[token, head, dim]`, in the order of [`RESULTS`].
pub struct Whole(Vec<Vec<f32>>);

impl Whole {
    /// A token's row of one head of a result.
    pub fn row(&self, p: &Problem, result: usize, token: usize, head: u32) -> Vec<f64> {
        let (heads, dim) = shape(p, RESULTS[result]);
        let at = (token * heads + head as usize) * dim;
        self.0[result][at..at + dim].iter().map(|x| f64::from(*x)).collect()
    }
}

/// Puts the ranks' rows back where they belong.
pub fn gather(p: &Problem, reports: &[Report]) -> Whole {
    let tensor = |(i, tensor): (usize, &Tensor)| {
        let (heads, dim) = shape(p, *tensor);
        let width = heads * dim;
        let total: u32 = p.seqs.iter().map(|s| s.extent(side(*tensor)).padded).sum();
        let mut values = vec![f32::NAN; total as usize * width];
        for (rank, report) in reports.iter().enumerate() {
            let local = decode(&report.results[i], dtype(p, *tensor));
            for (row, token) in tokens(p, rank as u32, side(*tensor)).into_iter().enumerate() {
                let to = token as usize * width;
                values[to..to + width].copy_from_slice(&local[row * width..][..width]);
            }
        }
        values
    };
    Whole(RESULTS.iter().enumerate().map(tensor).collect())
}

fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let pair = |b: &[u8]| [b[0], b[1]];
    match dtype {
        DType::F32 => {
            bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        DType::Bf16 => {
            bytes.chunks_exact(2).map(|b| bf16::from_ne_bytes(pair(b)).to_f32()).collect()
        }
        DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_ne_bytes(pair(b)).to_f32()).collect(),
        DType::Fp8(_) => unreachable!("no tensor is stored so"),
    }
}

/// The worst error of each tensor against one rank.
///
/// A tensor is cut into pieces of 64 rows of one head; the error of a piece is ‖many − one‖ / ‖one‖, where a piece that is all but
/// zero counts as if it had a hundredth of the head's mean norm, or [`floor`]. The LSE, a logarithm, is compared absolutely.
pub fn errors(p: &Problem, many: &Whole, one: &Whole) -> [f64; 5] {
    let mut worst = [0.0; 5];
    for (i, tensor) in RESULTS.iter().enumerate() {
        let (heads, dim) = shape(p, *tensor);
        let (many, one) = (&many.0[i], &one.0[i]);
        worst[i] = if *tensor == Tensor::Lse {
            many.iter().zip(one).map(|(a, b)| difference(*a, *b)).fold(0.0, f64::max)
        } else {
            let of_head = |head| head_error(many, one, (heads, dim), head, floor(p, *tensor));
            (0..heads).map(of_head).fold(0.0, f64::max)
        };
    }
    worst
}

/// Least size of an element that errors are relative to. The terms of dQ and dK cancel, to nothing in a row that sees one key: with inputs
/// of variance 1 they are about dv/√dqk large; a fiftieth of that counts.
pub fn floor(p: &Problem, tensor: Tensor) -> f64 {
    match tensor {
        Tensor::DQ | Tensor::DK => 0.02 * f64::from(p.dim_v) / f64::from(p.dim_qk).sqrt(),
        _ => 0.0,
    }
}

/// |a − b|; equal infinities are equal, and a NaN on one side differs by infinity.
fn difference(a: f32, b: f32) -> f64 {
    let d = (f64::from(a) - f64::from(b)).abs();
    if a == b || (a.is_nan() && b.is_nan()) {
        0.0
    } else if d.is_nan() {
        f64::INFINITY
    } else {
        d
    }
}

fn head_error(
    many: &[f32],
    one: &[f32],
    (heads, dim): (usize, usize),
    head: usize,
    floor: f64,
) -> f64 {
    let rows = one.len() / (heads * dim);
    let mut pieces = Vec::new();
    for first in (0..rows).step_by(PIECE) {
        let (mut error, mut norm, mut count) = (0.0, 0.0, 0.0);
        for row in first..(first + PIECE).min(rows) {
            for at in (row * heads + head) * dim..(row * heads + head + 1) * dim {
                error += difference(many[at], one[at]).powi(2);
                norm += if one[at].is_finite() { f64::from(one[at]).powi(2) } else { 0.0 };
                count += 1.0;
            }
        }
        pieces.push((error.sqrt(), f64::max(norm.sqrt(), floor * f64::sqrt(count))));
    }
    let mean = pieces.iter().map(|(_, norm)| norm).sum::<f64>() / pieces.len().max(1) as f64;
    let relative = |(error, norm): &(f64, f64)| {
        if *error == 0.0 { 0.0 } else { error / norm.max(mean / 100.0) }
    };
    pieces.iter().map(relative).fold(0.0, f64::max)
}

/// What counts as equal: roundings of the storage type, in another order. A term left out or counted twice is far above.
pub fn tolerance(dtype: DType) -> [f64; 5] {
    let relative = match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 4e-3,
        DType::Bf16 => 3e-2,
        DType::Fp8(_) => unreachable!("no tensor is stored so"),
    };
    [relative, 2e-5, relative, relative, relative]
}

/// Do all tensors agree?
pub fn agree(errors: &[f64; 5], dtype: DType) -> bool {
    errors.iter().zip(tolerance(dtype)).all(|(e, t)| *e <= t)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_row_is_seen_and_nan_is_no_agreement() {
        let one: Vec<f32> = (0..256 * 8).map(|i| (i % 7) as f32 - 3.0).collect();
        assert_eq!(head_error(&one, &one, (1, 8), 0, 0.0), 0.0);
        let mut wrong = one.clone();
        wrong[200 * 8..201 * 8].fill(0.0);
        assert!(head_error(&wrong, &one, (1, 8), 0, 0.0) > 0.05);
        wrong[5] = f32::NAN;
        assert_eq!(head_error(&wrong, &one, (1, 8), 0, 0.0), f64::INFINITY);
        assert_eq!(difference(f32::NEG_INFINITY, f32::NEG_INFINITY), 0.0);
        assert!(!agree(&[0.0, 1e-3, 0.0, 0.0, 0.0], DType::F32));
    }
}
