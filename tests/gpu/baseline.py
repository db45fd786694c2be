#!/usr/bin/env python3
"""What one would use instead on one GPU, timed: PyTorch's attention (cuDNN and FlashAttention kernels) and FlashAttention-3 where installed.

usage: baseline.py [--json FILE] [--seconds N]      stops beginning new cases after N seconds (default 120)

bf16, batch 1. FLOPs: forward 4·H·S²·D, half if causal; backward 2.5 times that. Each figure is the median of single runs between CUDA events,
after a warm-up; inputs are random and change from run to run, so that none is still in the cache. A kernel that refuses a case is recorded with its
reason. Exit status 77: there is no PyTorch or no GPU for it.
"""

import argparse
import json
import statistics
import sys
import time

# (query heads, key heads, head dim, sequence, causal); the most important first.
CASES = [
    (64, 8, 128, seq, causal) for seq in (16384, 8192, 4096) for causal in (True, False)
] + [(32, 32, 128, 8192, True), (64, 8, 64, 8192, True), (16, 16, 256, 8192, True), (64, 8, 128, 32768, True), (64, 8, 128, 2048, True)]
RUNS, WARM_UP = 11, 3


def median_ms(torch, run):
    """Milliseconds of run(i), i counting up."""
    for i in range(WARM_UP):
        run(i)
    torch.cuda.synchronize()
    times = []
    for i in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(i)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def kernels(torch):
    """Name → attention(q, k, v, causal) on tensors [1, heads, seq, dim], or the reason why it cannot be had."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def torch_kernel(backend):
        def attention(q, k, v, causal):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

        return attention

    found = {"torch cudnn": torch_kernel(SDPBackend.CUDNN_ATTENTION), "torch flash": torch_kernel(SDPBackend.FLASH_ATTENTION)}
    try:
        from flash_attn_interface import flash_attn_func

        def attention(q, k, v, causal):
            # It takes [batch, seq, heads, dim]; some versions return the LSE too.
            out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        found["flash-attention 3"] = attention
    except Exception as why:
        found["flash-attention 3"] = f"{type(why).__name__}: {why}"
    return found


def measure(torch, attention, case):
    heads, kv_heads, dim, seq, causal = case
    sets = 2 if seq >= 16384 else 4

    def random(count):
        return torch.randn(1, count, seq, dim, device="cuda", dtype=torch.bfloat16)

    inputs = [[random(n).requires_grad_() for n in (heads, kv_heads, kv_heads)] for _ in range(sets)]
    d_out = random(heads)
    with torch.no_grad():
        forward = median_ms(torch, lambda i: attention(*inputs[i % sets], causal))
    outputs = [attention(*x, causal) for x in inputs]
    backward = median_ms(torch, lambda i: torch.autograd.grad(outputs[i % sets], inputs[i % sets], d_out, retain_graph=True))
    flops = 4 * heads * seq * seq * dim * (0.5 if causal else 1)
    return {"forward_ms": forward, "backward_ms": backward, "forward_tflops": flops / forward / 1e9, "backward_tflops": 2.5 * flops / backward / 1e9}


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    try:
        import torch
        why_not = None if torch.cuda.is_available() else "torch sees no GPU"
    except ImportError as why:
        why_not = str(why)
    if why_not:
        print(why_not)
        sys.exit(77)
    start = time.monotonic()
    found = kernels(torch)
    report = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "rows": []}
    for case in CASES:
        for name, attention in found.items():
            row = dict(zip(("heads", "kv_heads", "dim", "seq", "causal"), case), kernel=name)
            if time.monotonic() - start > options.seconds:
                row["why_not"] = f"no time left of {options.seconds:.0f} s"
            elif isinstance(attention, str):
                row["why_not"] = attention
            else:
                try:
                    row |= measure(torch, attention, case)
                except Exception as why:
                    row["why_not"] = f"{type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}"
                torch.cuda.empty_cache()
            report["rows"].append(row)
            figures = row.get("why_not") or f"{row['forward_tflops']:6.1f} forward {row['backward_tflops']:6.1f} backward TFLOP/s"
            print(f"{name:18} H {case[0]}:{case[1]} D {case[2]} S {case[3]} {'causal' if case[4] else 'full'}: {figures}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
