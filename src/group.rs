//! Groups of ranks, and how they agree before they compute.
//!
//! A parent group owns a transport. A subset is only a list of the parent's ranks: no communicator is made for it. Before every
//! collective call the members exchange a [`Header`]; a rank whose arguments are wrong posts its error in it, so that all members
//! return instead of waiting, and nothing has moved.

use crate::driver::{Device, Guard, Stream};
use crate::error::{Error, Result, Status};
use crate::exec::device::{DeviceLink, Tables, Target};
use crate::exec::{Link, Stats};
use crate::plan::account::{layout, saved_bytes, workspace_bytes};
use crate::plan::trade::Trade;
use crate::plan::{Options, Pass, Plan};
use crate::problem::{Fnv, Problem};
use crate::transport::device::DeviceTransport;
use crate::transport::{Shared, Transport};
use std::any::Any;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Plans kept per parent group. Regular training needs a few; packed batches of ever new lengths replace the oldest.
const CACHED_PLANS: usize = 1024;
/// Bytes of them, besides the newest's: a mask of many slices makes long lists, and may be new in every call.
const CACHED_BYTES: usize = 256 << 20;

/// Ranks that compute together. Cheap to clone; clones are the same group.
#[derive(Clone)]
pub struct Group {
    parent: Arc<Parent>,
    /// Transport rank of every rank of this group.
    members: Arc<[u32]>,
    rank: u32,
    id: u64,
    is_parent: bool,
}

/// What all subsets of a parent group share.
struct Parent {
    /// Host transport: moves bytes on the CPU; on CUDA the ranks agree through it. `None` for a group of one, which never communicates.
    transport: Option<Shared>,
    device: Option<DeviceSide>,
    aborters: Vec<Arc<dyn Fn() + Send + Sync>>,
    name: &'static str,
    rank: u32,
    timeout: Duration,
    /// Why the group is lost, once it is.
    lost: Mutex<Option<Error>>,
    /// Calls made so far by every set of members.
    calls: Mutex<HashMap<u64, u64>>,
    plans: Mutex<PlanCache>,
    spare: Mutex<Spare>,
    sent: AtomicU64,
    received: AtomicU64,
    exposed_ns: AtomicU64,
}

/// What calls without a layer compute with and use again; they know its type.
pub type Spare = Option<Box<dyn Any + Send>>;

/// What a group on CUDA has beside its host transport.
struct DeviceSide {
    device: Arc<Device>,
    /// `None` for a group of one.
    lane: Option<Mutex<CommLane>>,
    /// Do ranks agree before every call? Only where the hosts meet anyway, or on request: it keeps the host waiting.
    agrees: bool,
}

/// The one queue of a group's exchanges.
struct CommLane {
    transport: Box<dyn DeviceTransport>,
    stream: Stream,
    calls: u64,
}

/// How a group on CUDA is made.
pub struct OnDevice {
    /// This rank's device.
    pub device: Arc<Device>,
    /// Moves bytes between devices; `None` for a group of one.
    pub transport: Option<Box<dyn DeviceTransport>>,
    /// The ranks agree before every call even if the hosts do not meet otherwise.
    pub agree: bool,
}

/// A plan with everything that a launch needs and that depends on nothing else.
pub struct Prepared {
    /// The plan.
    pub plan: Plan,
    /// Offsets of its slots.
    pub offsets: Vec<usize>,
    /// Bytes of workspace.
    pub workspace: usize,
    /// Bytes of the saved buffer.
    pub saved: usize,
    /// Work lists of the kernels, on CUDA.
    pub tables: Option<Tables>,
    /// Bytes that it takes up itself.
    bytes: usize,
}

impl Prepared {
    fn new(plan: Plan, target: Target) -> Prepared {
        let at = layout(&plan);
        let offsets = plan.slots.iter().map(|s| at.get(&s.slot).copied().unwrap_or(0)).collect();
        let (slots, saved) = (workspace_bytes(&plan), saved_bytes(&plan));
        let tables = Tables::new(&plan, target, slots);
        let workspace = tables.as_ref().map_or(slots, |t| t.workspace());
        let bytes = plan.bytes() + tables.as_ref().map_or(0, |t| t.bytes());
        Prepared { plan, offsets, workspace, saved, tables, bytes }
    }
}

/// Fingerprint of the problem, rank, pass, options, where it runs.
type PlanKey = (u64, u32, Pass, Options, Target);

#[derive(Default)]
struct PlanCache {
    /// With when they were used last.
    plans: HashMap<PlanKey, (u64, Arc<Prepared>)>,
    /// Counts uses, to find the oldest.
    clock: u64,
}

/// What the members of a call must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which call: a word for messages and the number that is compared.
    pub call: Call,
    /// Hash of the problem or configuration.
    pub hash: u64,
}

/// Collective calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `cp_group_barrier`.
    Barrier = 1,
    /// `cp_set_group` on a parent group.
    SetGroup = 2,
    /// `cp_attention_forward`.
    Forward = 3,
    /// `cp_attention_backward`.
    Backward = 4,
    /// `cp_group_warm_up`.
    WarmUp = 5,
    /// `cp_sequence_to_heads`.
    ToHeads = 6,
    /// `cp_heads_to_sequence`.
    ToSequence = 7,
    /// `cp_group_shift`.
    Shift = 8,
    /// `cp_group_gather`.
    Gather = 9,
}

impl Call {
    fn name(code: u32) -> &'static str {
        match code {
            1 => "cp_group_barrier",
            2 => "cp_set_group",
            3 => "cp_attention_forward",
            4 => "cp_attention_backward",
            5 => "cp_group_warm_up",
            6 => "cp_sequence_to_heads",
            7 => "cp_heads_to_sequence",
            8 => "cp_group_shift",
            9 => "cp_group_gather",
            _ => "an unknown call",
        }
    }
}

/// Bytes of a posted header: five numbers, then the text of an error.
const HEADER_BYTES: usize = 256;
const HEADER_NUMBERS: usize = 40;

impl Group {
    /// A group of one. It never communicates.
    pub fn solo() -> Group {
        Group::with(None, 0, 1, None, Duration::from_secs(1))
    }

    /// A group of one on a device.
    pub fn solo_on(device: &Arc<Device>) -> Group {
        let side = DeviceSide { device: device.clone(), lane: None, agrees: false };
        Group::with(None, 0, 1, Some(side), Duration::from_secs(1))
    }

    /// The parent group of ranks with a device each. `host` is how they agree; without it they cannot, and trust each other.
    pub fn on_device(
        rank: u32,
        size: u32,
        host: Option<Shared>,
        on: OnDevice,
        timeout: Duration,
    ) -> Result<Group> {
        let agrees = on.agree || on.transport.as_ref().is_some_and(|t| t.meets());
        let lane = match on.transport {
            None => None,
            Some(transport) => {
                let stream = Stream::new(&on.device, true)?;
                Some(Mutex::new(CommLane { transport, stream, calls: 0 }))
            }
        };
        let side = DeviceSide { device: on.device, lane, agrees };
        Ok(Group::with(host, rank, size, Some(side), timeout))
    }

    /// The parent group over a transport. Every later wait has `timeout`.
    pub fn new(transport: Box<dyn Transport>, timeout: Duration) -> Group {
        let (rank, size) = (transport.rank(), transport.size());
        Group::with(Some(Arc::new(Mutex::new(transport))), rank, size, None, timeout)
    }

    fn with(
        transport: Option<Shared>,
        rank: u32,
        size: u32,
        device: Option<DeviceSide>,
        timeout: Duration,
    ) -> Group {
        let lane = device.as_ref().and_then(|d| d.lane.as_ref());
        let host_name = transport.as_ref().map_or("none", |t| lock(t).name());
        let aborters = transport.as_ref().map(|t| lock(t).aborter()).into_iter();
        let parent = Parent {
            name: lane.map_or(host_name, |lane| lock(lane).transport.name()),
            aborters: aborters.chain(lane.map(|lane| lock(lane).transport.aborter())).collect(),
            transport,
            device,
            rank,
            timeout,
            lost: Mutex::default(),
            calls: Mutex::default(),
            plans: Mutex::default(),
            spare: Mutex::default(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            exposed_ns: AtomicU64::new(0),
        };
        let members: Arc<[u32]> = (0..size).collect();
        Group { id: id_of(&members), parent: Arc::new(parent), members, rank, is_parent: true }
    }

    /// The group of some of this group's ranks, in the given order. Local: no communication, only members may make it.
    pub fn subset(&self, ranks: &[u32]) -> Result<Group> {
        let me = format!("rank {}", self.rank);
        let bad = |text: String| Err(Error::argument(format!("ranks: {text} ({me})")));
        if ranks.is_empty() {
            return bad("got none".into());
        }
        for (i, r) in ranks.iter().enumerate() {
            if *r >= self.size() {
                return bad(format!("got {r}, the group has ranks 0 … {}", self.size() - 1));
            }
            if ranks[..i].contains(r) {
                return bad(format!("{r} is named twice"));
            }
        }
        let Some(rank) = ranks.iter().position(|r| *r == self.rank) else {
            return bad(format!(
                "got {ranks:?}, which does not name this rank; only members make a subset"
            ));
        };
        let members: Arc<[u32]> = ranks.iter().map(|r| self.members[*r as usize]).collect();
        let (parent, rank) = (self.parent.clone(), rank as u32);
        Ok(Group { id: id_of(&members), parent, members, rank, is_parent: false })
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// This rank's number in the parent group. Errors name ranks by these numbers.
    pub fn parent_rank(&self) -> u32 {
        self.parent.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> u32 {
        self.members.len() as u32
    }

    /// Ranks of the parent group, in this group's order.
    pub fn members(&self) -> &[u32] {
        &self.members
    }

    /// Hash of the members: equal on all of them.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Is this the parent group itself, and not a subset, be it of all ranks?
    pub fn is_parent(&self) -> bool {
        self.is_parent
    }

    /// Tells parents apart within this process.
    pub fn parent_address(&self) -> usize {
        Arc::as_ptr(&self.parent) as usize
    }

    /// Do two groups have the same parent?
    pub fn same_parent(&self, other: &Group) -> bool {
        Arc::ptr_eq(&self.parent, &other.parent)
    }

    /// `"local"`, `"shm"`, `"user"`, or `"none"` for a group of one.
    pub fn transport_name(&self) -> &'static str {
        self.parent.name
    }

    /// Bytes that the transport holds for this rank.
    pub fn transport_bytes(&self) -> usize {
        let host = self.parent.transport.as_ref().map_or(0, |t| lock(t).memory_bytes());
        host + self.lane().map_or(0, |lane| lane.transport.memory_bytes())
    }

    /// The device that the group computes on; `None` on the CPU.
    pub fn device(&self) -> Option<&Arc<Device>> {
        self.parent.device.as_ref().map(|d| &d.device)
    }

    /// Must messages be cut alike on both sides?
    pub fn same_pieces(&self) -> bool {
        self.size() > 1 && self.lane().is_some_and(|lane| lane.transport.same_pieces())
    }

    /// Can calls be captured in a CUDA graph? The error says why not.
    pub fn capturable(&self) -> Result<()> {
        match self.lane() {
            Some(lane) if self.size() > 1 => lane.transport.capturable(),
            _ => Ok(()),
        }
    }

    /// Memory and kernels of calls without a layer, which all subsets share. Held for the length of a call.
    pub fn spare(&self) -> MutexGuard<'_, Spare> {
        lock(&self.parent.spare)
    }

    fn lane(&self) -> Option<MutexGuard<'_, CommLane>> {
        self.parent.device.as_ref().and_then(|d| d.lane.as_ref()).map(lock)
    }

    /// Sums over all runs of the parent group and its subsets.
    pub fn stats(&self) -> Stats {
        let p = &self.parent;
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Stats { sent: get(&p.sent), received: get(&p.received), exposed_ns: get(&p.exposed_ns) }
    }

    /// Waits until all members have come.
    pub fn barrier(&self) -> Result<()> {
        if self.size() > 1 && self.parent.transport.is_none() {
            return Err(Error::unsupported(format!(
                "rank {}: cp_group_barrier: NCCL is all that connects these ranks (nccl_comm, or an allgather over several hosts), and hosts do not meet in it; use a barrier of your own",
                self.parent.rank
            )));
        }
        self.agree(Header { call: Call::Barrier, hash: 0 }, Ok(()))
    }

    /// Connects this group's ranks pair by pair, so that later calls do not. Collective.
    pub fn warm_up(&self) -> Result<()> {
        self.agree(Header { call: Call::WarmUp, hash: 0 }, Ok(()))?;
        let me = self.parent.rank;
        let peers: Vec<u32> = self.members.iter().copied().filter(|m| *m != me).collect();
        let warmed = self.lane().map(|mut lane| lane.transport.warm_up(&peers));
        warmed.map_or(Ok(()), |result| self.watch(result))
    }

    /// Makes pending and future calls of this group and its relatives fail with `Aborted`, here and on every rank that can be
    /// reached. From any thread.
    pub fn abort(&self) {
        let mut lost = lock(&self.parent.lost);
        lost.get_or_insert_with(|| {
            Error::new(Status::Aborted, format!("rank {}: the group was aborted", self.parent.rank))
        });
        drop(lost);
        self.parent.aborters.iter().for_each(|abort| abort());
    }

    /// Fails if the group is lost.
    pub fn usable(&self) -> Result<()> {
        // What went wrong on a stream shows at the next call.
        if let Some(e) = self.lane().and_then(|lane| lane.transport.failed()) {
            lock(&self.parent.lost).get_or_insert(e);
        }
        match &*lock(&self.parent.lost) {
            Some(e) => Err(Error::new(e.status, format!("the group is lost since: {}", e.text))),
            None => Ok(()),
        }
    }

    /// Exchanges headers among the members. `local` is this rank's own verdict on its arguments; an error of one member becomes an
    /// error of all, here its own, elsewhere `Mismatch` with its text. The group stays usable: nothing has moved.
    pub fn agree<T>(&self, header: Header, local: Result<T>) -> Result<T> {
        self.usable()?;
        let Some(transport) = &self.parent.transport else { return local };
        if self.size() == 1 {
            return local;
        }
        let passes = !matches!(header.call, Call::Barrier | Call::SetGroup | Call::WarmUp);
        if passes && self.parent.device.as_ref().is_some_and(|d| !d.agrees) {
            return local;
        }
        let mut sorted: Vec<u32> = self.members.to_vec();
        sorted.sort_unstable();
        // Counted by the set of members, whatever their order: after a rank came with another order all are still in step.
        let call = {
            let mut calls = lock(&self.parent.calls);
            let n = calls.entry(id_of(&sorted)).or_insert(0);
            *n += 1;
            *n
        };
        let mine = encode(header, self.id, call, local.as_ref().err());
        let all = self.watch(lock(transport).allgather(
            &sorted,
            &mine,
            Instant::now() + self.parent.timeout,
        ))?;
        let posts: Vec<(u32, &[u8])> =
            sorted.iter().copied().zip(all.chunks(HEADER_BYTES)).collect();
        let value = local?;
        self.compare(&posts, &mine)?;
        Ok(value)
    }

    /// Finds the member that refuses, or that asks for something else than most.
    fn compare(&self, posts: &[(u32, &[u8])], mine: &[u8]) -> Result<()> {
        for (rank, post) in posts {
            if let Some(text) = refusal(post) {
                return Err(Error::new(
                    Status::Mismatch,
                    format!(
                        "rank {}: rank {rank} refused {}: {text}",
                        self.parent.rank,
                        called(post)
                    ),
                ));
            }
        }
        for (word, what) in [
            (0, "is in another call"),
            (1, "calls another list of ranks"),
            (2, "is in another call of this list"),
            (3, "asks for another problem"),
        ] {
            let of = |post: &[u8]| number(post, word);
            let count = |value: u64| posts.iter().filter(|(_, p)| of(p) == value).count();
            let usual =
                posts.iter().map(|(_, p)| of(p)).max_by_key(|v| count(*v)).unwrap_or(of(mine));
            let odd: Vec<u32> =
                posts.iter().filter(|(_, p)| of(p) != usual).map(|(r, _)| *r).collect();
            if let Some((rank, post)) = posts.iter().find(|(_, p)| of(p) != usual) {
                let others = if odd.len() > 1 {
                    format!(" (and so do {:?})", &odd[1..])
                } else {
                    String::new()
                };
                let text = format!(
                    "rank {}: rank {rank}{others} {what}: it calls {} with {:#x}, most ranks {:#x}",
                    self.parent.rank,
                    called(post),
                    of(post),
                    usual
                );
                return Err(Error::new(Status::Mismatch, text));
            }
        }
        Ok(())
    }

    /// The plan for this rank, made or remembered.
    pub fn prepare(
        &self,
        problem: &Arc<Problem>,
        pass: Pass,
        options: Options,
        target: Target,
    ) -> Arc<Prepared> {
        let key = (problem.fingerprint(), self.rank, pass, options, target);
        let same = |plan: &Plan| *plan.problem == **problem;
        self.prepared(key, same, || Plan::new(problem, self.rank, pass, options))
    }

    /// The same for a trade.
    pub fn prepare_trade(
        &self,
        trade: &Arc<Trade>,
        pass: Pass,
        options: Options,
        target: Target,
    ) -> Arc<Prepared> {
        let key = (trade.fingerprint(), self.rank, pass, options, target);
        let same = |plan: &Plan| plan.trade.as_deref() == Some(&**trade);
        self.prepared(key, same, || Plan::of_trade(trade, self.rank, pass, options))
    }

    fn prepared(
        &self,
        key: PlanKey,
        same: impl Fn(&Plan) -> bool,
        plan: impl FnOnce() -> Plan,
    ) -> Arc<Prepared> {
        let mut cache = lock(&self.parent.plans);
        cache.clock += 1;
        let now = cache.clock;
        if let Some((used, prepared)) = cache.plans.get_mut(&key)
            && same(&prepared.plan)
        {
            *used = now;
            return prepared.clone();
        }
        let bytes = |c: &PlanCache| -> usize { c.plans.values().map(|(_, p)| p.bytes).sum() };
        while cache.plans.len() >= CACHED_PLANS || bytes(&cache) > CACHED_BYTES {
            let oldest = cache.plans.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| cache.plans.remove(&key));
        }
        let prepared = Arc::new(Prepared::new(plan(), key.4));
        cache.plans.insert(key, (now, prepared.clone()));
        prepared
    }

    /// Runs `f` with the way to the other members, if there are any. After an error the group is lost.
    pub fn linked(&self, f: impl FnOnce(Option<Link>) -> Result<Stats>) -> Result<()> {
        let stats = match &self.parent.transport {
            Some(transport) if self.size() > 1 => {
                let mut transport = lock(transport);
                let link = Link {
                    transport: &mut **transport,
                    members: &self.members,
                    timeout: self.parent.timeout,
                };
                self.watch(f(Some(link)))?
            }
            _ => f(None)?,
        };
        self.count(stats);
        Ok(())
    }

    /// The same on CUDA: `f` enqueues. The device is current meanwhile. After an error the group is lost.
    pub fn enqueued(&self, f: impl FnOnce(Option<DeviceLink>) -> Result<Stats>) -> Result<()> {
        let _current: Option<Guard> = self.device().map(|d| d.enter()).transpose()?;
        let stats = match self.lane() {
            Some(mut lane) if self.size() > 1 => {
                lane.calls += 1;
                let CommLane { transport, stream, calls } = &mut *lane;
                let link = DeviceLink {
                    transport: &mut **transport,
                    members: &self.members,
                    stream: stream.raw(),
                    call: *calls,
                };
                let result = f(Some(link));
                if let Err(e) = &result {
                    transport.give_up(e.clone());
                }
                self.watch(result)?
            }
            _ => f(None)?,
        };
        self.count(stats);
        Ok(())
    }

    fn count(&self, stats: Stats) {
        self.parent.sent.fetch_add(stats.sent, Ordering::Relaxed);
        self.parent.received.fetch_add(stats.received, Ordering::Relaxed);
        self.parent.exposed_ns.fetch_add(stats.exposed_ns, Ordering::Relaxed);
    }

    /// After any error of a transport the ranks are out of step, also when they only called different ones.
    fn watch<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result {
            let status = if e.status.loses_group() { e.status } else { Status::Transport };
            lock(&self.parent.lost).get_or_insert_with(|| Error::new(status, e.text.clone()));
        }
        result
    }
}

fn id_of(members: &[u32]) -> u64 {
    let mut h = Fnv::default();
    members.hash(&mut h);
    h.finish()
}

/// A panic while a lock was held is reported as `Internal` by the C boundary; the data stays consistent.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// call | members | number of the call | hash | status and length of the text | text
fn encode(header: Header, members: u64, call: u64, error: Option<&Error>) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    let text = error.map_or("", |e| &e.text);
    let mut end = text.len().min(HEADER_BYTES - HEADER_NUMBERS);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let status = error.map_or(0, |e| e.status as u64) << 32 | end as u64;
    for (i, n) in [header.call as u64, members, call, header.hash, status].into_iter().enumerate() {
        out[i * 8..i * 8 + 8].copy_from_slice(&n.to_le_bytes());
    }
    out[HEADER_NUMBERS..HEADER_NUMBERS + end].copy_from_slice(&text.as_bytes()[..end]);
    out
}

fn number(post: &[u8], word: usize) -> u64 {
    u64::from_le_bytes(post[word * 8..word * 8 + 8].try_into().expect("eight bytes"))
}

fn called(post: &[u8]) -> &'static str {
    Call::name(number(post, 0) as u32)
}

fn refusal(post: &[u8]) -> Option<String> {
    let status = number(post, 4);
    let length = (status as u32 as usize).min(HEADER_BYTES - HEADER_NUMBERS);
    (status >> 32 != 0).then(|| {
        String::from_utf8_lossy(&post[HEADER_NUMBERS..HEADER_NUMBERS + length]).into_owned()
    })
}
