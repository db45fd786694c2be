"""Masks by slices: from MagiAttention's ranges, against a mask of ones and zeros; wrong ones."""

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from test_interface import raises

pytestmark = pytest.mark.fast

LENGTH = 48
LAYER = dict(heads=2, head_dim=16, dtype="float32")
Q_RANGES = [(0, 10), (10, 30), (10, 30), (30, 40), (40, 48), (40, 48)]
K_RANGES = [(0, 16), (0, 10), (12, 44), (2, 48), (0, 5), (5, 11)]
TYPES = ["causal", "full", "bi_causal", "inv_causal", "full", "causal"]


def visible(q_ranges, k_ranges, types):
    """The definition, square by square."""
    seen = np.zeros((LENGTH, LENGTH), int)
    for (q0, q1), (k0, k1), kind in zip(q_ranges, k_ranges, types):
        for i in range(q0, q1):
            first = k0 + (i - q0) if kind in ("inv_causal", "bi_causal") else k0
            last = k1 - 1 - (q1 - 1 - i) if kind in ("causal", "bi_causal") else k1 - 1
            seen[i, first : last + 1] += 1
    assert seen.max() == 1
    return seen > 0


def dense(q, k, v, seen):
    """Attention in float64, [seq, heads, dim]; rows that see nothing are 0."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.where(seen[:, None, :], np.einsum("ihd,jhd->ihj", q, k) / 4, -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.exp(scores - scores.max(axis=2, keepdims=True))
        p = np.nan_to_num(p / p.sum(axis=2, keepdims=True))
    return np.einsum("ihj,jhd->ihd", p, v)


@pytest.mark.parametrize("kinds", ["names", "numbers"])
def test_ranges_are_what_they_say(kinds):
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 1, LENGTH, 2, 16), np.float32)
    numbers = {"full": 0, "causal": 1, "inv_causal": 2, "bi_causal": 3}
    types = TYPES if kinds == "names" else np.array([numbers[kind] for kind in TYPES])
    slices = cp.mask_slices(np.array(Q_RANGES), np.array(K_RANGES), types)
    out, lse, _ = cp.Attention(**LAYER).forward(q, k, v, cp.Sequences.dense(1, LENGTH, slices=slices[::-1]))
    seen = visible(Q_RANGES, K_RANGES, TYPES)
    np.testing.assert_allclose(out[0], dense(q[0], k[0], v[0], seen), atol=2e-6)
    # A causal layer: both masks hold.
    out, lse, _ = cp.Attention(**LAYER, causal=True).forward(q, k, v, cp.Sequences.dense(1, LENGTH, slices=slices))
    both = seen & np.tri(LENGTH, dtype=bool)
    np.testing.assert_allclose(out[0], dense(q[0], k[0], v[0], both), atol=2e-6)
    np.testing.assert_array_equal(np.isinf(lse[0]).all(axis=0), ~both.any(axis=1))


def test_slices_from_ranges():
    assert cp.mask_slices([(0, 4)], [(2, 9)]) == [(0, (0, 4), (2, 9), None, None)]
    assert cp.mask_slices([(0, 4)], [(2, 9)], "causal", 3) == [(3, (0, 4), (2, 9), None, 5)]
    assert cp.mask_slices([(1, 4)], [(2, 9)], ["inv_causal"]) == [(0, (1, 4), (2, 9), 1, None)]
    assert cp.mask_slices([(1, 4), (5, 7)], [(2, 9), (5, 6)], 3) == [(0, (1, 4), (2, 9), 1, 5)]  # two queries, one key: nothing is left
    raises(Status.INVALID_ARGUMENT, "types|'diagonal'", cp.mask_slices, [(0, 4)], [(0, 4)], "diagonal")
    raises(Status.INVALID_ARGUMENT, "types|4", cp.mask_slices, [(0, 4)], [(0, 4)], 4)
    raises(Status.INVALID_ARGUMENT, "q_ranges|2|1", cp.mask_slices, [(0, 4), (4, 5)], [(0, 4)])
    raises(Status.INVALID_ARGUMENT, "q_ranges[1]|(4, 5, 6)", cp.mask_slices, [(0, 4), (4, 5, 6)], [(0, 4), (4, 5)])
    raises(Status.INVALID_ARGUMENT, "k_ranges[0]|4", cp.mask_slices, [(0, 4)], [4])
    # One type for all, whatever an integer is.
    for one in (1, np.int64(1), np.array(1)):
        assert cp.mask_slices([(0, 4), (4, 6)], [(2, 9), (2, 9)], one) == cp.mask_slices([(0, 4), (4, 6)], [(2, 9), (2, 9)], "causal")


@pytest.mark.parametrize(
    "slices, words",
    [
        ([], "slices|none"),
        (5, "slices|5"),
        ([(0, (0, 4))], "slices[0]|(0, (0, 4))"),
        ([(0, (0, 4), (0, 4)), (0, 0, 4, 0, 4)], "slices[1]"),
        ([(0, (0, 4), (0, 4), 1, 2, 3)], "slices[0]"),
        ([(0, (-1, 4), (0, 4))], "slices[0]|-1"),
        ([(0, (0, 4), (0, 4), 2**31)], "slices[0]|2147483648"),
        ([(0, (0, 4), (0, 4), 1.5)], "slices[0]|1.5"),
    ],
)
def test_lists_that_are_none(slices, words):
    raises(Status.INVALID_ARGUMENT, words, lambda: cp.Sequences.dense(1, LENGTH, slices=slices))


@pytest.mark.parametrize(
    "slices, words",
    [
        ([(1, (0, 4), (0, 4))], "slices[0]|sequence 1"),
        ([(0, (0, 4), (0, 4)), (0, (0, 4), (40, 49))], "slices[1]|40|49|48"),
        ([(0, (0, 4), (0, 4)), (0, (2, 9), (3, 4))], "slices[0]|slices[1]|query"),
    ],
)
def test_wrong_slices(slices, words):
    layer = cp.Attention(**LAYER)
    x = np.zeros((1, LENGTH, 2, 16), np.float32)
    sequences = cp.Sequences.dense(1, LENGTH, slices=slices)
    raises(Status.INVALID_ARGUMENT, words, layer.forward, x, x, x, sequences)
    raises(Status.INVALID_ARGUMENT, words, layer.report, sequences)
    # Who holds what does not depend on the mask.
    assert len(cp.partition_tokens("zigzag", "bshd", sequences, 2, 0)) == LENGTH // 2


def test_other_slices_in_backward():
    layer = cp.Attention(**LAYER)
    x = np.ones((1, LENGTH, 2, 16), np.float32)
    out, _, context = layer.forward(x, x, x, cp.Sequences.dense(1, LENGTH, slices=[(0, (0, 8), (0, 8)), (0, (9, 20), (1, 2))]))
    layer.backward(context, out)
    # In another order they are the same.
    context.sequences = cp.Sequences.dense(1, LENGTH, slices=[(0, (9, 20), (1, 2)), (0, (0, 8), (0, 8))])
    layer.backward(context, out)
    context.sequences = cp.Sequences.dense(1, LENGTH)
    raises(Status.INVALID_ARGUMENT, "context", layer.backward, context, out)
