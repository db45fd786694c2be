"""A Mamba-2 layer (in_proj, causal convolution, selective scan, gate or gated RMSNorm, out_proj) over several ranks against the same layer on one, in
float64: outputs, gradients of the input and of every parameter. And the rules of who has which heads and groups."""

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from ranks import everywhere, give_back, thread_groups

HEADDIM, D_STATE, D_MODEL, WIDTH = 4, 3, 10, 4
NAMES = ("in_proj", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm", "out_proj")


class Shape:
    def __init__(self, nheads, ngroups, D_has_hdim):
        self.nheads, self.ngroups, self.D_has_hdim = nheads, ngroups, D_has_hdim
        self.d_inner = nheads * HEADDIM
        self.channels = self.d_inner + 2 * ngroups * D_STATE

    def parameters(self, torch):
        """What a layer has, in float64."""
        g = torch.Generator().manual_seed(1)
        rand = lambda *shape, scale=1.0: torch.randn(*shape, generator=g, dtype=torch.float64) * scale
        return {
            "in_proj": rand(self.d_inner + self.channels + self.nheads, D_MODEL, scale=D_MODEL**-0.5),
            "conv_weight": rand(self.channels, 1, WIDTH, scale=0.5),
            "conv_bias": rand(self.channels, scale=0.2),
            "dt_bias": rand(self.nheads, scale=0.5),
            "A_log": rand(self.nheads, scale=0.3),
            "D": rand(self.d_inner if self.D_has_hdim else self.nheads),
            "norm": rand(self.d_inner, scale=0.2) + 1,
            "out_proj": rand(D_MODEL, self.d_inner, scale=self.d_inner**-0.5),
        }


def conv_and_scan(torch, x, B, C, dt, conv, dt_bias, A_log, D, head_groups, D_has_hdim):
    """One sequence: x [tokens, heads · headdim], B and C [tokens, groups · d_state], dt [tokens, heads] → y like x."""
    widths = [x.shape[-1], B.shape[-1], C.shape[-1]]
    xBC = torch.nn.functional.silu(conv(torch.cat([x, B, C], -1).T[None])[0, :, : len(x)].T)
    x, B, C = xBC.split(widths, -1)
    heads = dt.shape[-1]
    x = x.unflatten(-1, (heads, HEADDIM))
    B, C = (t.unflatten(-1, (-1, D_STATE))[:, head_groups] for t in (B, C))
    dt = torch.nn.functional.softplus(dt + dt_bias)
    decay = torch.exp(-torch.exp(A_log) * dt)
    state, rows = torch.zeros(heads, HEADDIM, D_STATE, dtype=x.dtype), []
    for t in range(len(x)):
        state = state * decay[t, :, None, None] + (dt[t, :, None] * x[t])[..., None] * B[t, :, None]
        rows.append((state * C[t, :, None]).sum(-1))
    skip = D.unflatten(0, (heads, HEADDIM)) if D_has_hdim else D[:, None]
    return (torch.stack(rows) + skip * x).flatten(-2)


def gated_norm(torch, y, z, weight, groups):
    """RMSNorm of y·silu(z) over the channels of every group."""
    y = y * torch.nn.functional.silu(z)
    parts = y.unflatten(-1, (groups, -1))
    return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight


def alone(torch, shape, parameters, hidden, documents, rmsnorm):
    """The layer on one rank: hidden [batch, tokens, d_model]; `documents` are the (entry, first token, end) that are not padding. Padding gives 0."""
    p = parameters
    conv = lambda t: torch.nn.functional.conv1d(t, p["conv_weight"], p["conv_bias"], padding=WIDTH - 1, groups=shape.channels)
    zxBCdt = hidden @ p["in_proj"].T
    state = shape.ngroups * D_STATE
    z, x, B, C, dt = zxBCdt.split([shape.d_inner, shape.d_inner, state, state, shape.nheads], -1)
    head_groups = [h // (shape.nheads // shape.ngroups) for h in range(shape.nheads)]
    out = torch.zeros(*hidden.shape[:-1], D_MODEL, dtype=hidden.dtype)
    for b, first, last in documents:
        cut = lambda t: t[b, first:last]
        y = conv_and_scan(torch, *map(cut, (x, B, C, dt)), conv, p["dt_bias"], p["A_log"], p["D"], head_groups, shape.D_has_hdim)
        y = gated_norm(torch, y, cut(z), p["norm"], shape.ngroups) if rmsnorm else y * torch.nn.functional.silu(cut(z))
        out = out.index_put((torch.tensor([b]), torch.arange(first, last)), y @ p["out_proj"].T)
    return out


def on_rank(torch, group, shape, parameters, hidden, sequences, partition, format, documents, rmsnorm, uneven):
    """The layer on one of several ranks: this rank's rows in `format` without heads, in fp32."""
    from context_parallel.mamba import MambaContextParallel

    p = parameters
    conv1d = torch.nn.Conv1d(shape.channels, shape.channels, WIDTH, groups=shape.channels, padding=WIDTH - 1)
    del conv1d.weight, conv1d.bias
    conv1d.weight, conv1d.bias = p["conv_weight"], p["conv_bias"]
    mamba = MambaContextParallel(group, shape.d_inner, shape.nheads, shape.ngroups, D_STATE, conv1d, p["dt_bias"], p["A_log"], p["D"], shape.D_has_hdim,
                                 uneven=uneven)  # fmt: skip
    how = dict(partition=partition, format=format)
    zxBCdt = hidden @ p["in_proj"].T
    # A norm over all channels comes after the way back, with this rank's own rows of z: they need not travel.
    kept, travels = zxBCdt[..., : shape.d_inner], zxBCdt[..., shape.d_inner :] if rmsnorm else zxBCdt
    whole = mamba.pre_conv_ssm(travels, sequences, has_z=not rmsnorm, **how)
    *z, x, B, C, dt = mamba.split(whole, has_z=not rmsnorm)
    entry = {"sbhd": lambda t, b: t[:, b], "bshd": lambda t, b: t[b], "thd": lambda t, b: t}[format]
    y = torch.zeros(*whole.shape[:-1], mamba.d_inner_local_tpcp)
    for b, first, last in documents:
        cut = lambda t: entry(t, b)[first:last]
        mine = (mamba.get_dt_bias(), mamba.get_A_log(), mamba.get_D(), mamba.head_groups)
        one = conv_and_scan(torch, *map(cut, (x, B, C, dt)), mamba.conv1d, *mine, shape.D_has_hdim)
        rows, of = torch.arange(first, last), torch.tensor([b])
        at = {"sbhd": (rows, of), "bshd": (of, rows), "thd": (rows,)}
        y = y.index_put(at[format], one if rmsnorm else one * torch.nn.functional.silu(cut(z[0])))
    y = mamba.post_conv_ssm(y, sequences, **how)
    if rmsnorm:
        y = gated_norm(torch, y, kept, p["norm"], shape.ngroups)
    return y @ p["out_proj"].T


# The package's own cases come first: (ngroups, cp, D_has_hdim) = (16, 4, F), (8, 8, F), (4, 8, F), (1, 4, T).
LAYERS = [
    (16, 16, 4, False, False),
    (16, 8, 8, False, False),
    (16, 4, 8, False, False),
    (16, 1, 4, True, False),
    (8, 2, 2, False, False),
    (8, 4, 1, True, False),
    (8, 4, 3, False, True),  # nothing divides: heads 0-1, 2-4, 5-7 of groups 0, 1-2, 2-3
    (6, 2, 4, True, True),
]
DATA = {
    "dense": ("sbhd", "zigzag", lambda: cp.Sequences.dense(2, 22), 2, 22, [(0, 0, 22), (1, 0, 22)]),
    "padded": ("bshd", "contiguous", lambda: cp.Sequences.dense(2, 20, lens=[20, 13], before=[0, 5]), 2, 20, [(0, 0, 20), (1, 5, 18)]),
    "packed": ("thd", "zigzag", lambda: cp.Sequences.packed([0, 7, 20], padded=[0, 9, 25]), 1, 25, [(0, 0, 7), (0, 9, 22)]),
}


@pytest.mark.parametrize("rmsnorm", [False, True])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("nheads, ngroups, ranks, D_has_hdim, uneven", LAYERS)
def test_layer_equals_one_rank(torch, nheads, ngroups, ranks, D_has_hdim, uneven, data, rmsnorm):
    shape = Shape(nheads, ngroups, D_has_hdim)
    format, partition, make, batch, seq, documents = DATA[data]
    sequences = make()
    g = torch.Generator().manual_seed(2)
    hidden, weights = (torch.randn(batch, seq, D_MODEL, generator=g, dtype=torch.float64) for _ in range(2))
    true = torch.zeros(batch, seq, 1, dtype=torch.float64)
    for b, first, last in documents:
        true[b, first:last] = 1

    def one_rank(dtype):
        parameters = {name: t.to(dtype).requires_grad_() for name, t in shape.parameters(torch).items()}
        whole = hidden.clone().to(dtype).requires_grad_()
        out = alone(torch, shape, parameters, whole, documents, rmsnorm)
        (out * (weights * true).to(dtype)).sum().backward()
        return {"out": out.detach() * true, "hidden": whole.grad, **{name: t.grad for name, t in parameters.items() if t.grad is not None}}

    want, plain = one_rank(torch.float64), one_rank(torch.float32)

    axes = format.replace("h", "")
    lie = {"thd": lambda t: t[0], "sbhd": lambda t: t.transpose(0, 1), "bshd": lambda t: t}[format]
    groups = thread_groups(ranks)

    def work(group):
        torch.set_num_threads(1)
        tokens = cp.partition_tokens(partition, format, sequences, ranks, group.rank)
        deal = lambda t: torch.from_numpy(cp.scatter(lie(t).detach().float().numpy(), tokens, axes))
        mine = {name: t.float().requires_grad_() for name, t in shape.parameters(torch).items()}
        rows = deal(hidden).requires_grad_()
        got = on_rank(torch, group, shape, mine, rows, sequences, partition, format, documents, rmsnorm, uneven)
        (got * deal(weights) * deal(true)).sum().backward()
        return tokens, got.detach(), rows.grad, {name: t.grad for name, t in mine.items() if t.grad is not None}

    found = everywhere(groups, work)

    def gathered(of):
        made = torch.full((batch, seq, D_MODEL), torch.nan, dtype=torch.float64)
        for rank in found:
            cp.gather_rows(lie(made).numpy(), rank[0], of(rank).numpy(), axes)
        return made

    got = {"out": gathered(lambda r: r[1]) * true, "hidden": gathered(lambda r: r[2])}
    for name in found[0][3]:
        got[name] = sum(r[3][name].double() for r in found)
    assert got.keys() == want.keys() == {"out", "hidden", *NAMES} - (set() if rmsnorm else {"norm"})
    for name in want:
        error, alike = (((x[name] - want[name]).norm() / want[name].norm()).item() for x in (got, plain))
        print(f"{name}: {error:.1e}, one rank in fp32 {alike:.1e}")
        # As accurate as one rank in fp32, whose sums only have another order.
        assert error < 3 * alike + 3e-7, f"{name}: relative error {error:.1e}, one rank in fp32 {alike:.1e}"
    give_back(groups)


def test_rules(torch):
    """Megatron's, in its words; and everything that they allow is dealt out as Megatron does."""
    from context_parallel.mamba import shares

    for nheads, ngroups, ranks, text in (
        (6, 2, 4, "nheads must be evenly divisible by tp_size * cp_size"),
        (12, 3, 4, "cp_size must be evenly divisible by ngroups/tp_size"),
        (12, 6, 4, "ngroups must be evenly divisible by tp_size * cp_size"),
        (12, 5, 4, "nheads must be evenly divisible by ngroups"),
        (2, 1, 4, "nheads must be at least tp_size * cp_size"),
    ):
        with pytest.raises(cp.Error, match="got nheads") as caught:
            shares(nheads, ngroups, ranks, 0)
        assert caught.value.status == Status.INVALID_ARGUMENT and text in str(caught.value)
    allowed = 0
    for nheads, ngroups, ranks in ((h, g, p) for h in range(1, 33) for g in range(1, h + 1) for p in range(1, 17)):
        try:
            found = [shares(nheads, ngroups, ranks, r) for r in range(ranks)]
        except cp.Error:
            continue
        allowed += 1
        repeat = max(ranks // ngroups, 1)
        count = max(ngroups // ranks, 1)
        for r, (heads, groups) in enumerate(found):
            assert heads == range(r * nheads // ranks, (r + 1) * nheads // ranks)
            assert groups == range(r // repeat * count, (r // repeat + 1) * count)
    assert allowed > 300
    heads, groups = zip(*(shares(6, 2, 4, r, uneven=True) for r in range(4)))
    assert heads == (range(0, 1), range(1, 3), range(3, 4), range(4, 6)) and groups == (range(0, 1), range(0, 1), range(1, 2), range(1, 2))


def test_parameter_slices(torch):
    """Of a layer whose parameters are their own indices."""
    from context_parallel.mamba import MambaContextParallel

    groups = thread_groups(4)
    conv = torch.nn.Conv1d(16 + 2 * 2 * 3, 28, 2, groups=28, padding=1)
    conv.weight.data, conv.bias.data = torch.arange(56.0).view(28, 1, 2), torch.arange(28.0)
    vector = torch.arange(8.0)
    made = [MambaContextParallel(g, 16, 8, 2, 3, conv, vector, vector, torch.arange(16.0), True) for g in groups]
    assert made[3].get_conv1d_bias().tolist() == [12, 13, 14, 15, 19, 20, 21, 25, 26, 27]
    assert made[0].get_conv1d_bias().tolist() == [0, 1, 2, 3, 16, 17, 18, 22, 23, 24]
    assert made[3].get_conv1d_weight()[:, 0, 0].tolist() == [2 * c for c in made[3].get_conv1d_bias().tolist()]
    assert made[1].get_dt_bias().tolist() == [2, 3] and made[2].get_A_log().tolist() == [4, 5]
    assert made[2].get_D().tolist() == [8, 9, 10, 11] and made[0].D_has_hdim
    assert [m.conv1d_channels() for m in made] == [10] * 4 and made[1].head_groups == [0, 0]
    with pytest.raises(cp.Error, match="input_: got 5 channels, need 52 = 16"):
        made[0].pre_conv_ssm(torch.zeros(3, 1, 5), None)
    give_back(groups)
