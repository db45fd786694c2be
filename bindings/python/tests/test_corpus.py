"""The tests' own measure: inputs as documented, and an error metric that notices errors."""

import numpy as np
import pytest

from corpus import LSE_BOUND, cases, check, elements, inputs, mix, philox, reference
from ranks import strided

pytestmark = pytest.mark.fast


def test_golden_inputs():
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    golden = {
        1: (-2.29913330078125, -2.0272216796875, 0.83514404296875),
        2: (-1.8909912109375, 0.913055419921875, -1.805389404296875),
        3: (-0.74847412109375, 0.155609130859375, -1.826751708984375),
        4: (0.806182861328125, 0.9083251953125, 1.0416259765625),
    }
    for id, values in golden.items():
        assert tuple(elements(id, 3)) == values


def test_golden_list_partition():
    blocks = lambda side, seq: {s[1] // 5: rank for rank, of_rank in enumerate(cases()["thd_list"].stretches(3, side)) for s in of_rank if s[0] == seq}
    assert [blocks("q", 3)[b] for b in range(4)] == [int(mix(3 * 2**31 + b)) % 3 for b in range(4)]
    case = cases()["causal_101_list"]
    dealt = {s[1] // 5: rank for rank, of_rank in enumerate(case.stretches(3, "q")) for s in of_rank if s[0] == 1}
    assert [dealt[b] for b in range(7)] == [1, 0, 1, 1, 1, 0, 2]
    assert len(cases()) == 149


def test_golden_random_words():
    """The known answers published with Random123 (kat_vectors, philox4x32 10)."""
    of = lambda key, *counter: [int(word) for word in philox(key, counter)]
    assert of(0, 0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert of(2**64 - 1, *[2**32 - 1] * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = (0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert of(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_padding_is_nan():
    case = cases()["pad_left"]
    q = inputs(case, "float32")["q"]
    assert np.isnan(q[:7]).all() and np.isfinite(q[7:40]).all() and np.isnan(q[40:60]).all()


def test_the_metric_notices():
    case = cases()["bottom_right_short_k"]
    for dtype in ("float32", "bfloat16", "float16"):
        ref = reference(case, dtype)
        good = {**{name: x.copy() for name, x in ref.plain.items()}, "lse": ref.right["lse"].copy()}
        assert check(case, dtype, good) <= 0.5 + 1e-9
        live = np.flatnonzero(np.isfinite(ref.right["lse"][:, 0]))
        for name, at, error in (("out", live[3], 0.2), ("dq", live[3], 1.0), ("lse", live[0], 2 * LSE_BOUND), ("out", 0, 1e-6), ("dk", 5, np.nan)):
            bad = {n: x.copy() for n, x in good.items()}
            bad[name][at, 0] += error
            with pytest.raises(AssertionError, match=name):
                check(case, dtype, bad)


def test_the_yardstick_is_small():
    """Plain attention's error is what others are measured by: a mistake in one of the two would excuse everything."""
    for case in (cases()[name] for name in ("causal_33", "softcap", "alibi", "dropout", "sinks_blind", "bias_1hss", "bias_documents", "bias_and_everything", "latent_causal", "latent_documents")):
        ref = reference(case, "float32")
        for name, plain in ref.plain.items():
            assert np.linalg.norm(plain - ref.right[name]) <= 16 * 2.0**-24 * np.linalg.norm(ref.terms[name]), (case.name, name)


def test_strided_has_gaps():
    x = strided(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    assert x.strides == (80, 20, 4) and x[1, 2, 3] == 23
