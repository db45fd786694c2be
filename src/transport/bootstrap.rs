//! How the ranks of a new group find each other: three doors into one room.
//!
//! The room is an abstract Unix socket that rank 0 listens on. Every other rank connects and says who it is; rank 0 waits for all,
//! sees whether they are threads of one process or processes of one host, and tells them how to go on: they meet as threads
//! (`local`), or map the shared memory whose descriptor comes with the answer (`shm`). What goes wrong on one rank is told to all.

use super::local::{self, Key};
use super::segment::{process_identity, random_bytes, system};
use super::streams::not_come;
use super::{Transport, environment, shm};
use crate::error::{Error, Result, Status};
use std::collections::HashMap;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How a group moves bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `Local` if all ranks are threads of one process, `Shm` if all are processes of their own.
    Auto,
    /// Ranks are threads of one process.
    Local,
    /// Ranks are processes of one host (or threads that share memory as processes do, all in one process).
    Shm,
}

/// Gathers equal-size blobs from all ranks, in rank order: the caller's own collective.
pub type AllGather<'a> = dyn FnMut(&[u8]) -> Result<Vec<u8>> + 'a;

const ID_MAGIC: [u8; 8] = *b"cp-id-01";
const OTHER_HOSTS: &str = "for ranks on several hosts use an MPI communicator through context_parallel_mpi.h (cp_mpi_transport) or a transport table of your own";

/// The sockets behind the unique ids that this process made, until rank 0 of each group takes its own.
static LISTENERS: Mutex<Option<HashMap<Key, UnixListener>>> = Mutex::new(None);

/// Makes the id of one new group. Call it in the process that will be rank 0, and give the 128 bytes to all ranks by any means; each then
/// calls [`init`] with them. The id holds a listening socket in this process until rank 0's `init`. It serves one group, on one host.
pub fn unique_id() -> Result<Key> {
    let mut id: Key = [0; 128];
    id[..8].copy_from_slice(&ID_MAGIC);
    id[8..16].copy_from_slice(&host_identity().to_le_bytes());
    id[16..32].copy_from_slice(&random_bytes::<16>()?);
    let listener = listen(&id_socket(&id))
        .map_err(|e| Error::new(Status::Transport, format!("a socket for a unique id: {e}")))?;
    let mut all = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    all.get_or_insert_with(HashMap::new).insert(id, listener);
    Ok(id)
}

/// Joins the group that `id` names, as `rank` of `size`. Collective; blocks until all have come, at most `timeout`.
///
/// `InvalidArgument` for a rank or id that cannot be; `Mismatch` on all ranks if they disagree about size or kind, or give a rank twice;
/// `Unsupported` if some ranks are threads of one process and others are not; `Timeout` naming the first rank that has not come; `PeerLost`.
pub fn init(
    id: &Key,
    rank: u32,
    size: u32,
    kind: Kind,
    timeout: Duration,
) -> Result<Box<dyn Transport>> {
    let deadline = Instant::now() + timeout;
    check_rank(rank, size)?;
    if id[..8] != ID_MAGIC {
        return Err(Error::argument(format!(
            "rank {rank}: these 128 bytes are not a unique id of this library and version"
        )));
    }
    if id[8..16] != host_identity().to_le_bytes() {
        return Err(Error::unsupported(format!(
            "rank {rank}: the unique id was made on another host or in another container; {OTHER_HOSTS}"
        )));
    }
    if rank > 0 {
        return follow(
            connect(&id_socket(id), rank, None)?,
            Hello::new(rank, size, kind),
            id,
            deadline,
        );
    }
    let listener = LISTENERS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .as_mut()
        .and_then(|all| all.remove(id));
    if size == 1 {
        return Ok(alone());
    }
    let Some(listener) = listener else {
        return Err(Error::argument(
            "rank 0 joins with a unique id that this process did not make or that it used already; rank 0 makes the id of a group in its own process",
        ));
    };
    lead(listener, size, kind, id, deadline)
}

/// Joins a group with the help of a collective that the caller has: `gather` is called once on every rank. Collective; blocks.
pub fn init_from_allgather(
    rank: u32,
    size: u32,
    kind: Kind,
    timeout: Duration,
    gather: &mut AllGather<'_>,
) -> Result<Box<dyn Transport>> {
    check_rank(rank, size)?;
    let began = Instant::now();
    let id = if rank == 0 { unique_id() } else { Ok([0; 128]) };
    let joined = exchange_id(&id, rank, size, gather)
        .and_then(|id| init(&id, rank, size, kind, timeout.saturating_sub(began.elapsed())));
    // After an error nobody may wait at a socket that is not served.
    if let (Err(_), Ok(id)) = (&joined, &id)
        && let Some(all) = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
    {
        all.remove(id);
    }
    joined
}

/// Do ranks of several hosts show in what the one allgather of [`init_from_allgather`] gave? All ranks see the same.
pub fn several_hosts(all: &[u8]) -> bool {
    let mut hosts = all.chunks_exact(ID_BYTES).map(|blob| &blob[128..]);
    let first = hosts.next();
    hosts.any(|host| Some(host) != first)
}

/// What a rank gives to that allgather: an id (rank 0), and its host.
const ID_BYTES: usize = 136;

/// Rank 0's id on every rank. A rank that could not make one still takes part, so that the others do not wait for it.
fn exchange_id(id: &Result<Key>, rank: u32, size: u32, gather: &mut AllGather<'_>) -> Result<Key> {
    let mut mine = [0; ID_BYTES];
    mine[..128].copy_from_slice(id.as_ref().unwrap_or(&[0; 128]));
    mine[128..].copy_from_slice(&host_identity().to_le_bytes());
    let all = gather(&mine)?;
    id.as_ref().map_err(Error::clone)?;
    if all.len() != mine.len() * size as usize {
        let wanted = mine.len() * size as usize;
        return Err(Error::argument(format!(
            "rank {rank}: the allgather callback returned {} bytes; {wanted} are wanted",
            all.len()
        )));
    }
    let blob = |r: u32| &all[r as usize * mine.len()..][..mine.len()];
    if blob(rank) != mine {
        return Err(Error::argument(format!(
            "rank {rank}: the allgather callback did not return this rank's bytes in place {rank}"
        )));
    }
    if let Some(other) = (0..size).find(|&r| blob(r)[128..] != blob(0)[128..]) {
        return Err(Error::unsupported(format!(
            "rank {other} runs on another host or in another container than rank 0; {OTHER_HOSTS}"
        )));
    }
    let mut id: Key = [0; 128];
    id.copy_from_slice(&blob(0)[..128]);
    if id[..8] != ID_MAGIC {
        return Err(Error::new(
            Status::Transport,
            format!("rank {rank}: rank 0 could not make a unique id"),
        ));
    }
    Ok(id)
}

/// Joins the group of all processes that torchrun or mpirun started on this host, as their environment says. Collective: every process
/// calls it the same number of times. Blocks.
pub fn init_from_env(kind: Kind, timeout: Duration) -> Result<Box<dyn Transport>> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let deadline = Instant::now() + timeout;
    let get = |name: &str| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned());
    let place = environment::place(&get, environment::launcher_process())?;
    let (rank, size) = (place.rank, place.size);
    if size == 1 {
        return Ok(alone());
    }
    let job = format!("{} {}", place.job, COUNT.fetch_add(1, Ordering::SeqCst));
    let (high, low) = (hash(job.as_bytes(), 1), hash(job.as_bytes(), 2));
    let name = format!("{}/env/{high:016x}{low:016x}", socket_prefix());
    // Threads, if it comes to that, meet under the name of the socket.
    let mut key: Key = [0; 128];
    key[..name.len()].copy_from_slice(name.as_bytes());
    if rank > 0 {
        return follow(
            connect(&name, rank, Some(deadline))?,
            Hello::new(rank, size, kind),
            &key,
            deadline,
        );
    }
    loop {
        match listen(&name) {
            Ok(listener) => return lead(listener, size, kind, &key, deadline),
            // What is left of a job before this one may take a moment to die.
            Err(e) if e.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(e) => {
                return Err(Error::new(
                    Status::Transport,
                    format!("rank 0 cannot listen for its job ({job}): {e}"),
                ));
            }
        }
    }
}

fn check_rank(rank: u32, size: u32) -> Result<()> {
    if rank >= size {
        return Err(Error::argument(format!(
            "rank is {rank}, size is {size}; allowed is a size of 1 or more and a rank of 0..size"
        )));
    }
    Ok(())
}

fn alone() -> Box<dyn Transport> {
    local::local_group(1).remove(0)
}

/// FNV-1a.
fn hash(bytes: &[u8], salt: u64) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325 ^ salt, |h, &b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Differs between hosts, and between containers that cannot reach each other's abstract sockets.
fn host_identity() -> u64 {
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    hash(network.as_os_str().as_encoded_bytes(), hash(&boot, 0))
}

fn socket_prefix() -> String {
    // SAFETY: has no conditions.
    format!("context_parallel/{}", unsafe { libc::geteuid() })
}

fn id_socket(id: &Key) -> String {
    let token: String = id[16..32].iter().map(|b| format!("{b:02x}")).collect();
    format!("{}/id/{token}", socket_prefix())
}

fn listen(name: &str) -> std::io::Result<UnixListener> {
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    listener.set_nonblocking(true)?;
    // A connect must never wait for rank 0, which may be late.
    // SAFETY: a plain system call on an open socket.
    if unsafe { libc::listen(listener.as_raw_fd(), 4096) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(listener)
}

/// Connects to rank 0: at once, or trying again until `deadline`.
fn connect(name: &str, rank: u32, deadline: Option<Instant>) -> Result<UnixStream> {
    let broken = |e: std::io::Error| {
        Error::new(Status::Transport, format!("rank {rank}: connecting to rank 0: {e}"))
    };
    let address = SocketAddr::from_abstract_name(name).map_err(broken)?;
    loop {
        match UnixStream::connect_addr(&address) {
            Ok(stream) if same_user(&stream) => return Ok(stream),
            Ok(_) => {
                return Err(Error::new(
                    Status::Transport,
                    format!("rank {rank}: rank 0's socket belongs to another user"),
                ));
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => match deadline {
                Some(deadline) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5))
                }
                Some(_) => return Err(not_come(rank, 0, "the group's init")),
                None => {
                    let text = "nobody listens under this unique id: rank 0's process has ended, or its init is over";
                    return Err(Error::new(Status::PeerLost, format!("rank {rank}: {text}")));
                }
            },
            Err(e) => return Err(broken(e)),
        }
    }
}

/// The process at the other end belongs to this process's user.
fn same_user(stream: &UnixStream) -> bool {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let to = (&raw mut peer).cast();
    // SAFETY: a live struct and its length.
    let asked = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, to, &mut len)
    };
    // SAFETY: has no conditions.
    asked == 0 && peer.uid == unsafe { libc::geteuid() }
}

/// What a rank says when it connects: magic and version, process, rank, size, kind; 32 bytes.
#[derive(Clone, Copy)]
struct Hello {
    version: u64,
    process: u64,
    rank: u32,
    size: u32,
    kind: u32,
}

const HELLO: usize = 32;

impl Hello {
    fn new(rank: u32, size: u32, kind: Kind) -> Hello {
        Hello {
            version: hash(env!("CARGO_PKG_VERSION").as_bytes(), 7),
            process: process_identity(),
            rank,
            size,
            kind: kind as u32,
        }
    }

    fn to_bytes(self) -> [u8; HELLO] {
        let mut b = [0; HELLO];
        b[..8].copy_from_slice(&self.version.to_le_bytes());
        b[8..16].copy_from_slice(&self.process.to_le_bytes());
        for (i, n) in [self.rank, self.size, self.kind].into_iter().enumerate() {
            b[16 + 4 * i..20 + 4 * i].copy_from_slice(&n.to_le_bytes());
        }
        b
    }

    fn from_bytes(b: &[u8]) -> Hello {
        let long = |at: usize| (0..8).fold(0, |n, i| n | u64::from(b[at + i]) << (8 * i));
        let short = |at: usize| long(at) as u32;
        Hello {
            version: long(0),
            process: long(8),
            rank: short(16),
            size: short(20),
            kind: u32::from(b[24]),
        }
    }
}

/// What a rank says later: its memory is mapped, or its deadline has passed.
const READY: u8 = 1;
const TOO_LATE: u8 = 2;

/// Rank 0's answers: a word, a number, and the length of a text that follows.
const WAITING: u32 = 1;
const FAILED: u32 = 2;
const MEET_LOCAL: u32 = 3;
/// Carries the descriptor of the segment.
const MAP_SHM: u32 = 4;
const GO: u32 = 5;
const ANSWER: usize = 12;

/// A rank that has connected.
struct Guest {
    stream: UnixStream,
    heard: usize,
    /// The hello, and one byte more if it gives up.
    hello: [u8; HELLO + 1],
    /// Set once the hello is complete.
    rank: Option<u32>,
}

/// Rank 0's side.
fn lead(
    listener: UnixListener,
    size: u32,
    kind: Kind,
    key: &Key,
    deadline: Instant,
) -> Result<Box<dyn Transport>> {
    let mut guests = Vec::new();
    let met = gather_guests(&listener, &mut guests, size, kind, deadline).and_then(|kind| {
        guests.retain(|g| g.rank.is_some());
        if kind == Kind::Local {
            guests.iter().try_for_each(|g| answer(&g.stream, MEET_LOCAL, 0, "", None))?;
            return local::join(*key, 0, size, deadline);
        }
        let fd = shm::create(size)?;
        guests.iter().try_for_each(|g| answer(&g.stream, MAP_SHM, 0, "", Some(fd.as_raw_fd())))?;
        let transport = shm::attach(fd, 0, size)?;
        // Nobody goes on before all have mapped the segment: from then on every death is seen there.
        for g in &mut guests {
            let rank = g.rank.unwrap_or(0);
            let wait = || {
                g.stream
                    .set_nonblocking(false)
                    .and_then(|()| g.stream.set_read_timeout(Some(time_left(deadline))))
            };
            let mut word = [0];
            match wait().and_then(|()| g.stream.read_exact(&mut word)) {
                Ok(()) if word == [READY] => {}
                Ok(()) => return Err(not_come(rank, 0, "the end of the group's init")),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(not_come(0, rank, "the group's init"));
                }
                Err(_) => return Err(disconnected(rank, None)),
            }
        }
        guests.iter().try_for_each(|g| answer(&g.stream, GO, 0, "", None))?;
        Ok(transport)
    });
    if let Err(e) = &met {
        for g in &guests {
            let _ = answer(&g.stream, FAILED, e.status as u32, &e.text, None);
        }
    }
    met
}

fn disconnected(rank: u32, missing: Option<u32>) -> Error {
    let then = missing.map_or(String::new(), |m| format!(", while rank {m} had not come"));
    Error::new(
        Status::PeerLost,
        format!("rank {rank} disconnected before the group was complete{then}"),
    )
}

fn time_left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// Waits until every rank has said hello, and decides how they go on.
fn gather_guests(
    listener: &UnixListener,
    guests: &mut Vec<Guest>,
    size: u32,
    kind: Kind,
    deadline: Instant,
) -> Result<Kind> {
    let own = Hello::new(0, size, kind);
    let mut came = vec![None; size as usize];
    came[0] = Some(own.process);
    let mut told = 0;
    while let Some(missing) = came.iter().position(Option::is_none).map(|m| m as u32) {
        let now = Instant::now();
        if now >= deadline {
            return Err(not_come(0, missing, "the group's init"));
        }
        let mut polled: Vec<libc::pollfd> = std::iter::once(listener.as_raw_fd())
            .chain(guests.iter().map(|g| g.stream.as_raw_fd()))
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        let ms = (deadline - now).as_millis().clamp(1, 1000) as libc::c_int;
        // SAFETY: a live array and its length.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, ms) };
        let mut gone = Vec::new();
        for (i, g) in guests.iter_mut().enumerate().filter(|(i, _)| polled[i + 1].revents != 0) {
            match g.stream.read(&mut g.hello[g.heard..]) {
                Ok(n) if n > 0 => {
                    g.heard += n;
                    if let (Some(rank), true) = (g.rank, g.heard > HELLO) {
                        return Err(not_come(rank, missing, "the group's init"));
                    }
                    if g.heard >= HELLO {
                        let hello = Hello::from_bytes(&g.hello);
                        let rank = check_hello(&hello, &own, &came)?;
                        came[rank] = Some(hello.process);
                        g.rank = Some(hello.rank);
                        told = 0;
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // Also a rank that writes after its hello: it does not speak our language.
                _ => match g.rank {
                    Some(rank) => return Err(disconnected(rank, Some(missing))),
                    None => gone.push(i),
                },
            }
        }
        gone.into_iter().rev().for_each(|i| drop(guests.remove(i)));
        while let Ok((stream, _)) = listener.accept() {
            if same_user(&stream) && stream.set_nonblocking(true).is_ok() {
                guests.push(Guest { stream, heard: 0, hello: [0; HELLO + 1], rank: None });
            }
        }
        // Those who wait can name the rank that is missing if their own deadline comes first.
        if let Some(missing) = came.iter().position(Option::is_none).map(|m| m as u32)
            && missing != told
        {
            for g in guests.iter().filter(|g| g.rank.is_some()) {
                let _ = answer(&g.stream, WAITING, missing, "", None);
            }
            told = missing;
        }
    }
    let strangers = came.iter().filter(|p| **p != Some(own.process)).count();
    let mut processes = came.clone();
    processes.sort_unstable();
    processes.dedup();
    match (kind, strangers) {
        (Kind::Auto | Kind::Local, 0) => Ok(Kind::Local),
        (Kind::Shm, 0) => Ok(Kind::Shm),
        (Kind::Local, _) => {
            let far = came.iter().position(|p| *p != Some(own.process)).unwrap_or(0);
            Err(Error::unsupported(format!(
                "rank {far} is not in the process of rank 0, but a local group is threads of one process"
            )))
        }
        _ if processes.len() == size as usize => Ok(Kind::Shm),
        _ => Err(Error::unsupported(format!(
            "{size} ranks in {} processes: some are threads of one process and others are not; \
             allowed are threads of one process, or one rank per process",
            processes.len()
        ))),
    }
}

/// The rank that says hello, if it fits to what rank 0 knows.
fn check_hello(hello: &Hello, own: &Hello, came: &[Option<u64>]) -> Result<usize> {
    let rank = hello.rank;
    let kinds = ["auto", "local", "shm"];
    let name = |k: u32| kinds.get(k as usize).copied().unwrap_or("unknown");
    let text = if hello.version != own.version {
        return Err(Error::new(
            Status::Version,
            format!("rank {rank} uses another version of this library than rank 0"),
        ));
    } else if hello.size != own.size {
        format!("rank {rank} joins a group of {} ranks, rank 0 a group of {}", hello.size, own.size)
    } else if hello.kind != own.kind {
        format!(
            "rank {rank} asks for a group of kind {}, rank 0 for {}",
            name(hello.kind),
            name(own.kind)
        )
    } else if rank >= own.size {
        format!("a rank {rank} joins a group of {} ranks", own.size)
    } else if came[rank as usize].is_some() {
        format!("rank {rank} joins the group twice; every rank joins once")
    } else {
        return Ok(rank as usize);
    };
    Err(Error::new(Status::Mismatch, text))
}

/// The side of every other rank.
fn follow(
    stream: UnixStream,
    hello: Hello,
    key: &Key,
    deadline: Instant,
) -> Result<Box<dyn Transport>> {
    let (rank, size) = (hello.rank, hello.size);
    let broken = |e: std::io::Error| match e.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
            Error::new(
                Status::PeerLost,
                format!("rank {rank}: rank 0 disconnected before the group was complete"),
            )
        }
        _ => Error::new(Status::Transport, format!("rank {rank}: talking to rank 0: {e}")),
    };
    // If rank 0 had no more use for us its last words are still there to read.
    let _ = send(&stream, &hello.to_bytes());
    let mut missing = 0;
    let mut transport = None;
    loop {
        stream.set_read_timeout(Some(time_left(deadline))).map_err(broken)?;
        let heard = hear(&stream, deadline).map_err(|e| match e.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                let _ = send(&stream, &[TOO_LATE]);
                not_come(rank, missing, "the group's init")
            }
            _ => broken(e),
        })?;
        match heard {
            (WAITING, who, _, _) => missing = who,
            (FAILED, status, text, _) => {
                return Err(Error::new(
                    Status::from_i32(status as i32).unwrap_or(Status::Transport),
                    text,
                ));
            }
            (MEET_LOCAL, ..) => return local::join(*key, rank, size, deadline),
            (MAP_SHM, _, _, Some(fd)) => {
                transport = Some(shm::attach(fd, rank, size)?);
                send(&stream, &[READY]).map_err(broken)?;
            }
            (GO, ..) if transport.is_some() => break,
            (word, ..) => {
                return Err(Error::internal(format!("rank {rank}: rank 0 answered {word}")));
            }
        }
    }
    transport.ok_or_else(|| Error::internal("GO before MAP_SHM"))
}

/// Sends a few bytes without SIGPIPE, which a host program may not ignore.
fn send(stream: &UnixStream, bytes: &[u8]) -> std::io::Result<()> {
    // SAFETY: a live slice.
    let sent = unsafe {
        libc::send(stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL)
    };
    if sent == bytes.len() as isize { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Sends an answer, with a descriptor if there is one.
fn answer(
    stream: &UnixStream,
    word: u32,
    number: u32,
    text: &str,
    fd: Option<RawFd>,
) -> Result<()> {
    let mut bytes = Vec::with_capacity(ANSWER + text.len());
    for n in [word, number, text.len() as u32] {
        bytes.extend_from_slice(&n.to_le_bytes());
    }
    bytes.extend_from_slice(text.as_bytes());
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut message = message_header(&mut part, &mut control);
    match fd {
        // SAFETY: the control buffer is aligned and has room for one descriptor, CMSG_SPACE(4) = 24 bytes.
        Some(fd) => unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
            let head = libc::CMSG_FIRSTHDR(&message);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            libc::CMSG_DATA(head).cast::<RawFd>().write_unaligned(fd);
        },
        None => message.msg_controllen = 0,
    }
    // An answer is small against a socket's buffer, so it goes whole or not at all.
    // SAFETY: the message points to live buffers.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    if sent != bytes.len() as isize {
        return Err(system("telling a rank how to join the group"));
    }
    Ok(())
}

/// Room for one control message, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

fn message_header(part: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: an all-zero header is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    message
}

/// Reads one answer: word, number, text, descriptor.
fn hear(
    stream: &UnixStream,
    deadline: Instant,
) -> std::io::Result<(u32, u32, String, Option<OwnedFd>)> {
    let mut head = [0; ANSWER];
    let mut got = 0;
    let mut fd = None;
    while got < ANSWER {
        if Instant::now() >= deadline {
            return Err(ErrorKind::TimedOut.into());
        }
        let mut control = Control([0; 64]);
        let mut part =
            libc::iovec { iov_base: head[got..].as_mut_ptr().cast(), iov_len: ANSWER - got };
        let mut message = message_header(&mut part, &mut control);
        // SAFETY: the message points to live buffers.
        match unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) } {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n if n > 0 => got += n as usize,
            _ => match std::io::Error::last_os_error() {
                e if e.kind() == ErrorKind::Interrupted => continue,
                e => return Err(e),
            },
        }
        // SAFETY: the kernel filled the control buffer; a header that says SCM_RIGHTS is followed by a descriptor that is now ours.
        unsafe {
            let rights = libc::CMSG_FIRSTHDR(&message);
            if !rights.is_null()
                && (*rights).cmsg_level == libc::SOL_SOCKET
                && (*rights).cmsg_type == libc::SCM_RIGHTS
            {
                fd = Some(OwnedFd::from_raw_fd(
                    libc::CMSG_DATA(rights).cast::<RawFd>().read_unaligned(),
                ));
            }
        }
    }
    let number =
        |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let mut text = vec![0; (number(8) as usize).min(1 << 16)];
    let mut reader = stream;
    reader.read_exact(&mut text)?;
    Ok((number(0), number(4), String::from_utf8_lossy(&text).into_owned(), fd))
}
