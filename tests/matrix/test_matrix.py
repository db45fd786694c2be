"""The matrix' own measure: its oracle in blocks is the corpus' oracle, and its comparison notices errors."""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bindings/python"), str(ROOT / "bindings/python/tests"), str(Path(__file__).parent)]

import corpus
import oracle
from table import FLASH, FUSED, not_offered, runs

SEQ, QUERIES = 256, 64  # several blocks of queries; windows of 8 and 32
# (flash | fused, id, format, storage type): bias of every axes that has a gradient, a window to both sides, fewer key heads, sinks.
CHOSEN = (
    ("fused 1_4", "bshd", "float16"), ("fused 2_3", "bshd", "bfloat16"), ("fused 3_4", "bshd", "bfloat16"), ("fused 2_2", "thd", "float16"),
    ("flash 1_3", "thd-dense", "bfloat16"), ("fused 2_4", "thd", "bfloat16"), ("fused 4_3", "thd", "float16"))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("oracles")


def few_heads(setup):
    """The same configuration with fewer heads: the corpus' oracle holds everything at once."""
    group = setup.case.heads // setup.case.kv_heads
    kv_heads = 2 if group <= 2 else 1
    return replace(setup, case=replace(setup.case, heads=kv_heads * group, kv_heads=kv_heads, dim_qk=16, dim_v=8))


@pytest.mark.parametrize("config, format, dtype", CHOSEN)
def test_the_oracle_is_the_corpus_one(config, format, dtype, folder, monkeypatch):
    monkeypatch.setattr(oracle, "QUERIES", QUERIES)
    setup = few_heads(next(run.setup for run in runs(SEQ) if run.key == (config, format, "p2p", dtype)))
    given = oracle.inputs(setup)
    made = oracle.Oracle(setup, given, folder)
    with mock.patch.object(corpus, "inputs", lambda *_: given):
        wanted = corpus.reference.__wrapped__(setup.case, dtype)
    names = [*corpus.SHAPES, *(["d_bias"] if oracle.has_d_bias(setup.case) else [])]
    for name in names:
        right = np.nan_to_num(made.right(name))
        right = right if name == "d_bias" else right.transpose(1, 0, 2)
        assert np.linalg.norm(right - wanted.right[name]) <= 1e-6 * np.linalg.norm(wanted.right[name]), name
    assert abs(made.small["lse"].T[wanted.looks] - wanted.right["lse"][wanted.looks]).max() <= 1e-12
    assert np.all(made.small["lse"].T[~setup.case.is_true("q")] == -np.inf)
    assert np.allclose(made.small["max_logit"], wanted.right["max_logit"], rtol=0, atol=1e-12)
    assert np.allclose(made.small["d_sinks"], wanted.right["d_sinks"], rtol=1e-9)

    # Bounds: plain attention itself is at most half of them, as in the corpus, and close to what `check` says of it.
    plain = {name: wanted.plain[name].copy() for name in names} | {"lse": wanted.right["lse"]}
    if setup.case.sinks:
        plain["d_sinks"] = wanted.right["d_sinks"]
    if setup.case.max_logit:
        plain["max_logit"] = wanted.right["max_logit"]
    found = made.compare(plain)
    with mock.patch.object(corpus, "reference", lambda *_: wanted):
        theirs = corpus.check(setup.case, dtype, plain)
    ours = max(found[name][0] for name in names)
    assert ours <= 0.5 and abs(ours - theirs) <= 0.02 * theirs, (ours, theirs)

    token = int(np.flatnonzero(setup.case.is_true("q"))[40])
    for name in found:
        bad = {n: x.copy() for n, x in plain.items()}
        at = {"max_logit": 0, "d_sinks": 0}.get(name, (0, 0, 40, 20) if name == "d_bias" else (token, 0))
        for wrong in (1.0, np.nan):
            bad[name][at] = plain[name][at] + wrong
            judged = made.compare(bad)
            assert not judged[name][0] <= 1, (name, judged)
            assert name == "lse" or not judged[name][2] <= 1, (name, judged)
    if format == "thd":
        bad = {n: x.copy() for n, x in plain.items()}
        bad["dq"][np.flatnonzero(~setup.case.is_true("q"))[0], 0, 0] = 1e-6
        assert made.compare(bad)["dq"][0] == np.inf


def test_the_cases():
    everything = [run.key for run in runs(4096)]
    assert len(everything) == len(set(everything))
    te = [key for key in everything if key[0].startswith(("flash", "fused"))]
    assert len(FLASH) == 12 and len(FUSED) == 24 and len(te) == (12 * 4 + 24 * 3) * 4 * 2
    assert len([*not_offered()]) == 24 * 3 * 4
    assert len(everything) - len(te) == (17 * 2 + 3) * 4
    sample = [run.key for run in runs(256, sample=True)]
    assert set(sample) <= set(everything)
    for left, right in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        assert {(key[left], key[right]) for key in sample} == {(key[left], key[right]) for key in everything}
    for run in runs(4096):
        if run.format == "thd":
            assert all(0 < e.len < e.padded for e in run.setup.case.q)
