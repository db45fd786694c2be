//! Sequence ↔ heads, for layers that are not attention.

use super::abi::*;
use super::abi_trade::*;
use super::decode::{self, Place};
use super::group::cp_group;
use super::guard::{extensible, guard, object, output, zero};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::group::Group;
use crate::partition::Partition;
use crate::plan::Pass;
use crate::plan::trade::{MOST_TENSORS, share};
use crate::trade::{Args, Shaped, run, workspace_bytes};
use libc::c_void;

/// This rank's rows of all heads become whole sequences of this rank's heads: `local` is read, `whole` written. For layers that need whole sequences
/// and treat heads, or channels, apart, such as Mamba's convolution and scan.
///
/// One grouped exchange for all tensors. Collective over the group, in the same order on all ranks; blocking on the CPU, where `stream` must be NULL. On
/// CUDA the call is work on `stream`, and what cp_attention_forward says holds here too, also about errors, agreement and graphs (a captured call brings
/// its workspace). If one rank's arguments are wrong, that rank gets its error and all others CP_ERR_MISMATCH naming it; nothing has moved.
///
/// The transpose is cp_heads_to_sequence: either is the other's gradient, also where several ranks have a head.
///
/// # Safety
/// `group` is a handle; `args` points to `struct_size` bytes; its tensors' memory is as their shapes and strides say, and outputs overlap nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_sequence_to_heads(
    group: *const cp_group,
    args: *const cp_trade_args,
    stream: *mut c_void,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { call(group, Pass::ToHeads, args, stream) }
    })
}

/// The way back: `whole` is read, `local` written. Of a head that several ranks have (cp_trade_share), the rows of all are summed, in rank order and in
/// fp32. In all else as cp_sequence_to_heads.
///
/// # Safety
/// As cp_sequence_to_heads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_heads_to_sequence(
    group: *const cp_group,
    args: *const cp_trade_args,
    stream: *mut c_void,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        unsafe { call(group, Pass::ToSequence, args, stream) }
    })
}

/// Heads of a tensor with `tensor_heads` heads that `rank` of `ranks` has of whole sequences: `first`, …, first + count - 1.
///
/// Of `heads` heads (a multiple of `tensor_heads`), rank r has ⌊r·heads/ranks⌋ … ⌊(r+1)·heads/ranks⌋ - 1: shares differ by at most one, and may be empty.
/// Of a tensor with fewer heads, such as the groups of Mamba's B and C, it has those that serve these: head h is served by h·tensor_heads/heads, rounded
/// down. Such a head may be on several ranks. Local. Any thread, any time.
///
/// # Safety
/// `first` and `count` have room for a number each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_trade_share(
    heads: u32,
    tensor_heads: u32,
    ranks: u32,
    rank: u32,
    first: *mut u32,
    count: *mut u32,
) -> cp_status {
    guard(|| {
        let (first, count) = (output("first", first)?, output("count", count)?);
        if tensor_heads == 0 || heads == 0 || !heads.is_multiple_of(tensor_heads) {
            return Err(Error::argument(format!(
                "tensor_heads: got {tensor_heads}, which must divide the {heads} heads that are dealt out"
            )));
        }
        if rank >= ranks {
            return Err(Error::argument(format!("rank: got {rank} of {ranks} ranks")));
        }
        let mine = share(heads, tensor_heads, ranks, rank);
        first.write(mine.start);
        count.write(mine.len() as u32);
        Ok(())
    })
}

/// Workspace that suffices for these tensors in either direction. Their memory is not looked at, and may be NULL. Local. During a capture: not allowed.
///
/// # Safety
/// As cp_sequence_to_heads, but for the tensors' memory; `bytes` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_trade_workspace_size(
    group: *const cp_group,
    args: *const cp_trade_args,
    bytes: *mut usize,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        let out = output("bytes", bytes)?;
        // SAFETY: the caller's promise.
        let args = unsafe { decode_args(group, None, args, std::ptr::null_mut())? };
        out.write(workspace_bytes(group, &args)?);
        Ok(())
    })
}

/// # Safety
/// As [`cp_sequence_to_heads`].
unsafe fn call(
    group: *const cp_group,
    pass: Pass,
    args: *const cp_trade_args,
    stream: *mut c_void,
) -> Result<()> {
    // SAFETY: the caller's promise.
    let group = unsafe { object(group)? };
    // SAFETY: likewise.
    let args = unsafe { decode_args(group, Some(pass), args, stream) };
    // SAFETY: likewise.
    unsafe { run(group, pass, args) }
}

/// What is asked for; `pass` is `None` if nothing is moved.
///
/// # Safety
/// As [`cp_sequence_to_heads`].
unsafe fn decode_args(
    group: &Group,
    pass: Option<Pass>,
    args: *const cp_trade_args,
    stream: *mut c_void,
) -> Result<Args> {
    let place = Place::of_group(group);
    if place == Place::Cpu && !stream.is_null() {
        return Err(Error::argument(format!("stream: got {stream:p}, must be NULL on the CPU")));
    }
    // SAFETY: the caller's promise.
    let a = unsafe { extensible("args", args)? };
    zero("args.flags", a.flags.into())?;
    let partition = decode::partition("args.partition", a.partition)?;
    let packed = decode::packed("args.format", a.format)?;
    let list = matches!(partition, Partition::List { .. });
    // SAFETY: the caller's promise.
    let (seqs, list) = unsafe { decode::sequences(a.sequences, packed, list, group.size())? };
    let count = a.count as usize;
    if count == 0 || count > MOST_TENSORS {
        return Err(Error::argument(format!(
            "args.count: got {count} tensors, allowed 1 … {MOST_TENSORS}"
        )));
    }
    let side = |side: &str, list: *const cp_tensor, written: bool| -> Result<Vec<Shaped>> {
        // SAFETY: `count` tensors, by the caller's promise.
        let Some(list) = (unsafe { decode::slice(&format!("args.{side}"), list, count)? }) else {
            return Err(Error::argument(format!("args.{side}: got NULL, need {count} tensors")));
        };
        let read = |(i, t): (usize, &cp_tensor)| {
            let name = format!("{side}[{i}]");
            let mut t = *t;
            if pass.is_none() {
                t.data = std::ptr::without_provenance_mut(64);
            }
            let shaped = decode::tensor(&name, &t, place, dtype_of(&name, &t)?, packed)?;
            if written {
                decode::not_overlapping(&name, &shaped.0)?;
            }
            Ok(shaped)
        };
        list.iter().enumerate().map(read).collect()
    };
    let workspace = match (a.workspace.is_null(), a.workspace_bytes) {
        (true, 0) => None,
        (true, n) => {
            return Err(Error::argument(format!("args.workspace: got NULL with {n} bytes")));
        }
        (false, n) => Some((a.workspace.cast(), n)),
    };
    Ok(Args {
        partition: list.unwrap_or(partition),
        packed,
        extents: seqs.iter().map(|s| s.q).collect(),
        heads: a.heads,
        local: side("local", a.local, pass == Some(Pass::ToSequence))?,
        whole: side("whole", a.whole, pass == Some(Pass::ToHeads))?,
        workspace,
        stream: stream.cast(),
    })
}

/// Every tensor may be of another type.
fn dtype_of(name: &str, t: &cp_tensor) -> Result<DType> {
    match (t.dtype_code, t.dtype_bits, t.dtype_lanes) {
        (CP_CODE_FLOAT, 32, 1) => Ok(DType::F32),
        (CP_CODE_FLOAT, 16, 1) => Ok(DType::F16),
        (CP_CODE_BFLOAT, 16, 1) => Ok(DType::Bf16),
        got => Err(Error::argument(format!(
            "{name}.dtype: got (code, bits, lanes) = {got:?}, allowed fp32 (2, 32, 1), fp16 (2, 16, 1), bf16 (4, 16, 1)"
        ))),
    }
}
