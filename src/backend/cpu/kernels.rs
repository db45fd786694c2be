//! What an instruction set must provide: a few loops over packed tiles, as a table of functions.
//!
//! Operands are packed in 4-byte *units*: one fp32 number, or two bf16 numbers that are neighbours along the contracted
//! dimension. With that, one layout and one algorithm serve both the fp32 FMA and the bf16 dot product.
//!
//! ```text
//! C[m][n] (+)= Σ_k A[m][k]·B[k][n]     A is read by broadcasting one unit, B as vectors along n
//!
//! A by rows     a[i·stride + p]        K in the forward pass; Q, dO, dS in the backward pass
//! A by columns  a[p·stride + i]        P, and in the backward pass P and dS for dV and dK
//! B             b[p·step + (j/32)·panel + j%32]: row-major (panel = 32), or transposed in panels of 32 (step = 32)
//! ```

use super::scalar;
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::{simd_avx2, simd_avx512};
use crate::dtype::{DType, Fp8};

/// Lanes of a panel: the query rows that one call of the softmax handles, and the columns of a B panel.
pub const LANES: usize = 32;

/// What becomes of C.
#[derive(Clone, Copy)]
pub enum Into {
    /// C = A·B.
    Set,
    /// C += A·B.
    Add,
    /// `C[i] = factor[i]·C[i] + A·B`.
    Scale(*const f32),
}

/// A product of packed tiles; all strides in units.
#[derive(Clone, Copy)]
pub struct Gemm {
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C, a multiple of 16.
    pub n: usize,
    /// Units contracted.
    pub k: usize,
    /// A.
    pub a: *const u32,
    /// Between rows of A, or between its columns.
    pub a_stride: usize,
    /// A is stored by columns.
    pub a_columns: bool,
    /// B.
    pub b: *const u32,
    /// Between rows of B.
    pub b_step: usize,
    /// Between panels of 32 columns of B.
    pub b_panel: usize,
    /// C, fp32, row-major.
    pub c: *mut f32,
    /// Between rows of C.
    pub c_stride: usize,
    /// What becomes of C.
    pub into: Into,
}

/// One step of the online softmax for a panel of 32 query rows.
#[derive(Clone, Copy)]
pub struct Softmax {
    /// q·k as `[keys][32]` fp32; becomes P, as units `[keys/pairs][32]`.
    pub scores: *mut f32,
    /// Number of keys, a multiple of `pairs`.
    pub keys: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// With `masked`, lane `l` sees the keys `lo[l] .. hi[l]`.
    pub lo: *const i32,
    /// See `lo`.
    pub hi: *const i32,
    /// Some lane does not see every key. Needed as well when the scale is not positive.
    pub masked: bool,
    /// Running maximum, 32 numbers.
    pub max: *mut f32,
    /// Running sum, 32 numbers.
    pub sum: *mut f32,
    /// Out: what the output so far must be multiplied by, 32 numbers.
    pub shrink: *mut f32,
}

/// P = exp(scale·s − lse) and dS = P∘(dP − delta) for 32 query rows.
#[derive(Clone, Copy)]
pub struct Gradient {
    /// q·k, `[32][stride]` fp32. With `pairs` = 1 becomes P.
    pub scores: *mut f32,
    /// dO·v, `[32][stride]` fp32. With `pairs` = 1 becomes dS.
    pub d_p: *mut f32,
    /// Between rows of all of these.
    pub stride: usize,
    /// Number of keys, a multiple of 32.
    pub keys: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// LSE, 32 numbers.
    pub lse: *const f32,
    /// Σ O∘dO, 32 numbers.
    pub delta: *const f32,
    /// With `masked`, lane `l` sees the keys `lo[l] .. hi[l]`.
    pub lo: *const i32,
    /// See `lo`.
    pub hi: *const i32,
    /// Some lane does not see every key.
    pub masked: bool,
    /// With `pairs` = 2: P with neighbouring lanes paired, `[16][stride]`.
    pub p_by_lanes: *mut u32,
    /// With `pairs` = 2: dS with neighbouring lanes paired, `[16][stride]`.
    pub ds_by_lanes: *mut u32,
    /// With `pairs` = 2: dS with neighbouring keys paired, `[32][stride]`.
    pub ds_by_keys: *mut u32,
}

/// The loops of one instruction set for one kind of operand.
pub struct Kernels {
    /// Numbers per unit: 1 (fp32) or 2 (bf16).
    pub pairs: usize,
    /// See [`Gemm`].
    pub gemm: unsafe fn(&Gemm),
    /// See [`Softmax`].
    pub softmax: unsafe fn(&Softmax),
    /// See [`Gradient`].
    pub gradient: unsafe fn(&Gradient),
    /// Reads a row of a storage type as fp32.
    pub widen: unsafe fn(DType, *const u8, *mut f32, usize),
    /// Writes a row of fp32 numbers in a storage type, rounding to nearest.
    pub narrow: unsafe fn(DType, *const f32, *mut u8, usize),
    /// A row of a head to bytes as they travel: format, numbers, how many, destination.
    pub encode: unsafe fn(Fp8, *const f32, usize, *mut u8),
    /// The way back, to numbers that the storage type holds.
    pub decode: unsafe fn(Fp8, *const u8, usize, *mut f32, DType),
    /// Rows `[32][stride]` of units to a panel `[units][32]`: source, stride, units, destination.
    pub transpose: unsafe fn(*const u32, usize, usize, *mut u32),
    /// Pairs two rows of 16-bit numbers: first row, second row, length, destination.
    pub interleave: unsafe fn(*const u16, *const u16, usize, *mut u32),
}

impl Kernels {
    /// The loops for tensors stored as `dtype`.
    pub fn of(simd: Simd, dtype: DType) -> &'static Kernels {
        match simd {
            Simd::Scalar => &scalar::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx2 => &simd_avx2::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512Bf16 if dtype == DType::Bf16 => &simd_avx512::KERNELS_BF16,
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 | Simd::Avx512Bf16 => &simd_avx512::KERNELS,
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("{simd:?} was refused when the backend was made"),
        }
    }
}

/// 2^f for f in [−½, ½] as a polynomial, highest power first; relative error 2e-9 (own least-maximum fit, constant term 1).
pub const EXP2: [f32; 7] = [
    1.535_336e-4,
    1.339_887_5e-3,
    9.618_437e-3,
    5.550_332_4e-2,
    0.240_226_48,
    std::f32::consts::LN_2,
    1.0,
];

/// What log₂ e is more than its fp32 value: exp(x) = 2^n · 2^f with n whole and n + f = x · log₂ e in two steps.
pub const LOG2_E_REST: f32 = 1.925_963e-8;

/// Below this exp would be subnormal and becomes 0.
pub const EXP_MIN: f32 = -87.336_54;

#[cfg(test)]
pub mod tests {
    use super::EXP_MIN;

    /// All of `EXP_MIN` … 0 in steps far below the distance of the polynomial's extrema, and what lies beyond.
    pub fn sweep<const N: usize>(exp: impl Fn([f32; N]) -> [f32; N]) {
        let mut worst = 0f64;
        for block in 0..4_000_000 / N {
            let x: [f32; N] = std::array::from_fn(|i| EXP_MIN * ((block * N + i) as f32 / 4e6));
            for (x, y) in x.into_iter().zip(exp(x)) {
                let want = f64::from(x).exp();
                let ulp =
                    f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
                worst = worst.max((f64::from(y) - want).abs() / ulp);
            }
        }
        assert!(worst <= 2.0, "{worst} ulp");
        assert_eq!(exp([0.0; N]), [1.0; N]);
        assert_eq!(exp([-87.4; N]), [0.0; N]);
        assert_eq!(exp([f32::NEG_INFINITY; N]), [0.0; N]);
        assert!(exp([f32::NAN; N]).iter().all(|y| y.is_nan()));
    }
}
