//! Layers.

use super::abi::*;
use super::decode::{self, Place};
use super::group::cp_group;
use super::guard::{
    Opaque, create, destroy, enter, extensible, guard, known_flags, object, output, report, zero,
};
use super::slices::mask_slices;
use crate::attention::{Args, Attention, Context};
use crate::backend::View;
use crate::backend::cpu::{Cpu, Simd};
use crate::backend::cuda::Cuda;
use crate::driver::{CUstream, Device};
use crate::dtype::DType;
use crate::error::{Error, Result, Status};
use crate::partition::Partition;
use crate::plan::{Pass, Tensor, json};
use crate::problem::Problem;
use crate::score::{BiasShape, Seed};
use libc::{c_char, c_void};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

/// An attention layer. Use it from any thread, one call at a time.
pub struct cp_attention {
    _opaque: [u8; 0],
}

impl Opaque for cp_attention {
    type Object = Mutex<Attention>;
    const MAGIC: u64 = u64::from_le_bytes(*b"cp_atten");
    const NAME: &'static str = "attention";
}

/// # Safety
/// As [`object`].
unsafe fn layer<'a>(attention: *const cp_attention) -> Result<MutexGuard<'a, Attention>> {
    // SAFETY: the caller's promise.
    enter("attention", unsafe { object(attention)? })
}

/// Makes a layer, without a group: it computes alone until cp_set_group. Local. On CUDA it may block while kernels are loaded. During a capture:
/// not allowed.
///
/// On the CPU the instruction set is the best that the CPU has, or CP_SIMD from the environment (scalar, avx2, avx512, avx512_bf16).
///
/// # Safety
/// `config` points to `struct_size` bytes; `attention` has room for a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_create(
    config: *const cp_attention_config,
    attention: *mut *mut cp_attention,
) -> cp_status {
    guard(|| {
        let out = output("attention", attention)?;
        // SAFETY: the caller's promise.
        let asked = unsafe { decode::attention_config(config)? };
        let made = match asked.place {
            Place::Cpu => {
                let cpu = Cpu::new(thread_count(asked.threads)?, Simd::from_env()?)?;
                Attention::new(asked.config, cpu)?
            }
            Place::Cuda(ordinal) => {
                let mut cuda = Cuda::new(Device::get(ordinal)?)?;
                cuda.set_margin(asked.sm_margin);
                Attention::on_device(asked.config, cuda, asked.allocator)?
            }
        };
        out.write(create(Mutex::new(made)));
        Ok(())
    })
}

fn thread_count(asked: u32) -> Result<usize> {
    let from_env = || match std::env::var("CP_THREADS") {
        Ok(text) => match text.parse() {
            Ok(n @ 1..=1024) => Ok(n),
            _ => Err(Error::argument(format!("CP_THREADS: got {text:?}, allowed 1 … 1024"))),
        },
        Err(_) => Ok(1),
    };
    match asked {
        0 => from_env(),
        n @ 1..=1024 => Ok(n as usize),
        n => Err(Error::argument(format!("config.threads: got {n}, allowed 0 … 1024"))),
    }
}

/// Would cp_attention_create and cp_set_group accept this on a group of `ranks`? CP_OK, or the same status as they would give, with the
/// reason in words in cp_last_error. Local. On CUDA it asks the device, and may block while kernels are loaded. During a capture: not allowed.
///
/// # Safety
/// `config` points to `struct_size` bytes; `comm` is NULL (p2p) or likewise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_query_support(
    config: *const cp_attention_config,
    comm: *const cp_comm_config,
    ranks: u32,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let asked = unsafe { decode::attention_config(config)? };
        let config = asked.config;
        match asked.place {
            Place::Cpu => thread_count(asked.threads).map(|_| ())?,
            Place::Cuda(ordinal) => config.runs_on(&Cuda::new(Device::get(ordinal)?)?)?,
        }
        if ranks == 0 {
            return Err(Error::argument("ranks: got 0, need at least 1"));
        }
        // SAFETY: the caller's promise.
        let comm = unsafe { decode::comm_config(comm, ranks)? };
        config.supports(comm, ranks)
    })
}

/// Attaches a group to a layer, or with NULL turns context parallelism off for it. `comm` NULL is p2p.
///
/// Collective over a parent group (one that cp_group_init made) the first time the layer gets it, and then blocking: the configuration is agreed,
/// CP_ERR_MISMATCH on all ranks if one differs. (Not where NCCL is all that connects the ranks.) Local for every later switch, and for subsets.
/// A group computes on the layer's device. During a capture: allowed, captures nothing.
///
/// # Safety
/// `attention` is a handle, `group` NULL or a handle, `comm` NULL or points to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_set_group(
    attention: *mut cp_attention,
    group: *const cp_group,
    comm: *const cp_comm_config,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let mut layer = unsafe { layer(attention)? };
        if group.is_null() {
            // SAFETY: the caller's promise; a configuration that comes along must still make sense.
            unsafe { decode::comm_config(comm, 1)? };
            layer.clear_group();
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let group = unsafe { object(group)? };
        // SAFETY: the caller's promise.
        let comm = unsafe { decode::comm_config(comm, group.size()) };
        layer.set_group(group, comm)
    })
}

/// Workspace that suffices for every call in which no rank holds more than `tokens_per_rank` rows of Q or of K, padding included, on the
/// current group, on CUDA with at most `max_segments` pieces. Local. A call whose sequences need less accepts less. During a capture: allowed.
///
/// # Safety
/// `attention` is a handle; `bytes` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_workspace_size(
    attention: *const cp_attention,
    tokens_per_rank: u32,
    bytes: *mut usize,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let layer = unsafe { layer(attention)? };
        let out = output("bytes", bytes)?;
        out.write(layer.workspace_bound(tokens_per_rank)?);
        Ok(())
    })
}

/// Bytes that forward leaves for backward with these sequences on the current group: 0 without CP_ATTENTION_SAVE or without a head exchange. Local.
/// During a capture: allowed.
///
/// # Safety
/// `attention` is a handle; `sequences` as its docs say; `bytes` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_saved_size(
    attention: *const cp_attention,
    sequences: *const cp_sequences,
    bytes: *mut usize,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let layer = unsafe { layer(attention)? };
        // SAFETY: the caller's promise.
        let problem = unsafe { problem(&layer, sequences)? };
        output("bytes", bytes)?.write(layer.saved_bytes(&problem));
        Ok(())
    })
}

/// What calls with these sequences need and move on this rank. Local. During a capture: allowed.
///
/// # Safety
/// `attention` is a handle; `sequences` as its docs say; `out` points to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_report(
    attention: *const cp_attention,
    sequences: *const cp_sequences,
    out: *mut cp_report,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let mut layer = unsafe { layer(attention)? };
        // SAFETY: the caller's promise.
        let problem = unsafe { problem(&layer, sequences)? };
        let (f, b) =
            (layer.account(&problem, Pass::Forward), layer.account(&problem, Pass::Backward));
        let filled = cp_report {
            forward_workspace: f.workspace,
            backward_workspace: b.workspace,
            saved: f.saved,
            transport: layer.group().transport_bytes() as u64,
            kernels: layer.kernel_bytes() as u64,
            forward_sent: f.sent,
            forward_received: f.received,
            backward_sent: b.sent,
            backward_received: b.received,
            forward_flops: f.flops.saturating_add(f.latent_flops),
            backward_flops: b.flops.saturating_add(b.latent_flops),
            stages: problem.stages,
            inner: problem.inner,
            ..cp_report::default()
        };
        // SAFETY: the caller's promise.
        unsafe { report("report", out, filled) }
    })
}

/// Exact attention of this rank's queries over all keys of the group that the mask lets them see.
///
/// O = softmax(scale·Q·Kᵀ)·V; LSE = log Σ exp(scale·q·k), natural log, fp32. A row that sees no key, and padding: O = 0, LSE = -inf.
/// Collective over the layer's group, in the same order on all ranks; blocking on the CPU, where `stream` must be NULL.
/// If one rank's arguments are wrong, that rank gets its error and all others CP_ERR_MISMATCH naming it; nothing has moved.
///
/// On CUDA `stream` is a CUstream of the layer's device (NULL: the legacy default stream), and the call is work on it: it begins after what the
/// stream has, and later work sees its results. Over NCCL, or without peers, the host returns at once; with CP_TRANSPORT_LOCAL it waits for the
/// peers' hosts, with CP_TRANSPORT_STAGED for devices as well. The arrays of `sequences` are read before it returns, everything else when the stream
/// comes to it. Over NCCL the ranks compare nothing: if one rank's arguments are wrong the others wait for it until the deadline and lose the group
/// (CP_GROUP_AGREE finds such a rank). What goes wrong on the device after the return (CP_ERR_CUDA, _NCCL, _TIMEOUT, _PEER_LOST) is the error of the
/// group's next call.
///
/// During a capture of `stream`: captured, if the group is over NCCL or of one rank and the workspace is the caller's or from `device_alloc`, else
/// CP_ERR_NOT_CAPTURABLE. A call of the same kind and sequences comes before it, uncaptured. A graph replays these sequences and addresses; all ranks
/// launch theirs in the same order. Layer, group and workspace outlive the graph.
///
/// # Safety
/// `attention` is a handle; `args` points to `struct_size` bytes; its tensors' memory is as their shapes and strides say, and outputs overlap nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_forward(
    attention: *mut cp_attention,
    args: *const cp_forward_args,
    stream: *mut c_void,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let mut layer = unsafe { layer(attention)? };
        // SAFETY: the caller's promise.
        let read = unsafe { forward_args(&layer, args, stream) };
        let (args, context) = match read {
            Ok((args, context)) => (Ok(args), context),
            Err(e) => (Err(e), std::ptr::null_mut()),
        };
        // SAFETY: the caller's promise.
        let made = unsafe { layer.forward(args)? };
        if !context.is_null() {
            // SAFETY: checked below to be aligned; room for one by the caller's promise.
            unsafe {
                context.write(cp_context {
                    problem: made.problem,
                    attached: made.attached,
                    dropout_seed: match made.seed {
                        Seed::Value(seed) | Seed::At(seed) => seed,
                    },
                    flags: u64::from(made.ids) << 32
                        | match made.seed {
                            Seed::Value(_) => 0,
                            Seed::At(_) => u64::from(CP_FORWARD_SEED_AT),
                        },
                })
            };
        }
        Ok(())
    })
}

/// # Safety
/// As [`cp_attention_forward`].
unsafe fn forward_args(
    layer: &Attention,
    args: *const cp_forward_args,
    stream: *mut c_void,
) -> Result<(Args, *mut cp_context)> {
    let stream = stream_of(layer, stream)?;
    // SAFETY: the caller's promise.
    let a = unsafe { extensible("args", args)? };
    known_flags("args.flags", a.flags, CP_FORWARD_SEED_AT)?;
    if !a.context.is_null() {
        output("args.context", a.context)?;
    }
    let score = &layer.config().score;
    let mut inputs = vec![(Tensor::Q, &a.q)];
    let made = [(Tensor::Latent, &a.latent), (Tensor::UpK, &a.up_k), (Tensor::UpV, &a.up_v)];
    keys_or_latents(layer, &[(Tensor::K, &a.k), (Tensor::V, &a.v)], &made, &mut inputs)?;
    let mut outputs = vec![(Tensor::Out, &a.out), (Tensor::Lse, &a.lse)];
    optional((Tensor::Sinks, &a.sinks), score.sinks.is_some(), &mut inputs)?;
    optional((Tensor::MaxLogit, &a.max_logit), score.max_logit.is_some(), &mut outputs)?;
    optional((Tensor::Bias, &a.bias), score.bias.is_some(), &mut inputs)?;
    if score.dropout == 0.0 {
        zero("args.dropout_seed: without dropout", a.dropout_seed)?;
        zero("args.flags: without dropout", a.flags.into())?;
    }
    let workspace = buffer("workspace", a.workspace, a.workspace_bytes)?;
    let saved = buffer("saved", a.saved, a.saved_bytes)?;
    // SAFETY: the caller's promise.
    let args = unsafe {
        pass_args(layer, a.sequences, layer.group().size(), &inputs, &outputs, workspace, saved)?
    };
    // SAFETY: the caller's promise.
    let ids = unsafe { sequence_ids(layer, a.sequence_ids, args.seqs.len())? };
    Ok((Args { stream, seed: seed(a.dropout_seed, a.flags.into())?, ids, ..args }, a.context))
}

/// The seed as forward's arguments and the context hold it.
fn seed(value: u64, flags: u64) -> Result<Seed> {
    if flags & u64::from(CP_FORWARD_SEED_AT) == 0 {
        return Ok(Seed::Value(value));
    }
    if value == 0 || !value.is_multiple_of(8) {
        return Err(Error::argument(format!(
            "dropout_seed: got the address {value:#x}, must not be NULL and a multiple of 8"
        )));
    }
    Ok(Seed::At(value))
}

/// Gradients of Q, K and V. Finds the group and communication that the forward used in `context`, whatever is attached now.
///
/// Collective over that group; blocking on the CPU, where `stream` must be NULL; on CUDA, and during a capture, as cp_attention_forward. Gradients of
/// padding are exactly 0. Errors as in cp_attention_forward, and CP_ERR_INVALID_ARGUMENT for a context of another layer or of other sequences.
///
/// # Safety
/// As cp_attention_forward.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_backward(
    attention: *mut cp_attention,
    args: *const cp_backward_args,
    stream: *mut c_void,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let mut layer = unsafe { layer(attention)? };
        // SAFETY: the caller's promise.
        let (context, args) = unsafe { backward_args(&layer, args, stream) };
        // SAFETY: the caller's promise.
        unsafe { layer.backward(context, args) }
    })
}

/// # Safety
/// As [`cp_attention_backward`].
unsafe fn backward_args(
    layer: &Attention,
    args: *const cp_backward_args,
    stream: *mut c_void,
) -> (Result<Context>, Result<Args>) {
    // SAFETY: the caller's promise.
    let read = unsafe { extensible("args", args) };
    let (stream, a) = match stream_of(layer, stream).and_then(|stream| Ok((stream, read?))) {
        Ok(both) => both,
        Err(e) => return (Err(e.clone()), Err(e)),
    };
    let context = if a.context.is_null() || !a.context.is_aligned() {
        Err(Error::argument(format!(
            "args.context: got {:p}, must be what forward wrote",
            a.context
        )))
    } else {
        // SAFETY: not null and aligned; readable by the caller's promise.
        let c = unsafe { a.context.read() };
        let known = known_flags("args.context.flags", c.flags as u32, CP_FORWARD_SEED_AT);
        known.and_then(|()| seed(c.dropout_seed, c.flags)).map(|seed| Context {
            problem: c.problem,
            attached: c.attached,
            seed,
            ids: (c.flags >> 32) as u32,
        })
    };
    let ranks = context
        .as_ref()
        .ok()
        .and_then(|c| layer.ranks_of(c))
        .unwrap_or_else(|| layer.group().size());
    let read = || {
        zero("args.flags", a.flags.into())?;
        let sinks = layer.config().score.sinks.is_some();
        let mut inputs = vec![
            (Tensor::Q, &a.q),
            (Tensor::Out, &a.out),
            (Tensor::Lse, &a.lse),
            (Tensor::DOut, &a.d_out),
        ];
        let made = [(Tensor::Latent, &a.latent), (Tensor::UpK, &a.up_k), (Tensor::UpV, &a.up_v)];
        keys_or_latents(layer, &[(Tensor::K, &a.k), (Tensor::V, &a.v)], &made, &mut inputs)?;
        let mut outputs = vec![(Tensor::DQ, &a.dq)];
        let keys = [(Tensor::DK, &a.dk), (Tensor::DV, &a.dv)];
        let made =
            [(Tensor::DLatent, &a.d_latent), (Tensor::DUpK, &a.d_up_k), (Tensor::DUpV, &a.d_up_v)];
        keys_or_latents(layer, &keys, &made, &mut outputs)?;
        optional((Tensor::Sinks, &a.sinks), sinks, &mut inputs)?;
        optional((Tensor::DSinks, &a.d_sinks), sinks, &mut outputs)?;
        let bias = layer.config().score.bias;
        optional((Tensor::Bias, &a.bias), bias.is_some(), &mut inputs)?;
        optional((Tensor::DBias, &a.d_bias), bias.is_some_and(|b| b.gradient), &mut outputs)?;
        let workspace = buffer("workspace", a.workspace, a.workspace_bytes)?;
        let saved = buffer("saved", a.saved.cast_mut(), a.saved_bytes)?;
        // SAFETY: the caller's promise.
        let args =
            unsafe { pass_args(layer, a.sequences, ranks, &inputs, &outputs, workspace, saved)? };
        // SAFETY: the caller's promise.
        let ids = unsafe { sequence_ids(layer, a.sequence_ids, args.seqs.len())? };
        Ok(Args { stream, ids, ..args })
    };
    (context, read())
}

/// Keys and values, or what they are made of: what the layer has not is not given.
fn keys_or_latents<'a>(
    layer: &Attention,
    keys: &[Named_<'a>],
    latents: &[Named_<'a>],
    list: &mut Vec<Named_<'a>>,
) -> Result<()> {
    let made = layer.config().latent.is_some();
    // Keys that are missing are found by their shape.
    list.extend(keys.iter().filter(|_| !made));
    for &(tensor, given) in keys.iter().filter(|_| made) {
        if !given.data.is_null() || given.ndim != 0 {
            let name = crate::attention::name(tensor);
            return Err(Error::argument(format!(
                "args.{name}: given, but the layer makes keys and values of latents"
            )));
        }
    }
    latents.iter().try_for_each(|tensor| optional(*tensor, made, list))
}

/// A tensor that is there exactly where the layer asks for it.
fn optional<'a>(given: Named_<'a>, wanted: bool, list: &mut Vec<Named_<'a>>) -> Result<()> {
    // Without rows a tensor may be at NULL; one that is not given has no shape either.
    let (name, null) =
        (crate::attention::name(given.0), given.1.data.is_null() && given.1.ndim == 0);
    match (wanted, null) {
        (true, false) => list.push(given),
        (false, true) => {}
        (true, true) => {
            return Err(Error::argument(format!("args.{name}: got NULL, the layer asks for it")));
        }
        (false, false) => {
            return Err(Error::argument(format!(
                "args.{name}: given, but the layer was created without"
            )));
        }
    }
    Ok(())
}

/// What is one for all has a row, or entry, that repeats.
fn one_for_all(view: &mut View, shape: Option<BiasShape>, entries: usize) {
    let Some(shape) = shape else { return };
    if !shape.batch {
        view.stride_batch = 0;
        view.rows *= entries;
    }
    if !shape.queries {
        view.stride_row = 0;
    }
}

/// # Safety
/// `ids` is NULL or has `count` numbers.
unsafe fn sequence_ids(layer: &Attention, ids: *const u32, count: usize) -> Result<Vec<u32>> {
    if ids.is_null() {
        return Ok(Vec::new());
    }
    if layer.config().score.dropout == 0.0 || !ids.is_aligned() {
        return Err(Error::argument(format!(
            "args.sequence_ids: got {ids:p}, must be NULL without dropout, and aligned"
        )));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(ids, count) }.to_vec())
}

type Named_<'a> = (Tensor, &'a cp_tensor);

/// # Safety
/// The sequences are as their docs say.
unsafe fn pass_args(
    layer: &Attention,
    sequences: *const cp_sequences,
    ranks: u32,
    inputs: &[Named_],
    outputs: &[Named_],
    workspace: Option<(*mut u8, usize)>,
    saved: Option<(*mut u8, usize)>,
) -> Result<Args> {
    let config = layer.config();
    let list = matches!(config.partition, Partition::List { .. });
    // SAFETY: the caller's promise.
    let (seqs, list) = unsafe { decode::sequences(sequences, config.packed, list, ranks)? };
    // SAFETY: likewise.
    let regions = unsafe { mask_slices(sequences)? };
    let place = Place::of_group(layer.group());
    let (mut views, mut shapes) = (Vec::with_capacity(9), Vec::with_capacity(9));
    for (i, (tensor, t)) in inputs.iter().chain(outputs).enumerate() {
        let name = crate::attention::name(*tensor);
        let (view, shape) = match tensor {
            Tensor::Lse => decode::statistic(name, t, place, config.packed)?,
            Tensor::Bias | Tensor::DBias => {
                let (mut view, shape) = decode::bias(name, t, place, config.dtype)?;
                if *tensor == Tensor::Bias {
                    let entries = if config.packed { 1 } else { seqs.len() };
                    one_for_all(&mut view, config.score.bias, entries);
                }
                (view, shape)
            }
            tensor if tensor.per_head() => decode::per_head(name, t, place)?,
            Tensor::DUpK | Tensor::DUpV => decode::weights(name, t, place, DType::F32)?,
            tensor if tensor.weights() => decode::weights(name, t, place, config.dtype)?,
            _ => decode::tensor(name, t, place, config.dtype, config.packed)?,
        };
        if i >= inputs.len() {
            decode::not_overlapping(name, &view)?;
        }
        views.push((*tensor, view));
        shapes.push((*tensor, shape));
    }
    debug_assert!(views.iter().all(|(t, v)| *t != Tensor::Lse || v.dtype == DType::F32));
    let stream = std::ptr::null_mut();
    Ok(Args {
        seqs,
        regions,
        list,
        views,
        shapes,
        workspace,
        saved,
        seed: Seed::default(),
        ids: Vec::new(),
        stream,
    })
}

/// On CUDA NULL is the legacy default stream, as everywhere.
fn stream_of(layer: &Attention, stream: *mut c_void) -> Result<CUstream> {
    match Place::of_group(layer.group()) {
        Place::Cpu if !stream.is_null() => {
            Err(Error::argument(format!("stream: got {stream:p}, must be NULL on the CPU")))
        }
        _ => Ok(stream.cast()),
    }
}

fn buffer(name: &str, ptr: *mut c_void, bytes: usize) -> Result<Option<(*mut u8, usize)>> {
    match (ptr.is_null(), bytes) {
        (true, 0) => Ok(None),
        (true, _) => Err(Error::argument(format!("args.{name}: got NULL with {bytes} bytes"))),
        (false, _) => Ok(Some((ptr.cast(), bytes))),
    }
}

/// The problem that these sequences make on the layer's current group.
///
/// # Safety
/// The sequences are as their docs say.
unsafe fn problem(layer: &Attention, sequences: *const cp_sequences) -> Result<Arc<Problem>> {
    let config = layer.config();
    let list = matches!(config.partition, Partition::List { .. });
    // SAFETY: the caller's promise.
    let (seqs, list) =
        unsafe { decode::sequences(sequences, config.packed, list, layer.group().size())? };
    // SAFETY: likewise.
    let regions = unsafe { mask_slices(sequences)? };
    layer.problem_within(&seqs, list.as_ref(), &regions)
}

/// This rank's plan for these sequences on the current group, as text or JSON. Writes at most `capacity` bytes, ended by 0, and the full
/// length without the 0 to `length`. With `text` NULL only the length. Local. During a capture: allowed.
///
/// # Safety
/// `attention` is a handle; `sequences` as its docs say; `text` is NULL or has room for `capacity` bytes; `length` has room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_plan(
    attention: *const cp_attention,
    sequences: *const cp_sequences,
    pass: cp_pass,
    format: cp_plan_format,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> cp_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let layer = unsafe { layer(attention)? };
        let out = output("length", length)?;
        let pass = match pass {
            CP_PASS_FORWARD => Pass::Forward,
            CP_PASS_BACKWARD => Pass::Backward,
            other => {
                return Err(Error::argument(format!(
                    "pass: got {other}, allowed CP_PASS_FORWARD (0), CP_PASS_BACKWARD (1)"
                )));
            }
        };
        // SAFETY: the caller's promise.
        let problem = unsafe { problem(&layer, sequences)? };
        let plan = layer.plan(&problem, pass);
        let written = match format {
            CP_PLAN_TEXT => plan.to_string(),
            CP_PLAN_JSON => json::json(std::slice::from_ref(&plan)),
            other => {
                return Err(Error::argument(format!(
                    "format: got {other}, allowed CP_PLAN_TEXT (0), CP_PLAN_JSON (1)"
                )));
            }
        };
        if !text.is_null() {
            if capacity == 0 {
                return Err(Error::argument("capacity: got 0 with a text buffer"));
            }
            let count = written.len().min(capacity - 1);
            // SAFETY: room for `capacity` bytes, by the caller's promise.
            unsafe {
                std::ptr::copy_nonoverlapping(written.as_ptr().cast(), text, count);
                *text.add(count) = 0;
            }
        }
        out.write(written.len());
        Ok(())
    })
}

/// Destroys the layer; NULL does nothing. Local. On CUDA it may block until its calls are done. During a capture: not allowed.
///
/// # Safety
/// `attention` is NULL or a handle that no other call uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cp_attention_destroy(attention: *mut cp_attention) -> cp_status {
    guard(|| {
        if !attention.is_null() {
            // SAFETY: the caller's promise.
            match unsafe { object(attention.cast_const())? }.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::new(
                        Status::InvalidUsage,
                        "attention: is in use by another thread; it was not destroyed",
                    ));
                }
                Ok(_) | Err(TryLockError::Poisoned(_)) => {}
            }
        }
        // SAFETY: the caller's promise.
        unsafe { destroy(attention) }
    })
}
