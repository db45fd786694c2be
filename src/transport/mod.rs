//! Moving bytes between ranks: one object-safe trait, called only from the thread that is inside a `cp_` call.
//!
//! A plan's exchange step becomes one [`Transport::start`]: a *group* of sends and receives that progress together, as in
//! `ncclGroupStart … ncclGroupEnd`. Between one pair of ranks messages are matched in the order they were given, across groups
//! too. At most one group is in flight per transport: all communication is one queue (design §2.3).
//!
//! `local`: ranks are threads. `shm` (over `segment`): ranks are processes of one host. `user`: the caller's table of C functions, such as MPI.
//! `bootstrap` makes the first two from a unique id, an allgather callback, or a launcher's `environment`. `delay` is for tests.
//! `device`: the same between device memories, on streams.

pub mod bootstrap;
pub mod delay;
pub mod device;
mod environment;
pub mod local;
mod roll;
mod segment;
pub mod shm;
mod streams;
#[cfg(test)]
mod tests;
pub mod user;

use crate::error::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

/// A run of bytes in this process's memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// First byte.
    pub ptr: *mut u8,
    /// Number of bytes; may be 0.
    pub len: usize,
}

// SAFETY: a piece is an address and a length; whoever reads or writes through it answers for it (`Transport::start`).
unsafe impl Send for Piece {}

/// What goes to, or comes from, one peer: pieces that are one byte stream, cut differently on the two sides if need be.
#[derive(Clone, Debug)]
pub struct Message {
    /// The other rank, in the numbering of the transport (the parent group's).
    pub peer: u32,
    /// The bytes, in order.
    pub pieces: Vec<Piece>,
}

impl Message {
    /// Total number of bytes.
    pub fn bytes(&self) -> usize {
        self.pieces.iter().map(|p| p.len).sum()
    }
}

/// A host transport that a group and a device transport on top of it take turns with.
pub type Shared = Arc<std::sync::Mutex<Box<dyn Transport>>>;

/// One way of moving bytes.
///
/// After an error of a kind that [`crate::error::Status::loses_group`], every later call fails with the same error. An error of `test` or `wait`, of
/// whatever kind, gives up the group in flight as [`Transport::give_up`] does, so that the first cause reaches every rank. A rank that cancelled, or
/// whose transport was dropped, is lost to the peers that wait for it.
pub trait Transport: Send {
    /// This process's or thread's rank, 0 … size−1.
    fn rank(&self) -> u32;

    /// Number of ranks.
    fn size(&self) -> u32;

    /// `"local"`, `"shm"`, `"user"`.
    fn name(&self) -> &'static str;

    /// Starts a group of sends and receives and returns without waiting. No message's peer is this rank. Every piece stays
    /// valid and untouched (sends) or unread (receives) until [`Transport::test`] returns true or [`Transport::cancel`] returns.
    /// Several messages to one peer in a group are one stream in the order given.
    ///
    /// # Safety
    /// The pieces point to memory that stays valid as long as just said.
    unsafe fn start(&mut self, sends: &[Message], recvs: &[Message]) -> Result<()>;

    /// Makes progress without blocking; true once the started group is complete (or none is in flight).
    fn test(&mut self) -> Result<bool>;

    /// Like `test`, but sleeps for a short while (at most some milliseconds) when nothing moves, so that a waiting rank
    /// leaves the processor to others. A dead peer of the group in flight is reported here as `PeerLost`, named.
    fn wait(&mut self) -> Result<bool>;

    /// The first peer whose bytes the group in flight still waits for (to come, or to be taken), to name it when the caller's deadline passes.
    fn waiting_for(&self) -> Option<u32>;

    /// Gives up the group in flight because of `why`. When it returns no piece is touched any more. The transport is unusable afterwards:
    /// later calls fail with `why`, and so do peers that wait for this rank, where the transport can tell them (`local`, `shm`).
    fn give_up(&mut self, why: Error);

    /// Gives up without a reason: later calls fail with `Aborted`, peers that wait for this rank with `PeerLost`.
    fn cancel(&mut self);

    /// Small allgather among `members` (ranks, ascending, this one included): every member gives the same number of bytes (at most 4096);
    /// the result holds them in the order of `members`. Same order of calls on all members. Fails with `Timeout` naming the first member
    /// that has not come by `deadline`, or `PeerLost` naming one that died. Not called while a group is in flight.
    fn allgather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>>;

    /// A function that any thread may call: it makes this rank's pending and future calls, and those of every rank that the
    /// transport can reach, fail with `Aborted`.
    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync>;

    /// Bytes of memory that the transport itself holds for this rank (mailboxes, rings), as far as they are touched.
    fn memory_bytes(&self) -> usize;
}
