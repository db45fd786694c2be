//! The CUDA backend: kernels of `kernels/`, launched through the driver.
//!
//! ```text
//! image.rs    the compiled kernels               staging.rs  work lists on their way to the device
//! params.rs   what kernels are given             launch.rs   compute steps to launches
//! tables.rs   slices to the kernels' work lists
//! ```

pub mod image;
pub mod params;
mod tables;

pub use tables::{
    AttendWork, RowsWork, SliceLimits, TableBuilder, Tiling, backward_bound, forward_bound,
    runs_bound,
};

mod stub;
pub use stub::*;
