"""Sequence ↔ heads on CUDA devices (the machine's own, or the software GPU's): types and shared heads, strides, transports, graphs."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

import context_parallel as cp
import devices
from context_parallel import Status
from corpus import cases
from devices import DLPackArray, Graph, Stream
from ranks import everywhere, outcomes, strided, to_local
from test_trade import MAMBA, globals_of, without_padding

pytestmark = pytest.mark.usefixtures("cuda")

BF16 = np.dtype(ml_dtypes.bfloat16)


def run(transport, ranks, name, dtype, view, index_of):
    case = cases()[name]
    rows = globals_of(case, MAMBA, dtype)
    total = case.tokens("q")

    def work(group):
        index, stream = index_of(group.rank), Stream(index_of(group.rank))
        on = lambda array: DLPackArray(view(array), index)
        sequences = case.sequences(ranks)
        tokens = cp.partition_tokens(case.partition, case.format, sequences, ranks, group.rank)
        how = dict(format=case.format, partition=case.partition, heads=8, stream=stream)
        shares = [cp.heads_of_rank(8, ranks, group.rank, heads) for heads, _ in MAMBA]
        everything = np.arange(total)
        empty = lambda tokens, heads, dim: on(to_local(case, np.full((total, heads, dim), np.nan, rows[0].dtype), tokens, case.format))
        local = [on(to_local(case, x, tokens, case.format)) for x in rows]
        whole = [empty(everything, len(mine), dim) for mine, (_, dim) in zip(shares, MAMBA)]
        back = [empty(tokens, heads, dim) for heads, dim in MAMBA]
        cp.sequence_to_heads(group, local, sequences, out=whole, **how)
        cp.heads_to_sequence(group, whole, sequences, out=back, **how)
        stream.synchronize()
        for i, (x, mine) in enumerate(zip(rows, shares)):
            holders = sum((np.isin(np.arange(x.shape[1]), cp.heads_of_rank(8, ranks, r, x.shape[1])) for r in range(ranks)), np.zeros(x.shape[1]))
            x = without_padding(case, x)
            np.testing.assert_array_equal(np.asarray(whole[i]), to_local(case, x[:, mine.start : mine.stop], everything, case.format))
            np.testing.assert_array_equal(np.asarray(back[i]), to_local(case, x * holders[:, None].astype(x.dtype), tokens, case.format))

    everywhere(cp.Group.threads(ranks, transport, timeout=60, device=[("cuda", index_of(r)) for r in range(ranks)]), work)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name, ranks", [("causal_101_sbhd", 3), ("causal_101_list", 2), ("pad_left", 4), ("thd_padded_between", 3), ("five_tokens_striped", 5)])
def test_there_and_back(name, ranks, dtype):
    run("local", ranks, name, dtype, strided if dtype == "float16" else lambda x: x, lambda rank: 0)


@pytest.mark.parametrize("name", ["causal_101_sbhd", "causal_101_list", "thd_padded_between", "five_tokens_striped"])
@pytest.mark.parametrize("transport", ["nccl", "staged"])
def test_a_device_for_every_rank(two_devices, transport, name):
    if transport == "nccl":
        ctypes.CDLL("libnccl.so.2")
    run(transport, 2, name, "bfloat16", lambda x: x, lambda rank: rank)


def test_captured_in_a_graph(two_devices):
    """Replayed on what the input holds then; without a workspace, and where hosts meet, a capture is refused, and nothing is lost."""
    ctypes.CDLL("libnccl.so.2")
    sequences = cp.Sequences.dense(1, 24)
    of = lambda seed: np.random.default_rng(seed).integers(-9, 9, (1, 24, 4, 8)).astype(BF16)

    def work(group):
        stream, how = Stream(group.rank), dict(heads=4)
        tokens = cp.partition_tokens("zigzag", "bshd", sequences, 2, group.rank)
        mine = cp.heads_of_rank(4, 2, group.rank)
        x = DLPackArray(np.ascontiguousarray(of(0)[:, tokens]), group.rank)
        whole = DLPackArray(np.zeros((1, 24, 2, 8), BF16), group.rank)
        back = DLPackArray(np.zeros((1, 12, 4, 8), BF16), group.rank)
        memory = devices.buffer(1 << 16, group.rank)
        both = lambda **more: (cp.sequence_to_heads(group, x, sequences, out=whole, stream=stream, **how, **more),
                               cp.heads_to_sequence(group, whole, sequences, out=back, stream=stream, **how, **more))  # fmt: skip
        both()
        stream.synchronize()
        with pytest.raises(cp.Error) as refused, Graph(stream):
            both()
        assert refused.value.status == Status.NOT_CAPTURABLE and "workspace" in str(refused.value)
        graph = Graph(stream)
        with graph:
            both(workspace=memory)
        for seed in (1, 2):
            x.memory.write(np.ascontiguousarray(of(seed)[:, tokens]))
            graph.launch()
            stream.synchronize()
            np.testing.assert_array_equal(np.asarray(whole), of(seed)[:, :, mine.start : mine.stop])
            np.testing.assert_array_equal(np.asarray(back), of(seed)[:, tokens])
        graph.close()

    # Captures of several threads at once are spoilt by each other's memory being collected: one rank after the other would wait for ever.
    found = outcomes(cp.Group.threads(2, "nccl", timeout=60, device=[("cuda", 0), ("cuda", 1)]), work)
    assert found == [None, None], found


def test_wrong_places():
    group = cp.Group.threads(1, device="cuda:0")[0]
    x = np.zeros((1, 8, 2, 4), np.float32)
    with pytest.raises(cp.Error, match="this layer computes on CUDA device 0"):
        cp.sequence_to_heads(group, x, cp.Sequences.dense(1, 8))
    with pytest.raises(cp.Error, match="outputs are made only for NumPy arrays and torch tensors"):
        cp.sequence_to_heads(group, DLPackArray(x), cp.Sequences.dense(1, 8))
