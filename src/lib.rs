//! Context parallelism: exact attention over sequences that are split across ranks, forward and backward.
pub mod attention;
pub mod backend;
pub mod capi;
pub mod dtype;
pub mod error;
pub mod exec;
pub mod group;
pub mod mask;
pub mod partition;
pub mod plan;
pub mod problem;
pub mod transport;
