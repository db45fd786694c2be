"""Sequence ↔ heads: over partitions and formats, uneven shares, shared heads, types, strides, wrong arguments, autograd, threads and processes."""

import multiprocessing

import numpy as np
import pytest

import context_parallel as cp
from context_parallel import Status
from corpus import DTYPES, cases
from launched import trader
from ranks import everywhere, from_local, give_back, outcomes, strided, thread_groups, to_local
from test_interface import raises

# z, x, B, C, dt of a Mamba layer: (heads, dim).
MAMBA = [(8, 4), (8, 4), (2, 3), (2, 3), (8, 1)]


def globals_of(case, shapes, dtype="float32"):
    """[token, head, dim] of small integers; padding is NaN."""
    rng = np.random.default_rng(3)
    made = [rng.integers(-7, 8, (case.tokens("q"), heads, dim)).astype(DTYPES[dtype]) for heads, dim in shapes]
    for rows in made:
        rows[~case.is_true("q")] = np.nan
    return made


def without_padding(case, rows):
    return np.where(case.is_true("q")[:, None, None], rows, 0).astype(rows.dtype)


def trade(group, case, rows, format, view=lambda x: x, heads=None):
    """There and back on one rank: (whole [token, head, dim] …), ([local], tokens)."""
    sequences = case.sequences(group.size)
    tokens = cp.partition_tokens(case.partition, format, sequences, group.size, group.rank)
    how = dict(format=format, partition=case.partition, heads=heads)
    local = [view(to_local(case, x, tokens, format)) for x in rows]
    whole = cp.sequence_to_heads(group, local, sequences, **how)
    back = cp.heads_to_sequence(group, whole, sequences, tensor_heads=[x.shape[1] for x in rows], **{**how, "heads": heads or max(x.shape[1] for x in rows)})
    everything = np.arange(case.tokens("q"))
    flat = []
    for x in whole:
        found = np.full((case.tokens("q"), x.shape[format.index("h")], x.shape[-1]), np.nan, x.dtype)
        from_local(case, found, everything, x, format)
        flat.append(found)
    return flat, back, tokens


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["causal_101_sbhd", "causal_101_list", "pad_left", "thd_padded_between", "five_tokens_striped", "five_tokens_contiguous"])
def test_there_and_back(name, ranks):
    case, groups = cases()[name], thread_groups(ranks)
    as_is = lambda x: x
    combinations = (MAMBA, "float32", None, as_is), ([(6, 5), (3, 2)], "bfloat16", None, strided), ([(4, 8), (6, 1)], "float16", 12, as_is)
    for shapes, dtype, heads, view in combinations:
        rows = globals_of(case, shapes, dtype)
        found = everywhere(groups, lambda group: trade(group, case, rows, case.format, view, heads))
        dealt = heads or max(h for h, _ in shapes)
        for i, (h, _) in enumerate(shapes):
            holders = np.zeros(h)
            for rank, (whole, _, _) in enumerate(found):
                mine = cp.heads_of_rank(dealt, ranks, rank, h)
                holders[mine.start : mine.stop] += 1
                np.testing.assert_array_equal(whole[i], without_padding(case, rows[i])[:, mine.start : mine.stop])
            for _, back, tokens in found:
                got = np.full_like(rows[i], 99)
                from_local(case, got, tokens, back[i], case.format)
                np.testing.assert_array_equal(got[tokens], (without_padding(case, rows[i]) * holders[:, None].astype(rows[i].dtype))[tokens])
            assert holders.min() >= 1 and (h == dealt) <= (holders.max() == 1)
    give_back(groups)


@pytest.mark.fast
def test_shares():
    assert [cp.heads_of_rank(8, 3, r) for r in range(3)] == [range(0, 2), range(2, 5), range(5, 8)]
    assert [cp.heads_of_rank(8, 4, r, 2) for r in range(4)] == [range(0, 1), range(0, 1), range(1, 2), range(1, 2)]
    assert [len(cp.heads_of_rank(2, 3, r)) for r in range(3)] == [0, 1, 1]
    raises(Status.INVALID_ARGUMENT, "tensor_heads: got 3, which must divide the 8", cp.heads_of_rank, 8, 2, 0, 3)
    raises(Status.INVALID_ARGUMENT, "rank: got 2 of 2", cp.heads_of_rank, 8, 2, 2)


@pytest.mark.fast
def test_one_exchange_and_bytes():
    """Every rank sends what others need and nothing else, in one call of the library for all tensors."""
    case, groups = cases()["causal_101_sbhd"], thread_groups(4)
    rows = globals_of(case, MAMBA)

    def work(group):
        before = group.statistics()
        trade(group, case, rows, case.format)
        after = group.statistics()
        tokens = cp.partition_tokens("zigzag", "sbhd", case.sequences(4), 4, group.rank)
        return {key: after[key] - before[key] for key in ("sent_bytes", "received_bytes")}, len(tokens)

    found = everywhere(groups, work)
    total = sum(tokens for _, tokens in found)
    for rank, (moved, tokens) in enumerate(found):
        width = lambda r: sum(len(cp.heads_of_rank(8, 4, r, h)) * dim * 4 for h, dim in MAMBA)
        there = sum(tokens * width(r) for r in range(4) if r != rank)
        back = (total - tokens) * width(rank)
        assert moved["sent_bytes"] == there + back
        assert moved["received_bytes"] == there + back  # what goes out in one direction comes in in the other
    give_back(groups)


def test_given_outputs_and_workspace():
    case, groups = cases()["causal_101_sbhd"], thread_groups(3)
    rows = globals_of(case, MAMBA, "bfloat16")

    def work(group):
        sequences = case.sequences(group.size)
        tokens = cp.partition_tokens(case.partition, case.format, sequences, group.size, group.rank)
        local = [to_local(case, x, tokens, case.format) for x in rows]
        how = dict(format=case.format, partition=case.partition)
        size = cp.trade_workspace_size(group, local, sequences, **how)
        raw = np.full(size + 64, 255, np.uint8)
        workspace = raw[-raw.ctypes.data % 64 :][:size]
        whole = cp.sequence_to_heads(group, local, sequences, workspace=workspace, **how)
        fresh = [strided(np.full_like(x, 99)) for x in whole]
        again = cp.sequence_to_heads(group, local, sequences, out=fresh, **how)
        assert all(x is y for x, y in zip(again, fresh))
        for x, y in zip(whole, fresh):
            np.testing.assert_array_equal(x, y)
        mine = [np.full_like(x, 99) for x in local]
        back = cp.heads_to_sequence(group, whole, sequences, out=mine, heads=8, workspace=workspace, **how)
        assert all(x is y for x, y in zip(back, mine)) and not any(np.isnan(x.astype(np.float32)).any() or (x == 99).any() for x in mine)
        one = cp.sequence_to_heads(group, local[1], sequences, **how)
        np.testing.assert_array_equal(one, whole[1])
        if size > 64:
            with pytest.raises(cp.Error) as caught:
                cp.sequence_to_heads(group, local, sequences, workspace=workspace[:64], **how)
            assert caught.value.status == Status.OUT_OF_MEMORY

    everywhere(groups, work)
    give_back(groups)


def wrong_calls():
    x = np.zeros((1, 4, 6, 8), np.float32)
    good = dict(local=[x, x[:, :, :2]], sequences=cp.Sequences.dense(1, 8))
    yield good, {"local": [x, np.zeros((1, 4, 4, 8), np.float32)]}, "4 heads, which must divide the 6"
    yield good, {"local": [x, x.astype(np.float64)]}, "local[1].dtype"
    yield good, {"local": [x[:, :3], x[:, :3]]}, "local[0]: got shape [batch, seq, heads, dim] = [1, 3, 6, 8], this rank holds [1, 4, 6, 8]"
    yield good, {"local": [x] * 17}, "args.count: got 17"
    yield good, {"local": [x[0], x[0]]}, "need 4 dimensions"
    yield good, {"sequences": 3}, "sequences: got int"
    yield good, {"partition": "spiral"}, "partition: got 'spiral'"
    yield good, {"format": "hdbs"}, "format: got 'hdbs'"
    yield good, {"heads": 4}, "6 heads, which must divide the 4"
    yield good, {"out": [x]}, "out: got 1 arrays for 2 tensors"
    yield good, {"out": [np.zeros((1, 8, 2, 8), np.float32), x]}, "whole[0]: got shape"
    yield good, {"out": [np.zeros((1, 8, 3, 8), np.float16), np.zeros((1, 8, 1, 8), np.float32)]}, "whole[0].dtype: got fp16"
    yield good, {"workspace": np.zeros(5)}, "workspace"
    yield good, {"stream": 3}, "stream"


@pytest.mark.parametrize("good, wrong, text", list(wrong_calls()))
def test_wrong_arguments(good, wrong, text):
    """The rank gets its error, the other one learns which rank it was, and the next call works."""
    groups = thread_groups(2)

    def work(group):
        arguments = {**good, **(wrong if group.rank == 1 else {})}
        return cp.sequence_to_heads(group, arguments.pop("local"), arguments.pop("sequences"), **arguments)

    one, other = outcomes(groups, work)
    assert isinstance(other, cp.Error) and other.status in (Status.INVALID_ARGUMENT, Status.UNSUPPORTED) and text in str(other), other
    assert isinstance(one, cp.Error) and one.status == Status.MISMATCH and "rank 1 refused cp_sequence_to_heads" in str(one), one
    everywhere(groups, lambda group: cp.sequence_to_heads(group, good["local"], good["sequences"]))
    give_back(groups)


@pytest.mark.fast
def test_ranks_that_disagree():
    groups = thread_groups(3)
    x = np.zeros((1, 4, 6, 8), np.float32)
    sequences = cp.Sequences.dense(1, 12)
    found = outcomes(groups, lambda group: cp.sequence_to_heads(group, x, sequences, partition="striped" if group.rank == 1 else "zigzag"))
    assert all(isinstance(e, cp.Error) and e.status == Status.MISMATCH and "rank 1 asks for another problem" in str(e) for e in found), found
    crossed = lambda group: (cp.heads_to_sequence(group, np.zeros((1, 12, 2, 8), np.float32), sequences) if group.rank == 1 else
                             cp.sequence_to_heads(group, x, sequences))  # fmt: skip
    found = outcomes(groups, crossed)
    assert all("rank 1 is in another call: it calls cp_heads_to_sequence" in str(e) for e in found), found
    give_back(groups)


def test_subsets_and_attention_interleave():
    """Trades on subsets of a group between calls of a layer that uses the whole one."""
    groups = thread_groups(4)
    sequences = cp.Sequences.dense(1, 24)
    rng = np.random.default_rng(1)
    whole = rng.standard_normal((1, 24, 4, 8)).astype(np.float32)

    def work(group):
        layer = cp.Attention(heads=4, head_dim=8, dtype="float32", causal=True)
        layer.set_group(group, "a2a")
        pair = group.subset([3, 0] if group.rank in (0, 3) else [1, 2])
        for _ in range(3):
            rows = cp.partition_tokens("zigzag", "bshd", sequences, 4, group.rank)
            q = whole[:, rows]
            out, _, context = layer.forward(q, q, q, sequences)
            mine = cp.partition_tokens("zigzag", "bshd", sequences, 2, pair.rank)
            back = cp.heads_to_sequence(pair, cp.sequence_to_heads(pair, whole[:, mine], sequences), sequences)
            np.testing.assert_array_equal(back, whole[:, mine])
            layer.backward(context, out)

    everywhere(groups, work)
    give_back(groups)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_autograd_is_the_transpose(torch, ranks):
    """⟨T x, y⟩ = ⟨x, Tᵀ y⟩ summed over ranks, with shared heads, and of both directions."""
    from context_parallel.torch import heads_to_sequence, sequence_to_heads

    case, groups = cases()["causal_101_sbhd"], thread_groups(ranks)
    sequences = case.sequences(ranks)

    def work(group):
        torch.manual_seed(group.rank)
        rows = len(cp.partition_tokens("zigzag", "sbhd", sequences, ranks, group.rank)) // 2
        how = dict(format="sbhd", partition="zigzag", heads=8)
        local = [torch.randint(-3, 4, (rows, 2, heads, dim)).float().requires_grad_() for heads, dim in MAMBA]
        whole = sequence_to_heads(group, local, sequences, **how)
        against = [torch.randint(-3, 4, w.shape).float() for w in whole]
        there = sum((w * a).sum() for w, a in zip(whole, against))
        there.backward()
        transposed = cp.heads_to_sequence(group, [a.detach() for a in against], sequences, tensor_heads=[h for h, _ in MAMBA], **how)
        for x, t in zip(local, transposed):
            assert torch.equal(x.grad, t)
        inner = sum((x * t).sum() for x, t in zip(local, transposed)).item()
        # And the other way round.
        again = [w.detach().requires_grad_() for w in whole]
        back = heads_to_sequence(group, again, sequences, tensor_heads=[h for h, _ in MAMBA], **how)
        sum((b * b.detach()).sum() for b in back).backward()
        for x, b in zip(again, cp.sequence_to_heads(group, [b.detach() for b in back], sequences, **how)):
            assert torch.equal(x.grad, b)
        # One number with strides of 0, as after sum(), and an output that nobody used.
        z, x = sequence_to_heads(group, [v.detach().requires_grad_() for v in local[:2]], sequences, **how)
        z.sum().backward()
        return there.item(), inner

    found = everywhere(groups, work)
    assert sum(a for a, _ in found) == sum(b for _, b in found) != 0
    give_back(groups)


@pytest.mark.parametrize("size", [2, 3])
def test_processes(size):
    """Over shared memory: what every process found equals the global tensors (checked there)."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    processes = [context.Process(target=trader, args=(pipes[r][1], r, size)) for r in range(size)]
    for process in processes:
        process.start()
    id = pipes[0][0].recv_bytes()
    for mine, _ in pipes[1:]:
        mine.send_bytes(id)
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * size
