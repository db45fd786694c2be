//! How far sequences are padded. Pure functions: no group, no communication.

use super::abi::*;
use super::abi_mesh::*;
use super::guard::{extensible, guard, known_flags, output, zero};
use crate::error::{Error, Result};
use crate::padding::{self, Fp8, Parallel, Rule, Tail, TailRule, Target};

/// What the length of a sequence must be a multiple of: lcm(2·cp·tp, cp·fp8) with sequence parallelism and cp > 1, lcm(2·cp, cp·fp8) without, lcm(tp, fp8)
/// or fp8 where cp = 1; fp8 is 1, 16 or 32, and stands with cp because every rank's rows are a matrix product of their own. With CP_PADDING_MEGATRON:
/// 2·cp·tp, 2·cp, tp, fp8. This library's attention needs no padding. Local. Any thread, any time.
///
/// # Safety
/// `config` points to `struct_size` bytes; `factor` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_padding_factor(
    config: *const cp_padding_config,
    factor: *mut u64,
) -> cp_status {
    guard(|| {
        let out = output("factor", factor)?;
        // SAFETY: the caller's promise.
        let (_, parallel, rule) = unsafe { read(config)? };
        out.write(parallel.factor(rule)?);
        Ok(())
    })
}

/// Tokens to add to a sequence of `length`: to the next multiple of cp_padding_factor, or to `decoder_length` where tensor-parallel overlap and sequence
/// parallelism want one fixed length. That must not be shorter, and without CP_PADDING_MEGATRON a multiple of the factor. Local. Any thread, any time.
///
/// # Safety
/// As cp_padding_factor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_padding_amount(
    config: *const cp_padding_config,
    length: u64,
    padding: *mut u64,
) -> cp_status {
    guard(|| {
        let out = output("padding", padding)?;
        // SAFETY: the caller's promise.
        let (c, parallel, rule) = unsafe { read(config)? };
        if length > 1 << 60 {
            return Err(Error::argument(format!("length: got {length}, at most {}", 1u64 << 60)));
        }
        out.write(if c.flags & CP_PADDING_TP_OVERLAP != 0 && parallel.sequence_parallel {
            padding::padding_to(length, c.decoder_length, &parallel, rule)?
        } else {
            padding::padding(length, parallel.factor(rule)?)
        });
        Ok(())
    })
}

/// Cumulative lengths with every sequence padded to a multiple of `factor`: `entries` numbers from as many, 0 first. Packs for context parallelism
/// elsewhere want a multiple of 2·cp; this library does not. Local. Any thread, any time.
///
/// # Safety
/// `cu_seqlens` points to `entries` numbers; `cu_seqlens_padded` has room for as many.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_padding_sequences(
    cu_seqlens: *const i32,
    entries: usize,
    factor: u32,
    cu_seqlens_padded: *mut i32,
) -> cp_status {
    guard(|| {
        output("cu_seqlens_padded", cu_seqlens_padded)?;
        // SAFETY: the caller's promise.
        let cu = unsafe { lengths("cu_seqlens", cu_seqlens, entries)? };
        let made = narrow(&padding::cu_padded(&cu, factor.into())?)?;
        // SAFETY: as many as `entries`, by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(made.as_ptr(), cu_seqlens_padded, made.len()) };
        Ok(())
    })
}

/// Fills up a pack of sequences to the rows that every rank shall have (Megatron's packing tail). `cu_seqlens_padded` may be NULL: as `cu_seqlens`.
/// Writes as many entries to both results, at most `capacity` of them, and the full number to `made`: at most `entries` + 1, or `slots` + 1.
/// `longest` is the longest padded sequence, with `slots` all rows; it may be NULL. For zigzag the tail must divide into 2·ranks chunks. Local.
/// Any thread, any time.
///
/// # Safety
/// `config` points to `struct_size` bytes; the inputs to `entries` numbers; the results have room for `capacity` each, `made` and `longest` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_padding_tail(
    config: *const cp_tail_config,
    cu_seqlens: *const i32,
    cu_seqlens_padded: *const i32,
    entries: usize,
    result: *mut i32,
    result_padded: *mut i32,
    capacity: usize,
    made: *mut usize,
    longest: *mut u64,
) -> cp_status {
    guard(|| {
        let count = output("made", made)?;
        output("result", result)?;
        output("result_padded", result_padded)?;
        let out = if longest.is_null() { None } else { Some(output("longest", longest)?) };
        // SAFETY: the caller's promise.
        let (rule, cu) = unsafe { (tail(config)?, lengths("cu_seqlens", cu_seqlens, entries)?) };
        let padded = if cu_seqlens_padded.is_null() {
            cu.clone()
        } else {
            // SAFETY: the caller's promise.
            unsafe { lengths("cu_seqlens_padded", cu_seqlens_padded, entries)? }
        };
        let pack = padding::fill(&cu, &padded, &rule)?;
        let (cu, padded) = (narrow(&pack.cu)?, narrow(&pack.padded)?);
        let fits = cu.len().min(capacity);
        // SAFETY: no more than `capacity`, by the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(cu.as_ptr(), result, fits);
            std::ptr::copy_nonoverlapping(padded.as_ptr(), result_padded, fits);
        }
        if let Some(out) = out {
            out.write(pack.longest);
        }
        count.write(cu.len());
        Ok(())
    })
}

/// Entries of a batch of `count` that `rank` of `ranks` gets when it is split by entries into equal parts: from `start` on `length`, and `padding` more
/// that only fill up (Megatron's split_to_context_parallel_ranks: ⌈count/ranks⌉ each). A gather puts the parts one after another, the padding of all
/// ranks last. Local. Any thread, any time.
///
/// # Safety
/// `start`, `length` and `padding` have room for a number each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_padding_split(
    count: u64,
    ranks: u32,
    rank: u32,
    start: *mut u64,
    length: *mut u64,
    padding: *mut u64,
) -> cp_status {
    guard(|| {
        let outs =
            (output("start", start)?, output("length", length)?, output("padding", padding)?);
        let share = padding::split(count, ranks, rank)?;
        outs.0.write(share.start);
        outs.1.write(share.len);
        outs.2.write(share.padding);
        Ok(())
    })
}

/// Cumulative lengths of a batch of `batch` entries of `length` tokens, the last `padding` of each being padding: `batch` + 1 numbers each for
/// `cu_seqlens` and, where `format` becomes CP_FORMAT_PACKED, `cu_seqlens_padded`. That is with `ranks` > 1 context-parallel ranks and padding, or where
/// `packed` is not 0 (Megatron's get_packed_seq_params); else it is CP_FORMAT_DENSE. Local. Any thread, any time.
///
/// # Safety
/// `cu_seqlens` and `cu_seqlens_padded` have room for `batch` + 1 numbers, `format` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_padding_batch(
    batch: u32,
    length: u64,
    padding: u64,
    ranks: u32,
    packed: u32,
    cu_seqlens: *mut i32,
    cu_seqlens_padded: *mut i32,
    format: *mut cp_format,
) -> cp_status {
    guard(|| {
        let out = output("format", format)?;
        output("cu_seqlens", cu_seqlens)?;
        output("cu_seqlens_padded", cu_seqlens_padded)?;
        let (cu, padded) =
            padding::batch_lengths(batch.into(), length, padding, ranks, packed != 0)?;
        let (cu, padded) = (narrow(&cu)?, padded.map(|p| narrow(&p)).transpose()?);
        // SAFETY: `batch` + 1 numbers each, by the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(cu.as_ptr(), cu_seqlens, cu.len());
            if let Some(padded) = &padded {
                std::ptr::copy_nonoverlapping(padded.as_ptr(), cu_seqlens_padded, padded.len());
            }
        }
        out.write(if padded.is_some() { CP_FORMAT_PACKED } else { CP_FORMAT_DENSE });
        Ok(())
    })
}

/// Where a list of `images` images with `rows` tokens each is cut among ranks so that every image is whole: rank r gets images `bounds[r]` up to
/// `bounds[r + 1]`. `media` counts the images that belong together (frames of a video, 1 for a picture; NULL: all are pictures), and `tubelet` frames of one
/// medium stay together (0: 1). The fullest rank has as few tokens as it can have, and no rank is empty where there are enough pieces.
/// With CP_PADDING_MEGATRON in `flags`, for `tubelet` 1: images/ranks each and the rest on the last rank, whatever their size; with fewer images than ranks
/// one each, where indices beyond the images are dummies. Local. Any thread, any time.
///
/// # Safety
/// `rows` points to `images` numbers, `media` is NULL or points to `media_count`; `bounds` has room for `ranks` + 1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_padding_image_bounds(
    rows: *const u64,
    images: usize,
    media: *const u64,
    media_count: usize,
    tubelet: u32,
    ranks: u32,
    flags: u32,
    bounds: *mut u64,
) -> cp_status {
    guard(|| {
        output("bounds", bounds)?;
        known_flags("flags", flags, CP_PADDING_MEGATRON)?;
        let none = images == 0;
        if (rows.is_null() && !none) || !rows.is_aligned() || images > 1 << 24 {
            return Err(Error::argument(format!("rows: got {rows:p} for {images} images")));
        }
        // SAFETY: the caller's promise.
        let rows = if none { &[][..] } else { unsafe { std::slice::from_raw_parts(rows, images) } };
        let single = vec![1; images];
        let media = if media.is_null() {
            &single[..]
        } else if !media.is_aligned() || media_count > 1 << 24 {
            return Err(Error::argument(format!("media: got {media:p} with {media_count} media")));
        } else {
            // SAFETY: the caller's promise.
            unsafe { std::slice::from_raw_parts(media, media_count) }
        };
        let rule = if flags & CP_PADDING_MEGATRON != 0 { Rule::Megatron } else { Rule::Every };
        let made = padding::image_bounds(rows, media, tubelet.max(1).into(), ranks, rule)?;
        // SAFETY: `ranks` + 1 numbers, by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(made.as_ptr(), bounds, made.len()) };
        Ok(())
    })
}

/// # Safety
/// As cp_padding_factor.
unsafe fn read(config: *const cp_padding_config) -> Result<(cp_padding_config, Parallel, Rule)> {
    // SAFETY: the caller's promise; all zeros is valid.
    let c = unsafe { extensible("config", config)? };
    let known = CP_PADDING_SEQUENCE_PARALLEL | CP_PADDING_MEGATRON | CP_PADDING_TP_OVERLAP;
    known_flags("config.flags", c.flags, known)?;
    zero("config.reserved", c.reserved.into())?;
    let fp8 = match c.fp8 {
        CP_FP8_OFF => Fp8::Off,
        CP_FP8_ROWS_16 => Fp8::Rows16,
        CP_FP8_ROWS_32 => Fp8::Rows32,
        other => {
            return Err(Error::argument(format!(
                "config.fp8: got {other}, allowed CP_FP8_OFF (0), CP_FP8_ROWS_16 (1), CP_FP8_ROWS_32 (2)"
            )));
        }
    };
    let parallel = Parallel {
        tp: c.tp.max(1),
        cp: c.cp.max(1),
        sequence_parallel: c.flags & CP_PADDING_SEQUENCE_PARALLEL != 0,
        fp8,
    };
    let rule = if c.flags & CP_PADDING_MEGATRON != 0 { Rule::Megatron } else { Rule::Every };
    Ok((c, parallel, rule))
}

/// # Safety
/// As cp_padding_tail.
unsafe fn tail(config: *const cp_tail_config) -> Result<TailRule> {
    // SAFETY: the caller's promise; all zeros is valid.
    let c = unsafe { extensible("config", config)? };
    known_flags("config.flags", c.flags, 0)?;
    let chunks = match c.partition {
        CP_PARTITION_ZIGZAG => 2,
        CP_PARTITION_CONTIGUOUS => 1,
        other => {
            return Err(Error::argument(format!(
                "config.partition: got {other}, allowed CP_PARTITION_ZIGZAG (0), _CONTIGUOUS (1)"
            )));
        }
    };
    let target = match (c.multiple, c.rows) {
        (n, 0) if n > 0 => Target::Multiple(n),
        (0, n) if n > 0 => Target::Rows(n),
        (multiple, rows) => {
            return Err(Error::argument(format!(
                "config.multiple, rows: got {multiple} and {rows}, exactly one must be given"
            )));
        }
    };
    let tail = match c.tail {
        CP_TAIL_APPEND_DUMMY => Tail::AppendDummy,
        CP_TAIL_EXTEND_LAST => Tail::ExtendLast,
        other => {
            return Err(Error::argument(format!(
                "config.tail: got {other}, allowed CP_TAIL_APPEND_DUMMY (0), CP_TAIL_EXTEND_LAST (1)"
            )));
        }
    };
    Ok(TailRule { ranks: c.ranks, chunks, target, tail, slots: (c.slots > 0).then_some(c.slots) })
}

/// # Safety
/// `ptr` is null or points to `count` numbers.
unsafe fn lengths(name: &str, ptr: *const i32, count: usize) -> Result<Vec<u64>> {
    if ptr.is_null() || !ptr.is_aligned() || count == 0 || count > 1 << 24 {
        return Err(Error::argument(format!(
            "{name}: got {ptr:p} with {count} entries, need at least [0]"
        )));
    }
    // SAFETY: the caller's promise.
    let given = unsafe { std::slice::from_raw_parts(ptr, count) };
    given
        .iter()
        .map(|n| {
            u64::try_from(*n)
                .map_err(|_| Error::argument(format!("{name}: got {n}, must not be negative")))
        })
        .collect()
}

/// Back to int32, which is what cumulative lengths are everywhere.
fn narrow(lengths: &[u64]) -> Result<Vec<i32>> {
    let one = |n: &u64| {
        i32::try_from(*n).map_err(|_| {
            Error::argument(format!("length: {n} tokens with padding do not fit in int32"))
        })
    };
    lengths.iter().map(one).collect()
}
