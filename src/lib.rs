//! Exact attention over sequences too long for one device, split across ranks, forward and backward: context parallelism as a
//! C library. This page is the tour; the contract is `include/context_parallel.h`.
//!
//! ```text
//!   capi ──▶ attention ──▶ problem ──plan──▶ Plan ──exec──▶ backend (computes) × transport (moves)
//!                 │                            │
//!               group                          ├─ check     proves all ranks' plans together
//!         (agrees, remembers plans)            ├─ account   bytes, FLOPs, memory
//!                                              └─ print, svg, json
//! ```
//!
//! **Everything that decides is in the planner.** A [`problem::Problem`] holds all that matters: shapes, lengths, mask, partition, communication.
//! A [`plan::Plan`] is what one rank does, as data: steps on a compute and a communication lane, joined by events, over named
//! slots. It is a pure function of (problem, rank), so every rank knows what every other will do, and all of it can be proved
//! without a tensor ([`mod@plan::check`]). The executor runs steps and knows the name of no algorithm.
//!
//! **Two mechanisms, four names.** P ranks are u × b: teams of u consecutive ranks trade heads for sequence (`plan/heads.rs`), b teams
//! exchange keys and values in stages (`plan/stages.rs`). Ring attention (`p2p`) is u = 1 with b − 1 stages, `all_gather` the same with one
//! stage, `a2a` (Ulysses) is u = P, `a2a+p2p` both.
//!
//! **Masks are geometry.** Full, causal, windows, packed documents, padding: all are [`mask::Slice`]s, made by intersecting
//! [`partition::Segment`]s with one [`mask::Band`], within the caller's [`regions`] where there are some. Nothing downstream knows a mask's name.
//!
//! # Where to read
//! | room | what it is for |
//! |---|---|
//! | [`partition`], [`mask`], [`regions`], [`score`], [`problem`], [`holding`], [`dtype`], [`error`] | the vocabulary; pure |
//! | [`mesh`], [`layers`], [`padding`] | what surrounds a layer in Megatron: the rank grid, communication types per layer, padding rules; pure |
//! | [`balance`] | deals documents out so that all ranks compute alike and few keys move |
//! | [`collect`] | rows of any bytes between ranks: shifted, or whole sequences on every rank |
//! | [`rows`], [`loss`] | what goes with a rank's rows: positions, shifted labels, whole sequences again; weights and scales of losses |
//! | [`plan`] | decides; start with the table that `context-parallel plan` prints, then `plan/stages.rs` |
//! | [`exec`] | runs one rank's plan |
//! | [`backend`] | what compute steps mean, and the CPU kernels |
//! | [`transport`] | moves bytes: `local` (threads), `shm` (processes), `user` (a C table; MPI comes through it); `device`: on CUDA streams |
//! | [`schedule`] | which samples run on how many ranks: hybrid and dynamic context parallelism; pure |
//! | [`driver`] | the CUDA driver, opened at run time |
//! | [`group`], [`attention`] | ranks that agree before they compute; layers |
//! | [`trade`] | sequence ↔ heads for other layers than attention |
//! | [`capi`] | translates C to all of the above and decides nothing |
//!
//! # Invariants, most of them absences
//! * Imports run one way: partition ← mask ← regions ← problem ← balance ← holding ← plan ← exec ← group ← attention ← capi. `plan` knows neither kernels nor
//!   transports; a test reads the `use` lines.
//! * `exec` names no communication type and no mask; a test reads it.
//! * No waiting without a deadline; no error on one rank that leaves another waiting.
//! * No approximation: what is not supported is refused by name.
//! * No state beyond handles, the last error of a thread, and the meeting places of `transport`.

pub mod attention;
pub mod backend;
pub mod balance;
pub mod capi;
pub mod collect;
pub mod driver;
pub mod dtype;
pub mod error;
pub mod exec;
pub mod group;
pub mod holding;
pub mod layers;
pub mod loss;
pub mod mask;
pub mod mesh;
pub mod padding;
pub mod partition;
pub mod plan;
pub mod problem;
pub mod regions;
pub mod rows;
pub mod schedule;
pub mod score;
pub mod trade;
pub mod transport;
