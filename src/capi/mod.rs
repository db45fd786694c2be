//! The C ABI. Every exported function is: guard → decode → call → encode; nothing is decided here.
//!
//! In lifecycle order: `about` (version, errors), `group`, `partition`, `rows`, `collect`, `mesh`, `padding`, `schedule`, `trade`, `attention`. The structs are in `abi` and its
//! neighbours, all argument checks in `decode`, `slices` and (for groups) `init`, panics and handles in `guard`. cbindgen makes `include/context_parallel.h` from these
//! files; a test compares.

#![allow(non_camel_case_types)]

pub mod abi;
pub mod abi_mesh;
pub mod abi_rows;
pub mod abi_schedule;
pub mod abi_trade;
pub mod about;
pub mod attention;
pub mod collect;
mod decode;
pub mod group;
mod guard;
mod init;
pub mod mesh;
pub mod padding;
pub mod partition;
pub mod rows;
pub mod schedule;
mod slices;
pub mod trade;
