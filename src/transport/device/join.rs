//! How the ranks of a group on CUDA come to a device transport: they compare notes over the host transport once, so that all take the same
//! way, and what is missing on one rank is told to all.

use super::{DeviceTransport, local, nccl, staged};
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::transport::Shared;
use crate::transport::bootstrap::AllGather;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How bytes move between devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Threads of one process: `Local`. Processes: `Nccl` if every rank finds the library, else `Staged`.
    Auto,
    /// Copies between the devices of one process.
    Local,
    /// NCCL, one device per rank.
    Nccl,
    /// Through the host.
    Staged,
}

/// What every rank tells the others: its way, whether it finds NCCL, an NCCL id (rank 0), or what went wrong.
const NOTE_BYTES: usize = 512;
const TEXT_AT: usize = 144;
const FINE: u8 = 0;
const FAILED: u8 = 1;

/// Joins the ranks of `host`. Collective over all of them. `device` is this rank's, or why there is none.
pub fn join(
    device: Result<Arc<Device>>,
    host: &Shared,
    way: Way,
    timeout: Duration,
) -> Result<Box<dyn DeviceTransport>> {
    let (rank, size, threads) = {
        let host = lock(host);
        (host.rank(), host.size(), host.name() == "local")
    };
    let wants_nccl = way == Way::Nccl || (way == Way::Auto && !threads);
    let (mine, verdict) = note(device.as_ref(), rank, way, wants_nccl);
    let members: Vec<u32> = (0..size).collect();
    let all = lock(host).allgather(&members, &mine, Instant::now() + timeout)?;
    verdict?;
    let device = device?;
    let notes = read(rank, &mine, &all)?;
    match way {
        Way::Auto | Way::Local if threads => local::make(&device, &mut **lock(host), timeout),
        Way::Local => Err(Error::unsupported(format!(
            "rank {rank}: transport_kind: local is for ranks that are threads of one process"
        ))),
        Way::Auto | Way::Nccl if notes.iter().all(|n| n[2] == 1) => {
            Ok(Box::new(nccl::join(&device, &nccl_id(notes[0]), rank, size, timeout)?))
        }
        _ => staged::make(&device, host, timeout),
    }
}

/// Joins ranks of several hosts that have no host transport between them, only the caller's allgather: over NCCL, and the ranks cannot agree
/// about calls afterwards. Collective; `gather` is called once.
pub fn join_by_gather(
    device: Result<Arc<Device>>,
    rank: u32,
    size: u32,
    timeout: Duration,
    gather: &mut AllGather<'_>,
) -> Result<Box<dyn DeviceTransport>> {
    let (mine, verdict) = note(device.as_ref(), rank, Way::Nccl, true);
    let all = gather(&mine)?;
    verdict?;
    if all.len() != NOTE_BYTES * size as usize {
        return Err(Error::argument(format!(
            "rank {rank}: the allgather callback returned {} bytes; {} are wanted",
            all.len(),
            NOTE_BYTES * size as usize
        )));
    }
    let notes = read(rank, &mine, &all)?;
    Ok(Box::new(nccl::join(&device?, &nccl_id(notes[0]), rank, size, timeout)?))
}

/// This rank's note, and its own verdict on itself.
fn note(
    device: std::result::Result<&Arc<Device>, &Error>,
    rank: u32,
    way: Way,
    wants_nccl: bool,
) -> ([u8; NOTE_BYTES], Result<()>) {
    let library = if wants_nccl { nccl::api::find().map(|_| ()) } else { Ok(()) };
    let mut note = [0; NOTE_BYTES];
    note[1] = way as u8;
    note[2] = u8::from(wants_nccl && library.is_ok());
    let mut verdict = device.map(|_| ()).map_err(Error::clone);
    if way == Way::Nccl {
        verdict = verdict.and(library);
    }
    if verdict.is_ok() && rank == 0 && note[2] == 1 {
        match nccl::unique_id() {
            Ok(id) => note[16..TEXT_AT].copy_from_slice(&id),
            Err(e) => verdict = Err(e),
        }
    }
    if let Err(e) = &verdict {
        let mut end = e.text.len().min(NOTE_BYTES - TEXT_AT - 2);
        while !e.text.is_char_boundary(end) {
            end -= 1;
        }
        note[0] = FAILED;
        note[TEXT_AT..TEXT_AT + 2].copy_from_slice(&(end as u16).to_le_bytes());
        note[TEXT_AT + 2..TEXT_AT + 2 + end].copy_from_slice(&e.text.as_bytes()[..end]);
    }
    (note, verdict)
}

/// Everybody's notes, if all can go on and mean the same.
fn read<'a>(rank: u32, mine: &[u8], all: &'a [u8]) -> Result<Vec<&'a [u8]>> {
    let notes: Vec<&[u8]> = all.chunks(NOTE_BYTES).collect();
    let mismatch = |text| Err(Error::new(Status::Mismatch, format!("rank {rank}: {text}")));
    if let Some(peer) = notes.iter().position(|n| n[0] != FINE) {
        let text = &notes[peer][TEXT_AT..];
        let end = usize::from(u16::from_le_bytes([text[0], text[1]])).min(text.len() - 2);
        let text = String::from_utf8_lossy(&text[2..2 + end]);
        return mismatch(format!("rank {peer} cannot join the group: {text}"));
    }
    match notes.iter().position(|n| n[1] != mine[1]) {
        Some(peer) => mismatch(format!("rank {peer} asks for another transport_kind")),
        None => Ok(notes),
    }
}

fn nccl_id(note: &[u8]) -> [u8; 128] {
    std::array::from_fn(|i| note[16 + i])
}

fn lock(host: &Shared) -> std::sync::MutexGuard<'_, Box<dyn crate::transport::Transport>> {
    host.lock().unwrap_or_else(PoisonError::into_inner)
}
