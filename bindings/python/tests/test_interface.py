"""Everything but numbers: groups, errors that name the argument on every rank, arrays in place, order of calls, lifetimes."""

import ctypes
import gc
import json
import threading
import time
import weakref

import ml_dtypes
import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from ranks import everywhere, outcomes

pytestmark = pytest.mark.fast

SEQ = cp.Sequences.dense(2, 24)
CONFIG = dict(heads=4, kv_heads=2, head_dim=16, dtype="float32", causal=True)


@pytest.fixture
def groups():
    made = cp.Group.threads(2, timeout=20)
    yield made
    for group in made:
        group.close()


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def qkv(rows=12, **changes):
    made = dict(q=random(2, rows, 4, 16), k=random(2, rows, 2, 16, seed=1), v=random(2, rows, 2, 16, seed=2))
    return list({**made, **changes}.values())


def raises(status, words, call, *arguments, **keywords):
    with pytest.raises(cp.Error) as caught:
        call(*arguments, **keywords)
    assert caught.value.status == status, caught.value
    for word in words.split("|"):
        assert word in str(caught.value), str(caught.value)
    return caught.value


# Groups


def test_group_properties(groups):
    def work(group):
        group.barrier()
        reverse = group.subset([1, 0])
        alone = group.subset([group.rank])
        alone.barrier()
        return group.rank, group.size, group.global_ranks, reverse.rank, reverse.global_ranks, alone.size, alone.global_ranks

    assert everywhere(groups, work) == [(0, 2, [0, 1], 1, [1, 0], 1, [0]), (1, 2, [0, 1], 0, [1, 0], 1, [1])]
    assert groups[0].statistics() == {"sent_bytes": 0, "received_bytes": 0, "exposed_ns": 0}
    assert "rank=1, size=2" in repr(groups[1])


def test_statistics_are_what_the_report_says(groups):
    def work(group):
        layer = cp.Attention(**CONFIG)
        layer.set_group(group)
        _, _, context = layer.forward(*qkv(), SEQ)
        forward, report = group.statistics(), layer.report(SEQ)
        layer.backward(context, random(2, 12, 4, 16))
        both = group.statistics()
        assert report["stages"] == 1 and report["inner"] == 1 and report["forward_flops"] > 0
        assert forward["sent_bytes"] == report["forward_sent"] and forward["received_bytes"] == report["forward_received"] > 0
        assert both["sent_bytes"] - forward["sent_bytes"] == report["backward_sent"]
        assert "exchange" in layer.plan(SEQ) and json.loads(layer.plan(SEQ, "backward", "json"))
        return forward["sent_bytes"]

    everywhere(groups, work)


def test_group_from_allgather():
    board, barrier, sizes = {}, threading.Barrier(3), []

    def join(rank):
        def allgather(mine):
            board[rank] = mine
            barrier.wait(10)
            parts = [board[r] for r in range(3)]
            barrier.wait(10)
            sizes.append(len(mine))
            return parts

        with cp.Group.from_allgather(rank, 3, allgather, timeout=20) as group:
            gc.collect()  # Nothing that the group needs may hang on the callback.
            group.barrier()
            return group.rank

    assert outcomes([0, 1, 2], join) == [0, 1, 2]
    assert sizes

    class Broken(Exception):
        pass

    def fail(_):
        raise Broken("no network")

    with pytest.raises(Broken, match="no network"):
        cp.Group.from_allgather(0, 2, fail, timeout=5)
    raises(Status.INVALID_ARGUMENT, "allgather|2 times", cp.Group.from_allgather, 0, 2, lambda mine: [mine], timeout=5)


def test_group_errors(monkeypatch, groups):
    id = cp.unique_id()
    assert len(id) == 128 and id != cp.unique_id()
    raises(Status.INVALID_ARGUMENT, "id|127", cp.Group.from_id, id[:127], 0, 2)
    raises(Status.INVALID_ARGUMENT, "rank|2 of size 2", cp.Group.from_id, id, 2, 2)
    raises(Status.INVALID_ARGUMENT, "rank|-1", cp.Group.from_id, id, -1, 2)
    raises(Status.INVALID_ARGUMENT, "transport|'tcp'|'shm'", cp.Group.from_id, id, 0, 2, transport="tcp")
    raises(Status.INVALID_ARGUMENT, "unique id", cp.Group.from_id, b"x" * 128, 0, 2, timeout=1)
    raises(Status.TIMEOUT, "rank 1", cp.Group.from_id, id, 0, 2, timeout=0.2)
    raises(Status.INVALID_ARGUMENT, "ranks|5", groups[0].subset, [0, 5])
    raises(Status.INVALID_ARGUMENT, "ranks", groups[0].subset, [1])
    raises(Status.INVALID_ARGUMENT, "ranks", groups[0].subset, [0, -1])
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    raises(Status.INVALID_ARGUMENT, "RANK", cp.Group.from_env)


def test_abort_releases_a_waiting_rank(groups):
    def work(group):
        if group.rank == 0:
            time.sleep(0.2)
            group.abort()
            return None
        start = time.monotonic()
        with pytest.raises(cp.Error) as caught:
            group.barrier()
        assert time.monotonic() - start < 10
        return caught.value.status

    assert everywhere(groups, work) == [None, Status.ABORTED]
    for group in groups:
        raises(Status.ABORTED, "lost", group.barrier)


def test_a_rank_that_does_not_come_is_named():
    groups = cp.Group.threads(2, timeout=0.3)
    raises(Status.TIMEOUT, "rank 1", groups[0].barrier)


def test_use_after_close(groups):
    layer = cp.Attention(**CONFIG)
    _, _, context = layer.forward(*qkv(24), SEQ)
    layer.close()
    layer.close()
    raises(Status.INVALID_HANDLE, "attention|close()", layer.forward, *qkv(24), SEQ)
    raises(Status.INVALID_HANDLE, "attention|close()", layer.backward, context, random(2, 24, 4, 16))
    raises(Status.INVALID_HANDLE, "attention|close()", layer.set_group, None)
    with cp.Attention(**CONFIG) as layer:
        subset = groups[0].subset([0])
        subset.close()
        raises(Status.INVALID_HANDLE, "group|close()", layer.set_group, subset)
        raises(Status.INVALID_HANDLE, "group|close()", subset.barrier)
    raises(Status.INVALID_HANDLE, "attention|close()", layer.workspace_size, 5)


def test_close_while_another_thread_waits():
    groups = cp.Group.threads(2, timeout=1)
    waiting = threading.Thread(target=groups[0].barrier)
    waiting.start()
    time.sleep(0.2)
    raises(Status.INVALID_USAGE, "group|another thread", groups[0].close)
    groups[1].barrier()
    waiting.join()
    groups[0].close()


def test_a_layer_keeps_its_group(groups):
    def work(group):
        layer = cp.Attention(**CONFIG)
        subset = group.subset([0, 1])
        layer.set_group(subset)
        subset.close()
        out, _, context = layer.forward(*qkv(), SEQ)
        return layer.backward(context, out)[0].shape

    assert everywhere(groups, work) == [(2, 12, 4, 16)] * 2


def test_handles_are_freed_without_close():
    layer = cp.Attention(**CONFIG)
    finalizer, gone = layer._handle._finalizer, weakref.ref(layer)
    assert finalizer.alive
    del layer
    gc.collect()
    assert gone() is None and not finalizer.alive


# Arrays


def address(array):
    return array.__array_interface__["data"][0]


def test_arrays_are_used_in_place(monkeypatch):
    """The C call gets the caller's addresses and strides, and the results are the arrays that it wrote."""
    seen, real = {}, cp.attention.lib.cp_attention_forward

    def spy(handle, args, stream):
        for name in ("q", "k", "v", "out", "lse"):
            t = getattr(args._obj, name)
            seen[name] = (t.data, tuple(t.shape), tuple(t.stride))
        return real(handle, args, stream)

    monkeypatch.setattr(cp.attention.lib, "cp_attention_forward", spy)
    qkv_packed = random(2, 24, 8, 16)  # one array; q, k, v are views of its heads
    q, k, v = qkv_packed[:, :, :4], qkv_packed[:, :, 4:6], qkv_packed[:, :, 6:]
    out, lse = np.full((2, 24, 4, 16), np.nan, np.float32), np.full((2, 4, 24), np.nan, np.float32)
    layer = cp.Attention(**CONFIG)
    returned = layer.forward(q, k, v, SEQ, out=out, lse=lse)
    assert returned[0] is out and returned[1] is lse
    strides = (24 * 8 * 16, 8 * 16, 16, 1)
    assert seen["q"] == (address(qkv_packed), (2, 24, 4, 16), strides)
    assert seen["v"] == (address(qkv_packed) + 6 * 16 * 4, (2, 24, 2, 16), strides)
    assert seen["out"][0] == address(out) and seen["lse"][0] == address(lse)
    plain = layer.forward(q.copy(), k.copy(), v.copy(), SEQ)
    np.testing.assert_array_equal(out, plain[0])
    np.testing.assert_array_equal(lse, plain[1])
    # sbhd: the same memory, other axes.
    layer = cp.Attention(**CONFIG, format="sbhd")
    turned, _, _ = layer.forward(*(x.transpose(1, 0, 2, 3) for x in (q, k, v)), SEQ)
    assert seen["q"] == (address(qkv_packed), (2, 24, 4, 16), strides)
    np.testing.assert_array_equal(turned.transpose(1, 0, 2, 3), out)


def test_gradients_are_written_in_place():
    layer, d_out = cp.Attention(**CONFIG), random(2, 24, 4, 16, seed=3)
    _, _, context = layer.forward(*qkv(24), SEQ)
    grads = np.full((2, 24, 8, 16), np.nan, np.float32)
    dq, dk, dv = layer.backward(context, d_out, dq=grads[:, :, :4], dk=grads[:, :, 4:6], dv=grads[:, :, 6:])
    assert all(np.shares_memory(x, grads) for x in (dq, dk, dv)) and np.isfinite(grads).all()
    for mine, own in zip((dq, dk, dv), layer.backward(context, d_out)):
        np.testing.assert_array_equal(mine, own)


def test_an_input_may_repeat_itself():
    k, v = random(2, 24, 1, 16, seed=1), random(2, 24, 1, 16, seed=2)
    same = [np.broadcast_to(x, (2, 24, 2, 16)) for x in (k, v)]
    layer, q = cp.Attention(**CONFIG), random(2, 24, 4, 16)
    np.testing.assert_array_equal(layer.forward(q, *same, SEQ)[0], layer.forward(q, *(x.copy() for x in same), SEQ)[0])


def test_workspace_of_the_caller():
    layer = cp.Attention(**CONFIG)
    size = layer.workspace_size(48)
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 64
    layer.forward(*qkv(24), SEQ, workspace=raw[start : start + size])
    _, _, context = layer.forward(*qkv(24), SEQ)
    assert 64 < layer.report(SEQ)["backward_workspace"] <= size
    raises(Status.OUT_OF_MEMORY, "workspace|64 bytes", layer.backward, context, random(2, 24, 4, 16), workspace=raw[start : start + 64])
    raises(Status.INVALID_ARGUMENT, "workspace|multiple of 64", layer.forward, *qkv(24), SEQ, workspace=raw[start + 1 : start + 1 + size])
    raises(Status.INVALID_ARGUMENT, "workspace|uint8", layer.forward, *qkv(24), SEQ, workspace=[1])


# Wrong arguments: the rank that gives one gets the reason, all others a mismatch that names it, and everything stays usable.

big_endian = random(2, 12, 4, 16).astype(">f4")
read_only = random(2, 12, 4, 16)
read_only.flags.writeable = False
odd_bytes = np.zeros((2, 12, 4, 16), np.dtype([("x", np.float32), ("y", np.int8)]))["x"]

WRONG_FORWARD = {
    "dtype": ("q.dtype|64", lambda: qkv(q=random(2, 12, 4, 16, dtype=np.float64)), {}),
    "dtype_int": ("k.dtype", lambda: qkv(k=np.zeros((2, 12, 2, 16), np.int32)), {}),
    "dtype_bf16": ("v.dtype|fp32", lambda: qkv(v=random(2, 12, 2, 16, dtype=ml_dtypes.bfloat16)), {}),
    "byte_order": ("q|byte order", lambda: qkv(q=big_endian), {}),
    "dims": ("q.ndim|got 3", lambda: qkv(q=random(12, 4, 16)), {}),
    "dims_5": ("q.ndim|got 5", lambda: qkv(q=random(1, 2, 12, 4, 16)), {}),
    "no_dims": ("q.ndim|got 0", lambda: qkv(q=np.zeros((), np.float32)), {}),
    "rows": ("q|[2, 11, 4, 16]|[2, 12, 4, 16]", lambda: qkv(q=random(2, 11, 4, 16)), {}),
    "heads": ("k|[2, 12, 4, 16]|[2, 12, 2, 16]", lambda: qkv(k=random(2, 12, 4, 16)), {}),
    "head_dim": ("v|[2, 12, 2, 8]", lambda: qkv(v=random(2, 12, 2, 8)), {}),
    "last_axis": ("k.stride[3]|got 2|contiguous", lambda: qkv(k=random(2, 12, 2, 32)[..., ::2]), {}),
    "backwards": ("v.stride[1]|negative", lambda: qkv(v=random(2, 12, 2, 16)[:, ::-1]), {}),
    "odd_bytes": ("q|byte strides|element size", lambda: qkv(q=odd_bytes), {}),
    "list": ("k|list|NumPy array", lambda: qkv(k=[1.0]), {}),
    "none": ("v|NoneType", lambda: qkv(v=None), {}),
    "out_read_only": ("out|read-only", qkv, dict(out=read_only)),
    "out_shape": ("out|[2, 12, 4, 8]", qkv, dict(out=random(2, 12, 4, 8))),
    "out_overlaps": ("out.stride|collide", qkv, dict(out=np.lib.stride_tricks.as_strided(random(16), (2, 12, 4, 16), (0, 0, 0, 4)))),
    "lse_dtype": ("lse.dtype", qkv, dict(lse=np.zeros((2, 4, 12)))),
    "lse_shape": ("lse|[2, 12, 4, 1]", qkv, dict(lse=np.zeros((2, 4, 13), np.float32))),
    "sequences": ("sequences|NoneType", qkv, dict(sequences=None)),
    "other_lengths": ("q|[2, 13, 4, 16]", qkv, dict(sequences=cp.Sequences.dense(2, 26))),
    "packed": ("sequences", qkv, dict(sequences=cp.Sequences.packed([0, 24]))),
    "workspace": ("workspace|uint8", qkv, dict(workspace="here")),
    "lists": ("sequences.list", qkv, dict(sequences=cp.Sequences.dense(1, 24, stretches=[[(0, 0, 1, 12)], [(0, 12, 1, 12)]]))),
    "lists_of_other_ranks": ("stretches|3 ranks|has 2", qkv, dict(sequences=cp.Sequences.dense(1, 24, stretches=[[(0, 0, 1, 24)], [], []]))),
}


@pytest.mark.parametrize("what", WRONG_FORWARD)
def test_wrong_forward(groups, what):
    words, tensors, keywords = WRONG_FORWARD[what]

    def work(group):
        layer = cp.Attention(**CONFIG)
        layer.set_group(group, "all_gather")
        if group.rank == 1:
            settings = {"sequences": SEQ, **keywords}
            raises(Status.INVALID_ARGUMENT, words, layer.forward, *tensors(), **settings)
        else:
            argument = words.split("|")[0].split(".")[0].replace("stretches", "sequences")
            raises(Status.MISMATCH, f"rank 1 refused cp_attention_forward|{argument}", layer.forward, *qkv(), SEQ)
        return layer.forward(*qkv(), SEQ)[0].shape  # still usable

    assert everywhere(groups, work) == [(2, 12, 4, 16)] * 2


WRONG_BACKWARD = {
    "context": ("context|NoneType", lambda context: (None, random(2, 12, 4, 16)), {}),
    "d_out_dtype": ("d_out.dtype", lambda context: (context, random(2, 12, 4, 16, dtype=np.float64)), {}),
    "d_out_shape": ("d_out|[2, 12, 2, 16]", lambda context: (context, random(2, 12, 2, 16)), {}),
    "d_out_last_axis": ("d_out.stride[3]", lambda context: (context, np.broadcast_to(np.float32(1), (2, 12, 4, 16))), {}),
    "d_out_none": ("d_out|NoneType", lambda context: (context, None), {}),
    "dq_shape": ("dq|[2, 13, 4, 16]", lambda context: (context, random(2, 12, 4, 16)), dict(dq=random(2, 13, 4, 16))),
    "dk_read_only": ("dk|read-only", lambda context: (context, random(2, 12, 4, 16)), dict(dk=read_only)),
    "dv_dtype": ("dv.dtype", lambda context: (context, random(2, 12, 4, 16)), dict(dv=np.zeros((2, 12, 2, 16), np.float16))),
}


@pytest.mark.parametrize("what", WRONG_BACKWARD)
def test_wrong_backward(groups, what):
    words, arguments, keywords = WRONG_BACKWARD[what]

    def work(group):
        layer = cp.Attention(**CONFIG)
        layer.set_group(group, "a2a")
        _, _, context = layer.forward(*qkv(), SEQ)
        if group.rank == 0:
            raises(Status.INVALID_ARGUMENT, words, layer.backward, *arguments(context), **keywords)
        else:
            raises(Status.MISMATCH, "rank 0 refused cp_attention_backward", layer.backward, context, random(2, 12, 4, 16))
        return layer.backward(context, random(2, 12, 4, 16))[1].shape

    assert everywhere(groups, work) == [(2, 12, 2, 16)] * 2


def test_ranks_that_disagree(groups):
    def work(group):
        layer = cp.Attention(**{**CONFIG, "causal": group.rank == 0})
        raises(Status.MISMATCH, "another problem", layer.set_group, group)
        raises(Status.MISMATCH, "another problem", cp.Attention(**CONFIG).set_group, group, ("p2p", "a2a")[group.rank])
        layer = cp.Attention(**CONFIG)
        layer.set_group(group)
        mine = cp.Sequences.dense(2, 24, lens=[24, 20 + group.rank])
        raises(Status.MISMATCH, "another problem", layer.forward, *qkv(), mine)
        if group.rank == 0:
            raises(Status.MISMATCH, "another call", layer.forward, *qkv(), SEQ)
        else:
            raises(Status.MISMATCH, "another call", group.barrier)
        return layer.forward(*qkv(), SEQ)[0].shape

    assert everywhere(groups, work) == [(2, 12, 4, 16)] * 2


def test_wrong_communication_on_one_rank(groups):
    def work(group):
        for wrong, words in (
            (dict(comm="ring"), "comm|'ring'|'p2p'"),
            (dict(comm="a2a+p2p", level_sizes=(3, 1)), "level_sizes|3 x 1"),
            (dict(comm="a2a+p2p", level_sizes=(1, 1, 2)), "level_count"),
            (dict(comm="a2a+p2p", inner_size=-1), "inner_size"),
            (dict(comm="a2a", inner_size=2), "level_sizes"),
            (dict(stages=7), "stages|7"),
            (dict(stages="auto"), "memory_cap"),
            (dict(memory_cap=5), "memory_cap"),
            (dict(memory_cap=-5), "memory_cap|-5"),
        ):
            layer = cp.Attention(**CONFIG)
            if group.rank == 0:
                with pytest.raises(cp.Error) as caught:
                    layer.set_group(group, **wrong)
                assert caught.value.status in (Status.INVALID_ARGUMENT, Status.UNSUPPORTED)
                assert all(word in str(caught.value) for word in words.split("|")), (wrong, str(caught.value))
            else:
                raises(Status.MISMATCH, "rank 0 refused cp_set_group", layer.set_group, group)

    everywhere(groups, work)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(heads=0), "heads"),
        (dict(heads=-1), "heads|-1"),
        (dict(heads=2.5), "heads|2.5"),
        (dict(kv_heads=3), "3 key heads"),
        (dict(head_dim=20), "head_dim|20"),
        (dict(head_dim=264), "head_dim|264"),
        (dict(head_dim_v=4), "head_dim_v|4"),
        (dict(dtype="float64"), "dtype|'float64'|'bfloat16'"),
        (dict(dtype=np.int32), "dtype|'int32'"),
        (dict(format="bsh"), "format|'bsh'|'bshd'"),
        (dict(partition="spiral"), "partition|'spiral'|'zigzag'"),
        (dict(window=5), "window|5"),
        (dict(window=(-1, None)), "window|-1"),
        (dict(softmax_scale=float("nan")), "scale"),
        (dict(threads=5000), "threads|5000"),
        (dict(max_tokens_per_rank=-3), "max_tokens_per_rank"),
    ],
)
def test_wrong_layers(change, words):
    raises(Status.INVALID_ARGUMENT, words, cp.Attention, **{**CONFIG, **change})


def test_layers_take_dtypes_of_numpy():
    for dtype in (np.float32, np.dtype("float16"), ml_dtypes.bfloat16, "bfloat16"):
        cp.Attention(**{**CONFIG, "dtype": dtype})


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: cp.Sequences.dense(2, 24, lens=[24]), "lens|1 values|2"),
        (lambda: cp.Sequences.dense(2, 24, lens=[24.0, 3.0]), "lens|float64"),
        (lambda: cp.Sequences.dense(-2, 24), "batch|-2"),
        (lambda: cp.Sequences.packed([]), "cu_seqlens"),
        (lambda: cp.Sequences.packed([0, 2**40]), "cu_seqlens|1099511627776"),
        (lambda: cp.Sequences.packed([0, 5], padded=[0, 5, 9]), "padded|3 values"),
        (lambda: cp.Sequences.dense(1, 24, stretches=[[(0, 1)]]), "stretches"),
        (lambda: cp.Sequences.dense(1, 24, stretches=[[], []], stretches_k=[[]]), "stretches_k"),
    ],
)
def test_wrong_sequences(make, words):
    raises(Status.INVALID_ARGUMENT, words, make)


@pytest.mark.parametrize(
    "sequences, words",
    [
        (cp.Sequences.dense(2, 24, lens=[24, 25]), "lens_q[1]|25"),
        (cp.Sequences.dense(2, 24, lens=[20, 20], before=[0, 5]), "lens_q[1]|20"),
        (cp.Sequences.dense(2, 24, lens=[-1, 20]), "lens_q[0]|-1"),
        (cp.Sequences.dense(0, 24), "count"),
        (cp.Sequences.dense(2, 0), "seq_q"),
    ],
)
def test_wrong_lengths(sequences, words):
    layer = cp.Attention(**CONFIG)
    raises(Status.INVALID_ARGUMENT, words, layer.forward, *qkv(24), sequences)
    raises(Status.INVALID_ARGUMENT, words, layer.plan, sequences)
    raises(Status.INVALID_ARGUMENT, words, cp.partition_tokens, "zigzag", "bshd", sequences, 2, 0)


def test_declared_limit():
    layer = cp.Attention(**CONFIG, max_tokens_per_rank=20)
    raises(Status.OUT_OF_MEMORY, "tokens per rank|48|20", layer.forward, *qkv(24), SEQ)


def test_query_support():
    assert cp.query_support(4, "a2a", **CONFIG) == (True, "")
    assert cp.query_support(4, "a2a+p2p", level_sizes=(2, 2), **CONFIG) == (True, "")
    for ranks, comm, change, words in (
        (4, "p2p", dict(head_dim=12), "12"),
        (4, "p2p", dict(dtype="float8"), "float8"),
        (0, "p2p", {}, "ranks"),
        (4, "mesh", {}, "mesh"),
        (4, "a2a+p2p", dict(level_sizes=(3, 2)), "3 x 2"),
    ):
        supported, reason = cp.query_support(ranks, comm, **{**CONFIG, **change})
        assert not supported and words in reason, reason


# Order of calls


def test_interleaved_calls_and_groups():
    """Forward A, forward B, backward A, with groups and communication types switched between; other layers in between."""
    groups = cp.Group.threads(4, timeout=20)
    tensors = [random(2, 24, 4, 16, seed=1), random(2, 24, 2, 16, seed=2), random(2, 24, 2, 16, seed=3)]
    d_out = random(2, 24, 4, 16, seed=4)
    alone = cp.Attention(**CONFIG)
    out, lse, context = alone.forward(*tensors, SEQ)
    right = (out, *alone.backward(context, d_out))

    def rows(group, array, side="q"):
        return cp.scatter(array, cp.partition_tokens("zigzag", "bshd", SEQ, group.size, group.rank, side))

    def work(group):
        layer, other = cp.Attention(**CONFIG, save=True), cp.Attention(**CONFIG)
        pair = group.subset([0, 1] if group.rank < 2 else [3, 2])
        layer.set_group(group, "p2p")
        other.set_group(group, "a2a+p2p", inner_size=2)
        calls = []
        for at, comm in ((group, "p2p"), (pair, "a2a"), (None, ""), (group, "all_gather"), (group, "a2a+p2p"), (pair, "p2p")):
            layer.set_group(at, comm) if at else layer.set_group(None)
            at = at or group.subset([group.rank])
            made = layer.forward(*(rows(at, x) for x in tensors), SEQ)
            calls.append((at, layer, made))
            calls.append((group, other, other.forward(*(rows(group, x) for x in tensors), SEQ)))
        for at, used, (out, _, context) in calls[::-1] + calls[:3]:
            found = (out, *used.backward(context, rows(at, d_out)))
            for mine, whole in zip(found, right):
                np.testing.assert_allclose(mine, rows(at, whole), atol=2e-5)

    everywhere(groups, work)


def test_context_of_other_sequences_or_layers(groups):
    layer = cp.Attention(**CONFIG)
    _, _, context = layer.forward(*qkv(24), SEQ)
    other = cp.Attention(**{**CONFIG, "causal": False})
    raises(Status.INVALID_ARGUMENT, "context", other.backward, context, random(2, 24, 4, 16))
    context.sequences = cp.Sequences.dense(2, 24, lens=[24, 9])
    raises(Status.INVALID_ARGUMENT, "context", layer.backward, context, random(2, 24, 4, 16))

    def work(group):
        layer = cp.Attention(**CONFIG)
        layer.set_group(group)
        return layer.forward(*qkv(), SEQ)[2]

    raises(Status.INVALID_ARGUMENT, "context", layer.backward, everywhere(groups, work)[0], random(2, 12, 4, 16))


def test_the_same_bits_again(groups):
    def work(group):
        layer = cp.Attention(**CONFIG, threads=1 + group.rank)
        layer.set_group(group, "p2p")
        found = []
        for _ in range(3):
            out, lse, context = layer.forward(*qkv(), SEQ)
            found.append(b"".join(x.tobytes() for x in (out, lse, *layer.backward(context, random(2, 12, 4, 16)))))
        assert found[0] == found[1] == found[2]

    everywhere(groups, work)


# Partitions


def test_partition_tokens():
    assert cp.partition_tokens("zigzag", "bshd", cp.Sequences.dense(2, 8), 2, 0).tolist() == [0, 1, 6, 7, 8, 9, 14, 15]
    assert cp.partition_tokens("striped", "thd", cp.Sequences.packed([0, 3, 7]), 2, 1).dtype == np.intp
    sequences = cp.Sequences.packed([0, 3, 7], padded=[0, 4, 12])
    for partition in ("zigzag", "contiguous", "striped"):
        dealt = [cp.partition_tokens(partition, "thd", sequences, 3, r) for r in range(3)]
        assert sorted(np.concatenate(dealt).tolist()) == list(range(12))
    sequences = cp.Sequences.dense(1, 5, 7)
    assert sum(len(cp.partition_tokens("contiguous", "bshd", sequences, 9, r, "k")) for r in range(9)) == 7
    raises(Status.INVALID_ARGUMENT, "rank|3", cp.partition_tokens, "zigzag", "bshd", sequences, 3, 3)
    raises(Status.INVALID_ARGUMENT, "side|'v'", cp.partition_tokens, "zigzag", "bshd", sequences, 3, 0, "v")
    raises(Status.INVALID_ARGUMENT, "ranks", cp.partition_tokens, "zigzag", "bshd", sequences, 0, 0)
    assert cp.padded_length("zigzag", 4, 33) == 40 and cp.padded_length("striped", 4, 33) == 36


@pytest.mark.parametrize("format", ["bshd", "sbhd", "bhsd", "bhs", "thd", "ht"])
def test_scatter_and_gather(format):
    lengths = dict(b=2, s=9, h=3, d=4, t=18)
    whole = random(*(lengths[axis] for axis in format))
    packed = "t" in format
    sequences = cp.Sequences.packed([0, 9, 18]) if packed else cp.Sequences.dense(2, 9)
    back = np.full_like(whole, np.nan)
    for rank in range(4):
        tokens = cp.partition_tokens("zigzag", "thd" if packed else "bshd", sequences, 4, rank)
        local = cp.scatter(whole, tokens, format)
        if format == "bshd":
            np.testing.assert_array_equal(local[1], whole[1][tokens[len(tokens) // 2 :] - 9])
        assert local.flags.c_contiguous
        cp.gather_rows(back, tokens, local, format)
    np.testing.assert_array_equal(back, whole)


# CUDA on a machine without it; with it: test_cuda.py


def test_cuda_that_is_not_there():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a CUDA driver")
    for _ in range(2):
        raises(Status.UNSUPPORTED, "libcuda", cp.Group.threads, 1, device="cuda:0")
        raises(Status.UNSUPPORTED, "libcuda", cp.Attention, **{**CONFIG, "dtype": "bfloat16", "device": "cuda"})
    good, why = cp.query_support(2, **{**CONFIG, "dtype": "bfloat16", "device": "cuda"})
    assert not good and "libcuda" in why
    assert np.isfinite(cp.Attention(**CONFIG, device="cpu").forward(*qkv(24), SEQ)[0]).all()


class FromElsewhere:
    """An array of another library on the CPU: NumPy's capsule, and nothing else of it."""

    def __init__(self, array, *hidden):
        self.array, self.hidden = array, hidden

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **settings):
        if self.hidden and settings:
            raise TypeError("an old producer")
        return self.array.__dlpack__(**settings)


@pytest.mark.parametrize("hidden", [(), ("max_version",)])
def test_dlpack_on_the_cpu(hidden):
    layer, arrays = cp.Attention(**CONFIG), qkv(24)
    out, lse = np.zeros((2, 24, 4, 16), np.float32), np.zeros((2, 4, 24), np.float32)
    layer.forward(*(FromElsewhere(x, *hidden) for x in arrays), SEQ, out=FromElsewhere(out, *hidden), lse=FromElsewhere(lse, *hidden))
    expected = layer.forward(*arrays, SEQ)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    raises(Status.INVALID_ARGUMENT, "out|the caller gives them", layer.forward, *map(FromElsewhere, arrays), SEQ)
    raises(Status.INVALID_ARGUMENT, "device|'gpu'", cp.Attention, **CONFIG, device="gpu")
    raises(Status.INVALID_ARGUMENT, "stream|NULL on the CPU", layer.forward, *arrays, SEQ, stream=64)
