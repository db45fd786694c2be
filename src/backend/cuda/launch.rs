//! Compute steps to launches: finds a device's kernels, checks what they need of tensors, and fills their parameters.

use super::image;
use super::params;
use super::shapes::{BIG_SHARED, SHAPES, Scores, Shape};
use super::tables::{AttendWork, RowsWork};
use crate::backend::{
    Backward, CopyRows, Delta, Effects, Forward, HeadMap, Reduce, SinkTerms, View,
};
use crate::driver::{CUdeviceptr, CUstream, Device, Function, Launch, Module};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::score::{Seed, drop_below};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Threads of a block of the row kernels.
const ROW_THREADS: u32 = 256;

/// A kernel, ready to be launched.
struct Kernel {
    name: String,
    function: Function,
    threads: u32,
    shared: u32,
    /// Blocks that a multiprocessor runs at once.
    resident: u32,
}

/// The kernels of one device, loaded when they are first asked for.
pub(super) struct Kernels {
    device: Arc<Device>,
    /// The big set of shapes: the device has the shared memory for it, and this library code.
    big: bool,
    /// Loaded images by their place in the list, or why they cannot be loaded.
    modules: Mutex<Vec<Option<Result<Arc<Module>>>>>,
    /// By type, plain or with features of scores, and shape.
    forward: [[[OnceLock<Kernel>; SHAPES.len()]; 2]; 2],
    backward: [[[OnceLock<Kernel>; SHAPES.len()]; 2]; 2],
    copy_rows: OnceLock<Kernel>,
    encode_rows: OnceLock<Kernel>,
    decode_rows: OnceLock<Kernel>,
    fill_rows: OnceLock<Kernel>,
    delta: OnceLock<Kernel>,
    sink_terms: OnceLock<Kernel>,
    reduce: OnceLock<Kernel>,
}

/// Compute capability 8.0 brought cp.async, and mma on bf16.
const OLDEST_ARCH: u32 = 80;

impl Kernels {
    /// The kernels of a device: one set per process.
    pub fn of(device: &Arc<Device>) -> Result<Arc<Kernels>> {
        static ALL: Mutex<Vec<Arc<Kernels>>> = Mutex::new(Vec::new());
        if device.arch < OLDEST_ARCH {
            return Err(Error::unsupported(format!(
                "device {}: {} is sm_{}, the kernels need sm_{OLDEST_ARCH} (Ampere) or later",
                device.ordinal, device.name, device.arch
            )));
        }
        if image::IMAGES.is_empty() {
            return Err(Error::unsupported(
                "CUDA: this library was built without kernels, because no nvcc was found (CP_CUDA=require at build time refuses that)",
            ));
        }
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = all.iter().find(|k| k.device.ordinal == device.ordinal) {
            return Ok(known.clone());
        }
        let mut kernels = Kernels {
            device: device.clone(),
            big: false,
            modules: Mutex::new(image::IMAGES.iter().map(|_| None).collect()),
            forward: Default::default(),
            backward: Default::default(),
            copy_rows: OnceLock::new(),
            encode_rows: OnceLock::new(),
            decode_rows: OnceLock::new(),
            fill_rows: OnceLock::new(),
            delta: OnceLock::new(),
            sink_terms: OnceLock::new(),
            reduce: OnceLock::new(),
        };
        // A GPU that is newer than this library runs PTX, of which there is only the small set.
        kernels.big = device.shared_bytes >= BIG_SHARED && kernels.has(&SHAPES[0]);
        let kernels = Arc::new(kernels);
        all.push(kernels.clone());
        Ok(kernels)
    }

    /// Is there a backward kernel of this shape for this device?
    fn has(&self, shape: &Shape) -> bool {
        self.backward(DType::Bf16, shape).is_ok()
    }

    /// Loads what a problem of this type and shape needs, so that launches load nothing.
    pub fn prepare(&self, dtype: DType, shape: &Shape) -> Result<()> {
        self.forward(dtype, shape)?;
        self.backward(dtype, shape)?;
        self.copy_rows()?;
        self.encode_rows()?;
        self.decode_rows()?;
        self.fill_rows()?;
        self.sink_terms()?;
        self.reduce()?;
        self.delta().map(|_| ())
    }

    fn forward(&self, dtype: DType, shape: &Shape) -> Result<&Kernel> {
        let Shape { dim_qk, forward_suffix: suffix, forward_block: block, .. } = shape;
        let name = || format!("cp_forward_{}_{dim_qk}{suffix}", type_name(dtype));
        let cell = &self.forward[row_of(dtype)][set_of(suffix)][index_of(shape)];
        get(cell, || self.load(name(), block.threads, block.shared))
    }

    fn backward(&self, dtype: DType, shape: &Shape) -> Result<&Kernel> {
        let Shape { dim_qk, backward_suffix: suffix, backward_block: block, .. } = shape;
        let name = || format!("cp_backward_{}_{dim_qk}{suffix}", type_name(dtype));
        let cell = &self.backward[row_of(dtype)][set_of(suffix)][index_of(shape)];
        get(cell, || self.load(name(), block.threads, block.shared))
    }

    fn copy_rows(&self) -> Result<&Kernel> {
        get(&self.copy_rows, || self.load("cp_copy_rows".into(), ROW_THREADS, 0))
    }

    fn encode_rows(&self) -> Result<&Kernel> {
        get(&self.encode_rows, || self.load("cp_encode_rows".into(), ROW_THREADS, 0))
    }

    fn decode_rows(&self) -> Result<&Kernel> {
        get(&self.decode_rows, || self.load("cp_decode_rows".into(), ROW_THREADS, 0))
    }

    fn fill_rows(&self) -> Result<&Kernel> {
        get(&self.fill_rows, || self.load("cp_fill_rows".into(), ROW_THREADS, 0))
    }

    fn delta(&self) -> Result<&Kernel> {
        get(&self.delta, || self.load("cp_delta".into(), ROW_THREADS, 0))
    }

    fn sink_terms(&self) -> Result<&Kernel> {
        get(&self.sink_terms, || self.load("cp_sink_terms".into(), ROW_THREADS, 0))
    }

    fn reduce(&self) -> Result<&Kernel> {
        // A number per warp.
        get(&self.reduce, || self.load("cp_reduce".into(), ROW_THREADS, ROW_THREADS / 32 * 4))
    }

    /// Finds a kernel in the first image that has it and code for this device.
    fn load(&self, name: String, threads: u32, shared: u32) -> Result<Kernel> {
        let _current = self.device.enter()?;
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let mut refused = None;
        for (image, module) in image::IMAGES.iter().zip(modules.iter_mut()) {
            if !image.kernels.contains(&name.as_str()) {
                continue;
            }
            let loaded = module.get_or_insert_with(|| {
                // SAFETY: the build script embedded what nvcc wrote.
                unsafe { Module::load(&self.device, image.name, image.bytes) }.map(Arc::new)
            });
            match loaded {
                Ok(module) => {
                    if let Some(function) = module.function(&name)? {
                        function.allow_shared(shared)?;
                        let resident = function.blocks_per_multiprocessor(threads, shared)?;
                        return Ok(Kernel { name, function, threads, shared, resident });
                    }
                }
                Err(e) => refused = Some(e.clone()),
            }
        }
        let Device { ordinal, name: device, arch, .. } = &*self.device;
        let why = refused.map_or("it is in no image".into(), |e| e.text);
        Err(Error::unsupported(format!(
            "device {ordinal}: no kernel {name} for {device} (sm_{arch}); compiled for {}: {why}",
            image::archs().into_iter().map(image::spelled).collect::<Vec<_>>().join(", ")
        )))
    }
}

/// What a cell holds, loaded if it is empty. Two threads may load at once; one of the results is kept.
fn get(cell: &OnceLock<Kernel>, load: impl FnOnce() -> Result<Kernel>) -> Result<&Kernel> {
    if let Some(kernel) = cell.get() {
        return Ok(kernel);
    }
    let kernel = load()?;
    Ok(cell.get_or_init(|| kernel))
}

fn type_name(dtype: DType) -> &'static str {
    if dtype == DType::Bf16 { "bf16" } else { "f16" }
}

fn row_of(dtype: DType) -> usize {
    usize::from(dtype == DType::F16)
}

fn set_of(suffix: &str) -> usize {
    usize::from(suffix == "_score")
}

fn index_of(shape: &Shape) -> usize {
    SHAPES.iter().position(|s| s.dim_qk == shape.dim_qk).unwrap_or(0)
}

/// A tensor as kernels can read it: its address and strides are multiples of 16 bytes; those of fp32 statistics (`dim` 1) of 4.
///
/// `name` is the caller's; strides are named by their place in [batch, seq, heads, dim].
pub fn check_view(name: &str, view: &View) -> Result<()> {
    check_multiples(name, view, if view.dim == 1 { view.dtype.size() } else { 16 })
}

/// A tensor that kernels read element by element, as a bias: all at multiples of an element.
pub fn check_elements(name: &str, view: &View) -> Result<()> {
    check_multiples(name, view, view.dtype.size())
}

fn check_multiples(name: &str, view: &View, bytes: usize) -> Result<()> {
    let size = view.dtype.size();
    let address = view.ptr as usize;
    if !address.is_multiple_of(bytes) {
        return Err(Error::argument(format!(
            "{name}.data: got an address {} bytes after a multiple of {bytes}, on CUDA a multiple of {bytes}",
            address % bytes
        )));
    }
    let strides = [
        (0, view.stride_batch, view.rows > view.rows_per_batch),
        (1, view.stride_row, view.rows.min(view.rows_per_batch) > 1),
        (2, view.stride_head, view.heads > 1),
    ];
    for (axis, stride, used) in strides {
        if used && !(stride * size).is_multiple_of(bytes) {
            return Err(Error::argument(format!(
                "{name}.stride[{axis}]: got {stride} elements, on CUDA a multiple of {}",
                bytes / size
            )));
        }
    }
    // Kernels count rows in 32 signed bits.
    let limit = i32::MAX as usize;
    if view.rows > limit {
        return Err(Error::argument(format!("{name}: got {} rows, at most {limit}", view.rows)));
    }
    Ok(())
}

/// Enqueues compute steps on the streams of one device. One per layer.
///
/// Steps are enqueued with the device current ([`Device::enter`]). Tables are the blob that the step's work was built into, on the
/// device. A launch allocates nothing and does not wait, once [`Cuda::supports`] has loaded the kernels.
pub struct Cuda {
    device: Arc<Device>,
    kernels: Arc<Kernels>,
    margin: u32,
}

impl Cuda {
    /// The backend of a device. Fails with `Unsupported` when it is too old, or when this library was built without kernels.
    pub fn new(device: Arc<Device>) -> Result<Cuda> {
        let kernels = Kernels::of(&device)?;
        Ok(Cuda { device, kernels, margin: 0 })
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Leaves so many multiprocessors to others, such as NCCL, while attention is computed. 0, the default: none. Deterministic backward
    /// steps take all: their blocks wait for each other, so none may be held back.
    pub fn set_margin(&mut self, multiprocessors: u32) {
        self.margin = multiprocessors;
    }

    /// The compiled shape for these tensors, its kernels loaded; or the reason why there is none. The first time it blocks, and cannot
    /// be called while a stream captures.
    pub fn supports(
        &self,
        dtype: DType,
        dim_qk: u32,
        dim_v: u32,
        scores: Scores,
    ) -> Result<&'static Shape> {
        let dims = [dim_qk as usize, dim_v as usize];
        let shape = Shape::of(dtype, dims, scores, self.kernels.big)?;
        self.kernels.prepare(dtype, shape)?;
        Ok(shape)
    }

    /// The shape of a step.
    fn shape(&self, q: &View, v: &View, effects: Option<&Effects>) -> Result<&'static Shape> {
        let scores = effects.map_or(Scores::Plain, |e| Scores::of(e.score));
        Shape::of(q.dtype, [q.dim, v.dim], scores, self.kernels.big)
    }

    /// Enqueues a forward step. `step.slices` is not read: `work` is made of it.
    ///
    /// # Safety
    /// Views are valid on this device, for the rows that `work` names, until the kernel is done; `tables` is the blob of `work`, at a
    /// multiple of 16 bytes; `stream` is a stream of this device, which is current.
    pub unsafe fn forward(
        &self,
        step: &Forward,
        work: &AttendWork,
        tables: CUdeviceptr,
        stream: CUstream,
    ) -> Result<()> {
        let (q, v) = (&step.q, &step.v);
        let shape = self.shape(q, v, step.effects.as_ref())?;
        let mut p = attention(work, tables, step.heads, step.scale, q, v);
        (p.q, p.k, p.v) = (view("q", q)?, view("k", &step.k)?, view("v", v)?);
        if let Some(state) = &step.state {
            p.acc_out = view("acc_out", &state.out)?;
            p.acc_max = view("acc_max", &state.max)?;
            p.acc_sum = view("acc_sum", &state.sum)?;
        } else if !(step.first && step.last.is_some()) {
            return Err(Error::internal(
                "a forward step needs a state unless it is first and last",
            ));
        }
        if let Some(output) = &step.last {
            (p.out, p.lse) = (view("out", &output.out)?, view("lse", &output.lse)?);
            if let Some(top) = &output.top {
                p.top = view("row maxima", top)?;
            }
            p.flags |= params::LAST;
        }
        if let Some(effects) = &step.effects {
            score(&mut p, effects, work, tables)?;
            p.flags |= if effects.score.max_logit.is_some() { params::LARGEST } else { 0 };
        }
        if step.first {
            p.flags |= params::FIRST;
        }
        let kernel = self.kernels.forward(q.dtype, shape)?;
        let blocks = u64::from(work.tile_count) * q.heads as u64;
        // SAFETY: the caller's promise; the kernel takes these parameters.
        unsafe { self.attend(kernel, blocks, self.margin, &p, stream) }
    }

    /// Enqueues a backward step. `step.slices` is not read: `work` is made of it. A deterministic one first zeroes
    /// all [`AttendWork::counters`] (`uint32_t`) at `counters`.
    ///
    /// # Safety
    /// As [`Cuda::forward`]; a deterministic step owns the counters until it is done.
    pub unsafe fn backward(
        &self,
        step: &Backward,
        work: &AttendWork,
        tables: CUdeviceptr,
        counters: CUdeviceptr,
        stream: CUstream,
    ) -> Result<()> {
        let (q, v) = (&step.q, &step.v);
        let shape = self.shape(q, v, step.effects.as_ref())?;
        let mut p = attention(work, tables, step.heads, step.scale, q, v);
        (p.q, p.k, p.v) = (view("q", q)?, view("k", &step.k)?, view("v", v)?);
        p.d_out = view("d_out", &step.d_out)?;
        (p.lse, p.delta) = (view("lse", &step.lse)?, view("delta", &step.delta)?);
        (p.dq, p.dk, p.dv) = (view("dq", &step.dq)?, view("dk", &step.dk)?, view("dv", &step.dv)?);
        if let Some(effects) = &step.effects {
            score(&mut p, effects, work, tables)?;
        }
        let kernel = self.kernels.backward(q.dtype, shape)?;
        let blocks = u64::from(work.tile_count) * v.heads as u64;
        let mut margin = self.margin;
        if work.turns.is_some() {
            p.flags |= params::DETERMINISTIC;
            p.counters = counters;
            margin = 0;
            let shared_bias = step.effects.is_some_and(|e| e.d_bias.is_some_and(|b| b.heads == 1));
            let [of_queries, of_bias] = work.counters(q.heads, shared_bias);
            p.bias_counters =
                if of_bias > 0 { counters + 4 * of_queries as CUdeviceptr } else { 0 };
            let bytes = 4 * (of_queries + of_bias);
            if blocks > 0 {
                // SAFETY: the caller's promise.
                unsafe { crate::driver::clear(counters, bytes, stream)? };
            }
        }
        // SAFETY: the caller's promise; the kernel takes these parameters.
        unsafe { self.attend(kernel, blocks, margin, &p, stream) }
    }

    /// # Safety
    /// As [`Function::launch`].
    unsafe fn attend(
        &self,
        kernel: &Kernel,
        blocks: u64,
        margin: u32,
        params: &params::Attention,
        stream: CUstream,
    ) -> Result<()> {
        let left = self.device.multiprocessors.saturating_sub(margin).max(1);
        let most =
            if margin == 0 { i32::MAX as u64 } else { u64::from(left * kernel.resident.max(1)) };
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(blocks.min(most), params, stream) }
    }

    /// Enqueues a copy of rows, which encodes or decodes them if one side is as they travel; the other is bf16 or fp16 then, aligned to 16 bytes. `step.runs` is not read: `work` is made of it.
    ///
    /// # Safety
    /// As [`Cuda::forward`]; source and destination do not overlap.
    pub unsafe fn copy_rows(
        &self,
        step: &CopyRows,
        work: &RowsWork,
        tables: CUdeviceptr,
        stream: CUstream,
    ) -> Result<()> {
        if step.add && step.dst.dtype != DType::F32 {
            return Err(Error::internal("rows are added in fp32"));
        }
        let p = params::Rows {
            src: params::View::of(&step.src),
            dst: params::View::of(&step.dst),
            runs: tables + work.runs,
            run_count: work.run_count,
            row_count: work.row_count,
            src_type: params::type_code(step.src.dtype),
            dst_type: params::type_code(step.dst.dtype),
            src_head: step.src_head as u32,
            dst_head: step.dst_head as u32,
            heads: step.heads as u32,
            dim: step.src.dim as u32,
            add: u32::from(step.add),
            value: 0,
        };
        let travels = |view: &View| matches!(view.dtype, DType::Fp8(_));
        let (kernel, stored) = match (travels(&step.src), travels(&step.dst)) {
            (false, true) => (self.kernels.encode_rows()?, &step.src),
            (true, false) => (self.kernels.decode_rows()?, &step.dst),
            _ => (self.kernels.copy_rows()?, &step.src),
        };
        let p = params::Rows { dim: stored.dim as u32, ..p };
        let size = step.src.dtype.size().max(step.dst.dtype.size());
        let grid = self.row_blocks(work.row_count as usize, step.heads, stored.dim, size);
        // SAFETY: the caller's promise; the kernel takes these parameters.
        unsafe { kernel.launch(grid, &p, stream) }
    }

    /// Enqueues writing 0, or −∞ to fp32, to all heads of rows of a tensor.
    ///
    /// # Safety
    /// As [`Cuda::forward`].
    pub unsafe fn fill(
        &self,
        view: &View,
        work: &RowsWork,
        neg_inf: bool,
        tables: CUdeviceptr,
        stream: CUstream,
    ) -> Result<()> {
        let p = params::Rows {
            dst: params::View::of(view),
            runs: tables + work.runs,
            run_count: work.run_count,
            row_count: work.row_count,
            dst_type: params::type_code(view.dtype),
            heads: view.heads as u32,
            dim: view.dim as u32,
            value: if neg_inf { f32::NEG_INFINITY.to_bits() } else { 0 },
            ..params::Rows::default()
        };
        let kernel = self.kernels.fill_rows()?;
        let grid =
            self.row_blocks(work.row_count as usize, view.heads, view.dim, view.dtype.size());
        // SAFETY: the caller's promise; the kernel takes these parameters.
        unsafe { kernel.launch(grid, &p, stream) }
    }

    /// Enqueues Σ O∘dO.
    ///
    /// # Safety
    /// As [`Cuda::forward`], for all rows of the views.
    pub unsafe fn delta(&self, step: &Delta, stream: CUstream) -> Result<()> {
        let out = &step.out;
        let p = params::Delta {
            out: view("out", out)?,
            d_out: view("d_out", &step.d_out)?,
            delta: view("delta", &step.delta)?,
            row_count: out.rows as u32,
            heads: out.heads as u32,
            dim: out.dim as u32,
            dtype: params::type_code(out.dtype),
        };
        let kernel = self.kernels.delta()?;
        let grid = self.row_blocks(out.rows, out.heads, out.dim, out.dtype.size());
        // SAFETY: the caller's promise; the kernel takes these parameters.
        unsafe { kernel.launch(grid, &p, stream) }
    }

    /// Enqueues what rows add to the gradients of sinks.
    ///
    /// # Safety
    /// As [`Cuda::forward`], for all rows of the views.
    pub unsafe fn sink_terms(&self, step: &SinkTerms, stream: CUstream) -> Result<()> {
        let terms = &step.terms;
        let p = params::Sink {
            sinks: view("sinks", &step.sinks)?,
            lse: view("lse", &step.lse)?,
            delta: view("delta", &step.delta)?,
            terms: view("sink terms", terms)?,
            row_count: terms.rows as u32,
            heads: terms.heads as u32,
        };
        let kernel = self.kernels.sink_terms()?;
        let grid = self.row_blocks(terms.rows, terms.heads, 1, terms.dtype.size());
        // SAFETY: the caller's promise; the kernel takes these parameters.
        unsafe { kernel.launch(grid, &p, stream) }
    }

    /// Enqueues a sum or maximum over rows.
    ///
    /// # Safety
    /// As [`Cuda::forward`], for all rows of the source and the row of the destination.
    pub unsafe fn reduce(&self, step: &Reduce, stream: CUstream) -> Result<()> {
        let src = &step.src;
        let p = params::Reduce {
            src: view("numbers per row", src)?,
            dst: view("numbers per head", &step.dst)?,
            row_count: src.rows as u32,
            heads: src.heads as u32,
            dst_row: step.dst_row as u32,
            dst_head: step.dst_head as u32,
            largest: u32::from(step.max),
            reserved: 0,
        };
        // SAFETY: the caller's promise; the kernel takes these parameters, and a block per head.
        unsafe { self.kernels.reduce()?.launch(src.heads as u64, &p, stream) }
    }

    /// Blocks of a row kernel: enough to keep the memory busy. A group of threads shares a row and head, 16 bytes each.
    fn row_blocks(&self, rows: usize, heads: usize, dim: usize, size: usize) -> u64 {
        let lanes = (dim * size).div_ceil(16).next_power_of_two().min(32);
        let blocks = (rows * heads * lanes).div_ceil(ROW_THREADS as usize);
        (blocks as u64).min(8 * u64::from(self.device.multiprocessors))
    }
}

impl Kernel {
    /// Nothing to do is no launch: a grid cannot be empty.
    ///
    /// # Safety
    /// As [`Function::launch`].
    unsafe fn launch<P>(&self, blocks: u64, params: &P, stream: CUstream) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let how = Launch { grid: blocks as u32, block: self.threads, shared: self.shared };
        // SAFETY: the caller's promise.
        unsafe { self.function.launch(&self.name, how, params, stream) }
    }
}

fn view(name: &str, view: &View) -> Result<params::View> {
    check_view(name, view)?;
    Ok(params::View::of(view))
}

/// A bias or its gradient: one head is for all.
fn per_pair(name: &str, view: &View) -> Result<params::View> {
    check_elements(name, view)?;
    let stride_head = if view.heads == 1 { 0 } else { view.stride_head as i64 };
    Ok(params::View { stride_head, ..params::View::of(view) })
}

/// What forward and backward have in common.
fn attention(
    work: &AttendWork,
    tables: CUdeviceptr,
    heads: HeadMap,
    scale: f32,
    q: &View,
    v: &View,
) -> params::Attention {
    let list = |at: Option<u64>| at.map_or(0, |at| tables + at);
    params::Attention {
        tiles: tables + work.tiles,
        parts: tables + work.parts,
        slices: tables + work.slices,
        q_used: list(work.q_used),
        k_used: list(work.k_used),
        turns: list(work.turns),
        tile_count: work.tile_count,
        heads: q.heads as u32,
        kv_heads: v.heads as u32,
        q_first: heads.q_first,
        head_group: heads.group,
        kv_first: heads.kv_first,
        dim_qk: q.dim as u32,
        dim_v: v.dim as u32,
        scale,
        scale_log2: scale * std::f32::consts::LOG2_E,
        ..params::Attention::default()
    }
}

/// What scores depend on beside q, k and the slices.
fn score(
    p: &mut params::Attention,
    effects: &Effects,
    work: &AttendWork,
    tables: CUdeviceptr,
) -> Result<()> {
    let score = effects.score;
    let tokens = work.tokens.ok_or_else(|| Error::internal("a step without tables of tokens"))?;
    p.q_tokens = tables + tokens.queries;
    p.k_positions = tables + tokens.keys;
    p.sequences = tables + tokens.sequences;
    p.alibi = tokens.slopes.map_or(0, |at| tables + at);
    p.softcap = score.softcap;
    p.softcap_inverse = if score.softcap > 0.0 { 1.0 / score.softcap } else { 0.0 };
    p.drop_below = drop_below(score.dropout);
    p.grow = 1.0 / (1.0 - score.dropout);
    p.head_offset = score.head_offset;
    match effects.seed {
        Seed::Value(seed) => p.dropout_seed = seed,
        Seed::At(address) => {
            p.dropout_seed = address;
            p.flags |= params::SEED_AT;
        }
    }
    if let Some(sinks) = &effects.sinks {
        p.sinks = view("sinks", sinks)?;
    }
    if let Some(bias) = &effects.bias {
        p.bias = per_pair("bias", bias)?;
    }
    if let Some(d_bias) = &effects.d_bias {
        p.d_bias = per_pair("d_bias", d_bias)?;
    }
    Ok(())
}
