//! AVX-512: fp32 FMA for all storage types, and the bf16 dot product for bf16 where the CPU has it.

use super::fp8;
use super::kernels::{EXP_MIN, EXP2, Gemm, Gradient, Into, Kernels, LANES, LOG2_E_REST, Softmax};
use crate::dtype::{DType, Fp8};
use std::arch::x86_64::*;

/// For every storage type; operands are fp32.
pub static KERNELS: Kernels = Kernels {
    pairs: 1,
    gemm: gemm_f32,
    softmax: softmax_f32,
    gradient: gradient_f32,
    widen,
    narrow,
    encode,
    decode,
    transpose,
    interleave,
};

/// For bf16; operands are pairs of bf16, and P and dS are rounded to it.
pub static KERNELS_BF16: Kernels = Kernels {
    pairs: 2,
    gemm: gemm_bf16,
    softmax: softmax_bf16,
    gradient: gradient_bf16,
    ..KERNELS
};

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn multiply_f32(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
    _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn multiply_bf16(acc: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: both are 64 bytes without invalid values.
    let (a, b) = unsafe {
        (std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
    };
    _mm512_dpbf16_ps(acc, a, b)
}

/// A product in tiles of 8 × 32 that stay in registers, for one way to multiply units.
macro_rules! gemm {
    ($gemm:ident, $rows:ident, $tile:ident, $multiply:ident, $features:literal) => {
        /// # Safety
        /// The CPU has the features; the tiles are as [`Gemm`] says; C overlaps neither A nor B.
        #[target_feature(enable = $features)]
        unsafe fn $gemm(g: &Gemm) {
            // SAFETY: the caller's promise is passed on.
            unsafe {
                match g.a_columns {
                    true => $rows::<true>(g),
                    false => $rows::<false>(g),
                }
            }
        }

        /// # Safety
        /// As for the whole product.
        #[target_feature(enable = $features)]
        unsafe fn $rows<const COLUMNS: bool>(g: &Gemm) {
            for panel in 0..g.n.div_ceil(LANES) {
                let wide = g.n - panel * LANES >= LANES;
                let mut i = 0;
                // SAFETY: rows and columns of all tiles lie in the product.
                unsafe {
                    while i < g.m {
                        let left = g.m - i;
                        i += match (left, wide) {
                            (8.., true) => $tile::<8, 2, COLUMNS>(g, i, panel),
                            (8.., false) => $tile::<8, 1, COLUMNS>(g, i, panel),
                            (4.., true) => $tile::<4, 2, COLUMNS>(g, i, panel),
                            (4.., false) => $tile::<4, 1, COLUMNS>(g, i, panel),
                            (_, true) => $tile::<1, 2, COLUMNS>(g, i, panel),
                            (_, false) => $tile::<1, 1, COLUMNS>(g, i, panel),
                        };
                    }
                }
            }
        }

        /// # Safety
        /// As for the whole product; rows `i .. i + M` and columns `32·panel .. + 16·N` lie in it.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $tile<const M: usize, const N: usize, const COLUMNS: bool>(
            g: &Gemm,
            i: usize,
            panel: usize,
        ) -> usize {
            let mut acc = [[_mm512_setzero_ps(); N]; M];
            let mut row = [_mm512_setzero_si512(); N];
            // SAFETY: the caller's promise.
            unsafe {
                let a = g.a.add(if COLUMNS { i } else { i * g.a_stride });
                let mut b = g.b.add(panel * g.b_panel);
                for p in 0..g.k {
                    for (j, x) in row.iter_mut().enumerate() {
                        *x = _mm512_loadu_si512(b.add(16 * j).cast());
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let at = if COLUMNS { p * g.a_stride + r } else { r * g.a_stride + p };
                        let x = _mm512_set1_epi32(a.add(at).read() as i32);
                        for (acc, b) in acc.iter_mut().zip(row) {
                            *acc = $multiply(*acc, x, b);
                        }
                    }
                    b = b.wrapping_add(g.b_step);
                }
                for (r, acc) in acc.iter().enumerate() {
                    for (j, x) in acc.iter().enumerate() {
                        let c = g.c.add((i + r) * g.c_stride + panel * LANES + 16 * j);
                        let x = match g.into {
                            Into::Set => *x,
                            Into::Add => _mm512_add_ps(_mm512_loadu_ps(c), *x),
                            Into::Scale(factor) => {
                                let factor = _mm512_set1_ps(*factor.add(i + r));
                                _mm512_fmadd_ps(_mm512_loadu_ps(c), factor, *x)
                            }
                        };
                        _mm512_storeu_ps(c, x);
                    }
                }
            }
            M
        }
    };
}

gemm!(gemm_f32, rows_f32, tile_f32, multiply_f32, "avx512f,avx512bw,avx512dq,avx512vl");
gemm!(
    gemm_bf16,
    rows_bf16,
    tile_bf16,
    multiply_bf16,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
);

/// exp to 2 ulp; 0 where the result would be subnormal.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp(x: __m512) -> __m512 {
    let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(EXP_MIN));
    let log2_e = _mm512_set1_ps(std::f32::consts::LOG2_E);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
        _mm512_mul_ps(x, log2_e),
    );
    let f = _mm512_fmadd_ps(x, _mm512_set1_ps(LOG2_E_REST), _mm512_fmsub_ps(x, log2_e, n));
    let mut p = _mm512_set1_ps(EXP2[0]);
    for c in &EXP2[1..] {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(*c));
    }
    _mm512_maskz_scalef_ps(normal, p, n)
}

/// Two rows of bf16 from fp32, side by side in every unit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pair(first: __m512, second: __m512) -> __m512i {
    #[rustfmt::skip]
    let order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
        23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0,
    );
    _mm512_permutexvar_epi16(order, row(first, second))
}

/// 32 bf16 from fp32, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn row(low: __m512, high: __m512) -> __m512i {
    let both = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: 64 bytes without invalid values.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(both) }
}

/// # Safety
/// The panels are as [`Softmax`] says and do not overlap.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn softmax_f32(s: &Softmax) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        let (scale, base) = find_max(s);
        let mut sum = [_mm512_setzero_ps(); 2];
        for key in 0..s.keys {
            for half in 0..2 {
                let at = s.scores.add(key * LANES + 16 * half);
                let p = exp(_mm512_fmsub_ps(_mm512_loadu_ps(at), scale, base[half]));
                sum[half] = _mm512_add_ps(sum[half], p);
                _mm512_storeu_ps(at, p);
            }
        }
        add_sum(s, sum);
    }
}

/// # Safety
/// The panels are as [`Softmax`] says and do not overlap.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn softmax_bf16(s: &Softmax) {
    // SAFETY: the caller's promise is passed on; pair `i` is written where scores `2i` and before lay.
    unsafe {
        let (scale, base) = find_max(s);
        let mut sum = [_mm512_setzero_ps(); 2];
        for key in (0..s.keys).step_by(2) {
            let at = s.scores.add(key * LANES);
            let mut units = [_mm512_setzero_si512(); 2];
            for half in 0..2 {
                let first = _mm512_loadu_ps(at.add(16 * half));
                let second = _mm512_loadu_ps(at.add(LANES + 16 * half));
                let first = exp(_mm512_fmsub_ps(first, scale, base[half]));
                let second = exp(_mm512_fmsub_ps(second, scale, base[half]));
                sum[half] = _mm512_add_ps(sum[half], _mm512_add_ps(first, second));
                units[half] = pair(first, second);
            }
            let to = s.scores.add(key / 2 * LANES);
            _mm512_storeu_si512(to.cast(), units[0]);
            _mm512_storeu_si512(to.add(16).cast(), units[1]);
        }
        add_sum(s, sum);
    }
}

/// Hides what is masked, updates the maximum and sets `shrink`; returns what scores must still be multiplied by, and what must
/// then be subtracted.
///
/// # Safety
/// See the callers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn find_max(s: &Softmax) -> (__m512, [__m512; 2]) {
    let nothing = _mm512_set1_ps(f32::NEG_INFINITY);
    // Two maxima per lane, of even and odd keys, halve the chain of dependent instructions.
    let mut max = [[nothing; 2]; 2];
    let scale = _mm512_set1_ps(s.scale);
    // SAFETY: the caller's promise.
    unsafe {
        for key in 0..s.keys {
            for (half, max) in max[key % 2].iter_mut().enumerate() {
                let at = s.scores.add(key * LANES + 16 * half);
                let mut x = _mm512_loadu_ps(at);
                if s.masked {
                    let key = _mm512_set1_epi32(key as i32);
                    let lo = _mm512_loadu_si512(s.lo.add(16 * half).cast());
                    let hi = _mm512_loadu_si512(s.hi.add(16 * half).cast());
                    let seen =
                        _mm512_mask_cmplt_epi32_mask(_mm512_cmple_epi32_mask(lo, key), key, hi);
                    x = _mm512_mask_mul_ps(nothing, seen, x, scale);
                    _mm512_storeu_ps(at, x);
                }
                *max = _mm512_max_ps(*max, x);
            }
        }
        let rest = if s.masked { _mm512_set1_ps(1.0) } else { scale };
        let mut base = [nothing; 2];
        for half in 0..2 {
            let old = _mm512_loadu_ps(s.max.add(16 * half));
            let here = _mm512_mul_ps(_mm512_max_ps(max[0][half], max[1][half]), rest);
            let new = _mm512_max_ps(old, here);
            _mm512_storeu_ps(s.max.add(16 * half), new);
            // A lane that has seen no key yet has no maximum: exp(−∞ − 0) is 0, as it must be.
            let some = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(new, nothing);
            base[half] = _mm512_maskz_mov_ps(some, new);
            let shrink = exp(_mm512_sub_ps(old, base[half]));
            _mm512_storeu_ps(s.shrink.add(16 * half), shrink);
        }
        (rest, base)
    }
}

/// # Safety
/// See the callers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn add_sum(s: &Softmax, sum: [__m512; 2]) {
    for (half, new) in sum.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let at = s.sum.add(16 * half);
            let shrink = _mm512_loadu_ps(s.shrink.add(16 * half));
            _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_loadu_ps(at), shrink, *new));
        }
    }
}

/// P and dS of 16 keys of a lane.
///
/// # Safety
/// The panels are as [`Gradient`] says; the keys lie in them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn probabilities(g: &Gradient, lane: usize, key: usize) -> (__m512, __m512) {
    // SAFETY: the caller's promise.
    unsafe {
        let at = lane * g.stride + key;
        let (lse, delta) = (_mm512_set1_ps(*g.lse.add(lane)), _mm512_set1_ps(*g.delta.add(lane)));
        let x = _mm512_fmsub_ps(_mm512_loadu_ps(g.scores.add(at)), _mm512_set1_ps(g.scale), lse);
        let (mut p, d_p) = (exp(x), _mm512_sub_ps(_mm512_loadu_ps(g.d_p.add(at)), delta));
        let mut d_s = _mm512_mul_ps(p, d_p);
        if g.masked {
            let first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let keys = _mm512_add_epi32(first, _mm512_set1_epi32(key as i32));
            let seen = _mm512_cmple_epi32_mask(_mm512_set1_epi32(*g.lo.add(lane)), keys);
            let hi = _mm512_set1_epi32(*g.hi.add(lane));
            let seen = _mm512_mask_cmplt_epi32_mask(seen, keys, hi);
            (p, d_s) = (_mm512_maskz_mov_ps(seen, p), _mm512_maskz_mov_ps(seen, d_s));
        }
        (p, d_s)
    }
}

/// # Safety
/// The panels are as [`Gradient`] says and do not overlap.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn gradient_f32(g: &Gradient) {
    for lane in 0..LANES {
        for key in (0..g.keys).step_by(16) {
            // SAFETY: the caller's promise.
            unsafe {
                let (p, d_s) = probabilities(g, lane, key);
                _mm512_storeu_ps(g.scores.add(lane * g.stride + key), p);
                _mm512_storeu_ps(g.d_p.add(lane * g.stride + key), d_s);
            }
        }
    }
}

/// # Safety
/// The panels are as [`Gradient`] says and do not overlap.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn gradient_bf16(g: &Gradient) {
    for lane in (0..LANES).step_by(2) {
        for key in (0..g.keys).step_by(32) {
            // SAFETY: the caller's promise; `keys` is a multiple of 32.
            unsafe {
                let (p00, s00) = probabilities(g, lane, key);
                let (p01, s01) = probabilities(g, lane, key + 16);
                let (p10, s10) = probabilities(g, lane + 1, key);
                let (p11, s11) = probabilities(g, lane + 1, key + 16);
                let by_lanes = lane / 2 * g.stride + key;
                _mm512_storeu_si512(g.p_by_lanes.add(by_lanes).cast(), pair(p00, p10));
                _mm512_storeu_si512(g.p_by_lanes.add(by_lanes + 16).cast(), pair(p01, p11));
                _mm512_storeu_si512(g.ds_by_lanes.add(by_lanes).cast(), pair(s00, s10));
                _mm512_storeu_si512(g.ds_by_lanes.add(by_lanes + 16).cast(), pair(s01, s11));
                let by_keys = lane * g.stride + key / 2;
                _mm512_storeu_si512(g.ds_by_keys.add(by_keys).cast(), row(s00, s01));
                _mm512_storeu_si512(g.ds_by_keys.add(by_keys + g.stride).cast(), row(s10, s11));
            }
        }
    }
}

/// All lanes below `left`.
fn first(left: usize) -> u16 {
    if left >= 16 { u16::MAX } else { (1 << left) - 1 }
}

/// # Safety
/// `from` has `len` readable elements of the type and `to` has room for as many.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn widen(dtype: DType, from: *const u8, to: *mut f32, len: usize) {
    for i in (0..len).step_by(16) {
        let mask = first(len - i);
        // SAFETY: the caller's promise; lanes beyond the end are masked.
        unsafe {
            let x = match dtype {
                DType::F32 => _mm512_maskz_loadu_ps(mask, from.cast::<f32>().add(i)),
                DType::Bf16 => {
                    let x = _mm256_maskz_loadu_epi16(mask, from.cast::<i16>().add(i));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
                }
                DType::F16 => {
                    _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from.cast::<i16>().add(i)))
                }
                DType::Fp8(_) => unreachable!("decoded by blocks"),
            };
            _mm512_mask_storeu_ps(to.add(i), mask, x);
        }
    }
}

/// # Safety
/// As [`fp8::encode`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn encode(format: Fp8, from: *const f32, dim: usize, to: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { fp8::encode(format, from, dim, to) }
}

/// # Safety
/// As [`fp8::decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn decode(format: Fp8, from: *const u8, dim: usize, to: *mut f32, dtype: DType) {
    // SAFETY: the caller's promise.
    unsafe { fp8::decode(format, from, dim, to, dtype) }
}

/// # Safety
/// `from` has `len` readable numbers and `to` has room for as many elements of the type.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn narrow(dtype: DType, from: *const f32, to: *mut u8, len: usize) {
    for i in (0..len).step_by(16) {
        let mask = first(len - i);
        // SAFETY: the caller's promise; lanes beyond the end are masked.
        unsafe {
            let x = _mm512_maskz_loadu_ps(mask, from.add(i));
            let half = match dtype {
                DType::F32 => {
                    _mm512_mask_storeu_ps(to.cast::<f32>().add(i), mask, x);
                    continue;
                }
                DType::Bf16 => {
                    // Half a unit of the last place, less when the result is even already; NaN only becomes quiet.
                    let bits = _mm512_castps_si512(x);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
                    let rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
                    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
                }
                DType::F16 => _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x),
                DType::Fp8(_) => unreachable!("encoded by blocks"),
            };
            _mm256_mask_storeu_epi16(to.cast::<i16>().add(i), mask, half);
        }
    }
}

/// # Safety
/// Both rows have `len` readable elements and `to` has room for as many units.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn interleave(a: *const u16, b: *const u16, len: usize, to: *mut u32) {
    for i in (0..len).step_by(16) {
        let mask = first(len - i);
        // SAFETY: the caller's promise; lanes beyond the end are masked.
        unsafe {
            let a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a.add(i).cast()));
            let b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b.add(i).cast()));
            let units = _mm512_or_si512(a, _mm512_slli_epi32::<16>(b));
            _mm512_mask_storeu_epi32(to.add(i).cast(), mask, units);
        }
    }
}

/// # Safety
/// `from` has 32 rows of `units`, `to` has room for as many.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn transpose(from: *const u32, stride: usize, units: usize, to: *mut u32) {
    for unit in (0..units).step_by(16) {
        let count = (units - unit).min(16);
        for half in 0..2 {
            // SAFETY: the caller's promise; units beyond the end are masked and not stored.
            unsafe {
                let from = from.add(16 * half * stride + unit);
                let mut rows = [_mm512_setzero_si512(); 16];
                for (i, row) in rows.iter_mut().enumerate() {
                    *row = _mm512_maskz_loadu_epi32(first(count), from.add(i * stride).cast());
                }
                let columns = transposed(rows);
                for (i, column) in columns.iter().enumerate().take(count) {
                    let to = to.add((unit + i) * LANES + 16 * half);
                    _mm512_storeu_si512(to.cast(), *column);
                }
            }
        }
    }
}

/// 16 × 16 units: pairs of rows, then of pairs, within 128-bit blocks; then the blocks.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transposed(r: [__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    let (mut t, mut u, mut v, mut w) = ([zero; 16], [zero; 16], [zero; 16], [zero; 16]);
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // u[4·i + c] holds, for rows 4i … 4i + 3, the columns c, 4 + c, 8 + c, 12 + c.
    for c in 0..4 {
        v[c] = _mm512_shuffle_i32x4::<0x88>(u[c], u[4 + c]);
        v[4 + c] = _mm512_shuffle_i32x4::<0xdd>(u[c], u[4 + c]);
        v[8 + c] = _mm512_shuffle_i32x4::<0x88>(u[8 + c], u[12 + c]);
        v[12 + c] = _mm512_shuffle_i32x4::<0xdd>(u[8 + c], u[12 + c]);
    }
    for c in 0..4 {
        w[c] = _mm512_shuffle_i32x4::<0x88>(v[c], v[8 + c]);
        w[8 + c] = _mm512_shuffle_i32x4::<0xdd>(v[c], v[8 + c]);
        w[4 + c] = _mm512_shuffle_i32x4::<0x88>(v[4 + c], v[12 + c]);
        w[12 + c] = _mm512_shuffle_i32x4::<0xdd>(v[4 + c], v[12 + c]);
    }
    w
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Simd;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn exp_of(x: [f32; 16]) -> [f32; 16] {
        let mut y = [0f32; 16];
        // SAFETY: both arrays are 64 bytes.
        unsafe { _mm512_storeu_ps(y.as_mut_ptr(), exp(_mm512_loadu_ps(x.as_ptr()))) };
        y
    }

    #[test]
    fn exp_is_good_to_two_ulp() {
        if Simd::Avx512.available() {
            // SAFETY: the CPU has the features.
            crate::backend::cpu::kernels::tests::sweep(|x| unsafe { exp_of(x) });
        }
    }

    #[test]
    fn transposing_moves_every_unit() {
        if !Simd::Avx512.available() {
            return;
        }
        for units in [4, 8, 12, 16, 32, 36] {
            let stride = units + 3;
            let from: Vec<u32> = (0..(LANES * stride) as u32).collect();
            let (mut got, mut want) = (vec![0u32; units * LANES], vec![0u32; units * LANES]);
            // SAFETY: the vectors have the sizes named, and the CPU has the features.
            unsafe {
                transpose(from.as_ptr(), stride, units, got.as_mut_ptr());
                super::super::scalar::transpose(from.as_ptr(), stride, units, want.as_mut_ptr());
            }
            assert_eq!(got, want, "{units}");
        }
    }
}
