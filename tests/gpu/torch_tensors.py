#!/usr/bin/env python3
"""torch CUDA tensors through the Python package, on a real GPU: in place, on torch's streams, without host syncs, in autograd, in CUDA graphs, over
virtual ranks on one GPU and over NCCL on several; compared with fp32 attention of torch. Prints a line per check; exit status 77: torch has no CUDA here.

usage: torch_tensors.py      PYTHONPATH names the package's folder, CONTEXT_PARALLEL_LIB the library
"""

import multiprocessing
import sys
import threading

SEQ, HEADS, KV_HEADS, DIM = 500, 8, 2, 64
COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
# Of the L2 norm, bf16: two to three roundings of 2^-9 each, and room.
BOUND = 0.015


def inputs(torch, device="cuda"):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, SEQ, h, DIM, generator=generator).to(device, torch.bfloat16) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def expected(torch, device="cuda"):
    """O, dQ, dK, dV by torch in fp32."""
    q, k, v, d_out = (x.float().transpose(1, 2).detach().requires_grad_() for x in inputs(torch, device))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out.backward(d_out.detach())
    return [x.detach().transpose(1, 2) for x in (out, q.grad, k.grad, v.grad)]


def near(got, wanted):
    error = ((got.float() - wanted).norm() / wanted.norm()).item()
    assert error < BOUND, f"error {error:.4f} of the norm, allowed {BOUND}"


def layer_on(cp, device="cuda:0", **options):
    return cp.Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, dtype="bfloat16", causal=True, device=device, **options)


def autograd(torch, cp):
    from context_parallel.torch import attention

    layer, sequences, (q, k, v, d_out) = layer_on(cp), cp.Sequences.dense(2, SEQ), inputs(torch)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for turn in range(2):  # the first one warms up
        for x in (q, k, v):
            x.grad = None
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            out = attention(layer, q, k, v, sequences)
            out.backward(d_out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for got, wanted in zip((out.detach(), q.grad, k.grad, v.grad), expected(torch)):
        near(got, wanted)
    # A gradient that autograd hands over expanded.
    q.grad = None
    attention(layer, q, k, v, sequences).sum().backward()
    assert q.grad.isfinite().all()


def workspace_goes_back(torch, cp):
    layer, sequences, (q, k, v, d_out) = layer_on(cp), cp.Sequences.dense(2, SEQ), inputs(torch)
    out, lse, context = layer.forward(q, k, v, sequences)
    grads = layer.backward(context, d_out)
    before = torch.cuda.memory_allocated()
    layer.forward(q, k, v, sequences, out=out, lse=lse)
    layer.backward(context, d_out, dq=grads[0], dk=grads[1], dv=grads[2])
    assert torch.cuda.memory_allocated() == before, "workspace was not given back"


def another_stream(torch, cp):
    layer, sequences, side = layer_on(cp), cp.Sequences.dense(2, SEQ), torch.cuda.Stream()
    (q, k, v, d_out), wanted = inputs(torch), expected(torch)
    _, _, context = layer.forward(q, k, v, sequences)
    layer.backward(context, d_out)
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # torch's current stream is busy for some tenths of a second
    out, _, context = layer.forward(q, k, v, sequences, stream=side)
    dq, _, _ = layer.backward(context, d_out, stream=side.cuda_stream)
    del q, k, v  # torch may not give their memory away before the side stream is through
    side.synchronize()
    assert not torch.cuda.current_stream().query(), "it waited for the current stream"
    near(out, wanted[0])
    near(dq, wanted[1])


def graph(torch, cp):
    layer, sequences, (q, k, v, d_out) = layer_on(cp), cp.Sequences.dense(2, SEQ), inputs(torch)
    _, _, context = layer.forward(q, k, v, sequences)
    layer.backward(context, d_out)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out, _, context = layer.forward(q, k, v, sequences)
        grads = layer.backward(context, d_out)
    for x in (out, *grads):
        x.fill_(float("nan"))
    for _ in range(2):
        captured.replay()
    torch.cuda.synchronize()
    for got, wanted in zip((out, *grads), expected(torch)):
        near(got, wanted)


def rank(torch, cp, group, device, parts):
    """One rank's part by every communication type: (its rows, O, dQ, dK, dV)."""
    sequences = cp.Sequences.dense(2, SEQ)
    rows = cp.partition_tokens("zigzag", "bshd", cp.Sequences.dense(1, SEQ), group.size, group.rank)
    mine = [x[:, rows] for x in inputs(torch, device)]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    for comm in COMMS:
        layer = layer_on(cp, device, save=comm == "a2a", deterministic=comm == "p2p")
        layer.set_group(group, comm)
        with torch.cuda.stream(stream):
            out, _, context = layer.forward(*mine[:3], sequences)
            grads = layer.backward(context, mine[3])
        stream.synchronize()
        parts.append([rows, *(x.cpu() for x in (out, *grads))])


def judge(torch, of_ranks):
    wanted = [x.cpu() for x in expected(torch)]
    for parts in zip(*of_ranks):
        for i, whole in enumerate(wanted):
            got = torch.full_like(whole, float("nan"))
            for part in parts:
                got[:, part[0]] = part[i + 1].float()
            near(got, whole)


def virtual_ranks(torch, cp):
    groups = cp.Group.threads(4, "local", timeout=60, device="cuda:0")
    of_ranks = [[] for _ in groups]
    threads = [threading.Thread(target=rank, args=(torch, cp, g, torch.device("cuda:0"), p)) for g, p in zip(groups, of_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    judge(torch, of_ranks)


def process(number, size, pipe, results):
    import context_parallel as cp
    import torch

    id = cp.unique_id() if number == 0 else pipe.recv_bytes()
    if number == 0:
        pipe.send_bytes(id)
    device, parts = torch.device("cuda", number), []
    with cp.Group.from_id(id, number, size, "nccl", timeout=60, device=device) as group:
        rank(torch, cp, group, device, parts)
    results.put((number, [[part[0], *(x.view(torch.int16).numpy() for x in part[1:])] for part in parts]))


def nccl(torch, cp):
    size = min(torch.cuda.device_count(), 8)
    if size < 2:
        return "one GPU; NCCL needs several"
    spawn = multiprocessing.get_context("spawn")
    pipes, results = [spawn.Pipe() for _ in range(size)], spawn.Queue()
    processes = [spawn.Process(target=process, args=(r, size, pipes[r][1], results)) for r in range(size)]
    for p in processes:
        p.start()
    id = pipes[0][0].recv_bytes()
    for ours, _ in pipes[1:]:
        ours.send_bytes(id)
    found = dict(results.get(timeout=120) for _ in processes)
    for p in processes:
        p.join(60)
    judge(torch, [[[part[0], *(torch.from_numpy(x).view(torch.bfloat16) for x in part[1:])] for part in found[r]] for r in range(size)])
    return None


def lengths(torch, cp):
    on_device = cp.Sequences.packed(torch.tensor([0, 5, 24], dtype=torch.int32, device="cuda"))
    assert list(cp.partition_tokens("zigzag", "thd", on_device, 2, 0)) == list(cp.partition_tokens("zigzag", "thd", cp.Sequences.packed([0, 5, 24]), 2, 0))


CHECKS = (autograd, workspace_goes_back, another_stream, graph, virtual_ranks, nccl, lengths)


def main():
    try:
        import torch
    except ImportError:
        print("torch is not installed")
        sys.exit(77)
    if not torch.cuda.is_available():
        print("torch has no CUDA here")
        sys.exit(77)
    import context_parallel as cp

    failed = left_out = 0
    for check in CHECKS:
        try:
            why = check(torch, cp)
            left_out += bool(why)
            print(f"{check.__name__}: {'not run: ' + why if why else 'ok'}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{check.__name__}: FAILED: {type(error).__name__}: {error}", flush=True)
    print(f"{len(CHECKS) - failed - left_out} passed, {failed} failed, {left_out} not run")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
