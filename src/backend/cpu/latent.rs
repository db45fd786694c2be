//! Latents: keys and values expanded from them, and the gradients of those contracted, as products of packed tiles.
//!
//! ```text
//! expand     K[rows][n]        = c[rows][dim] · Wᵀ              one task per (block of rows, head)
//! contract   d_W[n][dim]      += Σ over blocks dK[rows]ᵀ · c     one task per (head, keys or values)
//!            d_c[rows][dim]   += Σ over heads dK[rows] · W       one task per block of rows
//! ```
//! Who writes what has one task, which adds in a fixed order: equal bits for any number of threads.

use super::Scratch;
use super::kernels::{Gemm, Into, Kernels, LANES};
use super::rows::add;
use super::tile::{Packer, stride};
use crate::backend::{Contract, Expand, View};
use crate::dtype::DType;
use std::ops::Range;

/// Rows of a block.
const ROWS: usize = 128;

/// Cuts rows into blocks.
pub fn blocks(rows: &[Range<u32>], out: &mut Vec<Range<usize>>) {
    out.clear();
    for r in rows {
        let (first, end) = (r.start as usize, r.end as usize);
        out.extend((first..end).step_by(ROWS).map(|at| at..(at + ROWS).min(end)));
    }
}

/// One expansion, shared by all threads.
pub struct Expansion<'a> {
    /// The step.
    pub step: &'a Expand<'a>,
    /// The loops.
    pub kernels: &'static Kernels,
    /// Blocks of rows.
    pub blocks: &'a [Range<usize>],
}

impl Expansion<'_> {
    /// Number of tasks.
    pub fn tasks(&self) -> usize {
        self.blocks.len() * self.step.k.heads
    }

    /// Expands one block of rows for one head.
    ///
    /// # Safety
    /// The views of the step are valid; every task is run once.
    pub unsafe fn run(&self, task: usize, scratch: &mut Scratch) {
        let Expand { latent, up_k, up_v, k, v, first_head, .. } = self.step;
        let (block, head) = (&self.blocks[task / k.heads], task % k.heads);
        let (dim, kernels) = (up_v.dim, self.kernels);
        let (units, a_stride) = (dim / kernels.pairs, stride(dim / kernels.pairs));
        let widest = up_k.rows.max(up_v.rows).next_multiple_of(LANES);
        let ([a, w, b, c], _) = scratch.units_and_groups([
            ROWS * a_stride,
            LANES * a_stride,
            widest * units,
            ROWS * widest,
        ]);
        let packer = Packer { kernels, view: &View { dim, ..*latent } };
        for (i, row) in block.clone().enumerate() {
            // SAFETY: a block has at most `ROWS` rows, which lie in the latents.
            unsafe { packer.row(Some((row, 0)), a.add(i * a_stride)) };
        }
        for (weights, to) in [(up_k, k), (up_v, v)] {
            let n = weights.rows.next_multiple_of(LANES);
            let packer = Packer { kernels, view: weights };
            for panel in 0..n / LANES {
                for lane in 0..LANES {
                    let at = panel * LANES + lane;
                    let row = (at < weights.rows).then_some((at, first_head + head));
                    // SAFETY: row and head lie in the weights, 32 rows of units in the scratch.
                    unsafe { packer.row(row, w.add(lane * a_stride)) };
                }
                // SAFETY: 32 rows were packed; the panel lies in its buffer.
                unsafe { (kernels.transpose)(w, a_stride, units, b.add(panel * LANES * units)) };
            }
            let c = c.cast::<f32>();
            // SAFETY: both operands are packed, and C has room for a block of the widest rows.
            unsafe {
                (kernels.gemm)(&Gemm {
                    m: block.len(),
                    n,
                    k: units,
                    a,
                    a_stride,
                    a_columns: false,
                    b,
                    b_step: LANES,
                    b_panel: LANES * units,
                    c,
                    c_stride: n,
                    into: Into::Set,
                })
            };
            let (made, size) = (weights.rows, latent.dtype.size());
            for (i, row) in block.clone().enumerate() {
                // SAFETY: `made` elements of C, then the rest of the latent, fill the row and head of K or V.
                unsafe {
                    let out = to.at(row, head);
                    (kernels.narrow)(to.dtype, c.add(i * n), out, made);
                    let shared = latent.at(row, 0).add(dim * size);
                    let rest = (to.dim - made) * size;
                    shared.copy_to_nonoverlapping(out.add(made * size), rest);
                }
            }
        }
    }
}

/// One contraction, shared by all threads.
pub struct Contraction<'a> {
    /// The step.
    pub step: &'a Contract<'a>,
    /// The loops.
    pub kernels: &'static Kernels,
    /// Blocks of rows.
    pub blocks: &'a [Range<usize>],
}

impl Contraction<'_> {
    /// Number of tasks.
    pub fn tasks(&self) -> usize {
        2 * self.step.dk.heads + self.blocks.len()
    }

    /// Runs one task. `tick` is called often; false stops it half-way.
    ///
    /// # Safety
    /// The views of the step are valid; every task is run once.
    pub unsafe fn run(&self, task: usize, scratch: &mut Scratch, tick: &mut dyn FnMut() -> bool) {
        let heads = self.step.dk.heads;
        // SAFETY: the caller's promise is passed on.
        unsafe {
            match task.checked_sub(2 * heads) {
                Some(block) => self.latents(&self.blocks[block], scratch, tick),
                None => self.weights(task / 2, task % 2 == 1, scratch, tick),
            }
        }
    }

    /// Adds what all rows give for the weights of one head.
    ///
    /// # Safety
    /// As [`Contraction::run`].
    unsafe fn weights(
        &self,
        head: usize,
        values: bool,
        scratch: &mut Scratch,
        tick: &mut dyn FnMut() -> bool,
    ) {
        let Contract { dk, dv, latent, first_head, d_up_k, d_up_v, .. } = self.step;
        let (from, to) = if values { (dv, d_up_v) } else { (dk, d_up_k) };
        let (n, dim, pairs) = (to.rows, to.dim, self.kernels.pairs);
        let (a_stride, b_step) = (stride(n), stride(dim));
        let wide = dim.next_multiple_of(16);
        let ([a, b, c, halves], _) = scratch.units_and_groups([
            ROWS / pairs * a_stride,
            ROWS / pairs * b_step,
            n * wide,
            n.next_multiple_of(2),
        ]);
        let c = c.cast::<f32>();
        for (index, block) in self.blocks.iter().enumerate() {
            if !tick() {
                return;
            }
            let latents = View { dim, ..*latent };
            for (unit, i) in block.clone().step_by(pairs).enumerate() {
                // SAFETY: rows of the block lie in the views, `ROWS` of them in the scratch.
                unsafe {
                    let (a, b) = (a.add(unit * a_stride), b.add(unit * b_step));
                    let row = |i| from.at(i, head).cast::<f32>().cast_const();
                    if pairs == 1 {
                        row(i).copy_to_nonoverlapping(a.cast(), n);
                        Packer { kernels: self.kernels, view: &latents }.row(Some((i, 0)), b);
                        continue;
                    }
                    // The last row of an odd number is paired with zeros, and meets itself in the latents.
                    let next = if i + 1 < block.end { i + 1 } else { i };
                    let (first, second) = (halves.cast::<u16>(), halves.cast::<u16>().add(n));
                    (self.kernels.narrow)(DType::Bf16, row(i), first.cast(), n);
                    (self.kernels.narrow)(DType::Bf16, row(next), second.cast(), n);
                    if next == i {
                        second.write_bytes(0, n);
                    }
                    (self.kernels.interleave)(first, second, n, a);
                    let c = |i| latents.at(i, 0).cast::<u16>().cast_const();
                    (self.kernels.interleave)(c(i), c(next), dim, b);
                }
            }
            // SAFETY: both operands are packed, and C has a row for every row of the weights.
            unsafe {
                (self.kernels.gemm)(&Gemm {
                    m: n,
                    n: wide,
                    k: block.len().div_ceil(pairs),
                    a,
                    a_stride,
                    a_columns: true,
                    b,
                    b_step,
                    b_panel: LANES,
                    c,
                    c_stride: wide,
                    into: if index == 0 { Into::Set } else { Into::Add },
                })
            };
        }
        for row in 0..n {
            // SAFETY: row and head lie in the gradient, which this task alone writes.
            unsafe { add(to.at(row, first_head + head).cast(), c.add(row * wide), dim, 1.0) };
        }
    }

    /// Adds what all heads give for the latents of one block.
    ///
    /// # Safety
    /// As [`Contraction::run`].
    unsafe fn latents(
        &self,
        block: &Range<usize>,
        scratch: &mut Scratch,
        tick: &mut dyn FnMut() -> bool,
    ) {
        let Contract { dk, dv, up_k, up_v, first_head, d_latent, .. } = self.step;
        let (dim, pairs, kernels) = (up_v.dim, self.kernels.pairs, self.kernels);
        let rope = d_latent.dim - dim;
        let most = up_k.rows.max(up_v.rows);
        let (b_step, wide) = (stride(dim), dim.next_multiple_of(16));
        let ([a, b, c, shared], _) = scratch.units_and_groups([
            ROWS * stride(most / pairs),
            most / pairs * b_step,
            ROWS * wide,
            ROWS * rope,
        ]);
        let (c, shared) = (c.cast::<f32>(), shared.cast::<f32>());
        // SAFETY: the size asked for; zero bits are 0.
        unsafe { shared.write_bytes(0, ROWS * rope) };
        for head in 0..dk.heads {
            if !tick() {
                return;
            }
            for (from, weights) in [(dk, up_k), (dv, up_v)] {
                let n = weights.rows;
                let a_stride = stride(n / pairs);
                for (i, row) in block.clone().enumerate() {
                    // SAFETY: the row and head lie in the view, a block's rows in the scratch.
                    unsafe {
                        let (row, a) = (from.at(row, head).cast::<f32>(), a.add(i * a_stride));
                        match pairs {
                            1 => row.copy_to_nonoverlapping(a.cast(), n),
                            _ => (kernels.narrow)(DType::Bf16, row, a.cast(), n),
                        }
                        add(shared.add(i * rope), row.add(n), from.dim - n, 1.0);
                    }
                }
                let into = if head == 0 && std::ptr::eq(from, dk) { Into::Set } else { Into::Add };
                // SAFETY: all rows of the head lie in the weights; both operands are packed, and C has a row for every row of the block.
                unsafe {
                    let packer = Packer { kernels, view: weights };
                    packer.contracted(n, |row| Some((row, first_head + head)), b);
                    (kernels.gemm)(&Gemm {
                        m: block.len(),
                        n: wide,
                        k: n / pairs,
                        a,
                        a_stride,
                        a_columns: false,
                        b,
                        b_step,
                        b_panel: LANES,
                        c,
                        c_stride: wide,
                        into,
                    })
                };
            }
        }
        for (i, row) in block.clone().enumerate() {
            // SAFETY: the row lies in the gradient, which this task alone writes.
            unsafe {
                let to = d_latent.at(row, 0).cast::<f32>();
                add(to, c.add(i * wide), dim, 1.0);
                add(to.add(dim), shared.add(i * rope), rope, 1.0);
            }
        }
    }
}
