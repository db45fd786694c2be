pub use super::scalar::KERNELS;
