//! What one rank does: its rows of Q, K, V and dO, forward, backward, and a report. The same for threads, processes, and one rank alone.

use crate::place::{Mirror, Place};
use crate::report::{RESULTS, Report};
use crate::shape::Case;
use crate::source::Source;
use context_parallel::attention::Args;
use context_parallel::backend::View;
use context_parallel::dtype::DType;
use context_parallel::error::Result;
use context_parallel::group::Group;
use context_parallel::holding::{holding, tokens};
use context_parallel::partition::Side;
use context_parallel::plan::Tensor;
use context_parallel::problem::Problem;
use context_parallel::score::Seed;
use half::{bf16, f16};
use std::time::{Duration, Instant};

/// What every rank runs, case after case.
pub struct Job {
    pub cases: Vec<Case>,
    pub ranks: u32,
    pub source: Source,
    /// Of every rank.
    pub threads: usize,
    /// Untimed runs first.
    pub warmup: usize,
    pub iters: usize,
    /// Report the results, not only the times.
    pub gather: bool,
    /// How long a rank waits for another.
    pub timeout: Duration,
    pub place: Place,
}

/// Elements per row of a tensor: heads and their size.
pub fn shape(p: &Problem, tensor: Tensor) -> (usize, usize) {
    let heads = if tensor.key_side() { p.kv_heads } else { p.heads };
    let dim = match tensor {
        Tensor::Q | Tensor::K | Tensor::DQ | Tensor::DK => p.dim_qk,
        Tensor::Lse => 1,
        _ => p.dim_v,
    };
    (heads as usize, dim as usize)
}

/// Which tokens a tensor has rows for.
pub fn side(tensor: Tensor) -> Side {
    if tensor.key_side() { Side::Key } else { Side::Query }
}

/// Storage type of a tensor.
pub fn dtype(p: &Problem, tensor: Tensor) -> DType {
    if tensor == Tensor::Lse { DType::F32 } else { p.dtype }
}

/// A local tensor, `[rows, heads, dim]` without gaps.
struct Local {
    tensor: Tensor,
    storage: Vec<u64>,
    view: View,
}

impl Local {
    /// Filled with NaN, so that what nobody writes is seen.
    fn new(p: &Problem, rank: u32, tensor: Tensor) -> Local {
        let rows = holding(p, rank, side(tensor)).rows as usize;
        let ((heads, dim), dtype) = (shape(p, tensor), dtype(p, tensor));
        let mut storage = vec![u64::MAX; (rows * heads * dim * dtype.size()).div_ceil(8)];
        let view = View::dense(storage.as_mut_ptr().cast(), dtype, rows, heads, dim);
        Local { tensor, storage, view }
    }

    fn bytes(&self) -> usize {
        self.view.rows * self.view.heads * self.view.dim * self.view.dtype.size()
    }

    fn fill(&mut self, p: &Problem, rank: u32, source: &Source) {
        let (heads, dim, dtype) = (self.view.heads, self.view.dim, self.view.dtype);
        let mut values = vec![0.0; dim];
        let mut bytes = Vec::with_capacity(self.bytes());
        for token in tokens(p, rank, side(self.tensor)) {
            for head in 0..heads {
                source.fill(p, self.tensor, token, head as u32, &mut values);
                for x in &values {
                    match dtype {
                        DType::F32 => bytes.extend_from_slice(&x.to_ne_bytes()),
                        DType::Bf16 => bytes.extend_from_slice(&bf16::from_f32(*x).to_ne_bytes()),
                        DType::F16 => bytes.extend_from_slice(&f16::from_f32(*x).to_ne_bytes()),
                        DType::Fp8(_) => unreachable!("no tensor is stored so"),
                    }
                }
            }
        }
        for (word, chunk) in self.storage.iter_mut().zip(bytes.chunks(8)) {
            let mut eight = [0; 8];
            eight[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(eight);
        }
        self.view.ptr = self.storage.as_mut_ptr().cast();
    }

    fn read(&self) -> Vec<u8> {
        let bytes = self.storage.iter().flat_map(|w| w.to_ne_bytes());
        bytes.take(self.bytes()).collect()
    }
}

/// Runs all cases. `each` gets every report and returns when the next case may begin.
pub fn run(job: &Job, group: &Group, each: &mut dyn FnMut(Report) -> Result<()>) -> Result<()> {
    job.cases.iter().try_for_each(|case| each(one(job, case, group)?))
}

fn one(job: &Job, case: &Case, group: &Group) -> Result<Report> {
    let mut layer = job.place.layer(group, &case.config, job.threads)?;
    layer.set_group(group, Ok(case.comm))?;
    let problem = layer.problem_within(&case.seqs, None, &case.regions)?;
    let (p, rank) = (&*problem, group.rank());
    let inputs = [Tensor::Q, Tensor::K, Tensor::V, Tensor::DOut];
    let mut locals: Vec<Local> =
        inputs.iter().chain(&RESULTS).map(|t| Local::new(p, rank, *t)).collect();
    locals[..inputs.len()].iter_mut().for_each(|l| l.fill(p, rank, &job.source));
    let mirror = match group.device() {
        Some(device) => {
            let tensors: Vec<&[u64]> = locals.iter().map(|l| l.storage.as_slice()).collect();
            Some(Mirror::new(device, &tensors)?)
        }
        None => None,
    };
    let view = |(index, local): (usize, &Local)| {
        let ptr = mirror.as_ref().map_or(local.view.ptr, |m| m.ptr(index));
        (local.tensor, View { ptr, ..local.view })
    };
    let args = || {
        let batch = if p.packed { 1 } else { p.seqs.len() };
        let shape =
            |l: &Local| [batch, l.view.rows / batch, l.view.heads, l.view.dim].map(|n| n as i64);
        Args {
            seed: Seed::default(),
            ids: Vec::new(),
            seqs: case.seqs.clone(),
            regions: case.regions.clone(),
            list: None,
            views: locals.iter().enumerate().map(view).collect(),
            shapes: locals.iter().map(|l| (l.tensor, shape(l))).collect(),
            workspace: None,
            saved: None,
            stream: mirror.as_ref().map_or(std::ptr::null_mut(), |m| m.stream()),
        }
    };
    let mut report = Report::default();
    for run in 0..job.warmup + job.iters {
        let mut context = None;
        for (pass, out) in report.passes.iter_mut().enumerate() {
            group.barrier()?;
            let (before, start) = (group.stats(), Instant::now());
            match &context {
                // SAFETY: the views lie in `locals`, which is neither moved nor touched until the call returns.
                None => context = Some(unsafe { layer.forward(Ok(args()))? }),
                // SAFETY: as above.
                Some(context) => unsafe { layer.backward(Ok(*context), Ok(args()))? },
            }
            mirror.as_ref().map_or(Ok(()), |m| m.finish())?;
            let (seconds, after) = (start.elapsed().as_secs_f64(), group.stats());
            debug_assert!(pass < 2);
            out.sent = after.sent - before.sent;
            out.received = after.received - before.received;
            if run >= job.warmup {
                out.seconds.push(seconds);
                out.exposed += (after.exposed_ns - before.exposed_ns) as f64 * 1e-9;
            }
        }
    }
    if let Some(mirror) = &mirror {
        for (index, local) in locals.iter_mut().enumerate() {
            mirror.read(index, &mut local.storage)?;
        }
    }
    if job.gather {
        report.results = locals[inputs.len()..].iter().map(Local::read).collect();
    }
    let memory = [layer.workspace_held(), layer.kernel_bytes(), group.transport_bytes()];
    report.memory = memory.map(|n| n as u64);
    Ok(report)
}

/// Runs the cases on one rank, in this thread, with this many threads.
pub fn alone(job: &Job, case: &Case, threads: usize) -> Result<Report> {
    let job = Job {
        cases: Vec::new(),
        source: match &job.source {
            Source::Text(text) => Source::Text(text.clone()),
            Source::Random => Source::Random,
        },
        threads,
        ..*job
    };
    let comm = context_parallel::attention::Comm::of(context_parallel::problem::CommType::P2p);
    one(&job, &Case { comm, ..case.clone() }, &job.place.solo()?)
}
