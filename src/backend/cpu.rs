//! The CPU backend: blocked attention with online softmax, forward and backward, on the calling thread and a small pool.
//!
//! ```text
//! cpu.rs       tasks to threads           tile.rs     slices to tiles, rows to operands
//! forward.rs   one tile of queries        kernels.rs  what an instruction set must provide
//! backward.rs  one block of keys          scalar.rs, simd_avx2.rs, simd_avx512.rs provide it
//! rows.rs      copies and row sums        pool.rs     parked threads
//! effects.rs   scores beyond scale·q·k    fp8.rs      rows as they travel
//! latent.rs    keys and values from latents, and back
//! ```

mod backward;
mod effects;
mod forward;
mod fp8;
mod kernels;
mod latent;
mod pool;
mod rows;
mod scalar;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_avx2;
#[cfg(target_arch = "x86_64")]
mod simd_avx512;
mod tile;

use super::{
    Backward, Contract, CopyRows, Delta, Expand, Forward, HeadMap, Progress, Reduce, SinkTerms,
    View,
};
use crate::error::{Error, Result};
use kernels::Kernels;
pub use simd::Simd;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// A cache line of scratch.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u32; 16]);

/// What a thread needs for a task. Grows to the largest task it has seen and is then reused.
#[derive(Default)]
struct Scratch {
    lines: Vec<Line>,
    groups: tile::Groups,
}

impl Scratch {
    /// Buffers of these many units, each aligned to a cache line.
    fn units_and_groups<const N: usize>(
        &mut self,
        sizes: [usize; N],
    ) -> ([*mut u32; N], &mut tile::Groups) {
        let lines = |units: usize| units.div_ceil(16) + 1;
        let total = sizes.iter().map(|&s| lines(s)).sum();
        if self.lines.len() < total {
            self.lines.reserve_exact(total - self.lines.len());
            self.lines.resize(total, Line([0; 16]));
        }
        let mut at = self.lines.as_mut_ptr();
        let buffers = sizes.map(|size| {
            let buffer = at.cast::<u32>();
            at = at.wrapping_add(lines(size));
            buffer
        });
        (buffers, &mut self.groups)
    }
}

/// A task by number, with its thread's scratch and a function that says whether to go on.
type TaskFn<'a> = dyn Fn(usize, &mut Scratch, &mut dyn FnMut() -> bool) + Sync + 'a;

/// Lets a step with raw pointers be seen by the worker threads.
struct Shared<T>(T);

// SAFETY: the caller of `Cpu::forward` and `Cpu::backward` promises that the memory behind the views is valid and not accessed by
// others during the call; tasks write disjoint parts of it, or take turns.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    // A method, so that closures capture the whole and not the pointers inside.
    fn get(&self) -> &T {
        &self.0
    }
}

/// Carries out compute steps on the CPU. One per executing thread of the caller; it may move between threads, but is not shared.
///
/// Results have the same bits for any number of threads. Scratch memory grows at the first steps of a new shape and is reused.
pub struct Cpu {
    simd: Simd,
    pool: pool::Pool,
    scratch: Vec<Mutex<Scratch>>,
    tiling: tile::Tiling,
    turns: Vec<AtomicU32>,
    places: effects::Places,
    /// Blocks of rows that are expanded or contracted.
    blocks: Vec<Range<usize>>,
}

impl Cpu {
    /// A backend that uses `threads` threads, the calling one included, and the given instruction set.
    ///
    /// Fails with `InvalidArgument` when `threads` is 0, with `Unsupported` when this CPU lacks the instruction set, and with
    /// `OutOfMemory` when the threads cannot be started.
    pub fn new(threads: usize, simd: Simd) -> Result<Cpu> {
        if threads == 0 {
            return Err(Error::argument("threads: got 0, need at least 1 (the calling thread)"));
        }
        simd.require()?;
        let pool = pool::Pool::new(threads - 1).map_err(|e| {
            let text = format!("threads: cannot start {} worker threads: {e}", threads - 1);
            Error::new(crate::error::Status::OutOfMemory, text)
        })?;
        let scratch = (0..threads).map(|_| Mutex::default()).collect();
        Ok(Cpu {
            simd,
            pool,
            scratch,
            tiling: tile::Tiling::default(),
            turns: Vec::new(),
            places: effects::Places::default(),
            blocks: Vec::new(),
        })
    }

    /// The instruction set in use.
    pub fn simd(&self) -> Simd {
        self.simd
    }

    /// Number of threads, the calling one included.
    pub fn threads(&self) -> usize {
        self.scratch.len()
    }

    /// Bytes of scratch held by now, all threads together.
    pub fn scratch_bytes(&mut self) -> usize {
        let of = |s: &mut Mutex<Scratch>| {
            let s = s.get_mut().unwrap_or_else(PoisonError::into_inner);
            s.lines.capacity() * size_of::<Line>() + s.groups.bytes()
        };
        let threads: usize = self.scratch.iter_mut().map(of).sum();
        threads
            + self.places.bytes()
            + self.tiling.bytes()
            + self.turns.capacity() * size_of::<AtomicU32>()
            + self.blocks.capacity() * size_of::<Range<usize>>()
    }

    /// One forward attend step. `progress` is called on this thread every few hundred microseconds; its error stops the step
    /// and is returned, and then what the step writes is undefined.
    ///
    /// # Safety
    /// Every view of `step` points to memory that is valid for its shape and aligned for its type; what is written is not
    /// accessed by others meanwhile, and not by another view of the step.
    pub unsafe fn forward(&mut self, step: &Forward, progress: Progress) -> Result<()> {
        check_shapes(&step.q, &step.k, &step.v, step.heads)?;
        if step.state.is_none() && !(step.first && step.last.is_some()) {
            return Err(Error::internal("forward step without state is not first and last"));
        }
        let (rows, heads) = (step.q.rows, step.q.heads);
        if rows == 0 || heads == 0 {
            return Ok(());
        }
        let mut tiling = std::mem::take(&mut self.tiling);
        tiling.build(step.slices, rows, step.k.rows, heads.min(step.heads.group as usize));
        let kernels = Kernels::of(self.simd, step.q.dtype);
        let mut places = std::mem::take(&mut self.places);
        let beyond = step.effects.as_ref().map(|effects| {
            places.build(effects, rows, step.k.rows);
            (effects::Formula::new(effects, step.scale, self.simd), &places)
        });
        let task = Shared(forward::Task { step, kernels, tiling: &tiling, beyond });
        let (first, last) = (step.heads.kv_of(0), step.heads.kv_of(heads - 1));
        let kv_heads = last + 1 - first;
        let result =
            self.parallel(tiling.tiles * kv_heads, false, progress, &|i, scratch, tick| {
                // Last tiles first: under a causal mask they are the long ones.
                let (tile, kv) = (tiling.tiles - 1 - i / kv_heads, first + i % kv_heads);
                // SAFETY: the caller's promise; every (tile, key head) is one task.
                unsafe { task.get().run(tile, kv, scratch, tick) }
            });
        (self.tiling, self.places) = (tiling, places);
        result
    }

    /// One backward attend step: adds to `dq`, `dk`, `dv`. `progress` as in [`Cpu::forward`].
    ///
    /// # Safety
    /// As for [`Cpu::forward`].
    pub unsafe fn backward(&mut self, step: &Backward, progress: Progress) -> Result<()> {
        check_shapes(&step.q, &step.k, &step.v, step.heads)?;
        let (rows, heads) = (step.q.rows, step.q.heads);
        if rows == 0 || heads == 0 || step.slices.is_empty() {
            return Ok(());
        }
        let mut tiling = std::mem::take(&mut self.tiling);
        tiling.build(step.slices, rows, step.k.rows, heads.min(step.heads.group as usize));
        tiling.build_blocks(step.k.rows);
        let (first, last) = (step.heads.kv_of(0), step.heads.kv_of(heads - 1));
        let kv_heads = last + 1 - first;
        let mut turns = std::mem::take(&mut self.turns);
        turns.clear();
        turns.resize_with(tiling.tiles * (last + 1), AtomicU32::default);
        let kernels = Kernels::of(self.simd, step.q.dtype);
        let mut places = std::mem::take(&mut self.places);
        let beyond = step.effects.as_ref().filter(|e| e.score.changes()).map(|effects| {
            places.build(effects, rows, step.k.rows);
            (effects::Formula::new(effects, step.scale, self.simd), &places)
        });
        let task = Shared(backward::Task { step, kernels, tiling: &tiling, turns: &turns, beyond });
        let blocks = step.k.rows.div_ceil(tile::KEYS);
        // A gradient of the bias that heads share has an order of adding only if there is one thread.
        let d_bias = step.effects.as_ref().and_then(|e| e.d_bias);
        let alone = d_bias.is_some_and(|view| view.heads == 1) && kv_heads > 1;
        let result = self.parallel(blocks * kv_heads, alone, progress, &|i, scratch, tick| {
            // Blocks ascend, so that whoever waits for its turn waits for a task that someone has begun.
            let (block, kv) = (i / kv_heads, first + i % kv_heads);
            // SAFETY: the caller's promise; every (block, key head) is one task.
            unsafe { task.get().run(block, kv, scratch, tick) }
        });
        (self.tiling, self.turns, self.places) = (tiling, turns, places);
        result
    }

    /// Keys and values from latents. `progress` as in [`Cpu::forward`].
    ///
    /// # Safety
    /// As for [`Cpu::forward`].
    pub unsafe fn expand(&mut self, step: &Expand, progress: Progress) -> Result<()> {
        let mut blocks = std::mem::take(&mut self.blocks);
        latent::blocks(step.rows, &mut blocks);
        let kernels = Kernels::of(self.simd, step.latent.dtype);
        let work = Shared(latent::Expansion { step, kernels, blocks: &blocks });
        let result = self.parallel(work.get().tasks(), false, progress, &|i, scratch, _| {
            // SAFETY: the caller's promise; every (block, head) is one task.
            unsafe { work.get().run(i, scratch) }
        });
        self.blocks = blocks;
        result
    }

    /// Gradients of latents and of weights from those of keys and values. `progress` as in [`Cpu::forward`].
    ///
    /// # Safety
    /// As for [`Cpu::forward`].
    pub unsafe fn contract(&mut self, step: &Contract, progress: Progress) -> Result<()> {
        let mut blocks = std::mem::take(&mut self.blocks);
        latent::blocks(step.rows, &mut blocks);
        let kernels = Kernels::of(self.simd, step.latent.dtype);
        let work = Shared(latent::Contraction { step, kernels, blocks: &blocks });
        let result = self.parallel(work.get().tasks(), false, progress, &|i, scratch, tick| {
            // SAFETY: the caller's promise; the weights of a head, and every block, are one task.
            unsafe { work.get().run(i, scratch, tick) }
        });
        self.blocks = blocks;
        result
    }

    /// Row sums of O∘dO.
    ///
    /// # Safety
    /// As for [`Cpu::forward`].
    pub unsafe fn delta(&mut self, step: &Delta) {
        // SAFETY: the caller's promise is passed on.
        unsafe { rows::delta(step, Kernels::of(self.simd, step.out.dtype)) }
    }

    /// What rows add to the gradients of sinks.
    ///
    /// # Safety
    /// As for [`Cpu::forward`].
    pub unsafe fn sink_terms(&mut self, step: &SinkTerms) {
        // SAFETY: the caller's promise is passed on.
        unsafe { rows::sink_terms(step) }
    }

    /// Sums, or largest numbers, of heads.
    ///
    /// # Safety
    /// As for [`Cpu::forward`]; source and destination do not overlap.
    pub unsafe fn reduce(&mut self, step: &Reduce) {
        // SAFETY: the caller's promise is passed on.
        unsafe { rows::reduce(step) }
    }

    /// Copies or adds rows.
    ///
    /// # Safety
    /// As for [`Cpu::forward`]; source and destination do not overlap, and no destination row is named twice.
    pub unsafe fn copy_rows(&mut self, step: &CopyRows) {
        // SAFETY: the caller's promise is passed on.
        unsafe { rows::copy(step, Kernels::of(self.simd, step.src.dtype)) }
    }

    /// Hands out tasks 0, 1, … to the threads. A task gets its thread's scratch and a function to call often, which says
    /// whether to go on; on this thread it calls `progress`. `alone`: all on this thread, in order.
    fn parallel(&self, tasks: usize, alone: bool, progress: Progress, task: &TaskFn) -> Result<()> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let work = |thread: usize, tick: &mut dyn FnMut() -> bool| {
            // Whoever panics stops the others too: they may be waiting for their turn after it.
            let guard = StopOnPanic(&stop);
            let mut scratch = self.scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks || !tick() {
                    break;
                }
                task(i, &mut scratch, tick);
            }
            drop(guard);
        };
        let go_on = || !stop.load(Ordering::Relaxed);
        let mut result = Ok(());
        let mut call = || {
            if result.is_ok() {
                result = progress();
                if result.is_err() {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        };
        let mut tick = || {
            call();
            go_on()
        };
        if self.scratch.len() == 1 || tasks <= 1 || alone {
            work(0, &mut tick);
        } else {
            let worker = |thread: usize| work(thread, &mut || go_on());
            let mut waiting = false;
            let mut both = |tick: &mut dyn FnMut() -> bool| {
                if !waiting {
                    work(0, tick);
                    waiting = true;
                } else {
                    tick();
                }
            };
            self.pool.run(&worker, &mut || both(&mut tick));
        }
        result
    }
}

struct StopOnPanic<'a>(&'a AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Shapes the planner would not produce.
fn check_shapes(q: &View, k: &View, v: &View, heads: HeadMap) -> Result<()> {
    let dims = [("dim_qk", q.dim), ("dim_v", v.dim)];
    if let Some((name, dim)) = dims.iter().find(|(_, d)| d % 8 != 0 || !(8..=256).contains(d)) {
        return Err(Error::internal(format!("{name}: got {dim}, need a multiple of 8 up to 256")));
    }
    if q.dim != k.dim || k.rows != v.rows || q.dtype != k.dtype || q.dtype != v.dtype {
        return Err(Error::internal(format!("q, k, v do not fit together: {q:?} {k:?} {v:?}")));
    }
    if q.heads > 0 && k.rows > 0 && heads.kv_of(q.heads - 1) >= k.heads.min(v.heads) {
        return Err(Error::internal(format!("{} heads do not fit {heads:?} {k:?}", q.heads)));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
