//! Sequence ↔ heads for layers that are not attention: checks a call's tensors, agrees, runs the plan. Mamba's convolution and scan need whole
//! sequences and work on every channel alone, so between two such calls its layer runs as on one rank.

use crate::attention::engine::{Engine, Lease};
use crate::backend::View;
use crate::backend::cpu::{Cpu, Simd};
use crate::backend::cuda::{Cuda, Scores};
use crate::balance::Dealt;
use crate::driver::{self, CUstream};
use crate::dtype::DType;
use crate::error::{Error, Result, Status};
use crate::exec::device::Target;
use crate::exec::{self, Dropout, Memory};
use crate::group::{Call, Group, Header, Prepared};
use crate::holding::holding;
use crate::partition::{Partition, Side};
use crate::plan::account::ALIGN;
use crate::plan::trade::{Trade, Traded};
use crate::plan::{Options, Pass, Tensor};
use crate::problem::Extent;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A tensor and its shape `[batch, seq, heads, dim]`, batch 1 when packed.
pub type Shaped = (View, [i64; 4]);

/// What a caller gives to one call.
pub struct Args {
    /// How tokens are dealt out; of a list the query side counts.
    pub partition: Partition,
    /// Packed (thd) or one sequence per batch entry.
    pub packed: bool,
    /// The sequences, all of them.
    pub extents: Vec<Extent>,
    /// Heads that are dealt out to the ranks; 0 = the most that a tensor has.
    pub heads: u32,
    /// Every tensor: this rank's rows of all heads.
    pub local: Vec<Shaped>,
    /// Every tensor: whole padded sequences of this rank's heads.
    pub whole: Vec<Shaped>,
    /// Caller's workspace, or none to use the group's own.
    pub workspace: Option<(*mut u8, usize)>,
    /// On CUDA the stream that the call is work on.
    pub stream: CUstream,
}

/// What a group keeps for its calls.
struct Tool {
    engine: Engine,
    target: Target,
    dealt: Dealt,
}

impl Tool {
    fn new(group: &Group) -> Result<Tool> {
        let Some(device) = group.device() else {
            // Rows are copied by the calling thread.
            let engine = Engine::on_host(Cpu::new(1, Simd::from_env()?)?);
            return Ok(Tool { engine, target: Target::Host, dealt: Dealt::default() });
        };
        let cuda = Cuda::new(device.clone())?;
        // Row kernels are the same for all shapes.
        let shape = cuda.supports(DType::Bf16, 64, 64, Scores::Plain)?;
        let engine = Engine::on_device(cuda, None)?;
        let target = Target::Device { shape, deterministic: false };
        Ok(Tool { engine, target, dealt: Dealt::default() })
    }
}

/// Local → whole with [`Pass::ToHeads`], whole → local with [`Pass::ToSequence`]. Collective, blocking on the CPU.
///
/// Arguments that could not even be read come as an error: it is posted to the other members, who would wait otherwise.
///
/// # Safety
/// All memory in the arguments is valid for its shapes; what is written overlaps nothing.
pub unsafe fn run(group: &Group, pass: Pass, args: Result<Args>) -> Result<()> {
    let mut spare = group.spare();
    let rank = group.parent_rank();
    let prepare = || {
        let args = args?;
        let tool = match spare.as_mut().and_then(|s| s.downcast_mut::<Tool>()) {
            Some(_) => spare.as_mut(),
            None => Some(spare.insert(Box::new(Tool::new(group)?))),
        };
        let tool = tool.and_then(|t| t.downcast_mut::<Tool>()).expect("just made");
        let trade = trade(group, &args, &tool.dealt)?;
        check(&trade, group, &args)?;
        if let Some(device) = group.device() {
            let _current = device.enter()?;
            // SAFETY: a stream of the device, by the caller's promise.
            if unsafe { driver::is_capturing(args.stream)? } {
                group.capturable()?;
            }
        }
        let options = options(group, &args);
        let prepared = group.prepare_trade(&trade, pass, options, tool.target);
        let lease = workspace(tool, &prepared, &args, rank)?;
        Ok((trade.fingerprint(), prepared, lease, args, tool))
    };
    // A panic here is a bug, but the others must not wait for this rank because of it.
    let ready =
        catch_unwind(AssertUnwindSafe(prepare)).unwrap_or_else(|e| Err(Error::from_panic(e)));
    let call = if pass == Pass::ToHeads { Call::ToHeads } else { Call::ToSequence };
    let header = Header { call, hash: ready.as_ref().map_or(0, |(hash, ..)| *hash) };
    let (_, prepared, lease, args, tool) = group.agree(header, ready)?;
    let of = |tensor, list: &[Shaped]| -> Vec<(Tensor, View)> {
        list.iter().map(|(view, _)| (tensor, *view)).collect()
    };
    let caller = [of(Tensor::Local, &args.local), of(Tensor::Whole, &args.whole)].concat();
    let memory = Memory {
        dropout: Dropout::default(),
        caller: &caller,
        offsets: &prepared.offsets,
        workspace: lease.ptr(),
        saved: std::ptr::null_mut(),
    };
    match &mut tool.engine {
        Engine::Host { cpu, scratch, .. } => group.linked(|link| {
            // SAFETY: shapes and sizes were checked against the plan; validity of the memory is the caller's promise.
            unsafe { exec::run(&prepared.plan, &memory, cpu, link, scratch) }
        }),
        Engine::Device(device) => group.enqueued(|link| {
            // SAFETY: as above; the workspace stays until the stream is through with it.
            unsafe { device.enqueue(&prepared, &memory, link, args.stream, &lease) }
        }),
    }
}

/// Workspace that suffices for a call with these tensors in either direction.
pub fn workspace_bytes(group: &Group, args: &Args) -> Result<usize> {
    let trade = trade(group, args, &Dealt::default())?;
    check(&trade, group, args)?;
    let mut spare = group.spare();
    let target = match spare.as_ref().and_then(|s| s.downcast_ref::<Tool>()) {
        Some(tool) => tool.target,
        None => {
            let tool = Tool::new(group)?;
            let target = tool.target;
            *spare = Some(Box::new(tool));
            target
        }
    };
    let options = options(group, args);
    let bytes = |pass| group.prepare_trade(&trade, pass, options, target).workspace;
    Ok(bytes(Pass::ToHeads).max(bytes(Pass::ToSequence)))
}

/// What the tensors' shapes say is traded.
fn trade(group: &Group, args: &Args, dealt: &Dealt) -> Result<Arc<Trade>> {
    let small = |what: &str, i: usize, n: i64| {
        u32::try_from(n)
            .map_err(|_| Error::argument(format!("local[{i}]: got {n} {what}, at most 2^32 - 1")))
    };
    let tensors = args.local.iter().enumerate().map(|(i, (view, shape))| {
        let (heads, dim) = (small("heads", i, shape[2])?, small("elements", i, shape[3])?);
        Ok(Traded { heads, dim, dtype: view.dtype })
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let extents = args.extents.iter().copied();
    let (partition, packed) = (args.partition.clone(), args.packed);
    let mut trade = Trade::new(group.size(), partition, packed, extents, args.heads, tensors)?;
    dealt.resolve(Arc::make_mut(&mut trade.problem));
    Ok(Arc::new(trade))
}

/// Every tensor against the trade.
fn check(trade: &Trade, group: &Group, args: &Args) -> Result<()> {
    let (p, rank) = (&trade.problem, group.parent_rank());
    let batch = if p.packed { 1 } else { p.seqs.len() as i64 };
    let rows = i64::from(holding(p, group.rank(), Side::Query).rows);
    if rows % batch != 0 {
        return Err(Error::argument(format!(
            "sequences.list_q: {rows} tokens of this rank in a dense batch of {batch}, which must divide them (rank {rank})"
        )));
    }
    for (n, t) in trade.tensors.iter().enumerate() {
        let mine = trade.share(n, group.rank()).len() as i64;
        let (heads, dim) = (i64::from(t.heads), i64::from(t.dim));
        let total = i64::from(trade.rows());
        for (name, (view, shape), want) in [
            ("local", &args.local[n], [batch, rows / batch, heads, dim]),
            ("whole", &args.whole[n], [batch, total / batch, mine, dim]),
        ] {
            if *shape != want {
                return Err(Error::argument(format!(
                    "{name}[{n}]: got shape [batch, seq, heads, dim] = {shape:?}, this rank holds {want:?} (rank {rank})"
                )));
            }
            if view.dtype != t.dtype {
                return Err(Error::argument(format!(
                    "{name}[{n}].dtype: got {}, local[{n}] is {} (rank {rank})",
                    view.dtype.name(),
                    t.dtype.name()
                )));
            }
        }
    }
    Ok(())
}

fn options(group: &Group, args: &Args) -> Options {
    let pack = args.whole.iter().any(|(view, _)| !view.is_dense());
    Options { pack, saved: false, same_pieces: group.same_pieces() }
}

fn workspace(tool: &mut Tool, prepared: &Prepared, args: &Args, rank: u32) -> Result<Lease> {
    match args.workspace {
        Some((_, got)) if got < prepared.workspace => Err(Error::new(
            Status::OutOfMemory,
            format!(
                "workspace: got {got} bytes, this call needs {} (rank {rank})",
                prepared.workspace
            ),
        )),
        Some((ptr, _)) if !(ptr as usize).is_multiple_of(ALIGN) => Err(Error::argument(format!(
            "workspace: got address {ptr:p}, must be a multiple of {ALIGN} (rank {rank})"
        ))),
        Some((ptr, _)) => Ok(Lease::of_caller(ptr)),
        None => tool.engine.workspace(prepared.workspace, args.stream),
    }
}
