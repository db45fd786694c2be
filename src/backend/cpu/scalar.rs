//! Plain attention, row by row, with libm's exp.

use super::rows::{add, load, set_stat, stat, store};
use crate::backend::{Backward, Forward, Progress};
use crate::error::Result;

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// # Safety
/// The views are valid for their shapes.
pub unsafe fn forward(step: &Forward, progress: Progress) -> Result<()> {
    let (dqk, dv) = (step.q.dim, step.v.dim);
    let (mut q, mut k, mut v) = (vec![0f32; dqk], vec![0f32; dqk], vec![0f32; dv]);
    let rows = step.q.rows;
    for head in 0..step.q.heads {
        let kv = if step.slices.is_empty() { 0 } else { step.heads.kv_of(head) };
        let mut out = vec![0f32; rows * dv];
        let (mut max, mut sum) = (vec![f32::NEG_INFINITY; rows], vec![0f32; rows]);
        if let (false, Some(state)) = (step.first, &step.state) {
            for row in 0..rows {
                // SAFETY: (row, head) lies in the state.
                unsafe {
                    load(&state.out, row, head, &mut out[row * dv..][..dv]);
                    max[row] = stat(&state.max, row, head);
                    sum[row] = stat(&state.sum, row, head);
                }
            }
        }
        for slice in step.slices {
            for i in 0..slice.q_len {
                let row = (slice.q + i) as usize;
                // SAFETY: the slices lie in the views.
                unsafe { load(&step.q, row, head, &mut q) };
                let acc = &mut out[row * dv..][..dv];
                for key in slice.keys_of(i) {
                    // SAFETY: as above.
                    unsafe {
                        load(&step.k, key as usize, kv, &mut k);
                        load(&step.v, key as usize, kv, &mut v);
                    }
                    let score = dot(&q, &k) * step.scale;
                    if score > max[row] {
                        let shrink = (max[row] - score).exp();
                        acc.iter_mut().for_each(|o| *o *= shrink);
                        sum[row] *= shrink;
                        max[row] = score;
                    }
                    let p = (score - max[row]).exp();
                    sum[row] += p;
                    acc.iter_mut().zip(&v).for_each(|(o, v)| *o += p * v);
                }
                progress()?;
            }
        }
        for row in 0..rows {
            let acc = &mut out[row * dv..][..dv];
            // SAFETY: (row, head) lies in the output and the state.
            unsafe {
                if let Some(last) = &step.last {
                    let (scale, lse) = if sum[row] > 0.0 {
                        (1.0 / sum[row], max[row] + sum[row].ln())
                    } else {
                        (0.0, f32::NEG_INFINITY)
                    };
                    acc.iter_mut().for_each(|o| *o *= scale);
                    store(&last.out, row, head, acc);
                    set_stat(&last.lse, row, head, lse);
                } else if let Some(state) = &step.state {
                    store(&state.out, row, head, acc);
                    set_stat(&state.max, row, head, max[row]);
                    set_stat(&state.sum, row, head, sum[row]);
                }
            }
        }
    }
    Ok(())
}

/// # Safety
/// The views are valid for their shapes.
pub unsafe fn backward(step: &Backward, progress: Progress) -> Result<()> {
    let (dqk, dv) = (step.q.dim, step.v.dim);
    let (mut q, mut k, mut v) = (vec![0f32; dqk], vec![0f32; dqk], vec![0f32; dv]);
    let (mut d_out, mut dq, mut row_grad) = (vec![0f32; dv], vec![0f32; dqk], vec![0f32; dqk]);
    let mut dv_row = vec![0f32; dv];
    for slice in step.slices {
        for head in 0..step.q.heads {
            let kv = step.heads.kv_of(head);
            for i in 0..slice.q_len {
                let row = (slice.q + i) as usize;
                // SAFETY: the slices lie in the views.
                let (lse, delta) = unsafe {
                    load(&step.q, row, head, &mut q);
                    load(&step.d_out, row, head, &mut d_out);
                    (stat(&step.lse, row, head), stat(&step.delta, row, head))
                };
                if lse == f32::NEG_INFINITY {
                    continue;
                }
                dq.fill(0.0);
                for key in slice.keys_of(i) {
                    let key = key as usize;
                    // SAFETY: as above.
                    unsafe {
                        load(&step.k, key, kv, &mut k);
                        load(&step.v, key, kv, &mut v);
                    }
                    let p = (dot(&q, &k) * step.scale - lse).exp();
                    let ds = p * (dot(&d_out, &v) - delta) * step.scale;
                    dq.iter_mut().zip(&k).for_each(|(g, k)| *g += ds * k);
                    row_grad.iter_mut().zip(&q).for_each(|(g, q)| *g = ds * q);
                    dv_row.iter_mut().zip(&d_out).for_each(|(g, d)| *g = p * d);
                    // SAFETY: as above.
                    unsafe {
                        add(&step.dk, key, kv, &row_grad);
                        add(&step.dv, key, kv, &dv_row);
                    }
                }
                // SAFETY: as above.
                unsafe { add(&step.dq, row, head, &dq) };
                progress()?;
            }
        }
    }
    Ok(())
}
