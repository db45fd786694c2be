"""Sequence ↔ heads: whole sequences of a rank's heads from its rows of all heads, and back, for layers that are not attention."""

import ctypes
from ctypes import byref, c_int32, c_size_t, c_uint32

from . import _abi, _device
from ._arrays import buffer, describe, is_array, is_tensor, layout, new
from ._lib import Error, argument_error, check, lib, number
from .partition import Sequences, choice, partition_code

# Where the axes [batch, seq, heads, dim] (thd: [tokens, heads, dim]) are in the caller's arrays.
_FORMATS = {"bshd": (0, 1, 2, 3), "sbhd": (1, 0, 2, 3), "bhsd": (0, 2, 1, 3), "thd": (0, 1, 2)}
_LOST = {_abi.CP_ERR_CUDA, _abi.CP_ERR_NCCL, _abi.CP_ERR_TRANSPORT, _abi.CP_ERR_TIMEOUT, _abi.CP_ERR_PEER_LOST, _abi.CP_ERR_ABORTED, _abi.CP_ERR_INTERNAL}


def heads_of_rank(heads, ranks, rank, tensor_heads=None):
    """Heads that a rank has of whole sequences, as a range: of `heads`, dealt out evenly, or of a tensor with `tensor_heads`, which divide `heads`: those
    that serve the rank's share. Heads of such a tensor may be on several ranks."""
    first, count = c_uint32(), c_uint32()
    of = number("tensor_heads", heads if tensor_heads is None else tensor_heads)
    check(lib.cp_trade_share(number("heads", heads), of, number("ranks", ranks), number("rank", rank), byref(first), byref(count)))
    return range(first.value, first.value + count.value)


def sequence_to_heads(group, local, sequences, *, format="bshd", partition="zigzag", heads=None, out=None, workspace=None, stream=None):
    """This rank's rows of all heads → whole sequences of this rank's heads. Collective; one exchange for all tensors.

    local: an array [batch, local seq, heads, dim] in `format` ("bshd", "sbhd", "bhsd", "thd"), or a list of up to 16, each with its own number of heads
    (all divide `heads`, which is the most that a tensor has if None), its own dim and type (float32, bfloat16, float16); any strides with a contiguous last
    axis. Rows are those of partition_tokens(partition, format, sequences, …). Returns an array [batch, padded seq, this rank's heads, dim], or a list of
    them: all tokens in sequence order, padding rows exactly 0, this rank's heads as heads_of_rank says. They lie in memory as bshd, whatever the format:
    so messages land in place. `out`: arrays to write to instead, of any strides.

    heads_to_sequence is the transpose, and the gradient (context_parallel.torch has both with autograd). Blocking on the CPU. On CUDA it is work on
    `stream` (None: the one that torch or CuPy works on). workspace: an array of trade_workspace_size bytes (uint8), aligned to 64; None: the group's.
    """
    call = _Call(group, sequences, format, partition, heads)
    return call.run(lib.cp_sequence_to_heads, local, out, None, workspace, stream)


def heads_to_sequence(group, whole, sequences, *, format="bshd", partition="zigzag", heads=None, tensor_heads=None, out=None, workspace=None, stream=None):
    """Whole sequences of this rank's heads → this rank's rows of all heads: sequence_to_heads the other way. Collective.

    heads: those that were dealt out (None: as many as whole[0] has on this rank, times the ranks). tensor_heads: of every tensor (None: all have `heads`).
    Of heads that several ranks have, the rows of all are summed, in rank order and in fp32. Padding rows of the result are exactly 0.
    """
    call = _Call(group, sequences, format, partition, heads)
    return call.run(lib.cp_heads_to_sequence, whole, out, tensor_heads, workspace, stream)


def trade_workspace_size(group, local, sequences, *, format="bshd", partition="zigzag", heads=None):
    """Bytes that suffice as workspace of either direction for these tensors (arrays like those that sequence_to_heads takes) on this rank. Local."""
    call = _Call(group, sequences, format, partition, heads)
    return call.size(local)


class _Call:
    """What both directions have in common. What is wrong is collected: the library refuses then, which tells the other ranks, and the reason is raised."""

    def __init__(self, group, sequences, format, partition, heads):
        self.group, self.sequences, self.wrong = group, sequences, []
        self.args, self.axes = _abi.cp_trade_args(), _FORMATS["bshd"]
        try:
            if not isinstance(sequences, Sequences):
                raise argument_error(f"sequences: got {type(sequences).__name__}, need Sequences.dense(…) or Sequences.packed(…)")
            choice("format", format, _FORMATS)
            self.axes = _FORMATS[format]
            self.args.sequences = sequences.pointer(group.size)
            self.args.partition = partition_code(partition)
            self.args.format = _abi.CP_FORMAT_PACKED if format == "thd" else _abi.CP_FORMAT_DENSE
            self.args.heads = 0 if heads is None else number("heads", heads)
        except Error as error:
            self.wrong.append(error)

    def run(self, function, given, out, tensor_heads, workspace, stream):
        to_heads = function is lib.cp_sequence_to_heads
        several = isinstance(given, (list, tuple))
        inputs = list(given) if several else [given]
        outputs = [None] * len(inputs) if out is None else list(out) if several else [out]
        place, stream = self._stream(stream, inputs[0] if inputs else None)
        arrays = (*inputs, *outputs, workspace)
        with _device.torch_stream(stream, place, [a for a in arrays if is_tensor(a) and a.is_cuda]):
            try:
                if len(outputs) != len(inputs):
                    raise argument_error(f"out: got {len(outputs)} arrays for {len(inputs)} tensors")
                if to_heads:
                    made = self._whole(inputs, outputs)
                else:
                    made = self._local(inputs, outputs, tensor_heads)
            except Error as error:
                self.wrong.append(error)
                made = outputs
            local, whole = (inputs, made) if to_heads else (made, inputs)
            self._point("local", local, stream, not to_heads)
            self._point("whole", whole, stream, to_heads)
            self.args.workspace, self.args.workspace_bytes = buffer("workspace", workspace, self.wrong, stream)
            with self.group._handle.use() as pointer:
                self._call(function, pointer, stream)
        return made if several else made[0]

    def size(self, local):
        local = list(local) if isinstance(local, (list, tuple)) else [local]
        made = c_size_t()
        self._point("local", local, 0, False)
        try:
            self._point("whole", self._whole(local, [None] * len(local)), 0, False)
        except Error as error:
            self.wrong.append(error)
        if self.wrong:
            raise self.wrong[0]
        self.group._handle.call(lib.cp_trade_workspace_size, byref(self.args), byref(made))
        return made.value

    def _call(self, function, pointer, stream):
        wrong = next(iter(self.wrong), None)
        if wrong is not None:
            self.args.flags = 0xFFFFFFFF  # which are refused, on all ranks
        try:
            check(function(pointer, byref(self.args), stream))
        except Error as error:
            if wrong is not None and error.status not in _LOST:
                raise wrong from error
            raise

    def _point(self, name, arrays, stream, written):
        described = [describe(f"{name}[{i}]", array, self.axes, self.wrong, stream, written) for i, array in enumerate(arrays)]
        self.args.count = len(described)
        setattr(self.args, name, (_abi.cp_tensor * max(len(described), 1))(*described))

    def _stream(self, stream, array):
        """The device number and the stream of a call."""
        try:
            kind, index = layout(array).device if is_tensor(array) else (0, 0) if is_array(array) else array.__dlpack_device__()
            if stream is not None:
                return index, _device.pointer(stream)
            return index, _device.current_stream(array, index) if kind == _abi.CP_DEVICE_CUDA else 0
        except Exception as error:
            self.wrong.append(error if isinstance(error, Error) else argument_error(f"tensors, stream: {error}"))
            return 0, 0

    def _logical(self, array):
        """[batch, seq, heads, dim], or [tokens, heads, dim]."""
        if array.ndim != len(self.axes):
            raise argument_error(f"got an array of shape {tuple(array.shape)}, need {len(self.axes)} dimensions")
        return [array.shape[axis] for axis in self.axes]

    def _make(self, like, shape):
        """An array of a logical shape that lies in memory in this order, with its axes as the caller's format has them."""
        made = new(like, shape)
        order = [self.axes.index(i) for i in range(len(self.axes))]
        return made.permute(order) if is_tensor(made) else made.transpose(order)

    def _whole(self, inputs, outputs):
        if self.wrong or all(x is not None for x in outputs) or not all(map(is_array, inputs)):
            return outputs
        shapes = [self._logical(x) for x in inputs]
        heads = self.args.heads or max(shape[-2] for shape in shapes)
        struct = self.sequences._struct
        rows = [struct.count, struct.seq_q] if len(self.axes) == 4 else [_total(struct)]
        made = []
        for x, shape, given in zip(inputs, shapes, outputs):
            if given is None:
                if shape[-2] == 0 or heads % shape[-2]:
                    raise argument_error(f"local: got a tensor with {shape[-2]} heads, which must divide the {heads} heads that are dealt out")
                mine = len(heads_of_rank(heads, self.group.size, self.group.rank, shape[-2]))
                given = self._make(x, (*rows, mine, shape[-1]))
            made.append(given)
        return made

    def _local(self, inputs, outputs, tensor_heads):
        if self.wrong or not all(map(is_array, inputs)):
            return outputs
        shapes = [self._logical(x) for x in inputs]
        heads = self.args.heads
        if heads == 0 and shapes and all(x is None for x in outputs):
            heads = self.args.heads = shapes[0][-2] * self.group.size
        if all(x is not None for x in outputs):
            return outputs
        of = [heads] * len(inputs) if tensor_heads is None else [number("tensor_heads", n) for n in tensor_heads]
        if len(of) != len(inputs):
            raise argument_error(f"tensor_heads: got {len(of)} numbers for {len(inputs)} tensors")
        count = c_size_t()
        fixed = (self.args.partition, self.args.format, self.args.sequences, self.group.size, self.group.rank, _abi.CP_SIDE_Q)
        check(lib.cp_partition_tokens(*fixed, None, 0, byref(count)))
        batch = shapes[0][0] if len(self.axes) == 4 else 1
        rows = [batch, count.value // max(batch, 1)] if len(self.axes) == 4 else [count.value]
        return [self._make(x, (*rows, n, shape[-1])) if given is None else given for x, n, shape, given in zip(inputs, of, shapes, outputs)]


def _total(struct):
    """Tokens of packed sequences, padding included."""
    padded = struct.cu_seqlens_q_padded or struct.cu_seqlens_q
    return ctypes.cast(padded, ctypes.POINTER(c_int32))[struct.count] if padded else 0
