//! Masks that come with a call.

use super::abi::*;
use super::decode::slice;
use super::guard::{extensible, known_flags, zero};
use crate::error::{Error, Result};
use crate::regions::{Region, Regions};

/// Most slices: more are a mistake, and their list might not fit into memory.
const MOST: u64 = 1 << 24;

/// The mask slices of a call; none if it brings none.
///
/// # Safety
/// As [`extensible`]; the array has the length that the struct's docs say.
pub unsafe fn mask_slices(sequences: *const cp_sequences) -> Result<Regions> {
    // SAFETY: the caller's promise.
    let s = unsafe { extensible("sequences", sequences)? };
    if s.slices.is_null() != (s.slice_count == 0) || s.slice_count > MOST {
        return Err(Error::argument(format!(
            "sequences.slice_count: got {} with slices {:p}, allowed 0 and NULL, or 1 … {MOST}",
            s.slice_count, s.slices
        )));
    }
    // SAFETY: as many as `slice_count` says, by the caller's promise.
    let Some(list) = (unsafe { slice("sequences.slices", s.slices, s.slice_count as usize)? })
    else {
        return Ok(Regions::default());
    };
    let region = |(n, s): (usize, &cp_mask_slice)| {
        // Names are made where something is wrong: lists may be long, and come with every call.
        let flags = CP_SLICE_LO | CP_SLICE_HI;
        if s.flags & !flags != 0 {
            known_flags(&format!("slices[{n}].flags"), s.flags, flags)?;
        }
        let limit = |name: &str, value: i32, flag: u32| match (s.flags & flag, value) {
            (0, 0) => Ok(None),
            (0, _) => {
                zero(&format!("slices[{n}].{name}: without its flag"), u64::from(value as u32))
                    .map(|()| None)
            }
            _ => Ok(Some(value)),
        };
        let (lo, hi) = (limit("lo", s.lo, CP_SLICE_LO)?, limit("hi", s.hi, CP_SLICE_HI)?);
        let (q, k) = ((s.q_begin, s.q_end), (s.k_begin, s.k_end));
        Ok(Region { seq: s.sequence, q, k, lo, hi })
    };
    let list = list.iter().enumerate().map(region).collect::<Result<Vec<_>>>()?;
    Ok(Regions::new(&list))
}
