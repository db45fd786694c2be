"""This library's CPU kernels next to PyTorch's CPU flash attention, one rank, the same number of threads.

    . tests/env.sh; $VENV_PY tests/bench/torch_ratio.py [--seq 4096] [--threads 1] [--runs 5]

Runs are interleaved (ours, torch, ours, torch, ...) and the medians compared, because machines are shared and drift. FLOPs: forward
4*S*S*D*H, backward 2.5 times that, half of it when causal. torch's backward is its own operator, called directly with what its forward returned.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bindings" / "python"))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seq", type=int, default=4096)
parser.add_argument("--heads", type=int, default=8)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--runs", type=int, default=5)
parser.add_argument("--dims", type=int, nargs="+", default=[128, 64])
parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)

import torch  # noqa: E402

import context_parallel as cp  # noqa: E402

torch.set_num_threads(options.threads)
aten = torch.ops.aten


def timed(f):
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def compare(dtype, dim, causal):
    """Median seconds of (ours, torch), forward and backward."""
    torch_type = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    generator = torch.Generator().manual_seed(1)
    make = lambda: torch.randn(1, options.seq, options.heads, dim, generator=generator).to(torch_type)
    q, k, v, d_out = make(), make(), make(), make()
    # torch's kernels want [batch, heads, seq, dim]; the same memory, as strides, is its usual layout too.
    tq, tk, tv, td = (x.transpose(1, 2) for x in (q, k, v, d_out))
    sequences = cp.Sequences.dense(1, options.seq)
    layer = cp.Attention(heads=options.heads, kv_heads=options.heads, head_dim=dim, dtype=torch_type, causal=causal, threads=options.threads)

    def theirs_forward():
        return aten._scaled_dot_product_flash_attention_for_cpu(tq, tk, tv, 0.0, causal)

    def theirs_backward(out, lse):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(td, tq, tk, tv, out, lse, 0.0, causal)

    times = {"ours": ([], []), "torch": ([], [])}
    for run in range(options.runs + 1):
        seconds, (out, _, context) = timed(lambda: layer.forward(q, k, v, sequences))
        back, _ = timed(lambda: layer.backward(context, d_out))
        t_seconds, (t_out, t_lse) = timed(theirs_forward)
        t_back, _ = timed(lambda: theirs_backward(t_out, t_lse))
        if run == 0:  # warm-up, and the two agree
            worst = (out.float() - t_out.transpose(1, 2).float()).abs().max().item()
            assert worst < (1e-4 if dtype == "fp32" else 3e-2), f"the two differ by {worst}"
            continue
        for name, pair in (("ours", (seconds, back)), ("torch", (t_seconds, t_back))):
            for into, value in zip(times[name], pair):
                into.append(value)
    return [[statistics.median(passed) for passed in times[name]] for name in ("ours", "torch")]


print(f"S = {options.seq}, H = {options.heads}, {options.threads} thread(s), median of {options.runs}, torch {torch.__version__}, {json.loads(cp.build_info())['simd']}")
print(f"{'dtype':6}{'D':>5}{'mask':>8} | {'forward: ours':>14}{'torch':>8}{'ratio':>7} | {'backward: ours':>15}{'torch':>8}{'ratio':>7}   (GFLOP/s)")
for dtype in options.dtypes:
    for dim in options.dims:
        for causal in (False, True):
            ours, theirs = compare(dtype, dim, causal)
            flops = 4 * options.seq**2 * dim * options.heads * (0.5 if causal else 1.0) / 1e9
            rate = [[flops * scale / t for scale, t in zip((1, 2.5), who)] for who in (ours, theirs)]
            (a, b), (c, d) = rate
            mask = "causal" if causal else "full"
            print(f"{dtype:6}{dim:5}{mask:>8} | {a:14.0f}{c:8.0f}{a / c:7.2f} | {b:15.0f}{d:8.0f}{b / d:7.2f}", flush=True)
