//! The C ABI. Every exported function is: guard → decode → call → encode; nothing is decided here.
//!
//! In lifecycle order: `about` (version, errors), `group`, `partition`, `schedule`, `attention`. The structs are in `abi` and `abi_schedule`, all argument checks in `decode`
//! and (for groups) `init`, panics and handles in `guard`. cbindgen makes `include/context_parallel.h` from these files; a test compares.

#![allow(non_camel_case_types)]

pub mod abi;
pub mod abi_schedule;
pub mod about;
pub mod attention;
mod decode;
pub mod group;
mod guard;
mod init;
pub mod partition;
pub mod schedule;
