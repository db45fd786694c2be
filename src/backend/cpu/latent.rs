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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{Cpu, Simd};

    /// `[rows, heads, dim]` with gaps after every row and head, of values that every storage type holds.
    struct Tensor {
        _bytes: Vec<u8>,
        view: View,
    }

    impl Tensor {
        fn new(dtype: DType, rows: usize, heads: usize, dim: usize, seed: u64) -> Tensor {
            let (head, row) = (dim + 8, heads * (dim + 8) + 16);
            let mut bytes = vec![0xFF; rows.max(1) * row * dtype.size() + 64];
            let at = bytes.as_ptr().align_offset(64);
            let ptr = bytes[at..].as_mut_ptr();
            let dense = View::dense(ptr, dtype, rows, heads, dim);
            let view = View { stride_row: row, stride_head: head, ..dense };
            let mut made = Tensor { _bytes: bytes, view };
            let mut x = seed;
            for (r, h, i) in indices(&view) {
                x = x
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let value = if seed == 0 { 0.0 } else { ((x >> 33) % 33) as f32 / 8.0 - 2.0 };
                made.put(r, h, i, value);
            }
            made
        }

        fn put(&mut self, row: usize, head: usize, i: usize, value: f32) {
            let (dtype, at) = (self.view.dtype, self.view.at(row, head));
            // SAFETY: inside the buffer by construction of the view.
            unsafe { super::super::scalar::narrow(dtype, &value, at.add(i * dtype.size()), 1) };
        }

        fn get(&self, row: usize, head: usize, i: usize) -> f64 {
            let mut value = 0f32;
            let (dtype, at) = (self.view.dtype, self.view.at(row, head));
            // SAFETY: inside the buffer by construction of the view.
            unsafe { super::super::scalar::widen(dtype, at.add(i * dtype.size()), &mut value, 1) };
            f64::from(value)
        }
    }

    fn indices(view: &View) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (rows, heads, dim) = (view.rows, view.heads, view.dim);
        (0..rows).flat_map(move |r| (0..heads).flat_map(move |h| (0..dim).map(move |i| (r, h, i))))
    }

    /// Tensors of a step: latents, weights, K, V; dK, dV; gradients.
    struct Step {
        latent: Tensor,
        up: [Tensor; 2],
        made: [Tensor; 2],
        given: [Tensor; 2],
        d_latent: Tensor,
        d_up: [Tensor; 2],
    }

    const HEADS: usize = 3;
    const FIRST: usize = 1;

    /// Rows × (dqk, dv, dim, rope).
    fn run(
        dtype: DType,
        [dqk, dv, dim, rope]: [usize; 4],
        rows: &[Range<u32>],
        simd: Simd,
        threads: usize,
    ) -> Step {
        let n = rows.last().map_or(0, |r| r.end as usize) + 2;
        let pair = |rows: [usize; 2], heads, dims: [usize; 2], dtype, seed: u64| {
            [0, 1].map(|i| Tensor::new(dtype, rows[i], heads, dims[i], seed * (i as u64 + 1)))
        };
        let (weights, all) = ([dqk - rope, dv], FIRST + HEADS + 1);
        let step = Step {
            latent: Tensor::new(dtype, n, 1, dim + rope, 7),
            up: pair(weights, all, [dim; 2], dtype, 11),
            made: pair([n; 2], HEADS, [dqk, dv], dtype, 0),
            given: pair([n; 2], HEADS, [dqk, dv], DType::F32, 13),
            d_latent: Tensor::new(DType::F32, n, 1, dim + rope, 17),
            d_up: pair(weights, all, [dim; 2], DType::F32, 19),
        };
        let mut cpu = Cpu::new(threads, simd).unwrap();
        let expand = Expand {
            latent: step.latent.view,
            up_k: step.up[0].view,
            up_v: step.up[1].view,
            first_head: FIRST,
            k: step.made[0].view,
            v: step.made[1].view,
            rows,
        };
        let contract = Contract {
            dk: step.given[0].view,
            dv: step.given[1].view,
            latent: step.latent.view,
            up_k: step.up[0].view,
            up_v: step.up[1].view,
            first_head: FIRST,
            d_latent: step.d_latent.view,
            d_up_k: step.d_up[0].view,
            d_up_v: step.d_up[1].view,
            rows,
        };
        // SAFETY: the tensors outlive the calls and have the shapes that the steps say.
        unsafe {
            cpu.expand(&expand, &mut || Ok(())).unwrap();
            cpu.contract(&contract, &mut || Ok(())).unwrap();
        }
        step
    }

    /// Values are so coarse that all sums are exact: whatever the instruction set, the result is the double loop's.
    #[test]
    fn latents_are_what_a_double_loop_says() {
        let shapes = [[24, 16, 32, 8], [16, 8, 24, 0], [40, 48, 136, 16], [72, 32, 8, 64]];
        let lists: [&[Range<u32>]; 3] =
            [&[0..2, 2..5], &[0..1, 3..131, 140..273], &[2..259, 259..260]];
        for simd in Simd::ALL.into_iter().filter(|s| s.available()) {
            for (n, shape) in shapes.into_iter().enumerate() {
                for (m, rows) in lists.into_iter().enumerate() {
                    let dtype = DType::ALL[(n + m) % 3];
                    let what = format!("{} {dtype:?} {shape:?} {rows:?}", simd.name());
                    check(&run(dtype, shape, rows, simd, 1), shape, rows, &what);
                    let [one, two] = [1, 3].map(|n| run(dtype, shape, rows, simd, n));
                    for (a, b) in [(&one.d_latent, &two.d_latent), (&one.d_up[0], &two.d_up[0])] {
                        for (r, h, i) in indices(&a.view) {
                            assert_eq!(a.get(r, h, i), b.get(r, h, i), "{what}");
                        }
                    }
                }
            }
        }
    }

    fn check(s: &Step, [dqk, dv, dim, rope]: [usize; 4], rows: &[Range<u32>], what: &str) {
        let nope = dqk - rope;
        let rows: Vec<usize> = rows.iter().cloned().flatten().map(|r| r as usize).collect();
        let fresh = |t: &Tensor, seed| {
            let v = t.view;
            Tensor::new(v.dtype, v.rows, v.heads, v.dim, seed)
        };
        for row in 0..s.latent.view.rows {
            let touched = rows.contains(&row);
            for (which, weights, width) in [(0, nope, dqk), (1, dv, dv)] {
                for (head, n) in (0..HEADS).flat_map(|h| (0..width).map(move |n| (h, n))) {
                    let sum: f64 = (0..dim)
                        .map(|i| match n < weights {
                            true => s.up[which].get(n, FIRST + head, i) * s.latent.get(row, 0, i),
                            false => 0.0,
                        })
                        .sum();
                    let want =
                        if n < weights { sum } else { s.latent.get(row, 0, dim + n - weights) };
                    let mut rounded = Tensor::new(s.latent.view.dtype, 1, 1, 8, 0);
                    rounded.put(0, 0, 0, want as f32);
                    let want = if touched { rounded.get(0, 0, 0) } else { 0.0 };
                    assert_eq!(s.made[which].get(row, head, n), want, "{what}, row {row} {n}");
                }
            }
            let before = fresh(&s.d_latent, 17);
            for i in 0..dim + rope {
                let mut want = before.get(row, 0, i);
                for head in (0..HEADS).filter(|_| touched) {
                    let of = |which: usize, n: usize| {
                        s.given[which].get(row, head, n) * s.up[which].get(n, FIRST + head, i)
                    };
                    want += match i.checked_sub(dim) {
                        Some(r) => s.given[0].get(row, head, nope + r),
                        None => {
                            (0..nope).map(|n| of(0, n)).sum::<f64>()
                                + (0..dv).map(|n| of(1, n)).sum::<f64>()
                        }
                    };
                }
                assert_eq!(s.d_latent.get(row, 0, i), want, "{what}, d_latent row {row} {i}");
            }
        }
        for (which, seed) in [(0, 19), (1, 38)] {
            let before = fresh(&s.d_up[which], seed);
            for (n, head, i) in indices(&before.view) {
                let mut want = before.get(n, head, i);
                if let Some(local) = head.checked_sub(FIRST).filter(|h| *h < HEADS) {
                    let of =
                        |row: &usize| s.given[which].get(*row, local, n) * s.latent.get(*row, 0, i);
                    want += rows.iter().map(of).sum::<f64>();
                }
                let got = s.d_up[which].get(n, head, i);
                assert_eq!(got, want, "{what}, d_up {which} head {head} row {n} {i}");
            }
        }
    }
}
