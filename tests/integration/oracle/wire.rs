//! What is left of keys and values that travelled as 8-bit numbers: the block format of `tests/data/README.md`, in float64 and by its definition.

use super::case::Case;
use super::inputs::Inputs;
use context_parallel::dtype::{DType, Fp8};

/// (mantissa bits, exponent of the smallest normal number, largest number).
fn format(format: Fp8) -> (i32, i32, f64) {
    match format {
        Fp8::E4m3 => (3, -6, 448.0),
        Fp8::E5m2 => (2, -14, 57344.0),
    }
}

/// The nearest number of a format without an end, ties to even.
fn nearest(x: f64, (mantissa, least, _): (i32, i32, f64)) -> f64 {
    if x == 0.0 {
        return x;
    }
    let mut exponent = least;
    while x.abs() >= 2f64.powi(exponent + 1) {
        exponent += 1;
    }
    let step = 2f64.powi(exponent - mantissa);
    (x / step).round_ties_even() * step
}

/// A block that travelled.
pub fn block(x: &[f32], to: Fp8, dtype: DType) -> Vec<f32> {
    if !x.iter().all(|x| x.is_finite()) {
        return vec![f32::NAN; x.len()];
    }
    let to = format(to);
    let largest = x.iter().fold(0f64, |largest, x| largest.max(f64::from(x.abs())));
    let fits = |e: i32| nearest(largest / 2f64.powi(e), to) <= to.2;
    let e = (-127..128).find(|e| fits(*e)).expect("fp32's largest number fits");
    let most = match dtype {
        DType::F32 => f64::from(f32::MAX),
        DType::Bf16 => f64::from(half::bf16::MAX),
        _ => f64::from(half::f16::MAX),
    };
    let scale = 2f64.powi(e);
    x.iter()
        .map(|x| (nearest(f64::from(*x) / scale, to) * scale).clamp(-most, most) as f32)
        .collect()
}

/// The inputs as every rank attends them.
pub fn attended(case: &Case, inputs: &Inputs, dtype: DType) -> Inputs {
    let mut out = inputs.clone();
    if let Some(to) = case.kv_wire {
        for (tensor, dim) in [(&mut out.k, case.dim_qk), (&mut out.v, case.dim_v)] {
            for x in tensor.chunks_mut(dim).flat_map(|row| row.chunks_mut(32)) {
                x.copy_from_slice(&block(x, to, dtype));
            }
        }
    }
    out
}

/// The table of the README, and what it says of the ends.
#[test]
fn blocks_are_as_the_readme_says() {
    let row = [-1.890_991_2, 0.913_055_4, 1e-3, -0.0]; // K's first two elements
    assert_eq!(block(&row, Fp8::E4m3, DType::F32), [-1.875, 0.9375, 0.0009765625, 0.0]);
    assert_eq!(block(&row, Fp8::E5m2, DType::F32), [-2.0, 0.875, 0.0009765625, 0.0]);
    for (x, e4m3, e5m2) in [
        (464.0, 448.0, 448.0),
        (464.1, 480.0, 448.0),
        (480.0, 480.0, 512.0),
        (479.9, 480.0, 448.0),
        (65504.0, 65536.0, 65536.0),
        (0.0, 0.0, 0.0),
    ] {
        assert_eq!(block(&[x], Fp8::E4m3, DType::F32), [e4m3], "{x}");
        assert_eq!(block(&[x], Fp8::E5m2, DType::F32), [e5m2], "{x}");
    }
    assert_eq!(block(&[65504.0], Fp8::E4m3, DType::F16), [65504.0]);
    assert_eq!(block(&[f32::MAX], Fp8::E5m2, DType::F32), [f32::MAX]);
    assert!(block(&[1.0, f32::INFINITY], Fp8::E5m2, DType::F32)[0].is_nan());
}
