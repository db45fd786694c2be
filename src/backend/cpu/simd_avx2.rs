//! AVX2 with FMA: fp32 operands for all storage types. See `simd_avx512.rs`, which does the same twice as wide.

use super::fp8;
use super::kernels::{EXP_MIN, EXP2, Gemm, Gradient, Into, Kernels, LANES, LOG2_E_REST, Softmax};
use super::scalar;
use super::scalar::{interleave, transpose};
use crate::dtype::{DType, Fp8};
use std::arch::x86_64::*;

/// For every storage type; operands are fp32.
pub static KERNELS: Kernels = Kernels {
    pairs: 1,
    gemm,
    softmax,
    gradient,
    widen,
    narrow,
    encode,
    decode,
    transpose,
    interleave,
};

/// Vectors of a panel.
const QUARTERS: usize = LANES / 8;

/// # Safety
/// The CPU has the features; the tiles are as [`Gemm`] says; C overlaps neither A nor B.
#[target_feature(enable = "avx2,fma")]
unsafe fn gemm(g: &Gemm) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match g.a_columns {
            true => rows::<true>(g),
            false => rows::<false>(g),
        }
    }
}

/// # Safety
/// As for [`gemm`].
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const COLUMNS: bool>(g: &Gemm) {
    for column in (0..g.n).step_by(16) {
        let mut i = 0;
        while i < g.m {
            // SAFETY: the rows and columns lie in the product.
            i += unsafe {
                match g.m - i {
                    6.. => tile::<6, COLUMNS>(g, i, column),
                    4.. => tile::<4, COLUMNS>(g, i, column),
                    2.. => tile::<2, COLUMNS>(g, i, column),
                    _ => tile::<1, COLUMNS>(g, i, column),
                }
            };
        }
    }
}

/// # Safety
/// As for [`gemm`]; rows `i .. i + M` and columns `column .. column + 16` lie in it.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const M: usize, const COLUMNS: bool>(g: &Gemm, i: usize, column: usize) -> usize {
    let mut acc = [[_mm256_setzero_ps(); 2]; M];
    // SAFETY: the caller's promise.
    unsafe {
        let a = g.a.add(if COLUMNS { i } else { i * g.a_stride }).cast::<f32>();
        let mut b = g.b.add(column / LANES * g.b_panel + column % LANES).cast::<f32>();
        for p in 0..g.k {
            let row = [_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8))];
            for (r, acc) in acc.iter_mut().enumerate() {
                let at = if COLUMNS { p * g.a_stride + r } else { r * g.a_stride + p };
                let x = _mm256_broadcast_ss(&*a.add(at));
                for (acc, b) in acc.iter_mut().zip(row) {
                    *acc = _mm256_fmadd_ps(x, b, *acc);
                }
            }
            b = b.wrapping_add(g.b_step);
        }
        for (r, acc) in acc.iter().enumerate() {
            for (j, x) in acc.iter().enumerate() {
                let c = g.c.add((i + r) * g.c_stride + column + 8 * j);
                let x = match g.into {
                    Into::Set => *x,
                    Into::Add => _mm256_add_ps(_mm256_loadu_ps(c), *x),
                    Into::Scale(factor) => {
                        let factor = _mm256_broadcast_ss(&*factor.add(i + r));
                        _mm256_fmadd_ps(_mm256_loadu_ps(c), factor, *x)
                    }
                };
                _mm256_storeu_ps(c, x);
            }
        }
    }
    M
}

/// exp to 2 ulp; 0 where the result would be subnormal.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp(x: __m256) -> __m256 {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, _mm256_set1_ps(EXP_MIN));
    let log2_e = _mm256_set1_ps(std::f32::consts::LOG2_E);
    let n = _mm256_round_ps::<NEAREST>(_mm256_mul_ps(x, log2_e));
    let f = _mm256_fmsub_ps(x, log2_e, n);
    let f = _mm256_fmadd_ps(x, _mm256_set1_ps(LOG2_E_REST), f);
    let mut p = _mm256_set1_ps(EXP2[0]);
    for c in &EXP2[1..] {
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(*c));
    }
    // 2^n by adding n to the exponent; a result beyond fp32 is not to be expected, and stays large.
    let n = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(126.0), n));
    let scaled = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32::<23>(n));
    _mm256_and_ps(_mm256_castsi256_ps(scaled), normal)
}

/// Lanes that see the key: `lo <= key < hi`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn sees(lo: __m256i, hi: __m256i, key: __m256i) -> __m256 {
    let seen = _mm256_andnot_si256(_mm256_cmpgt_epi32(lo, key), _mm256_cmpgt_epi32(hi, key));
    _mm256_castsi256_ps(seen)
}

/// # Safety
/// The panels are as [`Softmax`] says and do not overlap.
#[target_feature(enable = "avx2,fma")]
unsafe fn softmax(s: &Softmax) {
    let nothing = _mm256_set1_ps(f32::NEG_INFINITY);
    for lane in (0..QUARTERS).map(|q| 8 * q) {
        // SAFETY: the caller's promise.
        unsafe {
            let scale = _mm256_set1_ps(s.scale);
            let mut max = nothing;
            for key in 0..s.keys {
                let at = s.scores.add(key * LANES + lane);
                let mut x = _mm256_loadu_ps(at);
                if s.masked {
                    let lo = _mm256_loadu_si256(s.lo.add(lane).cast());
                    let hi = _mm256_loadu_si256(s.hi.add(lane).cast());
                    let seen = sees(lo, hi, _mm256_set1_epi32(key as i32));
                    x = _mm256_blendv_ps(nothing, _mm256_mul_ps(x, scale), seen);
                    _mm256_storeu_ps(at, x);
                }
                max = _mm256_max_ps(max, x);
            }
            let rest = if s.masked { _mm256_set1_ps(1.0) } else { scale };
            let old = _mm256_loadu_ps(s.max.add(lane));
            let new = _mm256_max_ps(old, _mm256_mul_ps(max, rest));
            _mm256_storeu_ps(s.max.add(lane), new);
            // A lane that has seen no key yet has no maximum: exp(−∞ − 0) is 0, as it must be.
            let base = _mm256_and_ps(new, _mm256_cmp_ps::<_CMP_NEQ_UQ>(new, nothing));
            let shrink = exp(_mm256_sub_ps(old, base));
            _mm256_storeu_ps(s.shrink.add(lane), shrink);
            let mut sum = _mm256_mul_ps(_mm256_loadu_ps(s.sum.add(lane)), shrink);
            for key in 0..s.keys {
                let at = s.scores.add(key * LANES + lane);
                let p = exp(_mm256_fmsub_ps(_mm256_loadu_ps(at), rest, base));
                sum = _mm256_add_ps(sum, p);
                _mm256_storeu_ps(at, p);
            }
            _mm256_storeu_ps(s.sum.add(lane), sum);
        }
    }
}

/// # Safety
/// The panels are as [`Gradient`] says and do not overlap.
#[target_feature(enable = "avx2,fma")]
unsafe fn gradient(g: &Gradient) {
    let first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for lane in 0..LANES {
        // SAFETY: the caller's promise.
        unsafe {
            let lse = _mm256_broadcast_ss(&*g.lse.add(lane));
            let delta = _mm256_broadcast_ss(&*g.delta.add(lane));
            for key in (0..g.keys).step_by(8) {
                let at = lane * g.stride + key;
                let (s, d) = (g.scores.add(at), g.d_p.add(at));
                let x = _mm256_fmsub_ps(_mm256_loadu_ps(s), _mm256_set1_ps(g.scale), lse);
                let mut p = exp(x);
                let mut d_s = _mm256_mul_ps(p, _mm256_sub_ps(_mm256_loadu_ps(d), delta));
                if g.masked {
                    let keys = _mm256_add_epi32(first, _mm256_set1_epi32(key as i32));
                    let lo = _mm256_set1_epi32(*g.lo.add(lane));
                    let seen = sees(lo, _mm256_set1_epi32(*g.hi.add(lane)), keys);
                    (p, d_s) = (_mm256_and_ps(p, seen), _mm256_and_ps(d_s, seen));
                }
                _mm256_storeu_ps(s, p);
                _mm256_storeu_ps(d, d_s);
            }
        }
    }
}

/// # Safety
/// `from` has `len` readable elements of the type and `to` has room for as many.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen(dtype: DType, from: *const u8, to: *mut f32, len: usize) {
    let whole = len / 8 * 8;
    // SAFETY: the caller's promise.
    unsafe { scalar::widen(dtype, from.add(whole * dtype.size()), to.add(whole), len - whole) };
    for i in (0..whole).step_by(8) {
        // SAFETY: the caller's promise.
        unsafe {
            let half = from.cast::<i16>().add(i).cast::<__m128i>();
            let x = match dtype {
                DType::F32 => _mm256_loadu_ps(from.cast::<f32>().add(i)),
                DType::Bf16 => {
                    let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(half));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
                }
                DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(half)),
                DType::Fp8(_) => unreachable!("decoded by blocks"),
            };
            _mm256_storeu_ps(to.add(i), x);
        }
    }
}

/// # Safety
/// As [`fp8::encode`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn encode(format: Fp8, from: *const f32, dim: usize, to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { fp8::encode(format, from, dim, to) }
}

/// # Safety
/// As [`fp8::decode`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode(format: Fp8, from: *const u8, dim: usize, to: *mut f32, dtype: DType) {
    // SAFETY: the caller's promise.
    unsafe { fp8::decode(format, from, dim, to, dtype) }
}

/// # Safety
/// `from` has `len` readable numbers and `to` has room for as many elements of the type.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn narrow(dtype: DType, from: *const f32, to: *mut u8, len: usize) {
    let whole = len / 8 * 8;
    // SAFETY: the caller's promise.
    unsafe { scalar::narrow(dtype, from.add(whole), to.add(whole * dtype.size()), len - whole) };
    for i in (0..whole).step_by(8) {
        // SAFETY: the caller's promise.
        unsafe {
            let x = _mm256_loadu_ps(from.add(i));
            let half = match dtype {
                DType::F32 => {
                    _mm256_storeu_ps(to.cast::<f32>().add(i), x);
                    continue;
                }
                DType::Bf16 => {
                    // Half a unit of the last place, less when the result is even already; NaN only becomes quiet.
                    let bits = _mm256_castps_si256(x);
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
                    let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
                    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
                    let rounded = _mm256_blendv_epi8(_mm256_add_epi32(bits, half), quiet, nan);
                    let rounded = _mm256_srli_epi32::<16>(rounded);
                    let (low, high) =
                        (_mm256_castsi256_si128(rounded), _mm256_extracti128_si256::<1>(rounded));
                    _mm_packus_epi32(low, high)
                }
                DType::F16 => _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x),
                DType::Fp8(_) => unreachable!("encoded by blocks"),
            };
            _mm_storeu_si128(to.cast::<u16>().add(i).cast(), half);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Simd;

    #[target_feature(enable = "avx2,fma")]
    fn exp_of(x: [f32; 8]) -> [f32; 8] {
        let mut y = [0f32; 8];
        // SAFETY: both arrays are 32 bytes.
        unsafe { _mm256_storeu_ps(y.as_mut_ptr(), exp(_mm256_loadu_ps(x.as_ptr()))) };
        y
    }

    #[test]
    fn exp_is_good_to_two_ulp() {
        if Simd::Avx2.available() {
            // SAFETY: the CPU has the features.
            crate::backend::cpu::kernels::tests::sweep(|x| unsafe { exp_of(x) });
        }
    }
}
