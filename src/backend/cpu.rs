//! The CPU backend: blocked attention with online softmax, forward and backward, on the calling thread and a small pool.

mod rows;
mod scalar;
mod simd;

use super::{Backward, CopyRows, Delta, Forward, Progress, View};
use crate::error::{Error, Result};
pub use simd::Simd;

/// Carries out compute steps on the CPU. One per executing thread of the caller; not shared.
pub struct Cpu {
    simd: Simd,
    threads: usize,
}

impl Cpu {
    /// A backend that uses `threads` threads, the calling one included, and the given instruction set.
    ///
    /// Fails with `InvalidArgument` when `threads` is 0 and with `Unsupported` when this CPU lacks the instruction set.
    pub fn new(threads: usize, simd: Simd) -> Result<Cpu> {
        if threads == 0 {
            return Err(Error::argument("threads: got 0, need at least 1 (the calling thread)"));
        }
        simd.require()?;
        Ok(Cpu { simd, threads })
    }

    /// The instruction set in use.
    pub fn simd(&self) -> Simd {
        self.simd
    }

    /// Number of threads, the calling one included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// One forward attend step.
    ///
    /// # Safety
    /// Every view of `step` points to memory that is valid for its shape; what is written is not accessed by others meanwhile.
    pub unsafe fn forward(&mut self, step: &Forward, progress: Progress) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { scalar::forward(step, progress) }
    }

    /// One backward attend step: adds to `dq`, `dk`, `dv`.
    ///
    /// # Safety
    /// As for [`Cpu::forward`].
    pub unsafe fn backward(&mut self, step: &Backward, progress: Progress) -> Result<()> {
        // SAFETY: the caller's promise is passed on.
        unsafe { scalar::backward(step, progress) }
    }

    /// Row sums of O∘dO.
    ///
    /// # Safety
    /// As for [`Cpu::forward`].
    pub unsafe fn delta(&mut self, step: &Delta) {
        // SAFETY: the caller's promise is passed on.
        unsafe { rows::delta(step) }
    }

    /// Copies or adds rows.
    ///
    /// # Safety
    /// As for [`Cpu::forward`]; source and destination do not overlap, and no destination row is named twice.
    pub unsafe fn copy_rows(&mut self, step: &CopyRows) {
        // SAFETY: the caller's promise is passed on.
        unsafe { rows::copy(step) }
    }

    /// Sets a dense buffer to zero.
    ///
    /// # Safety
    /// As for [`Cpu::forward`]; the view is dense.
    pub unsafe fn zero(&mut self, view: &View) {
        // SAFETY: the caller's promise is passed on.
        unsafe { rows::zero(view) }
    }
}

#[cfg(test)]
mod tests;
