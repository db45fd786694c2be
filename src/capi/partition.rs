//! Which tokens a rank holds, for callers who deal them out. Pure functions: no group, no communication.

use super::abi::*;
use super::decode;
use super::guard::{fill, guard, output};
use crate::balance::Dealt;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::holding::tokens;
use crate::mask::Mask;
use crate::partition::{Partition, Side, padded_length};
use crate::problem::{Problem, Wire};
use crate::regions::Regions;
use crate::score::Score;

/// Smallest length at or above `length` that gives every rank the same number of tokens: a multiple of 2·ranks for zigzag, else of
/// ranks. This library needs no such padding; frameworks that exchange equal shapes do. Local. Any thread, any time.
///
/// # Safety
/// `padded` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_partition_padded_length(
    partition: cp_partition,
    ranks: u32,
    length: u64,
    padded: *mut u64,
) -> cp_status {
    guard(|| {
        let out = output("padded", padded)?;
        let partition = decode::partition("partition", partition)?;
        if partition == Partition::Balanced {
            return Err(Error::argument(
                "partition: balanced gives ranks equal shares, to within 256 tokens, of any length; it has no padded length",
            ));
        }
        if matches!(partition, Partition::List { .. }) || ranks == 0 || length > 1 << 60 {
            return Err(Error::argument(format!(
                "partition: got {partition:?}, {ranks} ranks, length {length}; a caller's list has no padded length"
            )));
        }
        out.write(padded_length(length, ranks, &partition));
        Ok(())
    })
}

/// Tokens that `rank` holds, in the order of its local rows: indices into the padded sequences laid one after another, on the side
/// `side`. For packed sequences this is the list that selects the rank's rows from the whole packed buffer; for dense ones, entry b's tokens
/// start at b·seq. Writes at most `capacity` indices and the full number to `count`; `indices` may be NULL. Local. Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say (lists for `ranks` ranks); `indices` is NULL or has room for `capacity` numbers; `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_partition_tokens(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
    rank: u32,
    side: cp_side,
    indices: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> cp_status {
    guard(|| {
        let out = output("count", count)?;
        // SAFETY: the caller's promise.
        let problem = unsafe { problem(partition, format, sequences, ranks)? };
        let held = tokens(&problem, holder(rank, ranks)?, side_of(side)?);
        // SAFETY: the caller's promise.
        unsafe { fill("indices", indices, capacity, &held)? };
        out.write(held.len());
        Ok(())
    })
}

/// A rank of a group of `ranks`.
pub(super) fn holder(rank: u32, ranks: u32) -> Result<u32> {
    match rank < ranks {
        true => Ok(rank),
        false => Err(Error::argument(format!("rank: got {rank}, allowed 0 … {}", ranks - 1))),
    }
}

pub(super) fn side_of(side: cp_side) -> Result<Side> {
    match side {
        CP_SIDE_Q => Ok(Side::Query),
        CP_SIDE_K => Ok(Side::Key),
        other => {
            Err(Error::argument(format!("side: got {other}, allowed CP_SIDE_Q (0), CP_SIDE_K (1)")))
        }
    }
}

/// What is asked about, as a problem.
///
/// # Safety
/// The sequences are as their docs say.
pub(super) unsafe fn problem(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
) -> Result<Problem> {
    let partition = decode::partition("partition", partition)?;
    let packed = decode::packed("format", format)?;
    if ranks == 0 || ranks > 1 << 20 {
        return Err(Error::argument(format!("ranks: got {ranks}, allowed 1 … {}", 1 << 20)));
    }
    // SAFETY: the caller's promise.
    let (seqs, list) = unsafe {
        decode::sequences(sequences, packed, matches!(partition, Partition::List { .. }), ranks)?
    };
    let mut p = Problem {
        ranks,
        inner: ranks,
        stages: 0,
        relay: false,
        partition: list.unwrap_or(partition),
        mask: Mask::FULL,
        packed,
        seqs,
        regions: Regions::default(),
        heads: 1,
        kv_heads: 1,
        dim_qk: 8,
        dim_v: 8,
        dtype: DType::F32,
        wire: Wire::Storage,
        kv_wire: None,
        scale: 1.0,
        score: Score::default(),
        latent: None,
    };
    p.validate()?;
    Dealt::default().resolve(&mut p);
    Ok(p)
}
