//! Layers over groups: groups switched between forward and backward, subsets, disagreement, the caller's own memory, ranks that
//! never come. Ranks are threads; what a layer computes must equal, bit for bit, the same plans run in isolation.

use crate::oracle::{Case, Inputs, Results, cases, inputs};
use crate::ranks::{Fenced, How, Layout, Shard, collect, on_threads, run};
use context_parallel::attention::{Args, Attention, Comm, Config, Context, Stages};
use context_parallel::backend::cpu::{Cpu, Simd};
use context_parallel::dtype::DType;
use context_parallel::error::{Error, Result, Status};
use context_parallel::exec::device::Target;
use context_parallel::group::Group;
use context_parallel::holding::holding;
use context_parallel::mask::Mask;
use context_parallel::partition::{Partition, Side};
use context_parallel::plan::account::ALIGN;
use context_parallel::plan::{Pass, Tensor};
use context_parallel::problem::{CommType, Problem, Sequence, Wire};
use context_parallel::regions::Regions;
use context_parallel::score::{Score, Seed};
use context_parallel::transport::local::local_group;
use context_parallel::transport::{Message, Transport};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longer than anything here takes, short enough to notice a rank that hangs.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn comm(kind: CommType) -> Comm {
    Comm::of(kind)
}

pub fn config() -> Config {
    Config {
        score: Score::default(),
        latent: None,
        heads: 4,
        kv_heads: 2,
        dim_qk: 16,
        dim_v: 16,
        dtype: DType::Bf16,
        scale: 0.0,
        mask: Mask::CAUSAL,
        packed: false,
        partition: Partition::Zigzag,
        wire: Wire::Storage,
        kv_wire: None,
        max_rows: 0,
        save: false,
        deterministic: false,
        max_segments: 0,
    }
}

pub fn layer(config: Config) -> Attention {
    Attention::new(config, Cpu::new(1, Simd::detect()).unwrap()).unwrap()
}

/// Inputs of one sequence of `len` tokens for [`config`]. Different lengths have different values.
pub fn one(len: u32) -> (Vec<Sequence>, Inputs) {
    let base = cases().iter().find(|c| c.name == "causal_33").expect("in the corpus");
    let seqs = vec![Sequence::square(len)];
    let case = Case { seqs: seqs.clone(), ..base.clone() };
    (seqs, inputs(&case, DType::Bf16))
}

/// One micro-batch of one rank: its tensors, and what forward leaves for backward.
pub struct Batch {
    problem: Problem,
    seqs: Vec<Sequence>,
    shard: Shard,
    saved: Fenced,
    saved_bytes: usize,
    workspace: Option<(*mut u8, usize)>,
    pub context: Context,
}

// SAFETY: the workspace pointer is used by the thread that the batch was made on.
unsafe impl Send for Batch {}

impl Batch {
    /// Dealt out as the layer's group and partition say now.
    pub fn new(layer: &Attention, seqs: &[Sequence], inputs: &Inputs, layout: Layout) -> Batch {
        Batch::within(layer, seqs, &Regions::default(), inputs, layout)
    }

    /// The same where queries see no more than these regions.
    pub fn within(
        layer: &Attention,
        seqs: &[Sequence],
        regions: &Regions,
        inputs: &Inputs,
        layout: Layout,
    ) -> Batch {
        let problem = layer.problem_within(seqs, None, regions).unwrap();
        let shard = Shard::deal(&problem, layer.group().rank(), inputs, layout);
        let saved_bytes = layer.saved_bytes(&problem);
        Batch {
            problem: (*problem).clone(),
            seqs: seqs.to_vec(),
            shard,
            saved: Fenced::new(saved_bytes),
            saved_bytes,
            workspace: None,
            context: Context::default(),
        }
    }

    pub fn args(&mut self, pass: Pass) -> Args {
        let outputs = [Tensor::DOut, Tensor::DQ, Tensor::DK, Tensor::DV];
        let wanted = |t: &Tensor| pass == Pass::Backward || !outputs.contains(t);
        let shape = |(t, l): &(Tensor, crate::ranks::Local)| (*t, l.shape);
        Args {
            seed: Seed::default(),
            ids: Vec::new(),
            seqs: self.seqs.clone(),
            regions: self.problem.regions.clone(),
            list: None,
            views: self.shard.views().into_iter().filter(|(t, _)| wanted(t)).collect(),
            shapes: self.shard.0.iter().map(shape).filter(|(t, _)| wanted(t)).collect(),
            workspace: self.workspace,
            saved: Some((self.saved.ptr(), self.saved_bytes)),
            stream: std::ptr::null_mut(),
        }
    }

    pub fn forward(&mut self, layer: &mut Attention) -> Result<()> {
        let args = self.args(Pass::Forward);
        // SAFETY: the shard and the saved buffer live as long as the batch.
        self.context = unsafe { layer.forward(Ok(args))? };
        Ok(())
    }

    pub fn backward(&mut self, layer: &mut Attention) -> Result<()> {
        let (context, args) = (self.context, self.args(Pass::Backward));
        // SAFETY: as in `forward`.
        unsafe { layer.backward(Ok(context), Ok(args)) }
    }

    pub fn both(&mut self, layer: &mut Attention) -> Result<()> {
        self.forward(layer)?;
        self.backward(layer)
    }
}

/// Batches of the members of a group, by rank in it; the same bits as the plans run alone.
pub fn equal_alone(what: &str, members: Vec<Batch>, inputs: &Inputs, saved: bool) {
    let problem = members[0].problem.clone();
    let intact = members.iter().all(|b| b.saved.intact());
    assert!(intact, "{what}: written beyond the saved buffer");
    let shards: Vec<Shard> = members.into_iter().map(|b| b.shard).collect();
    let got = collect(&problem, &shards);
    let alone = run(&problem, How { saved, ..How::default() }, inputs).unwrap();
    same(what, &got, &alone);
}

fn same(what: &str, a: &Results<f32>, b: &Results<f32>) {
    use crate::oracle::Tensor;
    for t in Tensor::ALL {
        let bits = |r: &Results<f32>| r.get(t).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(a) == bits(b), "{what}: {t:?} has other bits than the plan run alone");
    }
}

/// Every rank of a new parent group on a thread of its own.
pub fn ranks<T: Send>(
    size: u32,
    timeout: Duration,
    body: impl Fn(u32, Group) -> Result<T> + Sync,
) -> Vec<T> {
    let each = |r, t| body(r, Group::new(t, timeout)).map_err(|e| e.to_string());
    on_threads(local_group(size), each).unwrap_or_else(|e| panic!("{e}"))
}

/// Forward A on all four ranks; switch to three of them, in another order, forward B; then both backwards.
#[test]
fn groups_switch_between_forward_and_backward() {
    let (a, b) = (one(33), one(50));
    let few = [3, 1, 0];
    for save in [false, true] {
        for (first, second) in [
            (CommType::P2p, CommType::A2a),
            (CommType::A2a, CommType::P2p),
            (CommType::AllGather, CommType::A2aP2p),
            (CommType::A2aP2p, CommType::AllGather),
        ] {
            let done = ranks(4, PATIENCE, |rank, group| {
                let mut layer = layer(Config { save, ..config() });
                layer.set_group(&group, Ok(comm(first)))?;
                let mut x = Batch::new(&layer, &a.0, &a.1, Layout::Dense);
                x.forward(&mut layer)?;
                let mut y = None;
                if few.contains(&rank) {
                    layer.set_group(&group.subset(&few)?, Ok(comm(second)))?;
                    y = Some(Batch::new(&layer, &b.0, &b.1, Layout::Dense));
                    y.as_mut().unwrap().forward(&mut layer)?;
                }
                x.backward(&mut layer)?;
                if let Some(y) = &mut y {
                    y.backward(&mut layer)?;
                }
                Ok((x, y))
            });
            let (x, y): (Vec<_>, Vec<_>) = done.into_iter().unzip();
            let mut y: Vec<Option<Batch>> = y;
            let y = few.iter().map(|r| y[*r as usize].take().unwrap()).collect();
            equal_alone("A", x, &a.1, save);
            equal_alone("B", y, &b.1, save);
        }
    }
}

/// Three micro-batches in flight over two layers, their backwards in another order than their forwards; strided keys.
#[test]
fn micro_batches_interleave() {
    let (a, b, c) = (one(33), one(50), one(7));
    let done = ranks(3, PATIENCE, |_, group| {
        let (mut one, mut two) = (layer(config()), layer(Config { save: true, ..config() }));
        one.set_group(&group, Ok(comm(CommType::P2p)))?;
        two.set_group(&group, Ok(comm(CommType::A2a)))?;
        let mut a = Batch::new(&one, &a.0, &a.1, Layout::HeadsFirst);
        let mut b = Batch::new(&two, &b.0, &b.1, Layout::Dense);
        let mut c = Batch::new(&one, &c.0, &c.1, Layout::Gaps);
        a.forward(&mut one)?;
        b.forward(&mut two)?;
        c.forward(&mut one)?;
        a.backward(&mut one)?;
        c.backward(&mut one)?;
        b.backward(&mut two)?;
        Ok((a, b, c))
    });
    let (mut x, mut y, mut z) = (Vec::new(), Vec::new(), Vec::new());
    for (a, b, c) in done {
        x.push(a);
        y.push(b);
        z.push(c);
    }
    // Packing moves rows, it does not change a sum.
    equal_alone("a", x, &a.1, false);
    equal_alone("b", y, &b.1, true);
    equal_alone("c", z, &c.1, false);
}

/// Without a group a layer computes alone, before and after it had one.
#[test]
fn clearing_the_group_is_one_rank() {
    let (seqs, inputs) = one(33);
    let done = ranks(2, PATIENCE, |_, group| {
        let mut layer = layer(config());
        let mut before = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        before.both(&mut layer)?;
        layer.set_group(&group, Ok(comm(CommType::P2p)))?;
        let mut together = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        together.forward(&mut layer)?;
        layer.clear_group();
        assert_eq!((layer.group().size(), layer.group().rank()), (1, 0));
        let mut after = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        after.both(&mut layer)?;
        together.backward(&mut layer)?;
        Ok((before, together, after))
    });
    let mut together = Vec::new();
    for (before, t, after) in done {
        equal_alone("before", vec![before], &inputs, false);
        equal_alone("after", vec![after], &inputs, false);
        together.push(t);
    }
    equal_alone("together", together, &inputs, false);
}

/// Two subsets that share ranks, used in the same order on all of them; the second one's backward comes first.
/// The CPU cannot read the device's memory.
#[test]
fn a_seed_in_device_memory_needs_cuda() {
    let (seqs, inputs) = one(9);
    let score = Score { dropout: 0.5, ..Score::default() };
    let mut layer = layer(Config { score, ..config() });
    let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
    let args = Args { seed: Seed::At(64), ..batch.args(Pass::Forward) };
    // SAFETY: the shard and the saved buffer live as long as the batch.
    let e = unsafe { layer.forward(Ok(args)) }.unwrap_err();
    assert_eq!(e.text, "dropout_seed: got the address 0x40, allowed on CUDA only (rank 0)");
}

#[test]
fn overlapping_subsets() {
    let (a, b) = (one(41), one(29));
    let lists: [&[u32]; 2] = [&[2, 0, 1], &[1, 4, 2, 3, 0]];
    for (first, second) in [(CommType::A2a, CommType::P2p), (CommType::P2p, CommType::A2a)] {
        let done = ranks(5, PATIENCE, |rank, group| {
            let mut layer = layer(config());
            let mut batches = [None, None];
            let both = [(0, &a, first), (1, &b, second)];
            for (i, input, kind) in both {
                if lists[i].contains(&rank) {
                    layer.set_group(&group.subset(lists[i])?, Ok(comm(kind)))?;
                    let batch =
                        batches[i].insert(Batch::new(&layer, &input.0, &input.1, Layout::Dense));
                    batch.forward(&mut layer)?;
                }
            }
            for batch in batches.iter_mut().rev().flatten() {
                batch.backward(&mut layer)?;
            }
            Ok(batches)
        });
        let mut done = done;
        for (i, input) in [(0, &a), (1, &b)] {
            let members = lists[i].iter().map(|r| done[*r as usize][i].take().unwrap()).collect();
            equal_alone("subset", members, &input.1, false);
        }
    }
}

/// What one rank does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wrong {
    Shape,
    Unreadable,
    Workspace,
    Saved,
    Lengths,
    Backward,
    Barrier,
    Communication,
    Scale,
    Mask,
    Order,
    TooLong,
}

impl Wrong {
    /// The culprit's own status, and what everybody's text contains.
    const ALL: [(Wrong, Status, &str); 12] = [
        (Wrong::Shape, Status::InvalidArgument, "k: got shape"),
        (Wrong::Unreadable, Status::InvalidArgument, "q: null"),
        (Wrong::Workspace, Status::OutOfMemory, "workspace: got 64 bytes"),
        (Wrong::Saved, Status::OutOfMemory, "saved: got 64 bytes"),
        (Wrong::Lengths, Status::Mismatch, "asks for another problem"),
        (Wrong::Backward, Status::Mismatch, "is in another call"),
        (Wrong::Barrier, Status::Mismatch, "is in another call"),
        (Wrong::Communication, Status::Mismatch, "asks for another problem"),
        (Wrong::Scale, Status::Mismatch, "asks for another problem"),
        (Wrong::Mask, Status::Mismatch, "asks for another problem"),
        (Wrong::Order, Status::Mismatch, "calls another list of ranks"),
        (Wrong::TooLong, Status::OutOfMemory, "tokens per rank: got"),
    ];
}

/// A list that is not the parent's own, so that attaching it is local.
const LIST: [u32; 3] = [2, 0, 1];

/// One rank's mistake is an error on every rank, nothing hangs, and the same group computes right afterwards.
#[test]
fn one_wrong_rank_is_everyones_error() {
    let (seqs, inputs) = one(33);
    for (wrong, own, words) in Wrong::ALL {
        for culprit in 0..3 {
            let began = Instant::now();
            let done = ranks(3, PATIENCE, |rank, group| {
                let subset = group.subset(&LIST)?;
                let mut layer = layer(Config { save: true, ..config() });
                layer.set_group(&subset, Ok(comm(CommType::A2a)))?;
                let mut good = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
                good.forward(&mut layer)?;
                let error = if rank == culprit {
                    misbehave(wrong, &group, &mut layer, &mut good)
                } else {
                    good.forward(&mut layer)
                };
                let error = error.expect_err("one rank was wrong");
                layer.set_group(&subset, Ok(comm(CommType::A2a)))?;
                let mut good = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
                good.both(&mut layer)?;
                Ok((good, error))
            });
            assert!(began.elapsed() < PATIENCE / 2, "{wrong:?}: hung");
            let mut batches: Vec<Option<Batch>> = Vec::new();
            for (rank, (batch, error)) in done.into_iter().enumerate() {
                let status = if rank == culprit as usize { own } else { Status::Mismatch };
                assert_eq!(error.status, status, "{wrong:?} on {culprit}, rank {rank}: {error}");
                let named = format!("rank {culprit}");
                assert!(
                    error.text.contains(words) && error.text.contains(&named),
                    "{wrong:?} on {culprit}, rank {rank}: {error}"
                );
                batches.push(Some(batch));
            }
            let batches = LIST.map(|r| batches[r as usize].take().unwrap()).into();
            equal_alone("after the mistake", batches, &inputs, true);
        }
    }
}

fn misbehave(wrong: Wrong, group: &Group, layer: &mut Attention, good: &mut Batch) -> Result<()> {
    let subset = group.subset(&LIST)?;
    let (other_seqs, other_inputs) = one(34);
    let mut args = good.args(Pass::Forward);
    let mut buffer = Fenced::new(64);
    let forward_of = |config: Config, seqs: &[Sequence], inputs: &Inputs| {
        let mut layer = self::layer(config);
        layer.set_group(&subset, Ok(comm(CommType::A2a)))?;
        Batch::new(&layer, seqs, inputs, Layout::Dense).forward(&mut layer)
    };
    let config = layer.config().clone();
    let inputs = one(33).1;
    match wrong {
        Wrong::Shape => {
            args.shapes.iter_mut().find(|(t, _)| *t == Tensor::K).expect("there").1[1] += 1
        }
        Wrong::Unreadable => {
            let refused = Err(Error::argument(format!("q: null (rank {})", group.rank())));
            // SAFETY: there is nothing to read.
            return unsafe { layer.forward(refused).map(|_| ()) };
        }
        Wrong::Workspace => args.workspace = Some((buffer.ptr(), 64)),
        Wrong::Saved => args.saved = Some((buffer.ptr(), 64)),
        Wrong::Lengths => {
            return Batch::new(layer, &other_seqs, &other_inputs, Layout::Dense).forward(layer);
        }
        Wrong::Backward => return good.backward(layer),
        Wrong::Barrier => return subset.barrier(),
        Wrong::Communication => {
            layer.set_group(&subset, Ok(comm(CommType::P2p)))?;
            return Batch::new(layer, &good.seqs, &inputs, Layout::Dense).forward(layer);
        }
        Wrong::Scale => return forward_of(Config { scale: 0.5, ..config }, &good.seqs, &inputs),
        Wrong::Mask => {
            return forward_of(Config { mask: Mask::FULL, ..config }, &good.seqs, &inputs);
        }
        Wrong::TooLong => return forward_of(Config { max_rows: 8, ..config }, &good.seqs, &inputs),
        Wrong::Order => {
            layer.set_group(&group.subset(&[0, 2, 1])?, Ok(comm(CommType::A2a)))?;
            return Batch::new(layer, &good.seqs, &inputs, Layout::Dense).forward(layer);
        }
    }
    // SAFETY: the batch's memory; the sizes are what is wrong.
    unsafe { layer.forward(Ok(args)).map(|_| ()) }
}

/// The configuration is agreed when a layer first gets the parent group; a refused layer has no group, and the next try may succeed.
#[test]
fn configurations_must_agree() {
    let (seqs, inputs) = one(33);
    type Change = fn(&mut Config, &mut Result<Comm>);
    let changes: [(Change, Status); 4] = [
        (|c, _| c.mask = Mask::FULL, Status::Mismatch),
        (|_, x| *x = Ok(comm(CommType::P2p)), Status::Mismatch),
        (|_, x| *x = Ok(Comm { inner: 2, ..comm(CommType::A2aP2p) }), Status::InvalidArgument),
        (|_, x| *x = Err(Error::argument("comm_type: got 9 (rank 1)")), Status::InvalidArgument),
    ];
    for (change, own) in changes {
        let done = ranks(3, PATIENCE, |rank, group| {
            let (mut mine, mut how) = (config(), Ok(comm(CommType::A2aP2p)));
            if rank == 1 {
                change(&mut mine, &mut how);
            }
            let mut refused = layer(mine);
            let error = refused.set_group(&group, how).expect_err("rank 1 differs");
            assert_eq!(refused.group().size(), 1, "a refused group was attached");
            let status = if rank == 1 { own } else { Status::Mismatch };
            assert_eq!(error.status, status, "rank {rank}: {error}");
            assert!(rank == 1 || error.text.contains("rank 1"), "rank {rank}: {error}");
            let mut layer = layer(config());
            layer.set_group(&group, Ok(comm(CommType::A2aP2p)))?;
            let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
            batch.both(&mut layer)?;
            Ok(batch)
        });
        equal_alone("after the refusal", done, &inputs, false);
    }
}

/// Contexts of another layer, of other lengths, and of a group that the layer never had are refused by name, on one rank or on all.
#[test]
fn foreign_contexts_are_refused() {
    let (seqs, inputs) = one(33);
    ranks(2, PATIENCE, |rank, group| {
        let mut first = layer(config());
        let mut second = layer(Config { mask: Mask::FULL, ..config() });
        first.set_group(&group, Ok(comm(CommType::P2p)))?;
        second.set_group(&group, Ok(comm(CommType::P2p)))?;
        let mut a = Batch::new(&first, &seqs, &inputs, Layout::Dense);
        let mut b = Batch::new(&second, &seqs, &inputs, Layout::Dense);
        a.forward(&mut first)?;
        b.forward(&mut second)?;
        let right = a.context;
        for (context, words) in [
            (b.context, "context: belongs to problem"),
            (Context { problem: right.problem ^ 1, ..right }, "context: belongs to problem"),
            (Context { attached: 5, ..right }, "context: made by another layer"),
            (Context::default(), "context: made by another layer"),
        ] {
            for everyone in [false, true] {
                let guilty = everyone || rank == 1;
                a.context = if guilty { context } else { right };
                let error = a.backward(&mut first).expect_err("a foreign context");
                let status = if guilty { Status::InvalidArgument } else { Status::Mismatch };
                assert_eq!(error.status, status, "{error}");
                assert!(error.text.contains(words), "{error}");
            }
        }
        a.context = right;
        a.backward(&mut first)?;
        b.backward(&mut second)
    });
}

/// The caller's workspace and saved buffer: exactly the bound is enough, one byte less than needed and odd addresses are refused by name.
#[test]
fn the_callers_memory() {
    let (seqs, inputs) = one(50);
    for kind in CommType::ALL {
        let done = ranks(4, PATIENCE, |rank, group| {
            let mut layer = layer(Config { save: true, ..config() });
            layer.set_group(&group, Ok(comm(kind)))?;
            let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::HeadsFirst);
            let bound = layer.workspace_bound(13)?;
            let mut own = Fenced::new(bound);
            batch.workspace = Some((own.ptr(), bound));
            batch.both(&mut layer)?;
            assert!(own.intact(), "written beyond the workspace");
            assert_eq!(layer.workspace_held(), 0, "the layer made a workspace of its own");

            let refused = |layer: &mut Attention, args: Args, status, words: &str| {
                // SAFETY: the batch's memory; sizes and addresses are refused before they are used.
                let error = unsafe { layer.forward(Ok(args)) }.expect_err(words);
                let status = if rank == 1 { status } else { Status::Mismatch };
                assert_eq!(error.status, status, "{error}");
                assert!(error.text.contains(words), "{error}");
            };
            let mut wrong = batch.args(Pass::Forward);
            if rank == 1 {
                wrong.workspace = Some((own.ptr(), 0));
            }
            refused(&mut layer, wrong, Status::OutOfMemory, "workspace: got 0 bytes");
            let mut wrong = batch.args(Pass::Forward);
            if rank == 1 {
                wrong.workspace = Some((own.ptr().wrapping_add(ALIGN / 2), bound));
            }
            refused(&mut layer, wrong, Status::InvalidArgument, "workspace: got address");
            if batch.saved_bytes > 0 {
                let mut wrong = batch.args(Pass::Forward);
                if rank == 1 {
                    wrong.saved = Some((batch.saved.ptr(), batch.saved_bytes - 1));
                }
                refused(&mut layer, wrong, Status::OutOfMemory, "saved: got");
                let mut wrong = batch.args(Pass::Forward);
                if rank == 1 {
                    wrong.saved = Some((batch.saved.ptr().wrapping_add(8), batch.saved_bytes));
                }
                refused(&mut layer, wrong, Status::InvalidArgument, "saved: got address");
                let mut wrong = batch.args(Pass::Forward);
                if rank == 1 {
                    wrong.saved = None;
                }
                refused(&mut layer, wrong, Status::OutOfMemory, "saved: got 0 bytes");
            }
            batch.both(&mut layer)?;
            Ok(batch)
        });
        equal_alone("the caller's memory", done, &inputs, true);
    }
}

/// One byte less than a call needs is refused, and that many is enough.
#[test]
fn the_need_is_exact() {
    let (seqs, inputs) = one(50);
    ranks(2, PATIENCE, |_, group| {
        let mut layer = layer(config());
        layer.set_group(&group, Ok(comm(CommType::P2p)))?;
        let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        let problem = layer.problem(seqs.clone(), None)?;
        let need = layer.account(&problem, Pass::Forward).workspace as usize;
        let mut own = Fenced::new(need);
        batch.workspace = Some((own.ptr(), need - 1));
        let error = batch.forward(&mut layer).expect_err("a byte is missing");
        assert_eq!(error.status, Status::OutOfMemory, "{error}");
        assert!(error.text.contains(&format!("needs {need}")), "{error}");
        batch.workspace = Some((own.ptr(), need));
        batch.forward(&mut layer)?;
        assert!(own.intact(), "written beyond the workspace");
        Ok(())
    });
}

/// `workspace_bound(rows)` covers every call whose ranks hold at most `rows` rows.
#[test]
fn workspace_bound_is_a_bound() {
    for ranks in [1u32, 2, 3, 6, 8] {
        for kind in CommType::ALL {
            for stages in [Stages::Named, Stages::Within(40_000), Stages::Within(400_000)] {
                for (rank, transport) in local_group(ranks).into_iter().enumerate() {
                    // Nothing is exchanged here, and attaching a list that is not the parent's own is local.
                    let list: Vec<u32> = (0..ranks).rev().collect();
                    let group = Group::new(transport, PATIENCE).subset(&list).unwrap();
                    for (n, case) in cases().iter().enumerate() {
                        if (n + rank) % 7 > 0 || case.is("long") {
                            continue;
                        }
                        for save in [false, true] {
                            bound_covers(case, &group, Comm { stages, ..comm(kind) }, save);
                        }
                    }
                }
            }
        }
    }
}

fn bound_covers(case: &Case, group: &Group, comm: Comm, save: bool) {
    let p = case.problem(group.size(), comm.kind, None, DType::Bf16).unwrap();
    let config = Config {
        heads: p.heads,
        kv_heads: p.kv_heads,
        dim_qk: p.dim_qk,
        dim_v: p.dim_v,
        mask: p.mask,
        packed: p.packed,
        kv_wire: p.kv_wire,
        save,
        latent: p.latent,
        ..config()
    };
    let mut layer = layer(config);
    layer.set_group(group, Ok(comm)).unwrap();
    let Ok(problem) = layer.problem_within(&p.seqs, Some(&p.partition), &p.regions) else {
        return; // no number of stages stays within the cap
    };
    let rows = |r, side| holding(&problem, r, side).rows;
    let rows = (0..p.ranks).map(|r| rows(r, Side::Query).max(rows(r, Side::Key))).max();
    let Ok(bound) = layer.workspace_bound(rows.unwrap()) else { return };
    for pass in [Pass::Forward, Pass::Backward] {
        for pack in [false, true] {
            let options = context_parallel::plan::Options { pack, saved: save, same_pieces: false };
            let need = group.prepare(&problem, pass, options, Target::Host).workspace;
            assert!(
                need <= bound,
                "case {} P {} rank {} {comm:?} save {save} pack {pack} {pass:?}: needs {need}, the bound is {bound}",
                case.name,
                p.ranks,
                group.rank()
            );
        }
    }
}

/// A rank that never comes is named by those that wait; the group is lost, for it too.
#[test]
fn a_missing_rank_is_named() {
    let (seqs, inputs) = one(33);
    let short = Duration::from_millis(300);
    let errors = ranks(3, short, |rank, group| {
        let mut layer = layer(config());
        layer.set_group(&group, Ok(comm(CommType::P2p)))?;
        let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        batch.both(&mut layer)?;
        if rank == 1 {
            std::thread::sleep(3 * short);
        }
        let began = Instant::now();
        let error = batch.forward(&mut layer).expect_err("rank 1 does not come");
        assert!(began.elapsed() < 10 * short, "waited {:?}", began.elapsed());
        let again = batch.forward(&mut layer).expect_err("the group is lost");
        assert!(again.text.contains("the group is lost"), "{again}");
        assert_eq!(again.status, error.status);
        assert!(group.usable().is_err());
        // Alone the layer still works.
        layer.clear_group();
        Batch::new(&layer, &seqs, &inputs, Layout::Dense).both(&mut layer)?;
        Ok(error)
    });
    for rank in [0, 2] {
        let e = &errors[rank];
        assert_eq!(e.status, Status::Timeout, "rank {rank}: {e}");
        assert!(e.text.contains("rank 1 did not come"), "rank {rank}: {e}");
    }
    assert!(errors[1].status.loses_group(), "{}", errors[1]);
}

/// `abort` from any thread ends every wait of the group.
#[test]
fn abort_unblocks() {
    let (seqs, inputs) = one(33);
    let errors = ranks(3, PATIENCE, |rank, group| {
        let mut layer = layer(config());
        layer.set_group(&group, Ok(comm(CommType::P2p)))?;
        let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
        batch.both(&mut layer)?;
        let other = group.clone();
        let began = Instant::now();
        let error = std::thread::scope(|scope| {
            if rank == 1 {
                // This rank's own call comes after the abort.
                std::thread::sleep(Duration::from_millis(100));
                scope.spawn(move || other.abort()).join().expect("aborts");
            }
            batch.forward(&mut layer).expect_err("aborted")
        });
        assert!(began.elapsed() < PATIENCE / 2, "waited {:?}", began.elapsed());
        Ok(error)
    });
    for (rank, e) in errors.iter().enumerate() {
        assert_eq!(e.status, Status::Aborted, "rank {rank}: {e}");
    }
}

/// Subsets that are not the same list of ranks: an error everywhere, no rank waits for its deadline.
#[test]
fn lists_that_differ_are_noticed() {
    let (seqs, inputs) = one(33);
    let began = Instant::now();
    let errors = ranks(3, PATIENCE, |rank, group| {
        let mut layer = layer(config());
        let list: &[u32] = if rank == 2 { &[0, 1, 2] } else { &[0, 1] };
        let list = if rank == 0 { &[1, 0, 2] } else { list };
        layer
            .set_group(&group.subset(list)?, Ok(comm(CommType::P2p)))
            .and_then(|()| Batch::new(&layer, &seqs, &inputs, Layout::Dense).forward(&mut layer))
            .map_or_else(Ok, |()| panic!("computed with another list than others"))
    });
    assert!(began.elapsed() < PATIENCE / 2, "hung");
    for (rank, e) in errors.iter().enumerate() {
        assert_eq!(e.status, Status::Mismatch, "rank {rank}: {e}");
    }
}

/// A transport that fails as the n-th group of messages starts.
struct Breaks {
    inner: Box<dyn Transport>,
    left: u32,
}

impl Transport for Breaks {
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
        if self.left == 0 {
            let text = format!("rank {}: the cable was pulled", self.rank());
            return Err(Error::new(Status::Transport, text));
        }
        self.left -= 1;
        // SAFETY: the caller's promise.
        unsafe { self.inner.start(sends, recvs) }
    }

    fn test(&mut self) -> Result<bool> {
        self.inner.test()
    }

    fn wait(&mut self) -> Result<bool> {
        self.inner.wait()
    }

    fn waiting_for(&self) -> Option<u32> {
        self.inner.waiting_for()
    }

    fn give_up(&mut self, why: Error) {
        self.inner.give_up(why);
    }

    fn cancel(&mut self) {
        self.inner.cancel();
    }

    fn allgather(&mut self, members: &[u32], mine: &[u8], deadline: Instant) -> Result<Vec<u8>> {
        self.inner.allgather(members, mine, deadline)
    }

    fn aborter(&self) -> Arc<dyn Fn() + Send + Sync> {
        self.inner.aborter()
    }

    fn memory_bytes(&self) -> usize {
        self.inner.memory_bytes()
    }
}

/// A transport that fails in the middle of a pass: every rank learns the cause long before its deadline, and the group is lost.
#[test]
fn a_failure_in_the_middle_reaches_everyone() {
    let (seqs, inputs) = one(33);
    // Forward starts three groups over four ranks, backward another four.
    for left in 0..6 {
        for kind in [CommType::P2p, CommType::A2a] {
            if kind == CommType::A2a && left > 3 {
                continue;
            }
            let began = Instant::now();
            let errors = on_threads(local_group(4), |rank, inner| {
                let left = if rank == 2 { left } else { u32::MAX };
                let group = Group::new(Box::new(Breaks { inner, left }), PATIENCE);
                let mut layer = layer(config());
                let mut body = || {
                    layer.set_group(&group, Ok(comm(kind)))?;
                    let mut batch = Batch::new(&layer, &seqs, &inputs, Layout::Dense);
                    batch.both(&mut layer)?;
                    batch.forward(&mut layer)
                };
                let error = body().expect_err("a rank broke");
                Ok((error, group.usable()))
            })
            .unwrap_or_else(|e| panic!("{e}"));
            assert!(began.elapsed() < PATIENCE / 2, "{kind:?}, {left}: hung");
            for (rank, (e, usable)) in errors.into_iter().enumerate() {
                assert!(
                    e.text.contains("rank 2: the cable was pulled"),
                    "{kind:?}, {left}, rank {rank}: {e}"
                );
                assert_eq!(e.status, Status::Transport, "{kind:?}, {left}, rank {rank}: {e}");
                assert!(usable.is_err(), "{kind:?}, {left}, rank {rank}");
            }
        }
    }
}
