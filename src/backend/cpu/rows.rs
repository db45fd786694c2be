//! Row-wise steps: copy and add rows, Σ O∘dO, zero; and reading and writing one row as fp32.

use crate::backend::{CopyRows, Delta, View};
use crate::dtype::DType;
use half::{bf16, f16};

/// Reads `to.len()` elements of one row as fp32.
///
/// # Safety
/// (row, head) lies in the view, whose memory is valid, and `to` is not longer than a row.
pub unsafe fn load(view: &View, row: usize, head: usize, to: &mut [f32]) {
    let from = view.at(row, head);
    // SAFETY: the caller promises `to.len()` readable elements of this type at `from`.
    unsafe {
        match view.dtype {
            DType::F32 => from.cast::<f32>().copy_to_nonoverlapping(to.as_mut_ptr(), to.len()),
            DType::Bf16 => widen(from.cast::<bf16>(), to, bf16::to_f32),
            DType::F16 => widen(from.cast::<f16>(), to, f16::to_f32),
        }
    }
}

/// # Safety
/// `from` has `to.len()` readable elements.
unsafe fn widen<T: Copy>(from: *const T, to: &mut [f32], convert: impl Fn(T) -> f32) {
    for (i, x) in to.iter_mut().enumerate() {
        // SAFETY: `i` is below `to.len()`.
        *x = convert(unsafe { from.add(i).read() });
    }
}

/// Writes one row, rounding to the storage type.
///
/// # Safety
/// As for [`load`], and the row may be written.
pub unsafe fn store(view: &View, row: usize, head: usize, from: &[f32]) {
    let to = view.at(row, head);
    // SAFETY: the caller promises `from.len()` writable elements of this type at `to`.
    unsafe {
        match view.dtype {
            DType::F32 => from.as_ptr().copy_to_nonoverlapping(to.cast::<f32>(), from.len()),
            DType::Bf16 => narrow(from, to.cast::<bf16>(), bf16::from_f32),
            DType::F16 => narrow(from, to.cast::<f16>(), f16::from_f32),
        }
    }
}

/// # Safety
/// `to` has `from.len()` writable elements.
unsafe fn narrow<T>(from: &[f32], to: *mut T, convert: impl Fn(f32) -> T) {
    for (i, x) in from.iter().enumerate() {
        // SAFETY: `i` is below `from.len()`.
        unsafe { to.add(i).write(convert(*x)) };
    }
}

/// Adds to one fp32 row.
///
/// # Safety
/// As for [`store`]; the view is fp32.
pub unsafe fn add(view: &View, row: usize, head: usize, from: &[f32]) {
    debug_assert!(view.dtype == DType::F32);
    let to = view.at(row, head).cast::<f32>();
    for (i, x) in from.iter().enumerate() {
        // SAFETY: the caller promises `from.len()` writable fp32 elements at `to`.
        unsafe { *to.add(i) += x };
    }
}

/// Reads a statistic.
///
/// # Safety
/// As for [`load`]; the view is fp32.
pub unsafe fn stat(view: &View, row: usize, head: usize) -> f32 {
    debug_assert!(view.dtype == DType::F32);
    // SAFETY: the caller promises a readable fp32 element.
    unsafe { view.at(row, head).cast::<f32>().read() }
}

/// Writes a statistic.
///
/// # Safety
/// As for [`store`]; the view is fp32.
pub unsafe fn set_stat(view: &View, row: usize, head: usize, value: f32) {
    debug_assert!(view.dtype == DType::F32);
    // SAFETY: the caller promises a writable fp32 element.
    unsafe { view.at(row, head).cast::<f32>().write(value) }
}

/// Carries out a [`CopyRows`].
///
/// # Safety
/// The views are valid for the rows and heads named, and do not overlap.
pub unsafe fn copy(step: &CopyRows) {
    let dim = step.src.dim;
    let same = step.src.dtype == step.dst.dtype && !step.add;
    let mut row = vec![0f32; dim];
    for run in step.runs {
        for i in 0..run.rows {
            let (from, to) =
                ((run.src + i * run.src_step) as usize, (run.dst + i * run.dst_step) as usize);
            for h in 0..step.heads {
                let (src_head, dst_head) = (step.src_head + h, step.dst_head + h);
                // SAFETY: the caller promises that the rows and heads of every run lie in the views.
                unsafe {
                    if same {
                        let bytes = dim * step.src.dtype.size();
                        let (src, dst) = (step.src.at(from, src_head), step.dst.at(to, dst_head));
                        src.copy_to_nonoverlapping(dst, bytes);
                        continue;
                    }
                    load(&step.src, from, src_head, &mut row);
                    if step.add {
                        add(&step.dst, to, dst_head, &row);
                    } else {
                        store(&step.dst, to, dst_head, &row);
                    }
                }
            }
        }
    }
}

/// Carries out a [`Delta`].
///
/// # Safety
/// The views are valid for all rows and heads.
pub unsafe fn delta(step: &Delta) {
    let dim = step.out.dim;
    let (mut o, mut d) = (vec![0f32; dim], vec![0f32; dim]);
    for row in 0..step.out.rows {
        for head in 0..step.out.heads {
            // SAFETY: (row, head) lies in all three views.
            unsafe {
                load(&step.out, row, head, &mut o);
                load(&step.d_out, row, head, &mut d);
                let sum = o.iter().zip(&d).map(|(a, b)| a * b).sum();
                set_stat(&step.delta, row, head, sum);
            }
        }
    }
}

/// Sets a dense buffer to zero.
///
/// # Safety
/// The view is valid and dense.
pub unsafe fn zero(view: &View) {
    debug_assert!(view.is_dense());
    // SAFETY: a dense view is this many bytes from its first element on.
    unsafe { view.ptr.write_bytes(0, view.rows * view.heads * view.dim * view.dtype.size()) }
}
