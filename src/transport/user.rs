//! A transport that the caller brings, as a table of C functions: MPI (`context_parallel_mpi.h`), or anything else that moves bytes.

use super::streams::{self, Stream, Streams};
use super::{Message, Transport};
use crate::error::{Error, Result, Status};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A run of bytes in this process's memory. In C: `cp_piece`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CpPiece {
    /// First byte. Never NULL: runs of no bytes are left out.
    pub ptr: *mut c_void,
    /// Number of bytes, at least 1.
    pub bytes: usize,
}

/// The bytes to, or from, one peer in one group: its pieces in order, as one stream. The peer may cut the same stream differently.
/// In C: `cp_message`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CpMessage {
    /// The other rank, never this one.
    pub peer: u32,
    /// Number of pieces. 0 for a stream of no bytes, which is a message too.
    pub n_pieces: u32,
    /// The pieces; meaningless if there are none.
    pub pieces: *const CpPiece,
}

/// A transport of the caller's own. In C: `cp_transport_ops`.
///
/// The functions are called only by the thread that is inside a `cp_` call on the group, one at a time, so MPI needs no more than
/// MPI_THREAD_FUNNELED. They must not call `cp_` functions on that group, throw, or jump out. Each returns 0 or a `cp_status`; what is not a
/// status counts as CP_ERR_TRANSPORT (11). After an error of `start`, `test` or `allgather`, `cancel` is called, and then nothing but
/// `destroy`. Set `struct_size` to the size of the struct, and everything that is not used to zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CpTransportOps {
    /// `sizeof(cp_transport_ops)`.
    pub struct_size: u32,
    /// Must be 0.
    pub flags: u32,
    /// Given to every function.
    pub ctx: *mut c_void,
    /// Starts a group of sends and receives, at most one message to and one from each peer, and returns without waiting for peers. All of
    /// them progress together. Between one pair of ranks, messages match in the order of the groups. The arrays are valid until the function
    /// returns, the bytes that the pieces point to until `test` reports the end or `cancel` returns. There is never more than one group.
    pub start: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            sends: *const CpMessage,
            n_sends: usize,
            recvs: *const CpMessage,
            n_recvs: usize,
        ) -> i32,
    >,
    /// Makes progress without blocking; sets `*done` to 1 once the group is complete, else to 0. A message whose length is not what this
    /// rank expects should give CP_ERR_MISMATCH (8), a peer known to be dead CP_ERR_PEER_LOST (13).
    pub test: Option<unsafe extern "C" fn(ctx: *mut c_void, done: *mut i32) -> i32>,
    /// Gives up the group in flight, if there is one. When it returns, no piece is touched any more.
    pub cancel: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// Every member gives `bytes` bytes (at most 4096) at `mine`; `all` receives them in the order of `members`, `n_members` times `bytes`.
    /// `members` are ranks in ascending order, this one among them. All members call it in the same order. Never during a group.
    /// Blocks for at most `timeout_ms`, then returns CP_ERR_TIMEOUT (12).
    pub allgather: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            members: *const u32,
            n_members: usize,
            mine: *const c_void,
            all: *mut c_void,
            bytes: usize,
            timeout_ms: u64,
        ) -> i32,
    >,
    /// Called once, when the group is destroyed. May be NULL.
    pub destroy: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// Sets `*peer` to the rank that the group in flight waits for, or that the call that just failed waited for, and returns 0; returns
    /// something else if it does not know. Serves only to name the rank in an error. May be NULL.
    pub waiting_for: Option<unsafe extern "C" fn(ctx: *mut c_void, peer: *mut u32) -> i32>,
}

struct User {
    ops: CpTransportOps,
    rank: u32,
    size: u32,
    sends: Streams,
    recvs: Streams,
    /// The streams as C sees them, sends then receives, and their pieces; used again from group to group.
    messages: Vec<CpMessage>,
    pieces: Vec<CpPiece>,
    in_flight: bool,
    failed: Option<Error>,
    aborted: Arc<AtomicBool>,
    /// Is `destroy` this library's to call?
    owned: Arc<AtomicBool>,
}

// SAFETY: the pointers are the caller's, who was told that any thread that makes `cp_` calls may use them, one at a time.
unsafe impl Send for User {}

/// Makes a transport of the caller's table, as `rank` of `size`. From then on the library owns `ctx` and will call `destroy`; after an error
/// the caller still owns it.
///
/// # Safety
/// `ops` is NULL or points to `struct_size` readable bytes that keep the contract of [`CpTransportOps`].
pub unsafe fn from_ops(
    ops: *const CpTransportOps,
    rank: u32,
    size: u32,
) -> Result<Box<dyn Transport>> {
    // SAFETY: as this function's own.
    let (transport, owned) = unsafe { lent(ops, rank, size)? };
    owned.store(true, Ordering::SeqCst);
    Ok(transport)
}

/// The same, but the caller goes on owning `ctx` until the flag that comes along is set.
///
/// # Safety
/// As [`from_ops`].
pub unsafe fn lent(
    ops: *const CpTransportOps,
    rank: u32,
    size: u32,
) -> Result<(Box<dyn Transport>, Arc<AtomicBool>)> {
    // SAFETY: as this function's own.
    let ops = unsafe { read_ops(ops)? };
    if rank >= size {
        return Err(Error::argument(format!(
            "rank is {rank}, size is {size}; allowed is a size of 1 or more and a rank of 0..size"
        )));
    }
    let owned = Arc::new(AtomicBool::new(false));
    let user = User {
        ops,
        rank,
        size,
        sends: Streams::default(),
        recvs: Streams::default(),
        messages: Vec::new(),
        pieces: Vec::new(),
        in_flight: false,
        failed: None,
        aborted: Arc::default(),
        owned: owned.clone(),
    };
    Ok((Box::new(user), owned))
}

/// Copies a table of any version: what a shorter one lacks is absent, what a longer one has beyond ours must be zero.
///
/// # Safety
/// As `from_ops`.
unsafe fn read_ops(ops: *const CpTransportOps) -> Result<CpTransportOps> {
    if ops.is_null() {
        return Err(Error::argument("ops is NULL; a cp_transport_ops is wanted"));
    }
    // SAFETY: the first field is always there.
    let given = unsafe { (&raw const (*ops).struct_size).read() } as usize;
    let known = size_of::<CpTransportOps>();
    let least = std::mem::offset_of!(CpTransportOps, destroy);
    if given < least {
        return Err(Error::argument(format!(
            "ops.struct_size is {given}; allowed is {least} or more, usually sizeof(cp_transport_ops) = {known}"
        )));
    }
    // SAFETY: `given` bytes are readable; all-zero function pointers are `None`, an all-zero table is a valid value.
    let table = unsafe {
        let tail = std::slice::from_raw_parts(
            ops.cast::<u8>().add(known.min(given)),
            given.saturating_sub(known),
        );
        if tail.iter().any(|&b| b != 0) {
            let text = format!(
                "ops.struct_size is {given} and uses fields that this version, which knows {known} bytes, does not have"
            );
            return Err(Error::new(Status::Version, text));
        }
        let mut table: CpTransportOps = std::mem::zeroed();
        std::ptr::copy_nonoverlapping(ops.cast::<u8>(), (&raw mut table).cast(), known.min(given));
        table
    };
    if table.flags != 0 {
        return Err(Error::argument(format!("ops.flags is {:#x}; allowed is 0", table.flags)));
    }
    let required = [
        ("start", table.start.is_none()),
        ("test", table.test.is_none()),
        ("cancel", table.cancel.is_none()),
        ("allgather", table.allgather.is_none()),
    ];
    match required.iter().find(|r| r.1) {
        Some((name, _)) => Err(Error::argument(format!("ops.{name} is NULL; it is required"))),
        None => Ok(table),
    }
}

fn missing() -> Error {
    Error::internal("a required transport function is missing")
}

impl User {
    fn usable(&self) -> Result<()> {
        match &self.failed {
            Some(e) => Err(e.clone()),
            None if self.aborted.load(Ordering::SeqCst) => Err(streams::aborted_by(self.rank)),
            None => Ok(()),
        }
    }

    fn fail<T>(&mut self, e: Error) -> Result<T> {
        if self.failed.is_none() {
            self.failed = Some(e.clone());
            if let Some(cancel) = self.ops.cancel {
                // SAFETY: the caller's function with its own context.
                unsafe { cancel(self.ops.ctx) };
            }
        }
        self.in_flight = false;
        Err(e)
    }

    /// What a function returned, as a result that names the function and the rank that was waited for.
    fn check(&mut self, what: &str, returned: i32) -> Result<()> {
        if returned == 0 {
            return Ok(());
        }
        let status = Status::from_i32(returned).unwrap_or(Status::Transport);
        let peer = self.ask();
        if let (Status::Timeout, Some(peer)) = (status, peer) {
            return self.fail(streams::not_come(self.rank, peer, &format!("the {what}")));
        }
        let peer = peer.map_or(String::new(), |p| format!(", waiting for rank {p}"));
        let text =
            format!("rank {}: {what} of the user transport returned {returned}{peer}", self.rank);
        self.fail(Error::new(status, text))
    }

    fn ask(&self) -> Option<u32> {
        let mut peer = u32::MAX;
        // SAFETY: the caller's function with its own context and a live integer.
        let known =
            self.ops.waiting_for.is_some_and(|f| unsafe { f(self.ops.ctx, &mut peer) } == 0);
        (known && peer < self.size).then_some(peer)
    }

    fn poll(&mut self) -> Result<bool> {
        let mut done = 0;
        let test = self.ops.test.ok_or_else(missing)?;
        // SAFETY: the caller's function with its own context and a live integer.
        let returned = unsafe { test(self.ops.ctx, &mut done) };
        self.check("test", returned)?;
        self.in_flight = done == 0;
        Ok(done != 0)
    }
}

impl Transport for User {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn name(&self) -> &'static str {
        "user"
    }

    unsafe fn start(&mut self, sends: &[Message], recvs: &[Message]) -> Result<()> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if self.in_flight {
            return Err(streams::in_flight(self.rank, "start"));
        }
        streams::check_peers(self.rank, self.size, sends, recvs)?;
        self.sends.fill(sends);
        self.recvs.fill(recvs);
        // All pieces first: the vector must not move once messages point into it.
        self.pieces.clear();
        let both = || self.sends.iter().chain(self.recvs.iter());
        self.pieces.extend(
            both().flat_map(|s| &s.pieces).map(|p| CpPiece { ptr: p.ptr.cast(), bytes: p.len }),
        );
        self.messages.clear();
        let mut at = 0;
        let message = |s: &Stream| {
            let pieces = self.pieces[at..].as_ptr();
            at += s.pieces.len();
            CpMessage { peer: s.peer, n_pieces: s.pieces.len() as u32, pieces }
        };
        self.messages.extend(both().map(message));
        let n_sends = self.sends.iter().count();
        let (sends, recvs) = self.messages.split_at(n_sends);
        let start = self.ops.start.ok_or_else(missing)?;
        // SAFETY: the caller's function with its own context; the arrays live until the next `start`, the pieces as our caller promised.
        let returned = unsafe {
            start(self.ops.ctx, sends.as_ptr(), sends.len(), recvs.as_ptr(), recvs.len())
        };
        self.in_flight = true;
        self.check("start", returned)
    }

    fn test(&mut self) -> Result<bool> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if self.in_flight { self.poll() } else { Ok(true) }
    }

    /// A table has no way to sleep: polls, giving way to other threads, then naps.
    fn wait(&mut self) -> Result<bool> {
        for _ in 0..64 {
            if self.test()? {
                return Ok(true);
            }
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_micros(50));
        self.test()
    }

    fn waiting_for(&self) -> Option<u32> {
        if self.in_flight { self.ask() } else { None }
    }

    fn give_up(&mut self, why: Error) {
        let _ = self.fail::<()>(why);
    }

    fn cancel(&mut self) {
        self.give_up(streams::cancelled(Status::Aborted, self.rank));
    }

    fn allgather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        if let Err(e) = self.usable() {
            return self.fail(e);
        }
        if self.in_flight {
            return Err(streams::in_flight(self.rank, "allgather"));
        }
        streams::check_members(self.rank, self.size, members, mine)?;
        let mut all = vec![0u8; members.len() * mine.len()];
        let timeout = deadline.saturating_duration_since(Instant::now()).as_millis() as u64;
        let (from, to) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
        let allgather = self.ops.allgather.ok_or_else(missing)?;
        // SAFETY: the caller's function with its own context; every array is live and as long as the contract says.
        let returned = unsafe {
            allgather(self.ops.ctx, members.as_ptr(), members.len(), from, to, mine.len(), timeout)
        };
        self.check("allgather", returned)?;
        Ok(all)
    }

    /// Reaches this rank alone: the table has no way to tell the others.
    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        let aborted = Arc::clone(&self.aborted);
        Arc::new(move || aborted.store(true, Ordering::SeqCst))
    }

    fn memory_bytes(&self) -> usize {
        let tables = self.messages.capacity() * size_of::<CpMessage>()
            + self.pieces.capacity() * size_of::<CpPiece>();
        tables + self.sends.memory_bytes() + self.recvs.memory_bytes()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if self.in_flight {
            self.cancel();
        }
        if let Some(destroy) = self.ops.destroy.filter(|_| self.owned.load(Ordering::SeqCst)) {
            // SAFETY: the caller's function with its own context, once.
            unsafe { destroy(self.ops.ctx) };
        }
    }
}
