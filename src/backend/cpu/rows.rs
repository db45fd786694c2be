//! Row-wise steps: copy and add rows, Σ O∘dO. They are bound by memory, so the calling thread does them alone.

use super::kernels::Kernels;
use crate::backend::{CopyRows, Delta, Reduce, SinkTerms, View};
use crate::dtype::DType;

/// Numbers that are converted at a time.
const CHUNK: usize = 256;

/// Reads a statistic.
///
/// # Safety
/// (row, head) lies in the view, whose memory is valid; the view is fp32.
pub unsafe fn stat(view: &View, row: usize, head: usize) -> f32 {
    debug_assert!(view.dtype == DType::F32);
    // SAFETY: the caller promises a readable fp32 element.
    unsafe { view.at(row, head).cast::<f32>().read() }
}

/// Writes a statistic.
///
/// # Safety
/// As for [`stat`], and the element may be written.
pub unsafe fn set_stat(view: &View, row: usize, head: usize, value: f32) {
    debug_assert!(view.dtype == DType::F32);
    // SAFETY: the caller promises a writable fp32 element.
    unsafe { view.at(row, head).cast::<f32>().write(value) }
}

/// Adds `scale` times `from` to a row of fp32 numbers.
///
/// # Safety
/// `to` and `from` are valid for `len` numbers and do not overlap.
pub unsafe fn add(to: *mut f32, from: *const f32, len: usize, scale: f32) {
    // SAFETY: the caller's promise.
    let (to, from) =
        unsafe { (std::slice::from_raw_parts_mut(to, len), std::slice::from_raw_parts(from, len)) };
    to.iter_mut().zip(from).for_each(|(to, x)| *to += scale * x);
}

/// Carries out a [`CopyRows`].
///
/// # Safety
/// The views are valid for the rows and heads named, and do not overlap.
pub unsafe fn copy(step: &CopyRows, kernels: &Kernels) {
    // What is encoded and decoded is so head by head.
    let (coded, dim) = match (step.src.dtype, step.dst.dtype) {
        (DType::Fp8(a), DType::Fp8(b)) => (a != b, step.src.dim),
        (DType::Fp8(_), _) => (true, step.dst.dim),
        (_, DType::Fp8(_)) => (true, step.src.dim),
        _ => (false, step.src.dim),
    };
    let joined = step.heads == 1 || (step.src.stride_head == dim && step.dst.stride_head == dim);
    let (pieces, len) = if joined && !coded { (1, step.heads * dim) } else { (step.heads, dim) };
    for run in step.runs {
        for i in 0..run.rows {
            let from = (run.src + i * run.src_step) as usize;
            let to = (run.dst + i * run.dst_step) as usize;
            for head in 0..pieces {
                let from = step.src.at(from, step.src_head + head);
                let to = step.dst.at(to, step.dst_head + head);
                // SAFETY: the caller promises that the rows and heads of every run lie in the views.
                unsafe {
                    if step.add {
                        add_converted(from, step.src.dtype, to.cast(), len, kernels);
                    } else {
                        convert(from, step.src.dtype, to, step.dst.dtype, len, kernels);
                    }
                }
            }
        }
    }
}

/// # Safety
/// Both sides are valid for `len` elements of their types and do not overlap; what is coded is one head, at most [`CHUNK`] elements.
unsafe fn convert(
    from: *const u8,
    from_type: DType,
    to: *mut u8,
    to_type: DType,
    len: usize,
    kernels: &Kernels,
) {
    let (read, write) = (from_type.size(), to_type.size());
    // SAFETY: the caller's promise; a chunk lies in the row.
    unsafe {
        if from_type == to_type {
            return from.copy_to_nonoverlapping(to, len * read);
        }
        let mut chunk = [0f32; CHUNK];
        match (from_type, to_type) {
            (DType::Fp8(format), _) => {
                (kernels.decode)(format, from, len, chunk.as_mut_ptr(), to_type);
                return (kernels.narrow)(to_type, chunk.as_ptr(), to, len);
            }
            (_, DType::Fp8(format)) => {
                (kernels.widen)(from_type, from, chunk.as_mut_ptr(), len);
                return (kernels.encode)(format, chunk.as_ptr(), len, to);
            }
            _ => {}
        }
        for at in (0..len).step_by(CHUNK) {
            let count = (len - at).min(CHUNK);
            (kernels.widen)(from_type, from.add(at * read), chunk.as_mut_ptr(), count);
            (kernels.narrow)(to_type, chunk.as_ptr(), to.add(at * write), count);
        }
    }
}

/// # Safety
/// As for [`convert`]; `to` is fp32.
unsafe fn add_converted(
    from: *const u8,
    from_type: DType,
    to: *mut f32,
    len: usize,
    kernels: &Kernels,
) {
    let mut chunk = [0f32; CHUNK];
    for at in (0..len).step_by(CHUNK) {
        let count = (len - at).min(CHUNK);
        // SAFETY: the caller's promise; a chunk lies in the row.
        unsafe {
            let from = from.add(at * from_type.size());
            (kernels.widen)(from_type, from, chunk.as_mut_ptr(), count);
            add(to.add(at), chunk.as_ptr(), count, 1.0);
        }
    }
}

/// Carries out a [`SinkTerms`].
///
/// # Safety
/// The views are valid for all rows and heads.
pub unsafe fn sink_terms(step: &SinkTerms) {
    for row in 0..step.terms.rows {
        for head in 0..step.terms.heads {
            // SAFETY: (row, head) lies in the views, and every head has a sink.
            unsafe {
                let lse = stat(&step.lse, row, head);
                // Of padding delta may be anything.
                let term = match lse == f32::NEG_INFINITY {
                    true => 0.0,
                    false => {
                        -(stat(&step.sinks, 0, head) - lse).exp() * stat(&step.delta, row, head)
                    }
                };
                set_stat(&step.terms, row, head, term);
            }
        }
    }
}

/// Carries out a [`Reduce`]. Sums are kept in fp64.
///
/// # Safety
/// The views are valid for all rows and heads.
pub unsafe fn reduce(step: &Reduce) {
    for head in 0..step.src.heads {
        let (mut sum, mut top) = (0f64, f32::NEG_INFINITY);
        for row in 0..step.src.rows {
            // SAFETY: (row, head) lies in the source.
            let x = unsafe { stat(&step.src, row, head) };
            sum += f64::from(x);
            top = top.max(x);
        }
        let value = if step.max { top } else { sum as f32 };
        // SAFETY: the destination has the row and as many heads.
        unsafe { set_stat(&step.dst, step.dst_row, step.dst_head + head, value) };
    }
}

/// Carries out a [`Delta`].
///
/// # Safety
/// The views are valid for all rows and heads.
pub unsafe fn delta(step: &Delta, kernels: &Kernels) {
    let dim = step.out.dim;
    let size = (step.out.dtype.size(), step.d_out.dtype.size());
    let (mut o, mut d) = ([0f32; CHUNK], [0f32; CHUNK]);
    for row in 0..step.out.rows {
        for head in 0..step.out.heads {
            let mut sum = 0.0;
            for at in (0..dim).step_by(CHUNK) {
                let count = (dim - at).min(CHUNK);
                // SAFETY: (row, head) lies in the views, and the chunk in the row.
                unsafe {
                    let out = step.out.at(row, head).add(at * size.0);
                    (kernels.widen)(step.out.dtype, out, o.as_mut_ptr(), count);
                    let d_out = step.d_out.at(row, head).add(at * size.1);
                    (kernels.widen)(step.d_out.dtype, d_out, d.as_mut_ptr(), count);
                }
                sum += dot(&o[..count], &d[..count]);
            }
            // SAFETY: (row, head) lies in the view.
            unsafe { set_stat(&step.delta, row, head, sum) };
        }
    }
}

/// Sixteen partial sums, for speed and for precision.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (x, y))| *s += x * y);
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Run;
    use crate::backend::cpu::{Cpu, Simd};

    fn all_simd() -> impl Iterator<Item = Simd> {
        Simd::ALL.into_iter().filter(|s| s.available())
    }

    /// Every fp32 number with its lower bits cut off, so that all of exponents, ties and specials occur, and some neighbours.
    #[test]
    fn conversions_round_as_the_reference_does() {
        let reference = Kernels::of(Simd::Scalar, DType::F32);
        let bits = (0..=u16::MAX).flat_map(|high| {
            [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff]
                .map(|low: u32| f32::from_bits(u32::from(high) << 16 | low))
        });
        let numbers: Vec<f32> = bits.collect();
        for simd in all_simd() {
            let kernels = Kernels::of(simd, DType::F32);
            for dtype in [DType::Bf16, DType::F16] {
                for len in [numbers.len(), 5, 16, 19] {
                    let (mut got, mut want) = (vec![7u16; len + 1], vec![7u16; len + 1]);
                    // SAFETY: the vectors have room for `len` elements.
                    unsafe {
                        (kernels.narrow)(dtype, numbers.as_ptr(), got.as_mut_ptr().cast(), len);
                        (reference.narrow)(dtype, numbers.as_ptr(), want.as_mut_ptr().cast(), len);
                    }
                    let bad = (0..=len).find(|&i| got[i] != want[i]).map(|i| {
                        let number = numbers.get(i).map_or(0, |x| x.to_bits());
                        format!("{number:x}: {:x}, want {:x}", got[i], want[i])
                    });
                    assert_eq!(bad, None, "{simd:?} {dtype:?} {len}");
                }
                let stored: Vec<u16> = (0..=u16::MAX).collect();
                for len in [stored.len(), 5, 8, 16, 19] {
                    let (mut got, mut want) = (vec![7f32; len + 1], vec![7f32; len + 1]);
                    let from = stored[stored.len() - len..].as_ptr().cast();
                    // SAFETY: the vectors have room for `len` elements.
                    unsafe {
                        (kernels.widen)(dtype, from, got.as_mut_ptr(), len);
                        (reference.widen)(dtype, from, want.as_mut_ptr(), len);
                    }
                    let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                    assert!(got.iter().zip(&want).all(same), "{simd:?} {dtype:?} {len}");
                }
            }
        }
    }

    /// Heads side by side or apart, every pair of types, with and without adding, steps in rows.
    #[test]
    fn rows_are_copied_converted_and_added() {
        let runs = [
            Run { src: 0, src_step: 2, dst: 9, dst_step: 1, rows: 4 },
            Run { src: 9, src_step: 1, dst: 0, dst_step: 3, rows: 3 },
        ];
        let dim = 24;
        for simd in all_simd() {
            let mut cpu = Cpu::new(1, simd).unwrap();
            for (src_type, dst_type) in
                DType::ALL.iter().flat_map(|&a| DType::ALL.iter().map(move |&b| (a, b)))
            {
                for (gap, add) in [(0, false), (8, false), (0, true), (8, true)] {
                    if add && dst_type != DType::F32 {
                        continue;
                    }
                    let mut source = vec![0u32; 12 * 5 * 64];
                    let mut target = vec![0u32; 14 * 4 * 64];
                    let src = View::dense(source.as_mut_ptr().cast(), src_type, 12, 5, dim);
                    let mut dst = View::dense(target.as_mut_ptr().cast(), dst_type, 14, 4, dim);
                    dst.stride_head += gap;
                    dst.stride_row = 4 * dst.stride_head;
                    let value = |row: usize, head: usize| (row * 8 + head) as f32;
                    let write = |view: &View, row: usize, head: usize, x: f32| {
                        let scalar = Kernels::of(Simd::Scalar, view.dtype);
                        // SAFETY: (row, head) lies in the view.
                        unsafe {
                            (scalar.narrow)(view.dtype, [x; 24].as_ptr(), view.at(row, head), dim)
                        }
                    };
                    (0..12).for_each(|r| (0..5).for_each(|h| write(&src, r, h, value(r, h))));
                    (0..14).for_each(|r| (0..4).for_each(|h| write(&dst, r, h, 1.0)));
                    let step =
                        CopyRows { src, src_head: 2, dst, dst_head: 1, heads: 3, runs: &runs, add };
                    // SAFETY: all rows and heads named lie in the views.
                    unsafe { cpu.copy_rows(&step) };
                    for (row, head) in (0..14).flat_map(|r| (0..4).map(move |h| (r, h))) {
                        let of = |run: &Run| {
                            (0..run.rows as usize)
                                .find(|i| run.dst as usize + i * run.dst_step as usize == row)
                                .map(|i| run.src as usize + i * run.src_step as usize)
                        };
                        let copied = runs.iter().find_map(of).filter(|_| head > 0);
                        let want = copied.map_or(1.0, |from| {
                            value(from, head + 1) + if add { 1.0 } else { 0.0 }
                        });
                        let mut got = [0f32; 24];
                        let scalar = Kernels::of(Simd::Scalar, dst_type);
                        // SAFETY: (row, head) lies in the view.
                        unsafe {
                            (scalar.widen)(dst_type, dst.at(row, head), got.as_mut_ptr(), dim)
                        };
                        assert_eq!(got, [want; 24], "{simd:?} {step:?} {row} {head}");
                    }
                }
            }
        }
    }
}
