"""Ranks as threads, and the moving of rows between global arrays [token, head, dim] and a rank's own."""

import threading

import numpy as np

import context_parallel as cp
from corpus import DTYPES, SEED, inputs, shapes

# How the axes lie in an array of each format, from [batch, seq, heads, dim].
ORDER = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3)}


def outcomes(groups, work, deadline=120):
    """work(group) on every rank, each in its own thread: results, or exceptions, in rank order."""
    found = [None] * len(groups)

    def run(rank):
        try:
            found[rank] = work(groups[rank])
        except BaseException as error:  # pytest's own failures are no Exceptions
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=deadline)
        assert not thread.is_alive(), "a rank hangs"
    return found


def everywhere(groups, work, deadline=120):
    """work(group) on every rank: results in rank order. If one fails, the others are released and its exception is raised."""

    def guarded(group):
        try:
            return work(group)
        except BaseException:
            group.abort()
            raise

    found = outcomes(groups, guarded, deadline)
    failed = [x for x in found if isinstance(x, BaseException)]
    failed.sort(key=lambda e: isinstance(e, cp.Error) and e.status in (cp.Status.ABORTED, cp.Status.MISMATCH))
    if failed:
        raise failed[0]
    return found


_groups = {}


def thread_groups(ranks):
    """Groups of this many threads; the same ones for as long as nothing fails."""
    made = _groups.pop(ranks, None) or cp.Group.threads(ranks, timeout=60)
    return made


def give_back(groups):
    _groups[len(groups)] = groups


def strided(array):
    """The same values with gaps between rows, heads and batches; between numbers, if it is a list of them."""
    if array.ndim == 0:
        return array
    if array.ndim == 1:
        view = np.full(2 * len(array), np.nan, array.dtype)[::2]
        view[...] = array
        return view
    buffer = np.full([n + 1 for n in array.shape], np.nan, array.dtype)
    view = buffer[tuple(slice(n) for n in array.shape)]
    view[...] = array
    return view


def to_local(case, rows, tokens, format):
    """A rank's rows of a global [token, head, dim] (or [token, head], the LSE) array, in a format. A copy."""
    part = rows[tokens]
    if format == "thd":
        return np.ascontiguousarray(part if part.ndim == 3 else part.T)
    batch = len(case.q)
    part = part.reshape(batch, len(tokens) // batch, *part.shape[1:])
    return np.ascontiguousarray(part.transpose(ORDER[format]) if part.ndim == 4 else part.transpose(0, 2, 1))


def from_local(case, rows, tokens, local, format):
    """The inverse: puts a rank's array into the global one."""
    if format == "thd":
        rows[tokens] = local if local.ndim == 3 else local.T
        return
    local = local.transpose(np.argsort(ORDER[format])) if local.ndim == 4 else local.transpose(0, 2, 1)
    rows[tokens] = local.reshape(len(tokens), *rows.shape[1:])


def bias_rows(case, tokens):
    """Which queries of the global bias a rank's rows are. Batch entries are dealt alike."""
    if case.bias[2] == "1":
        return np.zeros(1, int)
    return tokens if case.format == "thd" else tokens[: len(tokens) // len(case.q)]


def host_buffer(size):
    """Bytes aligned to 64, full of 255: NaN in every type."""
    raw = np.full(size + 64, 255, np.uint8)
    return raw[-raw.ctypes.data % 64 :][:size]


def run_case(group, case, dtype, comm="p2p", *, format=None, view=lambda x: x, preallocate=False, workspace=False, comm_options=None, buffer=host_buffer,
             stream=None, **options):  # fmt: skip
    """Forward and backward of a case on one rank: {"out": (local array, tokens), …}; numbers per head have no tokens. `view` wraps every array that is
    handed over.

    preallocate: outputs, and what forward saves, are given, full of NaN; workspace: it is given, as large as the library says that it must be; both are
    made by `buffer`. With a stream the results are there when the stream is empty.
    """
    format = format or case.format
    sequences = case.sequences(group.size)
    layer = case.layer(dtype, format=format, **options)
    layer.set_group(group, comm, **(comm_options or {}))
    tokens = {side: cp.partition_tokens(case.partition, format, sequences, group.size, group.rank, side) for side in "qk"}
    given = inputs(case, dtype)
    mine = {name: view(to_local(case, given[name], tokens["k" if name in "kv" else "q"], format)) for name in ("q", "k", "v", "d_out")}
    made_of = {}
    if case.latent:
        latent = view(to_local(case, given["latent"], tokens["k"], format))
        made_of = {"latent": latent, **{name: view(given[name].copy()) for name in ("up_k", "up_v")}}
        mine["k"] = mine["v"] = None
    numbers = [name for name, wanted in (("d_sinks", case.sinks), ("max_logit", case.max_logit)) if wanted]
    score = {"sinks": view(given["sinks"].copy())} if case.sinks else {}
    has_d_bias = case.bias is not None and case.bias[2] != "1"
    if case.bias:
        of_bias = bias_rows(case, tokens["q"])
        score["bias"] = view(given["bias"][:, :, of_bias])
    if case.dropout:
        score |= {"dropout_seed": SEED, "sequence_ids": case.sequence_ids()}
    fresh, saved = {}, {}
    if preallocate:
        for name, (side, heads, dim) in shapes(case).items():
            rows = np.full((case.tokens(side), getattr(case, heads), getattr(case, dim)), np.nan, DTYPES[dtype])
            fresh[name] = view(to_local(case, rows, tokens[side], format))
        fresh["lse"] = view(to_local(case, np.full((case.tokens("q"), case.heads), np.nan, np.float32), tokens["q"], format))
        fresh |= {name: view(np.full(case.heads, np.nan, np.float32)) for name in numbers}
        if case.latent:
            fresh["d_latent"] = view(np.full_like(latent, np.nan))
            fresh |= {f"d_{name}": view(np.full(given[name].shape, np.nan, np.float32)) for name in ("up_k", "up_v")}
        if has_d_bias:
            fresh["d_bias"] = view(np.full_like(given["bias"][:, :, of_bias], np.nan))
        saved = {"saved": buffer(size) for size in [layer.report(sequences)["saved"]] if size > 0}
    scratch = None
    if workspace:
        held = (len(cp.partition_tokens(case.partition, format, sequences, group.size, rank, side)) for rank in range(group.size) for side in "qk")
        scratch = buffer(layer.workspace_size(max(held)))
    pick = lambda *names: {"workspace": scratch, "stream": stream, **{name: fresh[name] for name in names if name in fresh}}
    out, lse, context = layer.forward(mine["q"], mine["k"], mine["v"], sequences, **pick("out", "lse", "max_logit"), **saved, **score, **made_of)
    wanted = ("d_latent", "d_up_k", "d_up_v") if case.latent else ("dk", "dv")
    dq, *rest = layer.backward(context, mine["d_out"], **pick("dq", *wanted, "d_sinks", "d_bias"))
    found = {"out": (out, tokens["q"]), "lse": (lse, tokens["q"]), "dq": (dq, tokens["q"])}
    found |= {name: (rest.pop(0), tokens["k"]) for name in wanted}
    found |= {name: ({"d_sinks": rest, "max_logit": [context.max_logit]}[name][0], np.zeros(0, int)) for name in numbers}
    if has_d_bias:
        found["d_bias"] = (rest[-1], of_bias)
    assert len(rest) == ("d_sinks" in found) + has_d_bias and (context.max_logit is not None) == ("max_logit" in found)
    for name, (array, _) in found.items():
        assert name not in fresh or fresh[name] is array
    return found


def collect(case, of_ranks, format):
    """The global results of all ranks' local ones."""
    whole = {name: np.full((case.tokens(side), getattr(case, heads), getattr(case, dim)), np.nan) for name, (side, heads, dim) in shapes(case).items()}
    whole["lse"] = np.full((case.tokens("q"), case.heads), np.nan)
    for name, reach, together in (("d_sinks", case.sinks, np.sum), ("max_logit", case.max_logit, np.max)):
        if reach:
            numbers = np.array([np.asarray(found.pop(name)[0], np.float64) for found in of_ranks])
            assert reach == "rank" or (numbers == numbers[0]).all(), f"{case.name} {name}: differs between ranks: {numbers}"
            whole[name] = together(numbers, axis=0) if reach == "rank" else numbers[0]
    if case.bias is not None and case.bias[2] != "1":
        whole["d_bias"] = np.full(case.bias_shape(), np.nan)
        for found in of_ranks:
            local, rows = found.pop("d_bias")
            whole["d_bias"][:, :, rows] = np.asarray(local, np.float64)
    if case.latent:
        whole["d_latent"] = np.full((case.tokens("k"), 1, sum(case.latent)), np.nan)
        for name in ("d_up_k", "d_up_v"):  # every rank has its part
            whole[name] = sum(np.asarray(found.pop(name)[0], np.float64) for found in of_ranks)
    for found in of_ranks:
        for name, (local, tokens) in found.items():
            from_local(case, whole[name], tokens, np.asarray(local, np.float64), format)
    return whole
