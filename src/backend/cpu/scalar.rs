//! The reference loops: plain Rust, libm's exp, nothing a debugger or valgrind could stumble over.

use super::fp8;
use super::kernels::{Gemm, Gradient, Into, Kernels, LANES, Softmax};
use crate::dtype::DType;
use half::{bf16, f16};

/// For every storage type; operands are fp32.
pub static KERNELS: Kernels = Kernels {
    pairs: 1,
    gemm,
    softmax,
    gradient,
    widen,
    narrow,
    encode: fp8::encode,
    decode: fp8::decode,
    transpose,
    interleave,
};

/// # Safety
/// The tiles are as [`Gemm`] says; C overlaps neither A nor B.
unsafe fn gemm(g: &Gemm) {
    let (a_row, a_step) = if g.a_columns { (1, g.a_stride) } else { (g.a_stride, 1) };
    for panel in 0..g.n.div_ceil(LANES) {
        let columns = (g.n - panel * LANES).min(LANES);
        for i in 0..g.m {
            let mut acc = [0f32; LANES];
            for p in 0..g.k {
                // SAFETY: (i, p) lies in A, and `columns` units from (p, 32·panel) on lie in B.
                let (a, b) = unsafe {
                    let b = g.b.add(p * g.b_step + panel * g.b_panel).cast::<f32>();
                    let a = g.a.add(i * a_row + p * a_step).cast::<f32>().read();
                    (a, std::slice::from_raw_parts(b, columns))
                };
                acc.iter_mut().zip(b).for_each(|(c, b)| *c += a * b);
            }
            // SAFETY: `columns` numbers from (i, 32·panel) on lie in C, and `m` factors are given.
            let (c, factor) = unsafe {
                let c = g.c.add(i * g.c_stride + panel * LANES);
                let factor = match g.into {
                    Into::Set => 0.0,
                    Into::Add => 1.0,
                    Into::Scale(factor) => *factor.add(i),
                };
                (std::slice::from_raw_parts_mut(c, columns), factor)
            };
            match g.into {
                Into::Set => c.copy_from_slice(&acc[..columns]),
                _ => c.iter_mut().zip(&acc).for_each(|(c, x)| *c = *c * factor + x),
            }
        }
    }
}

/// # Safety
/// The panels are as [`Softmax`] says and do not overlap.
unsafe fn softmax(s: &Softmax) {
    // SAFETY: the caller promises `keys · 32` scores and 32 of everything else.
    let (scores, max, sum, shrink) = unsafe {
        (
            std::slice::from_raw_parts_mut(s.scores, s.keys * LANES),
            std::slice::from_raw_parts_mut(s.max, LANES),
            std::slice::from_raw_parts_mut(s.sum, LANES),
            std::slice::from_raw_parts_mut(s.shrink, LANES),
        )
    };
    let mut new_max = [f32::NEG_INFINITY; LANES];
    new_max.copy_from_slice(max);
    for (key, row) in scores.chunks_exact_mut(LANES).enumerate() {
        for (lane, x) in row.iter_mut().enumerate() {
            // SAFETY: the caller promises 32 bounds when `masked`.
            *x = match s.masked && !unsafe { sees(s.lo, s.hi, lane, key) } {
                true => f32::NEG_INFINITY,
                false => *x * s.scale,
            };
            new_max[lane] = new_max[lane].max(*x);
        }
    }
    let mut new_sum = [0f32; LANES];
    // A lane that has seen no key yet has no maximum: exp(−∞ − 0) is 0, as it must be.
    let base = new_max.map(|m| if m == f32::NEG_INFINITY { 0.0 } else { m });
    for row in scores.chunks_exact_mut(LANES) {
        for (lane, x) in row.iter_mut().enumerate() {
            *x = (*x - base[lane]).exp();
            new_sum[lane] += *x;
        }
    }
    for lane in 0..LANES {
        shrink[lane] = (max[lane] - base[lane]).exp();
        sum[lane] = sum[lane] * shrink[lane] + new_sum[lane];
        max[lane] = new_max[lane];
    }
}

/// # Safety
/// `lo` and `hi` have 32 entries.
unsafe fn sees(lo: *const i32, hi: *const i32, lane: usize, key: usize) -> bool {
    // SAFETY: the caller's promise, and `lane` is below 32.
    unsafe { (*lo.add(lane)..*hi.add(lane)).contains(&(key as i32)) }
}

/// # Safety
/// The panels are as [`Gradient`] says and do not overlap.
unsafe fn gradient(g: &Gradient) {
    for lane in 0..LANES {
        // SAFETY: the caller promises 32 rows of `keys` numbers and 32 of everything else.
        let (scores, d_p, lse, delta) = unsafe {
            (
                std::slice::from_raw_parts_mut(g.scores.add(lane * g.stride), g.keys),
                std::slice::from_raw_parts_mut(g.d_p.add(lane * g.stride), g.keys),
                *g.lse.add(lane),
                *g.delta.add(lane),
            )
        };
        for (key, (s, d)) in scores.iter_mut().zip(d_p).enumerate() {
            // SAFETY: the caller promises 32 bounds when `masked`.
            if g.masked && !unsafe { sees(g.lo, g.hi, lane, key) } {
                (*s, *d) = (0.0, 0.0);
            } else {
                *s = (*s * g.scale - lse).exp();
                *d = *s * (*d - delta);
            }
        }
    }
}

/// # Safety
/// `from` has `len` readable elements of the type and `to` has room for as many.
pub unsafe fn widen(dtype: DType, from: *const u8, to: *mut f32, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's promise, and `i` is below `len`.
        unsafe {
            to.add(i).write(match dtype {
                DType::F32 => from.cast::<f32>().add(i).read(),
                DType::Bf16 => from.cast::<bf16>().add(i).read().to_f32(),
                DType::F16 => from.cast::<f16>().add(i).read().to_f32(),
                DType::Fp8(_) => unreachable!("decoded by blocks"),
            })
        };
    }
}

/// # Safety
/// `from` has `len` readable numbers and `to` has room for as many elements of the type.
pub unsafe fn narrow(dtype: DType, from: *const f32, to: *mut u8, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's promise, and `i` is below `len`.
        unsafe {
            let x = from.add(i).read();
            match dtype {
                DType::F32 => to.cast::<f32>().add(i).write(x),
                DType::Bf16 => to.cast::<bf16>().add(i).write(bf16::from_f32(x)),
                DType::F16 => to.cast::<f16>().add(i).write(f16::from_f32(x)),
                DType::Fp8(_) => unreachable!("encoded by blocks"),
            }
        }
    }
}

/// # Safety
/// `from` has 32 rows of `units`, `to` has room for as many.
pub unsafe fn transpose(from: *const u32, stride: usize, units: usize, to: *mut u32) {
    for i in 0..units {
        for lane in 0..LANES {
            // SAFETY: the caller's promise; (lane, i) lies in the tile.
            unsafe { to.add(i * LANES + lane).write(from.add(lane * stride + i).read()) };
        }
    }
}

/// # Safety
/// Both rows have `len` readable elements and `to` has room for as many units.
pub unsafe fn interleave(a: *const u16, b: *const u16, len: usize, to: *mut u32) {
    for i in 0..len {
        // SAFETY: the caller's promise, and `i` is below `len`.
        unsafe { to.add(i).write(u32::from(a.add(i).read()) | u32::from(b.add(i).read()) << 16) };
    }
}
