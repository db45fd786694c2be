"""The corpus' float64 oracle and contract (bindings/python/tests/corpus.py) for sequences whose scores do not fit into memory: the same two functions on
blocks of queries and the keys that these can see. What every tensor should be, and how far off each of its blocks may be, is kept in files."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from corpus import DTYPES, EPSILON, LSE_BOUND, SHAPES, _exact, _plain

QUERIES = 256  # of a block
ROWS = 64  # of a tensor that share a bound
TE = {"bfloat16": (2.5e-2, 3.5e-2), "float16": (5e-3, 5e-3)}  # TransformerEngine's atol = rtol: as many key heads as query heads, fewer


def inputs(setup):
    """Global Q, K, V, dO as [token, head, dim], and the bias, in storage type, NaN where nobody may look; sinks in fp32."""
    case, made = setup.case, {}
    dtype = DTYPES[setup.dtype]
    wide = (("q", "q", case.heads, case.dim_qk), ("k", "k", case.kv_heads, case.dim_qk), ("v", "k", case.kv_heads, case.dim_v), ("d_out", "q", case.heads, case.dim_v))
    for name, side, heads, dim in wide:
        random, alive = setup.random(name), case.is_true(side)
        made[name] = np.full((len(alive), heads, dim), np.nan, dtype)
        for rows in np.array_split(np.flatnonzero(alive), max(len(alive) // 256, 1)):
            made[name][rows] = random.standard_normal((len(rows), heads, dim), np.float32).clip(-1, 1).astype(dtype)
    made["sinks"] = setup.random("sinks").standard_normal(case.heads, np.float32) if setup.learnable else np.zeros(case.heads, np.float32)
    if case.bias:
        random, bias = setup.random("bias"), np.full(case.bias_shape(), np.nan, dtype)
        for seq in range(len(case.q) if case.bias[0] != "1" or case.format == "thd" else 1):
            for head in range(case.heads if case.bias[1] != "1" else 1):
                block = case.bias_block(bias, seq, head)
                block[...] = random.standard_normal(block.shape, np.float32).astype(dtype)
        made["bias"] = bias
    return made


def has_d_bias(case):
    return case.bias is not None and case.bias[2] != "1"


def block_rows(alive):
    """The rows that share a bound: 64 live ones, the last block with the remainder."""
    live = np.flatnonzero(alive)
    starts = np.arange(max(len(live) // ROWS, 1)) * ROWS if len(live) else np.zeros(0, int)
    return live, starts


def norms(values, starts):
    """Of blocks of rows that begin at `starts`."""
    return np.sqrt(np.add.reduceat(np.square(values, dtype=np.float64).sum(axis=-1), starts)) if len(starts) else np.zeros(0)


class Oracle:
    """What a setup's results should be. Tensors lie as [head, token, dim], fp32: 2^-24 is nothing beside the bounds of 16-bit types."""

    def __init__(self, setup, given, cache):
        self.setup, self.case = setup, setup.case
        self.folder = cache / setup.name
        if not (self.folder / "done").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self._compute(given)
            (self.folder / "done").write_text(json.dumps({"setup": setup.name}))
        self.small = dict(np.load(self.folder / "small.npz"))

    def forget(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def right(self, name):
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def _new(self, name, shape):
        return np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.float32, shape)

    def _compute(self, given):
        case, dtype = self.case, DTYPES[self.setup.dtype]
        alive = {side: case.is_true(side) for side in "qk"}
        blocks = {side: block_rows(alive[side]) for side in "qk"}
        tensors = {name: self._new(name, (getattr(case, h), case.tokens(side), getattr(case, d))) for name, (side, h, d) in SHAPES.items()}
        bounds = {name: np.zeros((getattr(case, h), len(blocks[side][1]))) for name, (side, h, _) in SHAPES.items()}
        lse = np.full((case.heads, case.tokens("q")), -np.inf)
        max_logit, d_sinks, d_sinks_terms = np.full(case.heads, -np.inf), np.zeros(case.heads), np.zeros(case.heads)
        sinks = given["sinks"] if case.sinks else np.full(case.heads, -np.inf, np.float32)
        d_bias = {part: self._new(name, case.bias_shape()) for part, name in (("right", "d_bias"), ("terms", "x"), ("plain", "y"))} if has_d_bias(case) else {}
        lock = threading.Lock()

        def of_key_head(kv):
            group = case.heads // case.kv_heads
            keys_sum = {(part, name): np.zeros((case.tokens("k"), getattr(case, d))) for part in ("right", "terms", "plain") for name, d in (("dk", "dim_qk"), ("dv", "dim_v"))}
            for head in range(kv * group, (kv + 1) * group):
                rows_sum = {(part, name): np.zeros((case.tokens("q"), getattr(case, d))) for part in ("right", "terms", "plain") for name, d in (("out", "dim_v"), ("dq", "dim_qk"))}
                for seq, queries, keys in pieces(case):
                    first_q, first_k = (list(case.spans(side))[seq][0] for side in "qk")
                    rows, cols = (slice(first + s.start, first + s.stop) for first, s in ((first_q, queries), (first_k, keys)))
                    sees = case.sees(seq, queries, keys)
                    at_bias = (queries if case.bias and case.bias[2] != "1" else slice(None), keys)
                    shift = case.bias_block(given["bias"], seq, head)[at_bias].astype(np.float64) if case.bias else np.zeros(1)
                    one = [given["q"][rows, head], given["k"][cols, kv], given["v"][cols, kv], given["d_out"][rows, head]]
                    score = (sees, np.True_, shift, sinks[head], case)
                    right, terms = _exact(*(x.astype(np.float64) for x in one), *score)
                    plain = _plain(*(x.astype(np.float32) for x in one), *score, dtype)
                    lse[head, rows] = right["lse"]
                    max_logit[head] = max(max_logit[head], right["max_logit"])
                    d_sinks[head] += right["d_sinks"]
                    d_sinks_terms[head] += terms["d_sinks"]
                    for part, values in (("right", right), ("terms", terms), ("plain", plain)):
                        for name in ("dk", "dv"):
                            if name in values:
                                keys_sum[part, name][cols] += values[name]
                        for name in ("out", "dq"):
                            rows_sum[part, name][rows] += values[name]
                        if d_bias:
                            with lock:
                                case.bias_block(d_bias[part], seq, head)[at_bias] += values["dx"]
                for name in ("out", "dq"):
                    finish(name, head, *(rows_sum[part, name] for part in ("right", "terms", "plain")))
            for name in ("dk", "dv"):
                finish(name, kv, *(keys_sum[part, name] for part in ("right", "terms", "plain")))

        def finish(name, head, right, terms, plain):
            live, starts = blocks[SHAPES[name][0]]
            plain = plain.astype(np.float32).astype(dtype).astype(np.float64)
            tensors[name][head] = right
            bounds[name][head] = self._bound(2 if name == "out" else 3, right[live], terms[live], plain[live], starts)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(of_key_head, range(case.kv_heads)))
        small = {f"bound_{name}": bound for name, bound in bounds.items()}
        small |= {"lse": lse, "max_logit": max_logit, "d_sinks": d_sinks, "bound_d_sinks": (EPSILON[self.setup.dtype] + 1e-6) * d_sinks_terms}
        if d_bias:
            keys = case.bias_shape()[3]
            right, terms, plain = (d_bias[part].reshape(-1, keys) for part in ("right", "terms", "plain"))
            bound = []
            for first in range(0, len(right), ROWS):
                at = slice(first, first + ROWS)
                rounded = plain[at].astype(dtype).astype(np.float64)
                bound += [*self._bound(3, right[at].astype(np.float64), terms[at].astype(np.float64), rounded, np.zeros(1, int))]
                right[at][terms[at] == 0] = np.nan  # nobody uses it: it must be 0
            small["bound_d_bias"] = np.array(bound)
        for array in (*tensors.values(), *d_bias.values()):
            array.flush()
        for name in ("x", "y"):
            (self.folder / f"{name}.npy").unlink(missing_ok=True)
        np.savez(self.folder / "small.npz", **small)

    def _bound(self, factor, right, terms, plain, starts):
        return factor * norms(plain - right, starts) + 4 * EPSILON[self.setup.dtype] * norms(right, starts) + 1e-7 * norms(terms, starts)

    def compare(self, got):
        """Of every tensor: its largest error as a share of what the contract allows, its largest relative L2 error of a head, and its largest error as a
        share of what TransformerEngine allows. More than 1, or NaN, has failed."""
        case, found = self.case, {}
        tolerance = TE[self.setup.dtype][case.heads != case.kv_heads]
        with ThreadPoolExecutor(2) as pool:
            for name, (side, _, _) in SHAPES.items():
                right, bound, alive = self.right(name), self.small[f"bound_{name}"], case.is_true(side)
                of_head = lambda head: judge(got[name][:, head], right[head], bound[head], alive, tolerance)
                found[name] = worst(pool.map(of_head, range(len(right))))
            if has_d_bias(case):
                keys = case.bias_shape()[3]
                values, right, bound = got["d_bias"].reshape(-1, keys), self.right("d_bias").reshape(-1, keys), self.small["bound_d_bias"]
                step = 64 * ROWS
                of_rows = lambda first: judge_bias(values[first : first + step], right[first : first + step], bound[first // ROWS :][:64], tolerance)
                found["d_bias"] = worst(pool.map(of_rows, range(0, len(right), step)))
        right = self.small["lse"]
        alive = np.isfinite(right)
        error = abs(got["lse"].T.astype(np.float64)[alive] - right[alive]).max()
        found["lse"] = (error / LSE_BOUND if np.all(got["lse"].T[~alive] == -np.inf) else np.inf, 0, 0)
        for name, bound in (("max_logit", LSE_BOUND), ("d_sinks", self.small["bound_d_sinks"])):
            if name in got:
                values, right = got[name].astype(np.float64), self.small[name]
                error = abs(values - right)
                found[name] = ((error / bound).max(), relative(error, right), (error / (tolerance + tolerance * abs(right))).max())
        return found


def worst(judged):
    return tuple(np.max([*judged], axis=0).tolist())


def share(error, bound):
    """0 where there is nothing to be wrong."""
    return np.where((error == 0) & (bound == 0), 0, error / np.where(bound == 0, np.finfo(float).tiny, bound))


def relative(error, right):
    length = np.linalg.norm(right)
    return np.linalg.norm(error) / length if length else np.inf if error.any() else 0.0


def judge(values, right, bound, alive, tolerance):
    live, starts = block_rows(alive)
    values, right = values.astype(np.float64), right.astype(np.float64)
    if not np.all(values[~alive] == 0):
        return np.inf, np.inf, np.inf
    values, right = values[live], right[live]
    error = values - right
    return share(norms(error, starts), bound).max(), relative(error, right), (abs(error) / (tolerance + tolerance * abs(right))).max()


def judge_bias(values, right, bound, tolerance):
    values, right = values.astype(np.float64), right.astype(np.float64)
    unused = np.isnan(right)
    if not np.all(values[unused] == 0):
        return np.inf, np.inf, np.inf
    right[unused] = 0
    error, starts = values - right, np.arange(0, len(right), ROWS)
    return share(norms(error, starts), bound).max(), relative(error, right), (abs(error) / (tolerance + tolerance * abs(right))).max()


def pieces(case):
    """(sequence, queries, keys that any of these sees), as slices within the sequence. Queries without a key are in none; here there are none."""
    for seq, (q, k) in enumerate(zip(case.q, case.k)):
        for first in range(0, q.len, QUERIES):
            last = min(first + QUERIES, q.len)
            low = 0 if case.left is None else max(first - case.left, 0)
            high = last if case.causal else k.len if case.right is None else min(last + case.right, k.len)
            yield seq, slice(first, last), slice(low, high)
