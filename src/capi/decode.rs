//! C structs → this library's types; all messages about arguments.

use super::abi::*;
use super::guard::{extensible, known_flags, zero};
use crate::attention::{Allocator, Comm, Config, Stages};
use crate::backend::View;
use crate::dtype::{DType, Fp8};
use crate::error::{Error, Result};
use crate::group::Group;
use crate::mask::Mask;
use crate::partition::{Partition, Stretch};
use crate::problem::{CommType, Extent, Latent, Sequence, Wire};
use crate::score::{BiasShape, Reach, Score};

/// A pointer that may be null, as a slice.
///
/// # Safety
/// `ptr` is null or points to `count` readable elements.
pub unsafe fn slice<'a, T>(name: &str, ptr: *const T, count: usize) -> Result<Option<&'a [T]>> {
    if ptr.is_null() {
        return Ok(None);
    }
    if !ptr.is_aligned() {
        return Err(Error::argument(format!(
            "{name}: got a pointer that is not aligned to {}",
            align_of::<T>()
        )));
    }
    // SAFETY: the caller's promise, and aligned.
    Ok(Some(unsafe { std::slice::from_raw_parts(ptr, count) }))
}

fn dtype(name: &str, code: cp_dtype) -> Result<DType> {
    match code {
        CP_DTYPE_F32 => Ok(DType::F32),
        CP_DTYPE_BF16 => Ok(DType::Bf16),
        CP_DTYPE_F16 => Ok(DType::F16),
        other => Err(Error::argument(format!(
            "{name}: got {other}, allowed CP_DTYPE_F32 (1), CP_DTYPE_BF16 (2), CP_DTYPE_F16 (3)"
        ))),
    }
}

/// Where a group or a layer computes, and where its tensors are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Host memory.
    Cpu,
    /// The CUDA device with this number.
    Cuda(u32),
}

impl Place {
    /// Of `device_type` and `device_id`, whose owner is `name`.
    pub fn of(name: &str, device_type: i32, device_id: i32) -> Result<Place> {
        match (device_type, u32::try_from(device_id)) {
            (0 | CP_DEVICE_CPU, Ok(0)) => Ok(Place::Cpu),
            (0 | CP_DEVICE_CPU, _) => Err(Error::argument(format!(
                "{name}.device_id: got {device_id}, must be 0 on the CPU"
            ))),
            (CP_DEVICE_CUDA, Ok(ordinal)) => Ok(Place::Cuda(ordinal)),
            (CP_DEVICE_CUDA, Err(_)) => Err(Error::argument(format!(
                "{name}.device_id: got {device_id}, CUDA devices are numbered from 0"
            ))),
            (other, _) => Err(Error::argument(format!(
                "{name}.device_type: got {other}, allowed CP_DEVICE_CPU (1), CP_DEVICE_CUDA (2)"
            ))),
        }
    }

    /// A layer's, which is that of its group.
    pub fn of_group(group: &Group) -> Place {
        group.device().map_or(Place::Cpu, |d| Place::Cuda(d.ordinal))
    }

    /// Tensors are where the layer computes.
    fn check(self, name: &str, t: &cp_tensor) -> Result<()> {
        match self {
            _ if Place::of(name, t.device_type, t.device_id) == Ok(self) => Ok(()),
            Place::Cpu if t.device_type == CP_DEVICE_CPU || t.device_type == 0 => {
                Place::of(name, t.device_type, t.device_id).map(|_| ())
            }
            Place::Cpu => Err(Error::unsupported(format!(
                "{name}.device_type: got {}, this layer computes on the CPU (CP_DEVICE_CPU = 1)",
                t.device_type
            ))),
            Place::Cuda(ordinal) => Err(Error::unsupported(format!(
                "{name}.device_type, device_id: got {}, {}; this layer computes on CUDA device {ordinal} (CP_DEVICE_CUDA = 2, {ordinal})",
                t.device_type, t.device_id
            ))),
        }
    }
}

/// Is a format the packed one?
pub fn packed(name: &str, code: cp_format) -> Result<bool> {
    match code {
        CP_FORMAT_DENSE => Ok(false),
        CP_FORMAT_PACKED => Ok(true),
        other => Err(Error::argument(format!(
            "{name}: got {other}, allowed CP_FORMAT_DENSE (0), CP_FORMAT_PACKED (1)"
        ))),
    }
}

/// A partition by number. The caller's list comes with the sequences.
pub fn partition(name: &str, code: cp_partition) -> Result<Partition> {
    match code {
        CP_PARTITION_ZIGZAG => Ok(Partition::Zigzag),
        CP_PARTITION_CONTIGUOUS => Ok(Partition::Contiguous),
        CP_PARTITION_STRIPED => Ok(Partition::Striped),
        CP_PARTITION_BALANCED => Ok(Partition::Balanced),
        CP_PARTITION_LIST => Ok(Partition::List { q: Vec::new(), k: Vec::new() }),
        other => Err(Error::argument(format!(
            "{name}: got {other}, allowed CP_PARTITION_ZIGZAG (0), _CONTIGUOUS (1), _STRIPED (2), _LIST (3), _BALANCED (4)"
        ))),
    }
}

/// A layer, as it is asked for.
pub struct Layer {
    /// What it computes.
    pub config: Config,
    /// Where.
    pub place: Place,
    /// CPU: threads; 0 = from the environment.
    pub threads: u32,
    /// CUDA: multiprocessors left to others.
    pub sm_margin: u32,
    /// CUDA: the caller's allocator.
    pub allocator: Option<Allocator>,
}

/// A layer's configuration.
///
/// # Safety
/// As [`extensible`].
pub unsafe fn attention_config(ptr: *const cp_attention_config) -> Result<Layer> {
    // SAFETY: the caller's promise.
    let c = unsafe { extensible("config", ptr)? };
    let known = CP_ATTENTION_CAUSAL
        | CP_ATTENTION_BOTTOM_RIGHT
        | CP_ATTENTION_WINDOW_LEFT
        | CP_ATTENTION_WINDOW_RIGHT
        | CP_ATTENTION_WIRE_F32
        | CP_ATTENTION_SAVE
        | CP_ATTENTION_KV_CACHE
        | CP_ATTENTION_DETERMINISTIC;
    known_flags("config.flags", c.flags, known)?;
    let has = |flag| c.flags & flag != 0;
    if has(CP_ATTENTION_KV_CACHE) {
        return Err(Error::unsupported(
            "config.flags: CP_ATTENTION_KV_CACHE: decoding with a KV cache is not offered; this library computes whole sequences (training, prefill)",
        ));
    }
    zero("config.reserved", c.reserved.into())?;
    let packed = packed("config.format", c.format)?;
    for (name, flag, value) in [
        ("window_left", CP_ATTENTION_WINDOW_LEFT, c.window_left),
        ("window_right", CP_ATTENTION_WINDOW_RIGHT, c.window_right),
    ] {
        if !has(flag) && value != 0 {
            return Err(Error::argument(format!(
                "config.{name}: got {value} without its flag CP_ATTENTION_{}",
                name.to_uppercase()
            )));
        }
    }
    let mask = Mask {
        causal: has(CP_ATTENTION_CAUSAL),
        bottom_right: has(CP_ATTENTION_BOTTOM_RIGHT),
        left: has(CP_ATTENTION_WINDOW_LEFT).then_some(c.window_left),
        right: has(CP_ATTENTION_WINDOW_RIGHT).then_some(c.window_right),
    };
    if !c.alibi_slopes.is_aligned() {
        let got = c.alibi_slopes;
        return Err(Error::argument(format!("config.alibi_slopes: got {got:p}, must be aligned")));
    }
    let slopes = match c.alibi_slopes.is_null() {
        true => &[],
        // SAFETY: `heads` numbers, by the caller's promise.
        false => unsafe { std::slice::from_raw_parts(c.alibi_slopes, c.heads as usize) },
    };
    let score = Score {
        softcap: c.softcap,
        slopes: slopes.into(),
        bias: bias_shape(c.bias)?,
        dropout: c.dropout,
        head_offset: c.head_offset,
        sinks: reach("config.sinks", c.sinks)?,
        max_logit: reach("config.max_logit", c.max_logit)?,
    };
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    let config = Config {
        heads: c.heads,
        kv_heads: or(c.kv_heads, c.heads),
        dim_qk: c.head_dim_qk,
        dim_v: or(c.head_dim_v, c.head_dim_qk),
        dtype: dtype("config.dtype", c.dtype)?,
        scale: c.softmax_scale,
        score,
        latent: latent(&c)?,
        mask,
        packed,
        partition: partition("config.partition", c.partition)?,
        wire: if has(CP_ATTENTION_WIRE_F32) { Wire::F32 } else { Wire::Storage },
        kv_wire: kv_wire(c.kv_wire)?,
        max_rows: c.max_tokens_per_rank,
        save: has(CP_ATTENTION_SAVE),
        deterministic: has(CP_ATTENTION_DETERMINISTIC),
        max_segments: c.max_segments,
    };
    let place = Place::of("config", c.device_type, c.device_id)?;
    let allocator = allocator(&c)?;
    match place {
        Place::Cpu => {
            zero("config.sm_margin: on the CPU", c.sm_margin.into())?;
            zero("config.max_segments: on the CPU", c.max_segments.into())?;
            if allocator.is_some() {
                return Err(Error::argument("config.device_alloc: given, must be NULL on the CPU"));
            }
        }
        Place::Cuda(_) if c.threads != 0 => {
            return Err(Error::argument(format!(
                "config.threads: got {}, must be 0 on CUDA",
                c.threads
            )));
        }
        Place::Cuda(_) => {}
    }
    Ok(Layer { config, place, threads: c.threads, sm_margin: c.sm_margin, allocator })
}

fn kv_wire(kind: cp_kv_wire) -> Result<Option<Fp8>> {
    match kind {
        CP_KV_WIRE_STORAGE => Ok(None),
        CP_KV_WIRE_E4M3 => Ok(Some(Fp8::E4m3)),
        CP_KV_WIRE_E5M2 => Ok(Some(Fp8::E5m2)),
        other => Err(Error::argument(format!(
            "config.kv_wire: got {other}, allowed CP_KV_WIRE_STORAGE (0), _E4M3 (1), _E5M2 (2)"
        ))),
    }
}

fn allocator(c: &cp_attention_config) -> Result<Option<Allocator>> {
    match (c.device_alloc, c.device_free) {
        (Some(alloc), Some(free)) => Ok(Some(Allocator { alloc, free, ctx: c.device_alloc_ctx })),
        (None, None) if c.device_alloc_ctx.is_null() => Ok(None),
        _ => Err(Error::argument(
            "config.device_alloc, device_free: give both, or neither and no device_alloc_ctx",
        )),
    }
}

/// How a group communicates. Null is p2p.
///
/// # Safety
/// As [`extensible`].
pub unsafe fn comm_config(ptr: *const cp_comm_config, ranks: u32) -> Result<Comm> {
    if ptr.is_null() {
        return Ok(Comm::of(CommType::P2p));
    }
    // SAFETY: the caller's promise.
    let c = unsafe { extensible("comm", ptr)? };
    known_flags("comm.flags", c.flags, CP_COMM_RELAY | CP_COMM_MOVE_QUERIES)?;
    zero("comm.reserved", c.reserved.into())?;
    if c.flags & CP_COMM_MOVE_QUERIES != 0 {
        return Err(Error::unsupported(
            "comm.flags: CP_COMM_MOVE_QUERIES: keys and values move here; moving queries and outputs instead is not offered",
        ));
    }
    let kind = match c.comm_type {
        CP_COMM_P2P => CommType::P2p,
        CP_COMM_ALL_GATHER => CommType::AllGather,
        CP_COMM_A2A => CommType::A2a,
        CP_COMM_A2A_P2P => CommType::A2aP2p,
        other => {
            return Err(Error::argument(format!(
                "comm.comm_type: got {other}, allowed CP_COMM_P2P (0), CP_COMM_ALL_GATHER (1), CP_COMM_A2A (2), CP_COMM_A2A_P2P (3)"
            )));
        }
    };
    let levels = match c.level_count as usize {
        n @ (0 | 2) => &c.level_sizes[..n],
        n @ 3.. => {
            return Err(Error::unsupported(format!(
                "comm.level_count: got {n}; two exchange levels are offered (heads inside, keys outside)"
            )));
        }
        n => return Err(Error::argument(format!("comm.level_count: got {n}, allowed 0 or 2"))),
    };
    if c.level_sizes[levels.len()..].iter().any(|s| *s != 0) {
        return Err(Error::argument(format!(
            "comm.level_sizes: got {:?} with level_count {}; unused sizes must be 0",
            c.level_sizes, c.level_count
        )));
    }
    if let [inside, outside] = levels {
        if kind != CommType::A2aP2p {
            return Err(Error::argument(format!(
                "comm.level_sizes: got {levels:?}, but {} has no levels",
                kind.name()
            )));
        }
        if u64::from(*inside) * u64::from(*outside) != u64::from(ranks) {
            return Err(Error::argument(format!(
                "comm.level_sizes: got {inside} x {outside}, the group has {ranks} ranks"
            )));
        }
    }
    let stages = match c.stages {
        0 => Stages::Named,
        CP_STAGES_AUTO if c.memory_cap_bytes == 0 => {
            return Err(Error::argument(
                "comm.memory_cap_bytes: got 0 with CP_STAGES_AUTO; give the workspace that no rank may exceed, in bytes",
            ));
        }
        CP_STAGES_AUTO => Stages::Within(c.memory_cap_bytes),
        n => Stages::Count(n),
    };
    if c.stages != CP_STAGES_AUTO && c.memory_cap_bytes != 0 {
        return Err(Error::argument(format!(
            "comm.memory_cap_bytes: got {} without stages = CP_STAGES_AUTO",
            c.memory_cap_bytes
        )));
    }
    Ok(Comm {
        kind,
        inner: levels.first().copied().unwrap_or(0),
        stages,
        relay: c.flags & CP_COMM_RELAY != 0,
    })
}

/// The sequences of a call, and the caller's own partition if there is one.
///
/// # Safety
/// As [`extensible`]; the arrays have the lengths that the struct's docs say.
pub unsafe fn sequences(
    ptr: *const cp_sequences,
    packed: bool,
    list: bool,
    ranks: u32,
) -> Result<(Vec<Sequence>, Option<Partition>)> {
    // SAFETY: the caller's promise.
    let s = unsafe { extensible("sequences", ptr)? };
    zero("sequences.flags", s.flags.into())?;
    zero("sequences.reserved", s.reserved.into())?;
    let n = s.count as usize;
    if n == 0 {
        return Err(Error::argument("sequences.count: got 0, need at least 1"));
    }
    // SAFETY: the caller's promise about the arrays.
    let seqs = unsafe { if packed { packed_lengths(&s, n)? } else { dense_lengths(&s, n)? } };
    // SAFETY: likewise.
    let partition = unsafe { list_partition(&s, list, ranks)? };
    Ok((seqs, partition))
}

/// # Safety
/// As [`sequences`].
unsafe fn dense_lengths(s: &cp_sequences, n: usize) -> Result<Vec<Sequence>> {
    let cu = [s.cu_seqlens_q, s.cu_seqlens_k, s.cu_seqlens_q_padded, s.cu_seqlens_k_padded];
    if cu.iter().any(|p| !p.is_null()) {
        return Err(Error::argument(
            "sequences.cu_seqlens_*: given, but the layer's format is CP_FORMAT_DENSE",
        ));
    }
    if s.seq_q == 0 {
        return Err(Error::argument("sequences.seq_q: got 0, need the global padded length"));
    }
    // Keys of the same padded length are as queries wherever nothing else is said.
    let seq_k = if s.seq_k == 0 { s.seq_q } else { s.seq_k };
    // Before lists of that length are made.
    if n > MOST_ENTRIES {
        return Err(Error::unsupported(format!(
            "sequences.count: got {n}, allowed 1 … {MOST_ENTRIES}"
        )));
    }
    if n as u64 * u64::from(s.seq_q.max(seq_k)) > u64::from(u32::MAX) {
        return Err(Error::unsupported(format!(
            "sequences.count: got {n} entries of {} tokens; at most 2^32 - 1 tokens in all are addressed",
            s.seq_q.max(seq_k)
        )));
    }
    let or_q = |k: *const i32, q: *const i32| if k.is_null() && seq_k == s.seq_q { q } else { k };
    let side = |name: &str,
                padded: u32,
                lens: *const i32,
                before: *const i32|
     -> Result<Vec<Extent>> {
        // SAFETY: `n` entries, by the caller's promise.
        let (lens_of, before_of) = unsafe {
            (
                slice(&format!("sequences.lens_{name}"), lens, n)?,
                slice(&format!("sequences.before_{name}"), before, n)?,
            )
        };
        let at = |list: Option<&[i32]>, what: &str, i: usize, default: u32| -> Result<u32> {
            let Some(value) = list.map(|l| l[i]) else { return Ok(default) };
            u32::try_from(value).map_err(|_| {
                Error::argument(format!(
                    "sequences.{what}_{name}[{i}]: got {value}, must not be negative"
                ))
            })
        };
        (0..n)
            .map(|i| {
                let before = at(before_of, "before", i, 0)?;
                let len = at(lens_of, "lens", i, padded.saturating_sub(before))?;
                if u64::from(before) + u64::from(len) > u64::from(padded) {
                    let text = format!("sequences.lens_{name}[{i}]: got {len} tokens after {before} of padding, the padded length is {padded}");
                    return Err(Error::argument(text));
                }
                Ok(Extent { before, len, padded })
            })
            .collect()
    };
    let q = side("q", s.seq_q, s.lens_q, s.before_q)?;
    let k = side("k", seq_k, or_q(s.lens_k, s.lens_q), or_q(s.before_k, s.before_q))?;
    Ok(q.into_iter().zip(k).map(|(q, k)| Sequence { q, k }).collect())
}

/// # Safety
/// As [`sequences`].
unsafe fn packed_lengths(s: &cp_sequences, n: usize) -> Result<Vec<Sequence>> {
    if s.seq_q != 0
        || s.seq_k != 0
        || [s.lens_q, s.lens_k, s.before_q, s.before_k].iter().any(|p| !p.is_null())
    {
        return Err(Error::argument(
            "sequences: seq_*, lens_* and before_* are for CP_FORMAT_DENSE; a packed layer reads cu_seqlens_*",
        ));
    }
    let differences = |name: &str, ptr: *const i32| -> Result<Option<Vec<u32>>> {
        // SAFETY: `n + 1` entries, by the caller's promise.
        let Some(cu) = (unsafe { slice(name, ptr, n + 1)? }) else { return Ok(None) };
        if cu[0] != 0 {
            return Err(Error::argument(format!("{name}[0]: got {}, must be 0", cu[0])));
        }
        let step = |(i, w): (usize, &[i32])| {
            u32::try_from(i64::from(w[1]) - i64::from(w[0])).map_err(|_| {
                Error::argument(format!(
                    "{name}[{}]: got {} after {}, must not decrease",
                    i + 1,
                    w[1],
                    w[0]
                ))
            })
        };
        cu.windows(2).enumerate().map(step).collect::<Result<Vec<u32>>>().map(Some)
    };
    let side = |name: &str, lens: *const i32, padded: *const i32| -> Result<Option<Vec<Extent>>> {
        let lens = differences(&format!("sequences.cu_seqlens_{name}"), lens)?;
        let padded = differences(&format!("sequences.cu_seqlens_{name}_padded"), padded)?;
        let Some(lens) = lens else {
            return match padded {
                Some(_) => Err(Error::argument(format!(
                    "sequences.cu_seqlens_{name}: got NULL although cu_seqlens_{name}_padded is given"
                ))),
                None => Ok(None),
            };
        };
        let padded = padded.unwrap_or_else(|| lens.clone());
        let extent = |(i, (len, padded)): (usize, (u32, u32))| {
            if len > padded {
                let text = format!(
                    "sequences.cu_seqlens_{name}: sequence {i} has {len} tokens in a padded length of {padded}"
                );
                return Err(Error::argument(text));
            }
            Ok(Extent { before: 0, len, padded })
        };
        lens.into_iter().zip(padded).enumerate().map(extent).collect::<Result<Vec<_>>>().map(Some)
    };
    let q = side("q", s.cu_seqlens_q, s.cu_seqlens_q_padded)?
        .ok_or_else(|| Error::argument("sequences.cu_seqlens_q: got NULL"))?;
    let k = side("k", s.cu_seqlens_k, s.cu_seqlens_k_padded)?.unwrap_or_else(|| q.clone());
    Ok(q.into_iter().zip(k).map(|(q, k)| Sequence { q, k }).collect())
}

/// # Safety
/// As [`sequences`].
unsafe fn list_partition(s: &cp_sequences, list: bool, ranks: u32) -> Result<Option<Partition>> {
    let given = !s.list_q.is_null()
        || !s.list_k.is_null()
        || !s.list_q_counts.is_null()
        || !s.list_k_counts.is_null();
    match (list, given) {
        (false, false) => return Ok(None),
        (false, true) => {
            return Err(Error::argument(
                "sequences.list_*: given, but the layer's partition is not CP_PARTITION_LIST",
            ));
        }
        (true, false) => {
            return Err(Error::argument(
                "sequences.list_q: got NULL, but the layer's partition is CP_PARTITION_LIST",
            ));
        }
        (true, true) => {}
    }
    let side = |name: &str,
                stretches: *const cp_stretch,
                counts: *const u32|
     -> Result<Option<Vec<Vec<Stretch>>>> {
        // SAFETY: one count per rank, by the caller's promise.
        let counts =
            unsafe { slice(&format!("sequences.list_{name}_counts"), counts, ranks as usize)? };
        let Some(counts) = counts else { return Ok(None) };
        let total = counts.iter().map(|c| *c as usize).sum();
        // SAFETY: as many stretches as the counts say, by the caller's promise.
        let Some(all) = (unsafe { slice(&format!("sequences.list_{name}"), stretches, total)? })
        else {
            return Ok(None);
        };
        let mut at = 0;
        let lists = counts.iter().map(|c| {
            at += *c as usize;
            all[at - *c as usize..at]
                .iter()
                .map(|s| Stretch { seq: s.seq, start: s.start, step: s.step, len: s.len })
                .collect()
        });
        Ok(Some(lists.collect()))
    };
    let q = side("q", s.list_q, s.list_q_counts)?.ok_or_else(|| {
        Error::argument("sequences.list_q: list_q and list_q_counts must both be given")
    })?;
    let k = match s.list_k.is_null() && s.list_k_counts.is_null() {
        true => q.clone(),
        false => side("k", s.list_k, s.list_k_counts)?.ok_or_else(|| {
            Error::argument("sequences.list_k: list_k and list_k_counts must both be given")
        })?,
    };
    Ok(Some(Partition::List { q, k }))
}

/// A tensor as a view, with its logical shape `[batch, seq, heads, dim]`.
pub fn tensor(
    name: &str,
    t: &cp_tensor,
    place: Place,
    want: DType,
    packed: bool,
) -> Result<(View, [i64; 4])> {
    place.check(name, t)?;
    let dims: &[usize] = if packed { &[1, 2, 3] } else { &[0, 1, 2, 3] };
    view(
        name,
        t,
        want,
        dims,
        if packed { "[tokens, heads, dim]" } else { "[batch, seq, heads, dim]" },
        true,
    )
}

/// The LSE `[batch, heads, seq]` (packed: `[heads, tokens]`), seen as `[batch, seq, heads, 1]`.
pub fn statistic(
    name: &str,
    t: &cp_tensor,
    place: Place,
    packed: bool,
) -> Result<(View, [i64; 4])> {
    place.check(name, t)?;
    let dims: &[usize] = if packed { &[2, 1] } else { &[0, 2, 1] };
    view(
        name,
        t,
        DType::F32,
        dims,
        if packed { "[heads, tokens]" } else { "[batch, heads, seq]" },
        false,
    )
}

/// An additive bias `[batch, heads, queries, keys]`, seen as `[batch, queries, heads, keys]`.
pub fn bias(name: &str, t: &cp_tensor, place: Place, dtype: DType) -> Result<(View, [i64; 4])> {
    place.check(name, t)?;
    view(name, t, dtype, &[0, 2, 1, 3], "[batch, heads, queries, keys]", true)
}

/// Most batch entries: more are a mistake, and their list would not fit into memory.
const MOST_ENTRIES: usize = 1 << 24;

/// The dimensions that a bias has.
fn bias_shape(flags: u32) -> Result<Option<BiasShape>> {
    let known = CP_BIAS | CP_BIAS_BATCH | CP_BIAS_HEADS | CP_BIAS_QUERIES | CP_BIAS_GRADIENT;
    known_flags("config.bias", flags, known)?;
    let has = |flag| flags & flag != 0;
    if flags != 0 && !has(CP_BIAS) {
        return Err(Error::argument(format!("config.bias: got {flags:#x} without CP_BIAS (1)")));
    }
    Ok(has(CP_BIAS).then(|| BiasShape {
        batch: has(CP_BIAS_BATCH),
        heads: has(CP_BIAS_HEADS),
        queries: has(CP_BIAS_QUERIES),
        gradient: has(CP_BIAS_GRADIENT),
    }))
}

/// Keys and values that are made of latents.
fn latent(c: &cp_attention_config) -> Result<Option<Latent>> {
    if c.latent_dim == 0 {
        return match c.latent_rope {
            0 => Ok(None),
            got => {
                Err(Error::argument(format!("config.latent_rope: got {got} without latent_dim")))
            }
        };
    }
    Ok(Some(Latent { dim: c.latent_dim, rope: c.latent_rope }))
}

/// Up-projection weights `[heads, rows, dim]`, or their gradient, seen as `[1, rows, heads, dim]`.
pub fn weights(name: &str, t: &cp_tensor, place: Place, dtype: DType) -> Result<(View, [i64; 4])> {
    place.check(name, t)?;
    view(name, t, dtype, &[2, 1, 3], "[heads, rows, dim]", true)
}

/// A number per head, `[heads]`, seen as `[1, 1, heads, 1]`.
pub fn per_head(name: &str, t: &cp_tensor, place: Place) -> Result<(View, [i64; 4])> {
    place.check(name, t)?;
    view(name, t, DType::F32, &[2], "[heads]", false)
}

/// Who gets a number per head.
fn reach(name: &str, code: cp_reach) -> Result<Option<Reach>> {
    match code {
        CP_REACH_NONE => Ok(None),
        CP_REACH_RANK => Ok(Some(Reach::Rank)),
        CP_REACH_GROUP => Ok(Some(Reach::Group)),
        other => Err(Error::argument(format!(
            "{name}: got {other}, allowed CP_REACH_NONE (0), _RANK (1), _GROUP (2)"
        ))),
    }
}

/// `dims[i]` is the logical dimension (batch, seq, heads, dim) of the tensor's dimension i.
fn view(
    name: &str,
    t: &cp_tensor,
    want: DType,
    dims: &[usize],
    order: &str,
    dense_last: bool,
) -> Result<(View, [i64; 4])> {
    let bad = |text: String| Err(Error::argument(format!("{name}.{text}")));
    let (code, bits) = match want {
        DType::F32 => (CP_CODE_FLOAT, 32),
        DType::F16 => (CP_CODE_FLOAT, 16),
        DType::Bf16 => (CP_CODE_BFLOAT, 16),
        DType::Fp8(_) => return bad("dtype: no tensor is stored so".into()),
    };
    if (t.dtype_code, t.dtype_bits, t.dtype_lanes) != (code, bits, 1) {
        let got = (t.dtype_code, t.dtype_bits, t.dtype_lanes);
        return bad(format!(
            "dtype: got (code, bits, lanes) = {got:?}, must be {:?} for {}",
            (code, bits, 1),
            want.name()
        ));
    }
    if t.ndim as usize != dims.len() {
        return bad(format!("ndim: got {}, must be {} for {order}", t.ndim, dims.len()));
    }
    zero(&format!("{name}.reserved"), t.reserved)?;
    let (mut shape, mut stride) = ([1i64; 4], [0i64; 4]);
    for (i, d) in dims.iter().enumerate() {
        if t.shape[i] < 0 || t.shape[i] > 1 << 40 {
            return bad(format!(
                "shape[{i}]: got {}, must not be negative or beyond 2^40",
                t.shape[i]
            ));
        }
        shape[*d] = t.shape[i];
    }
    let elements = shape.iter().fold(1i64, |product, n| product.saturating_mul(*n));
    for (i, d) in dims.iter().enumerate() {
        // A stride that no step is taken along means nothing: NumPy and torch then give any number.
        if elements == 0 || t.shape[i] == 1 {
            stride[*d] = if *d == 3 { 1 } else { t.stride[i].clamp(0, 1 << 40) };
            continue;
        }
        if t.stride[i] < 0 || t.stride[i] > 1 << 40 {
            return bad(format!(
                "stride[{i}]: got {}, must not be negative or beyond 2^40",
                t.stride[i]
            ));
        }
        if dense_last && *d == 3 && t.stride[i] != 1 {
            return bad(format!(
                "stride[{i}]: got {}, the last dimension must be contiguous (1)",
                t.stride[i]
            ));
        }
        stride[*d] = t.stride[i];
    }
    if elements > 0 && (t.data.is_null() || !(t.data as usize).is_multiple_of(want.size())) {
        return bad(format!(
            "data: got {:p}, must be an address aligned to {}",
            t.data,
            want.size()
        ));
    }
    let [batch, seq, heads, dim] = shape.map(|n| n as usize);
    let view = View {
        ptr: t.data.cast(),
        dtype: want,
        rows: batch.saturating_mul(seq),
        heads,
        dim,
        rows_per_batch: seq.max(1),
        stride_batch: stride[0] as usize,
        stride_row: stride[1] as usize,
        stride_head: stride[2] as usize,
    };
    Ok((view, shape))
}

/// Outputs may not overlap themselves: every index has its own address.
pub fn not_overlapping(name: &str, view: &View) -> Result<()> {
    if view.rows == 0 || view.heads == 0 || view.dim == 0 {
        return Ok(());
    }
    let mut axes = [
        (view.rows / view.rows_per_batch, view.stride_batch),
        (view.rows_per_batch.min(view.rows), view.stride_row),
        (view.heads, view.stride_head),
        (view.dim, 1),
    ];
    axes.sort_by_key(|(_, stride)| *stride);
    let mut span = 0;
    for (count, stride) in axes.into_iter().filter(|(count, _)| *count > 1) {
        if stride <= span {
            return Err(Error::argument(format!(
                "{name}.stride: {stride} elements overlap another dimension that spans {}; results would collide",
                span + 1
            )));
        }
        span = (count - 1).saturating_mul(stride).saturating_add(span);
    }
    Ok(())
}
