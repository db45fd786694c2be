//! Rows of any bytes between ranks, outside attention.

use super::abi::*;
use super::abi_rows::*;
use super::group::cp_group;
use super::guard::{extensible, guard, object, zero};
use super::partition::{problem, side_of};
use crate::collect::{Args, Rows, gather, shift};
use crate::error::{Error, Result};
use crate::group::Group;

/// Every row of `out` gets the row that stands `shift` tokens after it in its sequence, from whichever rank has it: labels, and those of multi-token
/// prediction. Rows without one (the last of a sequence, padding) are left as they are, so fill `out` before, with -100 say.
///
/// Collective over the group, in the same order on all ranks; blocking. Host memory: groups of CUDA devices are refused (cp_partition_shift_exchange
/// says what a framework's own all-to-all moves). If one rank's arguments are wrong, that rank gets its error and all others CP_ERR_MISMATCH naming
/// it; nothing has moved.
///
/// # Safety
/// `group` is a handle; `args` points to `struct_size` bytes; `local` and `out` have the rows that it says, and `out` overlaps nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_shift(
    group: *const cp_group,
    args: *const cp_rows_args,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        // SAFETY: likewise.
        let read = unsafe { decode_args(group, args) };
        let by = read.as_ref().map_or(0, |(_, by)| *by);
        // SAFETY: likewise.
        unsafe { shift(group, by, read.map(|(args, _)| args)) }
    })
}

/// `out` gets the rows of all padded sequences, in their order, on every rank: a whole output, where someone asks for it. In all else as
/// cp_group_shift; `shift` must be 0.
///
/// # Safety
/// As cp_group_shift.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_group_gather(
    group: *const cp_group,
    args: *const cp_rows_args,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        // SAFETY: likewise.
        let read = unsafe { decode_args(group, args) };
        let read = read.and_then(|(args, by)| match by {
            0 => Ok(args),
            _ => Err(Error::argument(format!("args.shift: got {by}, must be 0"))),
        });
        // SAFETY: likewise.
        unsafe { gather(group, read) }
    })
}

/// # Safety
/// As [`cp_group_shift`].
unsafe fn decode_args(group: &Group, args: *const cp_rows_args) -> Result<(Args, i32)> {
    // SAFETY: the caller's promise.
    let a = unsafe { extensible("args", args)? };
    zero("args.flags", a.flags.into())?;
    if a.row_bytes == 0 {
        return Err(Error::argument("args.row_bytes: got 0, must be at least 1"));
    }
    let rows = |name: &str, ptr: *mut u8, count: usize| {
        let fits = count.checked_mul(a.row_bytes).is_some_and(|b| b <= isize::MAX as usize);
        match fits && (count == 0 || !ptr.is_null()) {
            true => Ok(Rows { ptr, count }),
            false => Err(Error::argument(format!(
                "args.{name}: got {ptr:p} with {count} rows of {} bytes",
                a.row_bytes
            ))),
        }
    };
    let local = rows("local", a.local.cast_mut().cast(), a.local_rows)?;
    let out = rows("out", a.out.cast(), a.out_rows)?;
    // SAFETY: the caller's promise.
    let problem = unsafe { problem(a.partition, a.format, a.sequences, group.size())? };
    Ok((Args { problem, side: side_of(a.side)?, row_bytes: a.row_bytes, local, out }, a.shift))
}
