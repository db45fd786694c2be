//! An attention layer: a configuration, the groups it has been attached to, and the two passes.

pub(crate) mod engine;
mod names;

use crate::backend::View;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Scores, check_elements, check_view};
use crate::balance::Dealt;
use crate::driver::{self, CUstream};
use crate::dtype::{DType, Fp8};
use crate::error::{Error, Result, Status};
use crate::exec::device::Target;
use crate::exec::{self, Dropout, Memory};
use crate::group::{Call, Group, Header, Prepared};
use crate::holding::holding;
use crate::mask::Mask;
use crate::partition::{Partition, Side};
use crate::plan::account::{ALIGN, Account, account};
use crate::plan::{Kind, Options, Pass, Plan, Slot, Tensor, fewest_stages};
use crate::problem::{CommType, Fnv, Latent, Problem, Sequence, Wire};
use crate::regions::Regions;
use crate::score::{BiasShape, Score, Seed};
pub use engine::{AllocFn, Allocator, FreeFn};
use engine::{Engine, Lease};
pub use names::name;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// What stays the same over all calls of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Query heads H.
    pub heads: u32,
    /// Key heads.
    pub kv_heads: u32,
    /// Elements per head of Q and K.
    pub dim_qk: u32,
    /// Elements per head of V and O.
    pub dim_v: u32,
    /// Storage type of all tensors but the LSE.
    pub dtype: DType,
    /// Softmax scale; 0 means 1/√dim_qk.
    pub scale: f32,
    /// What else happens to scores.
    pub score: Score,
    /// Keys and values come as latents.
    pub latent: Option<Latent>,
    /// Who may see whom.
    pub mask: Mask,
    /// Packed (thd) or one sequence per batch entry.
    pub packed: bool,
    /// How tokens are dealt out. A caller's own list comes with every call.
    pub partition: Partition,
    /// Type of partial gradients on the wire.
    pub wire: Wire,
    /// Format of keys and values on the wire, and so of what is attended; `None`: the storage type.
    pub kv_wire: Option<Fp8>,
    /// Most rows of Q or K that a rank ever holds, padding included; 0 = no limit.
    pub max_rows: u32,
    /// Forward leaves head-split tensors for backward (u > 1); otherwise backward exchanges them again.
    pub save: bool,
    /// On CUDA: dQ, and the gradient of a bias that heads share, are added in a fixed order, so that equal inputs give equal bits. The CPU always does.
    pub deterministic: bool,
    /// On CUDA: most pieces (slices of the mask) of a stage, which bounds the work lists in the workspace; 0 = [`DEFAULT_SEGMENTS`].
    pub max_segments: u32,
}

/// Pieces of a stage that a workspace bound allows for when nothing is said: 300 documents that are all cut in two.
pub const DEFAULT_SEGMENTS: u32 = 1024;

impl Config {
    /// The problem of a call on a group of `ranks`; the error names what does not fit.
    pub fn problem(
        &self,
        comm: Comm,
        ranks: u32,
        seqs: Vec<Sequence>,
        partition: &Partition,
    ) -> Result<Arc<Problem>> {
        self.problem_within(comm, ranks, seqs, partition, &Regions::default())
    }

    /// The same where queries see no more than these regions.
    pub fn problem_within(
        &self,
        comm: Comm,
        ranks: u32,
        seqs: Vec<Sequence>,
        partition: &Partition,
        regions: &Regions,
    ) -> Result<Arc<Problem>> {
        self.problem_dealt(comm, ranks, seqs, partition, regions, &Dealt::default())
    }

    fn problem_dealt(
        &self,
        comm: Comm,
        ranks: u32,
        seqs: Vec<Sequence>,
        partition: &Partition,
        regions: &Regions,
        dealt: &Dealt,
    ) -> Result<Arc<Problem>> {
        let inner = comm.kind.inner(ranks, comm.inner)?;
        let teams = ranks / inner;
        let mut p = Problem {
            ranks,
            inner,
            stages: comm.kind.default_stages(teams),
            relay: comm.relay && teams > 1,
            partition: partition.clone(),
            mask: self.mask,
            packed: self.packed,
            seqs,
            regions: regions.clone(),
            heads: self.heads,
            kv_heads: self.kv_heads,
            dim_qk: self.dim_qk,
            dim_v: self.dim_v,
            dtype: self.dtype,
            wire: self.wire,
            kv_wire: self.kv_wire,
            scale: if self.scale == 0.0 { 1.0 / (self.dim_qk as f32).sqrt() } else { self.scale },
            score: self.score.clone(),
            latent: self.latent,
        };
        if let Stages::Count(n) = comm.stages {
            p.stages = n;
        }
        p.validate()?;
        dealt.resolve(&mut p);
        lists_fill_the_batch(&p)?;
        if let Stages::Within(cap) = comm.stages {
            p.stages = fewest_stages(&p, cap, self.save)?;
        }
        Ok(Arc::new(p))
    }

    /// Has the CUDA backend kernels for it?
    pub fn runs_on(&self, cuda: &Cuda) -> Result<()> {
        cuda.supports(self.dtype, self.dim_qk, self.dim_v, Scores::of(&self.score))?;
        self.latent.map_or(Ok(()), |_| cuda.supports_latents(self.dtype))
    }

    /// Would a layer accept this on a group of `ranks`? The error is the one that it would give. Whether a memory cap can be kept
    /// depends on the lengths, so only calls tell.
    pub fn supports(&self, comm: Comm, ranks: u32) -> Result<()> {
        let stages = if let Stages::Within(_) = comm.stages { Stages::Named } else { comm.stages };
        let comm = Comm { stages, ..comm };
        let partition = match self.partition {
            Partition::Balanced => Partition::Balanced,
            _ => Partition::Contiguous,
        };
        self.problem(comm, ranks, vec![Sequence::square(ranks)], &partition).map(|_| ())
    }
}

/// A dense tensor is `[batch, seq, heads, dim]`: the batch divides the rows that a caller's list gives a rank.
fn lists_fill_the_batch(p: &Problem) -> Result<()> {
    let Partition::List { q, k } = &p.partition else { return Ok(()) };
    let batch = if p.packed { 1 } else { p.seqs.len() as u64 };
    for (side, lists) in [("q", q), ("k", k)] {
        for (rank, list) in lists.iter().enumerate() {
            let rows: u64 = list.iter().map(|s| u64::from(s.len)).sum();
            if !rows.is_multiple_of(batch) {
                return Err(Error::argument(format!(
                    "{side} partition list of rank {rank}: {rows} tokens in a dense batch of {batch}, which must divide them"
                )));
            }
        }
    }
    Ok(())
}

/// The last stage count that a memory cap led to. Working it out looks at all ranks' plans, and calls repeat.
#[derive(Default)]
struct Fitted(RefCell<Option<(Problem, u64, u32)>>);

impl Fitted {
    fn stages(&self, p: &Problem, cap: u64, saved: bool) -> Result<u32> {
        let mut last = self.0.borrow_mut();
        if let Some((_, _, stages)) = last.as_ref().filter(|(q, c, _)| q == p && *c == cap) {
            return Ok(*stages);
        }
        let stages = fewest_stages(p, cap, saved)?;
        *last = Some((p.clone(), cap, stages));
        Ok(stages)
    }
}

/// How a group communicates for a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Comm {
    /// One of the four names.
    pub kind: CommType,
    /// Inner size of `a2a+p2p`; 0 = chosen.
    pub inner: u32,
    /// KV stages.
    pub stages: Stages,
    /// Neighbour ring.
    pub relay: bool,
}

/// Number of KV stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stages {
    /// What the communication type's name stands for.
    Named,
    /// This many.
    Count(u32),
    /// The fewest with which the workspace of every rank stays within this many bytes, K and V being dense.
    Within(u64),
}

impl Comm {
    /// The communication type with everything else at its default.
    pub fn of(kind: CommType) -> Comm {
        Comm { kind, inner: 0, stages: Stages::Named, relay: false }
    }
}

/// Forward's small note to backward. Plain data; may be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// Fingerprint of the problem.
    pub problem: u64,
    /// Which group and communication the layer was attached to.
    pub attached: u64,
    /// Key of forward's dropout.
    pub seed: Seed,
    /// Hash of the caller's numbers of the sequences, with dropout; 0 without numbers.
    pub ids: u32,
}

/// A layer. One thread at a time.
pub struct Attention {
    config: Config,
    engine: Engine,
    /// Group and communication by id: backward finds the ones that its forward used, whatever is current now.
    known: HashMap<u64, Attached>,
    /// The group of one that the layer has without another.
    solo: Group,
    current: u64,
    /// Where the last forward ran: a rank whose context is unreadable is most likely waited for there.
    forwarded: Option<u64>,
    fitted: Fitted,
    /// Problems of earlier calls.
    recent: RefCell<HashMap<u64, Recent>>,
    /// How often problems were asked for.
    asked: Cell<u64>,
    /// Parent groups that have agreed on the configuration.
    agreed: Vec<usize>,
    dealt: Dealt,
}

/// A problem that a call made.
struct Recent {
    comm: Comm,
    ranks: u32,
    partition: Partition,
    /// When last.
    asked: u64,
    problem: Arc<Problem>,
}

/// Problems that a layer remembers: those of the subsets that it switches between. A new one takes the place of the one not asked for longest.
const RECENT_PROBLEMS: usize = 64;
/// Regions among them, 36 bytes each, besides the newest's: masks may be new in every call, and a model has many layers.
const RECENT_REGIONS: usize = 1 << 16;

/// Hash of the caller's numbers of sequences; 0 is none.
fn numbers(ids: &[u32]) -> u32 {
    let mut h = Fnv::default();
    ids.hash(&mut h);
    if ids.is_empty() { 0 } else { (h.finish() ^ h.finish() >> 32) as u32 | 1 }
}

/// Names a group and communication of a layer.
fn attachment(group: &Group, comm: Comm) -> u64 {
    let mut h = Fnv::default();
    (group.id(), group.parent_address(), comm).hash(&mut h);
    h.finish()
}

#[derive(Clone)]
struct Attached {
    group: Group,
    comm: Comm,
}

/// What a caller gives to one pass.
pub struct Args {
    /// The sequences, all of them, as they are before they are dealt out.
    pub seqs: Vec<Sequence>,
    /// If there are any, what queries see at most, under the layer's mask.
    pub regions: Regions,
    /// The caller's own partition, instead of the configured one.
    pub list: Option<Partition>,
    /// Every tensor of the pass.
    pub views: Vec<(Tensor, View)>,
    /// `[batch, seq, heads, dim]` of each, as the caller says; batch 1 when packed.
    pub shapes: Vec<(Tensor, [i64; 4])>,
    /// Caller's workspace, or none to use the layer's own.
    pub workspace: Option<(*mut u8, usize)>,
    /// Caller's saved buffer.
    pub saved: Option<(*mut u8, usize)>,
    /// Key of dropout's random words: in backward forward's.
    pub seed: Seed,
    /// The caller's numbers for the sequences, for dropout; empty: their indices.
    pub ids: Vec<u32>,
    /// On CUDA the stream that the call is work on; null is the legacy default stream. Null on the CPU.
    pub stream: CUstream,
}

impl Attention {
    /// A layer without a group: it computes alone until [`Attention::set_group`].
    pub fn new(config: Config, cpu: Cpu) -> Result<Attention> {
        Attention::with(config, Engine::on_host(cpu), Group::solo())
    }

    /// The same on a device. Calls without a workspace get one from the allocator, or share one that the layer keeps.
    pub fn on_device(
        config: Config,
        cuda: Cuda,
        allocator: Option<Allocator>,
    ) -> Result<Attention> {
        config.runs_on(&cuda)?;
        let solo = Group::solo_on(cuda.device());
        Attention::with(config, Engine::on_device(cuda, allocator)?, solo)
    }

    fn with(config: Config, engine: Engine, solo: Group) -> Result<Attention> {
        let mut a = Attention {
            config,
            engine,
            known: HashMap::new(),
            solo,
            current: 0,
            forwarded: None,
            fitted: Fitted::default(),
            recent: RefCell::default(),
            asked: Cell::new(0),
            agreed: Vec::new(),
            dealt: Dealt::default(),
        };
        a.clear_group();
        a.config.supports(Comm::of(CommType::P2p), 1)?;
        Ok(a)
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The group in use.
    pub fn group(&self) -> &Group {
        &self.known[&self.current].group
    }

    /// How it communicates.
    pub fn comm(&self) -> Comm {
        self.known[&self.current].comm
    }

    /// Bytes of scratch memory that the kernels hold.
    pub fn kernel_bytes(&mut self) -> usize {
        self.engine.kernel_bytes()
    }

    /// Turns context parallelism off: the layer computes alone.
    pub fn clear_group(&mut self) {
        self.attach(self.solo.clone(), Comm::of(CommType::P2p));
    }

    /// Attaches a group. Collective on a parent group the first time (the configuration is agreed); local afterwards and for subsets.
    /// A `comm` that could not be read comes as an error: it is posted to the other ranks, who would wait otherwise.
    pub fn set_group(&mut self, group: &Group, comm: Result<Comm>) -> Result<()> {
        group.usable()?;
        // Switching back is a look-up: it allocates nothing.
        if let Ok(comm) = &comm {
            let id = attachment(group, *comm);
            let agreed = !group.is_parent() || self.agreed.contains(&group.parent_address());
            if agreed && self.known.contains_key(&id) {
                self.current = id;
                return Ok(());
            }
        }
        let fits = self.engine.fits(group).and(comm);
        let fits = fits.and_then(|comm| self.config.supports(comm, group.size()).map(|()| comm));
        let new = !self.agreed.contains(&group.parent_address());
        let comm = if group.is_parent() && new {
            let mut h = Fnv::default();
            (format!("{:?}", self.config), fits.as_ref().ok()).hash(&mut h);
            group.agree(Header { call: Call::SetGroup, hash: h.finish() }, fits)?
        } else {
            fits?
        };
        if group.is_parent() && new {
            self.agreed.push(group.parent_address());
        }
        self.attach(group.clone(), comm);
        Ok(())
    }

    /// Size of the group that a context's forward used.
    pub fn ranks_of(&self, context: &Context) -> Option<u32> {
        self.known.get(&context.attached).map(|a| a.group.size())
    }

    fn attach(&mut self, group: Group, comm: Comm) {
        self.current = attachment(&group, comm);
        self.known.insert(self.current, Attached { group, comm });
    }

    /// The problem of a call; of one that was asked before, the same, without an allocation.
    fn problem_for(
        &self,
        at: &Attached,
        seqs: &[Sequence],
        partition: &Partition,
        regions: &Regions,
    ) -> Result<Arc<Problem>> {
        let mut h = Fnv::default();
        (at.comm, at.group.size(), seqs, partition, regions).hash(&mut h);
        let key = h.finish();
        let same = |r: &Recent| {
            (r.comm, r.ranks) == (at.comm, at.group.size())
                && r.problem.seqs == seqs
                && r.problem.regions == *regions
                && r.partition == *partition
        };
        let now = self.asked.get() + 1;
        self.asked.set(now);
        if let Some(recent) = self.recent.borrow_mut().get_mut(&key).filter(|r| same(r)) {
            recent.asked = now;
            return Ok(recent.problem.clone());
        }
        let problem = self.new_problem(at, seqs.to_vec(), partition, regions)?;
        let mut recent = self.recent.borrow_mut();
        let pieces = |recent: &HashMap<u64, Recent>| -> usize {
            recent.values().map(|r| r.problem.regions.list().len()).sum()
        };
        while recent.len() >= RECENT_PROBLEMS || pieces(&recent) > RECENT_REGIONS {
            let oldest = recent.iter().min_by_key(|(_, r)| r.asked).map(|(key, _)| *key);
            oldest.and_then(|key| recent.remove(&key));
        }
        let (comm, ranks) = (at.comm, at.group.size());
        let partition = partition.clone();
        recent.insert(key, Recent { comm, ranks, partition, asked: now, problem: problem.clone() });
        Ok(problem)
    }

    fn new_problem(
        &self,
        at: &Attached,
        seqs: Vec<Sequence>,
        partition: &Partition,
        regions: &Regions,
    ) -> Result<Arc<Problem>> {
        let made = |comm| {
            let ranks = at.group.size();
            self.config.problem_dealt(comm, ranks, seqs, partition, regions, &self.dealt)
        };
        let Stages::Within(cap) = at.comm.stages else { return made(at.comm) };
        let p = made(Comm { stages: Stages::Named, ..at.comm })?;
        let stages = self.fitted.stages(&p, cap, self.config.save)?;
        Ok(Arc::new(Problem { stages, ..(*p).clone() }))
    }

    /// The current problem for these sequences.
    pub fn problem(&self, seqs: Vec<Sequence>, list: Option<Partition>) -> Result<Arc<Problem>> {
        self.problem_within(&seqs, list.as_ref(), &Regions::default())
    }

    /// The same where queries see no more than these regions.
    pub fn problem_within(
        &self,
        seqs: &[Sequence],
        list: Option<&Partition>,
        regions: &Regions,
    ) -> Result<Arc<Problem>> {
        let partition = list.unwrap_or(&self.config.partition);
        self.problem_for(&self.known[&self.current], seqs, partition, regions)
    }

    /// What a pass over these sequences runs, K and V being dense: from the caches, if it was asked before.
    pub fn prepared(&self, seqs: &[Sequence], pass: Pass) -> Result<Arc<Prepared>> {
        let at = &self.known[&self.current];
        let problem = self.problem_for(at, seqs, &self.config.partition, &Regions::default())?;
        Ok(at.group.prepare(&problem, pass, self.options(&at.group, false), self.target()))
    }

    /// This rank's plan.
    pub fn plan(&self, problem: &Arc<Problem>, pass: Pass) -> Plan {
        Plan::new(problem, self.group().rank(), pass, self.options(self.group(), false))
    }

    /// What a pass costs this rank. On a device the work lists are part of its workspace.
    pub fn account(&self, problem: &Arc<Problem>, pass: Pass) -> Account {
        let target = self.target();
        if target == Target::Host {
            return account(&self.plan(problem, pass));
        }
        let prepared =
            self.group().prepare(problem, pass, self.options(self.group(), false), target);
        Account { workspace: prepared.workspace as u64, ..account(&prepared.plan) }
    }

    /// Workspace that suffices for every call in which no rank holds more than `rows` rows: that of a full mask over `rows` rows on
    /// every rank, on CUDA with `max_segments` pieces in every stage. Under a memory cap that is the cap, and what gathering K and V adds to it.
    pub fn workspace_bound(&self, rows: u32) -> Result<usize> {
        let at = &self.known[&self.current];
        let total = u64::from(rows) * u64::from(at.group.size());
        let total = u32::try_from(total).map_err(|_| {
            Error::argument(format!("tokens per rank: got {rows}, {total} in all is too many"))
        })?;
        let named = Comm { stages: Stages::Named, ..at.comm };
        let (comm, cap) = match at.comm.stages {
            Stages::Within(cap) => (named, Some(usize::try_from(cap).unwrap_or(usize::MAX))),
            _ => (at.comm, None),
        };
        let seqs = vec![Sequence::square(total)];
        let p = self.config.problem(comm, at.group.size(), seqs, &Partition::Contiguous)?;
        // The cap bounds what depends on the number of stages; a call may have any number, and one needs most.
        let cap = cap.filter(|_| p.teams() > 1 && !p.relay);
        let stages = if cap.is_some() { 1 } else { p.stages };
        let full = Arc::new(Problem { mask: Mask::FULL, stages, ..(*p).clone() });
        let target = self.target();
        let most = |options| {
            let bytes = |pass| at.group.prepare(&full, pass, options, target).workspace;
            bytes(Pass::Forward).max(bytes(Pass::Backward))
        };
        let bound = most(self.options(&at.group, true));
        let gathering =
            bound.saturating_sub(most(Options { saved: self.config.save, ..Options::default() }));
        // A stage of many pieces has longer work lists than the full mask's; backward cuts its own keys' work in two.
        let segments = match self.config.max_segments {
            0 => DEFAULT_SEGMENTS,
            n => n,
        };
        let tables = target.most_tables(
            full.stages as usize + 2,
            segments as usize,
            // Two pieces of a sequence on every rank, as zigzag deals them, on either side.
            4 * full.ranks as usize,
            full.inner as usize,
            [rows as usize * full.inner as usize, total as usize],
            &self.config.score,
        );
        let packed = if at.group.same_pieces() { self.most_packed(&full) } else { 0 };
        let shared = self.most_shared_bias(&full, rows);
        let (gathering, bound) =
            (gathering + tables + packed + shared, bound + tables + packed + shared);
        Ok(cap.map_or(bound, |cap| bound.min(cap.saturating_add(gathering))))
    }

    /// Most bytes of a bias gradient that batch entries share, before they are summed: one sequence has none, and of several the longest has at most
    /// half the keys.
    fn most_shared_bias(&self, full: &Problem, rows: u32) -> usize {
        let shared = |b: &BiasShape| b.gradient && !b.batch && !full.packed && full.inner > 1;
        full.score.bias.filter(shared).map_or(0, |bias| {
            let heads = if bias.heads { full.heads as usize } else { 1 };
            // Every message slot of it is rounded up for itself.
            rows as usize * heads * (full.bias_columns() as usize).div_ceil(2) * 4
                + (4 + 2 * full.inner as usize) * ALIGN
        })
    }

    /// Most bytes of what is packed so that messages are cut alike: own keys for a stage are no more than what arrives in one, members' rows
    /// no more than the team's. A full mask over whole sequences packs nothing, so the bound does not have them.
    fn most_packed(&self, full: &Arc<Problem>) -> usize {
        let of = |pass| -> usize {
            let group = &self.known[&self.current].group;
            let plan = Plan::new(full, group.rank(), pass, self.options(group, true));
            let kinds = |kind| kind == Kind::Recv || (kind == Kind::Team && full.inner > 1);
            let slots = plan.slots.iter().filter(|s| kinds(s.slot.kind));
            // Every member's rows are rounded up for themselves.
            slots.map(|s| s.bytes() + full.inner as usize * ALIGN).sum()
        };
        of(Pass::Forward).max(of(Pass::Backward))
    }

    fn options(&self, group: &Group, pack: bool) -> Options {
        Options { pack, saved: self.config.save, same_pieces: group.same_pieces() }
    }

    fn target(&self) -> Target {
        self.engine.target(&self.config)
    }

    /// Forward. Fills O, LSE and the saved buffer; the context goes to backward. Collective, blocking.
    ///
    /// Arguments that could not even be read come as an error: it is posted to the other members, who would wait otherwise.
    ///
    /// # Safety
    /// All memory in the arguments is valid for its shapes.
    pub unsafe fn forward(&mut self, args: Result<Args>) -> Result<Context> {
        let id = self.current;
        let seed = args.as_ref().map_or(Seed::default(), |args| args.seed);
        let ids = args.as_ref().map_or(0, |args| numbers(&args.ids));
        // SAFETY: the caller's promise.
        let problem = unsafe { self.pass(Pass::Forward, id, None, args)? };
        self.forwarded = Some(id);
        Ok(Context { problem, attached: id, seed, ids })
    }

    /// Backward of the forward that made `context`, on the group that it used. Collective, blocking.
    ///
    /// # Safety
    /// All memory in the arguments is valid for its shapes.
    pub unsafe fn backward(&mut self, context: Result<Context>, args: Result<Args>) -> Result<()> {
        let likely = self.forwarded.unwrap_or(self.current);
        let (id, args) = match &context {
            Ok(c) if self.known.contains_key(&c.attached) => {
                let rank = self.group().parent_rank();
                let same = |args: Args| match numbers(&args.ids) == c.ids {
                    true => Ok(Args { seed: c.seed, ..args }),
                    false => Err(Error::argument(format!(
                        "sequence_ids: not those that forward had (rank {rank})"
                    ))),
                };
                (c.attached, args.and_then(same))
            }
            Ok(c) => {
                let text = format!(
                    "context: made by another layer, or on a group that this one never had (id {:#x}, rank {})",
                    c.attached,
                    self.group().parent_rank()
                );
                (likely, Err(Error::argument(text)))
            }
            Err(e) => (likely, Err(e.clone())),
        };
        // SAFETY: the caller's promise.
        unsafe { self.pass(Pass::Backward, id, context.ok().map(|c| c.problem), args).map(|_| ()) }
    }

    /// Checks, agrees, runs. Returns the fingerprint of the problem, which must be `expected` if that is given.
    ///
    /// # Safety
    /// All memory in the arguments is valid for its shapes.
    unsafe fn pass(
        &mut self,
        pass: Pass,
        id: u64,
        expected: Option<u64>,
        args: Result<Args>,
    ) -> Result<u64> {
        let at = self.known[&id].clone();
        let rank = at.group.parent_rank();
        let prepare = || {
            let args = args?;
            let problem = self.problem_for(
                &at,
                &args.seqs,
                args.list.as_ref().unwrap_or(&self.config.partition),
                &args.regions,
            )?;
            let hash = problem.fingerprint();
            if expected.is_some_and(|e| e != hash) {
                let text = format!(
                    "context: belongs to problem {:#x}, these lengths make problem {hash:#x} (rank {rank})",
                    expected.unwrap_or(0)
                );
                return Err(Error::argument(text));
            }
            self.check(&problem, &at.group, &args)?;
            if let (Engine::Device(_), Some(device)) = (&self.engine, at.group.device()) {
                let _current = device.enter()?;
                // SAFETY: a stream of the device, by the caller's promise.
                if unsafe { driver::is_capturing(args.stream)? } {
                    at.group.capturable()?;
                }
            }
            let dense = |tensor| args.views.iter().any(|(x, v)| *x == tensor && v.is_dense());
            let pack = match problem.latent {
                Some(_) => !dense(Tensor::Latent),
                None => !(dense(Tensor::K) && dense(Tensor::V)),
            };
            let count = args.seqs.len();
            if !args.ids.is_empty() && args.ids.len() != count {
                let got = args.ids.len();
                let text = format!("sequence_ids: got {got} for {count} sequences (rank {rank})");
                return Err(Error::argument(text));
            }
            let options = self.options(&at.group, pack);
            let prepared = at.group.prepare(&problem, pass, options, self.target());
            let given = |slot: &Slot| args.views.iter().any(|(x, _)| *x == slot.tensor);
            let mut asked = prepared.plan.slots.iter().map(|info| &info.slot);
            if let Some(slot) = asked.find(|s| s.kind == Kind::Caller && !given(s)) {
                let text = format!("{}: not given (rank {rank})", name(slot.tensor));
                return Err(Error::argument(text));
            }
            let workspace = self.memory(&prepared, &args, &at.group)?;
            Ok((hash, prepared, workspace, args))
        };
        // A panic here is a bug, but the others must not wait for this rank because of it.
        let ready =
            catch_unwind(AssertUnwindSafe(prepare)).unwrap_or_else(|e| Err(Error::from_panic(e)));
        let call = if pass == Pass::Forward { Call::Forward } else { Call::Backward };
        let hash = ready.as_ref().map_or(0, |(hash, ..)| *hash);
        // What backward exchanges depends on what forward leaves.
        let mut h = Fnv::default();
        (hash, self.config.save).hash(&mut h);
        // One mask of dropout for all ranks.
        if let (Ok((.., args)), true) = (&ready, self.config.score.dropout > 0.0) {
            // Addresses differ; what is there is read later.
            let seed = match args.seed {
                Seed::Value(seed) => Some(seed),
                Seed::At(_) => None,
            };
            (seed, &args.ids).hash(&mut h);
        }
        let header = Header { call, hash: h.finish() };
        let (hash, prepared, workspace, args) = at.group.agree(header, ready)?;
        let saved = args.saved.map_or(std::ptr::null_mut(), |(ptr, _)| ptr);
        let memory = Memory {
            dropout: Dropout { seed: args.seed, ids: &args.ids },
            caller: &args.views,
            offsets: &prepared.offsets,
            workspace: workspace.ptr(),
            saved,
        };
        match &mut self.engine {
            Engine::Host { cpu, scratch, .. } => at.group.linked(|link| {
                // SAFETY: shapes and sizes were checked against the plan; validity of the memory is the caller's promise.
                unsafe { exec::run(&prepared.plan, &memory, cpu, link, scratch) }
            })?,
            Engine::Device(device) => at.group.enqueued(|link| {
                // SAFETY: as above; the workspace stays until the stream is through with it.
                unsafe { device.enqueue(&prepared, &memory, link, args.stream, &workspace) }
            })?,
        }
        Ok(hash)
    }

    /// Every tensor against the problem.
    fn check(&self, p: &Problem, group: &Group, t: &Args) -> Result<()> {
        let rank = group.rank();
        let batch = if p.packed { 1 } else { p.seqs.len() as i64 };
        let rows = [Side::Query, Side::Key].map(|side| holding(p, rank, side).rows);
        let most = rows[0].max(rows[1]);
        if self.config.max_rows > 0 && most > self.config.max_rows {
            return Err(Error::new(
                Status::OutOfMemory,
                format!(
                    "tokens per rank: got {most}, the layer was created for at most {} (rank {})",
                    self.config.max_rows,
                    group.parent_rank()
                ),
            ));
        }
        if let Engine::Device(_) = self.engine {
            for (tensor, view) in &t.views {
                match tensor {
                    Tensor::Bias | Tensor::DBias => check_elements(name(*tensor), view)?,
                    _ => check_view(name(*tensor), view)?,
                }
            }
        } else if let Seed::At(address) = t.seed {
            return Err(Error::argument(format!(
                "dropout_seed: got the address {address:#x}, allowed on CUDA only (rank {})",
                group.parent_rank()
            )));
        }
        for (tensor, shape) in &t.shapes {
            let local = i64::from(rows[usize::from(tensor.key_side())]);
            let heads = i64::from(if tensor.key_side() { p.kv_heads } else { p.heads });
            let dim = i64::from(match tensor {
                Tensor::Lse => 1,
                Tensor::Q | Tensor::K | Tensor::DQ | Tensor::DK => p.dim_qk,
                _ => p.dim_v,
            });
            let want = match (tensor, p.score.bias) {
                (Tensor::Bias | Tensor::DBias, Some(b)) => [
                    if b.batch { batch } else { 1 },
                    if b.queries { local / batch } else { 1 },
                    if b.heads { heads } else { 1 },
                    i64::from(p.bias_columns()),
                ],
                (tensor, _) if tensor.per_head() => [1, 1, heads, 1],
                (Tensor::Latent | Tensor::DLatent, _) => {
                    let width = i64::from(p.latent.map_or(0, Latent::width));
                    [batch, local / batch, 1, width]
                }
                (tensor, _) if tensor.weights() => {
                    let dim = i64::from(p.latent.map_or(0, |l| l.dim));
                    [1, Plan::weight_rows(p, *tensor).into(), heads, dim]
                }
                _ => [batch, local / batch, heads, dim],
            };
            if *shape != want && tensor.per_head() {
                let (name, rank) = (name(*tensor), group.parent_rank());
                let text =
                    format!("{name}: got shape [{}], must be [{heads}] (rank {rank})", shape[2]);
                return Err(Error::argument(text));
            }
            if *shape != want && tensor.weights() {
                let of = |[_, rows, heads, dim]: [i64; 4]| [heads, rows, dim];
                return Err(Error::argument(format!(
                    "{}: got shape [heads, rows, dim] = {:?}, must be {:?} (rank {})",
                    name(*tensor),
                    of(*shape),
                    of(want),
                    group.parent_rank()
                )));
            }
            if *shape != want {
                let name = name(*tensor);
                return Err(Error::argument(format!(
                    "{name}: got shape [batch, seq, heads, dim] = {shape:?}, this rank holds {want:?} (rank {})",
                    group.parent_rank()
                )));
            }
        }
        Ok(())
    }

    /// Workspace and saved buffer for a plan.
    fn memory(&mut self, prepared: &Prepared, t: &Args, group: &Group) -> Result<Lease> {
        let rank = group.parent_rank();
        let short = |name: &str, got: usize, need: usize| {
            Err(Error::new(
                Status::OutOfMemory,
                format!("{name}: got {got} bytes, this call needs {need} (rank {rank})"),
            ))
        };
        let (saved, got) = t.saved.unwrap_or((std::ptr::null_mut(), 0));
        if got < prepared.saved {
            return short("saved", got, prepared.saved);
        }
        if prepared.saved > 0 && !(saved as usize).is_multiple_of(ALIGN) {
            return Err(Error::argument(format!(
                "saved: got address {saved:p}, must be a multiple of {ALIGN} (rank {rank})"
            )));
        }
        match t.workspace {
            Some((_, got)) if got < prepared.workspace => {
                short("workspace", got, prepared.workspace)
            }
            Some((ptr, _)) if !(ptr as usize).is_multiple_of(ALIGN) => {
                Err(Error::argument(format!(
                    "workspace: got address {ptr:p}, must be a multiple of {ALIGN} (rank {rank})"
                )))
            }
            Some((ptr, _)) => Ok(Lease::of_caller(ptr)),
            None => self.engine.workspace(prepared.workspace, t.stream),
        }
    }

    /// Bytes of the layer's own workspace so far.
    pub fn workspace_held(&self) -> usize {
        self.engine.workspace_held()
    }

    /// Bytes that forward leaves for backward.
    pub fn saved_bytes(&self, problem: &Arc<Problem>) -> usize {
        let options = self.options(self.group(), false);
        self.group().prepare(problem, Pass::Forward, options, self.target()).saved
    }
}
