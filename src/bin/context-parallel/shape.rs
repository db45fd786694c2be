//! The options that say what is computed and how it is split, as the library's types.

use crate::args::{Failure, Given, Opt, opt, usage};
use context_parallel::attention::{Comm, Config, Stages};
use context_parallel::dtype::{DType, Fp8};
use context_parallel::error::Result;
use context_parallel::mask::Mask;
use context_parallel::partition::Partition;
use context_parallel::problem::{CommType, Extent, Problem, Sequence, Wire};
use context_parallel::regions::{Region, Regions};
use context_parallel::score::Score;
use std::sync::Arc;

/// How ranks share the work.
pub const SPLIT: (&str, &[Opt]) = (
    "how it is split",
    &[
        opt(
            "cp",
            "N",
            "ranks of the context-parallel group (default: plan 4; perf one per core, 2 to 4)",
        ),
        opt(
            "comm",
            "TYPE",
            "p2p (ring), all_gather, a2a (Ulysses) or a2a+p2p (both);\ndefault: plan p2p; perf all, or a list with commas",
        ),
        opt(
            "inner",
            "U",
            "a2a+p2p: ranks that trade heads; default the largest divisor of N up to its root",
        ),
        opt(
            "stages",
            "N|auto",
            "stages in which keys and values arrive, 1 … N/U−1; default what TYPE stands for;\nauto: the fewest that --memory-cap allows",
        ),
        opt(
            "memory-cap",
            "BYTES",
            "workspace that a rank may use, as 64M or 2G; makes --stages auto",
        ),
        opt(
            "relay",
            "",
            "the classical ring: keys and values are passed on from neighbour to neighbour",
        ),
        opt(
            "partition",
            "NAME",
            "who holds which tokens: zigzag (default), contiguous, striped;\nbalanced: packed documents whole where they can be",
        ),
        opt("wire", "TYPE", "partial dK, dV travel in storage type (default) or fp32"),
        KV_WIRE,
    ],
);

/// How keys and values travel.
pub const KV_WIRE: Opt =
    opt("kv-wire", "TYPE", "K, V travel in storage type (default), or as e4m3 or e5m2");

/// Heads and their sizes.
pub const HEADS: &[Opt] = &[
    opt("heads", "H", "query heads (default 8)"),
    opt("kv-heads", "H", "key heads, a divisor of the query heads (default 2)"),
    opt("head-dim", "D", "elements per head, a multiple of 8 up to 256 (default 64)"),
    opt("head-dim-v", "D", "elements per head of V and O (default as --head-dim)"),
    opt("dtype", "TYPE", "storage type: fp32, bf16, fp16 (default fp32; plan bf16)"),
];

/// Who sees whom.
pub const MASK: &[Opt] = &[
    opt("mask", "NAME", "causal (default), full, causal-bottom-right"),
    opt("window", "L,R", "see at most L keys before and R after the diagonal; −1 for no limit"),
    opt(
        "slices",
        "LIST|@FILE",
        "queries and keys that see each other, under the mask: [seq/]q0:q1/k0:k1[/lo:hi] with\nlo <= key − query <= hi, separated by commas or spaces; nothing else is seen",
    ),
];

/// The lengths.
pub const LENGTHS: (&str, &[Opt]) = (
    "lengths",
    &[
        opt("seq", "L", "tokens of a sequence (default 8k)"),
        opt("seq-k", "L", "key tokens, if they differ from the queries (cross-attention)"),
        opt("batch", "B", "sequences of that length (default 1)"),
        opt("lens", "L,…", "true length of every batch entry; the rest up to --seq is padding"),
        opt("pad", "SIDE", "where --lens puts the padding: right (default) or left"),
        opt("cu-seqlens", "0,…", "packed sequences (thd): where each begins, and the end"),
        opt("cu-seqlens-padded", "0,…", "the same with the padding after each"),
        opt("cu-seqlens-k", "0,…", "the same for keys, if they differ"),
        opt("cu-seqlens-padded-k", "0,…", "the same for keys with padding"),
    ],
);

/// What every call of a layer has in common.
pub fn config(given: &Given, dtype: DType) -> std::result::Result<Config, Failure> {
    let dims = 8..=256;
    let dim_qk = given.small("head-dim", 64, dims.clone())?;
    let dtype = given.word("dtype", dtype, "fp32, bf16, fp16", DType::parse)?;
    let parse = |w: &str| match w {
        "zigzag" => Some(Partition::Zigzag),
        "contiguous" => Some(Partition::Contiguous),
        "striped" => Some(Partition::Striped),
        "balanced" => Some(Partition::Balanced),
        _ => None,
    };
    let partition = given.word(
        "partition",
        Partition::Zigzag,
        "zigzag, contiguous, striped, balanced",
        parse,
    )?;
    let wire = |w: &str| match w {
        "storage" => Some(Wire::Storage),
        "fp32" => Some(Wire::F32),
        _ => None,
    };
    let kv_wire = |w: &str| match w {
        "storage" => Some(None),
        _ => Fp8::parse(w).map(Some),
    };
    let heads = given.small("heads", 8, 1..=4096)?;
    let default = if heads.is_multiple_of(4) { heads / 4 } else { heads };
    Ok(Config {
        score: Score::default(),
        latent: None,
        heads,
        kv_heads: given.small("kv-heads", default, 1..=4096)?,
        dim_qk,
        dim_v: given.small("head-dim-v", dim_qk, dims)?,
        dtype,
        scale: 0.0,
        mask: mask(given)?,
        packed: given.flag("cu-seqlens"),
        partition,
        wire: given.word("wire", Wire::Storage, "storage, fp32", wire)?,
        kv_wire: given.word("kv-wire", None, "storage, e4m3, e5m2", kv_wire)?,
        max_rows: 0,
        save: false,
        deterministic: false,
        max_segments: 0,
    })
}

fn mask(given: &Given) -> std::result::Result<Mask, Failure> {
    let parse = |w: &str| match w {
        "causal" => Some(Mask::CAUSAL),
        "full" => Some(Mask::FULL),
        "causal-bottom-right" => Some(Mask { bottom_right: true, ..Mask::CAUSAL }),
        _ => None,
    };
    let mut mask = given.word("mask", Mask::CAUSAL, "causal, full, causal-bottom-right", parse)?;
    if let Some(text) = given.text("window") {
        let side = |w: &str| match w.trim() {
            "-1" | "−1" => Some(None),
            w => crate::args::number(w).and_then(|n| u32::try_from(n).ok()).map(Some),
        };
        let sides: Option<Vec<Option<u32>>> = text.split(',').map(side).collect();
        match sides.as_deref() {
            Some([left, right]) if !mask.causal || matches!(right, None | Some(0)) => {
                mask.left = *left;
                mask.right = if mask.causal { None } else { *right };
            }
            Some([_, Some(right)]) => {
                return Err(usage(format!(
                    "--window: got {right} keys after the diagonal, but a causal mask shows none (want L,0, or --mask full)"
                )));
            }
            _ => {
                return Err(usage(format!(
                    "--window: got {text:?}, want two numbers L,R as 4096,0"
                )));
            }
        }
    }
    Ok(mask)
}

/// The slices of the mask, inline or from a file.
pub fn regions(given: &Given) -> std::result::Result<Regions, Failure> {
    let Some(text) = given.text("slices") else { return Ok(Regions::default()) };
    let read;
    let list = match text.strip_prefix('@') {
        None => text,
        Some(file) => {
            read = std::fs::read_to_string(file)
                .map_err(|e| usage(format!("--slices {text}: {e}")))?;
            &read
        }
    };
    let region = |word: &str| {
        Region::parse(word).ok_or_else(|| {
            usage(format!(
                "--slices: got {word:?}, want [seq/]q0:q1/k0:k1[/lo:hi] as 0:512/0:512/:0"
            ))
        })
    };
    let words = list.split(|c: char| c == ',' || c.is_whitespace()).filter(|w| !w.is_empty());
    let list = words.map(region).collect::<std::result::Result<Vec<_>, _>>()?;
    match list.is_empty() {
        true => Err(usage(format!("--slices: got none in {text:?}"))),
        false => Ok(Regions::new(&list)),
    }
}

/// How ranks communicate.
pub fn comm(given: &Given, kind: CommType) -> std::result::Result<Comm, Failure> {
    let cap = match given.text("memory-cap") {
        None => None,
        Some(_) => Some(given.number("memory-cap", 0, 1..=u64::MAX)?),
    };
    let stages = match (given.text("stages"), cap) {
        (None | Some("auto"), Some(cap)) => Stages::Within(cap),
        (Some("auto"), None) => {
            return Err(usage("--stages auto: needs --memory-cap, as 64M or 2G"));
        }
        (None, None) => Stages::Named,
        (Some(_), Some(_)) => {
            return Err(usage("--memory-cap: chooses the stages; give --stages auto, or none"));
        }
        (Some(_), None) => Stages::Count(given.small("stages", 0, 0..=65_535)?),
    };
    Ok(Comm {
        kind,
        inner: given.small("inner", 0, 1..=65_536)?,
        stages,
        relay: given.flag("relay"),
    })
}

/// The communication types that were asked for; `all` for every one.
pub fn comm_types(given: &Given, default: &str) -> std::result::Result<Vec<CommType>, Failure> {
    let text = given.text("comm").unwrap_or(default);
    if text == "all" {
        return Ok(CommType::ALL.to_vec());
    }
    let allowed = "p2p, all_gather, a2a, a2a+p2p";
    text.split(',')
        .map(|word| {
            CommType::parse(word).ok_or_else(|| {
                let near =
                    crate::args::nearest(word, CommType::ALL.into_iter().map(CommType::name));
                let hint = near.map_or(String::new(), |n| format!("; did you mean {n}?"));
                usage(format!("--comm: got {word:?}, want one of {allowed}{hint}"))
            })
        })
        .collect()
}

/// The sequences. `seq` is the length where none is given.
pub fn sequences(given: &Given, seq: u32) -> std::result::Result<Vec<Sequence>, Failure> {
    if given.flag("cu-seqlens") {
        if let Some(other) =
            ["seq", "seq-k", "batch", "lens", "pad"].into_iter().find(|o| given.flag(o))
        {
            return Err(usage(format!(
                "--{other}: does not go with --cu-seqlens, which says all lengths"
            )));
        }
        return packed(given);
    }
    let orphans = ["cu-seqlens-padded", "cu-seqlens-k", "cu-seqlens-padded-k"];
    if let Some(name) = orphans.into_iter().find(|o| given.flag(o)) {
        return Err(usage(format!("--{name}: goes with --cu-seqlens only")));
    }
    let lens = given.list("lens")?;
    let longest = lens.iter().flatten().copied().max();
    let most = u32::MAX / 4;
    let padded_q = given.small("seq", longest.unwrap_or(seq), 1..=most)?;
    let padded_k = given.small("seq-k", padded_q, 1..=most)?;
    let Some(lens) = lens else {
        let batch = given.small("batch", 1, 1..=65_536)?;
        let one = Sequence { q: Extent::full(padded_q), k: Extent::full(padded_k) };
        return Ok(vec![one; batch as usize]);
    };
    if given.flag("batch") && given.small("batch", 1, 1..=65_536)? as usize != lens.len() {
        return Err(usage(format!(
            "--lens: got {} lengths for --batch {}",
            lens.len(),
            given.text("batch").unwrap_or("")
        )));
    }
    let left = given.word("pad", false, "left, right", |w| match w {
        "left" => Some(true),
        "right" => Some(false),
        _ => None,
    })?;
    let extent = |len: u32, padded: u32| {
        let len = len.min(padded);
        Extent { before: if left { padded - len } else { 0 }, len, padded }
    };
    if let Some(len) = lens.iter().find(|l| **l > padded_q) {
        return Err(usage(format!("--lens: got {len}, more than --seq {padded_q}")));
    }
    Ok(lens
        .iter()
        .map(|&len| Sequence { q: extent(len, padded_q), k: extent(len, padded_k) })
        .collect())
}

fn packed(given: &Given) -> std::result::Result<Vec<Sequence>, Failure> {
    let side = |name: &str, padded: &str| -> std::result::Result<Option<Vec<Extent>>, Failure> {
        let Some(cu) = given.list(name)? else { return Ok(None) };
        let lens = differences(name, &cu)?;
        let room = match given.list(padded)? {
            Some(cu) => differences(padded, &cu)?,
            None => lens.clone(),
        };
        if room.len() != lens.len() {
            return Err(usage(format!(
                "--{padded}: got {} sequences, --{name} has {}",
                room.len(),
                lens.len()
            )));
        }
        if let Some(i) = (0..lens.len()).find(|i| room[*i] < lens[*i]) {
            return Err(usage(format!(
                "--{padded}: sequence {i} has room for {} tokens, but has {}",
                room[i], lens[i]
            )));
        }
        Ok(Some(
            lens.iter().zip(room).map(|(&len, padded)| Extent { before: 0, len, padded }).collect(),
        ))
    };
    let q = side("cu-seqlens", "cu-seqlens-padded")?.unwrap_or_default();
    let k = side("cu-seqlens-k", "cu-seqlens-padded-k")?.unwrap_or_else(|| q.clone());
    if q.len() != k.len() {
        return Err(usage(format!(
            "--cu-seqlens-k: got {} sequences, --cu-seqlens has {}",
            k.len(),
            q.len()
        )));
    }
    Ok(q.into_iter().zip(k).map(|(q, k)| Sequence { q, k }).collect())
}

fn differences(name: &str, cu: &[u32]) -> std::result::Result<Vec<u32>, Failure> {
    if cu.len() < 2 || cu[0] != 0 || cu.windows(2).any(|w| w[0] > w[1]) {
        let text = format!(
            "--{name}: got {cu:?}, want numbers that begin with 0 and never fall, as 0,100,300"
        );
        return Err(usage(text));
    }
    Ok(cu.windows(2).map(|w| w[1] - w[0]).collect())
}

/// One problem: what a layer computes in one call.
#[derive(Clone)]
pub struct Case {
    pub config: Config,
    pub comm: Comm,
    pub seqs: Vec<Sequence>,
    pub regions: Regions,
}

impl Case {
    /// The problem on this many ranks.
    pub fn problem(&self, ranks: u32) -> Result<Arc<Problem>> {
        self.problem_on(self.comm, ranks)
    }

    /// The same on one rank alone.
    pub fn alone(&self) -> Result<Arc<Problem>> {
        self.problem_on(Comm::of(CommType::P2p), 1)
    }

    fn problem_on(&self, comm: Comm, ranks: u32) -> Result<Arc<Problem>> {
        let Case { config, seqs, regions, .. } = self;
        config.problem_within(comm, ranks, seqs.clone(), &config.partition, regions)
    }
}
