//! Placeholder until launch.rs and staging.rs come: what the executor expects of them. Refuses everything.
#![allow(missing_docs, clippy::missing_safety_doc)]

use super::tables::{AttendWork, RowsWork, Tiling};
use crate::backend::{Backward, CopyRows, Delta, Forward, View};
use crate::driver::{CUdeviceptr, CUstream, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};
use std::sync::Arc;

fn refuse<T>() -> Result<T> {
    Err(Error::unsupported("CUDA: kernels are not launched yet"))
}

#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    forward: [u32; 2],
    backward: [u32; 2],
}

impl Shape {
    pub fn forward(&self) -> Tiling {
        Tiling { q_rows: self.forward[0], k_rows: self.forward[1] }
    }
    pub fn backward(&self) -> Tiling {
        Tiling { q_rows: self.backward[0], k_rows: self.backward[1] }
    }
}

pub struct Staging {}

impl Staging {
    pub fn new(_: Arc<Device>) -> Self {
        Staging {}
    }
    pub fn reserve(&mut self, _: usize) -> Result<()> {
        refuse()
    }
    pub unsafe fn upload(&mut self, _: &[u8], _: CUdeviceptr, _: CUstream, _: bool) -> Result<()> {
        refuse()
    }
}

pub struct Cuda {
    device: Arc<Device>,
}

impl Cuda {
    pub fn new(_: Arc<Device>) -> Result<Cuda> {
        refuse()
    }
    pub fn set_margin(&mut self, _: u32) {}
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
    pub fn supports(&self, _: DType, _: u32, _: u32) -> Result<&'static Shape> {
        refuse()
    }
    pub unsafe fn forward(
        &self,
        _: &Forward,
        _: &AttendWork,
        _: CUdeviceptr,
        _: CUstream,
    ) -> Result<()> {
        refuse()
    }
    pub unsafe fn backward(
        &self,
        _: &Backward,
        _: &AttendWork,
        _: CUdeviceptr,
        _: CUdeviceptr,
        _: CUstream,
    ) -> Result<()> {
        refuse()
    }
    pub unsafe fn copy_rows(
        &self,
        _: &CopyRows,
        _: &RowsWork,
        _: CUdeviceptr,
        _: CUstream,
    ) -> Result<()> {
        refuse()
    }
    pub unsafe fn fill(
        &self,
        _: &View,
        _: &RowsWork,
        _: bool,
        _: CUdeviceptr,
        _: CUstream,
    ) -> Result<()> {
        refuse()
    }
    pub unsafe fn delta(&self, _: &Delta, _: CUstream) -> Result<()> {
        refuse()
    }
}

pub fn check_view(_: &str, _: &View) -> Result<()> {
    refuse()
}
