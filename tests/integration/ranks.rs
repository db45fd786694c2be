//! N ranks as threads of this process: scatter global tensors, run plans, gather the results.

use context_parallel::backend::View;
use context_parallel::backend::cpu::{Cpu, Simd};
use context_parallel::dtype::DType;
use context_parallel::error::Result;
use context_parallel::exec::{self, Link, Memory, Scratch, Stats};
use context_parallel::partition::{Side, holding, tokens};
use context_parallel::plan::account::{ALIGN, layout, saved_bytes, workspace_bytes};
use context_parallel::plan::{Options, Pass, Plan, Tensor};
use context_parallel::problem::Problem;
use context_parallel::transport::Transport;
use context_parallel::transport::delay::delay;
use half::{bf16, f16};
use std::sync::Arc;
use std::time::Duration;

/// Tensors over global padded tokens, `[token, head, dim]`, as fp32 values.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Global {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub d_out: Vec<f32>,
}

/// Results in the same layout; LSE `[token, head]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Results {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
    /// Of every rank, forward and backward.
    pub stats: Vec<[Stats; 2]>,
}

/// How ranks run.
#[derive(Clone, Copy, Debug)]
pub struct How {
    pub options: Options,
    pub simd: Simd,
    pub threads: usize,
    /// Seed of random transport delays.
    pub delay: Option<u64>,
    /// Lay K and V out heads first, so that rows are not dense.
    pub heads_first: bool,
}

impl Default for How {
    fn default() -> How {
        let options = Options { pack: false, saved: false };
        How { options, simd: Simd::detect(), threads: 1, delay: None, heads_first: false }
    }
}

/// A local tensor in storage type, with its view. Outputs start as NaN, so that rows nobody writes are seen.
struct Local {
    bytes: Vec<u64>,
    view: View,
}

impl Local {
    fn new(dtype: DType, rows: usize, heads: usize, dim: usize, heads_first: bool) -> Local {
        let mut bytes = vec![u64::MAX; (rows * heads * dim * dtype.size()).div_ceil(8) + 1];
        let mut view = View::dense(bytes.as_mut_ptr().cast(), dtype, rows, heads, dim);
        if heads_first {
            (view.stride_row, view.stride_head) = (dim, rows * dim);
        }
        Local { bytes, view }
    }

    fn put(&mut self, row: usize, head: usize, values: &[f32]) {
        let (at, dtype) = (self.view.offset(row, head), self.view.dtype);
        let base: *mut u8 = self.bytes.as_mut_ptr().cast();
        for (i, x) in values.iter().enumerate() {
            // SAFETY: inside the buffer by construction of the view; u64 storage is aligned for every type.
            unsafe {
                match dtype {
                    DType::F32 => base.cast::<f32>().add(at + i).write(*x),
                    DType::Bf16 => base.cast::<bf16>().add(at + i).write(bf16::from_f32(*x)),
                    DType::F16 => base.cast::<f16>().add(at + i).write(f16::from_f32(*x)),
                }
            }
        }
    }

    fn get(&self, row: usize, head: usize, values: &mut [f32]) {
        let (at, dtype) = (self.view.offset(row, head), self.view.dtype);
        let base: *const u8 = self.bytes.as_ptr().cast();
        for (i, x) in values.iter_mut().enumerate() {
            // SAFETY: as in `put`.
            *x = unsafe {
                match dtype {
                    DType::F32 => base.cast::<f32>().add(at + i).read(),
                    DType::Bf16 => base.cast::<bf16>().add(at + i).read().to_f32(),
                    DType::F16 => base.cast::<f16>().add(at + i).read().to_f32(),
                }
            };
        }
    }
}

/// One rank's run: every tensor by role.
fn rank(
    problem: &Arc<Problem>,
    rank: u32,
    how: How,
    global: &Global,
    mut transport: Option<Box<dyn Transport>>,
) -> Result<(Vec<(Tensor, Local)>, [Stats; 2])> {
    let p = &**problem;
    let options = Options { pack: how.options.pack || how.heads_first, ..how.options };
    let mut cpu = Cpu::new(how.threads, how.simd)?;
    let mut tensors = Vec::new();
    for tensor in [
        Tensor::Q,
        Tensor::K,
        Tensor::V,
        Tensor::Out,
        Tensor::Lse,
        Tensor::DOut,
        Tensor::DQ,
        Tensor::DK,
        Tensor::DV,
    ] {
        let side = if tensor.key_side() { Side::Key } else { Side::Query };
        let (heads, dim) = shape(p, tensor);
        let dtype = if tensor == Tensor::Lse { DType::F32 } else { p.dtype };
        let heads_first = how.heads_first && tensor.key_side();
        let mut local =
            Local::new(dtype, holding(p, rank, side).rows as usize, heads, dim, heads_first);
        let source = match tensor {
            Tensor::Q => &global.q,
            Tensor::K => &global.k,
            Tensor::V => &global.v,
            Tensor::DOut => &global.d_out,
            _ => &Vec::new(),
        };
        if !source.is_empty() {
            for (row, token) in tokens(p, rank, side).into_iter().enumerate() {
                for head in 0..heads {
                    let at = (token as usize * heads + head) * dim;
                    local.put(row, head, &source[at..at + dim]);
                }
            }
        }
        tensors.push((tensor, local));
    }
    let views: Vec<(Tensor, View)> = tensors.iter().map(|(t, l)| (*t, l.view)).collect();
    let members: Vec<u32> = (0..p.ranks).collect();
    let mut saved = Vec::new();
    let mut stats = [Stats::default(); 2];
    for (i, pass) in [Pass::Forward, Pass::Backward].into_iter().enumerate() {
        let plan = Plan::new(problem, rank, pass, options);
        let layout = layout(&plan);
        let offsets: Vec<usize> =
            plan.slots.iter().map(|s| layout.get(&s.slot).copied().unwrap_or(0)).collect();
        // Poisoned with NaNs: what a plan does not write must not matter.
        let mut workspace = vec![u8::MAX; workspace_bytes(&plan) + ALIGN];
        if i == 0 {
            saved = vec![u8::MAX; saved_bytes(&plan) + ALIGN];
        }
        let aligned = |v: &mut Vec<u8>| v.as_mut_ptr().wrapping_add(v.as_ptr().align_offset(ALIGN));
        let memory = Memory {
            caller: &views,
            offsets: &offsets,
            workspace: aligned(&mut workspace),
            saved: aligned(&mut saved),
        };
        let link = transport.as_mut().map(|t| Link {
            transport: &mut **t,
            members: &members,
            timeout: Duration::from_secs(60),
        });
        // SAFETY: the buffers above live until the end of this iteration or longer, and have the plan's sizes.
        stats[i] = unsafe { exec::run(&plan, &memory, &mut cpu, link, &mut Scratch::default())? };
    }
    Ok((tensors, stats))
}

fn shape(p: &Problem, tensor: Tensor) -> (usize, usize) {
    let heads = if tensor.key_side() { p.kv_heads } else { p.heads };
    let dim = match tensor {
        Tensor::Q | Tensor::K | Tensor::DQ | Tensor::DK => p.dim_qk,
        Tensor::Lse => 1,
        _ => p.dim_v,
    };
    (heads as usize, dim as usize)
}

/// Runs forward and backward on all ranks and gathers what they wrote.
pub fn run(problem: &Problem, how: How, global: &Global) -> Results {
    problem.validate().unwrap();
    let problem = Arc::new(problem.clone());
    let p = &*problem;
    let group = context_parallel::transport::local::local_group(p.ranks);
    let all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = group
            .into_iter()
            .enumerate()
            .map(|(r, t)| {
                let problem = &problem;
                scope.spawn(move || {
                    let t = match how.delay {
                        Some(seed) => delay(t, seed + r as u64),
                        None => t,
                    };
                    rank(problem, r as u32, how, global, Some(t))
                        .unwrap_or_else(|e| panic!("rank {r}: {e}"))
                })
            })
            .collect();
        // Views hold raw pointers, so the tensors themselves are not sent between threads; they are read here after the join.
        threads.into_iter().map(|t| t.join().expect("a rank panicked")).collect()
    });
    let mut out =
        Results { stats: all.iter().map(|(_, stats)| *stats).collect(), ..Results::default() };
    for tensor in [Tensor::Out, Tensor::Lse, Tensor::DQ, Tensor::DK, Tensor::DV] {
        let side = if tensor.key_side() { Side::Key } else { Side::Query };
        let (heads, dim) = shape(p, tensor);
        let total: u32 = p.seqs.iter().map(|s| s.extent(side).padded).sum();
        let mut values = vec![f32::NAN; total as usize * heads * dim];
        for (r, (locals, _)) in all.iter().enumerate() {
            let local = &locals.iter().find(|(t, _)| *t == tensor).unwrap().1;
            for (row, token) in tokens(p, r as u32, side).into_iter().enumerate() {
                for head in 0..heads {
                    let at = (token as usize * heads + head) * dim;
                    local.get(row, head, &mut values[at..at + dim]);
                }
            }
        }
        *match tensor {
            Tensor::Out => &mut out.out,
            Tensor::Lse => &mut out.lse,
            Tensor::DQ => &mut out.dq,
            Tensor::DK => &mut out.dk,
            _ => &mut out.dv,
        } = values;
    }
    out
}

// SAFETY: a `Local` owns what its view points to.
unsafe impl Send for Local {}
