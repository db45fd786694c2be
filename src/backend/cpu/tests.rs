//! Every instruction set against a float64 double loop, with the error contract of design §2.4.

use super::*;
use crate::backend::{HeadMap, Output, State};
use crate::dtype::DType;
use crate::error::Status;
use crate::mask::{Mask, Slice, overlap};
use crate::partition::Segment;

/// Deterministic pseudo-random numbers.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }

    /// Roughly normal, variance 1.
    fn normal(&mut self) -> f32 {
        let unit = |x: u64| x as f64 / (1u64 << 53) as f64;
        let sum: f64 = (0..6).map(|_| unit(self.next())).sum();
        ((sum - 3.0) * std::f64::consts::SQRT_2) as f32
    }
}

/// Memory with a view on it; whatever the view skips is filled with NaN.
struct Tensor {
    memory: Vec<u8>,
    view: View,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    Dense,
    /// Two batch entries, gaps after every row and batch entry.
    Bshd,
    /// Two batch entries, heads outside rows.
    Bhsd,
    /// Two batch entries, rows outside batch entries.
    Sbhd,
}

impl Tensor {
    fn new(dtype: DType, rows: usize, heads: usize, dim: usize, layout: Layout) -> Tensor {
        let per_batch = rows.div_ceil(2).max(1);
        let (batch, row, head) = match layout {
            Layout::Dense => (0, heads * dim, dim),
            Layout::Bshd => (per_batch * (heads * dim + 8) + 24, heads * dim + 8, dim),
            Layout::Bhsd => (per_batch * heads * (dim + 3), dim + 3, per_batch * (dim + 3)),
            Layout::Sbhd => (heads * dim, 2 * heads * dim, dim),
        };
        let rows_per_batch = if layout == Layout::Dense { rows.max(1) } else { per_batch };
        let len = 2 * batch + rows_per_batch * row.max(head) + heads * head.max(dim) + row;
        let mut memory = vec![0xff; len * dtype.size()];
        let view = View {
            ptr: memory.as_mut_ptr(),
            dtype,
            rows,
            heads,
            dim,
            rows_per_batch,
            stride_batch: batch,
            stride_row: row,
            stride_head: head,
        };
        Tensor { memory, view }
    }

    fn set(&mut self, row: usize, head: usize, values: &[f32]) {
        let (to, len) = (self.view.at(row, head), values.len());
        // SAFETY: (row, head) lies in the tensor's memory.
        unsafe { scalar::narrow(self.view.dtype, values.as_ptr(), to, len) }
    }

    fn get(&self, row: usize, head: usize) -> Vec<f32> {
        let mut values = vec![0f32; self.view.dim];
        let (from, len) = (self.view.at(row, head), values.len());
        // SAFETY: (row, head) lies in the tensor's memory.
        unsafe { scalar::widen(self.view.dtype, from, values.as_mut_ptr(), len) };
        values
    }

    fn fill(&mut self, mut value: impl FnMut() -> f32) {
        for row in 0..self.view.rows {
            for head in 0..self.view.heads {
                let values: Vec<f32> = (0..self.view.dim).map(|_| value()).collect();
                self.set(row, head, &values);
            }
        }
    }

    fn zeroed(mut self) -> Tensor {
        self.fill(|| 0.0);
        self
    }

    /// Rounded to the storage type, as f64 `[row][head][dim]`.
    fn values(&self) -> Vec<Vec<Vec<f64>>> {
        let widen = |x: Vec<f32>| x.into_iter().map(f64::from).collect();
        let row = |r| (0..self.view.heads).map(|h| widen(self.get(r, h))).collect();
        (0..self.view.rows).map(row).collect()
    }
}

#[derive(Clone)]
struct Case {
    name: String,
    dtype: DType,
    layout: Layout,
    rows: usize,
    key_rows: usize,
    heads: usize,
    map: HeadMap,
    dqk: usize,
    dv: usize,
    scale: f32,
    /// Multiplies the random queries, so that scores grow.
    gain: f32,
    slices: Vec<Slice>,
}

struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
}

/// What a forward and backward pass give, `[row][head][dim]`.
struct Results {
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
}

type Rows = Vec<Vec<Vec<f64>>>;

/// Values, and sums of the magnitudes of the terms they are made of.
struct Oracle {
    values: [Rows; 4],
    terms: [Rows; 4],
    lse: Rows,
}

impl Case {
    fn kv_heads(&self) -> usize {
        self.map.kv_of(self.heads - 1) + 1
    }

    fn inputs(&self) -> Inputs {
        let mut rng = Rng::new(self.rows as u64 * 31 + self.dqk as u64);
        let mut make = |rows, heads, dim, gain: f32| {
            let mut t = Tensor::new(self.dtype, rows, heads, dim, self.layout);
            t.fill(|| rng.normal() * gain);
            t
        };
        let q = make(self.rows, self.heads, self.dqk, self.gain);
        let k = make(self.key_rows, self.kv_heads(), self.dqk, 1.0);
        let v = make(self.key_rows, self.kv_heads(), self.dv, 1.0);
        let d_out = make(self.rows, self.heads, self.dv, 1.0);
        let mut inputs = Inputs { q, k, v, d_out };
        self.poison_unseen(&mut inputs);
        inputs
    }

    /// Rows in no slice hold NaN: nothing may depend on padding.
    fn poison_unseen(&self, inputs: &mut Inputs) {
        for row in 0..self.rows {
            if !self.slices.iter().any(|s| (s.q..s.q + s.q_len).contains(&(row as u32))) {
                for head in 0..self.heads {
                    inputs.q.set(row, head, &vec![f32::NAN; self.dqk]);
                    inputs.d_out.set(row, head, &vec![f32::NAN; self.dv]);
                }
            }
        }
        for row in 0..self.key_rows {
            if !self.slices.iter().any(|s| (s.k..s.k + s.k_len).contains(&(row as u32))) {
                for head in 0..self.kv_heads() {
                    inputs.k.set(row, head, &vec![f32::NAN; self.dqk]);
                    inputs.v.set(row, head, &vec![f32::NAN; self.dv]);
                }
            }
        }
    }

    fn results(&self) -> Results {
        let stat = |rows| Tensor::new(DType::F32, rows, self.heads, 1, Layout::Dense);
        let grad = |rows, heads, dim| Tensor::new(DType::F32, rows, heads, dim, Layout::Dense);
        Results {
            out: Tensor::new(self.dtype, self.rows, self.heads, self.dv, self.layout),
            lse: stat(self.rows),
            dq: grad(self.rows, self.heads, self.dqk).zeroed(),
            dk: grad(self.key_rows, self.kv_heads(), self.dqk).zeroed(),
            dv: grad(self.key_rows, self.kv_heads(), self.dv).zeroed(),
        }
    }

    fn forward<'a>(&self, inputs: &Inputs, slices: &'a [Slice]) -> Forward<'a> {
        Forward {
            effects: None,
            q: inputs.q.view,
            k: inputs.k.view,
            v: inputs.v.view,
            slices,
            heads: self.map,
            scale: self.scale,
            state: None,
            first: true,
            last: None,
        }
    }

    /// Forward in `stages` steps, delta, backward in as many steps.
    fn run(&self, cpu: &mut Cpu, inputs: &Inputs, stages: usize) -> Results {
        let results = self.results();
        let f32_tensor = |dim| Tensor::new(DType::F32, self.rows, self.heads, dim, Layout::Dense);
        let (acc, max, sum) = (f32_tensor(self.dv), f32_tensor(1), f32_tensor(1));
        let delta = f32_tensor(1);
        let state = State { out: acc.view, max: max.view, sum: sum.view };
        let mut ticks = 0;
        let mut progress = || -> Result<()> {
            ticks += 1;
            Ok(())
        };
        let cut = |stage: usize| -> Vec<Slice> {
            let part = |(i, s): (usize, &Slice)| (i % stages == stage).then_some(*s);
            self.slices.iter().enumerate().filter_map(part).collect()
        };
        for stage in 0..stages {
            let slices = cut(stage);
            let mut step = self.forward(inputs, &slices);
            step.state = (stages > 1).then_some(state);
            step.first = stage == 0;
            step.last = (stage + 1 == stages).then_some(Output {
                out: results.out.view,
                lse: results.lse.view,
                top: None,
            });
            // SAFETY: the tensors outlive the call.
            unsafe { cpu.forward(&step, &mut progress) }.unwrap();
        }
        let (out, d_out) = (results.out.view, inputs.d_out.view);
        // SAFETY: as above.
        unsafe { cpu.delta(&Delta { out, d_out, delta: delta.view }) };
        for stage in 0..stages {
            let slices = cut(stage);
            let step = Backward {
                effects: None,
                q: inputs.q.view,
                k: inputs.k.view,
                v: inputs.v.view,
                d_out: inputs.d_out.view,
                lse: results.lse.view,
                delta: delta.view,
                slices: &slices,
                heads: self.map,
                scale: self.scale,
                dq: results.dq.view,
                dk: results.dk.view,
                dv: results.dv.view,
            };
            // SAFETY: as above.
            unsafe { cpu.backward(&step, &mut progress) }.unwrap();
        }
        results
    }

    fn keys_of(&self, row: usize) -> Vec<usize> {
        let row = row as u32;
        let of = |s: &Slice| {
            if (s.q..s.q + s.q_len).contains(&row) { s.keys_of(row - s.q) } else { 0..0 }
        };
        self.slices.iter().flat_map(of).map(|k| k as usize).collect()
    }

    /// In float64, or with `plain` as fp32 attention that rounds P, dS and results to the storage type.
    fn double_loop(&self, inputs: &Inputs, plain: bool) -> Oracle {
        let f32_if = |x: f64| if plain { f64::from(x as f32) } else { x };
        let stored = |x: f64| match (plain, self.dtype) {
            (false, _) => x,
            (true, DType::F32) => f64::from(x as f32),
            (true, DType::Bf16) => half::bf16::from_f32(x as f32).to_f64(),
            (true, DType::F16) => half::f16::from_f32(x as f32).to_f64(),
            (true, DType::Fp8(_)) => unreachable!("no tensor is stored so"),
        };
        let exp = |x: f64| if plain { f64::from((x as f32).exp()) } else { x.exp() };
        let dot = |a: &[f64], b: &[f64]| -> f64 {
            a.iter().zip(b).fold(0.0, |s, (x, y)| f32_if(s + x * y))
        };
        let add = |sum: &mut [f64], factor: f64, row: &[f64]| {
            sum.iter_mut().zip(row).for_each(|(s, x)| *s = f32_if(*s + factor * x));
        };
        let magnitude = |sum: &mut [f64], factor: f64, row: &[f64]| {
            sum.iter_mut().zip(row).for_each(|(s, x)| *s += (factor * x).abs());
        };
        let (q, k, v) = (inputs.q.values(), inputs.k.values(), inputs.v.values());
        let d_out = inputs.d_out.values();
        let zeros = |rows, heads, dim| vec![vec![vec![0f64; dim]; heads]; rows];
        let kv_heads = self.kv_heads();
        let all = || {
            [
                zeros(self.rows, self.heads, self.dv),
                zeros(self.rows, self.heads, self.dqk),
                zeros(self.key_rows, kv_heads, self.dqk),
                zeros(self.key_rows, kv_heads, self.dv),
            ]
        };
        let (mut values, mut terms) = (all(), all());
        let mut lse = vec![vec![vec![f64::NEG_INFINITY]; self.heads]; self.rows];
        let scale = f64::from(self.scale);
        for r in 0..self.rows {
            let keys = self.keys_of(r);
            if keys.is_empty() {
                continue;
            }
            for h in 0..self.heads {
                let kv = self.map.kv_of(h);
                let scores: Vec<f64> =
                    keys.iter().map(|&j| f32_if(dot(&q[r][h], &k[j][kv]) * scale)).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let e: Vec<f64> = scores.iter().map(|s| exp(s - max)).collect();
                let sum = e.iter().fold(0.0, |s, x| f32_if(s + x));
                lse[r][h][0] = f32_if(max + f32_if(sum.ln()));
                let p: Vec<f64> = e.iter().map(|x| f32_if(x / sum)).collect();
                for (&j, &p) in keys.iter().zip(&p) {
                    add(&mut values[0][r][h], stored(p), &v[j][kv]);
                    magnitude(&mut terms[0][r][h], p, &v[j][kv]);
                }
                let out: Vec<f64> = values[0][r][h].iter().map(|&x| stored(x)).collect();
                let delta = dot(&out, &d_out[r][h]);
                for (&j, &p) in keys.iter().zip(&p) {
                    let dp = dot(&d_out[r][h], &v[j][kv]);
                    let ds = stored(f32_if(p * f32_if(dp - delta)));
                    let size = p * (dp.abs() + delta.abs()) * scale;
                    add(&mut values[1][r][h], ds * scale, &k[j][kv]);
                    add(&mut values[2][j][kv], ds * scale, &q[r][h]);
                    add(&mut values[3][j][kv], stored(p), &d_out[r][h]);
                    magnitude(&mut terms[1][r][h], size, &k[j][kv]);
                    magnitude(&mut terms[2][j][kv], size, &q[r][h]);
                    magnitude(&mut terms[3][j][kv], p, &d_out[r][h]);
                }
            }
        }
        values.iter_mut().flatten().flatten().flatten().for_each(|x| *x = stored(*x));
        Oracle { values, terms, lse }
    }

    fn check(&self, what: &str, got: &Results, oracle: &Oracle, plain: &Oracle) {
        let eps = match self.dtype {
            DType::F32 => f64::from(f32::EPSILON) / 2.0,
            DType::Bf16 => 1.0 / 256.0,
            DType::F16 => 1.0 / 2048.0,
            DType::Fp8(_) => unreachable!("no tensor is stored so"),
        };
        let tensors = [&got.out, &got.dq, &got.dk, &got.dv];
        for (t, name) in ["O", "dQ", "dK", "dV"].iter().enumerate() {
            let (want, plain) = (&oracle.values[t], &plain.values[t]);
            let (terms, rows) = (&oracle.terms[t], want.len());
            let k = if t == 0 { 2.0 } else { 3.0 };
            for h in 0..tensors[t].view.heads {
                for bucket in 0..(rows / 64).max(1) {
                    let end = if bucket + 1 >= rows / 64 { rows } else { (bucket + 1) * 64 };
                    let range = bucket * 64..end;
                    let norm = |f: &dyn Fn(usize) -> Vec<f64>| -> f64 {
                        range.clone().flat_map(f).map(|x| x * x).sum::<f64>().sqrt()
                    };
                    let minus =
                        |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x - y).collect();
                    let widen = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
                    let err = norm(&|r| minus(&widen(tensors[t].get(r, h)), &want[r][h]));
                    let err_plain = norm(&|r| minus(&plain[r][h], &want[r][h]));
                    let bound = k * err_plain
                        + 4.0 * eps * norm(&|r| want[r][h].clone())
                        + 1e-7 * norm(&|r| terms[r][h].clone());
                    assert!(
                        err <= bound,
                        "{what} {} {:?}: {name} head {h} rows {range:?}: error {err:e}, bound {bound:e}, plain {err_plain:e}",
                        self.name,
                        self.dtype
                    );
                }
            }
        }
        for r in 0..self.rows {
            for h in 0..self.heads {
                let (want, got_lse) = (oracle.lse[r][h][0], f64::from(got.lse.get(r, h)[0]));
                // Scores in the hundreds are sums of thousands: their fp32 rounding alone exceeds 1e-5.
                let allowed = 1e-5 + 1e-6 * (want.abs() - 16.0).max(0.0);
                let same = want == got_lse || (want - got_lse).abs() <= allowed;
                assert!(same, "{what} {}: LSE ({r}, {h}) {got_lse}, want {want}", self.name);
                if want == f64::NEG_INFINITY {
                    let zero = |t: &Tensor| t.get(r, h).iter().all(|&x| x == 0.0);
                    assert!(zero(&got.out) && zero(&got.dq), "{what} {} row {r}", self.name);
                }
            }
        }
    }
}

fn segment(start: u32, step: u32, len: u32, offset: u32) -> Segment {
    Segment { seq: 0, start, step, len, offset }
}

/// Slices of all pairs of segments of one sequence, sorted.
fn slices_of(q: &[Segment], k: &[Segment], mask: Mask, len_q: u32, len_k: u32) -> Vec<Slice> {
    let band = mask.band(len_q, len_k);
    let mut slices: Vec<Slice> = q
        .iter()
        .flat_map(|a| k.iter().map(move |b| (a, b)))
        .filter_map(|(a, b)| {
            overlap(a, b, band).map(|o| o.slice(i64::from(a.offset), i64::from(b.offset)))
        })
        .collect();
    slices.sort_by_key(|s| (s.q, s.k));
    slices
}

/// Documents of random lengths with padding between them, causal or not.
fn documents(rng: &mut Rng, rows: u32, longest: u32, mask: Mask) -> Vec<Slice> {
    let (mut at, mut slices) = (rng.below(3), Vec::new());
    loop {
        let len = 1 + rng.below(longest);
        if at + len > rows {
            return slices;
        }
        let doc = [segment(0, 1, len, at)];
        slices.extend(slices_of(&doc, &doc, mask, len, len));
        at += len + rng.below(3);
    }
}

/// Two heads of dimension 64, every query its own key head.
fn base(name: impl Into<String>, rows: u32, key_rows: u32, slices: Vec<Slice>) -> Case {
    Case {
        name: name.into(),
        dtype: DType::F32,
        layout: Layout::Dense,
        rows: rows as usize,
        key_rows: key_rows as usize,
        heads: 2,
        map: HeadMap { q_first: 0, group: 1, kv_first: 0 },
        dqk: 64,
        dv: 64,
        scale: 0.125,
        gain: 1.0,
        slices,
    }
}

/// One sequence in one piece.
fn whole(rows: u32, keys: u32, mask: Mask) -> Vec<Slice> {
    slices_of(&[segment(0, 1, rows, 0)], &[segment(0, 1, keys, 0)], mask, rows, keys)
}

fn bits(results: &Results) -> [&[u8]; 5] {
    [&results.out, &results.lse, &results.dq, &results.dk, &results.dv].map(|t| &t.memory[..])
}

/// Every storage type and instruction set: against the oracle in one step and in several, and threads against one thread.
fn check_all(cases: Vec<Case>) {
    let available = Simd::ALL.into_iter().filter(|s| s.available());
    let mut cpus: Vec<[Cpu; 3]> =
        available.map(|s| [1, 2, 3].map(|n| Cpu::new(n, s).unwrap())).collect();
    for (mut case, dtype) in cases.into_iter().flat_map(|c| DType::ALL.map(|d| (c.clone(), d))) {
        case.dtype = dtype;
        let inputs = case.inputs();
        let (oracle, plain) = (case.double_loop(&inputs, false), case.double_loop(&inputs, true));
        for cpus in &mut cpus {
            let simd = cpus[0].simd().name();
            let once = case.run(&mut cpus[0], &inputs, 1);
            case.check(simd, &once, &oracle, &plain);
            for cpu in cpus.iter_mut() {
                let again = case.run(cpu, &inputs, 1);
                let same = bits(&once) == bits(&again);
                assert!(same, "{simd} {}: {} threads", case.name, cpu.threads());
            }
            for stages in [2, 3] {
                let staged = case.run(&mut cpus[stages - 1], &inputs, stages);
                case.check(&format!("{simd} {stages} stages"), &staged, &oracle, &plain);
            }
        }
    }
}

#[test]
fn masks_keep_the_error_contract() {
    let masks = [
        ("full", Mask::FULL),
        ("causal", Mask::CAUSAL),
        ("window", Mask { left: Some(17), right: Some(5), ..Mask::FULL }),
        ("causal window", Mask { left: Some(40), ..Mask::CAUSAL }),
        ("bottom right", Mask { bottom_right: true, ..Mask::CAUSAL }),
        ("narrow", Mask { left: Some(0), ..Mask::CAUSAL }),
    ];
    let sizes = [(150, 150), (37, 300), (333, 61), (1, 5)];
    let mut cases = Vec::new();
    for ((rows, keys), (name, mask)) in sizes.into_iter().flat_map(|s| masks.map(|m| (s, m))) {
        cases.push(base(name, rows, keys, whole(rows, keys, mask)));
    }
    cases.push(base("nothing", 20, 20, vec![]));
    check_all(cases);
}

#[test]
fn head_dimensions_and_layouts_keep_the_error_contract() {
    let dims = [(8, 8), (24, 24), (24, 8), (128, 128), (192, 128), (256, 256), (40, 72)];
    let layouts = [Layout::Bshd, Layout::Bhsd, Layout::Sbhd].into_iter().cycle();
    let case = |((dqk, dv), layout)| {
        let scale = 1.0 / (dqk as f32).sqrt();
        let case = base("dims", 200, 180, whole(200, 180, Mask::CAUSAL));
        Case { dqk, dv, layout, scale, ..case }
    };
    check_all(dims.into_iter().zip(layouts).map(case).collect());
}

#[test]
fn head_maps_keep_the_error_contract() {
    let mut rng = Rng::new(7);
    // The second and third start and end inside a group, as the shares of an uneven all-to-all do.
    let maps = [(0, 2, 0, 4), (3, 4, 0, 6), (8, 4, 2, 5), (2, 3, 0, 1), (0, 40, 0, 40)];
    let case = |(q_first, group, kv_first, heads)| {
        let map = HeadMap { q_first, group, kv_first };
        let slices = documents(&mut rng, 170, 90, Mask::CAUSAL);
        let name = format!("{heads} heads, {map:?}");
        Case { map, heads, dqk: 32, dv: 32, ..base(name, 170, 170, slices) }
    };
    check_all(maps.into_iter().map(case).collect());
}

#[test]
fn documents_keep_the_error_contract() {
    let mut rng = Rng::new(11);
    let kinds = [3, 14, 60, 300].map(|longest| [(longest, Mask::FULL), (longest, Mask::CAUSAL)]);
    let case = |(longest, mask)| {
        let slices = documents(&mut rng, 700, longest, mask);
        let case = base(format!("documents up to {longest}, {mask:?}"), 700, 700, slices);
        Case { layout: Layout::Bshd, dqk: 16, dv: 32, heads: 1, ..case }
    };
    check_all(kinds.into_iter().flatten().map(case).collect());
}

#[test]
fn scattered_segments_keep_the_error_contract() {
    // Zigzag: two query segments against the segments of three ranks, in another order in memory.
    let queries = [segment(60, 1, 30, 0), segment(150, 1, 30, 35)];
    let keys = [
        segment(0, 1, 30, 100),
        segment(30, 1, 30, 0),
        segment(60, 1, 30, 70),
        segment(90, 1, 30, 31),
        segment(120, 1, 30, 140),
        segment(150, 1, 30, 200),
    ];
    // Striped: every third token.
    let striped = [segment(1, 3, 90, 0)];
    let sources = [segment(0, 3, 90, 0), segment(1, 3, 90, 90), segment(2, 3, 90, 180)];
    let mut cases = Vec::new();
    for (name, mask) in
        [("causal", Mask::CAUSAL), ("window", Mask { left: Some(33), ..Mask::CAUSAL })]
    {
        let slices = slices_of(&queries, &keys, mask, 180, 180);
        cases.push(base(format!("zigzag {name}"), 70, 240, slices));
        let slices = slices_of(&striped, &sources, mask, 270, 270);
        cases.push(base(format!("striped {name}"), 90, 270, slices));
    }
    check_all(cases);
}

#[test]
fn unusual_scales_keep_the_error_contract() {
    let scales =
        [("large", 1.0, 8.0), ("negative", -0.2, 1.0), ("zero", 0.0, 1.0), ("tiny", 1e-6, 1.0)];
    let case = |(name, scale, gain)| Case {
        scale,
        gain,
        ..base(name, 130, 130, whole(130, 130, Mask::CAUSAL))
    };
    check_all(scales.into_iter().map(case).collect());
}

#[test]
fn an_error_of_progress_stops_the_step_and_is_returned() {
    let case = base("stop", 1500, 1500, whole(1500, 1500, Mask::FULL));
    let (inputs, results) = (case.inputs(), case.results());
    let mut step = case.forward(&inputs, &case.slices);
    step.last = Some(Output { out: results.out.view, lse: results.lse.view, top: None });
    for threads in [1, 3] {
        let mut cpu = Cpu::new(threads, Simd::detect()).unwrap();
        let mut calls = 0;
        let mut progress = || {
            calls += 1;
            if calls < 4 { Ok(()) } else { Err(Error::internal("on purpose")) }
        };
        // SAFETY: the tensors outlive the call.
        let stopped = unsafe { cpu.forward(&step, &mut progress) };
        assert_eq!(stopped, Err(Error::internal("on purpose")));
        assert_eq!(calls, 4, "progress was called again after its error");
        let mut calls = 0;
        let mut progress = || {
            calls += 1;
            Ok(())
        };
        // SAFETY: as above.
        unsafe { cpu.forward(&step, &mut progress) }.unwrap();
        // 2 heads × 6 tiles × 12 blocks of keys; another thread may take nearly all of them.
        assert!(calls > if threads == 1 { 140 } else { 0 }, "progress was called {calls} times");
    }
}

#[test]
fn rows_without_lse_have_no_gradient() {
    let case = base("no LSE", 40, 40, whole(40, 40, Mask::CAUSAL));
    let (inputs, mut results) = (case.inputs(), case.results());
    results.lse.fill(|| f32::NEG_INFINITY);
    for simd in Simd::ALL.into_iter().filter(|s| s.available()) {
        let step = Backward {
            effects: None,
            q: inputs.q.view,
            k: inputs.k.view,
            v: inputs.v.view,
            d_out: inputs.d_out.view,
            lse: results.lse.view,
            delta: results.lse.view,
            slices: &case.slices,
            heads: case.map,
            scale: case.scale,
            dq: results.dq.view,
            dk: results.dk.view,
            dv: results.dv.view,
        };
        // SAFETY: the tensors outlive the call.
        unsafe { Cpu::new(1, simd).unwrap().backward(&step, &mut || Ok(())) }.unwrap();
        let zero = |t: &Tensor| t.values().iter().flatten().flatten().all(|&x| x == 0.0);
        assert!(zero(&results.dq) && zero(&results.dk) && zero(&results.dv), "{}", simd.name());
    }
}

#[test]
fn scratch_grows_once() {
    fn is_send<T: Send>(_: &T) {}
    let case = base("scratch", 300, 300, whole(300, 300, Mask::CAUSAL));
    let inputs = case.inputs();
    let mut cpu = Cpu::new(1, Simd::detect()).unwrap();
    is_send(&cpu);
    assert!(cpu.scratch_bytes() < 1 << 12);
    case.run(&mut cpu, &inputs, 1);
    let bytes = cpu.scratch_bytes();
    assert!((1 << 18..1 << 22).contains(&bytes), "{bytes}");
    case.run(&mut cpu, &inputs, 1);
    assert_eq!(cpu.scratch_bytes(), bytes);
}

#[test]
fn wrong_shapes_and_thread_counts_are_refused() {
    assert_eq!(Cpu::new(0, Simd::Scalar).err().unwrap().status, Status::InvalidArgument);
    let mut cpu = Cpu::new(1, Simd::Scalar).unwrap();
    let case = base("shapes", 4, 4, vec![]);
    let inputs = case.inputs();
    let mut step = case.forward(&inputs, &[]);
    let mut refused = |step: &Forward| {
        // SAFETY: the step is refused before anything is read.
        unsafe { cpu.forward(step, &mut || Ok(())) }.is_err()
    };
    assert!(refused(&step), "neither state nor output");
    let results = case.results();
    step.last = Some(Output { out: results.out.view, lse: results.lse.view, top: None });
    assert!(!refused(&step));
    let bad: [fn(&mut Forward); 5] = [
        |s| s.q.dim = 56,
        |s| s.v.dim = 12,
        |s| s.v.rows = 3,
        |s| s.k.dtype = DType::Bf16,
        |s| s.heads.q_first = 2,
    ];
    for change in bad {
        let mut step = step;
        change(&mut step);
        assert!(refused(&step), "{step:?}");
    }
}
