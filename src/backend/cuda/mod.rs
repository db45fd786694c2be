//! The CUDA backend: kernels of `kernels/`, launched through the driver.
//!
//! ```text
//! image.rs    the compiled kernels               staging.rs  work lists on their way to the device
//! shapes.rs   what they are compiled for         launch.rs   compute steps to launches (launch/)
//! params.rs   what they are given
//! tables.rs   slices to the kernels' work lists
//! ```
//! A plan's steps become work lists ([`TableBuilder`]), one blob for all of them; [`Staging`] takes the blob to the device, in order with
//! the stream; [`Cuda`] launches a kernel per step, which finds its lists there.

pub mod image;
mod launch;
pub mod params;
mod shapes;
mod staging;
mod tables;
#[cfg(test)]
mod tests;

pub use launch::{Cuda, check_elements, check_view};
pub use shapes::{Block, Scores, Shape};
pub use staging::Staging;
pub use tables::{
    ALIGN, AttendWork, RowsWork, Sequences, SliceLimits, TableBuilder, Tiling, TokenWork,
    backward_bound, forward_bound, runs_bound, tokens_bound, turns_bound,
};
