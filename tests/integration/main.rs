//! The one Rust integration binary: what is right (`oracle`), and everything that is compared to it.

mod balanced;
mod cli;
mod collect;
mod cuda;
mod cuda_capi;
mod cuda_layers;
mod cuda_ranks;
mod header;
mod layers;
mod memory;
mod mesh;
mod numbers;
mod oracle;
mod padding;
mod plan_faults;
mod plans;
mod plans_account;
mod plans_json;
mod plans_random;
mod plans_snapshots;
mod plans_svg;
mod plans_time;
mod ranks;
mod review;
mod tidy;
mod trade;
