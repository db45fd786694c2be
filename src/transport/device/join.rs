//! How the ranks of a group on CUDA come to a device transport: they compare notes over the host transport once, so that all take the same
//! way, and what is missing on one rank is told to all.

use super::{DeviceTransport, local, nccl, staged};
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::transport::{Shared, Transport};
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

/// Joins the ranks of `host`. Collective over all of them. `ready` is this rank's device, or why there is none.
pub fn join(
    device: Result<Arc<Device>>,
    host: &Shared,
    way: Way,
    timeout: Duration,
) -> Result<Box<dyn DeviceTransport>> {
    let (rank, size, threads) = {
        let host = host.lock().unwrap_or_else(PoisonError::into_inner);
        (host.rank(), host.size(), host.name() == "local")
    };
    let wants_nccl = way == Way::Nccl || (way == Way::Auto && !threads);
    let library = if wants_nccl { nccl::api::find().map(|_| ()) } else { Ok(()) };
    let mut note = [0; NOTE_BYTES];
    note[1] = way as u8;
    note[2] = u8::from(wants_nccl && library.is_ok());
    let mut verdict = device.as_ref().map(|_| ()).map_err(Error::clone);
    if way == Way::Nccl {
        verdict = verdict.and(library);
    }
    if verdict.is_ok() && rank == 0 && note[2] == 1 {
        match nccl::unique_id() {
            Ok(id) => note[16..144].copy_from_slice(&id),
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
    let members: Vec<u32> = (0..size).collect();
    let all = {
        let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
        host.allgather(&members, &note, Instant::now() + timeout)?
    };
    verdict?;
    let device = device?;
    let notes: Vec<&[u8]> = all.chunks(NOTE_BYTES).collect();
    if let Some(peer) = notes.iter().position(|n| n[0] != FINE) {
        let text = &notes[peer][TEXT_AT..];
        let end = usize::from(u16::from_le_bytes([text[0], text[1]])).min(text.len() - 2);
        let text = String::from_utf8_lossy(&text[2..2 + end]).into_owned();
        return Err(Error::new(
            Status::Mismatch,
            format!("rank {rank}: rank {peer} cannot join the group: {text}"),
        ));
    }
    if let Some(peer) = notes.iter().position(|n| n[1] != note[1]) {
        return Err(Error::new(
            Status::Mismatch,
            format!("rank {rank}: rank {peer} asks for another transport_kind than this rank"),
        ));
    }
    let everywhere = notes.iter().all(|n| n[2] == 1);
    match way {
        Way::Auto | Way::Local if threads => {
            let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
            local::make(&device, &mut **host, timeout)
        }
        Way::Local => Err(Error::unsupported(format!(
            "rank {rank}: transport_kind: local is for ranks that are threads of one process"
        ))),
        Way::Auto | Way::Nccl if everywhere => {
            let mut id = [0; 128];
            id.copy_from_slice(&notes[0][16..144]);
            Ok(Box::new(nccl::join(&device, &id, rank, size, timeout)?))
        }
        _ => staged::make(&device, host, timeout),
    }
}
