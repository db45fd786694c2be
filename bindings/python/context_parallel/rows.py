"""What goes with a rank's rows besides Q, K and V: positions, shifted labels, whole sequences again, weights and scales of losses.

All of it is exact for any partition, any lengths, packed and padded, and local, but for group_shift and group_gather. With the rows of a rank as
`tokens = partition_tokens(partition, format, sequences, ranks, rank)`:

    freqs = table[rope_rows(partition, format, sequences, ranks, rank)]           # rotary embedding
    labels = shift(whole_ids, partition, format, sequences, ranks, rank)          # ids[t + 1], where every rank has all ids
    labels = group_shift(group, ids, partition, sequences, format="t")            # where it has only its own; on GPUs shift_exchange
    weights = loss_weights(partition, format, sequences, ranks, rank)             # 0 for padding and for rows without a label
    (loss_scale(loss_tokens(format, sequences), cp_size=ranks) * (weights * losses).sum()).backward()
"""

from ctypes import byref, c_double, c_size_t, c_uint64

import numpy as np

from . import _abi
from ._arrays import on_host
from ._lib import Error, argument_error, check, lib, number
from .partition import _SIDES, Sequences, _from_rows, _rows_first, choice, partition_code, partition_tokens

_MEANS = {"token": _abi.CP_LOSS_PER_TOKEN, "replica": _abi.CP_LOSS_PER_REPLICA}
_GRADIENTS = {"summed": _abi.CP_GRADIENTS_SUMMED, "averaged": _abi.CP_GRADIENTS_AVERAGED}


def _layout(format):
    return _abi.CP_FORMAT_PACKED if format == "thd" else _abi.CP_FORMAT_DENSE


def _dealing(partition, format, sequences, ranks):
    ranks = number("ranks", ranks)
    return partition_code(partition), _layout(format), sequences.pointer(ranks), ranks


def _shift(value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not -(2**31) <= value < 2**31:
        raise argument_error(f"shift: got {value!r}, need an integer of 32 bits")
    return int(value)


def _asked(function, fixed, dtype, lists=1):
    """What a function with (…, lists, capacity, count) writes."""
    count = c_size_t()
    check(function(*fixed, *[None] * lists, 0, byref(count)))
    made = [np.zeros(count.value + 1, dtype) for _ in range(lists)]
    check(function(*fixed, *[a.ctypes.data for a in made], count.value, byref(count)))
    return [a[:-1] for a in made]


def _indices(array):
    """As NumPy and torch index: "none" is -1."""
    return array.astype(np.int32).astype(np.intp)


def positions(partition, format, sequences, ranks, rank, side="q"):
    """Position of every row of `rank` in its sequence, counted from the first true token; -1 for padding."""
    fixed = (*_dealing(partition, format, sequences, ranks), number("rank", rank), choice("side", side, _SIDES))
    return _indices(_asked(lib.cp_partition_positions, fixed, np.uint32)[0])


def rope_rows(partition, format, sequences, ranks, rank, side="q"):
    """The rows that `rank` takes of a table of rotary frequencies: its positions, and row 0 for padding, where it does not matter.

    For one unpadded sequence and zigzag these are the two slices of Megatron's get_pos_emb_on_this_cp_rank.
    """
    return np.maximum(positions(partition, format, sequences, ranks, rank, side), 0)


def local_cu_seqlens(partition, format, sequences, ranks, rank, side="q"):
    """The rank's own cu_seqlens and cu_seqlens_padded: running sums, from 0, of the tokens and of the rows it holds of every sequence.

    Its rows are in the order of the sequences, but for partition="list" with another order. TransformerEngine's get_cu_seqlens_on_cp_rank.
    """
    fixed = (*_dealing(partition, format, sequences, ranks), number("rank", rank), choice("side", side, _SIDES))
    tokens, rows = _asked(lib.cp_partition_lengths, fixed, np.uint32, lists=2)
    sums = [np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) for lengths in (tokens, rows)]
    return sums[0].astype(np.int32), sums[1].astype(np.int32)


def shift_tokens(partition, format, sequences, ranks, rank, shift=1, side="q"):
    """For every row of `rank` the token `shift` after it in its sequence (before, if negative), numbered as partition_tokens does; -1 where
    there is none and for padding. It crosses the borders of chunks and ranks, never those of sequences: Megatron's roll_tensor, for any lengths."""
    fixed = (*_dealing(partition, format, sequences, ranks), number("rank", rank), choice("side", side, _SIDES), _shift(shift))
    return _indices(_asked(lib.cp_partition_shift, fixed, np.uint32)[0])


def shift(whole, partition, format, sequences, ranks, rank, shift=1, fill=-100, side="q"):
    """A rank's rows of `whole` (one value a token, [tokens] or [batch, seq]) shifted: the labels, for shift=1; `fill` where there is none."""
    whole = np.asarray(whole).reshape(-1)
    tokens = shift_tokens(partition, format, sequences, ranks, rank, shift, side)
    return np.where(tokens < 0, np.asarray(fill, whole.dtype), whole[np.maximum(tokens, 0)])


class Exchange:
    """One rank's part of the all-to-all that shifts rows. For rank 0, 1, …: `send_rows` are local rows that go there, `send_counts[peer]` of them,
    and `recv_rows` those that what comes from there is for, in the order of sending. This rank is a peer of itself.

        out = rows.new_full(rows.shape, -100)                                     # torch.distributed, on any device
        received = rows.new_empty((sum(x.recv_counts), *rows.shape[1:]))
        dist.all_to_all_single(received, rows[x.send_rows], x.recv_counts, x.send_counts)
        out[x.recv_rows] = received
    """

    def __init__(self, send_rows, send_counts, recv_rows, recv_counts):
        self.send_rows, self.send_counts = send_rows, send_counts
        self.recv_rows, self.recv_counts = recv_rows, recv_counts

    def run(self, rows, all_to_all, fill=-100):
        """Shifts local rows (NumPy, the first axis counts). all_to_all(arrays, one for every rank) returns those that all ranks sent here."""
        parts = np.split(rows[self.send_rows], np.cumsum(self.send_counts)[:-1])
        out = np.full_like(rows, fill)
        out[self.recv_rows] = np.concatenate(all_to_all(parts))
        return out


def shift_exchange(partition, format, sequences, ranks, rank, shift=1, side="q"):
    """The exchange that gives every row of `rank` what shift_tokens says, from the rows that the ranks have. Make it once a batch."""
    fixed = _dealing(partition, format, sequences, ranks)
    ends = (number("rank", rank), choice("side", side, _SIDES))
    count = c_size_t()
    check(lib.cp_partition_tokens(*fixed, *ends, None, 0, byref(count)))
    send_rows, recv_rows = (np.zeros(count.value + 1, np.uint32) for _ in range(2))
    send_counts, recv_counts = (np.zeros(fixed[3], np.uint32) for _ in range(2))
    lists = [a.ctypes.data for a in (send_rows, send_counts, recv_rows, recv_counts)]
    check(lib.cp_partition_shift_exchange(*fixed, *ends, _shift(shift), *lists, count.value))
    trimmed = [rows[: counts.sum()].astype(np.intp) for rows, counts in ((send_rows, send_counts), (recv_rows, recv_counts))]
    return Exchange(trimmed[0], send_counts.tolist(), trimmed[1], recv_counts.tolist())


def gather_order(partition, format, sequences, ranks, side="q"):
    """For every token, numbered as partition_tokens does, its row among the shards of all ranks laid one after another. So
    `np.concatenate(shards)[order]` is the whole; on GPUs the same with an all-gather of shards (of unequal lengths, perhaps)."""
    fixed = (*_dealing(partition, format, sequences, ranks), choice("side", side, _SIDES))
    return _asked(lib.cp_partition_order, fixed, np.uint32)[0].astype(np.intp)


def gather(shards, partition, sequences, format="bshd", side="q"):
    """The whole array from the shards of all ranks, rank 0's first. `format` names the axes, as in scatter: "thd", "bhs", "ht", "sbhd", …"""
    rows = [_rows_first(np.asarray(shard), format) for shard in shards]
    order = gather_order(partition, "thd" if "t" in format else "bshd", sequences, len(shards), side)
    whole = np.concatenate([r[0] for r in rows])
    if len(whole) != len(order):
        raise argument_error(f"shards: got {len(whole)} rows in all, the sequences have {len(order)}")
    return _from_rows(whole[order], rows[0][1], rows[0][2])


def group_shift(group, local, partition, sequences, shift=1, fill=-100, format="bshd", side="q"):
    """A rank's own rows shifted through the group: every row gets the one `shift` tokens after it in its sequence, from whichever rank has it,
    and `fill` where there is none. Collective, blocking; arrays in host memory of any type (on GPUs: shift_exchange). `format` names the axes: "bs"
    or "t" for labels."""

    def prepare():
        rows, batch, axes = _rows_first(np.asarray(local), format)
        rows = np.ascontiguousarray(rows)
        out = np.full_like(rows, fill)
        return (rows, out, partition, sequences, format, side, _shift(shift)), (batch, axes)

    return _collect(lib.cp_group_shift, group, prepare)


def group_gather(group, local, partition, sequences, format="bshd", side="q"):
    """The whole array on every rank, from their own rows. Collective, blocking; arrays in host memory of any type (on GPUs: gather_order and the
    framework's all-gather). `format` names the axes: "bshd", "thd", "bhs", "ht", …"""

    def prepare():
        rows, batch, axes = _rows_first(np.asarray(local), format)
        rows = np.ascontiguousarray(rows)
        count = len(gather_order(partition, "thd" if "t" in format else "bshd", sequences, group.size, side))
        out = np.empty((count, *rows.shape[1:]), rows.dtype)
        return (rows, out, partition, sequences, format, side, 0), (batch, axes)

    return _collect(lib.cp_group_gather, group, prepare)


def _collect(function, group, prepare):
    """Calls the library, even if this rank is already known to be wrong: it refuses, which tells the other ranks, and the reason is raised."""
    try:
        given, (batch, axes) = prepare()
        out, args = given[1], _arguments(group, *given)
    except Exception as wrong:
        try:
            group._handle.call(function, byref(_abi.cp_rows_args(partition=0xFFFFFFFF)))
        except Error as error:
            raise wrong from error
        raise
    group._handle.call(function, byref(args))
    return _from_rows(out, batch, axes)


def _arguments(group, rows, out, partition, sequences, format, side, shift):
    return _abi.cp_rows_args(
        sequences=sequences.pointer(group.size),
        partition=partition_code(partition),
        format=_layout("thd" if "t" in format else "bshd"),
        side=choice("side", side, _SIDES),
        shift=shift,
        row_bytes=int(np.prod(rows.shape[1:], dtype=np.int64)) * rows.itemsize,
        local=rows.ctypes.data,
        local_rows=len(rows),
        out=out.ctypes.data,
        out_rows=len(out),
    )


# What a batch says about itself, by the beginning of the name.
_METADATA = ("cu_seqlens", "max_seqlen", "local_cp_size", "total_tokens", "qkv_format", "hybrid_cp_group", "cp_group")


def get_batch_on_this_cp_rank(batch, ranks, rank, partition="zigzag"):
    """This rank's part of a batch: a dict of arrays (NumPy, torch), as Megatron's function of this name, for any lengths and any partition.

    With "cu_seqlens" in it the batch is packed: arrays are [tokens, …] or [1, tokens, …], and tokens lie as "cu_seqlens_padded" says, if that is there.
    Without, every array is [batch, seq, …] and is cut along seq; "attention_mask" is [batch, 1, seq, keys] and is cut along its queries. Lengths
    about the batch (cu_seqlens*, max_seqlen*, …), None and what is no array stay as they are. A group of another size for this batch (hybrid or
    dynamic context parallelism) is only other `ranks` and `rank`; ranks=1 changes nothing.
    """
    cu = batch.get("cu_seqlens")
    if cu is not None:
        cu, padded = (None if c is None else on_host(c).reshape(-1) for c in (cu, batch.get("cu_seqlens_padded")))
        sequences = Sequences.packed(cu, padded=padded)
        total = int((cu if padded is None else padded)[-1])
        mine = {total: partition_tokens(partition, "thd", sequences, ranks, rank)}
    else:
        mine = {}

    def part(name, value):
        if value is None or not hasattr(value, "shape") or name.startswith(_METADATA):
            return value
        if cu is not None and name == "attention_mask":
            return value  # of whole documents: lengths say it all, and nobody cuts it
        if cu is None:
            axis = 2 if name == "attention_mask" else 1
        else:
            axis = 0 if len(value.shape) == 1 else 1
        if len(value.shape) <= axis:
            raise argument_error(f"batch[{name!r}]: got shape {tuple(value.shape)}, its axis {axis} is cut")
        length = value.shape[axis]
        if length not in mine:
            if cu is not None:
                raise argument_error(f"batch[{name!r}]: got {length} tokens, cu_seqlens say {total}")
            mine[length] = partition_tokens(partition, "bshd", Sequences.dense(1, length), ranks, rank)
        return value[(slice(None),) * axis + (mine[length],)]

    return {name: part(name, value) for name, value in batch.items()}


def loss_weights(partition, format, sequences, ranks, rank, shift=1):
    """1 (float32) for every row of `rank` that counts, else 0: padding never does, nor do rows whose label, `shift` tokens on, is beyond the end of
    their sequence. shift=0: all true tokens count."""
    fixed = (*_dealing(partition, format, sequences, ranks), number("rank", rank), _shift(shift))
    return _asked(lib.cp_loss_weights, fixed, np.float32)[0]


def loss_tokens(format, sequences, shift=1):
    """How many rows of all ranks together loss_weights counts: from the lengths alone, so it takes no all-reduce."""
    count = c_uint64()
    check(lib.cp_loss_tokens(_layout(format), sequences.pointer(1), _shift(shift), byref(count)))
    return count.value


def loss_scale(tokens, *, mean="token", gradients="averaged", cp_size=1, dp_size=1, microbatches=1):
    """What a rank multiplies the sum of its own weighted losses by before backward, so that the gradients of all dp x cp ranks, put together,
    are those of one rank. 0, never NaN, where `tokens` is 0.

                          gradients="summed"                 gradients="averaged" (data parallelism's default)
        mean="token"      1 / tokens                         dp * cp / tokens
        mean="replica"    1 / (dp * microbatches * tokens)   cp / (microbatches * tokens)

    mean="token": over all ranks and micro-batches, `tokens` is the sum of weights over them (Megatron's calculate_per_token_loss, which sums).
    mean="replica": of the means of every replica and micro-batch, `tokens` is the sum over the replica's cp ranks (Megatron's other loss functions,
    which average: there is the factor cp_size in them).
    """
    config = _abi.cp_loss_config(
        mean=choice("mean", mean, _MEANS),
        gradients=choice("gradients", gradients, _GRADIENTS),
        cp_size=_size("cp_size", cp_size),
        dp_size=_size("dp_size", dp_size),
        microbatches=_size("microbatches", microbatches),
        tokens=float(tokens),
    )
    factor = c_double()
    check(lib.cp_loss_scale(byref(config), byref(factor)))
    return factor.value


def _size(name, value):
    value = number(name, value)
    if value == 0:
        raise argument_error(f"{name}: got 0, must be at least 1")
    return value
