//! Ranks are processes (or threads) with a device each, and NCCL moves the bytes: an exchange is one group of `ncclSend` and `ncclRecv`.
//!
//! NCCL matches sends and receives of a pair one by one and in order, so both sides cut their messages into the same pieces. A group is
//! complete on a rank only when all its sends and receives have met their counterparts: the rendezvous on one queue that plans are
//! checked for. The communicator is non-blocking, so that no call of the host hangs on a peer; `watchdog` gives everything a deadline.
//! `ncclAlltoAll` is not used: it moves a rank's own place too, which an exchange leaves out.
//!
//! `api`: NCCL's symbols, opened at run time.

pub mod api;
#[cfg(test)]
mod tests;
mod watchdog;

use super::{DeviceTransport, Step};
use crate::driver::{
    self, CUstream, Device, DeviceBuffer, Event, PinnedBuffer, Stream, copy_to_device, copy_to_host,
};
use crate::error::{Error, Result, Status};
use crate::transport::{Message, Piece};
use api::{Api, Comm, Config, IN_PROGRESS, SUCCESS, UINT8, UNSET, UniqueId};
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use watchdog::{Watchdog, Watched};

/// The step of [`Nccl::warm_up`], for messages.
const WARM_UP: Step = Step { index: u32::MAX, stage: u32::MAX, call: u64::MAX };

/// Longest wait for the peers when a communicator ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// What NCCL may take of the device; `None` is its own choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Fewest blocks of a kernel of NCCL.
    pub min_ctas: Option<u32>,
    /// Most blocks of a kernel of NCCL: each takes a multiprocessor from the computation.
    pub max_ctas: Option<u32>,
    /// Blocks of a cluster; 0: no clusters.
    pub cga_cluster_size: Option<u32>,
}

/// A rank of an NCCL communicator.
pub struct Nccl {
    watched: Arc<Watched>,
    /// Ends before the communicator does.
    watchdog: Option<Watchdog>,
    api: &'static Api,
    device: Arc<Device>,
    rank: u32,
    size: u32,
    timeout: Duration,
    /// Made here, so ended here; else the caller's.
    owned: bool,
}

/// A new unique id, made by one rank for all.
pub fn unique_id() -> Result<[u8; 128]> {
    new_id(api::find()?)
}

fn new_id(api: &Api) -> Result<[u8; 128]> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: writes one id.
    let code = unsafe { (api.get_unique_id)(&mut id) };
    // SAFETY: no communicator.
    unsafe { api.check("ncclGetUniqueId", code, std::ptr::null_mut())? };
    Ok(id.0)
}

/// Collective: joins the communicator of `id` as `rank` of `size`, or fails by the deadline. Later waits have the same `timeout`.
pub fn join(
    device: &Arc<Device>,
    id: &[u8; 128],
    rank: u32,
    size: u32,
    timeout: Duration,
) -> Result<Nccl> {
    join_with(device, id, rank, size, timeout, Options::default())
}

/// The same with options.
pub fn join_with(
    device: &Arc<Device>,
    id: &[u8; 128],
    rank: u32,
    size: u32,
    timeout: Duration,
    options: Options,
) -> Result<Nccl> {
    let api = api::find()?;
    let _current = device.enter()?;
    let comm = init(api, id, rank, size, timeout, options)?;
    Nccl::new(api, device, comm, rank, size, timeout, true).inspect_err(|_| {
        // SAFETY: made above, used by nobody.
        unsafe { (api.comm_abort)(comm) };
    })
}

/// A communicator of its own, with the current device.
fn init(
    api: &Api,
    id: &[u8; 128],
    rank: u32,
    size: u32,
    timeout: Duration,
    options: Options,
) -> Result<Comm> {
    if size == 0 || rank >= size || c_int::try_from(size).is_err() {
        return Err(Error::argument(format!("rank: got {rank} of {size}, allowed 0 … size−1")));
    }
    let number = |n: Option<u32>| n.and_then(|n| c_int::try_from(n).ok()).unwrap_or(UNSET);
    let mut config = Config::default();
    config.blocking = 0;
    config.cga_cluster_size = number(options.cga_cluster_size);
    config.min_ctas = number(options.min_ctas);
    config.max_ctas = number(options.max_ctas);
    let deadline = Instant::now() + timeout;
    let (mut comm, id) = (std::ptr::null_mut(), UniqueId(*id));
    // SAFETY: writes one handle; the configuration is copied.
    let mut code = unsafe {
        (api.comm_init_rank_config)(&mut comm, size as c_int, id, rank as c_int, &mut config)
    };
    let mut nap = Duration::from_micros(50);
    while code == IN_PROGRESS && Instant::now() < deadline {
        thread::sleep(nap);
        nap = (2 * nap).min(Duration::from_millis(5));
        code = state_of(api, comm);
    }
    if code == SUCCESS && !comm.is_null() {
        return Ok(comm);
    }
    let error = if code == IN_PROGRESS {
        let seconds = timeout.as_secs_f64();
        let text =
            format!("ncclCommInitRankConfig: not all of {size} ranks came in {seconds:.1} s");
        Error::new(Status::Timeout, format!("rank {rank}: {text}"))
    } else {
        // SAFETY: null, or a communicator that lives.
        let text = unsafe { api.explain(code, comm) };
        Error::new(Status::Nccl, format!("rank {rank}: ncclCommInitRankConfig: {text}"))
    };
    if !comm.is_null() {
        // SAFETY: made above, used by nobody.
        unsafe { (api.comm_abort)(comm) };
    }
    Err(error)
}

/// How a communicator is: `SUCCESS`, `IN_PROGRESS`, or its error.
fn state_of(api: &Api, comm: Comm) -> api::Code {
    let mut state = SUCCESS;
    // SAFETY: a communicator that lives, held by the caller.
    match unsafe { (api.comm_get_async_error)(comm, &mut state) } {
        SUCCESS => state,
        code => code,
    }
}

/// The caller's communicator, which must be of the NCCL that [`api::find`] opens. It stays the caller's: used, never ended, except that losing
/// it (deadline, error, abort) aborts it, after which the caller must not use or destroy it. The caller uses it for nothing else
/// while a call is in flight.
///
/// # Safety
/// `comm` is an `ncclComm_t` of this process that lives as long as the result.
pub unsafe fn adopt(device: &Arc<Device>, comm: *mut c_void, timeout: Duration) -> Result<Nccl> {
    let api = api::find()?;
    if comm.is_null() {
        return Err(Error::argument("nccl_comm: got NULL"));
    }
    type Ask = unsafe extern "C" fn(Comm, *mut c_int) -> api::Code;
    let ask = |call: &str, function: Ask| -> Result<u32> {
        let mut number = -1;
        // SAFETY: the caller's promise; writes one number.
        let code = unsafe { function(comm, &mut number) };
        // SAFETY: as above.
        unsafe { api.check(&format!("nccl_comm: {call}"), code, comm)? };
        u32::try_from(number)
            .map_err(|_| Error::argument(format!("nccl_comm: {call} gave {number}")))
    };
    let size = ask("ncclCommCount", api.comm_count)?;
    let rank = ask("ncclCommUserRank", api.comm_user_rank)?;
    let ordinal = ask("ncclCommCuDevice", api.comm_cu_device)?;
    if ordinal != device.ordinal {
        return Err(Error::argument(format!(
            "nccl_comm: is of device {ordinal}, the group is on device {} (rank {rank} of {size})",
            device.ordinal
        )));
    }
    let state = state_of(api, comm);
    // SAFETY: the caller's promise.
    unsafe { api.check(&format!("nccl_comm: rank {rank}"), state, comm)? };
    Nccl::new(api, device, comm, rank, size, timeout, false)
}

impl Nccl {
    fn new(
        api: &'static Api,
        device: &Arc<Device>,
        comm: Comm,
        rank: u32,
        size: u32,
        timeout: Duration,
        owned: bool,
    ) -> Result<Nccl> {
        let (watched, watchdog) = Watched::new(api, device, comm, rank, timeout)?;
        let (device, watchdog) = (device.clone(), Some(watchdog));
        Ok(Nccl { watched, watchdog, api, device, rank, size, timeout, owned })
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The group of an exchange, up to NCCL's answer to its end.
    ///
    /// # Safety
    /// As [`DeviceTransport::exchange`].
    unsafe fn group(
        &self,
        api: &Api,
        comm: Comm,
        sends: &[Message],
        recvs: &[Message],
        stream: CUstream,
    ) -> Result<bool> {
        let pieces = |messages: &[Message]| -> Vec<(c_int, Piece)> {
            let of =
                |m: &Message| m.pieces.iter().map(|p| (m.peer as c_int, *p)).collect::<Vec<_>>();
            messages.iter().flat_map(of).filter(|(_, p)| p.len > 0).collect()
        };
        let check = |call: &str, code| match code {
            IN_PROGRESS => Ok(()),
            // SAFETY: the communicator lives.
            code => unsafe { api.check(call, code, comm) },
        };
        // SAFETY: no conditions.
        check("ncclGroupStart", unsafe { (api.group_start)() })?;
        let mut first = Ok(());
        for (peer, piece) in pieces(sends) {
            // SAFETY: the caller's promise.
            let code = unsafe {
                (api.send)(piece.ptr.cast(), piece.len, UINT8, peer, comm, stream.cast())
            };
            let call = || format!("ncclSend of {} bytes to rank {peer}", piece.len);
            first = first.and_then(|()| check(&call(), code));
        }
        for (peer, piece) in pieces(recvs) {
            // SAFETY: the caller's promise.
            let code = unsafe {
                (api.recv)(piece.ptr.cast(), piece.len, UINT8, peer, comm, stream.cast())
            };
            let call = || format!("ncclRecv of {} bytes from rank {peer}", piece.len);
            first = first.and_then(|()| check(&call(), code));
        }
        // A group that was opened is closed, whatever happened in it.
        // SAFETY: no conditions.
        let code = unsafe { (api.group_end)() };
        first?;
        check("ncclGroupEnd", code)?;
        Ok(code == SUCCESS)
    }

    /// Waits until a non-blocking communicator has enqueued the group, which NCCL does in a thread that it makes for each. At first without
    /// sleeping, because every exchange waits here; a pair's first message takes longer.
    fn enqueue(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let enqueued = self.watched.with(|api, comm| match state_of(api, comm) {
                IN_PROGRESS => Ok(false),
                // SAFETY: the communicator lives.
                code => unsafe { api.check("ncclGroupEnd", code, comm) }.map(|()| true),
            })?;
            if enqueued {
                return Ok(());
            }
            if let Some(late) = self.watched.stuck() {
                return Err(late);
            }
            match start.elapsed() {
                waited if waited < Duration::from_micros(200) => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(100)),
            }
        }
    }
}

impl DeviceTransport for Nccl {
    fn name(&self) -> &'static str {
        "nccl"
    }

    fn same_pieces(&self) -> bool {
        true
    }

    fn capturable(&self) -> Result<()> {
        if self.api.version() >= 20900 {
            return Ok(());
        }
        let has = self.api.description();
        let text = format!("nccl: NCCL {has} cannot be captured in a CUDA graph, 2.9 can");
        Err(Error::new(Status::NotCapturable, text))
    }

    fn meets(&self) -> bool {
        false
    }

    /// NCCL allocates and connects at a pair's first message, so every pair sends a few bytes, and both check who is there.
    fn warm_up(&mut self, peers: &[u32]) -> Result<()> {
        if peers.is_empty() {
            return Ok(());
        }
        let device = self.device.clone();
        let _current = device.enter()?;
        let stream = Stream::new(&device, true)?;
        // This rank's number, then a place for each peer's.
        const CELL: usize = 16;
        let bytes = CELL * (1 + peers.len());
        let (memory, mirror) =
            (DeviceBuffer::new(&device, bytes)?, PinnedBuffer::new(&device, bytes)?);
        // SAFETY: `bytes` are owned, and nothing else knows them.
        let host = unsafe { std::slice::from_raw_parts_mut(mirror.ptr(), bytes) };
        host.fill(0xff);
        host[..4].copy_from_slice(&self.rank.to_ne_bytes());
        let cell = |i: usize| {
            let ptr = (memory.address() as usize + CELL * i) as *mut u8;
            vec![Piece { ptr, len: CELL }]
        };
        let to = |place: usize| {
            move |(i, &peer): (usize, &u32)| Message { peer, pieces: cell(place * (1 + i)) }
        };
        let sends: Vec<Message> = peers.iter().enumerate().map(to(0)).collect();
        let recvs: Vec<Message> = peers.iter().enumerate().map(to(1)).collect();
        let done = Event::new(&device)?;
        // SAFETY: all memory lives until the event is done, or the communicator is aborted and the stream drained.
        unsafe {
            copy_to_device(memory.address(), mirror.ptr(), bytes, stream.raw())?;
            self.exchange(&sends, &recvs, stream.raw(), WARM_UP)?;
            copy_to_host(mirror.ptr(), memory.address(), bytes, stream.raw())?;
            done.record(stream.raw())?;
        }
        let late = Instant::now() + self.timeout + Duration::from_secs(2);
        while !done.is_done()? && self.failed().is_none() {
            if Instant::now() > late {
                let text =
                    format!("rank {}: warm-up with ranks {peers:?} is not through", self.rank);
                self.watched.fail(Error::new(Status::Timeout, text));
            }
            thread::sleep(Duration::from_micros(50));
        }
        if let Some(why) = self.failed() {
            // The abort frees the stream, and then the memory; if it does not, the memory stays.
            let late = Instant::now() + FAREWELL;
            while matches!(done.is_done(), Ok(false)) && Instant::now() < late {
                thread::sleep(Duration::from_micros(50));
            }
            if done.is_done() != Ok(true) {
                std::mem::forget((memory, mirror));
            }
            return Err(why);
        }
        for (i, &peer) in peers.iter().enumerate() {
            let at = CELL * (1 + i);
            let got = u32::from_ne_bytes([host[at], host[at + 1], host[at + 2], host[at + 3]]);
            if got != peer {
                let text =
                    format!("rank {}: what came from rank {peer} says rank {got}", self.rank);
                return Err(self.watched.fail(Error::new(Status::Nccl, text)));
            }
        }
        Ok(())
    }

    unsafe fn exchange(
        &mut self,
        sends: &[Message],
        recvs: &[Message],
        stream: CUstream,
        step: Step,
    ) -> Result<()> {
        if let Some(why) = self.failed() {
            return Err(why);
        }
        let mut peers: Vec<u32> =
            sends.iter().chain(recvs).filter(|m| m.bytes() > 0).map(|m| m.peer).collect();
        peers.sort_unstable();
        peers.dedup();
        if peers.is_empty() {
            return Ok(());
        }
        if let Some(bad) = peers.iter().find(|p| **p >= self.size || **p == self.rank) {
            return Err(Error::internal(format!(
                "rank {} of {}: exchange with rank {bad}",
                self.rank, self.size
            )));
        }
        // SAFETY: the caller's promise.
        let captured = unsafe { driver::is_capturing(stream)? };
        let Step { index, stage, call } = step;
        let place = match step {
            WARM_UP => format!("rank {}, warm-up", self.rank),
            _ => format!("rank {}, call {call}, step {index}, stage {stage}", self.rank),
        };
        let enqueue = || -> Result<()> {
            // SAFETY: the caller's promise.
            unsafe { self.watched.enter(step, peers, stream, captured)? };
            // SAFETY: as above.
            let group =
                |api: &Api, comm: Comm| unsafe { self.group(api, comm, sends, recvs, stream) };
            if !self.watched.with(group)? {
                self.enqueue()?;
            }
            // SAFETY: as above.
            unsafe { self.watched.entered(stream) }
        };
        enqueue().map_err(|e| {
            // Those that come from elsewhere, or from the watchdog, say where.
            let says = e.text.starts_with("rank ");
            let text = if says { e.text } else { format!("{place}: {}", e.text) };
            self.watched.fail(Error::new(e.status, text))
        })
    }

    fn failed(&self) -> Option<Error> {
        self.watched.failed()
    }

    fn give_up(&mut self, why: Error) {
        self.watched.fail(why);
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        let (watched, rank) = (self.watched.clone(), self.rank);
        Arc::new(move || {
            let text = format!("rank {rank}: the group was aborted");
            watched.fail(Error::new(Status::Aborted, text));
        })
    }

    /// What NCCL says that the communicator has allocated, since 2.29.7; before, it does not say, and this is 0.
    fn memory_bytes(&self) -> usize {
        /// `ncclStatGpuMemTotal`.
        const TOTAL: c_int = 3;
        let Some(stats) = self.api.comm_mem_stats else { return 0 };
        let mut bytes = 0;
        // SAFETY: the communicator lives; writes one number.
        let asked = self.watched.with(|_, comm| Ok(unsafe { stats(comm, TOTAL, &mut bytes) }));
        if asked == Ok(SUCCESS) { bytes as usize } else { 0 }
    }
}

impl Drop for Nccl {
    /// An own communicator ends with its peers: NCCL flushes what is in flight. One whose peers do not come is aborted.
    fn drop(&mut self) {
        let (_current, _relaxed) = (self.device.enter(), driver::Relaxed::new());
        // What is enqueued is waited for, however long the computation between takes: the watchdog ends what makes no progress.
        while !self.watched.is_idle() && self.watched.failed().is_none() {
            thread::sleep(Duration::from_micros(200));
        }
        drop(self.watchdog.take());
        if !self.owned {
            return;
        }
        let comm = self.watched.take();
        if comm.is_null() {
            return;
        }
        let deadline = Instant::now() + self.timeout.min(FAREWELL);
        // SAFETY: taken, so it lives and nobody else uses it.
        let mut code = unsafe { (self.api.comm_finalize)(comm) };
        while code == IN_PROGRESS && Instant::now() < deadline {
            thread::sleep(Duration::from_micros(200));
            code = state_of(self.api, comm);
        }
        let end = if code == SUCCESS { self.api.comm_destroy } else { self.api.comm_abort };
        // SAFETY: as above; it is gone afterwards.
        unsafe { end(comm) };
    }
}
