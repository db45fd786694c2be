"""Tensors on CUDA devices, by the driver alone: the corpus with ranks as threads, streams, errors that name the argument. With LD_LIBRARY_PATH=target/softgpu
on the software GPU, else on the machine's own."""

import contextlib
import ctypes
import functools
import sys

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import context_parallel as cp
import devices
from context_parallel import Status
from corpus import cases, check
from devices import DeviceArray, DLPackArray, Graph, InterfaceArray, OldDLPackArray, Stream
from launched import CUDA_CASES
from ranks import collect, everywhere, outcomes, run_case
from test_interface import qkv, raises, random
from test_processes import SCRIPT, check_results, done, launch, mpirun

pytestmark = pytest.mark.usefixtures("cuda")

COMMS = ("p2p", "all_gather", "a2a", "a2a+p2p")
CONFIG = dict(heads=4, kv_heads=2, head_dim=16, dtype="bfloat16", causal=True, device="cuda:0")
SEQ = cp.Sequences.dense(2, 24)
BF16 = np.dtype(ml_dtypes.bfloat16)
# Settings of the layer, and one of run_case.
OPTIONS = ({}, {"save": True}, {"wire_fp32": True}, {"deterministic": True}, {"workspace": True}, {"sm_margin": 1}, {"max_segments": 200})
FAST = {name: case for name, case in cases().items() if "fast" in case.tags}
NAMES = [name for name, case in FAST.items() if max(case.tokens("q"), case.tokens("k")) <= 210 and case.dim_qk >= case.dim_v]


def spread(array):
    """The same values with gaps of 16 bytes between rows, heads and batches."""
    if array.ndim < 3 or array.dtype == np.float32:
        return array
    buffer = np.full([*(n + 1 for n in array.shape[:-1]), array.shape[-1] + 8], np.nan, array.dtype)
    view = buffer[tuple(slice(n) for n in array.shape)]
    view[...] = array
    return view


def run(groups, name, dtype, comm, kind, gaps, device_of, **options):
    case = cases()[name]

    def work(group):
        index = device_of(group.rank)
        stream = Stream(index)
        view = lambda x: kind(spread(x) if gaps else x, index)
        found = run_case(group, case, dtype, comm, view=view, preallocate=True, buffer=lambda size: devices.buffer(size, index), stream=stream,
                         device=("cuda", index), **options)  # fmt: skip
        stream.synchronize()
        return found

    check(case, dtype, collect(case, everywhere(groups, work), case.format))


_groups = {}


def groups_of(ranks, transport, device_of):
    """Groups of this many threads; the same ones for as long as nothing fails."""
    places = [("cuda", device_of(rank)) for rank in range(ranks)]
    return _groups.pop((transport, *places), None) or cp.Group.threads(ranks, transport, timeout=60, device=places)


def with_groups(ranks, transport, device_of, work):
    groups = groups_of(ranks, transport, device_of)
    work(groups)
    _groups[(transport, *(("cuda", device_of(rank)) for rank in range(ranks)))] = groups


@pytest.mark.parametrize("name", NAMES)
def test_corpus_local(name):
    """All ranks on one device."""
    index = NAMES.index(name)
    dtype = ("bfloat16", "float16")[index % 2]
    kinds = (DLPackArray, OldDLPackArray) if dtype == "bfloat16" else (InterfaceArray, DLPackArray)
    ranks, comm, options = (2, 3, 1)[index % 3], COMMS[index % 4], OPTIONS[index % len(OPTIONS)]
    with_groups(ranks, "local", lambda rank: 0, lambda groups: run(groups, name, dtype, comm, kinds[index // 2 % 2], index % 5 < 2, lambda rank: 0, **options))


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("transport", ["local", "nccl", "staged"])
def test_a_device_for_every_rank(two_devices, transport, comm):
    if transport == "nccl":
        ctypes.CDLL("libnccl.so.2")
    dtype = ("bfloat16", "float16")[COMMS.index(comm) % 2]
    own = lambda rank: rank
    with_groups(2, transport, own, lambda groups: run(groups, "causal_33", dtype, comm, DLPackArray, False, own))


class NcclId(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 128)]


def test_nccl_communicator_of_the_caller(two_devices):
    nccl, id = ctypes.CDLL("libnccl.so.2"), NcclId()
    nccl.ncclCommInitRank.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, NcclId, ctypes.c_int]
    assert nccl.ncclGetUniqueId(ctypes.byref(id)) == 0

    def make(rank):
        comm = ctypes.c_void_p()
        with devices.on(rank):
            assert nccl.ncclCommInitRank(ctypes.byref(comm), 2, id, rank) == 0
        return comm, cp.Group.from_nccl(comm.value, ("cuda", rank), timeout=60)

    made = outcomes([0, 1], make)
    groups = [group for _, group in made]
    assert [(group.rank, group.size) for group in groups] == [(0, 2), (1, 2)]
    run(groups, "causal_33", "bfloat16", "p2p", DLPackArray, False, lambda rank: rank)
    raises(Status.UNSUPPORTED, "CP_GROUP_AGREE", cp.Group.from_nccl, made[0][0].value, "cuda:0", agree=True)

    def end(rank):
        groups[rank].close()
        with devices.on(rank):
            assert nccl.ncclCommDestroy(made[rank][0]) == 0

    assert outcomes([0, 1], end) == [None, None]


@pytest.mark.parametrize("transport", ["auto", "staged"])
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_processes(two_devices, mpi, transport, tmp_path):
    """auto is NCCL."""
    printed = launch([mpirun(mpi), "-n", 2, sys.executable, SCRIPT, tmp_path, transport])
    assert done(printed) == [("0", "2"), ("1", "2")]
    check_results(tmp_path, 2, CUDA_CASES)


# Streams


def small(kind=DLPackArray, rows=24, index=0, **changes):
    made = dict(zip("qkv", (x.astype(BF16) for x in qkv(rows))))
    return [kind(x, index) for x in {**made, **changes}.values()]


def outputs(kind=DLPackArray, rows=24, index=0):
    return dict(out=kind(np.full((2, rows, 4, 16), np.nan, BF16), index), lse=kind(np.full((2, 4, rows), np.nan, np.float32), index))


def gradients(rows=24):
    return {name: DLPackArray(np.full((2, rows, heads, 16), np.nan, BF16)) for name, heads in (("dq", 4), ("dk", 2), ("dv", 2))}


@functools.cache
def on_cpu():
    """The same on the CPU: out, lse, dq, dk, dv."""
    layer = cp.Attention(**{**CONFIG, "device": "cpu"})
    out, lse, context = layer.forward(*(x.astype(BF16) for x in qkv(24)), SEQ)
    return out, lse, *layer.backward(context, random(2, 24, 4, 16, seed=9).astype(BF16))


def near(got, wanted):
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=0.03, atol=0.03)


def test_calls_are_enqueued_on_the_stream(monkeypatch):
    wanted = on_cpu()
    seen, real = [], cp.attention.lib.cp_attention_forward
    monkeypatch.setattr(cp.attention.lib, "cp_attention_forward", lambda handle, args, stream: seen.append(stream) or real(handle, args, stream))
    layer, stream = cp.Attention(**CONFIG), Stream()
    q, k, v = small()
    results = outputs()
    layer.forward(q, k, v, SEQ, **results, stream=stream)
    layer.forward(q, k, v, SEQ, **results, stream=stream.ptr)
    stream.synchronize()
    near(results["out"], wanted[0])

    class Torch:
        cuda_stream = stream.ptr

    class CudaCore:
        def __cuda_stream__(self):
            return 0, stream.ptr

    layer.forward(q, k, v, SEQ, **results, stream=Torch())
    layer.forward(q, k, v, SEQ, **results, stream=CudaCore())
    layer.forward(q, k, v, SEQ, **results)
    assert seen == [stream.ptr] * 4 + [0]
    # DLPack's producers are told where the call works; the default stream is their number 1.
    assert q.streams == [stream.ptr] * 4 + [1] and set(results["out"].streams) == {stream.ptr, 1}


def test_forward_and_backward_on_a_stream():
    layer, stream = cp.Attention(**CONFIG, deterministic=True), Stream()
    results, grads = outputs(), gradients()
    _, _, context = layer.forward(*small(), SEQ, **results, stream=stream)
    layer.backward(context, DLPackArray(random(2, 24, 4, 16, seed=9).astype(BF16)), **grads, stream=stream)
    stream.synchronize()
    for got, wanted in zip([*results.values(), *grads.values()], on_cpu()):
        near(got, wanted)


def test_the_stream_that_an_array_names():
    layer, stream, other = cp.Attention(**{**CONFIG, "dtype": "float16"}), Stream(), Stream()
    arrays = [InterfaceArray(x.astype(np.float16)) for x in qkv(24)]
    results = dict(out=InterfaceArray(np.zeros((2, 24, 4, 16), np.float16)), lse=InterfaceArray(np.zeros((2, 4, 24), np.float32)))
    for array in (*arrays, *results.values()):
        array.named_stream = stream.ptr
    layer.forward(*arrays, SEQ, **results)
    stream.synchronize()
    near(results["out"], on_cpu()[0])
    raises(Status.INVALID_ARGUMENT, "q|its library works on stream", layer.forward, *arrays, SEQ, **results, stream=other)


def test_a_graph():
    """Captured once, run on other inputs; without a workspace of the caller's it is refused by name."""
    layer, stream = cp.Attention(**CONFIG, deterministic=True), Stream()
    (q, k, v), results, grads = small(), outputs(), gradients()
    d_out, memory = DLPackArray(random(2, 24, 4, 16, seed=9).astype(BF16)), devices.buffer(layer.workspace_size(48))
    with pytest.raises(cp.Error) as refused, Graph(stream):
        layer.forward(q, k, v, SEQ, **results, stream=stream)
    assert refused.value.status == Status.NOT_CAPTURABLE and "workspace" in str(refused.value)
    graph = Graph(stream)
    with graph:
        _, _, context = layer.forward(q, k, v, SEQ, **results, workspace=memory, stream=stream)
        layer.backward(context, d_out, **grads, workspace=memory, stream=stream)
    assert np.isnan(np.asarray(results["out"], np.float32)).all()
    zero = np.zeros((2, 24, 4, 16), BF16)
    q.memory.write(zero)
    graph.launch()
    stream.synchronize()
    plain = cp.Attention(**{**CONFIG, "device": "cpu"})
    near(results["out"], plain.forward(zero, np.asarray(k), np.asarray(v), SEQ)[0])
    q.memory.write(np.ascontiguousarray(qkv(24)[0].astype(BF16)))
    graph.launch()
    stream.synchronize()
    for got, wanted in zip([*results.values(), *grads.values()], on_cpu()):
        near(got, wanted)
    graph.close()


SEEDS = (5, 0xFEDCBA9876543210)


def with_seed(seed, stream, again=None):
    """Bits of a step with dropout; `again`: run in a graph, first the step, then once after each call of it."""
    layer = cp.Attention(**CONFIG, deterministic=True, dropout=0.5)
    results, grads = outputs(), gradients()
    arrays, d_out = small(), DLPackArray(random(2, 24, 4, 16, seed=9).astype(BF16))
    memory, graph = devices.buffer(layer.workspace_size(48)), Graph(stream)
    bits = lambda: b"".join(np.asarray(x).tobytes() for x in (*results.values(), *grads.values()))
    with graph if again else contextlib.nullcontext():
        _, _, context = layer.forward(*arrays, SEQ, **results, dropout_seed=seed, workspace=memory, stream=stream)
        layer.backward(context, d_out, **grads, workspace=memory, stream=stream)
    stream.synchronize()
    if again is None:
        return bits()
    found = []
    for _ in again():
        graph.launch()
        stream.synchronize()
        found.append(bits())
    graph.close()
    return found


@pytest.mark.parametrize("kind, dtype", [(InterfaceArray, "uint64"), (DLPackArray, "int64")])
def test_a_seed_on_the_device(kind, dtype):
    """Draws what the number draws; a graph reads it in every replay."""
    stream = Stream()
    wanted = [with_seed(seed, stream) for seed in SEEDS]
    assert wanted[0] != wanted[1]
    values = [np.array([seed], np.uint64).view(dtype) for seed in SEEDS]
    assert [with_seed(kind(value), stream) for value in values] == wanted
    place = kind(values[0])

    def writes():
        for value in (*values, *values):
            yield place.memory.write(value)

    assert with_seed(place, stream, writes) == wanted * 2


@pytest.mark.parametrize("words, layer, make", [
    ("dropout_seed|shape (2,)|one 64-bit integer", {}, lambda: InterfaceArray(np.zeros(2, np.uint64))),
    ("dropout_seed|32 bits|one 64-bit integer", {}, lambda: InterfaceArray(np.zeros(1, np.int32))),
    ("dropout_seed|one 64-bit integer", {}, lambda: InterfaceArray(np.zeros(1))),
    ("dropout_seed|multiple of 8", {}, lambda: InterfaceArray(np.zeros(1, np.uint64), shift=4)),
    ("dropout_seed|without dropout", {"dropout": 0.0}, lambda: InterfaceArray(np.zeros(1, np.uint64))),
    ("dropout_seed|device 0, the layer is on the CPU", {"device": "cpu"}, lambda: InterfaceArray(np.zeros(1, np.uint64))),
])  # fmt: skip
def test_wrong_seeds_on_the_device(words, layer, make):
    layer = cp.Attention(**{**CONFIG, "dropout": 0.5, **layer})
    cpu = [x.astype(BF16) for x in qkv(24)]
    arrays, given = (cpu, {}) if "CPU" in words else (small(), outputs())
    raises(Status.INVALID_ARGUMENT, words, layer.forward, *arrays, SEQ, dropout_seed=make(), **given)


# Workspace


def test_allocator_of_the_caller():
    stream, taken, log = Stream(), {}, []

    def alloc(size, on):
        made = devices.Memory(size)
        taken[made.address] = made
        log.append(("alloc", size, on))
        return made.address

    def free(address, size, on):
        log.append(("free", size, on))

    layer = cp.Attention(**CONFIG, allocator=(alloc, free))
    results = outputs()
    layer.forward(*small(), SEQ, **results, stream=stream)
    stream.synchronize()
    near(results["out"], on_cpu()[0])
    size = log[0][1]
    assert log == [("alloc", size, stream.ptr), ("free", size, stream.ptr)] and size == layer.report(SEQ)["forward_workspace"]

    def broken(*_):
        raise ZeroDivisionError("no memory today")

    with pytest.raises(ZeroDivisionError, match="today"):
        cp.Attention(**CONFIG, allocator=(broken, free)).forward(*small(), SEQ, **outputs())
    raises(Status.OUT_OF_MEMORY, "allocator", cp.Attention(**CONFIG, allocator=(lambda *_: 0, free)).forward, *small(), SEQ, **outputs())
    raises(Status.INVALID_ARGUMENT, "allocator|'mine'", cp.Attention, **CONFIG, allocator="mine")
    raises(Status.INVALID_ARGUMENT, "allocator|CUDA", cp.Attention, **{**CONFIG, "device": None}, allocator=(alloc, free))


def test_workspace_of_the_caller():
    layer = cp.Attention(**CONFIG)
    memory, results = devices.buffer(layer.workspace_size(48)), outputs()
    layer.forward(*small(), SEQ, **results, workspace=memory)
    near(results["out"], on_cpu()[0])
    raises(Status.INVALID_ARGUMENT, "workspace|uint8", layer.forward, *small(), SEQ, **results, workspace=DLPackArray(np.zeros(64, np.float16)))
    odd = DLPackArray(np.zeros(memory.shape, np.uint8), shift=32)
    raises(Status.INVALID_ARGUMENT, "workspace|multiple of 64", layer.forward, *small(), SEQ, **results, workspace=odd)


def test_saved_of_the_caller():
    groups = cp.Group.threads(2, "local", timeout=60, device="cuda")

    def work(group):
        layer = cp.Attention(**CONFIG, save=True)
        layer.set_group(group, "a2a")
        raises(Status.INVALID_ARGUMENT, "saved|None|bytes", layer.forward, *small(rows=12), SEQ, **outputs(rows=12))
        size = layer.report(SEQ)["saved"]
        _, _, context = layer.forward(*small(rows=12), SEQ, **outputs(rows=12), saved=devices.buffer(size))
        grads = gradients(rows=12)
        layer.backward(context, DLPackArray(random(2, 12, 4, 16).astype(BF16)), **grads)
        return size

    assert min(everywhere(groups, work)) > 0


# Wrong arguments


def test_wrong_place(two_devices):
    host = [x.astype(BF16) for x in qkv(24)]
    layer = cp.Attention(**CONFIG)
    raises(Status.UNSUPPORTED, "q.device_type|CUDA device 0", layer.forward, host[0], *small()[1:], SEQ, **outputs())
    raises(Status.UNSUPPORTED, "k.device_type, device_id: got 2, 1", layer.forward, small()[0], small(index=1)[1], small()[2], SEQ, **outputs())
    raises(Status.UNSUPPORTED, "out.device_type", layer.forward, *small(), SEQ, **{**outputs(), "out": np.zeros((2, 24, 4, 16), BF16)})
    layer.forward(*small(), SEQ, **outputs())
    other = cp.Attention(**{**CONFIG, "device": "cpu"})
    raises(Status.UNSUPPORTED, "v.device_type|computes on the CPU", other.forward, *host[:2], small()[2], SEQ, out=host[0], lse=on_cpu()[1])
    raises(Status.INVALID_ARGUMENT, "stream|NULL on the CPU", other.forward, *host, SEQ, stream=Stream())
    raises(Status.INVALID_ARGUMENT, "stream|'fast'", layer.forward, *small(), SEQ, **outputs(), stream="fast")


def test_groups_and_layers_in_different_places(two_devices):
    groups = cp.Group.threads(2, timeout=20)
    on_second = cp.Group.threads(1, device="cuda:1")[0]
    raises(Status.INVALID_ARGUMENT, "group|computes on CUDA device 1|the layer on CUDA device 0", cp.Attention(**CONFIG).set_group, on_second)

    def work(group):
        raises(Status.INVALID_ARGUMENT, "group|computes on the CPU|device 0", cp.Attention(**CONFIG).set_group, group)

    everywhere(groups, work)


def test_wrong_devices():
    raises(Status.INVALID_ARGUMENT, "device|'tpu'|'cuda:N'", cp.Attention, **{**CONFIG, "device": "tpu"})
    raises(Status.INVALID_ARGUMENT, "device|'cuda:-1'", cp.Attention, **{**CONFIG, "device": "cuda:-1"})
    raises(Status.INVALID_ARGUMENT, "99", cp.Attention, **{**CONFIG, "device": ("cuda", 99)})
    raises(Status.INVALID_ARGUMENT, "99", cp.Group.threads, 1, device="cuda:99")
    raises(Status.INVALID_ARGUMENT, "list of 1, need 2", cp.Group.threads, 2, device=["cuda:0"])
    raises(Status.UNSUPPORTED, "transport_kind|SHM", cp.Group.threads, 1, transport="shm", device="cuda:0")
    raises(Status.UNSUPPORTED, "transport_kind|CUDA", cp.Group.threads, 1, transport="nccl")
    raises(Status.INVALID_ARGUMENT, "nccl_comm|'x'", cp.Group.from_nccl, "x", "cuda:0")
    raises(Status.INVALID_ARGUMENT, "nccl_comm", cp.Group.threads, 1, nccl_comm=5)


def shifted(array, by):
    return DLPackArray(array, shift=by)


class ReadOnly(DLPackArray):
    flags = 1


class Copied(DLPackArray):
    flags = 2


Q, OUT = qkv(24)[0].astype(BF16), np.zeros((2, 24, 4, 16), BF16)
WRONG = {
    "address": ("q.data|16", dict(q=lambda: shifted(Q, 8))),
    "stride": ("q.stride[1]|got 66 elements|multiple of 8", dict(q=lambda: DLPackArray(as_strided(np.zeros(24 * 70 * 2, BF16), Q.shape, (3168, 132, 32, 2))))),
    "dtype": ("q.dtype", dict(q=lambda: DLPackArray(Q.astype(np.float32)))),
    "bf16 by the interface": ("q|typestr|__dlpack__", dict(q=lambda: InterfaceArray(Q))),
    "nothing offered": ("q|DeviceArray|__dlpack__", dict(q=lambda: DeviceArray(Q))),
    "a copy": ("q|copy|in place", dict(q=lambda: Copied(Q))),
    "read-only": ("out|read-only", dict(out=lambda: ReadOnly(OUT))),
    "no output": ("out|the caller gives them", dict(out=lambda: None)),
    "last axis": ("q.stride[3]|contiguous", dict(q=lambda: DLPackArray(np.zeros((2, 24, 4, 32), BF16)[..., ::2]))),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arrays(what):
    words, changes = WRONG[what]
    layer = cp.Attention(**CONFIG)
    arguments = {**dict(zip("qkv", small())), **outputs(), **{name: make() for name, make in changes.items()}}
    raises(Status.INVALID_ARGUMENT, words, layer.forward, sequences=SEQ, **arguments)
    results = outputs()
    layer.forward(*small(), SEQ, **results)  # still usable
    near(results["out"], on_cpu()[0])


def test_what_cuda_does_not_offer():
    raises(Status.UNSUPPORTED, "dtype|fp32", cp.Attention, **{**CONFIG, "dtype": "float32"})
    good, why = cp.query_support(2, **{**CONFIG, "dtype": "float32"})
    assert not good and "fp32" in why
    assert cp.query_support(2, **CONFIG) == (True, "")


def test_lengths_on_a_device():
    on_device = InterfaceArray(np.array([0, 5, 24], np.int32))
    tokens = cp.partition_tokens("zigzag", "thd", cp.Sequences.packed(on_device), 2, 0)
    np.testing.assert_array_equal(tokens, cp.partition_tokens("zigzag", "thd", cp.Sequences.packed([0, 5, 24]), 2, 0))


# What is asked of torch, by a stand-in for it


@pytest.fixture
def torch_like(monkeypatch):
    import fake_torch

    fake_torch.cuda.taken.clear()
    fake_torch.cuda.given_back.clear()
    monkeypatch.setitem(sys.modules, "torch", fake_torch)
    return fake_torch


def test_torch_tensors(torch_like):
    """Outputs by torch.empty, workspace from its caching allocator, on its current stream."""
    stream = Stream()
    q, k, v, d_out = (torch_like.Tensor(x) for x in (*(x.astype(BF16) for x in qkv(24)), random(2, 24, 4, 16, seed=9).astype(BF16)))
    layer = cp.Attention(**{**CONFIG, "dtype": torch_like.bfloat16, "device": "cuda"})
    with torch_like.cuda.stream(torch_like.cuda.ExternalStream(stream.ptr, 0)):
        out, lse, context = layer.forward(q, k, v, SEQ)
        gradients = layer.backward(context, d_out)
    stream.synchronize()
    assert out.dtype is torch_like.bfloat16 and lse.dtype is torch_like.float32 and isinstance(gradients[0], torch_like.Tensor)
    assert [on for _, _, on in torch_like.cuda.taken.values()] == [stream.ptr] * 2 and torch_like.cuda.given_back == list(torch_like.cuda.taken)
    assert not any(t.recorded for t in (q, k, v, out, lse, d_out, *gradients))
    for got, wanted in zip((out, lse, *gradients), on_cpu()):
        near(got, wanted)


def test_torch_tensors_on_another_stream(torch_like):
    """stream=s: outputs belong to it, and torch is told that the inputs are in use there."""
    stream = Stream()
    q, k, v = (torch_like.Tensor(x.astype(BF16)) for x in qkv(24))
    layer = cp.Attention(**CONFIG, allocator="own")
    out, lse, _ = layer.forward(q, k, v, SEQ, stream=torch_like.cuda.ExternalStream(stream.ptr, 0))
    stream.synchronize()
    assert out.made_on == lse.made_on == stream.ptr and not torch_like.cuda.taken
    assert [t.recorded for t in (q, k, v)] == [[stream.ptr]] * 3 and out.recorded == []
    near(out, on_cpu()[0])


def test_torch_saves_on_the_device(torch_like):
    def work(group):
        layer, stream = cp.Attention(**CONFIG, save=True), Stream()
        layer.set_group(group, "a2a")
        q, k, v = (torch_like.Tensor(x.astype(BF16)) for x in qkv(12))
        with torch_like.cuda.stream(torch_like.cuda.ExternalStream(stream.ptr, 0)):
            out, _, context = layer.forward(q, k, v, SEQ)
            assert isinstance(context.saved, torch_like.Tensor) and context.saved.shape[0] == layer.report(SEQ)["saved"] + 64
            dq, _, _ = layer.backward(context, q)
        stream.synchronize()
        return np.asarray(out, np.float32), np.asarray(dq, np.float32)

    for out, dq in everywhere(cp.Group.threads(2, "local", timeout=60, device="cuda"), work):
        assert np.isfinite(out).all() and np.isfinite(dq).all()


def test_torch_lengths(torch_like):
    sequences = cp.Sequences.packed(torch_like.Tensor(np.array([0, 5, 24], np.int32)))
    assert len(cp.partition_tokens("zigzag", "thd", sequences, 1, 0)) == 24
