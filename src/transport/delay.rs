//! A transport that is as late and as unordered as the contract allows, for tests.
//!
//! Receive pieces are filled with 0xFF at the start; the group begins a few calls later, so that send pieces are read late; what has arrived
//! is put into place message by message, in random order, a few calls later again. A plan that reads a receive slot before its exchange is
//! complete, or writes a send slot that is still in flight, gives wrong numbers.

use super::{Message, Piece, Transport};
use crate::error::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

/// Wraps `inner`; the same seed gives the same delays, counted in calls of `test` and `wait`.
pub fn delay(inner: Box<dyn Transport>, seed: u64) -> Box<dyn Transport> {
    let state = seed ^ (u64::from(inner.rank()) << 32) ^ 0x9e37_79b9_7f4a_7c15;
    Box::new(Delay {
        inner,
        state,
        sends: Vec::new(),
        recvs: Vec::new(),
        buffers: Vec::new(),
        phase: Phase::Idle,
    })
}

enum Phase {
    Idle,
    /// Calls left until the inner transport starts.
    Held(u32),
    Moving,
    /// Messages that are still to be put into place, in this order, and calls left until the next one is.
    Arrived(Vec<usize>, u32),
}

struct Delay {
    inner: Box<dyn Transport>,
    state: u64,
    sends: Vec<Message>,
    recvs: Vec<Message>,
    /// What the inner transport receives into, one per message.
    buffers: Vec<Vec<u8>>,
    phase: Phase,
}

impl Delay {
    /// xorshift64*
    fn random(&mut self, below: u32) -> u32 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        ((self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32) % below
    }

    fn step(&mut self, wait: bool) -> Result<bool> {
        match &mut self.phase {
            Phase::Idle => return self.inner.test(),
            Phase::Held(0) => {
                let direct: Vec<Message> = (self.recvs.iter().zip(&mut self.buffers))
                    .map(|(m, b)| Message {
                        peer: m.peer,
                        pieces: vec![Piece { ptr: b.as_mut_ptr(), len: b.len() }],
                    })
                    .collect();
                // SAFETY: the caller of `start` keeps the send pieces valid; the buffers live until the inner group is over.
                unsafe { self.inner.start(&self.sends, &direct)? };
                self.phase = Phase::Moving;
            }
            Phase::Held(calls) => *calls -= 1,
            Phase::Moving => {
                let done = if wait { self.inner.wait()? } else { self.inner.test()? };
                if done {
                    let mut order: Vec<usize> = (0..self.recvs.len()).collect();
                    for i in (1..order.len()).rev() {
                        order.swap(i, self.random(i as u32 + 1) as usize);
                    }
                    self.phase = Phase::Arrived(order, self.random(3));
                }
            }
            Phase::Arrived(_, calls) if *calls > 0 => *calls -= 1,
            Phase::Arrived(order, _) => {
                let Some(i) = order.pop() else {
                    self.phase = Phase::Idle;
                    return Ok(true);
                };
                let mut from = self.buffers[i].as_slice();
                for p in &self.recvs[i].pieces {
                    // SAFETY: the caller of `start` keeps the receive pieces valid; the buffer is as long as they are together.
                    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), p.ptr, p.len) };
                    from = &from[p.len..];
                }
                let calls = self.random(3);
                if let Phase::Arrived(_, left) = &mut self.phase {
                    *left = calls;
                }
            }
        }
        Ok(false)
    }
}

impl Transport for Delay {
    fn rank(&self) -> u32 {
        self.inner.rank()
    }

    fn size(&self) -> u32 {
        self.inner.size()
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }

    unsafe fn start(&mut self, sends: &[Message], recvs: &[Message]) -> Result<()> {
        if !matches!(self.phase, Phase::Idle) {
            return Err(super::streams::in_flight(self.rank(), "start"));
        }
        super::streams::check_peers(self.rank(), self.size(), sends, recvs)?;
        for p in recvs.iter().flat_map(|m| &m.pieces) {
            // SAFETY: receive pieces are ours to write from now on.
            unsafe { std::ptr::write_bytes(p.ptr, 0xff, p.len) };
        }
        self.sends = sends.to_vec();
        self.recvs = recvs.to_vec();
        self.buffers = recvs.iter().map(|m| vec![0; m.bytes()]).collect();
        self.phase = Phase::Held(self.random(4));
        Ok(())
    }

    fn test(&mut self) -> Result<bool> {
        self.step(false)
    }

    fn wait(&mut self) -> Result<bool> {
        self.step(true)
    }

    fn waiting_for(&self) -> Option<u32> {
        match self.phase {
            Phase::Idle => None,
            Phase::Moving => self.inner.waiting_for(),
            Phase::Held(_) | Phase::Arrived(..) => {
                self.recvs.first().or(self.sends.first()).map(|m| m.peer)
            }
        }
    }

    fn give_up(&mut self, why: Error) {
        self.inner.give_up(why);
        self.phase = Phase::Idle;
    }

    fn cancel(&mut self) {
        self.inner.cancel();
        self.phase = Phase::Idle;
    }

    fn allgather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        if !matches!(self.phase, Phase::Idle) {
            return Err(super::streams::in_flight(self.rank(), "allgather"));
        }
        self.inner.allgather(members, mine, deadline)
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        self.inner.aborter()
    }

    fn memory_bytes(&self) -> usize {
        self.inner.memory_bytes() + self.buffers.iter().map(Vec::len).sum::<usize>()
    }
}

impl Drop for Delay {
    /// The inner transport writes into the buffers, so it stops first.
    fn drop(&mut self) {
        if matches!(self.phase, Phase::Moving) {
            self.inner.cancel();
        }
    }
}
