//! Layers on CUDA: streams, workspaces, allocators, graphs, groups that switch. Numbers are compared with the same layer run plainly, bit for
//! bit: everything here is deterministic.

use crate::layers::{PATIENCE, config, one};
use crate::oracle::{Case, Format, Inputs, Results, Tensor as Named, cases, inputs};
use crate::ranks::{Layout, Shard, collect, on_threads};
use context_parallel::attention::{Allocator, Args, Attention, Comm, Config, Context};
use context_parallel::backend::View;
use context_parallel::backend::cuda::Cuda;
use context_parallel::driver::{self, CUstream, Device, DeviceBuffer, Stream};
use context_parallel::dtype::Fp8;
use context_parallel::error::{Result, Status};
use context_parallel::group::{Group, OnDevice};
use context_parallel::partition::Partition;
use context_parallel::plan::{Pass, Tensor};
use context_parallel::problem::{CommType, Latent, Problem, Sequence};
use context_parallel::regions::Regions;
use context_parallel::score::{BiasShape, Reach, Score, Seed};
use context_parallel::transport::Transport;
use context_parallel::transport::device::join::{Way, join};
use context_parallel::transport::local::local_group;
use cudarc::driver::sys;
use libc::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const IGNORED: &[Tensor] = &[
    Tensor::DOut,
    Tensor::DQ,
    Tensor::DK,
    Tensor::DV,
    Tensor::DLatent,
    Tensor::DUpK,
    Tensor::DUpV,
];

fn device() -> Arc<Device> {
    Device::get(0).unwrap_or_else(|e| panic!("{e}"))
}

fn layer(config: Config, allocator: Option<Allocator>) -> Attention {
    let config = Config { deterministic: true, ..config };
    Attention::on_device(config, Cuda::new(device()).unwrap(), allocator).unwrap()
}

fn group(host: Box<dyn Transport>, way: Way) -> Result<Group> {
    let (rank, size) = (host.rank(), host.size());
    let host = Arc::new(Mutex::new(host));
    let transport = join(Device::get(0), &host, way, PATIENCE)?;
    let on = OnDevice { device: device(), transport: Some(transport), agree: false };
    Group::on_device(rank, size, Some(host), on, PATIENCE)
}

/// One micro-batch of one rank on the device.
struct Batch {
    problem: Problem,
    seqs: Vec<Sequence>,
    shard: Shard,
    buffers: Vec<DeviceBuffer>,
    saved: DeviceBuffer,
    workspace: Option<DeviceBuffer>,
    stream: Arc<Stream>,
    context: Context,
    seed: Seed,
}

impl Batch {
    fn new(
        layer: &Attention,
        seqs: &[Sequence],
        inputs: &Inputs,
        stream: &Arc<Stream>,
    ) -> Result<Batch> {
        let problem = layer.problem(seqs.to_vec(), None)?;
        let shard = Shard::deal(&problem, layer.group().rank(), inputs, Layout::Dense);
        let device = device();
        let _current = device.enter()?;
        let mut buffers = Vec::new();
        for (_, local) in &shard.0 {
            let bytes = local.bytes.len() * 8;
            let buffer = DeviceBuffer::new(&device, bytes)?;
            // SAFETY: of the same size; done before anything else happens.
            unsafe {
                let from = local.bytes.as_ptr().cast();
                driver::copy_to_device(buffer.address(), from, bytes, stream.raw())?;
                driver::synchronize(stream.raw())?;
            }
            buffers.push(buffer);
        }
        let saved = DeviceBuffer::new(&device, layer.saved_bytes(&problem))?;
        Ok(Batch {
            problem: (*problem).clone(),
            seqs: seqs.to_vec(),
            shard,
            buffers,
            saved,
            workspace: None,
            stream: stream.clone(),
            context: Context::default(),
            seed: Seed::default(),
        })
    }

    fn args(&self, pass: Pass) -> Args {
        let wanted = |t: &Tensor| pass == Pass::Backward || !IGNORED.contains(t);
        let tensors = || self.shard.0.iter().zip(&self.buffers).filter(|((t, _), _)| wanted(t));
        let buffer = |b: &DeviceBuffer| (b.address() as *mut u8, b.bytes());
        Args {
            seed: self.seed,
            ids: Vec::new(),
            seqs: self.seqs.clone(),
            regions: Regions::default(),
            list: None,
            views: tensors()
                .map(|((t, l), b)| (*t, View { ptr: b.address() as *mut u8, ..l.view }))
                .collect(),
            shapes: tensors().map(|((t, l), _)| (*t, l.shape)).collect(),
            workspace: self.workspace.as_ref().map(buffer),
            saved: Some(buffer(&self.saved)).filter(|(_, bytes)| *bytes > 0),
            stream: self.stream.raw(),
        }
    }

    fn forward(&mut self, layer: &mut Attention) -> Result<()> {
        // SAFETY: the buffers live as long as the batch, which outlives the stream's work.
        self.context = unsafe { layer.forward(Ok(self.args(Pass::Forward)))? };
        Ok(())
    }

    fn backward(&mut self, layer: &mut Attention) -> Result<()> {
        // SAFETY: as in `forward`.
        unsafe { layer.backward(Ok(self.context), Ok(self.args(Pass::Backward))) }
    }

    fn both(&mut self, layer: &mut Attention) -> Result<()> {
        self.forward(layer)?;
        self.backward(layer)
    }

    /// Waits, and copies everything back.
    fn read(mut self) -> Result<Shard> {
        self.pull()?;
        Ok(self.shard)
    }

    fn pull(&mut self) -> Result<()> {
        let device = device();
        let _current = device.enter()?;
        for ((_, local), buffer) in self.shard.0.iter_mut().zip(&self.buffers) {
            let bytes = local.bytes.len() * 8;
            // SAFETY: of the same size; done before anyone looks.
            unsafe {
                let to = local.bytes.as_mut_ptr().cast();
                driver::copy_to_host(to, buffer.address(), bytes, self.stream.raw())?;
                driver::synchronize(self.stream.raw())?;
            }
        }
        Ok(())
    }
}

fn stream() -> Arc<Stream> {
    Arc::new(Stream::new(&device(), false).unwrap())
}

/// What one rank computes plainly.
fn plainly(seqs: &[Sequence], inputs: &Inputs) -> Results<f32> {
    let mut layer = layer(config(), None);
    let mut batch = Batch::new(&layer, seqs, inputs, &stream()).unwrap();
    batch.both(&mut layer).unwrap();
    let problem = batch.problem.clone();
    collect(&problem, &[batch.read().unwrap()])
}

fn same(what: &str, a: &Results<f32>, b: &Results<f32>) {
    for t in Named::ALL {
        let bits = |r: &Results<f32>| r.get(t).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(a) == bits(b), "{what}: {t:?} has other bits");
    }
}

/// The layer keeps one workspace; calls on different streams must not meet in it.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn streams_share_the_layers_workspace_in_turns() {
    let (seqs, inputs) = one(150);
    let expected = plainly(&seqs, &inputs);
    let mut layer = layer(config(), None);
    let mut batches: Vec<Batch> =
        (0..4).map(|_| Batch::new(&layer, &seqs, &inputs, &stream()).unwrap()).collect();
    batches.iter_mut().for_each(|b| b.forward(&mut layer).unwrap());
    batches.iter_mut().rev().for_each(|b| b.backward(&mut layer).unwrap());
    for batch in batches {
        let problem = batch.problem.clone();
        same("streams", &collect(&problem, &[batch.read().unwrap()]), &expected);
    }
}

static GIVEN: AtomicUsize = AtomicUsize::new(0);
static TAKEN: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn give(_: *mut c_void, bytes: usize, _: *mut c_void) -> *mut c_void {
    GIVEN.fetch_add(1, Ordering::SeqCst);
    let mut address = 0;
    // SAFETY: writes one address; the device is current.
    let code = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
    if code == sys::CUresult::CUDA_SUCCESS { address as *mut c_void } else { std::ptr::null_mut() }
}

unsafe extern "C" fn take(_: *mut c_void, ptr: *mut c_void, _: usize, stream: *mut c_void) {
    TAKEN.fetch_add(1, Ordering::SeqCst);
    // SAFETY: what `give` gave; work that uses it is done first.
    unsafe {
        sys::cuStreamSynchronize(stream.cast());
        sys::cuMemFree_v2(ptr as u64);
    }
}

unsafe extern "C" fn nothing(_: *mut c_void, _: usize, _: *mut c_void) -> *mut c_void {
    std::ptr::null_mut()
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn a_workspace_comes_from_the_allocator_and_goes_back() {
    let (seqs, inputs) = one(70);
    let expected = plainly(&seqs, &inputs);
    let allocator = Allocator { alloc: give, free: take, ctx: std::ptr::null_mut() };
    let mut with = layer(config(), Some(allocator));
    let mut batch = Batch::new(&with, &seqs, &inputs, &stream()).unwrap();
    batch.both(&mut with).unwrap();
    let problem = batch.problem.clone();
    same("allocator", &collect(&problem, &[batch.read().unwrap()]), &expected);
    assert_eq!((GIVEN.load(Ordering::SeqCst), TAKEN.load(Ordering::SeqCst)), (2, 2));
    assert_eq!(with.workspace_held(), 0, "the layer kept a workspace of its own");

    let mut without = layer(config(), Some(Allocator { alloc: nothing, ..allocator }));
    let e = Batch::new(&without, &seqs, &inputs, &stream()).unwrap().forward(&mut without);
    let e = e.unwrap_err();
    assert_eq!(e.status, Status::OutOfMemory, "{e}");
    assert!(e.text.contains("the allocator gave nothing"), "{e}");
}

/// Captures what `f` enqueues on the stream.
fn capture(stream: CUstream, f: impl FnOnce() -> Result<()>) -> Result<sys::CUgraphExec> {
    let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: an own stream; the graph is the one that was captured.
    unsafe {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        driver::check("begin", sys::cuStreamBeginCapture_v2(stream, mode))?;
        let result = f();
        let ended = driver::check("end", sys::cuStreamEndCapture(stream, &mut graph));
        result?;
        ended?;
        driver::check("instantiate", sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0))?;
        driver::check("destroy", sys::cuGraphDestroy(graph))?;
    }
    Ok(exec)
}

#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn a_graph_replays_a_training_step() {
    let (seqs, inputs) = one(150);
    let expected = plainly(&seqs, &inputs);
    let device = device();
    let _current = device.enter().unwrap();
    let mut layer = layer(config(), None);
    let stream = stream();
    let mut batch = Batch::new(&layer, &seqs, &inputs, &stream).unwrap();
    let e = capture(stream.raw(), || batch.forward(&mut layer)).unwrap_err();
    assert_eq!(e.status, Status::NotCapturable, "{e}");
    assert!(e.text.contains("workspace"), "{e}");

    let rows = seqs[0].q.padded;
    batch.workspace =
        Some(DeviceBuffer::new(&device, layer.workspace_bound(rows).unwrap()).unwrap());
    let graph = capture(stream.raw(), || batch.both(&mut layer)).unwrap();
    // Calls outside of the graph in between must not disturb what it reads.
    let mut other = Batch::new(&layer, &seqs, &inputs, &stream).unwrap();
    for _ in 0..3 {
        other.both(&mut layer).unwrap();
        for (_, buffer) in batch
            .shard
            .0
            .iter()
            .zip(&batch.buffers)
            .skip(3)
            .filter(|((t, _), _)| *t != Tensor::DOut)
        {
            // SAFETY: an own buffer and stream.
            unsafe { driver::clear(buffer.address(), buffer.bytes(), stream.raw()).unwrap() };
        }
        // SAFETY: an own graph and stream.
        let code = unsafe { sys::cuGraphLaunch(graph, stream.raw()) };
        driver::check("launch", code).unwrap();
    }
    let problem = batch.problem.clone();
    same("replayed", &collect(&problem, &[batch.read().unwrap()]), &expected);
    same("beside", &collect(&problem, &[other.read().unwrap()]), &expected);
    // SAFETY: an own graph, not running any more.
    driver::check("destroy", unsafe { sys::cuGraphExecDestroy(graph) }).unwrap();
}

/// The seed is read when the graph runs, so each replay has the mask of the seed that it finds.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn a_graph_draws_another_mask() {
    let score = Score { dropout: 0.4, softcap: 5.0, ..Score::default() };
    let config = Config { score, ..config() };
    let (seqs, inputs) = one(90);
    let device = device();
    let _current = device.enter().unwrap();
    let stream = stream();
    let seeds = [5u64, 0xfedc_ba98_7654_3210];
    let expected = seeds.map(|seed| {
        let mut layer = layer(config.clone(), None);
        let mut batch = Batch::new(&layer, &seqs, &inputs, &stream).unwrap();
        batch.seed = Seed::Value(seed);
        batch.both(&mut layer).unwrap();
        let problem = batch.problem.clone();
        collect(&problem, &[batch.read().unwrap()])
    });
    assert!(expected[0].o != expected[1].o, "other seeds, other masks");

    let mut layer = layer(config, None);
    let mut batch = Batch::new(&layer, &seqs, &inputs, &stream).unwrap();
    let bound = layer.workspace_bound(90).unwrap();
    batch.workspace = Some(DeviceBuffer::new(&device, bound).unwrap());
    let place = DeviceBuffer::new(&device, 8).unwrap();
    batch.seed = Seed::At(place.address());
    let graph = capture(stream.raw(), || batch.both(&mut layer)).unwrap();
    for (seed, expected) in seeds.iter().zip(&expected) {
        // SAFETY: own buffers, graph and stream; the seed outlives the copy, which `pull` waits for.
        unsafe {
            let from = std::ptr::from_ref(seed).cast();
            driver::copy_to_device(place.address(), from, 8, stream.raw()).unwrap();
            driver::check("launch", sys::cuGraphLaunch(graph, stream.raw())).unwrap();
        }
        batch.pull().unwrap();
        let got = collect(&batch.problem, std::slice::from_ref(&batch.shard));
        same(&format!("seed {seed}"), &got, expected);
    }
    // SAFETY: an own graph, not running any more.
    driver::check("destroy", unsafe { sys::cuGraphExecDestroy(graph) }).unwrap();
}

/// One for all heads and batch entries, with a gradient.
const SHARED_BIAS: BiasShape =
    BiasShape { batch: false, heads: false, queries: true, gradient: true };

/// Each key has 8 elements of its head, made of 24, and 8 that all heads share.
const LATENT: Latent = Latent { dim: 24, rope: 8 };

/// A case for a layer that is [`config`] but for bias, latents and packing.
fn case_of(config: &Config, seqs: &[Sequence]) -> Case {
    let base = cases().iter().find(|c| c.name == "causal_33").expect("in the corpus");
    Case {
        seqs: seqs.to_vec(),
        format: if config.packed { Format::Thd } else { base.format },
        kv_heads: config.kv_heads as usize,
        bias: config.score.bias,
        latent: config.latent,
        ..base.clone()
    }
}

/// A training step in a graph: every replay has the bits of the step outside of it, which are returned.
fn replays(config: Config) -> Results<f32> {
    let seqs = vec![Sequence::square(91); 2];
    let inputs = inputs(&case_of(&config, &seqs), config.dtype);
    let device = device();
    let _current = device.enter().unwrap();
    let stream = stream();
    let mut layer = layer(config, None);
    let mut plain = Batch::new(&layer, &seqs, &inputs, &stream).unwrap();
    plain.both(&mut layer).unwrap();
    let mut batch = Batch::new(&layer, &seqs, &inputs, &stream).unwrap();
    let bound = layer.workspace_bound(2 * 91).unwrap();
    batch.workspace = Some(DeviceBuffer::new(&device, bound).unwrap());
    let graph = capture(stream.raw(), || batch.both(&mut layer)).unwrap();
    let problem = batch.problem.clone();
    let expected = collect(&problem, &[plain.read().unwrap()]);
    for _ in 0..2 {
        // SAFETY: an own graph and stream.
        let code = unsafe { sys::cuGraphLaunch(graph, stream.raw()) };
        driver::check("launch", code).unwrap();
        batch.pull().unwrap();
        let got = collect(&problem, std::slice::from_ref(&batch.shard));
        same("replayed", &got, &expected);
        for (name, got, expected) in [
            ("d_bias", &got.d_bias, &expected.d_bias),
            ("d_latent", &got.d_latent, &expected.d_latent),
            ("d_up_k", &got.d_up_k, &expected.d_up_k),
            ("d_up_v", &got.d_up_v, &expected.d_up_v),
        ] {
            let bits = |of: &[f32]| of.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(got) == bits(expected), "{name} has other bits");
        }
    }
    // SAFETY: an own graph, not running any more.
    driver::check("destroy", unsafe { sys::cuGraphExecDestroy(graph) }).unwrap();
    expected
}

/// Rows of an odd number of columns, at multiples of an element; heads of several blocks add to one gradient, in one order.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn a_graph_replays_the_gradient_of_a_bias() {
    let score = Score { bias: Some(SHARED_BIAS), softcap: 4.0, ..Score::default() };
    let found = replays(Config { score, ..config() });
    assert_eq!(found.d_bias.len(), 91 * 91);
}

/// Gradients of latents and of their weights are sums over many blocks, begun anew in every replay.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn a_graph_replays_the_gradients_of_latents() {
    let found = replays(latents(&config()));
    assert_eq!(found.d_latent.len(), 2 * 91 * (24 + 8));
    assert!(found.d_up_k.iter().all(|x| x.is_finite() && *x != 0.0));
}

fn latents(config: &Config) -> Config {
    Config { kv_heads: config.heads, latent: Some(LATENT), ..config.clone() }
}

/// Hosts meet in `local` and `staged`; a graph would replay without them.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn what_cannot_be_captured_is_refused_by_name() {
    let (seqs, inputs) = one(40);
    for (way, name) in [(Way::Local, "cuda local"), (Way::Staged, "staged over local")] {
        on_threads(local_group(2), |_, t| {
            let run = || -> Result<()> {
                let group = group(t, way)?;
                let device = device();
                let _current = device.enter()?;
                let mut layer = layer(config(), None);
                layer.set_group(&group, Ok(Comm::of(CommType::P2p)))?;
                let stream = stream();
                let mut batch = Batch::new(&layer, &seqs, &inputs, &stream)?;
                let bound = layer.workspace_bound(40)?;
                batch.workspace = Some(DeviceBuffer::new(&device, bound)?);
                let e = capture(stream.raw(), || batch.forward(&mut layer)).unwrap_err();
                assert_eq!(e.status, Status::NotCapturable, "{e}");
                assert!(e.text.contains(name), "{e}");
                Ok(())
            };
            run().map_err(|e| e.to_string())
        })
        .unwrap_or_else(|e| panic!("{way:?}: {e}"));
    }
}

/// Forward on four ranks, a switch to three of them in another order, forward; then both backwards. Twice, over every way.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn groups_switch_between_forward_and_backward() {
    let ((seqs_a, a), (seqs_b, b)) = (one(64), one(50));
    let few = [3, 1, 0];
    for way in [Way::Local, Way::Nccl, Way::Staged] {
        let done = on_threads(local_group(4), |rank, t| {
            let run = || -> Result<(Shard, Option<Shard>)> {
                let group = group(t, way)?;
                group.warm_up()?;
                let mut layer = layer(Config { save: true, ..config() }, None);
                let stream = stream();
                layer.set_group(&group, Ok(Comm::of(CommType::A2a)))?;
                let mut x = Batch::new(&layer, &seqs_a, &a, &stream)?;
                x.forward(&mut layer)?;
                let mut y = None;
                if few.contains(&rank) {
                    layer.set_group(&group.subset(&few)?, Ok(Comm::of(CommType::P2p)))?;
                    let mut batch = Batch::new(&layer, &seqs_b, &b, &stream)?;
                    batch.forward(&mut layer)?;
                    y = Some(batch);
                }
                x.backward(&mut layer)?;
                y.as_mut().map_or(Ok(()), |y| y.backward(&mut layer))?;
                Ok((x.read()?, y.map(Batch::read).transpose()?))
            };
            run().map_err(|e| e.to_string())
        })
        .unwrap_or_else(|e| panic!("{way:?}: {e}"));
        let (x, mut y): (Vec<Shard>, Vec<Option<Shard>>) = done.into_iter().unzip();
        let members = few.map(|r| y[r as usize].take().expect("a member's results"));
        near(&format!("{way:?} four"), 4, &seqs_a, &a, &x);
        near(&format!("{way:?} three"), 3, &seqs_b, &b, &members);
    }
}

/// As good as one rank: no element is further off than rounding explains.
fn near(what: &str, ranks: u32, seqs: &[Sequence], inputs: &Inputs, shards: &[Shard]) {
    let comm = Comm::of(CommType::P2p);
    let problem = config().problem(comm, ranks, seqs.to_vec(), &config().partition).unwrap();
    let (got, one) = (collect(&problem, shards), plainly(seqs, inputs));
    for t in Named::ALL {
        let norm = |f: &dyn Fn(f32, f32) -> f32| -> f64 {
            let pairs = got.get(t).iter().zip(one.get(t));
            pairs.map(|(x, y)| f64::from(f(*x, *y)).powi(2)).sum::<f64>().sqrt()
        };
        let (off, size) = (norm(&|x, y| x - y), norm(&|_, y| y));
        assert!(off <= 0.02 * size, "{what}: {t:?} differs by {off:.2e} of {size:.2e}");
    }
}

/// A garbage collector may destroy a layer while a stream captures; that must not end the capture.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn a_layer_may_go_while_a_stream_captures() {
    let (seqs, inputs) = one(40);
    let device = device();
    let _current = device.enter().unwrap();
    let mut kept = layer(config(), None);
    let mut dropped = layer(config(), None);
    let mut early = Batch::new(&dropped, &seqs, &inputs, &stream()).unwrap();
    early.both(&mut dropped).unwrap();
    let stream = stream();
    let mut batch = Batch::new(&kept, &seqs, &inputs, &stream).unwrap();
    let bound = kept.workspace_bound(40).unwrap();
    batch.workspace = Some(DeviceBuffer::new(&device, bound).unwrap());
    let graph = capture(stream.raw(), || {
        batch.forward(&mut kept)?;
        drop(dropped);
        batch.backward(&mut kept)
    });
    // SAFETY: an own graph.
    driver::check("destroy", unsafe { sys::cuGraphExecDestroy(graph.unwrap()) }).unwrap();
    early.read().unwrap();
}

/// Over NCCL messages are packed where they are scattered; the bound counts that. Striped batches and many documents scatter most.
#[test]
#[ignore = "needs a CUDA device or the software GPU: tests/run"]
fn the_bound_suffices_over_nccl() {
    // Few pieces, so that room for longer work lists does not hide what is missing.
    let striped = Config { partition: Partition::Striped, max_segments: 8, ..config() };
    let documents = Config { packed: true, max_segments: 128, ..config() };
    let slopes = vec![0.1; config().heads as usize].into();
    let score = Score { slopes, dropout: 0.1, max_logit: Some(Reach::Group), ..Score::default() };
    let scored = |config: &Config| Config { score: score.clone(), ..config.clone() };
    let biased = |config: &Config| {
        let score = Score { bias: Some(SHARED_BIAS), ..Score::default() };
        Config { score, ..config.clone() }
    };
    let coded = |config: &Config| Config { kv_wire: Some(Fp8::E4m3), ..config.clone() };
    let two = vec![Sequence::square(960); 2];
    let many: Vec<Sequence> = (0..24).map(|i| Sequence::square(40 + i % 7 * 6)).collect();
    for (config, seqs, ranks, kind) in [
        (striped.clone(), &two, 4, CommType::P2p),
        (striped.clone(), &two, 3, CommType::A2a),
        (scored(&striped), &two, 4, CommType::P2p),
        (scored(&documents), &many, 4, CommType::A2aP2p),
        (biased(&documents), &many, 4, CommType::P2p),
        (biased(&documents), &many, 3, CommType::A2a),
        (latents(&striped), &two, 4, CommType::P2p),
        (latents(&documents), &many, 4, CommType::A2aP2p),
        (latents(&documents), &many, 3, CommType::A2a),
        (coded(&striped), &two, 4, CommType::P2p),
        (coded(&documents), &many, 4, CommType::A2aP2p),
        (striped, &two, 4, CommType::A2aP2p),
        (documents.clone(), &many, 4, CommType::AllGather),
        (documents.clone(), &many, 2, CommType::A2a),
        (documents, &many, 4, CommType::A2aP2p),
    ] {
        let inputs = inputs(&case_of(&config, seqs), config.dtype);
        on_threads(local_group(ranks), |_, t| {
            let run = || -> Result<()> {
                let group = group(t, Way::Nccl)?;
                let mut layer = layer(config.clone(), None);
                layer.set_group(&group, Ok(Comm::of(kind)))?;
                let mut batch = Batch::new(&layer, seqs, &inputs, &stream())?;
                let rows = batch.shard.0.iter().map(|(_, l)| l.view.rows as u32).max().unwrap();
                let bound = layer.workspace_bound(rows)?;
                batch.workspace = Some(DeviceBuffer::new(&device(), bound)?);
                batch.both(&mut layer)?;
                batch.read().map(|_| ())
            };
            run().map_err(|e| e.to_string())
        })
        .unwrap_or_else(|e| panic!("{kind:?} on {ranks} ranks, packed {}: {e}", config.packed));
    }
}
