"""What goes with a rank's rows: positions, shifted labels, whole sequences, losses; and the balanced partition."""

import time

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from ranks import everywhere, outcomes
from test_interface import raises

pytestmark = pytest.mark.fast

# Lengths that divide by nothing, an empty one, padding between and after.
PACKED = cp.Sequences.packed([0, 13, 14, 14, 45, 47], padded=[0, 20, 21, 25, 56, 65])
LENGTHS, PADDED = [13, 1, 0, 31, 2], [20, 1, 4, 31, 9]
PARTITIONS = ("zigzag", "contiguous", "striped", "balanced")


def whole_shift(by):
    """The definition, token by token."""
    want, base = np.full(65, -1), 0
    for length, padded in zip(LENGTHS, PADDED):
        for i in range(length):
            if 0 <= i + by < length:
                want[base + i] = base + i + by
        base += padded
    return want


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_rows(partition, ranks):
    held = [cp.partition_tokens(partition, "thd", PACKED, ranks, r) for r in range(ranks)]
    assert sorted(np.concatenate(held).tolist()) == list(range(65))
    starts = np.cumsum([0, *PADDED[:-1]])
    where = np.concatenate([np.where(np.arange(p) < n, np.arange(p), -1) for n, p in zip(LENGTHS, PADDED)])
    ids = np.arange(65) * 7 + 3
    np.testing.assert_array_equal(np.concatenate(held)[cp.gather_order(partition, "thd", PACKED, ranks)], np.arange(65))
    np.testing.assert_array_equal(cp.gather([ids[h] for h in held], partition, PACKED, "t"), ids)
    for by in (1, 2, -1, 4, 40):
        want = whole_shift(by)
        parts = [cp.shift_exchange(partition, "thd", PACKED, ranks, r, by) for r in range(ranks)]
        sent = [np.split(held[r][x.send_rows], np.cumsum(x.send_counts)[:-1]) for r, x in enumerate(parts)]
        for r, x in enumerate(parts):
            np.testing.assert_array_equal(cp.shift_tokens(partition, "thd", PACKED, ranks, r, by), want[held[r]])
            labels = np.where(want[held[r]] < 0, -100, ids[want[held[r]]])
            np.testing.assert_array_equal(cp.shift(ids, partition, "thd", PACKED, ranks, r, by), labels)
            np.testing.assert_array_equal(x.run(ids[held[r]], lambda _: [ids[sent[p][r]] for p in range(ranks)]), labels)
            np.testing.assert_array_equal(cp.loss_weights(partition, "thd", PACKED, ranks, r, by), want[held[r]] >= 0)
        assert cp.loss_tokens("thd", PACKED, by) == (want >= 0).sum()
    for r in range(ranks):
        np.testing.assert_array_equal(cp.positions(partition, "thd", PACKED, ranks, r), where[held[r]])
        np.testing.assert_array_equal(cp.rope_rows(partition, "thd", PACKED, ranks, r), np.maximum(where[held[r]], 0))
        true, rows = cp.local_cu_seqlens(partition, "thd", PACKED, ranks, r)
        belongs = np.searchsorted(starts, held[r], side="right") - 1
        np.testing.assert_array_equal(np.diff(rows), np.bincount(belongs, minlength=5))
        np.testing.assert_array_equal(np.diff(true), np.bincount(belongs[where[held[r]] >= 0], minlength=5))


def test_published_vectors():
    sequences = cp.Sequences.packed([0, 8, 16, 24, 40])
    assert cp.partition_tokens("zigzag", "thd", sequences, 4, 0).tolist() == [0, 7, 8, 15, 16, 23, 24, 25, 38, 39]
    # Megatron's two slices of the frequency table, and its roll of the labels by one.
    dense = cp.Sequences.dense(1, 16)
    assert cp.rope_rows("zigzag", "bshd", dense, 2, 1).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert cp.shift_tokens("zigzag", "bshd", dense, 2, 0).tolist() == [1, 2, 3, 4, 13, 14, 15, -1]
    assert cp.shift_tokens("zigzag", "bshd", dense, 2, 1).tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    # Valid tokens per rank where 5 of 8 and 9 of 16 are true, P = 2.
    padded = cp.Sequences.packed([0, 5, 14], padded=[0, 8, 24])
    assert [cp.local_cu_seqlens("zigzag", "thd", padded, 2, r)[0].tolist() for r in (0, 1)] == [[0, 2, 6], [0, 3, 8]]


@pytest.mark.parametrize("format", ["bshd", "sbhd", "bhs", "thd", "ht"])
def test_gather(format):
    lengths = dict(b=2, s=9, h=3, d=4, t=18)
    whole = np.random.default_rng(0).standard_normal([lengths[axis] for axis in format])
    packed = "t" in format
    sequences = cp.Sequences.packed([0, 9, 18]) if packed else cp.Sequences.dense(2, 9)
    layout = "thd" if packed else "bshd"
    shards = [cp.scatter(whole, cp.partition_tokens("zigzag", layout, sequences, 4, r), format) for r in range(4)]
    np.testing.assert_array_equal(cp.gather(shards, "zigzag", sequences, format), whole)
    raises(Status.INVALID_ARGUMENT, "shards", cp.gather, shards[:1] * 4, "zigzag", sequences, format)


def test_loss_scale():
    assert cp.loss_scale(1000, gradients="summed", cp_size=4, dp_size=2) == 1 / 1000
    assert cp.loss_scale(1000, cp_size=4, dp_size=2) == 8 / 1000
    assert cp.loss_scale(1000, mean="replica", cp_size=4, dp_size=2, microbatches=8) == 4 / 8000
    assert cp.loss_scale(0, mean="replica", cp_size=4) == 0
    raises(Status.INVALID_ARGUMENT, "mean|'tokens'", cp.loss_scale, 1, mean="tokens")
    raises(Status.INVALID_ARGUMENT, "cp_size|0", cp.loss_scale, 1, cp_size=0)
    raises(Status.INVALID_ARGUMENT, "tokens|NaN", cp.loss_scale, float("nan"))
    raises(Status.INVALID_ARGUMENT, "shift|1.5", cp.loss_weights, "zigzag", "thd", PACKED, 2, 0, 1.5)


def test_gradients_equal_those_of_one_rank(torch):
    """A model of one linear layer on 3 ranks, one of them without a token that counts: loss and gradient as on one rank."""
    sequences = cp.Sequences.packed([0, 2, 3, 9], padded=[0, 6, 12, 18])
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(18, 5, generator=generator), torch.randn(18, generator=generator)

    def loss(weight, ranks, rank, gradients):
        tokens = torch.from_numpy(cp.partition_tokens("contiguous", "thd", sequences, ranks, rank))
        counts = torch.from_numpy(cp.loss_weights("contiguous", "thd", sequences, ranks, rank, 1))
        scale = cp.loss_scale(cp.loss_tokens("thd", sequences, 1), gradients=gradients, cp_size=ranks)
        return scale * (counts * (x[tokens] @ weight - y[tokens]) ** 2).sum(), counts.sum()

    def gradient(ranks, rank, gradients):
        weight = torch.ones(5, requires_grad=True)
        value, count = loss(weight, ranks, rank, gradients)
        value.backward()
        return weight.grad, value.detach(), count

    want, value, _ = gradient(1, 0, "summed")
    for gradients, divisor in (("summed", 1), ("averaged", 3)):
        made = [gradient(3, r, gradients) for r in range(3)]
        torch.testing.assert_close(sum(m[0] for m in made) / divisor, want)
        torch.testing.assert_close(sum(m[1] for m in made) / divisor, value)
        assert [float(m[2]) for m in made] == [1, 0, 5]


def test_balanced():
    rng = np.random.default_rng(2)
    lengths = np.concatenate([[5000, 900], rng.integers(1, 300, 40)])
    sequences = cp.Sequences.packed(np.concatenate([[0], np.cumsum(lengths)]))
    held = [cp.partition_tokens("balanced", "thd", sequences, 4, r) for r in range(4)]
    assert max(map(len, held)) - min(map(len, held)) <= 256
    pairs = [(cp.positions("balanced", "thd", sequences, 4, r) + 1).sum() for r in range(4)]
    assert max(pairs) <= 1.1 * sum(pairs) / 4
    raises(Status.UNSUPPORTED, "balanced|packed", cp.partition_tokens, "balanced", "bshd", cp.Sequences.dense(2, 8), 2, 0)
    cross = cp.Sequences.packed([0, 3, 9], [0, 3, 8])
    raises(Status.UNSUPPORTED, "balanced|sequence 1", cp.partition_tokens, "balanced", "thd", cross, 2, 0)
    raises(Status.INVALID_ARGUMENT, "balanced", cp.padded_length, "balanced", 2, 10)
    raises(Status.UNSUPPORTED, "balanced", cp.Attention, heads=2, head_dim=16, dtype="float32", format="bshd", partition="balanced")


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_balanced_attention_equals_one_rank(comm):
    sequences = cp.Sequences.packed([0, 150, 157, 250, 251, 300])
    config = dict(heads=2, kv_heads=2, head_dim=16, dtype="float32", causal=True, format="thd", partition="balanced")
    q, k, v, d_out = (np.random.default_rng(i).standard_normal((300, 2, 16)).astype(np.float32) for i in range(4))
    alone = cp.Attention(**config)
    out, _, context = alone.forward(q, k, v, sequences)
    want = [out, *alone.backward(context, d_out)]

    def work(group):
        layer = cp.Attention(**config)
        layer.set_group(group, comm)
        mine = cp.partition_tokens("balanced", "thd", sequences, group.size, group.rank)
        for _ in range(2):
            out, _, context = layer.forward(q[mine], k[mine], v[mine], sequences)
            found = [out, *layer.backward(context, d_out[mine])]
        return found

    groups = cp.Group.threads(3, timeout=20)
    shards = everywhere(groups, work)
    for name, one, parts in zip(("out", "dq", "dk", "dv"), want, zip(*shards)):
        np.testing.assert_allclose(cp.gather(parts, "balanced", sequences, "thd"), one, rtol=2e-4, atol=2e-5, err_msg=name)
    for group in groups:
        group.close()


@pytest.mark.parametrize("partition", PARTITIONS)
def test_through_a_group(partition):
    ids = np.arange(65) * 7 + 3
    values = np.random.default_rng(1).standard_normal((65, 2, 3))

    def work(group):
        mine = cp.partition_tokens(partition, "thd", PACKED, group.size, group.rank)
        for by in (1, 3, -1):
            want = whole_shift(by)[mine]
            got = cp.group_shift(group, ids[mine], partition, PACKED, by, format="t")
            np.testing.assert_array_equal(got, np.where(want < 0, -100, ids[want]))
        np.testing.assert_array_equal(cp.group_gather(group, values[mine], partition, PACKED, "thd"), values)
        return cp.group_gather(group, ids[mine].astype(np.int32), partition, PACKED, "t")

    groups = cp.Group.threads(3, timeout=20)
    for whole in everywhere(groups, work):
        assert whole.dtype == np.int32
        np.testing.assert_array_equal(whole, ids)
    for group in groups:
        group.close()


def test_dense_through_a_group():
    sequences = cp.Sequences.dense(2, 9)
    ids, values = np.arange(18).reshape(2, 9), np.random.default_rng(1).standard_normal((9, 2, 4)).astype(np.float16)

    def work(group):
        mine = cp.partition_tokens("zigzag", "bshd", sequences, group.size, group.rank)
        labels = cp.group_shift(group, cp.scatter(ids, mine, "bs"), "zigzag", sequences, format="bs")
        return labels, cp.group_gather(group, cp.scatter(values, mine, "sbd"), "zigzag", sequences, "sbd"), mine

    groups = cp.Group.threads(3, timeout=20)
    for labels, whole, mine in everywhere(groups, work):
        np.testing.assert_array_equal(whole, values)
        want = np.concatenate([ids[:, 1:], np.full((2, 1), -100)], axis=1)
        np.testing.assert_array_equal(labels, cp.scatter(want, mine, "bs"))
    for group in groups:
        group.close()


def test_get_batch_on_this_cp_rank(torch):
    ids, mask = np.arange(2 * 24).reshape(2, 24), np.arange(2 * 24 * 24).reshape(2, 1, 24, 24)
    batch = {"tokens": ids, "attention_mask": mask, "labels": None, "max_seqlen": np.array([24])}
    for ranks in (2, 3, 4):
        for rank in range(ranks):
            made = cp.get_batch_on_this_cp_rank(batch, ranks, rank)
            # Megatron: view(2P, S/2P), chunks r and 2P-1-r.
            pick = [rank, 2 * ranks - 1 - rank]
            np.testing.assert_array_equal(made["tokens"], ids.reshape(2, 2 * ranks, -1)[:, pick].reshape(2, -1))
            np.testing.assert_array_equal(made["attention_mask"], mask.reshape(2, 1, 2 * ranks, -1, 24)[:, :, pick].reshape(2, 1, -1, 24))
            assert made["labels"] is None and made["max_seqlen"][0] == 24
    # Packed, with padding, as torch tensors.
    lengths = {"cu_seqlens": torch.tensor([0, 5, 14]), "cu_seqlens_padded": torch.tensor([0, 8, 24])}
    packed = {"tokens": torch.arange(24)[None], "position_ids": torch.arange(24), **lengths}
    made = cp.get_batch_on_this_cp_rank(packed, 2, 0)
    assert made["tokens"].tolist() == [[0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]] and made["position_ids"].tolist() == made["tokens"][0].tolist()
    assert made["cu_seqlens"] is packed["cu_seqlens"]
    whole = [cp.get_batch_on_this_cp_rank(packed, 3, r, "balanced")["position_ids"].tolist() for r in range(3)]
    assert sorted(sum(whole, [])) == list(range(24))
    raises(Status.INVALID_ARGUMENT, "tokens|7", cp.get_batch_on_this_cp_rank, {**packed, "tokens": torch.arange(7)}, 2, 0)
    raises(Status.INVALID_ARGUMENT, "labels|(3,)", cp.get_batch_on_this_cp_rank, {"labels": np.zeros(3)}, 2, 0)


def test_a_wrong_rank_keeps_nobody_waiting():
    sequences = cp.Sequences.packed([0, 7, 20])
    wrong = (dict(side="x"), dict(shift=1.5), dict(partition="zickzack"), dict(fill="none"))
    for changed in wrong:
        groups = cp.Group.threads(2, timeout=30)

        def work(group):
            mine = cp.partition_tokens("zigzag", "thd", sequences, 2, group.rank)
            given = {"partition": "zigzag", **(changed if group.rank == 1 else {})}
            return cp.group_shift(group, np.arange(len(mine)), sequences=sequences, format="t", **given)

        start = time.monotonic()
        found = outcomes(groups, work)
        assert time.monotonic() - start < 20, changed
        assert isinstance(found[0], cp.Error) and found[0].status == cp.Status.MISMATCH and "rank 1" in str(found[0]), found
        assert isinstance(found[1], Exception), found
