"""torch CPU tensors in place, and the autograd function against torch's own attention."""

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from corpus import DTYPES, cases, check, philox
from ranks import collect, everywhere, give_back, run_case, thread_groups
from test_interface import raises

CONFIG = dict(heads=4, kv_heads=2, head_dim=16, dtype="float32", causal=True)
SEQ = cp.Sequences.dense(2, 21)


def tensors(torch, heads=(4, 2, 2, 4), dtype="float32"):
    torch.manual_seed(5)
    return [torch.randn(2, 21, h, 16, dtype=getattr(torch, dtype)) for h in heads]


def to_torch(torch, array):
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


class AsArray:
    """A tensor that np.asarray can read, whatever its type."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __array__(self, dtype=None, copy=None):
        return self.tensor.float().numpy().astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal_101_sbhd", "pad_left", "thd_padded_between", "gqa_8_2", "everything", "kv_e4m3_causal", "latent_causal"])
def test_tensors(torch, name, dtype):
    case, groups = cases()[name], thread_groups(3)

    def work(group):
        found = run_case(group, case, dtype, "a2a", view=lambda x: to_torch(torch, x))
        assert all(isinstance(x, torch.Tensor) for x, _ in found.values()) and found["lse"][0].dtype == torch.float32
        assert found["out"][0].dtype == getattr(torch, dtype)
        return {key: (AsArray(x), tokens) for key, (x, tokens) in found.items()}

    check(case, dtype, collect(case, everywhere(groups, work), case.format))
    give_back(groups)


def test_tensors_are_used_in_place(torch, monkeypatch):
    seen, real = {}, cp.attention.lib.cp_attention_forward

    def spy(handle, args, stream):
        for name in ("q", "k", "v", "out", "lse"):
            t = getattr(args._obj, name)
            seen[name] = (t.data, tuple(t.shape), tuple(t.stride))
        return real(handle, args, stream)

    monkeypatch.setattr(cp.attention.lib, "cp_attention_forward", spy)
    both = torch.randn(2, 21, 8, 16)
    q, k, v = both[:, :, :4], both[:, :, 4:6], both[:, :, 6:]
    layer = cp.Attention(**CONFIG)
    out, lse, context = layer.forward(q, k, v, SEQ)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        assert seen[name] == (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
    assert seen["lse"][0] == lse.data_ptr() and k.data_ptr() == both.data_ptr() + 4 * 16 * 4
    grads = torch.full_like(both, float("nan"))
    dq, _, _ = layer.backward(context, torch.randn(2, 21, 4, 16), dq=grads[:, :, :4], dk=grads[:, :, 4:6], dv=grads[:, :, 6:])
    assert dq.data_ptr() == grads.data_ptr() and grads.isfinite().all()
    # The same from NumPy over the same memory.
    np.testing.assert_array_equal(layer.forward(q.numpy(), k.numpy(), v.numpy(), SEQ)[0], out.numpy())


def test_wrong_tensors(torch):
    layer = cp.Attention(**CONFIG)
    q, k, v, _ = tensors(torch)
    raises(Status.INVALID_ARGUMENT, "q.dtype", layer.forward, q.double(), k, v, SEQ)
    raises(Status.INVALID_ARGUMENT, "k.dtype", layer.forward, q, k.bfloat16(), v, SEQ)
    raises(Status.INVALID_ARGUMENT, "k.dtype", layer.forward, q, k.long(), v, SEQ)
    raises(Status.INVALID_ARGUMENT, "v.stride[3]", layer.forward, q, k, v.transpose(2, 3).contiguous().transpose(2, 3), SEQ)
    raises(Status.INVALID_ARGUMENT, "v|device meta", layer.forward, q, k, v.to("meta"), SEQ)
    raises(Status.INVALID_ARGUMENT, "q", layer.forward, q.to_sparse(), k, v, SEQ)
    layer.set_group(None)
    assert cp.Attention(**{**CONFIG, "dtype": torch.bfloat16}).forward(q.bfloat16(), k.bfloat16(), v.bfloat16(), SEQ)[0].dtype == torch.bfloat16


def sdpa(torch, q, k, v, causal=True):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a", "a2a+p2p"])
def test_gradients_equal_sdpa(torch, comm):
    """A small network around two pending calls of one layer, on groups that are switched in between."""
    from context_parallel.torch import attention

    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(32, 8 * 16, generator=torch.Generator().manual_seed(2)) / 6

    def network(x, weight, attend_first, attend_second):
        q, k, v = (x @ weight).unflatten(-1, (8, 16)).split([4, 2, 2], dim=2)
        first = attend_first(q, k, v)
        second = attend_second(first, k * 0.5, v + 1)
        return (first + second).square().sum(), second

    whole, own = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch_attend = lambda q, k, v: sdpa(torch, q, k, v)
    loss, _ = network(whole, own, torch_attend, torch_attend)
    loss.backward()

    def work(group):
        rows = cp.partition_tokens("zigzag", "bshd", SEQ, 4, group.rank)
        mine = torch.from_numpy(cp.scatter(x.numpy(), rows, "bsh")).requires_grad_()
        own = weight.clone().requires_grad_()
        layer = cp.Attention(**CONFIG)
        layer.set_group(group, comm)

        def first(q, k, v):
            return attention(layer, q, k, v, SEQ)

        def second(q, k, v):
            turned = group.subset([2, 3, 0, 1])  # another group, in which the others hold other rows …
            layer.set_group(turned, "p2p")
            layer.set_group(group, "all_gather")  # … and back, with another communication
            out, lse = attention(layer, q, k, v, SEQ, return_lse=True)
            assert not lse.requires_grad and lse.shape == (2, 4, q.shape[1])
            layer.set_group(None)
            return out

        loss, _ = network(mine, own, first, second)
        loss.backward()
        return loss.item(), rows, mine.grad, own.grad

    found = everywhere(cp.Group.threads(4, timeout=30), work)
    assert sum(f[0] for f in found) == pytest.approx(loss.item(), rel=1e-4)
    gradient = np.full_like(x.numpy(), np.nan)
    for _, rows, grad, _ in found:
        cp.gather_rows(gradient, rows, grad.numpy(), "bsh")
    np.testing.assert_allclose(gradient, whole.grad.numpy(), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(sum(f[3] for f in found).numpy(), own.grad.numpy(), rtol=2e-3, atol=2e-2)


def test_sinks_and_scores_equal_torch(torch):
    """Gradients with sinks, soft-cap, ALiBi, a bias and dropout against the same in float64 with torch's own autograd: whole on every rank, or in parts."""
    from context_parallel.torch import attention

    given = [*tensors(torch), torch.tensor([0.3, -0.7, 1.1, -0.2]), torch.randn(1, 4, 21, 21)]
    seed, numbers, p = 7, [4, 9], 0.25
    q, k, v, d_out, sinks, bias = (x.double().requires_grad_() for x in given)
    i, j = np.ogrid[:21, :21]
    words = [[philox(seed, (j // 4, i, head, number)) for head in range(4)] for number in numbers]
    kept = torch.from_numpy(np.array([[np.choose(j % 4, w) >= p * 2**32 for w in of_batch] for of_batch in words]))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)) / 4
    scores = 2 * torch.tanh(scores / 2) - torch.from_numpy(cp.alibi_slopes(4)).double()[:, None, None] * torch.from_numpy(abs(i - j)) + bias
    scores = scores.masked_fill(torch.from_numpy(j > i), -torch.inf)
    weights = torch.softmax(torch.cat([scores, sinks[:, None, None].expand(2, 4, 21, 1)], dim=-1), dim=-1)[..., :-1]
    whole = torch.einsum("bhij,bjhd->bihd", weights * kept / (1 - p), v.repeat_interleave(2, dim=2))
    (whole * d_out).sum().backward()

    def work(group, comm, reach):
        rows = cp.partition_tokens("zigzag", "bshd", SEQ, group.size, group.rank)
        mine = [torch.from_numpy(cp.scatter(x.numpy(), rows)).requires_grad_() for x in given[:4]]
        own, pairs = given[4].clone().requires_grad_(), given[5][:, :, rows[: len(rows) // 2]].requires_grad_()
        layer = cp.Attention(**CONFIG, softcap=2.0, alibi=True, dropout=p, sinks=reach, bias="1hss")
        layer.set_group(group, comm)
        out = attention(layer, *mine[:3], SEQ, sinks=own, dropout_seed=seed, sequence_ids=numbers, bias=pairs)
        (out * mine[3].detach()).sum().backward()
        return rows, [out.detach(), *(x.grad for x in mine[:3])], own.grad, pairs.grad

    close = dict(rtol=1e-4, atol=1e-5)
    for comm, reach in (("p2p", "group"), ("all_gather", "rank"), ("a2a", "group"), ("a2a+p2p", "rank")):
        groups = thread_groups(4)
        found = everywhere(groups, lambda group: work(group, comm, reach))
        give_back(groups)
        for index, right in enumerate((whole.detach(), q.grad, k.grad, v.grad)):
            got = np.full(right.shape, np.nan, np.float32)
            for rows, results, *_ in found:
                cp.gather_rows(got, rows, results[index].numpy())
            np.testing.assert_allclose(got, right.numpy(), **close, err_msg=f"{comm} {index}")
        for rows, _, _, got in found:
            torch.testing.assert_close(got.double(), bias.grad[:, :, rows[: len(rows) // 2]], **close)
        of_sinks = [grad.double() for _, _, grad, _ in found]
        for got in of_sinks if reach == "group" else [sum(of_sinks)]:
            torch.testing.assert_close(got, sinks.grad, **close)


@pytest.mark.parametrize("name, shape, config", [("sinks", (4,), dict(sinks="rank")), ("bias", (1, 1, 21, 21), dict(bias="11ss"))])
def test_autograd_sees_changes_of_scores(torch, name, shape, config):
    from context_parallel.torch import attention

    q, k, v, _ = (x.requires_grad_() for x in tensors(torch))
    given = torch.zeros(shape)
    out = attention(cp.Attention(**CONFIG, **config), q, k, v, SEQ, **{name: given})
    given.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_bias_without_gradient_is_refused(torch):
    from context_parallel.torch import attention

    layer, given = cp.Attention(**CONFIG, bias="111s"), torch.zeros(1, 1, 1, 21)
    q, k, v, _ = (x.requires_grad_() for x in tensors(torch))
    raises(Status.INVALID_ARGUMENT, "bias|gradient|111s", attention, layer, q, k, v, SEQ, bias=given.clone().requires_grad_())
    attention(layer, q, k, v, SEQ, bias=given).sum().backward()
    assert q.grad is not None


def test_backward_of_expanded_gradients(torch):
    """sum() hands out one number with strides of 0."""
    from context_parallel.torch import attention

    q, k, v, _ = (x.requires_grad_() for x in tensors(torch))
    attention(cp.Attention(**CONFIG), q, k, v, SEQ).sum().backward()
    mine = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    sdpa(torch, q, k, v).sum().backward()
    for got, x in zip(mine, (q, k, v)):
        torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-5)


def test_autograd_sees_changes_in_place(torch):
    from context_parallel.torch import attention

    q, k, v, _ = (x.requires_grad_() for x in tensors(torch))
    product = k * 1
    out = attention(cp.Attention(**CONFIG), q, product, v, SEQ)
    product.data_ptr()
    with torch.no_grad():
        product.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_gradient_of_a_gradient(torch):
    from context_parallel.torch import attention

    q, k, v, _ = (x.requires_grad_() for x in tensors(torch))
    (grad,) = torch.autograd.grad(attention(cp.Attention(**CONFIG), q, k, v, SEQ).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_equal_torch(torch, dtype):
    """Gradients of latents and of their weights against torch's own through keys and values that it expands: those of weights are parts that are summed."""
    from context_parallel.torch import attention

    made = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))
    given = [made(1, 2, 21, 4, 24), made(2, 2, 21, 1, 40), made(3, 4, 16, 32) / 6, made(4, 4, 16, 32) / 6]
    d_out = made(5, 2, 21, 4, 16)
    q, latent, up_k, up_v = whole = [x.double().requires_grad_() for x in given]
    c, r = latent[:, :, 0, :32], latent[:, :, :, 32:].expand(2, 21, 4, 8)
    k = torch.cat([torch.einsum("hnd,bsd->bshn", up_k, c), r], dim=-1)
    attended = sdpa(torch, q, k, torch.einsum("hnd,bsd->bshn", up_v, c))
    (attended * d_out.double()).sum().backward()

    def work(group, comm):
        rows = cp.partition_tokens("zigzag", "bshd", SEQ, group.size, group.rank)
        picked = rows[: len(rows) // 2]
        mine = [x[:, picked].contiguous().requires_grad_() for x in given[:2]] + [x.clone().requires_grad_() for x in given[2:]]
        layer = cp.Attention(heads=4, head_dim=24, head_dim_v=16, dtype=dtype, causal=True, latent=(32, 8))
        layer.set_group(group, comm)
        out = attention(layer, mine[0], None, None, SEQ, latent=mine[1], up_k=mine[2], up_v=mine[3])
        (out * d_out[:, picked]).sum().backward()
        assert all(x.grad.dtype == x.dtype for x in mine)
        return picked, [out.detach(), *(x.grad for x in mine)]

    near = lambda got, right: np.linalg.norm(got.double() - right) <= (1e-5 if dtype == "float32" else 0.02) * np.linalg.norm(right)
    for comm in ("p2p", "all_gather", "a2a", "a2a+p2p"):
        groups = thread_groups(4)
        found = everywhere(groups, lambda group: work(group, comm))
        for i, right in enumerate([attended.detach(), whole[0].grad, whole[1].grad]):
            assert all(near(of_rank[i], right[:, picked]) for picked, of_rank in found), (comm, i)
        for i, right in ((3, whole[2].grad), (4, whole[3].grad)):
            assert near(sum(of_rank[i].double() for _, of_rank in found), right), (comm, i)
        give_back(groups)
