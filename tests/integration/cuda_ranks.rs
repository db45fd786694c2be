//! N ranks as threads on CUDA: what `ranks` does on the CPU, with the tensors on a device. Forward and backward are enqueued without the
//! host waiting in between; the device starts with poison everywhere.

use crate::oracle::{Inputs, Results, SEED, number};
use crate::ranks::{How, Shard, collect, on_threads};
use context_parallel::backend::View;
use context_parallel::backend::cuda::{Cuda, Scores, Staging};
use context_parallel::driver::{self, CUdeviceptr, CUstream, Device, DeviceBuffer, Stream};
use context_parallel::error::Result;
use context_parallel::exec::device::{self, DeviceLink, Scratch, Tables, Target};
use context_parallel::exec::{Dropout, Memory};
use context_parallel::plan::account::{ALIGN, account, layout, saved_bytes, workspace_bytes};
use context_parallel::plan::{Options, Pass, Plan, Tensor};
use context_parallel::problem::Problem;
use context_parallel::score::Seed;
use context_parallel::transport::Transport;
use context_parallel::transport::device::join::{Way, join};
use context_parallel::transport::local::local_group;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long ranks wait for each other; short where a planted fault leaves them waiting (tests/softgpu/api_faults).
fn timeout() -> Duration {
    let asked = std::env::var("CP_TEST_TIMEOUT_MS").ok().and_then(|ms| ms.parse().ok());
    Duration::from_millis(asked.unwrap_or(120_000))
}

/// How ranks run on CUDA.
#[derive(Clone, Copy, Debug)]
pub struct OnCuda {
    pub way: Way,
    pub deterministic: bool,
    /// Multiprocessors left to others.
    pub margin: u32,
}

/// Device memory with a fence behind it, poisoned.
struct Fenced {
    buffer: DeviceBuffer,
    len: usize,
}

impl Fenced {
    fn new(device: &Arc<Device>, len: usize, stream: CUstream) -> Result<Fenced> {
        let buffer = DeviceBuffer::new(device, len + ALIGN)?;
        let poison = vec![u8::MAX; len + ALIGN];
        // SAFETY: of the buffer's size; the stream is empty before the poison is freed.
        unsafe {
            driver::copy_to_device(buffer.address(), poison.as_ptr(), poison.len(), stream)?;
            driver::synchronize(stream)?;
        }
        Ok(Fenced { buffer, len })
    }

    fn ptr(&self) -> *mut u8 {
        self.buffer.address() as *mut u8
    }

    fn intact(&self, stream: CUstream) -> Result<bool> {
        let mut fence = [0; ALIGN];
        let at = self.buffer.address() + self.len as CUdeviceptr;
        // SAFETY: inside the buffer; the copy is done before the fence is looked at.
        unsafe {
            driver::copy_to_host(fence.as_mut_ptr(), at, ALIGN, stream)?;
            driver::synchronize(stream)?;
        }
        Ok(fence.iter().all(|b| *b == u8::MAX))
    }
}

/// One rank's forward and backward.
fn rank(
    problem: &Arc<Problem>,
    rank: u32,
    how: How,
    on: OnCuda,
    global: &Inputs,
    host: Box<dyn Transport>,
) -> std::result::Result<Shard, String> {
    let text = |e: context_parallel::error::Error| e.to_string();
    let mut shard = Shard::deal(problem, rank, global, how.layout);
    let device = Device::get(0).map_err(text)?;
    let host = Arc::new(Mutex::new(host));
    let mut transport = match problem.ranks {
        1 => None,
        _ => Some(join(Ok(device.clone()), &host, on.way, timeout()).map_err(text)?),
    };
    let _current = device.enter().map_err(text)?;
    let mut run = || -> Result<()> {
        let mut cuda = Cuda::new(device.clone())?;
        cuda.set_margin(on.margin);
        let (stream, comm) = (Stream::new(&device, false)?, Stream::new(&device, true)?);
        let buffers = upload(&device, &shard, stream.raw())?;
        let views: Vec<(Tensor, View)> = shard
            .0
            .iter()
            .zip(&buffers)
            .map(|((t, l), b)| (*t, View { ptr: b.address() as *mut u8, ..l.view }))
            .collect();
        let dense = |t| shard.get(t).view.is_dense();
        let cargo: &[Tensor] = match problem.latent {
            Some(_) => &[Tensor::Latent],
            None => &[Tensor::K, Tensor::V],
        };
        let pack = how.pack || !cargo.iter().all(|t| dense(*t));
        let same_pieces = transport.as_ref().is_some_and(|t| t.same_pieces());
        let options = Options { pack, saved: how.saved, same_pieces };
        let shape = cuda.supports(
            problem.dtype,
            problem.dim_qk,
            problem.dim_v,
            Scores::of(&problem.score),
        )?;
        let target = Target::Device { shape, deterministic: on.deterministic };
        let members: Vec<u32> = (0..problem.ranks).collect();
        let mut scratch = Scratch::new(Staging::new(device.clone()));
        let mut saved = None;
        let mut fences = Vec::new();
        for (call, pass) in [Pass::Forward, Pass::Backward].into_iter().enumerate() {
            let plan = Plan::new(problem, rank, pass, options);
            let layout = layout(&plan);
            let offsets: Vec<usize> =
                plan.slots.iter().map(|s| layout.get(&s.slot).copied().unwrap_or(0)).collect();
            let tables = Tables::new(&plan, target, workspace_bytes(&plan)).expect("on a device");
            let workspace = Fenced::new(&device, tables.workspace(), stream.raw())?;
            if saved.is_none() {
                saved = Some(Fenced::new(&device, saved_bytes(&plan), stream.raw())?);
            }
            let ids: Vec<u32> = (0..problem.seqs.len()).map(number).collect();
            let memory = Memory {
                dropout: Dropout { seed: Seed::Value(SEED), ids: &ids },
                caller: &views,
                offsets: &offsets,
                workspace: workspace.ptr(),
                saved: saved.as_ref().expect("made above").ptr(),
            };
            let link = transport.as_mut().map(|t| DeviceLink {
                transport: &mut **t,
                members: &members,
                stream: comm.raw(),
                call: call as u64,
            });
            // SAFETY: the buffers live until the stream is empty, and have the plan's sizes.
            let stats = unsafe {
                let run = &mut scratch;
                device::enqueue(&plan, &tables, &memory, &cuda, stream.raw(), link, run)?
            };
            let want = account(&plan);
            assert_eq!((stats.sent, stats.received), (want.sent, want.received), "{pass:?}: bytes");
            fences.push(workspace);
        }
        fences.extend(saved);
        use Tensor::{DOut, K, Latent, Q, Sinks, UpK, UpV, V};
        let inputs = [Q, K, V, DOut, Sinks, Latent, UpK, UpV];
        let before = shard.bits(&inputs);
        for ((_, local), buffer) in shard.0.iter_mut().zip(&buffers) {
            let bytes = local.bytes.len() * 8;
            // SAFETY: of the same size; the stream is empty before anyone looks.
            unsafe {
                let to = local.bytes.as_mut_ptr().cast();
                driver::copy_to_host(to, buffer.address(), bytes, stream.raw())?;
            }
        }
        // SAFETY: an own stream.
        unsafe { driver::synchronize(stream.raw())? };
        for fence in &fences {
            assert!(
                fence.intact(stream.raw())?,
                "written beyond the workspace or the saved buffer"
            );
        }
        assert!(before == shard.bits(&inputs), "an input was written to");
        if let Some((t, _)) = shard.0.iter().find(|(_, l)| !l.gaps_untouched()) {
            panic!("written between the rows of {t:?}");
        }
        Ok(())
    };
    run().map_err(text)?;
    Ok(shard)
}

/// The rank's tensors on the device.
fn upload(device: &Arc<Device>, shard: &Shard, stream: CUstream) -> Result<Vec<DeviceBuffer>> {
    let buffers = shard.0.iter().map(|(_, local)| {
        let bytes = local.bytes.len() * 8;
        let buffer = DeviceBuffer::new(device, bytes)?;
        // SAFETY: of the same size; pageable memory is read before the call returns or the stream is empty.
        unsafe {
            driver::copy_to_device(buffer.address(), local.bytes.as_ptr().cast(), bytes, stream)?;
            driver::synchronize(stream)?;
        }
        Ok(buffer)
    });
    buffers.collect()
}

/// Forward and backward on all ranks; what they wrote, or what went wrong.
pub fn run(
    problem: &Problem,
    how: How,
    on: OnCuda,
    global: &Inputs,
) -> std::result::Result<Results<f32>, String> {
    problem.validate().map_err(|e| e.to_string())?;
    let problem = Arc::new(problem.clone());
    let shards =
        on_threads(local_group(problem.ranks), |r, t| rank(&problem, r, how, on, global, t))?;
    Ok(collect(&problem, &shards))
}
