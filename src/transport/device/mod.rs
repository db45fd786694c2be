//! Moving bytes between device memories: exchanges are enqueued on a stream, and the host goes on.
//!
//! An exchange is what it is for [`super::Transport`]: a group of sends and receives that progress together, messages between one pair of
//! ranks matched in order, all exchanges of a group one queue with the same order on every rank. Only completion differs: it is the
//! stream's, and errors come later.
//!
//! `local`: ranks are threads, copies between their memories. `nccl`: processes, one device each. `staged`: through the host, over any
//! [`super::Transport`]; the last resort.

mod board;
pub mod join;
pub mod local;
pub mod nccl;
pub mod staged;

use super::Message;
use crate::driver::CUstream;
use crate::error::{Error, Result, Status};

/// One way of moving bytes between devices. Called only from the thread that is inside a `cp_` call, with the device current.
pub trait DeviceTransport: Send {
    /// `"cuda local"`, `"nccl"`, `"staged"` with the host transport's name.
    fn name(&self) -> &'static str;

    /// Must both sides of a message be cut into the same pieces? (NCCL matches sends and receives one by one.)
    fn same_pieces(&self) -> bool;

    /// Can an exchange be captured in a CUDA graph? The error names the transport and says why not.
    fn capturable(&self) -> Result<()>;

    /// Does the host meet the other ranks in every call anyway, so that ranks can agree before each call at no price?
    fn meets(&self) -> bool;

    /// Enqueues an exchange on `stream`: it starts when the stream's earlier work is done, and the stream's later work sees what arrived.
    /// `step` says where in the plan, for messages. No message's peer is this rank.
    ///
    /// # Safety
    /// The pieces are device memory that stays valid, untouched (sends) or unread (receives) by others than work that is ordered after the
    /// exchange, until it is done; `stream` is a stream of the current device.
    unsafe fn exchange(
        &mut self,
        sends: &[Message],
        recvs: &[Message],
        stream: CUstream,
        step: Step,
    ) -> Result<()>;

    /// Makes the way to these ranks, which name this one too, so that later exchanges with them allocate and connect nothing. Blocks.
    fn warm_up(&mut self, peers: &[u32]) -> Result<()> {
        let _ = peers;
        Ok(())
    }

    /// An error that came after its call had returned, e.g. a peer that died; the group is lost then.
    fn failed(&self) -> Option<Error>;

    /// Gives up: nothing stays in flight, peers learn why where they can be reached, later calls fail.
    fn give_up(&mut self, why: Error);

    /// A function that any thread may call: pending and future exchanges of this rank fail with `Aborted`.
    fn aborter(&self) -> std::sync::Arc<dyn Fn() + Send + Sync>;

    /// Bytes of device memory that the transport holds, as far as it knows.
    fn memory_bytes(&self) -> usize;
}

fn not_capturable(rank: u32, name: &str, why: &str) -> Error {
    Error::new(
        Status::NotCapturable,
        format!(
            "rank {rank}: an exchange of the transport `{name}` cannot be captured in a CUDA graph: {why}; the transport `nccl` can"
        ),
    )
}

/// Where in a plan an exchange is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Index of the plan's step.
    pub index: u32,
    /// Stage.
    pub stage: u32,
    /// Number of the call on this group.
    pub call: u64,
}

#[cfg(test)]
mod board_tests;
#[cfg(test)]
mod cuda_tests;
