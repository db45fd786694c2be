#!/usr/bin/env python3
"""What scores beyond scale·q·k cost, next to plain attention of the same shape: the best of some runs, in one process, so that ratios mean something.

usage: tests/bench/scores.py [SEQ]      library as for the Python tests (CONTEXT_PARALLEL_LIB, or target/release)
"""

import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings/python"))
import context_parallel as cp  # noqa: E402

SEQ, HEADS, DIM, RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 2048, 8, 128, 5
random = np.random.default_rng(0)


def tensor(shape, dtype):
    return random.standard_normal(shape, np.float32).astype(dtype)


for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
    q, k, v, d_out = (tensor((1, SEQ, HEADS, DIM), dtype) for _ in range(4))
    features = {
        "plain": ({}, {}),
        "soft-cap": ({"softcap": 30.0}, {}),
        "ALiBi": ({"alibi": True}, {}),
        "dropout": ({"dropout": 0.1}, {"dropout_seed": 1}),
        "sinks": ({"sinks": "group"}, {"sinks": np.zeros(HEADS, np.float32)}),
        "bias 1hss and its gradient": ({"bias": "1hss"}, {"bias": tensor((1, HEADS, SEQ, SEQ), dtype)}),
        "largest score": ({"max_logit": "group"}, {}),
    }
    layers = {what: cp.Attention(heads=HEADS, head_dim=DIM, dtype=name, causal=True, **made) for what, (made, _) in features.items()}
    best = {what: [np.inf, np.inf] for what in features}
    sequences = cp.Sequences.dense(batch=1, seq=SEQ)
    for _ in range(RUNS):
        for what, (_, given) in features.items():
            start = time.perf_counter()
            *_, context = layers[what].forward(q, k, v, sequences, **given)
            middle = time.perf_counter()
            layers[what].backward(context, d_out)
            end = time.perf_counter()
            best[what] = [min(best[what][0], middle - start), min(best[what][1], end - middle)]
    for what, (forward, backward) in best.items():
        ratios = (forward / best["plain"][0], backward / best["plain"][1])
        print(f"{name:9} {what:27} forward {forward * 1e3:5.0f} ms  {ratios[0]:.2f}×   backward {backward * 1e3:5.0f} ms  {ratios[1]:.2f}×")
