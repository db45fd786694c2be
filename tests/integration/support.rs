//! The support tables of the README: every cell is a run, every refusal the text of the call that refuses. `CP_BLESS=1` rewrites them.

use crate::numbers::Run;
use crate::oracle::{Case, Dealing, Format, cases};
use context_parallel::capi::abi::*;
use context_parallel::capi::about::cp_last_error;
use context_parallel::capi::attention::{
    cp_attention_create, cp_attention_destroy, cp_query_support,
};
use context_parallel::dtype::{DType, Fp8};
use context_parallel::partition::Side;
use context_parallel::problem::CommType;
use std::ffi::CStr;
use std::path::Path;

type Has = fn(&Case) -> bool;

/// A row of the table, and which cases of the corpus have it.
const FEATURES: &[(&str, Has)] = &[
    ("full mask", |c| !c.causal && c.left.is_none() && c.right.is_none()),
    ("causal mask", |c| c.causal && !c.bottom_right && c.left.is_none()),
    ("causal, diagonal from the bottom right", |c| c.causal && c.bottom_right && c.is("cross")),
    ("sliding window, causal", |c| c.causal && c.left.is_some()),
    ("sliding window on both sides", |c| !c.causal && c.left.is_some() && c.right.is_some()),
    ("query and key lengths differ", |c| c.is("cross")),
    ("rows that see no key", |c| c.is("blind")),
    ("batch padded on the right", |c| {
        c.is("pad") && !packed(c) && c.seqs.iter().all(|s| s.q.before == 0)
    }),
    ("batch padded on the left", |c| {
        c.is("pad") && !packed(c) && c.seqs.iter().any(|s| s.q.before > 0)
    }),
    ("packed documents (thd)", packed),
    ("padding between documents", |c| packed(c) && c.is("pad")),
    ("masks of the caller's slices (documents, prefix-LM, shared prompts, blocks)", sliced),
    ("slices under a sliding window", |c| sliced(c) && c.left.is_some()),
    ("slices with bias, dropout and sinks", |c| {
        sliced(c) && c.bias.is_some() && c.dropout > 0.0 && c.sinks.is_some()
    }),
    ("MHA", |c| c.heads == c.kv_heads && c.heads > 1),
    ("GQA", |c| c.heads > c.kv_heads && c.kv_heads > 1),
    ("MQA", |c| c.kv_heads == 1 && c.heads > 1),
    ("head dimensions of Q, K and of V differ", |c| c.dim_qk != c.dim_v),
    ("zigzag", |c| c.dealing == Dealing::Zigzag),
    ("contiguous", |c| c.dealing == Dealing::Contiguous),
    ("striped", |c| c.dealing == Dealing::Striped),
    ("balanced", |c| c.dealing == Dealing::Balanced),
    ("the caller's own list", |c| c.dealing == Dealing::List),
    ("soft-cap", |c| c.softcap > 0.0),
    ("ALiBi", |c| !c.slopes.is_empty()),
    ("bias 1hss and its gradient", |c| shape(c) == Some([false, true, true])),
    ("bias 11ss and its gradient", |c| shape(c) == Some([false, false, true])),
    ("bias b1ss and its gradient", |c| shape(c) == Some([true, false, true])),
    ("bias bhss and its gradient", |c| shape(c) == Some([true, true, true])),
    ("bias 111s", |c| shape(c) == Some([false, false, false])),
    ("dropout, the same for any number of ranks", |c| c.dropout > 0.0),
    ("softmax sinks and their gradient", |c| c.sinks.is_some()),
    ("largest score per head", |c| c.max_logit.is_some()),
    ("keys and values travel as E4M3", |c| c.kv_wire == Some(Fp8::E4m3)),
    ("keys and values travel as E5M2", |c| c.kv_wire == Some(Fp8::E5m2)),
    ("all of these at once", |c| {
        c.softcap > 0.0
            && !c.slopes.is_empty()
            && c.dropout > 0.0
            && c.sinks.is_some()
            && c.bias.is_some()
    }),
    ("latents instead of keys and values (MLA), and their gradients", |c| c.latent.is_some()),
];

fn sliced(c: &Case) -> bool {
    !c.slices.is_empty()
}

fn packed(c: &Case) -> bool {
    c.format == Format::Thd
}

fn shape(c: &Case) -> Option<[bool; 3]> {
    c.bias.map(|b| [b.batch, b.heads, b.queries])
}

/// Runs a feature's smallest case on every communication type, in bf16 over four ranks; the row of the table.
fn row(name: &str, has: Has) -> String {
    let tokens = |c: &&Case| c.tokens(Side::Query) + c.tokens(Side::Key);
    // More than some tokens, so that every rank has some.
    let least = |c: &&Case| (sliced(c), tokens(c));
    let case = cases().iter().filter(|c| has(c) && tokens(c) >= 40).min_by_key(least);
    let case = case.unwrap_or_else(|| panic!("{name}: no case of the corpus has it"));
    let cells = CommType::ALL.map(|comm| {
        let run = Run::plain(case, 4, comm, DType::Bf16);
        run.check().unwrap_or_else(|e| panic!("{name}, {}: {e}", comm.name()));
        "yes"
    });
    format!("| {name} | {} |\n", cells.join(" | "))
}

/// A configuration that is refused, and why that is right, in a line.
type Refusal = (&'static str, fn(&mut cp_attention_config, &mut cp_comm_config), &'static str);

const REFUSED: &[Refusal] = &[
    (
        "a KV cache",
        |c, _| c.flags |= CP_ATTENTION_KV_CACHE,
        "decoding is another problem, with other libraries",
    ),
    (
        "moving queries instead of keys",
        |_, m| m.flags |= CP_COMM_MOVE_QUERIES,
        "keys are the smaller half with GQA, and one way is enough",
    ),
    (
        "more than two exchange levels",
        |_, m| (m.comm_type, m.level_count, m.level_sizes) = (CP_COMM_A2A_P2P, 3, [2, 2, 1, 0]),
        "stages already go to any distance directly",
    ),
    (
        "the gradient of a 111s bias",
        |c, _| c.bias = CP_BIAS | CP_BIAS_GRADIENT,
        "TransformerEngine has none either; it is a sum over queries of one that is offered",
    ),
    (
        "a bias for each head or entry but not each query",
        |c, _| c.bias = CP_BIAS | CP_BIAS_HEADS,
        "expand it: strides of 0 are allowed",
    ),
    (
        "latents on CUDA",
        |c, _| (c.device_type, c.latent_dim) = (CP_DEVICE_CUDA, 128),
        "the kernels are not written yet",
    ),
    (
        "latents in 8 bits on the wire",
        |c, _| (c.latent_dim, c.kv_wire) = (128, CP_KV_WIRE_E4M3),
        "latents are small already, and their error would reach every head",
    ),
    (
        "latents with fewer key than query heads",
        |c, _| (c.latent_dim, c.latent_rope, c.kv_heads) = (128, 32, 2),
        "latents are expanded for every query head; that is what they are for",
    ),
    (
        "head dimensions that are no multiple of 8, or beyond 256",
        |c, _| c.head_dim_qk = 12,
        "16-byte rows; pad with zeros",
    ),
];

fn refused(&(what, change, why): &Refusal) -> String {
    // SAFETY: all zero is a valid value of these plain structs.
    let (mut config, mut comm): (cp_attention_config, cp_comm_config) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    config.struct_size = size_of::<cp_attention_config>() as u32;
    (config.heads, config.head_dim_qk, config.dtype) = (4, 64, CP_DTYPE_BF16);
    comm.struct_size = size_of::<cp_comm_config>() as u32;
    // SAFETY: both structs are whole.
    let ask = |config: &cp_attention_config, comm: &cp_comm_config| unsafe {
        cp_query_support(config, comm, 4)
    };
    assert_eq!(ask(&config, &comm), CP_OK);
    change(&mut config, &mut comm);
    assert_ne!(ask(&config, &comm), CP_OK, "{what} is not refused");
    // SAFETY: the text lives until this thread's next call that fails.
    let last = || unsafe { CStr::from_ptr(cp_last_error()) }.to_str().unwrap().to_string();
    let text = last();
    let mut attention = std::ptr::null_mut();
    // SAFETY: the struct is whole; a layer that is made is destroyed below.
    if unsafe { cp_attention_create(&config, &mut attention) } != CP_OK {
        assert_eq!(last(), text, "the call says otherwise");
    } else {
        // SAFETY: just made.
        unsafe { cp_attention_destroy(attention) };
    }
    format!("| {what} | {text} | {why} |\n")
}

#[test]
fn tables_are_what_runs_and_calls_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let names = CommType::ALL.map(|c| format!("`{}`", c.name())).join(" | ");
    let mut fresh = format!("| forward and backward | {names} |\n|---|---|---|---|---|\n");
    FEATURES.iter().for_each(|(name, has)| fresh += &row(name, *has));
    fresh += "\n| refused | with these words | because |\n|---|---|---|\n";
    REFUSED.iter().for_each(|r| fresh += &refused(r));
    let (begin, end) = ("<!-- support tables -->\n", "<!-- end of the support tables -->");
    let from = readme.find(begin).expect("the mark") + begin.len();
    let to = readme.find(end).expect("the end mark");
    if std::env::var_os("CP_BLESS").is_some() {
        std::fs::write(&path, format!("{}{fresh}{}", &readme[..from], &readme[to..])).unwrap();
    } else {
        assert_eq!(&readme[from..to], fresh, "run the test with CP_BLESS=1");
    }
}
