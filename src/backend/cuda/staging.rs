//! Work lists on their way to the device: a ring of page-locked slots. The host fills a slot, the stream copies it, and the slot is free
//! again when the copy is done, so that a call neither waits nor allocates once there are enough slots.

use crate::driver::{self, CUdeviceptr, CUstream, Device, Event, PinnedBuffer, Relaxed};
use crate::error::{Error, Result, Status};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Slots in flight before a call waits: as many calls as a host is ever usefully ahead of its device.
const MOST_IN_FLIGHT: usize = 32;
/// Slots that are made ahead.
const RESERVED: usize = 4;
/// The smallest slot.
const LEAST_BYTES: usize = 16 << 10;
/// How long a call waits for a slot.
const TIMEOUT: Duration = Duration::from_secs(60);

struct Slot {
    buffer: PinnedBuffer,
    event: Event,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody reads it.
    Free,
    /// The copy with this number, after which `event` was recorded, may be under way.
    InFlight(u64),
    /// A graph reads it at every replay.
    Captured,
}

/// The ring. Calls are made with the device current.
pub struct Staging {
    device: Arc<Device>,
    slots: Vec<Slot>,
    copies: u64,
    timeout: Duration,
}

impl Staging {
    /// An empty ring.
    pub fn new(device: Arc<Device>) -> Staging {
        Staging { device, slots: Vec::new(), copies: 0, timeout: TIMEOUT }
    }

    /// Allocates for uploads of `bytes`, so that they allocate nothing as long as no more than a few are in flight. 0: nothing.
    pub fn reserve(&mut self, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let size = slot_size(bytes);
        let fits = |s: &&Slot| s.state != State::Captured && s.buffer.bytes() >= size;
        for _ in self.slots.iter().filter(fits).count()..RESERVED {
            self.add(size)?;
        }
        Ok(())
    }

    /// Enqueues a copy of `blob` to the device, with the bytes of `patch` in place of its own from there on; the caller may change both at once. When captured in a graph the slot is the
    /// graph's, which reads it at every replay.
    ///
    /// Allocates if no slot that is large enough is free; if very many are in flight, waits for the oldest.
    ///
    /// # Safety
    /// `to` is valid for the blob until the copy is done; `stream` is a stream of this device, which is current.
    pub unsafe fn upload(
        &mut self,
        blob: &[u8],
        patch: (usize, &[u8]),
        to: CUdeviceptr,
        stream: CUstream,
        captured: bool,
    ) -> Result<()> {
        let (at, patch) = patch;
        assert!(at + patch.len() <= blob.len(), "the patch lies inside the blob");
        if blob.is_empty() {
            return Ok(());
        }
        let index = {
            // The driver forbids to allocate and to query events while a stream captures, unless the thread says that it knows.
            let _relaxed = captured.then(Relaxed::new).transpose()?;
            self.free(blob.len())?
        };
        let slot = &mut self.slots[index];
        let staged = slot.buffer.ptr();
        // SAFETY: the slot is large enough, nobody else reads or writes it, and blob and patch are other allocations.
        unsafe {
            staged.copy_from_nonoverlapping(blob.as_ptr(), blob.len());
            staged.add(at).copy_from_nonoverlapping(patch.as_ptr(), patch.len());
        }
        // From here on the slot counts as read, also when one of the calls fails halfway.
        self.copies += 1;
        slot.state = if captured { State::Captured } else { State::InFlight(self.copies) };
        // SAFETY: the caller's promise; the slot stays as it is until its event is done.
        unsafe {
            driver::copy_to_device(to, slot.buffer.ptr(), blob.len(), stream)?;
            if captured {
                return Ok(());
            }
            // Without a mark nobody will know when the copy is done: the slot is given up.
            slot.event.record(stream).inspect_err(|_| slot.state = State::Captured)
        }
    }

    /// Bytes of page-locked memory held.
    pub fn bytes(&self) -> usize {
        self.slots.iter().map(|s| s.buffer.bytes()).sum()
    }

    /// A free slot that is large enough.
    fn free(&mut self, bytes: usize) -> Result<usize> {
        let size = slot_size(bytes);
        for slot in &mut self.slots {
            if matches!(slot.state, State::InFlight(_)) && slot.event.is_done()? {
                slot.state = State::Free;
            }
        }
        // The smallest free slot that fits.
        let free = |s: &Slot| s.state == State::Free;
        let fitting =
            self.slots.iter().enumerate().filter(|(_, s)| free(s) && s.buffer.bytes() >= size);
        if let Some((index, _)) = fitting.min_by_key(|(_, s)| s.buffer.bytes()) {
            return Ok(index);
        }
        // A free slot is too small: it makes room.
        if let Some(index) = self.slots.iter().position(free) {
            self.slots.swap_remove(index);
        }
        let in_flight = self.slots.iter().filter(|s| s.state != State::Captured).count();
        if in_flight >= MOST_IN_FLIGHT {
            let index = self.wait_for_oldest()?;
            if self.slots[index].buffer.bytes() >= size {
                return Ok(index);
            }
            self.slots.swap_remove(index);
        }
        self.add(size)
    }

    /// Waits for the copy that was enqueued first.
    fn wait_for_oldest(&mut self) -> Result<usize> {
        let number = |s: &Slot| match s.state {
            State::InFlight(number) => number,
            _ => u64::MAX,
        };
        let oldest = self.slots.iter().enumerate().min_by_key(|(_, s)| number(s));
        let index = oldest.map(|(index, _)| index).ok_or_else(|| Error::internal("no slot"))?;
        let start = Instant::now();
        while !self.slots[index].event.is_done()? {
            if start.elapsed() > self.timeout {
                return Err(Error::new(
                    Status::Timeout,
                    format!(
                        "work lists: {MOST_IN_FLIGHT} calls are enqueued and the stream has not begun the oldest of them within {} ms",
                        self.timeout.as_millis()
                    ),
                ));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        self.slots[index].state = State::Free;
        Ok(index)
    }

    fn add(&mut self, bytes: usize) -> Result<usize> {
        let buffer = PinnedBuffer::new(&self.device, bytes)?;
        let event = Event::new(&self.device)?;
        self.slots.push(Slot { buffer, event, state: State::Free });
        Ok(self.slots.len() - 1)
    }
}

/// Powers of two, so that blobs of about one size share slots.
fn slot_size(bytes: usize) -> usize {
    bytes.max(LEAST_BYTES).next_power_of_two()
}

impl Drop for Staging {
    fn drop(&mut self) {
        let Ok(_current) = self.device.enter() else { return };
        // A layer may be dropped while a stream captures.
        let _relaxed = Relaxed::new();
        for slot in self.slots.drain(..) {
            match slot.state {
                State::Free => {}
                // A graph may outlive its layer, and no one can tell: its slots stay for ever.
                State::Captured => std::mem::forget(slot),
                // If the device is lost, nothing reads it any more.
                State::InFlight(_) => drop(slot.event.synchronize()),
            }
        }
    }
}
