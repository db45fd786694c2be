pub use super::scalar::KERNELS;
pub use super::scalar::KERNELS as KERNELS_BF16;
