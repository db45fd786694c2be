"""torch CUDA tensors: in place, on torch's streams, without host syncs, in autograd and in CUDA graphs, against torch's own attention. On machines whose
torch has CUDA; elsewhere test_cuda.py tests the same calls on a stand-in."""

import numpy as np
import pytest

import context_parallel as cp
from corpus import cases, check
from ranks import collect, everywhere, run_case
from test_torch import AsArray, to_torch

SEQ = cp.Sequences.dense(2, 200)
CONFIG = dict(heads=8, kv_heads=2, head_dim=64, dtype="bfloat16", causal=True, device="cuda:0")


@pytest.fixture
def cuda_torch(torch):
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here; runs on a machine with a GPU")
    return torch


def tensors(torch, rows=200, grad=False):
    generator = torch.Generator("cuda").manual_seed(5)
    return [torch.randn(2, rows, h, 64, dtype=torch.bfloat16, device="cuda", generator=generator).requires_grad_(grad) for h in (8, 2, 2)]


def sdpa(torch, q, k, v):
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def near(torch, got, wanted):
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name, comm", [("causal_101_sbhd", "p2p"), ("pad_left", "all_gather"), ("thd_padded_between", "a2a"), ("gqa_8_2", "a2a+p2p")])
def test_corpus(cuda_torch, name, comm):
    torch, case = cuda_torch, cases()[name]
    groups = cp.Group.threads(2, "local", timeout=60, device="cuda:0")

    def work(group):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = run_case(group, case, "bfloat16", comm, view=lambda x: to_torch(torch, x).cuda(), device="cuda:0")
        stream.synchronize()
        return {key: (AsArray(x.cpu()), tokens) for key, (x, tokens) in found.items()}

    check(case, "bfloat16", collect(case, everywhere(groups, work), case.format))


def test_autograd_without_host_syncs(cuda_torch):
    torch = cuda_torch
    from context_parallel.torch import attention

    layer = cp.Attention(**CONFIG)
    q, k, v = tensors(torch, grad=True)
    attention(layer, q, k, v, SEQ).sum().backward()  # once, to warm up
    mine = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(layer, q, k, v, SEQ)
        out.sum().backward()  # an expanded gradient
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, first in zip((q, k, v), mine):
        near(torch, x.grad, first)
        x.grad = None
    near(torch, out, sdpa(torch, q, k, v))
    sdpa(torch, q, k, v).sum().backward()
    for x, got in zip((q, k, v), mine):
        near(torch, got, x.grad)
    del out
    assert before <= torch.cuda.memory_allocated()  # gradients stay; workspace went back


def test_another_stream(cuda_torch):
    torch = cuda_torch
    layer, side = cp.Attention(**CONFIG), torch.cuda.Stream()
    q, k, v = tensors(torch)
    wanted = sdpa(torch, q, k, v)
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(10_000_000)  # the current stream is busy; the call does not wait for it
    out, _, _ = layer.forward(q, k, v, SEQ, stream=side)
    side.synchronize()
    near(torch, out, wanted)


def test_cuda_graph(cuda_torch):
    torch = cuda_torch
    layer = cp.Attention(**CONFIG)
    q, k, v = tensors(torch)
    layer.forward(q, k, v, SEQ)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _, context = layer.forward(q, k, v, SEQ)
        dq, _, _ = layer.backward(context, q)
    fresh = tensors(torch, grad=True)
    for x, y in zip((q, k, v), fresh):
        x.copy_(y.detach() * 0.5)
    graph.replay()
    wanted = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    expected = sdpa(torch, *wanted)
    near(torch, out, expected)
    expected.backward(q.float())
    near(torch, dq, wanted[0].grad)


def test_lengths_on_the_device(cuda_torch):
    lengths = cuda_torch.tensor([0, 5, 24], dtype=cuda_torch.int32, device="cuda")
    np.testing.assert_array_equal(
        cp.partition_tokens("zigzag", "thd", cp.Sequences.packed(lengths), 2, 0),
        cp.partition_tokens("zigzag", "thd", cp.Sequences.packed([0, 5, 24]), 2, 0),
    )
