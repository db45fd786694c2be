"""The corpus tests/data/cases.csv, its inputs, the float64 oracle, plain attention and the error metric, as tests/data/README.md defines them."""

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

import context_parallel as cp

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
FP8 = {"e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2": np.dtype(ml_dtypes.float8_e5m2)}
EPSILON = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
LSE_BOUND = 1e-5
SEED = 0x0123456789ABCDEF  # key of the corpus' dropout


@dataclass(frozen=True)
class Extent:
    before: int
    len: int
    padded: int


@dataclass(frozen=True)
class Case:
    name: str
    tags: tuple
    format: str
    q: tuple  # an Extent for every sequence
    k: tuple
    heads: int
    kv_heads: int
    dim_qk: int
    dim_v: int
    causal: bool
    bottom_right: bool
    left: int | None
    right: int | None
    partition: str
    scale: float | None
    softcap: float | None
    alibi: bool
    bias: str | None  # its axes [batch, heads, queries, keys], 1 where one is for all
    dropout: float
    sinks: str | None
    max_logit: str | None
    slices: tuple = ()  # (sequence, (q begin, q end), (k begin, k end), lo, hi); none: the layer's mask alone
    kv_wire: str | None = None  # how keys and values travel
    latent: tuple | None = None  # elements of c, of r

    def side(self, side):
        return self.q if side == "q" else self.k

    def tokens(self, side):
        return sum(e.padded for e in self.side(side))

    def spans(self, side):
        """(first true token, number of true tokens) of every sequence, among all tokens."""
        first = 0
        for extent in self.side(side):
            yield first + extent.before, extent.len
            first += extent.padded

    def is_true(self, side):
        """Which tokens are no padding."""
        found = np.zeros(self.tokens(side), bool)
        for first, length in self.spans(side):
            found[first : first + length] = True
        return found

    def after_diagonal(self, seq, queries=slice(None), keys=slice(None)):
        """How many keys a key is after the diagonal of a query: [query, key]."""
        i, j = np.ogrid[: self.q[seq].len, : self.k[seq].len]
        i, j = i[queries], j[:, keys]
        return j - i - (self.k[seq].len - self.q[seq].len if self.bottom_right else 0)

    def sees(self, seq, queries=slice(None), keys=slice(None)):
        """Who sees whom in one sequence: [query, key]. This is the definition of the mask."""
        after = self.after_diagonal(seq, queries, keys)
        allowed = np.ones(after.shape, bool)
        if self.causal:
            allowed &= after <= 0
        if self.left is not None:
            allowed &= after >= -self.left
        if self.right is not None and not self.causal:
            allowed &= after <= self.right
        if self.slices:
            i, j = np.ogrid[: self.q[seq].len, : self.k[seq].len]
            i, j = i[queries], j[:, keys]
            inside = np.zeros(allowed.shape, bool)
            for _, q, k, lo, hi in (s for s in self.slices if s[0] == seq):
                one = (q[0] <= i) & (i < q[1]) & (k[0] <= j) & (j < k[1])
                if lo is not None:
                    one &= j - i >= lo
                if hi is not None:
                    one &= j - i <= hi
                inside |= one
            allowed &= inside
        return allowed

    def slopes(self):
        """ALiBi: a slope for every query head."""
        return np.float32(2) ** -(1 + np.arange(self.heads, dtype=np.float32) % 6) if self.alibi else np.zeros(self.heads, np.float32)

    def sequence_ids(self):
        """The caller's numbers of the sequences."""
        return [7 * seq + 3 for seq in range(len(self.q))]

    def keeps(self, seq, head):
        """Which weights dropout keeps: [query, key]."""
        i, j = np.ogrid[: self.q[seq].len, : self.k[seq].len]
        words = philox(SEED, (j // 4, i, head, self.sequence_ids()[seq]))
        return np.choose(j % 4, words) >= np.floor(np.float64(np.float32(self.dropout)) * 2**32)

    def bias_shape(self):
        """Of the global bias."""
        padded = [max(e.padded for e in side) for side in (self.q, self.k)]
        extents = (len(self.q), self.heads, self.tokens("q") if self.format == "thd" else padded[0], padded[1])
        return tuple(1 if axis == "1" else n for axis, n in zip(self.bias, extents))

    def bias_block(self, bias, seq, head):
        """One head of one sequence of a global bias, or of what is shaped like it, true tokens only: a view, [query, key]; of one query if that is for all."""
        q, k = self.q[seq], self.k[seq]
        rows = slice(None)
        if self.bias[2] != "1":
            first = q.before + (sum(e.padded for e in self.q[:seq]) if self.format == "thd" else 0)
            rows = slice(first, first + q.len)
        return bias[seq if self.bias[0] != "1" else 0, head if self.bias[1] != "1" else 0, rows, k.before : k.before + k.len]

    def factor(self):
        """The softmax scale: an fp32 number."""
        return np.float32(self.scale) if self.scale is not None else np.float32(1) / np.sqrt(np.float32(self.dim_qk))

    def sequences(self, ranks):
        lists = {"slices": self.slices or None}
        if self.partition == "list":
            lists |= {"stretches": self.stretches(ranks, "q"), "stretches_k": self.stretches(ranks, "k")}
        if self.format == "thd":
            cumulated = lambda lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            lens, padded = [], []
            for side in (self.q, self.k):
                assert not any(e.before for e in side), "left padding of packed sequences"
                lens.append(cumulated([e.len for e in side]))
                padded.append(cumulated([e.padded for e in side]))
            return cp.Sequences.packed(lens[0], lens[1], padded=padded[0], padded_k=padded[1], **lists)
        pick = lambda side, name: [getattr(e, name) for e in side]
        return cp.Sequences.dense(
            len(self.q), self.q[0].padded, self.k[0].padded, lens=pick(self.q, "len"), lens_k=pick(self.k, "len"),
            before=pick(self.q, "before"), before_k=pick(self.k, "before"), **lists)  # fmt: skip

    def stretches(self, ranks, side):
        """The corpus' own partition: blocks of 5 positions, dealt by a hash; odd ranks hold a sequence's blocks in descending order."""
        of_ranks = [[] for _ in range(ranks)]
        for seq, extent in enumerate(self.side(side)):
            document = seq if self.format == "thd" else 0
            of_seq = [[] for _ in range(ranks)]
            for block in range(-(-extent.padded // 5)):
                rank = int(mix((side == "k") * 2**62 + document * 2**31 + block)) % ranks
                of_seq[rank].append((seq, block * 5, 1, min(5, extent.padded - block * 5)))
            for rank in range(ranks):
                of_ranks[rank] += of_seq[rank][::-1] if rank % 2 else of_seq[rank]
        return of_ranks

    def layer(self, dtype, **options):
        """The Attention layer that computes this case."""
        settings = dict(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=self.dim_qk, head_dim_v=self.dim_v, dtype=dtype, causal=self.causal,
            bottom_right=self.bottom_right, window=(self.left, self.right), format=self.format, partition=self.partition, softmax_scale=self.scale,
            softcap=self.softcap, alibi=self.slopes() if self.alibi else None,
            bias=self.bias, dropout=self.dropout, sinks=self.sinks, max_logit=self.max_logit, kv_wire=self.kv_wire, latent=self.latent)  # fmt: skip
        return cp.Attention(**{**settings, **options})


@functools.cache
def cases():
    """All cases by name, in file order."""
    with open(ROOT / "tests/data/cases.csv", newline="") as file:
        return {row["name"]: _case(row) for row in csv.DictReader(file)}


def _case(row):
    batch = int(row["batch"])

    def values(text, absent):
        if text == "-":
            return absent
        numbers = [int(n) for n in text.split()]
        return numbers * batch if len(numbers) == 1 else numbers

    def side(name):
        lens = values(row[f"lens_{name}"], None)
        padded = values(row[f"padded_{name}"], lens)
        before = values(row[f"before_{name}"], [0] * batch)
        assert len(lens) == len(padded) == len(before) == batch, row["name"]
        return tuple(Extent(*e) for e in zip(before, lens, padded))

    limit = lambda name: None if row[name] == "-" else int(row[name])
    flag = lambda name: {"0": False, "1": True}[row[name]]
    numbers = (int(row[name]) for name in ("heads", "kv_heads", "dim_qk", "dim_v"))
    maybe = lambda name, kind=float: None if row[name] == "-" else kind(row[name])
    score = (maybe("softcap"), flag("alibi"), maybe("bias", str), maybe("dropout") or 0.0, maybe("sinks", str), maybe("max_logit", str))
    latent = maybe("latent", lambda text: tuple(int(n) for n in text.split(":")))
    return Case(row["name"], tuple(row["tags"].split()), row["format"], side("q"), side("k"), *numbers, flag("causal"), flag("bottom_right"),
                limit("window_left"), limit("window_right"), row["partition"], maybe("scale"), *score, _slices(row["slices"]),
                maybe("kv_wire", str), latent)  # fmt: skip


def _slices(text):
    """`seq/q0:q1/k0:k1`, some with `/lo:hi`."""
    made = []
    for one in [] if text == "-" else text.split():
        seq, q, k, *band = one.split("/")
        pair = lambda words: tuple(int(n) if n else None for n in words.split(":"))
        made.append((int(seq), pair(q), pair(k), *(pair(band[0]) if band else (None, None))))
    return tuple(made)


def mix(n):
    with np.errstate(over="ignore"):
        z = (np.asarray(n, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def philox(key, counter):
    """Philox4x32-10 (Salmon et al., SC 2011): four arrays of random words for a counter of four arrays."""
    x = [np.asarray(word, np.uint64) for word in counter]
    low, weyl = 0xFFFFFFFF, (0x9E3779B9, 0xBB67AE85)
    for turn in range(10):
        k = [np.uint64(((key >> 32 * i) + turn * weyl[i]) & low) for i in range(2)]
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [b >> np.uint64(32) ^ x[1] ^ k[0], b & np.uint64(low), a >> np.uint64(32) ^ x[3] ^ k[1], a & np.uint64(low)]
    return np.broadcast_arrays(*x)


def elements(id, count):
    """The first elements of the flattened global tensor `id`, fp32."""
    z = mix(np.arange(count, dtype=np.uint64) + np.uint64(id << 40))
    quarters = sum((z >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
    return ((quarters.astype(np.int64) - 131070) / 32768).astype(np.float32)


@functools.lru_cache(maxsize=8)
def inputs(case, dtype):
    """Global Q, K, V, dO as [token, head, dim] in storage type; padding is NaN. Sinks: fp32. The bias, NaN where nobody uses it."""
    made = {}
    query, key = ("q", case.heads), ("k", case.kv_heads)
    wide = (("q", *query, case.dim_qk), ("k", *key, case.dim_qk), ("v", *key, case.dim_v), ("d_out", *query, case.dim_v))
    for id, (name, side, heads, dim) in enumerate(wide, start=1):
        values = elements(id, case.tokens(side) * heads * dim).reshape(-1, heads, dim)
        values[~case.is_true(side)] = np.nan
        made[name] = values.astype(DTYPES[dtype])
    made["sinks"] = elements(5, case.heads)
    if case.latent:
        made |= _latents(case, dtype)
    if case.bias:
        shape = case.bias_shape()
        used = np.zeros(shape, bool)
        for seq in range(len(case.q)):
            for head in range(case.heads if case.q[seq].len else 0):
                case.bias_block(used, seq, head)[...] = True
        made["bias"] = np.where(used, elements(6, used.size).reshape(shape), np.float32(np.nan)).astype(DTYPES[dtype])
    return made


def _latents(case, dtype):
    """Latents [token, 1, c and r], weights [head, rows, c], and K and V as they are made of them, in storage type."""
    (dim, rope), eighths = case.latent, lambda id, count: np.floor(8 * elements(id, count) + np.float32(0.5)) / 8
    scale = np.float32(0.5) ** next(s for s in range(32) if 4**s >= dim)
    weights = lambda id, rows: (scale * eighths(id, case.heads * rows * dim)).reshape(case.heads, rows, dim)
    latent = eighths(7, case.tokens("k") * (dim + rope)).reshape(-1, 1, dim + rope)
    latent[~case.is_true("k")] = np.nan
    up_k, up_v = weights(8, case.dim_qk - rope), weights(9, case.dim_v)
    c, r = latent[:, 0, :dim].astype(np.float64), latent[:, :, dim:].repeat(case.heads, axis=1)
    k, v = (np.einsum("hnd,td->thn", up.astype(np.float64), c) for up in (up_k, up_v))
    made = {"k": np.concatenate([k, r], axis=2), "v": v, "latent": latent, "up_k": up_k, "up_v": up_v}
    return {name: values.astype(np.float32).astype(DTYPES[dtype]) for name, values in made.items()}


def contracted(case, given, dk, dv, size=lambda x: x):
    """The gradients of latents and weights from those of K and V. size: of what they are multiplied by."""
    dim, rope = case.latent
    true, nope = case.is_true("k"), case.dim_qk - rope
    up_k, up_v = (size(given[name].astype(dk.dtype)) for name in ("up_k", "up_v"))
    c = size(np.where(true[:, None], given["latent"][:, 0, :dim].astype(dk.dtype), 0))
    d_c = np.einsum("thn,hnd->td", dk[:, :, :nope], up_k) + np.einsum("thn,hnd->td", dv, up_v)
    d_latent = np.concatenate([d_c, dk[:, :, nope:].sum(axis=1)], axis=1)[:, None]
    return {"d_latent": d_latent, "d_up_k": np.einsum("thn,td->hnd", dk[:, :, :nope], c), "d_up_v": np.einsum("thn,td->hnd", dv, c)}


def attended(rows, format):
    """[token, head, dim] as it is after travelling in an 8-bit format: 32 neighbours share the smallest power of two with which none is too large."""
    dim, dtype, to = rows.shape[-1], rows.dtype, FP8[format]
    x = np.zeros((*rows.shape[:-1], -(-dim // 32) * 32), np.float32)
    x[..., :dim] = rows
    x = x.reshape(*x.shape[:-1], -1, 32)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    x = np.where(finite, x, 0)
    largest = abs(x).max(axis=-1, keepdims=True)
    # frexp's number is below 1, so this is the power of two with which the largest number has the format's largest exponent, which may be too small.
    power = np.maximum(np.frexp(largest)[1] - 1 - ml_dtypes.finfo(to).maxexp + 1, -127)
    power += ~np.isfinite(np.ldexp(largest, -power).astype(to).astype(np.float32))
    back = np.ldexp(np.ldexp(x, -power).astype(to).astype(np.float64), power)
    most = float(ml_dtypes.finfo(dtype).max)
    back = np.where(finite, np.clip(back, -most, most), np.nan)
    return back.reshape(*rows.shape[:-1], -1)[..., :dim].astype(dtype)

SHAPES = {"out": ("q", "heads", "dim_v"), "dq": ("q", "heads", "dim_qk"), "dk": ("k", "kv_heads", "dim_qk"), "dv": ("k", "kv_heads", "dim_v")}


@dataclass
class Reference:
    right: dict  # name -> [token, head, dim], float64; "lse": [token, head]; "d_sinks", "max_logit": [head]; "d_bias"
    terms: dict  # the same sums with every term made positive
    plain: dict
    seen: np.ndarray  # which key tokens any query sees
    looks: np.ndarray  # which query tokens see something


@functools.lru_cache(maxsize=8)
def reference(case, dtype):
    given = inputs(case, dtype)
    if case.kv_wire:
        given = {**given, **{name: attended(given[name], case.kv_wire) for name in ("k", "v")}}
    empty = lambda: {name: np.zeros((case.tokens(side), getattr(case, h), getattr(case, d))) for name, (side, h, d) in SHAPES.items()}
    made = Reference(empty(), empty(), empty(), np.zeros(case.tokens("k"), bool), np.zeros(case.tokens("q"), bool))
    made.right["lse"] = np.full((case.tokens("q"), case.heads), -np.inf)
    made.right["max_logit"], made.right["d_sinks"], made.terms["d_sinks"] = np.full(case.heads, -np.inf), np.zeros(case.heads), np.zeros(case.heads)
    if case.bias:
        for part in (made.right, made.terms, made.plain):
            part["d_bias"] = np.zeros(case.bias_shape())
    sinks = given["sinks"] if case.sinks else np.full(case.heads, -np.inf, np.float32)
    for seq, ((first_q, len_q), (first_k, len_k)) in enumerate(zip(case.spans("q"), case.spans("k"))):
        made.right["lse"][first_q : first_q + len_q] = sinks
        if len_q == 0 or len_k == 0:
            continue
        rows, keys = slice(first_q, first_q + len_q), slice(first_k, first_k + len_k)
        sees = case.sees(seq)
        made.seen[keys], made.looks[rows] = sees.any(axis=0), sees.any(axis=1)
        for head in range(case.heads):
            kv = head // (case.heads // case.kv_heads)
            at = {"out": (rows, head), "dq": (rows, head), "dk": (keys, kv), "dv": (keys, kv), "lse": (rows, head)}
            one = [given[name][at[place]] for name, place in (("q", "out"), ("k", "dk"), ("v", "dk"), ("d_out", "out"))]
            kept = case.keeps(seq, head) if case.dropout else np.ones(sees.shape, bool)
            shift = -abs(case.after_diagonal(seq)) * case.slopes()[head].astype(np.float64)
            if case.bias:
                shift = shift + case.bias_block(given["bias"], seq, head).astype(np.float64)
            score = (sees, kept, shift, sinks[head], case)
            right, terms = _exact(*(x.astype(np.float64) for x in one), *score)
            plain = _plain(*(x.astype(np.float32) for x in one), *score, DTYPES[dtype])
            made.right["lse"][at["lse"]] = right.pop("lse")
            made.right["max_logit"][head] = max(made.right["max_logit"][head], right.pop("max_logit"))
            made.right["d_sinks"][head] += right.pop("d_sinks")
            made.terms["d_sinks"][head] += terms.pop("d_sinks")
            for part, values in ((made.right, right), (made.terms, terms), (made.plain, plain)):
                dx = values.pop("dx")
                if case.bias:
                    case.bias_block(part["d_bias"], seq, head)[...] += dx if case.bias[2] != "1" else dx.sum(axis=0)
                for name in SHAPES:
                    part[name][at[name]] += values[name]
    for name in made.plain:
        made.plain[name] = made.plain[name].astype(np.float32).astype(DTYPES[dtype]).astype(np.float64)
    if case.latent:
        made.right |= contracted(case, given, made.right["dk"], made.right["dv"])
        made.terms |= contracted(case, given, made.terms["dk"], made.terms["dv"], abs)
        plain = contracted(case, given, made.plain["dk"].astype(np.float32), made.plain["dv"].astype(np.float32))
        made.plain |= {**plain, "d_latent": plain["d_latent"].astype(DTYPES[dtype]).astype(np.float64)}
    return made


def _scores(q, k, scale, sees, shift, softcap):
    """Scores, and their derivatives by scale·q·k, in the type of q."""
    scores, slopes = scale * (q @ k.T), q.dtype.type(1)
    if softcap:
        cap = q.dtype.type(softcap)
        t = np.tanh(scores / cap)
        scores, slopes = cap * t, 1 - t * t
    return np.where(sees, scores + shift.astype(q.dtype), q.dtype.type(-np.inf)), slopes


def _exact(q, k, v, d_out, sees, kept, shift, sink, case):
    """One head of one sequence in float64. shift: what ALiBi and the bias add."""
    scale, sink = float(case.factor()), float(sink)
    scores, slopes = _scores(q, k, scale, sees, shift, None if case.softcap is None else np.float32(case.softcap))
    top = np.maximum(scores.max(axis=1), sink)
    blind = top == -np.inf
    top = np.where(blind, 0, top)
    with np.errstate(divide="ignore"):
        lse = top + np.log(np.exp(scores - top[:, None]).sum(axis=1) + np.exp(sink - top))
    p = np.where(sees, np.exp(scores - np.where(blind, 0, lse)[:, None]), 0)
    kept = kept / (1 - float(np.float32(case.dropout)))
    out = (kept * p) @ v
    delta, delta_terms = (out * d_out).sum(axis=1), abs(out * d_out).sum(axis=1)
    of_sink = np.exp(sink - np.where(blind, 0, lse))
    dx = p * (kept * (d_out @ v.T) - delta[:, None])
    dx_terms = p * (kept * (abs(d_out) @ abs(v).T) + delta_terms[:, None])
    ds, ds_terms = scale * slopes * dx, abs(scale) * slopes * dx_terms
    right = {"out": out, "lse": lse, "dq": ds @ k, "dk": ds.T @ q, "dv": (kept * p).T @ d_out, "dx": dx, "d_sinks": -(of_sink * delta).sum()}
    terms = {"out": (kept * p) @ abs(v), "dq": ds_terms @ abs(k), "dk": ds_terms.T @ abs(q), "dv": (kept * p).T @ abs(d_out)}
    return {**right, "max_logit": scores.max()}, {**terms, "dx": dx_terms, "d_sinks": (of_sink * delta_terms).sum()}


def _plain(q, k, v, d_out, sees, kept, shift, sink, case, dtype):
    """What a careful single-rank implementation computes: fp32, with P and dS rounded to the storage type before the products."""
    rounded = lambda x: x.astype(dtype).astype(np.float32)
    scale = case.factor()
    scores, slopes = _scores(q, k, scale, sees, shift, case.softcap)
    top = np.maximum(scores.max(axis=1), sink)
    blind = top == -np.inf
    top = np.where(blind, np.float32(0), top)
    kept = kept * (1 / (1 - np.float32(case.dropout)))
    p = np.exp(scores - top[:, None])
    total = np.where(blind, np.float32(1), p.sum(axis=1) + np.exp(sink - top))
    out = rounded((rounded(kept * p) @ v) / total[:, None])
    p = np.where(sees, np.exp(scores - (top + np.log(total))[:, None]), np.float32(0))
    dx = p * (kept * (d_out @ v.T) - (out * d_out).sum(axis=1)[:, None])
    ds = rounded(dx * slopes)
    return {"dx": dx, "out": out, "dq": scale * (ds @ k), "dk": scale * (ds.T @ q), "dv": rounded(kept * p).T @ d_out}


def shapes(case):
    """Those of SHAPES that a layer gives: gradients of K and V only if they are given."""
    return {name: shape for name, shape in SHAPES.items() if not (case.latent and name in ("dk", "dv"))}


def check(case, dtype, got):
    """Global results against the contract: name -> [token, head, dim], lse [token, head], d_sinks and max_logit [head]. Returns the largest error as a
    share of its bound."""
    ref, worst = reference(case, dtype), 0.0
    finite = np.isfinite(ref.right["lse"])
    lse = got["lse"].astype(np.float64)
    assert np.all(lse[~finite] == -np.inf), f"{case.name} {dtype} lse: not -inf where nothing is seen"
    error = abs(lse[finite] - ref.right["lse"][finite])
    assert np.all(error <= LSE_BOUND), f"{case.name} {dtype} lse: off by {error.max()}"
    # [row, head, dim], and which rows there are: all of those of weights.
    tensors = {name: (got[name], ref.looks if side == "q" else ref.seen) for name, (side, _, _) in SHAPES.items() if name in shapes(case)}
    if case.latent:
        turned = lambda x: x.transpose(1, 0, 2)
        tensors["d_latent"] = (got["d_latent"], ref.seen)
        tensors |= {name: (turned(got[name]), np.ones(got[name].shape[1], bool)) for name in ("d_up_k", "d_up_v")}
    of = lambda part, name: part[name].transpose(1, 0, 2) if "up" in name else part[name]
    for name, (values, alive) in tensors.items():
        values = values.astype(np.float64)
        right, terms, plain = (of(part, name) for part in (ref.right, ref.terms, ref.plain))
        assert values.shape == right.shape, (name, values.shape, right.shape)
        for head in range(values.shape[1]):
            where = f"{case.name} {dtype} {name} head {head}"
            assert np.all(values[~alive, head] == 0), f"{where}: not 0 where there is padding or nothing to see"
            live = np.flatnonzero(alive)
            count = max(len(live) // 64, 1) if len(live) else 0
            for i in range(count):
                rows = live[i * 64 : None if i + 1 == count else (i + 1) * 64]
                norm = lambda x: np.linalg.norm(x[rows, head])
                bound = (2 if name == "out" else 3) * norm(plain - right)
                bound += 4 * EPSILON[dtype] * norm(right) + 1e-7 * norm(terms)
                error = norm(values - right)
                assert error <= bound, f"{where} rows {rows[0]}..{rows[-1]}: error {error:.3e}, allowed {bound:.3e}"
                worst = max(worst, error / bound) if bound else worst
    for name, wanted in (("d_sinks", case.sinks), ("max_logit", case.max_logit)):
        if wanted is None:
            continue
        right = ref.right[name]
        bound = (EPSILON[dtype] + 1e-6) * ref.terms[name] if name == "d_sinks" else np.full(case.heads, LSE_BOUND)
        error = np.where(got[name] == right, 0, abs(got[name] - right))
        assert np.all(error <= bound), f"{case.name} {dtype} {name}: got {got[name]}, right is {right}, allowed ±{bound}"
        worst = max([worst, *(error[bound > 0] / bound[bound > 0])])
    if case.bias and case.bias[2] != "1":
        flat = lambda x: np.asarray(x, np.float64).reshape(-1, case.bias_shape()[3])
        values, right, terms, plain = (flat(x) for x in (got["d_bias"], ref.right["d_bias"], ref.terms["d_bias"], ref.plain["d_bias"]))
        assert np.all(values[terms == 0] == 0), f"{case.name} {dtype} d_bias: not 0 where nobody uses it"
        for first in range(0, len(right), 64):
            norm = lambda x: np.linalg.norm(x[first : first + 64])
            bound = 3 * norm(plain - right) + 4 * EPSILON[dtype] * norm(right) + 1e-7 * norm(terms)
            error = norm(values - right)
            assert error <= bound, f"{case.name} {dtype} d_bias row {first}: error {error:.3e}, allowed {bound:.3e}"
            worst = max(worst, error / bound) if bound else worst
    return worst
