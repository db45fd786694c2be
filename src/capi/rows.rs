//! What goes with a rank's rows: positions, shifted labels, whole sequences again, losses. Pure functions: no group, no communication.

use super::abi::*;
use super::abi_rows::*;
use super::guard::{extensible, fill, guard, output};
use super::partition::{holder, problem, side_of};
use crate::error::Error;
use crate::loss::{Mean, Reduction, Sizes, counted, scale, weights};
use crate::rows::{exchange, lengths, order, positions, shifted};

/// Position of every local row in its sequence, counted from the first true token; CP_NO_TOKEN for padding. These are also the rows that the
/// rank takes of a table of rotary frequencies. Writes at most `capacity` and the number of rows to `count`; `values` may be NULL. Local.
/// Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say (lists for `ranks` ranks); `values` is NULL or has room for `capacity` numbers; `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_partition_positions(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
    rank: u32,
    side: cp_side,
    values: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> cp_status {
    guard(|| {
        let out = output("count", count)?;
        // SAFETY: the caller's promise.
        let p = unsafe { problem(partition, format, sequences, ranks)? };
        let list = positions(&p, holder(rank, ranks)?, side_of(side)?);
        // SAFETY: the caller's promise.
        unsafe { fill("values", values, capacity, &list)? };
        out.write(list.len());
        Ok(())
    })
}

/// How much of every sequence a rank holds: `tokens` without padding, `rows` with it. Their running sums are the rank's own cu_seqlens and
/// cu_seqlens_padded, unless a caller's list (or a balanced partition, which is one) deals a sequence's pieces out of order. Writes at most
/// `capacity` of each and the number of sequences to `count`; `tokens` and `rows` may be NULL. Local. Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say (lists for `ranks` ranks); `tokens` and `rows` are NULL or have room for `capacity` numbers; `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_partition_lengths(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
    rank: u32,
    side: cp_side,
    tokens: *mut u32,
    rows: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> cp_status {
    guard(|| {
        let out = output("count", count)?;
        // SAFETY: the caller's promise.
        let p = unsafe { problem(partition, format, sequences, ranks)? };
        let (a, b): (Vec<u32>, Vec<u32>) =
            lengths(&p, holder(rank, ranks)?, side_of(side)?).into_iter().unzip();
        // SAFETY: the caller's promise.
        unsafe { fill("tokens", tokens, capacity, &a)? };
        // SAFETY: likewise.
        unsafe { fill("rows", rows, capacity, &b)? };
        out.write(a.len());
        Ok(())
    })
}

/// Puts whole sequences together again: for every token, in the numbering of cp_partition_tokens, its row among the shards of all ranks laid
/// one after another, rank 0's first. An all-gather of the shards, indexed by this, is the whole. Writes at most `capacity` and the
/// number of tokens to `count`; `order_out` may be NULL. Local. Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say (lists for `ranks` ranks); `order_out` is NULL or has room for `capacity` numbers; `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_partition_order(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
    side: cp_side,
    order_out: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> cp_status {
    guard(|| {
        let out = output("count", count)?;
        // SAFETY: the caller's promise.
        let p = unsafe { problem(partition, format, sequences, ranks)? };
        let list = order(&p, side_of(side)?);
        // SAFETY: the caller's promise.
        unsafe { fill("order_out", order_out, capacity, &list)? };
        out.write(list.len());
        Ok(())
    })
}

/// For every local row the token that stands `shift` after it in its sequence (before it, if negative), in the numbering of cp_partition_tokens;
/// CP_NO_TOKEN where there is none, and for padding. With 1 it is where a row's label is, with 2 and more the labels of multi-token prediction:
/// across the borders of chunks and ranks, never across those of sequences. Writes at most `capacity` and the number of rows to `count`;
/// `tokens` may be NULL. Local. Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say (lists for `ranks` ranks); `tokens` is NULL or has room for `capacity` numbers; `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_partition_shift(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
    rank: u32,
    side: cp_side,
    shift: i32,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> cp_status {
    guard(|| {
        let out = output("count", count)?;
        // SAFETY: the caller's promise.
        let p = unsafe { problem(partition, format, sequences, ranks)? };
        let list = shifted(&p, holder(rank, ranks)?, side_of(side)?, shift);
        // SAFETY: the caller's promise.
        unsafe { fill("tokens", tokens, capacity, &list)? };
        out.write(list.len());
        Ok(())
    })
}

/// The all-to-all that brings every rank what cp_partition_shift says, for those who have only their own rows. For rank 0, then rank 1, …:
/// `send_rows` are local rows that go there (`send_counts[peer]` of them), in the order in which the peer has them in its `recv_rows`: the
/// local rows that what comes is for (`recv_counts[peer]`). This rank is a peer of itself. Rows in no list get nothing (say, -100). Neither
/// list is longer than the rank has rows; both arrays have room for `capacity`. Local. Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say (lists for `ranks` ranks); `send_rows` and `recv_rows` are NULL or have room for `capacity` numbers,
/// `send_counts` and `recv_counts` for `ranks`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_partition_shift_exchange(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
    rank: u32,
    side: cp_side,
    shift: i32,
    send_rows: *mut u32,
    send_counts: *mut u32,
    recv_rows: *mut u32,
    recv_counts: *mut u32,
    capacity: usize,
) -> cp_status {
    guard(|| {
        for (name, counts) in [("send_counts", send_counts), ("recv_counts", recv_counts)] {
            output(name, counts)?;
        }
        // SAFETY: the caller's promise.
        let p = unsafe { problem(partition, format, sequences, ranks)? };
        let x = exchange(&p, holder(rank, ranks)?, side_of(side)?, shift);
        let counts =
            |lists: &[Vec<u32>]| -> Vec<u32> { lists.iter().map(|l| l.len() as u32).collect() };
        // SAFETY: the caller's promise, here and below.
        unsafe { fill("send_rows", send_rows, capacity, &x.sends.concat())? };
        // SAFETY: as above.
        unsafe { fill("recv_rows", recv_rows, capacity, &x.recvs.concat())? };
        // SAFETY: as above.
        unsafe { fill("send_counts", send_counts, ranks as usize, &counts(&x.sends))? };
        // SAFETY: as above.
        unsafe { fill("recv_counts", recv_counts, ranks as usize, &counts(&x.recvs))? };
        Ok(())
    })
}

/// 1 for every local query row that counts in the loss, else 0: padding never does, and with `shift` other than 0 neither do rows whose label,
/// `shift` tokens on, is beyond the end of their sequence. Writes at most `capacity` and the number of rows to `count`; `weights_out` may be NULL.
/// Local. Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say (lists for `ranks` ranks); `weights_out` is NULL or has room for `capacity` numbers; `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_loss_weights(
    partition: cp_partition,
    format: cp_format,
    sequences: *const cp_sequences,
    ranks: u32,
    rank: u32,
    shift: i32,
    weights_out: *mut f32,
    capacity: usize,
    count: *mut usize,
) -> cp_status {
    guard(|| {
        let out = output("count", count)?;
        // SAFETY: the caller's promise.
        let p = unsafe { problem(partition, format, sequences, ranks)? };
        let list = weights(&p, holder(rank, ranks)?, shift);
        // SAFETY: the caller's promise.
        unsafe { fill("weights_out", weights_out, capacity, &list)? };
        out.write(list.len());
        Ok(())
    })
}

/// How many rows of all ranks together cp_loss_weights counts: from the lengths alone, so it takes no all-reduce. Local. Any thread, any time.
///
/// # Safety
/// `sequences` as its docs say, without lists; `count` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_loss_tokens(
    format: cp_format,
    sequences: *const cp_sequences,
    shift: i32,
    count: *mut u64,
) -> cp_status {
    guard(|| {
        let out = output("count", count)?;
        // SAFETY: the caller's promise.
        let p = unsafe { problem(CP_PARTITION_CONTIGUOUS, format, sequences, 1)? };
        out.write(counted(&p, shift));
        Ok(())
    })
}

/// What a rank multiplies the sum of its own weighted losses by, before backward, so that the gradients of all dp x cp ranks, put together as
/// `config` says, are those of one rank:
///
/// ```text
///                                CP_GRADIENTS_SUMMED              CP_GRADIENTS_AVERAGED
///     CP_LOSS_PER_TOKEN          1 / tokens                       dp * cp / tokens
///     CP_LOSS_PER_REPLICA        1 / (dp * microbatches * tokens) cp / (microbatches * tokens)
/// ```
///
/// 0 where tokens is 0: a rank without a token that counts contributes nothing, and never NaN. Local. Any thread, any time.
///
/// # Safety
/// `config` points to `struct_size` readable bytes; `factor` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_loss_scale(
    config: *const cp_loss_config,
    factor: *mut f64,
) -> cp_status {
    guard(|| {
        let out = output("factor", factor)?;
        // SAFETY: the caller's promise; plain numbers.
        let c = unsafe { extensible("config", config)? };
        let mean = match c.mean {
            CP_LOSS_PER_TOKEN => Mean::PerToken,
            CP_LOSS_PER_REPLICA => Mean::PerReplica,
            other => {
                return Err(Error::argument(format!(
                    "config.mean: got {other}, allowed CP_LOSS_PER_TOKEN (0), CP_LOSS_PER_REPLICA (1)"
                )));
            }
        };
        let reduction = match c.gradients {
            CP_GRADIENTS_SUMMED => Reduction::Sum,
            CP_GRADIENTS_AVERAGED => Reduction::Average,
            other => {
                return Err(Error::argument(format!(
                    "config.gradients: got {other}, allowed CP_GRADIENTS_SUMMED (0), CP_GRADIENTS_AVERAGED (1)"
                )));
            }
        };
        let sizes = Sizes {
            cp: c.cp_size.max(1),
            dp: c.dp_size.max(1),
            microbatches: c.microbatches.max(1),
            tokens: c.tokens,
        };
        out.write(scale(mean, reduction, sizes)?);
        Ok(())
    })
}
