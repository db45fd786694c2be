//! Which samples run on which ranks. Pure functions: no group, no communication.

use super::abi::*;
use super::abi_schedule::*;
use super::decode::slice;
use super::guard::{extensible, guard, output, zero};
use crate::error::{Error, Result};
use crate::schedule::cost::Cost;
use crate::schedule::{Batch, Placement, Schedule, dynamic, megatron, nested};

/// Decides where each of `count` samples runs; `lengths` are their tokens. Writes `count` placements, in the order of the samples, and the number of
/// micro-batches. Depends on its arguments alone: every rank calls it and finds the same. A rank may get nothing in a micro-batch. Takes milliseconds. Local.
/// Any thread, any time.
///
/// # Safety
/// `config` points to `struct_size` bytes; `lengths` to `count` numbers; `placements` has room for `count`, `micro_batches` for one number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_schedule_samples(
    config: *const cp_schedule_config,
    lengths: *const u32,
    count: usize,
    placements: *mut cp_placement,
    micro_batches: *mut u32,
) -> cp_status {
    guard(|| {
        let out = output("micro_batches", micro_batches)?;
        if count > 0 {
            output("placements", placements)?;
        }
        // SAFETY: the caller's promise.
        let (config, cost, lengths) = unsafe { read(config, lengths, count)? };
        let batch = Batch { lengths, ranks: config.ranks, tokens_per_rank: config.tokens_per_rank };
        let cp_size = config.cp_size.max(1);
        let made = match config.scheduler {
            CP_SCHEDULER_DYNAMIC => dynamic::dynamic(&batch, cp_size)?,
            CP_SCHEDULER_DP_BALANCED => megatron::dp_balanced(&batch, cp_size)?,
            CP_SCHEDULER_NESTED | CP_SCHEDULER_MEGATRON => {
                zero("config.cp_size", config.cp_size.into())?;
                match config.scheduler {
                    CP_SCHEDULER_NESTED => nested::nested(&batch, &cost)?,
                    _ => megatron::balanced(&batch)?,
                }
            }
            other => {
                return Err(Error::argument(format!(
                    "config.scheduler: got {other}, allowed CP_SCHEDULER_NESTED (0), _MEGATRON (1), _DYNAMIC (2), _DP_BALANCED (3)"
                )));
            }
        };
        for (i, p) in made.placements.iter().enumerate() {
            let placed = cp_placement {
                micro_batch: p.micro_batch,
                first_rank: p.first,
                rank_count: p.ranks,
                pack: p.pack,
            };
            // SAFETY: room for `count`, by the caller's promise, and there are as many.
            unsafe { placements.add(i).write(placed) };
        }
        out.write(made.micro_batches);
        Ok(())
    })
}

/// How long a schedule takes by the costs of `config`, the caller's own as well as one made here: the sum over micro-batches of the slowest rank's sum over
/// its packs. `bound` may be NULL; else it gets a time that no schedule of these samples can beat. `scheduler` and `cp_size` do not matter. Local.
/// Any thread, any time.
///
/// # Safety
/// `config` points to `struct_size` bytes; `lengths` and `placements` to `count` elements; `seconds` and `bound` have room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_schedule_time(
    config: *const cp_schedule_config,
    lengths: *const u32,
    count: usize,
    placements: *const cp_placement,
    seconds: *mut f64,
    bound: *mut f64,
) -> cp_status {
    guard(|| {
        let out = output("seconds", seconds)?;
        let out_bound = if bound.is_null() { None } else { Some(output("bound", bound)?) };
        // SAFETY: the caller's promise.
        let (config, cost, lengths) = unsafe { read(config, lengths, count)? };
        let batch = Batch { lengths, ranks: config.ranks, tokens_per_rank: config.tokens_per_rank };
        batch.check()?;
        // SAFETY: the caller's promise.
        let given = unsafe { slice("placements", placements, count)? };
        let given = match given {
            None if count > 0 => return Err(Error::argument("placements: got NULL")),
            given => given.unwrap_or_default(),
        };
        let placed = |p: &cp_placement| Placement {
            micro_batch: p.micro_batch,
            first: p.first_rank,
            ranks: p.rank_count,
            pack: p.pack,
        };
        let made = Schedule {
            placements: given.iter().map(placed).collect(),
            micro_batches: given.iter().map(|p| p.micro_batch.saturating_add(1)).max().unwrap_or(0),
        };
        if made.micro_batches as usize > count {
            return Err(Error::argument(format!(
                "placements: got micro-batch {}, there are {count} samples: some are empty",
                made.micro_batches - 1
            )));
        }
        made.check(&batch)?;
        out.write(cost.seconds(&made, &batch));
        if let Some(out) = out_bound {
            out.write(cost.bound(&batch));
        }
        Ok(())
    })
}

/// The configuration, its costs, and the lengths.
///
/// # Safety
/// As the exported functions say.
unsafe fn read<'a>(
    config: *const cp_schedule_config,
    lengths: *const u32,
    count: usize,
) -> Result<(cp_schedule_config, Cost, &'a [u32])> {
    // SAFETY: plain data; the caller's promise.
    let config = unsafe { extensible("config", config)? };
    zero("config.flags", config.flags.into())?;
    let given = Cost {
        pair: config.cost_pair,
        token: config.cost_token,
        wire: config.cost_wire,
        rank: config.cost_rank,
        call: config.cost_call,
    };
    let none = Cost { pair: 0.0, token: 0.0, wire: 0.0, rank: 0.0, call: 0.0 };
    let cost = if given == none { Cost::default() } else { given };
    cost.check()?;
    // SAFETY: the caller's promise.
    match unsafe { slice("lengths", lengths, count)? } {
        None if count > 0 => Err(Error::argument("lengths: got NULL")),
        lengths => Ok((config, cost, lengths.unwrap_or_default())),
    }
}
