//! The last resort: through page-locked host memory and any [`Transport`] between hosts. For processes without NCCL, and for tests.
//!
//! It is slow, and it blocks: every exchange waits on the host for all that was enqueued on its stream before, so the host cannot run ahead
//! of the device. Nothing of it can be captured in a CUDA graph.
//!
//! The host transport is shared with the group, which agrees over it between exchanges: it is locked only inside the methods here, and must not be
//! locked by the thread that calls them.

use super::{DeviceTransport, Step};
use crate::driver::{self, CUdeviceptr, CUstream, Device, Event, PinnedBuffer};
use crate::error::{Error, Result, Status};
use crate::transport::roll::lock;
use crate::transport::{Message, Piece, Shared, Transport};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Every message begins at a multiple of this in page-locked memory.
const ALIGN: usize = 256;
/// Looks at an event without sleeping in between: about 50 µs.
const LOOKS: u32 = 100;
/// Sleep between later looks.
const NAP: Duration = Duration::from_micros(50);

struct Staged {
    device: Arc<Device>,
    host: Shared,
    rank: u32,
    name: &'static str,
    timeout: Duration,
    out: Buffer,
    into: Buffer,
    /// The stream has copied everything into `out`.
    left: Event,
    /// The stream has copied everything out of `into`.
    arrived: Event,
    in_flight: bool,
    failed: Option<Error>,
}

/// Messages in page-locked memory, one piece each. Grows to the largest exchange and stays.
struct Buffer {
    memory: PinnedBuffer,
    messages: Vec<Message>,
}

impl Buffer {
    fn new(device: &Arc<Device>) -> Result<Buffer> {
        Ok(Buffer { memory: PinnedBuffer::new(device, 0)?, messages: Vec::new() })
    }

    /// A place for every message. No copy from or to the memory may be in flight.
    fn lay_out(&mut self, device: &Arc<Device>, like: &[Message]) -> Result<()> {
        let bytes: usize = like.iter().map(|m| m.bytes().next_multiple_of(ALIGN)).sum();
        if bytes > self.memory.bytes() {
            self.memory = PinnedBuffer::new(device, bytes.next_power_of_two())?;
        }
        self.messages.truncate(like.len());
        let mut at = self.memory.ptr();
        for (i, m) in like.iter().enumerate() {
            let piece = Piece { ptr: at, len: m.bytes() };
            at = at.wrapping_add(piece.len.next_multiple_of(ALIGN));
            match self.messages.get_mut(i) {
                Some(known) => (known.peer, known.pieces[0]) = (m.peer, piece),
                None => self.messages.push(Message { peer: m.peer, pieces: vec![piece] }),
            }
        }
        Ok(())
    }

    /// Calls `copy` with (host address, device address, bytes) for every run of the device's pieces.
    fn runs(
        &self,
        device: &[Message],
        mut copy: impl FnMut(*mut u8, CUdeviceptr, usize) -> Result<()>,
    ) -> Result<()> {
        for (host, device) in self.messages.iter().zip(device) {
            let mut at = host.pieces[0].ptr;
            let mut run = Piece { ptr: std::ptr::null_mut(), len: 0 };
            for piece in device.pieces.iter().filter(|p| p.len > 0) {
                if run.len > 0 && run.ptr.wrapping_add(run.len) == piece.ptr {
                    run.len += piece.len;
                    continue;
                }
                if run.len > 0 {
                    copy(at, run.ptr as CUdeviceptr, run.len)?;
                }
                at = at.wrapping_add(run.len);
                run = *piece;
            }
            if run.len > 0 {
                copy(at, run.ptr as CUdeviceptr, run.len)?;
            }
        }
        Ok(())
    }
}

impl Staged {
    /// # Safety
    /// As [`DeviceTransport::exchange`].
    unsafe fn try_exchange(
        &mut self,
        host: &mut dyn Transport,
        sends: &[Message],
        recvs: &[Message],
        stream: CUstream,
        step: Step,
    ) -> Result<()> {
        // What the last exchange received has left `into`, on whatever stream; what it sent left `out` before it returned.
        self.until(&self.arrived, host, step)?;
        self.out.lay_out(&self.device, sends)?;
        self.into.lay_out(&self.device, recvs)?;
        let copied = self.out.runs(sends, |to, from, bytes| {
            // SAFETY: the caller's promise for the device; the buffer stays until `left` is done.
            unsafe { driver::copy_to_host(to, from, bytes, stream) }
        });
        // After an error too: some copies may have been enqueued. SAFETY: the caller's promise.
        copied.and(unsafe { self.left.record(stream) })?;
        self.until(&self.left, host, step)?;
        self.in_flight = true;
        // SAFETY: the buffers stay as they are until the host's exchange is complete or given up.
        unsafe { host.start(&self.out.messages, &self.into.messages)? };
        let deadline = Instant::now() + self.timeout;
        while !host.wait()? {
            if Instant::now() >= deadline {
                let peer = host.waiting_for().map_or("?".into(), |p| p.to_string());
                return Err(
                    self.late(&format!("rank {peer} did not end its part of an exchange"), step)
                );
            }
        }
        self.in_flight = false;
        let copied = self.into.runs(recvs, |from, to, bytes| {
            // SAFETY: the caller's promise for the device; the buffer stays until `arrived` is done.
            unsafe { driver::copy_to_device(to, from, bytes, stream) }
        });
        // SAFETY: the caller's promise.
        copied.and(unsafe { self.arrived.record(stream) })
    }

    /// Waits on the host until the event is done, or the group is aborted, or the deadline passes.
    fn until(&self, event: &Event, host: &mut dyn Transport, step: Step) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        let mut looks = 0;
        while !event.is_done()? {
            host.test()?;
            looks += 1;
            if looks < LOOKS {
                std::thread::yield_now();
                continue;
            }
            if Instant::now() >= deadline {
                return Err(self.late("the device did not end the work before an exchange", step));
            }
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    fn late(&self, what: &str, step: Step) -> Error {
        Error::new(
            Status::Timeout,
            format!(
                "rank {}: {what} within {} ms (step {} of call {}, stage {})",
                self.rank,
                self.timeout.as_millis(),
                step.index,
                step.call,
                step.stage
            ),
        )
    }
}

impl DeviceTransport for Staged {
    fn name(&self) -> &'static str {
        self.name
    }

    fn same_pieces(&self) -> bool {
        false
    }

    fn capturable(&self) -> Result<()> {
        Err(super::not_capturable(self.rank, self.name, "it goes through host memory"))
    }

    fn meets(&self) -> bool {
        true
    }

    unsafe fn exchange(
        &mut self,
        sends: &[Message],
        recvs: &[Message],
        stream: CUstream,
        step: Step,
    ) -> Result<()> {
        if let Some(e) = &self.failed {
            return Err(e.clone());
        }
        let host = self.host.clone();
        let mut host = lock(&host);
        // SAFETY: the caller's promise.
        let result = unsafe { self.try_exchange(&mut **host, sends, recvs, stream, step) };
        if let Err(e) = &result {
            host.give_up(e.clone());
            self.in_flight = false;
            self.failed = Some(e.clone());
        }
        result
    }

    fn failed(&self) -> Option<Error> {
        self.failed.clone()
    }

    fn give_up(&mut self, why: Error) {
        lock(&self.host).give_up(why.clone());
        self.in_flight = false;
        self.failed.get_or_insert(why);
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        lock(&self.host).aborter()
    }

    fn memory_bytes(&self) -> usize {
        0
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Only after a panic in the middle of an exchange.
        if self.in_flight {
            lock(&self.host).cancel();
        }
        let deadline = Instant::now() + self.timeout;
        for event in [&self.left, &self.arrived] {
            // Freeing the memory waits for the device if this does not.
            while matches!(event.is_done(), Ok(false)) && Instant::now() < deadline {
                std::thread::sleep(NAP);
            }
        }
    }
}

/// The transport of this rank of `host`; local. `timeout` bounds the hosts' part of every exchange, and the wait for the device before it.
pub fn make(
    device: &Arc<Device>,
    host: &Shared,
    timeout: Duration,
) -> Result<Box<dyn DeviceTransport>> {
    let (rank, under) = {
        let host = lock(host);
        (host.rank(), host.name())
    };
    let name = match under {
        "local" => "staged over local",
        "shm" => "staged over shm",
        "user" => "staged over user",
        _ => "staged",
    };
    Ok(Box::new(Staged {
        device: device.clone(),
        host: host.clone(),
        rank,
        name,
        timeout,
        out: Buffer::new(device)?,
        into: Buffer::new(device)?,
        left: Event::new(device)?,
        arrived: Event::new(device)?,
        in_flight: false,
        failed: None,
    }))
}
