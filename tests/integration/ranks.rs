//! N ranks as threads of this process: deal global tensors out, run plans, collect what every rank wrote.
//!
//! Every run proves more than its results: inputs keep their bits, nothing is written between the rows of a strided tensor or beyond
//! the workspace and the saved buffer, all memory starts as NaNs, and the bytes that moved are those of the account.

use crate::oracle::{Inputs, Results, SEED, number};
use context_parallel::backend::View;
use context_parallel::backend::cpu::{Cpu, Simd};
use context_parallel::dtype::DType;
use context_parallel::exec::{self, Dropout, Link, Memory, Scratch};
use context_parallel::holding::{holding, tokens};
use context_parallel::partition::Side;
use context_parallel::plan::account::{ALIGN, account, layout, saved_bytes, workspace_bytes};
use context_parallel::plan::{Options, Pass, Plan, Tensor};
use context_parallel::problem::Problem;
use context_parallel::score::{Reach, Seed};
use context_parallel::transport::Transport;
use context_parallel::transport::delay::delay;
use context_parallel::transport::local::local_group;
use half::{bf16, f16};
use std::sync::Arc;
use std::time::Duration;

/// How a rank's `[batch, seq, heads, dim]` lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// bshd, thd.
    Dense,
    /// sbhd.
    SeqFirst,
    /// bhsd: rows are not dense.
    HeadsFirst,
    /// bshd with unused elements after every row, as in a slice of a fused tensor.
    Gaps,
}

impl Layout {
    pub const ALL: [Layout; 4] =
        [Layout::Dense, Layout::SeqFirst, Layout::HeadsFirst, Layout::Gaps];
}

/// How ranks run.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Gather K and V rows before sending, though they are dense.
    pub pack: bool,
    /// Forward leaves head-split tensors for backward.
    pub saved: bool,
    pub layout: Layout,
    pub simd: Simd,
    pub threads: usize,
    /// Seed of random transport delays.
    pub delay: Option<u64>,
}

impl Default for How {
    fn default() -> How {
        How {
            pack: false,
            saved: false,
            layout: Layout::Dense,
            simd: Simd::detect(),
            threads: 1,
            delay: None,
        }
    }
}

/// A rank's tensor in storage type. All bytes start as 0xFF, NaN in every type, so that what nobody writes is seen.
pub struct Local {
    pub bytes: Vec<u64>,
    pub view: View,
    /// `[batch, seq, heads, dim]`.
    pub shape: [i64; 4],
}

// SAFETY: a `Local` owns what its view points to.
unsafe impl Send for Local {}

impl Local {
    pub fn new(dtype: DType, shape: [usize; 4], layout: Layout) -> Local {
        let [batch, seq, heads, dim] = shape;
        let gap = if layout == Layout::Gaps { 3 * dim } else { 0 };
        let (row, head, entry) = match layout {
            Layout::Dense | Layout::Gaps => (heads * dim + gap, dim, seq * (heads * dim + gap)),
            Layout::SeqFirst => (batch * heads * dim, dim, heads * dim),
            Layout::HeadsFirst => (dim, seq * dim, heads * seq * dim),
        };
        let elements = batch * seq * (heads * dim + gap);
        let mut bytes = vec![u64::MAX; (elements * dtype.size()).div_ceil(8) + 1];
        let view = View {
            ptr: bytes.as_mut_ptr().cast(),
            dtype,
            rows: batch * seq,
            heads,
            dim,
            rows_per_batch: seq.max(1),
            stride_batch: entry,
            stride_row: row,
            stride_head: head,
        };
        Local { bytes, view, shape: shape.map(|n| n as i64) }
    }

    pub fn put(&mut self, row: usize, head: usize, values: &[f32]) {
        let (at, dtype) = (self.view.offset(row, head), self.view.dtype);
        let base: *mut u8 = self.bytes.as_mut_ptr().cast();
        for (i, x) in values.iter().enumerate() {
            // SAFETY: inside the buffer by construction of the view; u64 storage is aligned for every type.
            unsafe {
                match dtype {
                    DType::F32 => base.cast::<f32>().add(at + i).write(*x),
                    DType::Bf16 => base.cast::<bf16>().add(at + i).write(bf16::from_f32(*x)),
                    DType::F16 => base.cast::<f16>().add(at + i).write(f16::from_f32(*x)),
                    DType::Fp8(_) => unreachable!("no tensor is stored so"),
                }
            }
        }
    }

    pub fn get(&self, row: usize, head: usize, values: &mut [f32]) {
        let (at, dtype) = (self.view.offset(row, head), self.view.dtype);
        let base: *const u8 = self.bytes.as_ptr().cast();
        for (i, x) in values.iter_mut().enumerate() {
            // SAFETY: as in `put`.
            *x = unsafe {
                match dtype {
                    DType::F32 => base.cast::<f32>().add(at + i).read(),
                    DType::Bf16 => base.cast::<bf16>().add(at + i).read().to_f32(),
                    DType::F16 => base.cast::<f16>().add(at + i).read().to_f32(),
                    DType::Fp8(_) => unreachable!("no tensor is stored so"),
                }
            };
        }
    }

    /// Elements that belong to no row keep their bits.
    pub fn gaps_untouched(&self) -> bool {
        let v = &self.view;
        let used = v.heads * v.dim;
        let size = v.dtype.size();
        v.stride_row <= used
            || v.stride_head != v.dim
            || v.rows_per_batch * v.stride_row != v.stride_batch
            || (0..v.rows).all(|row| {
                let first = (row * v.stride_row + used) * size;
                let bytes: *const u8 = self.bytes.as_ptr().cast();
                // SAFETY: inside the buffer by construction of the view.
                (first..(row + 1) * v.stride_row * size)
                    .all(|i| unsafe { bytes.add(i).read() } == 0xFF)
            })
    }
}

/// The tensors of a training step.
pub const TENSORS: [Tensor; 20] = [
    Tensor::Q,
    Tensor::K,
    Tensor::V,
    Tensor::Out,
    Tensor::Lse,
    Tensor::DOut,
    Tensor::DQ,
    Tensor::DK,
    Tensor::DV,
    Tensor::Sinks,
    Tensor::DSinks,
    Tensor::MaxLogit,
    Tensor::Bias,
    Tensor::DBias,
    Tensor::Latent,
    Tensor::DLatent,
    Tensor::UpK,
    Tensor::UpV,
    Tensor::DUpK,
    Tensor::DUpV,
];
/// Those that the library writes.
pub const OUTPUTS: [Tensor; 5] = [Tensor::Out, Tensor::Lse, Tensor::DQ, Tensor::DK, Tensor::DV];

fn side(tensor: Tensor) -> Side {
    if tensor.key_side() { Side::Key } else { Side::Query }
}

/// Heads and elements per head.
fn width(p: &Problem, tensor: Tensor) -> (usize, usize) {
    let latent = matches!(tensor, Tensor::Latent | Tensor::DLatent);
    let heads = if latent {
        1
    } else if tensor.key_side() {
        p.kv_heads
    } else {
        p.heads
    };
    let dim = match tensor {
        Tensor::Q | Tensor::K | Tensor::DQ | Tensor::DK => p.dim_qk,
        Tensor::V | Tensor::DV | Tensor::Out | Tensor::DOut => p.dim_v,
        _ if latent => p.latent.map_or(0, |l| l.width()),
        _ if tensor.weights() => p.latent.map_or(0, |l| l.dim),
        _ => 1,
    };
    (heads as usize, dim as usize)
}

/// Has the problem this tensor?
fn asked(p: &Problem, tensor: Tensor) -> bool {
    match tensor {
        Tensor::Sinks | Tensor::DSinks => p.score.sinks.is_some(),
        Tensor::MaxLogit => p.score.max_logit.is_some(),
        Tensor::Bias => p.score.bias.is_some(),
        Tensor::DBias => p.score.bias.is_some_and(|b| b.gradient),
        Tensor::K | Tensor::V | Tensor::DK | Tensor::DV => p.latent.is_none(),
        Tensor::Latent | Tensor::DLatent => p.latent.is_some(),
        _ if tensor.weights() => p.latent.is_some(),
        _ => true,
    }
}

/// All tensors of one rank: inputs dealt out, outputs poisoned.
pub struct Shard(pub Vec<(Tensor, Local)>);

impl Shard {
    pub fn deal(p: &Problem, rank: u32, global: &Inputs, layout: Layout) -> Shard {
        let batch = if p.packed { 1 } else { p.seqs.len() };
        let local = |tensor| {
            let (heads, dim) = width(p, tensor);
            let rows = holding(p, rank, side(tensor)).rows as usize;
            let dtype = if dim == 1 { DType::F32 } else { p.dtype };
            if matches!(tensor, Tensor::Bias | Tensor::DBias) {
                return (tensor, bias(p, rank, global, tensor));
            }
            if tensor.per_head() {
                let mut local = Local::new(dtype, [1, 1, heads, 1], Layout::Dense);
                if tensor == Tensor::Sinks {
                    (0..heads).for_each(|h| local.put(0, h, &global.sinks[h..h + 1]));
                }
                return (tensor, local);
            }
            if tensor.weights() {
                return (tensor, weights(p, global, tensor));
            }
            let mut local = Local::new(dtype, [batch, rows / batch, heads, dim], layout);
            let source = match tensor {
                Tensor::Q => &global.q,
                Tensor::K => &global.k,
                Tensor::V => &global.v,
                Tensor::Latent => &global.latent.rows,
                Tensor::DOut => &global.d_o,
                _ => return (tensor, local),
            };
            for (row, token) in tokens(p, rank, side(tensor)).into_iter().enumerate() {
                for head in 0..heads {
                    let at = (token as usize * heads + head) * dim;
                    local.put(row, head, &source[at..at + dim]);
                }
            }
            (tensor, local)
        };
        Shard(TENSORS.into_iter().filter(|t| asked(p, *t)).map(local).collect())
    }

    pub fn get(&self, tensor: Tensor) -> &Local {
        &self.0.iter().find(|(t, _)| *t == tensor).expect("every tensor is there").1
    }

    pub fn views(&self) -> Vec<(Tensor, View)> {
        self.0.iter().map(|(t, l)| (*t, l.view)).collect()
    }

    /// Bytes of some tensors, to see that they stay.
    pub fn bits(&self, which: &[Tensor]) -> Vec<Vec<u64>> {
        let there = |t: &&Tensor| self.0.iter().any(|(tensor, _)| tensor == *t);
        which.iter().filter(there).map(|t| self.get(*t).bytes.clone()).collect()
    }
}

/// Up-projection weights `[heads, n, dim]`, or the place for their gradient.
fn weights(p: &Problem, global: &Inputs, tensor: Tensor) -> Local {
    let (heads, dim) = width(p, tensor);
    let n = Plan::weight_rows(p, tensor) as usize;
    let gradient = matches!(tensor, Tensor::DUpK | Tensor::DUpV);
    let dtype = if gradient { DType::F32 } else { p.dtype };
    let mut local = Local::new(dtype, [1, n, heads, dim], Layout::HeadsFirst);
    let values = match tensor {
        Tensor::UpK => &global.latent.up_k,
        Tensor::UpV => &global.latent.up_v,
        _ => return local,
    };
    for (row, head) in (0..n).flat_map(|row| (0..heads).map(move |h| (row, h))) {
        local.put(row, head, &values[(head * n + row) * dim..][..dim]);
    }
    local
}

/// [batch, heads, queries, keys] of the global bias, and of a rank's.
fn bias_dims(p: &Problem, rank: u32) -> [[usize; 4]; 2] {
    let Some(b) = p.score.bias else { return [[0; 4], [1; 4]] };
    let batch = if p.packed { 1 } else { p.seqs.len() };
    let padded: Vec<usize> = p.seqs.iter().map(|s| s.q.padded as usize).collect();
    let whole = if p.packed { padded.iter().sum() } else { padded[0] };
    let local = holding(p, rank, Side::Query).rows as usize / batch;
    let or_1 = |there, n| if there { n } else { 1 };
    [whole, local].map(|queries| {
        let heads = or_1(b.heads, p.heads as usize);
        [or_1(b.batch, batch), heads, or_1(b.queries, queries), p.bias_columns() as usize]
    })
}

/// Calls `f(entry, head, local row, element of the global bias)` for every row of a rank's bias.
fn bias_rows(p: &Problem, rank: u32, mut f: impl FnMut(usize, usize, usize, usize)) {
    let [[_, heads, queries, keys], [batch, _, local, _]] = bias_dims(p, rank);
    let tokens = tokens(p, rank, Side::Query);
    let rows = tokens.len() / if p.packed { 1 } else { p.seqs.len() };
    for entry in 0..batch {
        for head in 0..heads {
            for row in 0..local {
                let position = match (queries, p.packed) {
                    (1, _) => 0,
                    (_, true) => tokens[row] as usize,
                    _ => tokens[entry * rows + row] as usize - entry * p.seqs[0].q.padded as usize,
                };
                f(entry, head, row, ((entry * heads + head) * queries + position) * keys);
            }
        }
    }
}

/// A rank's bias, or the place for its gradient: `[batch, heads, queries, keys]` in memory, what is for all once.
fn bias(p: &Problem, rank: u32, global: &Inputs, tensor: Tensor) -> Local {
    let [_, [batch, heads, queries, keys]] = bias_dims(p, rank);
    let mut local = Local::new(p.dtype, [batch, queries, heads, keys], Layout::HeadsFirst);
    if p.score.bias.is_none() || tensor == Tensor::DBias {
        return local;
    }
    bias_rows(p, rank, |entry, head, row, at| {
        local.put(entry * queries + row, head, &global.bias[at..at + keys]);
    });
    let rows = holding(p, rank, Side::Query).rows as usize;
    let entries = if p.packed { 1 } else { p.seqs.len() };
    local.view.rows = rows;
    local.view.rows_per_batch = (rows / entries).max(1);
    local.view.stride_batch *= usize::from(batch > 1);
    local.view.stride_row *= usize::from(p.score.bias.is_some_and(|b| b.queries));
    local
}

/// What all ranks wrote, as global tensors.
pub fn collect(p: &Problem, shards: &[Shard]) -> Results<f32> {
    let one = |tensor| {
        if !asked(p, tensor) {
            return Vec::new();
        }
        let (heads, dim) = width(p, tensor);
        let total: u32 = p.seqs.iter().map(|s| s.extent(side(tensor)).padded).sum();
        let mut values = vec![f32::NAN; total as usize * heads * dim];
        for (rank, shard) in shards.iter().enumerate() {
            let local = shard.get(tensor);
            for (row, token) in tokens(p, rank as u32, side(tensor)).into_iter().enumerate() {
                for head in 0..heads {
                    let at = (token as usize * heads + head) * dim;
                    local.get(row, head, &mut values[at..at + dim]);
                }
            }
        }
        values
    };
    let [o, lse, dq, dk, dv] = OUTPUTS.map(one);
    let numbers = |tensor, reach: Option<Reach>, both: fn(f32, f32) -> f32| {
        if reach.is_none() {
            return Vec::new();
        }
        let of = |shard: &Shard| {
            let mut values = vec![f32::NAN; p.heads as usize];
            (0..values.len()).for_each(|h| shard.get(tensor).get(0, h, &mut values[h..h + 1]));
            values
        };
        let all: Vec<Vec<f32>> = shards.iter().map(of).collect();
        match reach {
            None => Vec::new(),
            Some(Reach::Group) => {
                assert!(
                    all.iter().all(|x| x == &all[0]),
                    "{tensor:?} differs between ranks: {all:?}"
                );
                all[0].clone()
            }
            Some(Reach::Rank) => (0..all[0].len())
                .map(|h| all.iter().map(|x| x[h]).reduce(both).expect("a rank"))
                .collect(),
        }
    };
    let d_sinks = numbers(Tensor::DSinks, p.score.sinks, |a, b| a + b);
    let max_logit = numbers(Tensor::MaxLogit, p.score.max_logit, f32::max);
    let mut d_bias = Vec::new();
    if p.score.bias.is_some_and(|b| b.gradient) {
        d_bias = vec![f32::NAN; bias_dims(p, 0)[0].iter().product()];
        for (rank, shard) in shards.iter().enumerate() {
            let [_, [_, _, queries, keys]] = bias_dims(p, rank as u32);
            let local = shard.get(Tensor::DBias);
            bias_rows(p, rank as u32, |entry, head, row, at| {
                local.get(entry * queries + row, head, &mut d_bias[at..at + keys]);
            });
        }
    }
    // Every rank has its part.
    let parts = |tensor| {
        if !asked(p, tensor) {
            return Vec::new();
        }
        let ((heads, dim), n) = (width(p, tensor), Plan::weight_rows(p, tensor) as usize);
        let mut sum = vec![0.0; heads * n * dim];
        let mut part = vec![f32::NAN; dim];
        for shard in shards {
            for (at, sum) in sum.chunks_exact_mut(dim).enumerate() {
                shard.get(tensor).get(at % n, at / n, &mut part);
                sum.iter_mut().zip(&part).for_each(|(s, x)| *s += x);
            }
        }
        sum
    };
    let d_latent = one(Tensor::DLatent);
    let (d_up_k, d_up_v) = (parts(Tensor::DUpK), parts(Tensor::DUpV));
    Results { o, lse, dq, dk, dv, d_sinks, max_logit, d_bias, d_latent, d_up_k, d_up_v }
}

/// Memory that must not be written beyond its end. Starts as NaNs.
pub struct Fenced {
    bytes: Vec<u8>,
    len: usize,
}

impl Fenced {
    pub fn new(len: usize) -> Fenced {
        Fenced { bytes: vec![u8::MAX; len + 2 * ALIGN], len }
    }

    pub fn ptr(&mut self) -> *mut u8 {
        let at = self.bytes.as_ptr().align_offset(ALIGN);
        // SAFETY: there are ALIGN bytes more than needed at either end.
        unsafe { self.bytes.as_mut_ptr().add(at) }
    }

    pub fn intact(&self) -> bool {
        let end = self.bytes.as_ptr().align_offset(ALIGN) + self.len;
        self.bytes[end..].iter().all(|b| *b == u8::MAX)
    }
}

/// One rank's forward and backward.
fn rank(
    problem: &Arc<Problem>,
    rank: u32,
    how: How,
    global: &Inputs,
    mut transport: Box<dyn Transport>,
) -> Result<Shard, String> {
    let shard = Shard::deal(problem, rank, global, how.layout);
    let cargo: &[Tensor] = match problem.latent {
        Some(_) => &[Tensor::Latent],
        None => &[Tensor::K, Tensor::V],
    };
    let dense = cargo.iter().all(|t| shard.get(*t).view.is_dense());
    let pack = how.pack || !dense;
    let options = Options { pack, saved: how.saved, same_pieces: false };
    let mut cpu = Cpu::new(how.threads, how.simd).map_err(|e| e.to_string())?;
    let views = shard.views();
    let members: Vec<u32> = (0..problem.ranks).collect();
    let mut saved = None;
    let mut scratch = Scratch::default();
    for pass in [Pass::Forward, Pass::Backward] {
        let plan = Plan::new(problem, rank, pass, options);
        let layout = layout(&plan);
        let offsets: Vec<usize> =
            plan.slots.iter().map(|s| layout.get(&s.slot).copied().unwrap_or(0)).collect();
        let mut workspace = Fenced::new(workspace_bytes(&plan));
        let saved = saved.get_or_insert_with(|| Fenced::new(saved_bytes(&plan)));
        let ids: Vec<u32> = (0..problem.seqs.len()).map(number).collect();
        let memory = Memory {
            dropout: Dropout { seed: Seed::Value(SEED), ids: &ids },
            caller: &views,
            offsets: &offsets,
            workspace: workspace.ptr(),
            saved: saved.ptr(),
        };
        let link = Link {
            transport: &mut *transport,
            members: &members,
            timeout: Duration::from_secs(60),
        };
        use Tensor::{DOut, K, Latent, Q, Sinks, UpK, UpV, V};
        let mut inputs = vec![Q, K, V, DOut, Sinks, Latent, UpK, UpV];
        if pass == Pass::Backward {
            inputs.extend([Tensor::Out, Tensor::Lse]);
        }
        let before = shard.bits(&inputs);
        // SAFETY: the buffers above live until the end of this iteration or longer, and have the plan's sizes.
        let stats = unsafe { exec::run(&plan, &memory, &mut cpu, Some(link), &mut scratch) }
            .map_err(|e| format!("{pass:?}: {e}"))?;
        let want = account(&plan);
        if (stats.sent, stats.received) != (want.sent, want.received) {
            return Err(format!(
                "{pass:?}: sent {} and received {} bytes, the account says {} and {}",
                stats.sent, stats.received, want.sent, want.received
            ));
        }
        if before != shard.bits(&inputs) {
            return Err(format!("{pass:?}: an input was written to"));
        }
        if let Some((t, _)) = shard.0.iter().find(|(_, l)| !l.gaps_untouched()) {
            return Err(format!("{pass:?}: written between the rows of {t:?}"));
        }
        if !workspace.intact() || !saved.intact() {
            return Err(format!("{pass:?}: written beyond the workspace or the saved buffer"));
        }
    }
    Ok(shard)
}

/// Runs every member of a group on a thread of its own. A rank that fails takes others along that wait for it, so of several errors
/// those that are not only the loss of a peer are returned.
pub fn on_threads<T: Send>(
    group: Vec<Box<dyn Transport>>,
    body: impl Fn(u32, Box<dyn Transport>) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let results: Vec<Result<T, String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = group
            .into_iter()
            .enumerate()
            .map(|(r, t)| {
                let body = &body;
                scope.spawn(move || body(r as u32, t))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|e| Err(panic_text(&*e)))).collect()
    });
    let mut errors: Vec<String> = results
        .iter()
        .enumerate()
        .filter_map(|(r, x)| x.as_ref().err().map(|e| format!("rank {r}: {e}")))
        .collect();
    if errors.is_empty() {
        return Ok(results.into_iter().flatten().collect());
    }
    if errors.iter().any(|e| !e.contains("peer lost")) {
        errors.retain(|e| !e.contains("peer lost"));
    }
    errors.truncate(3);
    Err(errors.join("; "))
}

/// What a panic said.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let text = text.or(payload.downcast_ref::<&str>().copied());
    format!("panic: {}", text.unwrap_or("?"))
}

/// Forward and backward on all ranks; what they wrote, or what went wrong.
pub fn run(problem: &Problem, how: How, global: &Inputs) -> Result<Results<f32>, String> {
    shards(problem, how, global).map(|shards| collect(problem, &shards))
}

/// The same, rank by rank.
pub fn shards(problem: &Problem, how: How, global: &Inputs) -> Result<Vec<Shard>, String> {
    problem.validate().map_err(|e| e.to_string())?;
    let problem = Arc::new(problem.clone());
    on_threads(local_group(problem.ranks), |r, t| {
        let t = match how.delay {
            Some(seed) => delay(t, seed + u64::from(r)),
            None => t,
        };
        rank(&problem, r, how, global, t)
    })
}
