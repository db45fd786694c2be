//! The one Rust integration binary: what is right (`oracle`), and everything that is compared to it.

mod header;
mod numbers;
mod oracle;
mod plans;
mod plans_random;
mod plans_time;
mod ranks;
mod tidy;
