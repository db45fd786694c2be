"""Scores beyond scale·q·k: wrong arguments, which weights dropout drops, the slopes of ALiBi, numbers per head. (Their results: test_numbers.py.)"""

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from corpus import philox
from ranks import everywhere, give_back, thread_groups
from test_interface import CONFIG, SEQ, groups, qkv, raises, random  # noqa: F401 (groups is a fixture)

pytestmark = pytest.mark.fast

COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
SCORES = dict(softcap=3.0, alibi=True, dropout=0.25, sinks="group", max_logit="group", bias="1hss")
GIVEN = dict(sinks=random(4), dropout_seed=11, bias=random(1, 4, 12, 24))


# Arguments


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(softcap=-1.0), "softcap|-1"),
        (dict(softcap=float("nan")), "softcap|NaN"),
        (dict(softcap=float("inf")), "softcap|inf"),
        (dict(dropout=1.0), "dropout|1|below 1"),
        (dict(dropout=-0.5), "dropout|-0.5"),
        (dict(dropout=float("nan")), "dropout|NaN"),
        (dict(alibi=[0.5, 0.25, 0.125]), "alibi|(3,)|(4,)"),
        (dict(alibi=0.5), "alibi|()|(4,)"),
        (dict(alibi="steep"), "alibi|steep"),
        (dict(alibi=[0.5, 0.25, 0.125, float("inf")]), "alibi_slopes|inf"),
        (dict(alibi=True, heads=0), "heads|0"),
        (dict(head_offset=-1), "head_offset|-1"),
        (dict(sinks="all"), "sinks|'all'|'group'"),
        (dict(kv_wire="fp8"), "kv_wire|'fp8'|'e4m3'"),
        (dict(max_logit=True), "max_logit|True|'rank'"),
        (dict(bias="sshb"), "bias|'sshb'|'1hss'"),
        (dict(latent=16), "latent|16|(elements of c, elements of r)"),
        (dict(latent=(0, 0)), "latent|(0, 0)|None"),
        (dict(latent=(0, 8)), "latent|(0, 8)|None"),
        (dict(latent=(12, 0)), "latent_dim|12"),
    ],
)
def test_wrong_layers(change, words):
    raises(Status.INVALID_ARGUMENT, words, cp.Attention, **{**CONFIG, **change})
    supported, reason = cp.query_support(2, **{**CONFIG, **change})
    assert not supported and all(word in reason for word in words.split("|")), reason


odd = np.zeros(5, np.float32)
read_only = np.zeros(4, np.float32)
read_only.flags.writeable = False
# What one rank gives: of a plain layer, of one with scores.
WRONG_FORWARD = {
    "sinks_without": ({}, "sinks|without", dict(sinks=random(4))),
    "max_logit_without": ({}, "max_logit|without", dict(max_logit=random(4))),
    "seed_without": ({}, "dropout_seed|without dropout|5", dict(dropout_seed=5)),
    "ids_without": ({}, "sequence_ids|without dropout", dict(sequence_ids=[1, 2])),
    "bias_without": ({}, "bias|without", dict(bias=random(1, 4, 12, 24))),
    "no_sinks": (SCORES, "sinks|NULL", {**GIVEN, "sinks": None}),
    "no_bias": (SCORES, "bias|NULL", {**GIVEN, "bias": None}),
    "bias_shape": (SCORES, "bias: got shape|12", {**GIVEN, "bias": random(1, 4, 24, 12)}),
    "bias_dims": (SCORES, "bias.ndim|got 3", {**GIVEN, "bias": random(4, 12, 24)}),
    "bias_dtype": (SCORES, "bias.dtype|64", {**GIVEN, "bias": random(1, 4, 12, 24, dtype=np.float64)}),
    "sinks_shape": (SCORES, "sinks|[5]|[4]", {**GIVEN, "sinks": odd}),
    "sinks_dims": (SCORES, "sinks.ndim|got 2", {**GIVEN, "sinks": random(1, 4)}),
    "sinks_dtype": (SCORES, "sinks.dtype|64", {**GIVEN, "sinks": random(4, dtype=np.float64)}),
    "sinks_list": (SCORES, "sinks|list|NumPy array", {**GIVEN, "sinks": [0.0] * 4}),
    "max_logit_shape": (SCORES, "max_logit|[5]|[4]", {**GIVEN, "max_logit": odd}),
    "max_logit_read_only": (SCORES, "max_logit|read-only", {**GIVEN, "max_logit": read_only}),
    "seed_negative": (SCORES, "dropout_seed|-1", {**GIVEN, "dropout_seed": -1}),
    "seed_wide": (SCORES, "dropout_seed|2^64", {**GIVEN, "dropout_seed": 1 << 64}),
    "seed_float": (SCORES, "dropout_seed|0.5", {**GIVEN, "dropout_seed": 0.5}),
    "ids_few": (SCORES, "sequence_ids|1 for 2", {**GIVEN, "sequence_ids": [4]}),
    "ids_negative": (SCORES, "sequence_ids|-4", {**GIVEN, "sequence_ids": [4, -4]}),
    "ids_no_list": (SCORES, "sequence_ids|int", {**GIVEN, "sequence_ids": 4}),
}


@pytest.mark.parametrize("what", WRONG_FORWARD)
def test_wrong_forward(groups, what):
    config, words, keywords = WRONG_FORWARD[what]
    good = GIVEN if config else {}

    def work(group):
        layer = cp.Attention(**{**CONFIG, **config})
        layer.set_group(group, "all_gather")
        if group.rank == 1:
            raises(Status.INVALID_ARGUMENT, words, layer.forward, *qkv(), SEQ, **keywords)
        else:
            raises(Status.MISMATCH, "rank 1 refused cp_attention_forward", layer.forward, *qkv(), SEQ, **good)
        return layer.forward(*qkv(), SEQ, **good)[0].shape  # still usable

    assert everywhere(groups, work) == [(2, 12, 4, 16)] * 2


WRONG_BACKWARD = {
    "d_sinks_without": ({}, "d_sinks|without", dict(d_sinks=random(4))),
    "d_bias_without": ({}, "d_bias|without", dict(d_bias=random(1, 4, 12, 24))),
    "d_bias_shape": (SCORES, "d_bias: got shape|12", dict(d_bias=random(1, 4, 24, 12))),
    "d_sinks_shape": (SCORES, "d_sinks|[5]|[4]", dict(d_sinks=odd)),
    "d_sinks_read_only": (SCORES, "d_sinks|read-only", dict(d_sinks=read_only)),
}


@pytest.mark.parametrize("what", WRONG_BACKWARD)
def test_wrong_backward(groups, what):
    config, words, keywords = WRONG_BACKWARD[what]

    def work(group):
        layer = cp.Attention(**{**CONFIG, **config})
        layer.set_group(group, "a2a")
        _, _, context = layer.forward(*qkv(), SEQ, **(GIVEN if config else {}))
        d_out = random(2, 12, 4, 16)
        if group.rank == 0:
            raises(Status.INVALID_ARGUMENT, words, layer.backward, context, d_out, **keywords)
        else:
            raises(Status.MISMATCH, "rank 0 refused cp_attention_backward", layer.backward, context, d_out)
        return len(layer.backward(context, d_out))

    assert everywhere(groups, work) == [5 if config else 3] * 2


def test_ranks_that_disagree(groups):
    """About the layer, and about what is dropped: nobody computes with two masks."""

    def work(group):
        for name, values in (("softcap", (2.0, 3.0)), ("dropout", (0.1, 0.2)), ("sinks", ("rank", "group")), ("alibi", (True, None)), ("bias", ("11ss", None))):
            layer = cp.Attention(**{**CONFIG, name: values[group.rank]})
            raises(Status.MISMATCH, "another problem", layer.set_group, group)
        layer = cp.Attention(**CONFIG, dropout=0.5)
        layer.set_group(group)
        raises(Status.MISMATCH, "another problem", layer.forward, *qkv(), SEQ, dropout_seed=group.rank)
        raises(Status.MISMATCH, "another problem", layer.forward, *qkv(), SEQ, sequence_ids=[7, group.rank])
        return layer.forward(*qkv(), SEQ, dropout_seed=1)[0].shape

    assert everywhere(groups, work) == [(2, 12, 4, 16)] * 2


def test_numbers_are_written_in_place():
    layer = cp.Attention(**{**CONFIG, **SCORES})
    top, d_sinks, sinks = np.full(8, np.nan, np.float32), np.full(4, np.nan, np.float32), random(4)
    d_bias = np.full((1, 4, 24, 24), np.nan, np.float32)
    kept = sinks.copy()
    _, _, context = layer.forward(*qkv(24), SEQ, sinks=sinks, dropout_seed=3, max_logit=top[::2], bias=random(1, 4, 24, 24))
    assert context.max_logit.base is top and np.isfinite(top[::2]).all() and np.isnan(top[1::2]).all()
    found = layer.backward(context, random(2, 24, 4, 16), d_sinks=d_sinks, d_bias=d_bias)
    assert found[3] is d_sinks and np.isfinite(d_sinks).all() and (sinks == kept).all()
    assert found[4] is d_bias and np.isfinite(d_bias).all() and (d_bias[0, 0, 0, 1:] == 0).all()


# Values


def test_minus_infinity_in_a_bias_hides_a_key():
    """A bias that hides what a causal mask hides gives the same; a query without any key has O = 0 and LSE = -inf, and no part in the gradients."""
    n, blind = 320, 5
    q, k, v, d_out = (random(1, n, 2, 16) for _ in range(4))
    d_out[:, blind] = 0
    bias = np.where(np.tri(n, dtype=bool), np.float32(0), -np.float32(np.inf))[None, None]
    plain = cp.Attention(heads=2, head_dim=16, dtype="float32", causal=True)
    out, lse, context = plain.forward(q, k, v, cp.Sequences.dense(1, n))
    wanted = (out, lse, *plain.backward(context, d_out))
    d_out[:, blind], bias[:, :, blind] = 1, -np.inf

    def work(group):
        layer = cp.Attention(heads=2, head_dim=16, dtype="float32", bias="11ss")
        layer.set_group(group)
        sequences = cp.Sequences.dense(1, n)
        mine = cp.partition_tokens("zigzag", "bshd", sequences, group.size, group.rank)
        out, lse, context = layer.forward(*(x[:, mine] for x in (q, k, v)), sequences, bias=bias[:, :, mine])
        return mine, (out, lse.transpose(0, 2, 1), *layer.backward(context, d_out[:, mine]))

    given = thread_groups(2)
    for mine, found in everywhere(given, work):
        seen = mine != blind
        *found, d_bias = found
        for got, want in zip(found, (wanted[0], wanted[1].transpose(0, 2, 1), *wanted[2:])):
            rows = seen if got is not found[3] and got is not found[4] else slice(None)
            np.testing.assert_allclose(got[:, rows], want[:, mine][:, rows], rtol=1e-4, atol=1e-5)
        assert (found[0][:, ~seen] == 0).all() and (found[1][:, ~seen] == -np.inf).all() and (found[2][:, ~seen] == 0).all()
        assert (d_bias[bias[:, :, mine] == -np.inf] == 0).all() and np.isfinite(d_bias).all()
    give_back(given)


def test_alibi_slopes_of_the_paper():
    """https://arxiv.org/abs/2108.12409: for 8 heads 1/2 … 1/256; else those of the power of two below, and every second one of the power above."""
    assert cp.alibi_slopes(1).tolist() == [2.0**-8]
    assert cp.alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    np.testing.assert_allclose(cp.alibi_slopes(16), [2.0 ** (-(i + 1) / 2) for i in range(16)], rtol=1e-6)
    np.testing.assert_allclose(cp.alibi_slopes(12), [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5], rtol=1e-6)
    assert cp.alibi_slopes(12).dtype == np.float32 and all(len(cp.alibi_slopes(n)) == n for n in range(1, 70))
    raises(Status.INVALID_ARGUMENT, "heads|0", cp.alibi_slopes, 0)
    raises(Status.INVALID_ARGUMENT, "heads|2.5", cp.alibi_slopes, 2.5)


def test_alibi_true_is_the_papers():
    out = [cp.Attention(**CONFIG, alibi=slopes).forward(*qkv(24), SEQ)[0] for slopes in (True, cp.alibi_slopes(4), None)]
    np.testing.assert_array_equal(out[0], out[1])
    assert abs(out[0] - out[2]).max() > 0.1


# Which weights are dropped: equal scores and one-hot values, so that element j of an output is the weight of key j.

N, P_DROP, SEED = 64, 0.3, 0xFEDCBA9876543210


def seen_weights(group, sequences, comm="p2p", heads=4, partition="zigzag", format="bshd", length=N, one_hot=None, **options):
    """Weights of this rank's queries, [row, head, key], with the rows' tokens. `one_hot`: position in its sequence of every key token."""
    ids = options.pop("sequence_ids", None)
    layer = cp.Attention(heads=heads, kv_heads=2, head_dim=8, head_dim_v=N, dtype="float32", causal=True, partition=partition, format=format,
                         dropout=P_DROP, **options)  # fmt: skip
    if group is not None:
        layer.set_group(group, comm)
    size, rank = (group.size, group.rank) if group is not None else (1, 0)
    tokens = cp.partition_tokens(partition, format, sequences, size, rank)
    v = np.zeros((length, 2, N), np.float32)
    v[np.arange(length), :, np.arange(length) if one_hot is None else one_hot] = 1
    batch = (lambda x: x) if format == "thd" else (lambda x: x[None])
    zeros = lambda h: batch(np.zeros((len(tokens), h, 8), np.float32))
    out, _, _ = layer.forward(zeros(heads), zeros(2), batch(v[tokens]), sequences, dropout_seed=SEED, sequence_ids=ids)
    return tokens, out.reshape(len(tokens), heads, N)


def test_dropout_is_that_of_one_rank():
    """On four ranks, by every communication type and partition, the weights that one rank drops; and those that the definition says."""
    sequences = cp.Sequences.dense(1, N)
    _, alone = seen_weights(None, sequences)
    i, head, j = np.ogrid[:N, :4, :N]
    kept = np.choose(j % 4, philox(SEED, (j // 4, i, head, 0))) >= np.floor(np.float64(np.float32(P_DROP)) * 2**32)
    np.testing.assert_array_equal(alone != 0, kept & (j <= i))
    np.testing.assert_allclose(alone, np.where(kept & (j <= i), 1 / (i + 1) / (1 - P_DROP), 0), rtol=1e-5)
    for partition in ("zigzag", "striped", "contiguous"):
        for comm in COMMS:
            groups = thread_groups(4)
            whole = np.full_like(alone, np.nan)
            for tokens, mine in everywhere(groups, lambda group: seen_weights(group, sequences, comm, partition=partition)):
                whole[tokens] = mine
            give_back(groups)
            np.testing.assert_array_equal(whole != 0, alone != 0, err_msg=f"{partition} {comm}")


def test_heads_of_tensor_parallelism_drop_their_own():
    sequences = cp.Sequences.dense(1, N)
    _, all_heads = seen_weights(None, sequences)
    _, upper = seen_weights(None, sequences, heads=2, head_offset=2)
    np.testing.assert_array_equal(upper != 0, all_heads[:, 2:] != 0)
    assert ((upper != 0) != (all_heads[:, :2] != 0)).any()


@pytest.mark.parametrize("comm", COMMS)
def test_a_document_drops_alike_in_any_company(comm):
    """Alone on one rank, and inside a pack on four: numbered alike, a document drops the same weights, and has the same results."""
    lens, numbers = [17, 23, 24], [5, 9, 2]
    ends = np.cumsum([0, *lens])
    positions = np.concatenate([np.arange(n) for n in lens])
    groups = thread_groups(4)
    whole = np.full((N, 4, N), np.nan, np.float32)
    of_pack = lambda group: seen_weights(group, cp.Sequences.packed(ends), comm, format="thd", one_hot=positions, sequence_ids=numbers)
    for tokens, mine in everywhere(groups, of_pack):
        whole[tokens] = mine
    give_back(groups)
    for index, (length, number) in enumerate(zip(lens, numbers)):
        rows = slice(ends[index], ends[index + 1])
        _, alone = seen_weights(None, cp.Sequences.packed([0, length]), format="thd", length=length, sequence_ids=[number])
        np.testing.assert_array_equal(whole[rows] != 0, alone != 0)
        np.testing.assert_allclose(whole[rows], alone, rtol=1e-6)
        _, other = seen_weights(None, cp.Sequences.packed([0, length]), format="thd", length=length)  # numbered 0
        assert ((other != 0) != (alone != 0)).any()


def test_backward_wants_the_numbers_of_forward():
    layer = cp.Attention(heads=2, head_dim=8, dtype="float32", dropout=0.5)
    q, k, v, d_out = (np.ones((1, 6, 2, 8), np.float32) for _ in range(4))
    sequences = cp.Sequences.dense(batch=1, seq=6)
    for numbers, others in (([7], [8]), ([7], None), (None, [7])):
        _, _, context = layer.forward(q, k, v, sequences, dropout_seed=3, sequence_ids=numbers)
        right, context.numbers = context.numbers, None if others is None else np.array(others, np.uint32)
        raises(Status.INVALID_ARGUMENT, "sequence_ids: not those that forward had", layer.backward, context, d_out)
        context.numbers = right
        layer.backward(context, d_out)


def test_a_seed_is_any_integer():
    layer = cp.Attention(**CONFIG, dropout=0.5)
    bits = [layer.forward(*qkv(24), SEQ, dropout_seed=seed)[0].tobytes() for seed in (3, np.int64(3), np.uint64(3), np.array(3), 4)]
    assert len(set(bits[:4])) == 1 and bits[3] != bits[4]
