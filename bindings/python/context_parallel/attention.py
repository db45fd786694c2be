"""Attention layers over the caller's arrays, zero-copy."""

import ctypes
from ctypes import byref, c_size_t, c_void_p

import numpy as np

from . import _abi, _device
from ._arrays import ALIGN, aligned, buffer, describe, is_array, is_foreign, is_tensor, new, on_host, seed_on_device
from ._lib import Error, Handle, argument_error, check, lib, number
from .partition import Sequences, choice, partition_code

_DTYPES = {"float32": _abi.CP_DTYPE_F32, "bfloat16": _abi.CP_DTYPE_BF16, "float16": _abi.CP_DTYPE_F16}
_COMMS = {
    "p2p": _abi.CP_COMM_P2P,
    "all_gather": _abi.CP_COMM_ALL_GATHER,
    "allgather": _abi.CP_COMM_ALL_GATHER,
    "a2a": _abi.CP_COMM_A2A,
    "a2a+p2p": _abi.CP_COMM_A2A_P2P,
}
_KV_WIRES = {"storage": _abi.CP_KV_WIRE_STORAGE, "e4m3": _abi.CP_KV_WIRE_E4M3, "e5m2": _abi.CP_KV_WIRE_E5M2}
_REACHES = {"rank": _abi.CP_REACH_RANK, "group": _abi.CP_REACH_GROUP}
_BIASES = {
    "bhss": _abi.CP_BIAS | _abi.CP_BIAS_BATCH | _abi.CP_BIAS_HEADS | _abi.CP_BIAS_QUERIES,
    "1hss": _abi.CP_BIAS | _abi.CP_BIAS_HEADS | _abi.CP_BIAS_QUERIES,
    "b1ss": _abi.CP_BIAS | _abi.CP_BIAS_BATCH | _abi.CP_BIAS_QUERIES,
    "11ss": _abi.CP_BIAS | _abi.CP_BIAS_QUERIES,
    "111s": _abi.CP_BIAS,
}
# Where the axes [batch, seq, heads, dim] (thd: [tokens, heads, dim]) of a tensor are in the caller's array.
_FORMATS = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3), "thd": (0, 1, 2)}


class Context:
    """Forward's note to backward: what it computed from, and what it left. Keeps the tensors alive; do not change them in between."""

    def __init__(self, pod, sequences, ranks, tensors, saved, sinks=None, max_logit=None, numbers=None, bias=None, made_of=(None, None, None),
                 seed=None):  # fmt: skip
        self.pod, self.sequences, self.ranks = pod, sequences, ranks
        self.tensors, self.saved = tensors, saved
        self.sinks, self.max_logit, self.numbers, self.bias = sinks, max_logit, numbers, bias
        self.made_of = made_of  # (latent, up_k, up_v)
        self.seed = seed  # of dropout, where it is on a device

    def with_tensors(self, tensors):
        """The same note over the same (q, k, v, out, lse) kept elsewhere."""
        others = (self.saved, self.sinks, self.max_logit, self.numbers, self.bias, self.made_of, self.seed)
        return Context(self.pod, self.sequences, self.ranks, tuple(tensors), *others)


class Attention:
    """A layer: what stays the same over its calls. It computes alone until set_group.

    heads, kv_heads: query and key heads (None: as many). head_dim, head_dim_v: elements per head of Q and K, and of V and O (None: as many):
    multiples of 8 up to 256. dtype: "float32", "bfloat16", "float16", or NumPy's or torch's. causal: no query sees a later key. bottom_right: the
    mask's diagonal ends in the last query and last key. window: (keys seen before, keys seen after the diagonal), None: no limit. format: the axes of
    the arrays, "bshd", "sbhd", "bhsd" or "thd" (packed); the LSE is [batch, heads, seq], packed [heads, tokens]. partition: "zigzag",
    "contiguous", "striped", "balanced" or "list". softmax_scale: None is 1/sqrt(head_dim). save: with a2a, forward keeps the head-split tensors for
    backward. wire_fp32: partial gradients travel as fp32. max_tokens_per_rank: most rows a rank ever holds, 0: no limit. threads: 0 is CP_THREADS, or 1.

    softcap: scores x become softcap·tanh(x/softcap). alibi: a slope for every query head, or True for those of the paper (alibi_slopes). dropout: the
    probability of dropping a weight; forward takes the seed. head_offset: number of query head 0 in the whole model, for dropout, where tensor
    parallelism deals heads out. sinks: every query head has a sink that joins its softmax, given to forward; "group": backward returns its whole
    gradient on every rank; "rank": this rank's part, to be summed over ranks with other gradients. max_logit: "group" or "rank": forward also
    leaves the largest visible score of every query head in context.max_logit. bias: an additive bias [batch, heads, queries, keys] comes with every
    forward: "bhss", "1hss", "b1ss", "11ss" or "111s", where 1 is one for all; queries are this rank's, keys those of the whole padded sequence.
    bias_gradient: backward returns its gradient too (not of "111s"). latent: multi-head latent attention: (elements of c, elements of r) of a token:
    forward takes latents and weights instead of k and v, ranks exchange latents, and each expands those that it attends.

    kv_wire: "e4m3" or "e5m2": keys and values travel as 8-bit numbers in blocks of 32 with a common power of two, 1.03 bytes an element. What is
    attended is K and V rounded so on every rank, the own ones included, also on one rank; gradients pass straight through. See CP_KV_WIRE_E4M3.

    device: where arrays are and work is done: "cpu", "cuda:0", ("cuda", 0), a torch.device; "cuda" is torch's current one. On CUDA dtype is bfloat16 or
    float16, and there are: deterministic: equal bits run after run, at some cost in speed; sm_margin: multiprocessors left to others; max_segments: most
    pieces of the mask in one stage (see cp_attention_config); allocator: of workspace: "torch" (the caching allocator, and the default where torch has
    CUDA), "own" (the layer keeps one workspace), or (alloc, free) with alloc(bytes, stream) -> address and free(address, bytes, stream).

    One call at a time. Outputs and arrays given as outputs are written only on success.
    """

    def __init__(self, *, heads, head_dim, dtype, kv_heads=None, head_dim_v=None, causal=False, bottom_right=False, window=(None, None),
                 format="bshd", partition="zigzag", softmax_scale=None, save=False, wire_fp32=False, max_tokens_per_rank=0, threads=0,
                 device=None, deterministic=False, sm_margin=0, max_segments=0, allocator=None, softcap=None, alibi=None, dropout=0.0,
                 head_offset=0, sinks=None, max_logit=None, bias=None, bias_gradient=True, kv_wire=None, latent=None):  # fmt: skip
        pointer = c_void_p()
        config = _config(
            heads=heads, head_dim=head_dim, dtype=dtype, kv_heads=kv_heads, head_dim_v=head_dim_v, causal=causal, bottom_right=bottom_right,
            window=window, format=format, partition=partition, softmax_scale=softmax_scale, save=save, wire_fp32=wire_fp32,
            max_tokens_per_rank=max_tokens_per_rank, threads=threads, device=device, deterministic=deterministic, sm_margin=sm_margin,
            max_segments=max_segments, softcap=softcap, alibi=alibi, dropout=dropout, head_offset=head_offset, sinks=sinks,
            max_logit=max_logit, bias=bias, bias_gradient=bias_gradient, kv_wire=kv_wire, latent=latent)  # fmt: skip
        self._heads, self._sinks, self._max_logit = heads, sinks is not None, max_logit is not None
        self._d_bias = bool(config.bias & _abi.CP_BIAS_GRADIENT)
        self._latent = latent is not None
        self._place = (config.device_type, config.device_id)
        self._allocator = None
        if self._cuda:
            self._allocator = _device.allocator(allocator, config.device_id)
        elif allocator is not None:
            raise argument_error("allocator: is for layers on CUDA")
        if self._allocator is not None:
            config.device_alloc, config.device_free = self._allocator.alloc, self._allocator.free
        check(lib.cp_attention_create(byref(config), byref(pointer)))
        self._handle = Handle(self, "attention", pointer.value, lib.cp_attention_destroy)
        self._axes, self._save, self._ranks, self._dim_v = _FORMATS[format], save, 1, head_dim_v or head_dim
        self.format, self.partition = format, partition

    @property
    def has_sinks(self):
        """Does every query head have a sink?"""
        return self._sinks

    @property
    def has_bias_gradient(self):
        """Does backward return the gradient of a bias?"""
        return self._d_bias

    @property
    def has_latents(self):
        """Are keys and values made of latents?"""
        return self._latent

    @property
    def _cuda(self):
        return self._place[0] == _abi.CP_DEVICE_CUDA

    def set_group(self, group, comm="p2p", *, stages=None, inner_size=None, level_sizes=None, relay=False, memory_cap=None):
        """Attaches a group, or with None turns context parallelism off for this layer.

        comm: "p2p" (ring), "all_gather", "a2a" (heads for sequence), "a2a+p2p". stages: of the key exchange, a number, or "auto": the fewest that keep
        the workspace of every rank within memory_cap bytes. a2a+p2p: inner_size ranks, consecutive ones, trade heads, or level_sizes = (inside, outside).
        relay: the neighbour ring. Collective the first time the layer gets a group made by Group.from_…; local afterwards and for subsets.
        """
        if group is None:
            self._handle.call(lib.cp_set_group, None, None)
            self._ranks = 1
            return
        wrong = None
        try:
            config = _comm(group.size, comm, stages, inner_size, level_sizes, relay, memory_cap)
        except Error as error:
            # The other ranks are in this call or will be: the library must refuse it, on all of them.
            wrong, config = error, _abi.cp_comm_config(comm_type=0xFFFFFFFF)
        with group._handle.use() as pointer:
            self._run(wrong, lib.cp_set_group, pointer, byref(config))
        self._ranks = group.size

    def forward(self, q, k=None, v=None, sequences=None, *, out=None, lse=None, saved=None, workspace=None, stream=None, sinks=None, max_logit=None,
                dropout_seed=0, sequence_ids=None, bias=None, latent=None, up_k=None, up_v=None):  # fmt: skip
        """Exact attention of this rank's queries over all keys that the mask lets them see: (out, lse, context). Collective.

        q: [batch, local seq, heads, head_dim] in the layer's format; k, v likewise with kv_heads; of any strides with a contiguous last axis, used in
        place: NumPy arrays, torch tensors, or anything with __dlpack__ or __cuda_array_interface__. lse: fp32, natural log. Rows that see no key, and
        padding: out 0, lse -inf. workspace: an array of workspace_size() bytes (uint8), aligned to 64; None: from the allocator, or the layer's own.

        sinks: fp32 [heads], where the layer has them. dropout_seed: with dropout, equal on all ranks: an integer, or on CUDA an array of one 64-bit integer
        on the device, read when forward and backward run: a graph draws another mask in every replay for which it is written before. sequence_ids: a
        number for every sequence: equal numbers drop alike, whatever else is in the call; None: their indices. max_logit: fp32 [heads] to write to,
        where it is asked for.

        Of a layer with latents instead of k and v: latent, (c ; r) of this rank's keys as k with one head, up_k [heads, head_dim - r, c] and up_v
        [heads, head_dim_v, c], equal on all ranks: head h has k = [up_k[h]·c ; r], v = up_v[h]·c, rounded to the storage type.

        On the CPU it blocks. On CUDA it enqueues on `stream` (an address, or a stream of torch or CuPy; None: the one that torch or CuPy works on now, else
        the default stream) and returns: arrays must stay as they are until the stream is through. torch sees to that itself; with torch,
        stream=s is as `with torch.cuda.stream(s)`. Addresses and strides are multiples of 16 bytes. NumPy and torch make what is
        not given; for arrays of other libraries the caller gives out, lse and, if report()["saved"] is not 0, saved: so many bytes, aligned to 64.
        """
        wrong = []
        stream = self._stream(stream, q, wrong)
        pod = _abi.cp_context()
        args = _abi.cp_forward_args(sequences=self._sequences(sequences, self._ranks, wrong), context=ctypes.pointer(pod))
        numbers = _sequence_ids(args, sequence_ids, sequences, wrong)
        given = (q, k, v, out, lse, saved, workspace, sinks, max_logit, bias, latent, up_k, up_v, dropout_seed)
        with _device.torch_stream(stream, self._place[1], given if self._cuda else ()):
            seed = self._seed(args, dropout_seed, wrong, stream)
            if out is None and is_array(q):
                out = new(q, (*q.shape[:-1], self._dim_v))
            if lse is None and is_array(q):
                lse = new(q, self._lse_shape(q), "float32")
            saved = self._saved(args, q, saved, wrong, stream)
            self._keys(args, (("q", q),), (("k", k), ("v", v)), (("latent", latent), ("up_k", up_k), ("up_v", up_v)), wrong, stream)
            args.out = describe("out", out, self._axes, wrong, stream, written=True)
            args.lse = describe("lse", lse, range(4), wrong, stream, written=True)
            if max_logit is None and self._max_logit and is_array(q):
                max_logit = new(q, (self._heads,), "float32")
            for name, array in (("sinks", sinks), ("max_logit", max_logit)):
                if array is not None:
                    setattr(args, name, describe(name, array, range(1), wrong, stream, written=name == "max_logit"))
            if bias is not None:
                args.bias = describe("bias", bias, range(4), wrong, stream)
            args.workspace, args.workspace_bytes = buffer("workspace", workspace, wrong, stream)
            self._run(next(iter(wrong), None), lib.cp_attention_forward, byref(args), stream)
        made_of = (latent, up_k, up_v)
        return out, lse, Context(pod, sequences, self._ranks, (q, k, v, out, lse), saved, sinks, max_logit, numbers, bias, made_of, seed)

    def backward(self, context, d_out, *, dq=None, dk=None, dv=None, workspace=None, stream=None, d_sinks=None, d_bias=None, d_latent=None,
                 d_up_k=None, d_up_v=None):  # fmt: skip
        """Gradients (dq, dk, dv), then d_sinks where there are sinks and d_bias where the bias has a gradient, from that of out. On the group that the
        forward used, whatever is attached now. Collective over it, as forward is.

        With latents (dq, d_latent, d_up_k, d_up_v), then the others: d_latent is complete; the gradients of the weights are this rank's part, fp32, to be
        summed over the group with those of other weights: what its own queries give, or with a2a all queries through its heads."""
        wrong = []
        args = _abi.cp_backward_args()
        q = k = v = out = lse = saved = sinks = bias = latent = up_k = up_v = seed = None
        if isinstance(context, Context):
            q, k, v, out, lse = context.tensors
            saved, sinks, bias, seed = context.saved, context.sinks, context.bias, context.seed
            latent, up_k, up_v = context.made_of
            args.sequence_ids = None if context.numbers is None else context.numbers.ctypes.data
            args.sequences = self._sequences(context.sequences, context.ranks, wrong)
            args.context = ctypes.pointer(context.pod)
        else:
            wrong.append(argument_error(f"context: got {type(context).__name__}, need what forward returned"))
        stream = self._stream(stream, q, wrong)
        given = (q, k, v, out, lse, saved, d_out, dq, dk, dv, workspace, sinks, d_sinks, bias, d_bias, latent, up_k, up_v, d_latent, d_up_k, d_up_v, seed)
        with _device.torch_stream(stream, self._place[1], given if self._cuda else ()):
            fresh = lambda given, like, dtype=None: new(like, like.shape, dtype) if given is None and is_array(like) else given
            dq, dk, dv, d_latent = (fresh(*pair) for pair in ((dq, q), (dk, k), (dv, v), (d_latent, latent)))
            d_up_k, d_up_v = (fresh(given, like, "float32") for given, like in ((d_up_k, up_k), (d_up_v, up_v)))
            if saved is not None:
                args.saved, args.saved_bytes = aligned(saved, stream)
            inputs = (("q", q), ("out", out), ("d_out", d_out))
            self._keys(args, inputs, (("k", k), ("v", v)), (("latent", latent), ("up_k", up_k), ("up_v", up_v)), wrong, stream)
            args.lse = describe("lse", lse, range(4), wrong, stream)
            gradients = (("d_latent", d_latent), ("d_up_k", d_up_k), ("d_up_v", d_up_v))
            self._keys(args, (("dq", dq),), (("dk", dk), ("dv", dv)), gradients, wrong, stream, written=True)
            if d_sinks is None and self._sinks and is_array(q):
                d_sinks = new(q, (self._heads,), "float32")
            for name, array in (("sinks", sinks), ("d_sinks", d_sinks)):
                if array is not None:
                    setattr(args, name, describe(name, array, range(1), wrong, stream, written=name == "d_sinks"))
            if d_bias is None and self._d_bias and is_array(bias):
                d_bias = new(bias, bias.shape)
            for name, array in (("bias", bias), ("d_bias", d_bias)):
                if array is not None:
                    setattr(args, name, describe(name, array, range(4), wrong, stream, written=name == "d_bias"))
            args.workspace, args.workspace_bytes = buffer("workspace", workspace, wrong, stream)
            self._run(next(iter(wrong), None), lib.cp_attention_backward, byref(args), stream)
        of_keys = (d_latent, d_up_k, d_up_v) if self._latent else (dk, dv)
        return (dq, *of_keys, *([d_sinks] if self._sinks else []), *([d_bias] if self._d_bias else []))

    def workspace_size(self, tokens_per_rank):
        """Bytes that suffice for every call in which no rank holds more rows of Q or of K than that, batch times local length, on the current group."""
        size = c_size_t()
        self._handle.call(lib.cp_attention_workspace_size, number("tokens_per_rank", tokens_per_rank), byref(size))
        return size.value

    def report(self, sequences):
        """What calls with these sequences need and move on this rank: a dict of bytes, FLOPs, stages and inner size."""
        made = _abi.cp_report()
        self._handle.call(lib.cp_attention_report, sequences.pointer(self._ranks), byref(made))
        return _abi.fields(made)

    def plan(self, sequences, direction="forward", format="text"):
        """This rank's plan for these sequences on the current group. direction: "forward" or "backward". format: "text" or "json"."""
        passes = {"forward": _abi.CP_PASS_FORWARD, "backward": _abi.CP_PASS_BACKWARD}
        formats = {"text": _abi.CP_PLAN_TEXT, "json": _abi.CP_PLAN_JSON}
        what = (sequences.pointer(self._ranks), choice("direction", direction, passes), choice("format", format, formats))
        length = c_size_t()
        self._handle.call(lib.cp_attention_plan, *what, None, 0, byref(length))
        text = ctypes.create_string_buffer(length.value + 1)
        self._handle.call(lib.cp_attention_plan, *what, text, len(text), byref(length))
        return text.value.decode()

    def close(self):
        """Ends the use of this layer and its hold on groups. Closing twice does nothing."""
        self._handle.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _keys(self, args, always, keys, latents, wrong, stream, written=False):
        """Describes tensors, keys and values, or what they are made of. What the layer does not have it refuses, if it is given."""
        for name, array in always:
            setattr(args, name, describe(name, array, self._axes, wrong, stream, written=written))
        for ours, tensors in ((not self._latent, keys), (self._latent, latents)):
            for name, array in tensors:
                if ours or array is not None:
                    axes = range(3) if "up" in name else self._axes
                    setattr(args, name, describe(name, array, axes, wrong, stream, written=written))

    def _run(self, wrong, function, *arguments):
        """Calls the library, even if this rank is already known to be wrong: it refuses, which tells the other ranks, and the reason is raised."""
        try:
            self._handle.call(function, *arguments)
        except Error as error:
            if self._allocator is not None:
                self._allocator.reraise(error)
            if wrong is not None and error.status not in _LOST:
                raise wrong from error
            raise
        if self._allocator is not None:
            self._allocator.reraise()
        if wrong is not None:
            raise wrong

    def _stream(self, stream, array, wrong):
        """The stream of a call, as a number."""
        try:
            if stream is not None:
                return _device.pointer(stream)
            return _device.current_stream(array, self._place[1]) if self._cuda else 0
        except Exception as error:
            wrong.append(error if isinstance(error, Error) else argument_error(f"stream: {error}"))
            return 0

    def _sequences(self, sequences, ranks, wrong):
        try:
            if not isinstance(sequences, Sequences):
                raise argument_error(f"sequences: got {type(sequences).__name__}, need Sequences.dense(…) or Sequences.packed(…)")
            return sequences.pointer(ranks)
        except Error as error:
            wrong.append(error)
            return None

    def _lse_shape(self, q):
        if q.ndim != len(self._axes):
            return ()  # The library refuses this q.
        if len(self._axes) == 3:
            return (q.shape[1], q.shape[0])
        batch, seq, heads, _ = (q.shape[axis] for axis in self._axes)
        return (batch, heads, seq)

    def _seed(self, args, seed, wrong, stream):
        """Puts the seed of dropout into the arguments; returns what of it must stay alive."""
        try:
            address = seed_on_device(seed, self._place, stream)
            if address is not None:
                args.dropout_seed, args.flags = address, _abi.CP_FORWARD_SEED_AT
                return seed
            if not hasattr(seed, "__index__") or not 0 <= seed.__index__() < 1 << 64:
                raise argument_error(f"dropout_seed: got {seed!r}, must be an integer from 0 to 2^64 - 1")
            args.dropout_seed = seed.__index__()
        except Exception as error:
            wrong.append(error if isinstance(error, Error) else argument_error(f"dropout_seed: {error}"))
            args.dropout_seed, args.flags = 1, _abi.CP_FORWARD_SEED_AT  # Refused: not aligned.
        return None

    def _saved(self, args, q, saved, wrong, stream):
        """Memory for what forward leaves to backward. With wrong arguments there is none: forward says why."""
        size = c_size_t()
        if not self._save or not args.sequences:
            return None
        with self._handle.use() as pointer:
            if lib.cp_attention_saved_size(pointer, args.sequences, byref(size)) != _abi.CP_OK or size.value == 0:
                return None
        if saved is None and is_foreign(q):
            wrong.append(argument_error(f"saved: got None, need {size.value} bytes on the device, aligned to 64"))
            return None
        if saved is None:
            saved = new(q, (size.value + ALIGN,), "uint8") if is_tensor(q) else np.empty(size.value + ALIGN, np.uint8)
            args.saved, args.saved_bytes = aligned(saved, stream)
        else:
            args.saved, args.saved_bytes = buffer("saved", saved, wrong, stream)
        return saved


_LOST = {_abi.CP_ERR_CUDA, _abi.CP_ERR_NCCL, _abi.CP_ERR_TRANSPORT, _abi.CP_ERR_TIMEOUT, _abi.CP_ERR_PEER_LOST, _abi.CP_ERR_ABORTED, _abi.CP_ERR_INTERNAL}


def query_support(ranks, comm="p2p", *, stages=None, inner_size=None, level_sizes=None, relay=False, memory_cap=None, **config):
    """Would Attention(**config) and set_group with this communication work on `ranks` ranks? (True, "") or (False, the reason). Local."""
    try:
        how = _comm(number("ranks", ranks), comm, stages, inner_size, level_sizes, relay, memory_cap)
        check(lib.cp_query_support(byref(_config(**config)), byref(how), ranks))
    except Error as error:
        return False, str(error)
    return True, ""


def _config(*, heads, head_dim, dtype, kv_heads=None, head_dim_v=None, causal=False, bottom_right=False, window=(None, None),
            format="bshd", partition="zigzag", softmax_scale=None, save=False, wire_fp32=False, max_tokens_per_rank=0, threads=0,
            device=None, deterministic=False, sm_margin=0, max_segments=0, softcap=None, alibi=None, dropout=0.0, head_offset=0,
            sinks=None, max_logit=None, bias=None, bias_gradient=True, kv_wire=None, latent=None):  # fmt: skip
    """A layer's configuration: the arguments of Attention."""
    kind, index = _device.device(device)
    choice("format", format, _FORMATS)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise argument_error(f"window: got {window!r}, need (left, right), None for no limit")
    left, right = window
    # Of no elements it would be none to the library, and one to this layer.
    if latent is not None and (not isinstance(latent, (tuple, list)) or len(latent) != 2 or latent[0] == 0):
        raise argument_error(f"latent: got {latent!r}, need (elements of c, elements of r), or None")
    flags = 0
    for wanted, flag in (
        (causal, _abi.CP_ATTENTION_CAUSAL),
        (bottom_right, _abi.CP_ATTENTION_BOTTOM_RIGHT),
        (left is not None, _abi.CP_ATTENTION_WINDOW_LEFT),
        (right is not None, _abi.CP_ATTENTION_WINDOW_RIGHT),
        (wire_fp32, _abi.CP_ATTENTION_WIRE_F32),
        (save, _abi.CP_ATTENTION_SAVE),
        (deterministic, _abi.CP_ATTENTION_DETERMINISTIC),
    ):
        flags |= flag if wanted else 0
    made = _abi.cp_attention_config(
        flags=flags,
        heads=number("heads", heads),
        kv_heads=0 if kv_heads is None else number("kv_heads", kv_heads),
        head_dim_qk=number("head_dim", head_dim),
        head_dim_v=0 if head_dim_v is None else number("head_dim_v", head_dim_v),
        dtype=choice("dtype", _dtype_name(dtype), _DTYPES),
        format=_abi.CP_FORMAT_PACKED if format == "thd" else _abi.CP_FORMAT_DENSE,
        partition=partition_code(partition),
        window_left=0 if left is None else number("window", left),
        window_right=0 if right is None else number("window", right),
        softmax_scale=0.0 if softmax_scale is None else softmax_scale,
        max_tokens_per_rank=number("max_tokens_per_rank", max_tokens_per_rank),
        threads=number("threads", threads),
        device_type=kind,
        device_id=index,
        sm_margin=number("sm_margin", sm_margin),
        max_segments=number("max_segments", max_segments),
        softcap=0.0 if softcap is None else softcap,
        dropout=dropout,
        head_offset=number("head_offset", head_offset),
        sinks=_reach("sinks", sinks),
        max_logit=_reach("max_logit", max_logit),
        latent_dim=0 if latent is None else number("latent", latent[0]),
        latent_rope=0 if latent is None else number("latent", latent[1]),
        kv_wire=_abi.CP_KV_WIRE_STORAGE if kv_wire is None else choice("kv_wire", kv_wire, _KV_WIRES),
        bias=0 if bias is None else choice("bias", bias, _BIASES) | (_abi.CP_BIAS_GRADIENT if bias_gradient and bias != "111s" else 0),
    )
    if alibi is True and head_offset:
        raise argument_error("alibi: True is for a layer with all heads of the model; with head_offset give the slopes of its heads")
    if alibi is not None and alibi is not False:
        try:
            slopes = np.array(alibi_slopes(heads) if alibi is True else on_host(alibi), dtype=np.float32, order="C")
        except (TypeError, ValueError) as error:
            raise argument_error(f"alibi: {error}") from error
        if slopes.shape != (heads,):
            raise argument_error(f"alibi: got slopes of shape {slopes.shape}, need ({heads},): one for each query head")
        made.alibi_slopes = slopes.ctypes.data
        made.slopes = slopes  # alive as long as the struct
    return made


def _reach(name, value):
    return _abi.CP_REACH_NONE if value is None else choice(name, value, _REACHES)


def alibi_slopes(heads):
    """The slopes of the ALiBi paper (arXiv 2108.12409): 2^(-8/n), 2^(-16/n), … for n heads; if n is no power of two, those of the power below, then every
    second one of the power above."""
    if number("heads", heads) == 0:
        raise argument_error("heads: got 0, need at least 1")
    below = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    slopes += [2.0 ** (-4.0 * (i + 1) / below) for i in range(0, 2 * (heads - below), 2)]
    return np.array(slopes, dtype=np.float32)


def _sequence_ids(args, ids, sequences, wrong):
    """Numbers of the sequences, as an array that the arguments point to."""
    if ids is None:
        return None
    try:
        numbers = np.ascontiguousarray([number("sequence_ids", x) for x in ids], dtype=np.uint32)
        if len(numbers) != sequences._struct.count:
            raise argument_error(f"sequence_ids: got {len(numbers)} for {sequences._struct.count} sequences")
        args.sequence_ids = numbers.ctypes.data
        return numbers
    except Exception as error:
        wrong.append(error if isinstance(error, Error) else argument_error(f"sequence_ids: {error}"))
        args.sequence_ids = 1  # Refused: not aligned.
        return None


def _comm(ranks, comm, stages, inner_size, level_sizes, relay, memory_cap):
    if inner_size is not None and level_sizes is not None:
        raise argument_error("inner_size: give it or level_sizes, not both")
    if inner_size is not None:
        level_sizes = (inner_size, ranks // max(number("inner_size", inner_size), 1))
    sizes = [number("level_sizes", size) for size in level_sizes or ()]
    if len(sizes) > 4:
        raise argument_error(f"level_sizes: got {len(sizes)}, two exchange levels are offered")
    if memory_cap is not None and not (hasattr(memory_cap, "__index__") and 0 < memory_cap < 1 << 64):
        raise argument_error(f"memory_cap: got {memory_cap!r}, need bytes")
    made = _abi.cp_comm_config(
        flags=_abi.CP_COMM_RELAY if relay else 0,
        comm_type=choice("comm", comm, _COMMS),
        stages=_abi.CP_STAGES_AUTO if stages == "auto" else number("stages", stages or 0),
        level_count=len(sizes),
        memory_cap_bytes=memory_cap or 0,
    )
    made.level_sizes[: len(sizes)] = sizes
    return made


def _dtype_name(dtype):
    name = str(dtype).removeprefix("torch.")
    if name in _DTYPES:
        return name
    try:
        return np.dtype(dtype).name
    except TypeError:
        return name
