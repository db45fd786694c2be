//! The memory that ranks of one host share: a sealed memfd without a name, so nothing stays behind however they die.
//!
//! Layout: a header, an area per rank, the indices of all rings, the control rings, the data rings. Rings exist for every ordered
//! pair, but a page costs memory only once it is written.
//!
//! Who lives is told by POSIX record locks: rank r holds a write lock on byte r of the memfd, which the kernel releases when its
//! process ends, in whatever way; any peer can ask. Sockets between all pairs would cost P² descriptors, and a child that a rank forks
//! (a data loader's worker) would keep its sockets open after the rank died, as it would keep open-file-description locks; record
//! locks are not inherited. Their known trap, that closing *any* descriptor of the file drops them, does not bite: a rank has one.

use crate::error::{Error, Result, Status};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// Most ranks that share a segment.
pub(super) const MAX_RANKS: u32 = 1024;
/// Bytes of a control ring: two contributions of 4096 bytes and their headers fit.
pub(super) const CONTROL: usize = 16 << 10;
/// Bytes of a data ring: large enough for copies at full speed, small enough to stay in a core's second-level cache.
pub(super) const DATA: usize = 256 << 10;
/// Copies publish their progress this often, so that both sides of a ring work at the same time.
const CHUNK: usize = 64 << 10;

const MAGIC: u64 = 0x6370_7368_6d30_3031;
const HEADER: usize = 4096;

/// A rank that has not attached yet.
const ABSENT: u32 = 0;
pub(super) const HERE: u32 = 1;
pub(super) const LEFT: u32 = 2;
const GAVE_UP: u32 = 3;
const DEAD: u32 = 4;

#[repr(C)]
struct Header {
    magic: AtomicU64,
    size: AtomicU32,
    /// 1 + the rank that aborted, or 0.
    aborter: AtomicU32,
}

const REASON: usize = 1000;

#[repr(C, align(64))]
struct RankArea {
    /// A futex, changed only to wake a rank that is asleep.
    bell: AtomicU32,
    asleep: AtomicU32,
    presence: AtomicU32,
    pid: AtomicU32,
    /// `process_identity` of its process.
    process: AtomicU64,
    /// Why it gave up: status and text, set before its presence.
    reason_status: AtomicI32,
    reason_len: AtomicU32,
    reason: [AtomicU8; REASON],
}

#[repr(C, align(64))]
struct Line<T>(T);

#[repr(C)]
struct RingIndex {
    /// Bytes ever written; only the sender changes it.
    tail: Line<AtomicU64>,
    /// Bytes ever read; only the receiver changes it.
    head: Line<AtomicU64>,
}

/// One of the two rings of an ordered pair of ranks.
#[derive(Clone, Copy)]
pub(super) enum Lane {
    Control,
    Data,
}

/// One rank's mapping of the segment.
pub(super) struct Segment {
    base: *mut u8,
    bytes: usize,
    fd: OwnedFd,
    size: u32,
    rank: u32,
    pid: u32,
}

// SAFETY: what several threads reach at the same time are atomics; ring data is touched by one rank's transport alone.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

fn areas_end(size: usize) -> usize {
    HEADER + size * size_of::<RankArea>()
}

fn control_start(size: usize) -> usize {
    (areas_end(size) + 2 * size * size * size_of::<RingIndex>()).next_multiple_of(4096)
}

fn data_start(size: usize) -> usize {
    control_start(size) + size * size * CONTROL
}

fn segment_bytes(size: u32) -> usize {
    data_start(size as usize) + size as usize * size as usize * DATA
}

/// A system call that failed, as an error.
pub(super) fn system(what: &str) -> Error {
    Error::new(Status::Transport, format!("{what}: {}", std::io::Error::last_os_error()))
}

/// A number that no other process has, not even one with the same process id in another container, or a forked child.
pub(super) fn process_identity() -> u64 {
    static RANDOM: OnceLock<u64> = OnceLock::new();
    let random = RANDOM.get_or_init(|| random_bytes().map_or(0, u64::from_ne_bytes));
    random.wrapping_add(u64::from(std::process::id()).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// Random bytes from the kernel.
pub(super) fn random_bytes<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: fills a live array; up to 256 bytes come whole.
    if unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) } != N as isize {
        return Err(system("getrandom"));
    }
    Ok(bytes)
}

/// Makes the segment of a new group and returns its only name, a descriptor.
pub(super) fn create(size: u32) -> Result<OwnedFd> {
    if size > MAX_RANKS {
        return Err(Error::unsupported(format!(
            "{size} ranks share one host's memory; allowed are at most {MAX_RANKS}"
        )));
    }
    // SAFETY: the name is a C string; the result is checked.
    let fd = unsafe {
        libc::memfd_create(
            c"context_parallel".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    if fd < 0 {
        return Err(system("memfd_create"));
    }
    // SAFETY: a new descriptor that nothing else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain system calls on an open descriptor.
    let sized = unsafe { libc::ftruncate(fd.as_raw_fd(), segment_bytes(size) as libc::off_t) };
    // The length is final: a peer that shortened the file could kill the others with SIGBUS.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: as above.
    if sized != 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(system("sizing the shared segment"));
    }
    let mut header = [0u8; 12];
    header[..8].copy_from_slice(&MAGIC.to_ne_bytes());
    header[8..].copy_from_slice(&size.to_ne_bytes());
    // SAFETY: writes 12 bytes from a live array at the start of the file.
    if unsafe { libc::pwrite(fd.as_raw_fd(), header.as_ptr().cast(), header.len(), 0) }
        != header.len() as isize
    {
        return Err(system("writing the shared segment"));
    }
    Ok(fd)
}

impl Segment {
    /// Maps the segment and takes the place of `rank` in it.
    pub fn attach(fd: OwnedFd, rank: u32, size: u32) -> Result<Segment> {
        let bytes = segment_bytes(size);
        // SAFETY: an all-zero stat is valid, and fstat fills it.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: an open descriptor and a live struct.
        if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 || stat.st_size as usize != bytes
        {
            let text = format!(
                "rank {rank}: the shared segment has {} bytes; a group of {size} has {bytes}",
                stat.st_size
            );
            return Err(Error::new(Status::Transport, text));
        }
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let base =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, fd.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(system("mmap of the shared segment"));
        }
        let segment = Segment { base: base.cast(), bytes, fd, size, rank, pid: std::process::id() };
        let h = segment.header();
        if h.magic.load(Ordering::Relaxed) != MAGIC || h.size.load(Ordering::Relaxed) != size {
            return Err(Error::new(
                Status::Transport,
                format!("rank {rank}: not the shared segment of a group of {size}"),
            ));
        }
        let mut lock = byte_lock(rank);
        // SAFETY: an open descriptor and a live struct.
        if unsafe { libc::fcntl(segment.fd.as_raw_fd(), libc::F_SETLK, &mut lock) } != 0 {
            return Err(system(&format!("rank {rank}: its place in the shared segment is taken")));
        }
        let area = segment.area(rank);
        area.pid.store(segment.pid, Ordering::SeqCst);
        area.process.store(process_identity(), Ordering::SeqCst);
        if area.presence.compare_exchange(ABSENT, HERE, Ordering::SeqCst, Ordering::SeqCst).is_err()
        {
            return Err(Error::new(
                Status::Mismatch,
                format!("rank {rank} joins the group twice; every rank joins once"),
            ));
        }
        Ok(segment)
    }

    pub fn size(&self) -> u32 {
        self.size
    }

    pub fn rank(&self) -> u32 {
        self.rank
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping begins with the header and lives as long as `self`.
        unsafe { &*self.base.cast() }
    }

    fn area(&self, rank: u32) -> &RankArea {
        assert!(rank < self.size);
        // SAFETY: inside the mapping, aligned to 64 bytes, only atomics.
        unsafe { &*self.base.add(HEADER + rank as usize * size_of::<RankArea>()).cast() }
    }

    /// The ring that `from` writes and `to` reads.
    pub fn ring(&self, lane: Lane, from: u32, to: u32) -> Ring<'_> {
        assert!(from < self.size && to < self.size);
        let size = self.size as usize;
        let pair = from as usize * size + to as usize;
        let (which, capacity, start) = match lane {
            Lane::Control => (0, CONTROL, control_start(size)),
            Lane::Data => (1, DATA, data_start(size)),
        };
        let at = areas_end(size) + (2 * pair + which) * size_of::<RingIndex>();
        // SAFETY: both lie inside the mapping, whose length was checked against this layout; the index is aligned, only atomics.
        let (index, data) =
            unsafe { (&*self.base.add(at).cast(), self.base.add(start + pair * capacity)) };
        Ring { index, data, capacity }
    }

    /// The rank that aborted the group.
    pub fn aborter(&self) -> Option<u32> {
        self.header().aborter.load(Ordering::SeqCst).checked_sub(1)
    }

    pub fn abort(&self) {
        let _ = self.header().aborter.compare_exchange(
            0,
            self.rank + 1,
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        self.wake_all();
    }

    pub fn is_here(&self, rank: u32) -> bool {
        self.area(rank).presence.load(Ordering::SeqCst) == HERE
    }

    /// Tells the peers that this rank takes part no more. The first reason counts; a forked child has no say.
    pub fn leave(&self, why: Option<&Error>) {
        let me = self.area(self.rank);
        if std::process::id() != self.pid || me.presence.load(Ordering::SeqCst) != HERE {
            return;
        }
        if let Some(why) = why {
            let text = &why.text.as_bytes()[..why.text.len().min(REASON)];
            for (to, &from) in me.reason.iter().zip(text) {
                to.store(from, Ordering::Relaxed);
            }
            me.reason_status.store(why.status as i32, Ordering::Relaxed);
            me.reason_len.store(text.len() as u32, Ordering::Relaxed);
        }
        me.presence.store(if why.is_some() { GAVE_UP } else { LEFT }, Ordering::SeqCst);
        self.wake_all();
    }

    /// What this rank reports when it waits for `peer`, which is not here any more.
    pub fn lost(&self, peer: u32) -> Error {
        let (me, area) = (self.rank, self.area(peer));
        let lost = |text| Error::new(Status::PeerLost, text);
        match area.presence.load(Ordering::SeqCst) {
            GAVE_UP => {
                let text: Vec<u8> = area.reason.iter().map(|b| b.load(Ordering::Relaxed)).collect();
                let len = (area.reason_len.load(Ordering::Relaxed) as usize).min(REASON);
                let status = Status::from_i32(area.reason_status.load(Ordering::Relaxed))
                    .unwrap_or(Status::PeerLost);
                Error::new(status, String::from_utf8_lossy(&text[..len]))
            }
            DEAD => lost(format!(
                "rank {me}: rank {peer} (process {}) died",
                area.pid.load(Ordering::Relaxed)
            )),
            LEFT => lost(format!("rank {me}: rank {peer} left the group")),
            _ => lost(format!("rank {me}: rank {peer} is not in the group")),
        }
    }

    /// Asks the kernel whether `peer` lives, and tells everybody if not. Two system calls at most.
    pub fn check_alive(&self, peer: u32) {
        let area = self.area(peer);
        // Ranks of one process (as in tests) hold their locks together and live together.
        if !self.is_here(peer) || area.process.load(Ordering::Relaxed) == process_identity() {
            return;
        }
        let mut lock = byte_lock(peer);
        // SAFETY: an open descriptor and a live struct.
        let asked = unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_GETLK, &mut lock) };
        if asked == 0
            && lock.l_type == libc::F_UNLCK as i16
            && area
                .presence
                .compare_exchange(HERE, DEAD, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
        {
            self.wake_all();
        }
    }

    /// Announces that this rank is about to sleep; after that it looks for work once more, then calls `sleep`.
    pub fn drowsy(&self) -> u32 {
        let me = self.area(self.rank);
        let seen = me.bell.load(Ordering::SeqCst);
        me.asleep.store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        seen
    }

    /// Sleeps until woken, or for `longest`, unless woken since `drowsy` returned `seen`.
    pub fn sleep(&self, seen: u32, longest: Duration) {
        let time = libc::timespec {
            tv_sec: longest.as_secs() as libc::time_t,
            tv_nsec: i64::from(longest.subsec_nanos()),
        };
        // SAFETY: the futex word lies in the mapping, the timeout on the stack. Being woken early is fine.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.area(self.rank).bell.as_ptr(),
                libc::FUTEX_WAIT,
                seen,
                &time,
            )
        };
        self.awake();
    }

    pub fn awake(&self) {
        self.area(self.rank).asleep.store(0, Ordering::SeqCst);
    }

    /// Wakes `rank` if it sleeps; called after something it may wait for was published.
    pub fn wake(&self, rank: u32) {
        fence(Ordering::SeqCst);
        let area = self.area(rank);
        if area.asleep.load(Ordering::SeqCst) != 0 && area.asleep.swap(0, Ordering::SeqCst) != 0 {
            area.bell.fetch_add(1, Ordering::SeqCst);
            // SAFETY: the futex word lies in the mapping.
            unsafe { libc::syscall(libc::SYS_futex, area.bell.as_ptr(), libc::FUTEX_WAKE, 1) };
        }
    }

    fn wake_all(&self) {
        (0..self.size).for_each(|r| self.wake(r));
    }

    /// Bytes of the rings into this rank, and of its share of the tables, as far as they were ever touched.
    pub fn memory_bytes(&self) -> usize {
        let touched = |lane, from| {
            let ring = self.ring(lane, from, self.rank);
            (ring.index.tail.0.load(Ordering::Relaxed).min(ring.capacity as u64) as usize)
                .next_multiple_of(4096)
        };
        let rings: usize = (0..self.size)
            .map(|from| touched(Lane::Control, from) + touched(Lane::Data, from))
            .sum();
        rings + size_of::<RankArea>() + 2 * self.size as usize * size_of::<RingIndex>()
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.leave(None);
        // SAFETY: the mapping that `attach` made; nothing borrowed from it outlives `self`.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// The record lock that says that a rank lives.
fn byte_lock(rank: u32) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: libc::off_t::from(rank),
        l_len: 1,
        l_pid: 0,
    }
}

/// A byte ring with one writer and one reader. What the other side wrote into the indices is checked before it is used.
pub(super) struct Ring<'a> {
    index: &'a RingIndex,
    data: *mut u8,
    capacity: usize,
}

impl Ring<'_> {
    /// Bytes that can be read, and the index of the first.
    fn readable(&self) -> Result<(usize, u64)> {
        let head = self.index.head.0.load(Ordering::SeqCst);
        let held = self.index.tail.0.load(Ordering::SeqCst).wrapping_sub(head);
        if held > self.capacity as u64 {
            return Err(Error::new(Status::Transport, "a ring in shared memory is damaged"));
        }
        Ok((held as usize, head))
    }

    /// Bytes that can be written.
    pub fn writable(&self) -> Result<usize> {
        Ok(self.capacity - self.readable()?.0)
    }

    /// Appends `bytes`, for which there is room. They are not seen before `publish`.
    ///
    /// # Safety
    /// `from` is valid for `len` bytes, `len` plus `ahead` at most what `writable` said.
    pub unsafe fn put(&self, ahead: usize, from: *const u8, len: usize) {
        let at = (self.index.tail.0.load(Ordering::Relaxed) as usize).wrapping_add(ahead)
            & (self.capacity - 1);
        let first = len.min(self.capacity - at);
        // SAFETY: both parts lie inside the ring, and the reader does not read them yet.
        unsafe {
            std::ptr::copy_nonoverlapping(from, self.data.add(at), first);
            std::ptr::copy_nonoverlapping(from.add(first), self.data, len - first);
        }
    }

    /// Makes `len` bytes readable and returns the index after them.
    pub fn publish(&self, len: usize) -> u64 {
        self.index.tail.0.fetch_add(len as u64, Ordering::SeqCst).wrapping_add(len as u64)
    }

    /// Copies bytes out, `ahead` after the first readable one. They stay readable until `consume`.
    ///
    /// # Safety
    /// `to` is valid for `len` bytes, `len` plus `ahead` at most what is readable.
    unsafe fn get(&self, ahead: usize, to: *mut u8, len: usize) {
        let at = (self.index.head.0.load(Ordering::Relaxed) as usize).wrapping_add(ahead)
            & (self.capacity - 1);
        let first = len.min(self.capacity - at);
        // SAFETY: both parts lie inside the ring, and the writer does not write them now.
        unsafe {
            std::ptr::copy_nonoverlapping(self.data.add(at), to, first);
            std::ptr::copy_nonoverlapping(self.data, to.add(first), len - first);
        }
    }

    /// Removes `len` readable bytes and returns the index after them.
    pub fn consume(&self, len: usize) -> u64 {
        self.index.head.0.fetch_add(len as u64, Ordering::SeqCst).wrapping_add(len as u64)
    }

    /// The reader has come past index `end`.
    pub fn is_read_to(&self, end: u64) -> bool {
        self.index.head.0.load(Ordering::SeqCst).wrapping_sub(end) as i64 >= 0
    }

    /// The next `N` bytes, left in place.
    pub fn peek<const N: usize>(&self) -> Result<Option<[u8; N]>> {
        if self.readable()?.0 < N {
            return Ok(None);
        }
        let mut bytes = [0; N];
        // SAFETY: that many are readable.
        unsafe { self.get(0, bytes.as_mut_ptr(), N) };
        Ok(Some(bytes))
    }

    /// Reads and removes a head of `N` bytes that was peeked, with the `len` bytes after it; `None` while they are not all there.
    pub fn take<const N: usize>(&self, len: usize) -> Result<Option<Vec<u8>>> {
        if self.readable()?.0 < N + len {
            return Ok(None);
        }
        let mut bytes = vec![0; len];
        // SAFETY: that many are readable.
        unsafe { self.get(N, bytes.as_mut_ptr(), len) };
        self.consume(N + len);
        Ok(Some(bytes))
    }

    /// Moves bytes of a stream into the ring, as many as fit; how many.
    ///
    /// # Safety
    /// The stream's pieces are valid.
    pub unsafe fn fill_from(&self, s: &mut super::streams::Stream) -> Result<usize> {
        let mut moved = 0;
        loop {
            let room = self.writable()?.min(CHUNK);
            let mut chunk = 0;
            while chunk < room {
                let p = s.next(room - chunk);
                if p.len == 0 {
                    break;
                }
                // SAFETY: the piece is valid, and there is room.
                unsafe { self.put(chunk, p.ptr, p.len) };
                chunk += p.len;
            }
            if chunk == 0 {
                return Ok(moved);
            }
            self.publish(chunk);
            moved += chunk;
        }
    }

    /// Moves bytes out of the ring into a stream, as many as there are and it still wants; how many.
    ///
    /// # Safety
    /// The stream's pieces are valid.
    pub unsafe fn drain_into(&self, s: &mut super::streams::Stream) -> Result<usize> {
        let mut moved = 0;
        loop {
            let there = self.readable()?.0.min(CHUNK);
            let mut chunk = 0;
            while chunk < there {
                let p = s.next(there - chunk);
                if p.len == 0 {
                    break;
                }
                // SAFETY: the piece is valid, and the bytes are there.
                unsafe { self.get(chunk, p.ptr, p.len) };
                chunk += p.len;
            }
            if chunk == 0 {
                return Ok(moved);
            }
            self.consume(chunk);
            moved += chunk;
        }
    }
}
