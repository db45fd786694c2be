"""Schedules: Megatron's own assignments (tests/data/megatron_schedules.txt), ours, and every argument wrong in turn."""

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from corpus import ROOT
from ranks import everywhere

pytestmark = pytest.mark.fast


def fixtures():
    for line in (ROOT / "tests/data/megatron_schedules.txt").read_text().splitlines():
        if not line.startswith("#"):
            head, lengths, groups = (field.strip() for field in line.split("|"))
            name, ranks, tokens_per_rank, *rest = head.split()
            yield name, int(ranks), int(tokens_per_rank), int((rest or [0])[0]), [int(n) for n in lengths.split()], groups


def expanded(groups):
    """COUNTxIDS runs as Megatron's lists."""
    made = []
    for group in groups.split(" ; "):
        made.append([])
        for run in group.split():
            count, ids = run.split("x")
            made[-1] += [[int(i) for i in ids.split(",")]] * int(count)
    return made


def test_megatrons_own_assignments():
    names = {"balanced": "megatron", "dynamic": "dynamic", "dp_balanced": "dp_balanced"}
    equal = refused = 0
    for name, ranks, tokens_per_rank, size, lengths, groups in fixtures():
        if groups == "refused":
            refused += 1
            with pytest.raises(cp.Error):
                cp.schedule_samples(lengths, ranks, tokens_per_rank, names[name], size)
            continue
        made = cp.schedule_samples(lengths, ranks, tokens_per_rank, names[name], size)
        wanted = expanded(groups)
        if name == "dp_balanced":  # It keeps the samples' order in a pack, where order means nothing.
            wanted = [[sorted(ids, key=lambda i: (-lengths[i], i)) for ids in group] for group in wanted]
        assert made.sample_id_groups() == wanted, (name, ranks, tokens_per_rank, lengths)
        equal += 1
    assert equal > 100 and refused > 3


def test_ours_runs_every_sample_once_within_memory():
    random = np.random.default_rng(1)
    for ranks in (1, 2, 3, 7, 8, 24, 64):
        tokens_per_rank = 1024
        lengths = np.minimum(random.lognormal(6, 1.5, 100).astype(np.int64) + 1, ranks * tokens_per_rank)
        made = cp.schedule_samples(lengths, ranks, tokens_per_rank)
        assert made.micro_batches == 1 and made.placements.shape == (100, 4)
        groups = made.sample_id_groups()
        assert len(groups) == 1 and len(groups[0]) == ranks
        for sample, (_, first, count, _) in enumerate(made.placements.tolist()):
            assert [rank for rank in range(ranks) if sample in groups[0][rank]] == list(range(first, first + count))
        for pack in np.unique(made.placements, axis=0):
            mine = lengths[(made.placements == pack).all(axis=1)]
            assert sum(n if pack[2] == 1 else 2 * -(-n // (2 * int(pack[2]))) for n in mine.tolist()) <= tokens_per_rank
        seconds, bound = made.time()
        assert 0 < bound <= seconds
        theirs = cp.schedule_samples(lengths, ranks, tokens_per_rank, "dynamic") if ranks.bit_count() == 1 else made
        assert seconds <= theirs.time()[0]


def test_attention_runs_by_the_schedule():
    """Five ranks run their packs, each on its own group, forward and backward: as one rank with every sample alone."""
    lengths, heads, dim = [300, 200, 150, 90, 70, 60, 33, 30, 20, 9, 5, 1], 2, 16
    starts = np.cumsum([0, *lengths])
    random = np.random.default_rng(3)
    q, k, v, d_out = random.standard_normal((4, starts[-1], heads, dim), np.float32)
    made = cp.schedule_samples(lengths, ranks=5, tokens_per_rank=128, cost=cp.ScheduleCost(1e-9, 1e-6, 1e-7, 0, 1e-7))
    assert {pack.rank_count for pack in made.packs()} >= {1, 2, 3} and any(len(pack.samples) > 1 for pack in made.packs())

    def layer():
        return cp.Attention(heads=heads, head_dim=dim, dtype="float32", causal=True, format="thd")

    found = np.full((4, *q.shape), np.nan, np.float32)

    def work(group):
        attention = layer()
        attention.set_group(group)
        for pack in made.packs(group.rank):
            assert pack.first_rank <= group.rank < pack.first_rank + pack.rank_count
            attention.set_group(group.subset(range(pack.first_rank, pack.first_rank + pack.rank_count)), "all_gather")
            sequences = cp.Sequences.packed(np.cumsum([0, *(lengths[i] for i in pack.samples)]))
            mine = cp.partition_tokens("zigzag", "thd", sequences, pack.rank_count, group.rank - pack.first_rank)
            rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in pack.samples])[mine]
            assert len(rows) <= 128
            out, _, context = attention.forward(q[rows], k[rows], v[rows], sequences)
            found[:, rows] = out, *attention.backward(context, d_out[rows])

    everywhere(cp.Group.threads(5, timeout=60), work)
    alone, sequences = layer(), cp.Sequences.packed(starts)
    out, _, context = alone.forward(q, k, v, sequences)
    for got, wanted in zip(found, (out, *alone.backward(context, d_out))):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_cost_by_hand():
    cost = cp.ScheduleCost(pair=2.0, token=1.0, wire=0.0, rank=0.0, call=10.0)
    made = cp.schedule_samples([4], ranks=1, tokens_per_rank=4, cost=cost)
    assert made.placements.tolist() == [[0, 0, 1, 0]]
    assert made.time()[0] == 10 + 4 * 4 + 4
    made.placements[0, 1] = 1
    with pytest.raises(cp.Error, match="1 ranks from rank 1, there are 1"):
        made.time()


def test_no_samples():
    made = cp.schedule_samples([], ranks=4, tokens_per_rank=8)
    assert made.sample_id_groups() == [] and made.time() == (0.0, 0.0)


@pytest.mark.parametrize(
    "words, arguments",
    [
        ("lengths[1]: got 0", dict(lengths=[1, 0])),
        ("lengths[0]: got 65, allowed 1 … 64: 4 ranks with 16 tokens", dict(lengths=[65])),
        ("lengths: got values from -1", dict(lengths=[-1, 2])),
        ("lengths: got an array of float64", dict(lengths=[1.5])),
        ("lengths: got an array of int64 with shape (1, 1)", dict(lengths=[[1]])),
        ("ranks: got 0", dict(ranks=0)),
        ("ranks: got -1", dict(ranks=-1)),
        ("tokens_per_rank: got 0", dict(tokens_per_rank=0)),
        ("scheduler", dict(scheduler="best")),
        ("config.cp_size: got 0x2", dict(cp_size=2)),
        ("min_cp_size: got 3", dict(cp_size=3, scheduler="dynamic")),
        ("cp_size: got 3", dict(cp_size=3, scheduler="dp_balanced")),
        ("cost.wire: got -1", dict(cost=(1, 1, -1, 0, 0))),
        ("cost: pair and token are both 0", dict(cost=(0, 0, 1, 0, 0))),
    ],
)
def test_wrong_arguments(words, arguments):
    with pytest.raises(cp.Error) as caught:
        cp.schedule_samples(**{"lengths": [3, 4], "ranks": 4, "tokens_per_rank": 16, **arguments})
    assert caught.value.status == Status.INVALID_ARGUMENT and words in str(caught.value)


def test_what_megatron_cannot_do_is_unsupported():
    with pytest.raises(cp.Error) as caught:
        cp.schedule_samples([20], ranks=3, tokens_per_rank=8, scheduler="megatron")
    assert caught.value.status == Status.UNSUPPORTED and "Megatron's balanced scheduler fails on 3 ranks" in str(caught.value)
