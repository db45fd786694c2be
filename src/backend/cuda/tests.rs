//! Launches, against the CPU backend in fp32 on the same numbers. Memory that a kernel must not read is NaN, and what it must not write is
//! compared afterwards.
//!
//! `tests/softgpu/build && CP_CUDA=require cargo build && LD_LIBRARY_PATH=target/softgpu cargo test -- --ignored cuda`

mod bench;

use super::*;
use crate::backend::cpu::{Cpu, Simd};
use crate::backend::{Backward, CopyRows, Delta, Forward, HeadMap, Output, Run, State, View};
use crate::driver::{self, DeviceBuffer};
use crate::dtype::{DType, Fp8};
use crate::error::Status;
use crate::mask::Slice;
use bench::{Bench, Layout, Plain, Random, Tensor, compare};
use cudarc::driver::sys;

/// A step's worth of attention, and how it is laid out.
#[derive(Clone)]
struct Case {
    dtype: DType,
    dims: [usize; 2],
    /// Query heads, key heads.
    heads: [usize; 2],
    map: HeadMap,
    /// Query rows, key rows.
    rows: [usize; 2],
    layout: Layout,
    /// Slices of one step after another, all over the same keys.
    steps: Vec<Vec<Slice>>,
    scale: f32,
}

fn heads(q_first: u32, group: u32, kv_first: u32) -> HeadMap {
    HeadMap { q_first, group, kv_first }
}

/// Rows q … q+len against keys k … k+len, causal.
fn causal(q: u32, k: u32, len: u32) -> Slice {
    Slice { q, q_len: len, k, k_len: len, lo: -(len as i32), hi: 0 }
}

fn full(q: u32, q_len: u32, k: u32, k_len: u32) -> Slice {
    Slice { q, q_len, k, k_len, lo: -(q_len as i32), hi: k_len as i32 }
}

fn cases() -> Vec<Case> {
    let base = Case {
        dtype: DType::Bf16,
        dims: [64, 64],
        heads: [2, 1],
        map: heads(0, 2, 0),
        rows: [200, 200],
        layout: Layout::Dense,
        steps: vec![vec![causal(0, 0, 200)]],
        scale: 0.125,
    };
    // Documents with padding between them: rows in no slice are NaN.
    let documents: Vec<Slice> = (0..9).map(|i| causal(i * 20 + 3, i * 20 + 3, 14)).collect();
    vec![
        base.clone(),
        Case {
            dtype: DType::F16,
            dims: [40, 24],
            heads: [3, 2],
            map: heads(5, 4, 1),
            rows: [190, 190],
            layout: Layout::Gaps,
            steps: vec![documents],
            scale: -0.3,
        },
        // Two steps: the state goes through memory; rows 100 … 140 are in neither.
        Case {
            dims: [128, 128],
            rows: [140, 230],
            layout: Layout::Gaps,
            steps: vec![
                vec![full(0, 100, 10, 90)],
                vec![full(0, 50, 100, 130), causal(50, 100, 50)],
            ],
            ..base.clone()
        },
        Case {
            dtype: DType::F16,
            dims: [192, 128],
            heads: [2, 2],
            map: heads(0, 1, 0),
            rows: [150, 150],
            layout: Layout::Sbhd(75),
            steps: vec![vec![causal(0, 0, 75), causal(75, 75, 75)]],
            ..base.clone()
        },
        Case {
            dims: [256, 256],
            heads: [1, 1],
            map: heads(0, 1, 0),
            rows: [70, 90],
            layout: Layout::Bhsd(35),
            steps: vec![vec![Slice { q: 0, q_len: 70, k: 0, k_len: 90, lo: -20, hi: 30 }]],
            ..base.clone()
        },
        Case { dims: [96, 80], rows: [130, 130], steps: vec![vec![causal(0, 0, 130)]], ..base },
    ]
}

impl Case {
    /// Is the row in some slice of some step?
    fn uses(&self, side: usize, row: usize) -> bool {
        self.steps.iter().flatten().any(|s| {
            let (first, len) = [(s.q, s.q_len), (s.k, s.k_len)][side];
            (first as usize..(first + len) as usize).contains(&row)
        })
    }

    fn tensor(&self, bench: &Bench, side: usize, dim: usize, seed: u64) -> Tensor {
        // Batches divide both sides only where they are as long.
        let layout = match self.layout {
            Layout::Bhsd(n) | Layout::Sbhd(n) if !self.rows[side].is_multiple_of(n) => {
                Layout::Dense
            }
            layout => layout,
        };
        let shape = [self.rows[side], self.heads[side], dim];
        bench.filled(self.dtype, shape, layout, seed, |row| self.uses(side, row))
    }

    fn inputs(&self, bench: &Bench) -> [Tensor; 3] {
        let [dim_qk, dim_v] = self.dims;
        [
            self.tensor(bench, 0, dim_qk, 1),
            self.tensor(bench, 1, dim_qk, 2),
            self.tensor(bench, 1, dim_v, 3),
        ]
    }

    fn epsilon(&self) -> f64 {
        if self.dtype == DType::Bf16 { 1.0 / 256.0 } else { 1.0 / 2048.0 }
    }

    /// O and LSE by the CPU, in fp32.
    fn forward_on_cpu(&self, inputs: &[Tensor; 3]) -> [Plain; 2] {
        let mut cpu = Cpu::new(1, Simd::detect()).unwrap();
        let [mut q, mut k, mut v] = inputs.each_ref().map(Tensor::plain);
        let [rows, heads] = [self.rows[0], self.heads[0]];
        let mut state = [
            Plain::new([rows, heads, self.dims[1]]),
            Plain::new([rows, heads, 1]),
            Plain::new([rows, heads, 1]),
        ];
        let mut result = [Plain::new([rows, heads, self.dims[1]]), Plain::new([rows, heads, 1])];
        for (n, slices) in self.steps.iter().enumerate() {
            let [out, max, sum] = state.each_mut().map(Plain::view);
            let [o, lse] = result.each_mut().map(Plain::view);
            let last = n + 1 == self.steps.len();
            let step = Forward {
                effects: None,
                q: q.view(),
                k: k.view(),
                v: v.view(),
                slices,
                heads: self.map,
                scale: self.scale,
                state: Some(State { out, max, sum }),
                first: n == 0,
                last: last.then_some(Output { out: o, lse, top: None }),
            };
            // SAFETY: all views are of tensors above.
            unsafe { cpu.forward(&step, &mut || Ok(())).unwrap() };
        }
        result
    }
}

fn tiling(bench: &Bench, case: &Case) -> TableBuilder {
    let [dim_qk, dim_v] = case.dims;
    let shape =
        bench.cuda.supports(case.dtype, dim_qk as u32, dim_v as u32, Scores::Plain).unwrap();
    TableBuilder::new(shape.forward(), shape.backward())
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn forward_steps_are_the_cpus() {
    let mut bench = Bench::new();
    for (n, case) in cases().into_iter().enumerate() {
        // A margin makes blocks take several pieces of work; leaving none is clamped to one.
        bench.cuda.set_margin([0, 1000][n % 2]);
        let inputs = case.inputs(&bench);
        let [want_out, want_lse] = case.forward_on_cpu(&inputs);
        let [rows, heads, dim_v] = [case.rows[0], case.heads[0], case.dims[1]];
        let state =
            [dim_v, 1, 1].map(|dim| bench.tensor(DType::F32, [rows, heads, dim], Layout::Gaps));
        let mut out = bench.tensor(case.dtype, [rows, heads, dim_v], case.layout);
        let mut lse = bench.tensor(DType::F32, [rows, heads, 1], Layout::Dense);
        for tensor in state.iter().chain([&out, &lse]) {
            tensor.push(bench.stream());
        }
        let mut builder = tiling(&bench, &case);
        let ends = |n: usize| n == 0 || n + 1 == case.steps.len();
        let works: Vec<AttendWork> = case
            .steps
            .iter()
            .enumerate()
            .map(|(n, s)| builder.forward(s, rows as u32, case.rows[1] as u32, ends(n)))
            .collect();
        let tables = bench.upload(&builder.finish());
        for (n, (slices, work)) in case.steps.iter().zip(&works).enumerate() {
            let [q, k, v] = inputs.each_ref().map(Tensor::on_device);
            let [acc_out, max, sum] = state.each_ref().map(Tensor::on_device);
            let last = Output { out: out.on_device(), lse: lse.on_device(), top: None };
            let step = Forward {
                effects: None,
                q,
                k,
                v,
                slices,
                heads: case.map,
                scale: case.scale,
                state: (case.steps.len() > 1).then_some(State { out: acc_out, max, sum }),
                first: n == 0,
                last: (n + 1 == case.steps.len()).then_some(last),
            };
            // SAFETY: all views are of tensors above, which live until the stream is empty.
            unsafe { bench.cuda.forward(&step, work, tables.address(), bench.stream()).unwrap() };
        }
        out.pull(bench.stream());
        lse.pull(bench.stream());
        compare(&format!("case {n}: O"), &out, &want_out, 1.5 * case.epsilon());
        compare(&format!("case {n}: LSE"), &lse, &want_lse, 1e-4);
    }
}

/// Everything that a backward step is given, on the device.
struct Gradients {
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    /// dQ, dK, dV; what they are before is added to.
    sums: [Tensor; 3],
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn backward_steps_are_the_cpus() {
    let mut bench = Bench::new();
    for (n, case) in cases().into_iter().enumerate() {
        bench.cuda.set_margin([1000, 0][n % 2]);
        let inputs = case.inputs(&bench);
        let [rows, heads] = [case.rows[0], case.heads[0]];
        let [mut out, mut lse] = case.forward_on_cpu(&inputs);
        let d_out = case.tensor(&bench, 0, case.dims[1], 4);
        let mut cpu = Cpu::new(1, Simd::detect()).unwrap();
        let [mut q, mut k, mut v] = inputs.each_ref().map(Tensor::plain);
        let mut plain_d_out = d_out.plain();
        let mut delta = Plain::new([rows, heads, 1]);
        let step = Delta { out: out.view(), d_out: plain_d_out.view(), delta: delta.view() };
        // SAFETY: views of tensors above; here and below.
        unsafe { cpu.delta(&step) };
        let sums = |bench: &Bench| {
            [(0, case.dims[0]), (1, case.dims[0]), (1, case.dims[1])].map(|(side, dim)| {
                let shape = [case.rows[side], case.heads[side], dim];
                bench.filled(DType::F32, shape, Layout::Gaps, 9, |_| true)
            })
        };
        let mut want = sums(&bench).each_ref().map(Tensor::plain);
        for slices in &case.steps {
            let [dq, dk, dv] = want.each_mut().map(Plain::view);
            let step = Backward {
                effects: None,
                q: q.view(),
                k: k.view(),
                v: v.view(),
                d_out: plain_d_out.view(),
                lse: lse.view(),
                delta: delta.view(),
                slices,
                heads: case.map,
                scale: case.scale,
                dq,
                dk,
                dv,
            };
            // SAFETY: as above.
            unsafe { cpu.backward(&step, &mut || Ok(())).unwrap() };
        }
        let statistics = |values: &Plain| {
            let mut t = bench.tensor(DType::F32, [rows, heads, 1], Layout::Gaps);
            t.each(|row, head, _| Some(values.get(row, head, 0)));
            t.push(bench.stream());
            t
        };
        let (lse, delta) = (statistics(&lse), statistics(&delta));
        let mut given = Gradients { d_out, lse, delta, sums: sums(&bench) };
        backward(&mut bench, &case, &inputs, &mut given, false);
        let names = ["dQ", "dK", "dV"];
        let check = |given: &Gradients| {
            for ((name, got), want) in names.iter().zip(&given.sums).zip(&want) {
                compare(&format!("case {n}: {name}"), got, want, 3.0 * case.epsilon());
            }
        };
        check(&given);
        // In a fixed order: the same bits, twice.
        given.sums = sums(&bench);
        backward(&mut bench, &case, &inputs, &mut given, true);
        check(&given);
        let first = std::mem::replace(&mut given.sums, sums(&bench));
        backward(&mut bench, &case, &inputs, &mut given, true);
        for (a, b) in first.iter().zip(&given.sums) {
            assert!(a.all_bytes() == b.all_bytes(), "case {n}: not deterministic");
        }
    }
}

fn backward(
    bench: &mut Bench,
    case: &Case,
    inputs: &[Tensor; 3],
    given: &mut Gradients,
    deterministic: bool,
) {
    let [rows, keys] = case.rows.map(|n| n as u32);
    let mut builder = tiling(bench, case);
    let works: Vec<AttendWork> =
        case.steps.iter().map(|s| builder.backward(s, rows, keys, deterministic)).collect();
    let tables = bench.upload(&builder.finish());
    let most = works.iter().map(|w| w.counters(case.heads[0], false)[0]).max().unwrap_or(0);
    assert_eq!(most > 0, deterministic);
    // Not zeroed here: that is the step's business.
    let counters = bench.upload(&vec![0xffu8; 4 * most.max(1)]);
    let [dq, dk, dv] = given.sums.each_ref().map(Tensor::on_device);
    for (slices, work) in case.steps.iter().zip(&works) {
        let [q, k, v] = inputs.each_ref().map(Tensor::on_device);
        let step = Backward {
            effects: None,
            q,
            k,
            v,
            d_out: given.d_out.on_device(),
            lse: given.lse.on_device(),
            delta: given.delta.on_device(),
            slices,
            heads: case.map,
            scale: case.scale,
            dq,
            dk,
            dv,
        };
        let (tables, counters) = (tables.address(), counters.address());
        // SAFETY: the tensors live until the stream is empty, for which `pull` waits.
        unsafe { bench.cuda.backward(&step, work, tables, counters, bench.stream.raw()).unwrap() };
    }
    given.sums.iter_mut().for_each(|t| t.pull(bench.stream.raw()));
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn row_steps_are_the_cpus() {
    let mut bench = Bench::new();
    let mut cpu = Cpu::new(1, Simd::detect()).unwrap();
    let runs = [
        Run { src: 3, src_step: 2, dst: 0, dst_step: 1, rows: 20 },
        Run { src: 50, src_step: 1, dst: 30, dst_step: 3, rows: 7 },
        Run { src: 0, src_step: 1, dst: 60, dst_step: 1, rows: 1 },
    ];
    let types = [
        (DType::Bf16, DType::Bf16, false),
        (DType::F16, DType::F32, false),
        (DType::F32, DType::Bf16, false),
        (DType::F32, DType::F32, true),
        (DType::Bf16, DType::F32, true),
    ];
    for (n, (from, to, add)) in types.into_iter().enumerate() {
        for (dim, layout) in [(64, Layout::Gaps), (24, Layout::Sbhd(40)), (1, Layout::Dense)] {
            let src = bench.filled(from, [80, 5, dim], layout, 5, |_| true);
            let make = |bench: &Bench| bench.filled(to, [70, 4, dim], Layout::Gaps, 6, |_| add);
            let (mut got, mut want) = (make(&bench), make(&bench));
            let step = |src: View, dst: View| {
                let (src_head, dst_head, heads) = (2, 1, 3);
                CopyRows { src, src_head, dst, dst_head, heads, runs: &runs, add }
            };
            let mut builder = TableBuilder::new(TILES, TILES);
            let work = builder.runs(&runs);
            let tables = bench.upload(builder.bytes());
            // SAFETY: tensors above, which live until the stream is empty; here and below.
            unsafe {
                cpu.copy_rows(&step(src.view, want.view));
                let step = step(src.on_device(), got.on_device());
                bench.cuda.copy_rows(&step, &work, tables.address(), bench.stream()).unwrap();
            }
            got.pull(bench.stream());
            assert!(got.all_bytes() == want.all_bytes(), "copy {n}, dim {dim}, {layout:?}");

            // Filling: some rows, all heads.
            let neg_inf = to == DType::F32;
            let value = if neg_inf { f32::NEG_INFINITY } else { 0.0 };
            let mut builder = TableBuilder::new(TILES, TILES);
            let work = builder.rows([(1, 4, 5), (40, 1, 30)]);
            let tables = bench.upload(builder.bytes());
            want.each(|row, _, _| (row >= 40 || row < 20 && row % 4 == 1).then_some(value));
            let stream = bench.stream();
            // SAFETY: as above.
            unsafe {
                bench
                    .cuda
                    .fill(&got.on_device(), &work, neg_inf, tables.address(), stream)
                    .unwrap();
            }
            got.pull(stream);
            assert!(got.all_bytes() == want.all_bytes(), "fill {n}, dim {dim}");
        }
    }
    for (dtype, dim) in [(DType::Bf16, 64), (DType::F16, 256), (DType::Bf16, 8)] {
        let [out, d_out] =
            [7, 8].map(|seed| bench.filled(dtype, [90, 3, dim], Layout::Bhsd(45), seed, |_| true));
        let mut delta = bench.tensor(DType::F32, [90, 3, 1], Layout::Gaps);
        delta.push(bench.stream());
        let mut want = Plain::new([90, 3, 1]);
        // SAFETY: as above.
        unsafe {
            cpu.delta(&Delta { out: out.view, d_out: d_out.view, delta: want.view() });
            let [out, d_out] = [out.on_device(), d_out.on_device()];
            let step = Delta { out, d_out, delta: delta.on_device() };
            bench.cuda.delta(&step, bench.stream()).unwrap();
        }
        delta.pull(bench.stream());
        compare("delta", &delta, &want, 1e-5);
    }
}

/// Rows to codes and back.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn codes_are_the_cpus() {
    let mut bench = Bench::new();
    let mut cpu = Cpu::new(1, Simd::detect()).unwrap();
    let runs = [
        Run { src: 3, src_step: 2, dst: 0, dst_step: 1, rows: 20 },
        Run { src: 50, src_step: 1, dst: 30, dst_step: 3, rows: 7 },
    ];
    let back = runs.map(|r| Run { src: r.dst, src_step: r.dst_step, ..r });
    for (stored, format, dim) in [
        (DType::Bf16, Fp8::E4m3, 64),
        (DType::F16, Fp8::E5m2, 72),
        (DType::Bf16, Fp8::E5m2, 8),
        (DType::F16, Fp8::E4m3, 256),
    ] {
        let coded = Fp8::bytes(dim) as usize;
        let src = bench.filled(stored, [80, 5, dim as usize], Layout::Sbhd(40), 5, |_| true);
        let make = |dtype, dim| {
            let tensor = bench.tensor(dtype, [70, 4, dim], Layout::Gaps);
            tensor.push(bench.stream());
            tensor
        };
        let [mut code, want_code] = [0; 2].map(|_| make(DType::Fp8(format), coded));
        let [mut got, want] = [0; 2].map(|_| make(stored, dim as usize));
        let step = |src: View, dst: View| CopyRows {
            src,
            src_head: 2,
            dst,
            dst_head: 1,
            heads: 3,
            runs: &runs,
            add: false,
        };
        let again = |src: View, dst: View| CopyRows {
            src,
            src_head: 1,
            dst,
            dst_head: 1,
            heads: 3,
            runs: &back,
            add: false,
        };
        for (encodes, runs) in [(true, &runs), (false, &back)] {
            let mut builder = TableBuilder::new(TILES, TILES);
            let work = builder.runs(runs);
            let tables = bench.upload(builder.bytes());
            // SAFETY: tensors above, which live until the stream is empty.
            unsafe {
                let (cpus, step) = match encodes {
                    true => {
                        (step(src.view, want_code.view), step(src.on_device(), code.on_device()))
                    }
                    false => {
                        (again(want_code.view, want.view), again(code.on_device(), got.on_device()))
                    }
                };
                cpu.copy_rows(&cpus);
                bench.cuda.copy_rows(&step, &work, tables.address(), bench.stream()).unwrap();
            }
            bench.wait();
        }
        code.pull(bench.stream());
        got.pull(bench.stream());
        assert!(code.all_bytes() == want_code.all_bytes(), "{stored:?} {format:?} {dim}");
        assert!(got.all_bytes() == want.all_bytes(), "{stored:?} {format:?} {dim}");
    }
}

const TILES: Tiling = Tiling { q_rows: 64, k_rows: 64 };

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn steps_without_work_launch_nothing() {
    let mut bench = Bench::new();
    let mut builder = TableBuilder::new(TILES, TILES);
    let (backward, rows) = (builder.backward(&[], 10, 10, true), builder.runs(&[]));
    let tables = bench.upload(&builder.finish());
    let t = |dtype, dim| bench.tensor(dtype, [10, 1, dim], Layout::Dense);
    let (x, y, z) = (t(DType::Bf16, 64), t(DType::F32, 64), t(DType::F32, 1));
    let (x, y, z) = (x.on_device(), y.on_device(), z.on_device());
    let step = Backward {
        effects: None,
        q: x,
        k: x,
        v: x,
        d_out: x,
        lse: z,
        delta: z,
        slices: &[],
        heads: heads(0, 1, 0),
        scale: 1.0,
        dq: y,
        dk: y,
        dv: y,
    };
    let copy =
        CopyRows { src: x, src_head: 0, dst: x, dst_head: 0, heads: 1, runs: &[], add: false };
    // SAFETY: nothing is read.
    unsafe {
        bench.cuda.backward(&step, &backward, tables.address(), 0, bench.stream()).unwrap();
        bench.cuda.copy_rows(&copy, &rows, tables.address(), bench.stream()).unwrap();
    }
    bench.wait();
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn what_kernels_cannot_do_is_refused_by_name() {
    let bench = Bench::new();
    let refused = |dtype, qk, v| bench.cuda.supports(dtype, qk, v, Scores::Plain).unwrap_err();
    assert_eq!(refused(DType::F32, 64, 64).text, "dtype: got fp32, on CUDA bf16 or fp16");
    let e = refused(DType::F16, 264, 64);
    assert_eq!(e.status, Status::Unsupported);
    assert_eq!(e.text, "head dimension of q and k: got 264, on CUDA a multiple of 8 up to 256");
    // Kernels are loaded once for all layers of a device.
    let other = Cuda::new(bench.device.clone()).unwrap();
    let shape = |cuda: &Cuda| cuda.supports(DType::Bf16, 128, 64, Scores::Plain).unwrap();
    assert_eq!(shape(&other), shape(&bench.cuda));
    assert_eq!(shape(&other).dim_v, 128);
    // A kernel is never given what it cannot read.
    let t = bench.tensor(DType::Bf16, [10, 2, 64], Layout::Dense);
    let x = t.on_device();
    let odd = View { ptr: x.ptr.wrapping_add(2), ..x };
    let delta = View::dense(x.ptr, DType::F32, 10, 2, 1);
    let step = Delta { out: x, d_out: odd, delta };
    // SAFETY: refused before anything is read.
    let e = unsafe { bench.cuda.delta(&step, bench.stream()) }.unwrap_err();
    assert_eq!(
        e.text,
        "d_out.data: got an address 2 bytes after a multiple of 16, on CUDA a multiple of 16"
    );
}

#[test]
fn views_are_checked_by_name() {
    let address = |n: usize| std::ptr::without_provenance_mut(n);
    let view = View::dense(address(1 << 20), DType::Bf16, 10, 2, 64);
    check_view("q", &view).unwrap();
    let text = |view: View| check_view("q", &view).unwrap_err().text;
    assert_eq!(
        text(View { stride_row: 132, ..view }),
        "q.stride[1]: got 132 elements, on CUDA a multiple of 8"
    );
    assert_eq!(
        text(View { stride_head: 68, ..view }),
        "q.stride[2]: got 68 elements, on CUDA a multiple of 8"
    );
    let batches = View { rows_per_batch: 5, stride_batch: 644, ..view };
    assert_eq!(text(batches), "q.stride[0]: got 644 elements, on CUDA a multiple of 8");
    assert_eq!(
        text(View { ptr: address((1 << 20) + 8), ..view }),
        "q.data: got an address 8 bytes after a multiple of 16, on CUDA a multiple of 16"
    );
    // Strides that nobody uses may be anything.
    check_view("q", &View { rows: 1, heads: 1, stride_row: 3, stride_head: 5, ..view }).unwrap();
    // Gradients are fp32: 4 elements are 16 bytes. Statistics need no more than their own alignment.
    check_view("dq", &View { stride_row: 132, dtype: DType::F32, ..view }).unwrap();
    let lse = View::dense(address((1 << 20) + 4), DType::F32, 10, 3, 1);
    check_view("lse", &lse).unwrap();
    check_view("lse", &View { ptr: address((1 << 20) + 2), ..lse }).unwrap_err();
    // A bias has any number of columns.
    let bias = View::dense(address((1 << 20) + 2), DType::Bf16, 10, 3, 33);
    check_elements("bias", &bias).unwrap();
    check_view("bias", &bias).unwrap_err();
    check_elements("bias", &View { ptr: address((1 << 20) + 1), ..bias }).unwrap_err();
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn uploads_do_not_wait_and_keep_their_contents() {
    let mut bench = Bench::new();
    bench.staging.reserve(40_000).unwrap();
    let held = bench.staging.bytes();
    let mut random = Random(11);
    // More than the ring has slots, of all sizes; the blob is overwritten right after each call.
    let mut blob = vec![0u8; 60_000];
    let sent: Vec<(DeviceBuffer, u8, usize)> = (0..100)
        .map(|n| {
            let len = 1 + (random.next() % if n % 10 == 0 { 60_000 } else { 9_000 }) as usize;
            blob[..len].fill(n);
            let buffer = bench.upload(&blob[..len]);
            blob.fill(0xee);
            (buffer, n, len)
        })
        .collect();
    bench.wait();
    for (buffer, n, len) in &sent {
        assert_eq!(content(&bench, buffer), vec![*n; *len]);
    }
    assert!(bench.staging.bytes() >= held);
    // At rest nothing more is allocated.
    let held = bench.staging.bytes();
    for _ in 0..50 {
        let buffer = bench.upload(&blob);
        bench.wait();
        drop(buffer);
    }
    assert_eq!(bench.staging.bytes(), held);
}

fn content(bench: &Bench, buffer: &DeviceBuffer) -> Vec<u8> {
    let host = driver::PinnedBuffer::new(&bench.device, buffer.bytes()).unwrap();
    // SAFETY: as large; waited for before it is read.
    unsafe {
        let (from, stream) = (buffer.address(), bench.stream());
        driver::copy_to_host(host.ptr(), from, buffer.bytes(), stream).unwrap();
        driver::synchronize(bench.stream()).unwrap();
        std::slice::from_raw_parts(host.ptr(), host.bytes()).to_vec()
    }
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn captured_uploads_stay_for_every_replay() {
    let mut bench = Bench::new();
    let bytes = 30_000;
    // Some slots are in flight when the capture begins, and none was reserved.
    let _others: Vec<DeviceBuffer> = (0..3).map(|n| bench.upload(&vec![n; bytes])).collect();
    let to = [7u8, 9].map(|_| DeviceBuffer::new(&bench.device, bytes).unwrap());
    let stream = bench.stream();
    let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: a stream of the current device; the buffers live to the end.
    unsafe {
        // Forbids this thread what global mode forbids all: other tests run meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        driver::check("begin", sys::cuStreamBeginCapture_v2(stream, mode)).unwrap();
        for (n, buffer) in [7u8, 9].iter().zip(&to) {
            bench
                .staging
                .upload(&vec![*n; bytes], (0, &[]), buffer.address(), stream, true)
                .unwrap();
        }
        driver::check("end", sys::cuStreamEndCapture(stream, &mut graph)).unwrap();
        driver::check("make", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0)).unwrap();
    }
    for round in 0..3 {
        // Other calls come between, and use other slots.
        let mut others = Vec::new();
        for n in 0..40 {
            others.push(bench.upload(&vec![100 + n; bytes]));
            if n % 8 == 0 {
                bench.wait();
            }
        }
        // SAFETY: as above.
        unsafe {
            to.iter().for_each(|b| driver::clear(b.address(), bytes, stream).unwrap());
            driver::check("replay", sys::cuGraphLaunch(exec, stream)).unwrap();
        }
        for (n, buffer) in [7u8, 9].iter().zip(&to) {
            assert_eq!(content(&bench, buffer), vec![*n; bytes], "round {round}");
        }
    }
    // SAFETY: no replay is in flight: `content` waited.
    unsafe {
        driver::check("drop", sys::cuGraphExecDestroy(exec)).unwrap();
        driver::check("drop", sys::cuGraphDestroy(graph)).unwrap();
    }
}
