//! Launches of what expands latents and contracts their gradients (`kernels/latent.cu`).

use super::{Cuda, Kernel, Kernels, get, row_of, type_name, view};
use crate::backend::cuda::params::{self, LATENT_SHARED, LATENT_THREADS, LATENT_TILE};
use crate::backend::cuda::tables::RowsWork;
use crate::backend::{Contract, Expand, View};
use crate::driver::{CUdeviceptr, CUstream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use std::sync::OnceLock;

/// The kernels by storage type: they expand, contract to latents, contract to weights.
#[derive(Default)]
pub(super) struct LatentKernels([[OnceLock<Kernel>; 3]; 2]);

const NAMES: [&str; 3] = ["expand", "contract_latent", "contract_weights"];

impl Kernels {
    fn latent(&self, dtype: DType, which: usize) -> Result<&Kernel> {
        let name = || format!("cp_{}_{}", NAMES[which], type_name(dtype));
        let cell = &self.latent.0[row_of(dtype)][which];
        get(cell, || self.load(name(), LATENT_THREADS, LATENT_SHARED))
    }
}

/// Tiles of a result that cover `n` rows or columns.
fn tiles(n: u32) -> u64 {
    u64::from(n.div_ceil(LATENT_TILE))
}

impl Cuda {
    /// Loads what latents of this type need. As [`Cuda::supports`], which has checked the type, it blocks the first time.
    pub fn supports_latents(&self, dtype: DType) -> Result<()> {
        (0..NAMES.len()).try_for_each(|which| self.kernels.latent(dtype, which).map(|_| ()))
    }

    /// Enqueues an expansion. `step.rows` is not read: `work` is made of it.
    ///
    /// # Safety
    /// As [`Cuda::forward`].
    pub unsafe fn expand(
        &self,
        step: &Expand,
        work: &RowsWork,
        tables: CUdeviceptr,
        stream: CUstream,
    ) -> Result<()> {
        let Expand { latent, up_k, up_v, first_head, k, v, .. } = step;
        let p = operands([latent, up_k, up_v, k, v], *first_head, work, tables)?;
        let blocks = tiles(p.row_count) * u64::from(p.heads) * (tiles(p.dim_k) + tiles(p.dim_v));
        // SAFETY: the caller's promise; the kernel takes these parameters.
        unsafe { self.kernels.latent(latent.dtype, 0)?.launch(within(blocks)?, &p, stream) }
    }

    /// Enqueues a contraction, which adds in a fixed order. `step.rows` is not read: `work` is made of it.
    ///
    /// # Safety
    /// As [`Cuda::forward`].
    pub unsafe fn contract(
        &self,
        step: &Contract,
        work: &RowsWork,
        tables: CUdeviceptr,
        stream: CUstream,
    ) -> Result<()> {
        let Contract { dk, dv, latent, up_k, up_v, first_head, .. } = step;
        let mut p = operands([latent, up_k, up_v, dk, dv], *first_head, work, tables)?;
        p.d_latent = view("d_latent", &step.d_latent)?;
        p.d_up_k = view("d_up_k", &step.d_up_k)?;
        p.d_up_v = view("d_up_v", &step.d_up_v)?;
        if p.row_count == 0 || p.heads == 0 {
            return Ok(());
        }
        let columns = tiles(p.dim);
        let of_latents = tiles(p.row_count) * (columns + u64::from(p.rope > 0));
        let of_weights = u64::from(p.heads) * (tiles(p.dim_k) + tiles(p.dim_v)) * columns;
        for (which, blocks) in [(1, of_latents), (2, of_weights)] {
            let kernel = self.kernels.latent(latent.dtype, which)?;
            // SAFETY: the caller's promise; the kernels take these parameters.
            unsafe { kernel.launch(within(blocks)?, &p, stream)? };
        }
        Ok(())
    }
}

/// What both have; keys and values, or their gradients.
fn operands(
    [latent, up_k, up_v, k, v]: [&View; 5],
    first_head: usize,
    work: &RowsWork,
    tables: CUdeviceptr,
) -> Result<params::Latent> {
    Ok(params::Latent {
        latent: view("latent", latent)?,
        up_k: view("up_k", up_k)?,
        up_v: view("up_v", up_v)?,
        k: view("k", k)?,
        v: view("v", v)?,
        runs: tables + work.runs,
        run_count: work.run_count,
        row_count: work.row_count,
        heads: k.heads as u32,
        first_head: first_head as u32,
        dim: up_v.dim as u32,
        rope: (latent.dim - up_v.dim) as u32,
        dim_k: up_k.rows as u32,
        dim_v: up_v.rows as u32,
        ..params::Latent::default()
    })
}

/// A grid has 31 bits.
fn within(blocks: u64) -> Result<u64> {
    match i32::try_from(blocks) {
        Ok(_) => Ok(blocks),
        Err(_) => Err(Error::unsupported(format!(
            "latent: a step of {blocks} blocks, at most {} (fewer tokens per rank, or more stages)",
            i32::MAX
        ))),
    }
}
