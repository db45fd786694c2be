"""Sequences of a call, and which of their tokens a rank holds."""

from ctypes import byref, c_size_t, c_uint64, pointer

import numpy as np

from . import _abi
from ._arrays import on_host
from ._lib import argument_error, check, lib, number
from .slices import slice_array

_PARTITIONS = {
    "zigzag": _abi.CP_PARTITION_ZIGZAG,
    "contiguous": _abi.CP_PARTITION_CONTIGUOUS,
    "striped": _abi.CP_PARTITION_STRIPED,
    "list": _abi.CP_PARTITION_LIST,
    "balanced": _abi.CP_PARTITION_BALANCED,
}
_SIDES = {"q": _abi.CP_SIDE_Q, "k": _abi.CP_SIDE_K}


def choice(name, value, table):
    """The number behind a name."""
    if not isinstance(value, str) or value not in table:
        raise argument_error(f"{name}: got {value!r}, allowed {', '.join(map(repr, table))}")
    return table[value]


def partition_code(value):
    return choice("partition", value, _PARTITIONS)


class Sequences:
    """The sequences of one call: all of them, with their global lengths, equal on every rank. Immutable; use one for any number of calls.

    `stretches` is for layers with partition="list": for every rank, the tokens it holds in the order of its rows, as
    (sequence, first position, step, number of tokens); `stretches_k` the same for keys (None: as queries).

    `slices` are the caller's own mask, in any order: (sequence, (q begin, q end), (k begin, k end), lo, hi) lets those queries of a sequence see those keys
    as far as lo <= key - query <= hi and the layer's mask lets them; a lo or hi that is None or left out is no limit. Positions count from the first true
    token. Where there are slices nothing else is seen, and no query sees a key in two of them. mask_slices makes them from ranges.
    """

    def __init__(self, struct, keep, stretches, stretches_k, slices=None):
        self._struct, self._keep = struct, keep
        if slices is not None:
            array = slice_array(slices)
            self._point("slices", array)
            struct.slice_count = len(array)
        self._ranks = None if stretches is None else len(stretches)
        if stretches_k is not None and len(stretches_k) != self._ranks:
            raise argument_error(f"stretches_k: for {len(stretches_k)} ranks, stretches are for {self._ranks}")
        for side, of_ranks in (("q", stretches), ("k", stretches_k)):
            if of_ranks is None:
                continue
            rows = [s for of_rank in of_ranks for s in of_rank]
            if any(len(s) != 4 for s in rows):
                raise argument_error("stretches: every one is (sequence, first position, step, number of tokens)")
            flat = np.array([[number("stretches", n) for n in s] for s in rows], np.uint32).reshape(-1, 4)
            # Not of length 0, so that the address is never NULL.
            flat = np.concatenate([flat, np.zeros((1, 4), np.uint32)])
            self._point(f"list_{side}", flat)
            self._point(f"list_{side}_counts", np.array([len(of_rank) for of_rank in of_ranks], np.uint32))

    def _point(self, field, array):
        if array is not None:
            self._keep.append(array)
            setattr(self._struct, field, array.ctypes.data)

    @classmethod
    def dense(cls, batch, seq, seq_k=None, *, lens=None, lens_k=None, before=None, before_k=None, stretches=None, stretches_k=None, slices=None):
        """`batch` sequences of `seq` tokens (keys: `seq_k`) over all ranks, padding included.

        lens: true length of every sequence; before: padding tokens before the first true one (left padding); None: no padding. The `_k` ones are
        for keys: not given, keys are as queries, or, where seq_k is another length, without padding.
        """
        count = number("batch", batch)
        struct = _abi.cp_sequences(count=count, seq_q=number("seq", seq), seq_k=0 if seq_k is None else number("seq_k", seq_k))
        made = cls(struct, [], stretches, stretches_k, slices)
        made._point("lens_q", _int32("lens", lens, count))
        made._point("lens_k", _int32("lens_k", lens_k, count))
        made._point("before_q", _int32("before", before, count))
        made._point("before_k", _int32("before_k", before_k, count))
        return made

    @classmethod
    def packed(cls, cu_seqlens, cu_seqlens_k=None, *, padded=None, padded_k=None, stretches=None, stretches_k=None, slices=None):
        """Sequences one after another (thd): cu_seqlens are the cumulative true lengths, from 0; `padded` those with padding after each.

        Plans are made on the host: lengths on a device are copied from there once, here, and that waits for the device.
        """
        lengths = _int32("cu_seqlens", cu_seqlens)
        if lengths is None or len(lengths) == 0:
            raise argument_error("cu_seqlens: got nothing, need at least [0, length]")
        made = cls(_abi.cp_sequences(count=len(lengths) - 1), [], stretches, stretches_k, slices)
        made._point("cu_seqlens_q", lengths)
        made._point("cu_seqlens_k", _int32("cu_seqlens_k", cu_seqlens_k, len(lengths)))
        made._point("cu_seqlens_q_padded", _int32("padded", padded, len(lengths)))
        made._point("cu_seqlens_k_padded", _int32("padded_k", padded_k, len(lengths)))
        return made

    def pointer(self, ranks):
        """The C struct. Raises if its lists are for another number of ranks, which C cannot see."""
        if self._ranks not in (None, ranks):
            raise argument_error(f"sequences: stretches are for {self._ranks} ranks, the group has {ranks}")
        return pointer(self._struct)


def _int32(name, values, count=None):
    if values is None:
        return None
    array = on_host(values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size > 0):
        raise argument_error(f"{name}: got an array of {array.dtype} with shape {array.shape}, need a list of integers")
    if count is not None and len(array) != count:
        raise argument_error(f"{name}: got {len(array)} values, need {count}")
    if array.size > 0 and not -(2**31) <= array.min() <= array.max() < 2**31:
        raise argument_error(f"{name}: got values up to {array.max()}, must fit in 32 bits")
    return np.array(array, np.int32)


def padded_length(partition, ranks, length):
    """Smallest length, `length` or more, that gives every rank the same number of tokens. This library needs no such padding."""
    made = c_uint64()
    if not 0 <= length < 1 << 60:
        raise argument_error(f"length: got {length}")
    check(lib.cp_partition_padded_length(partition_code(partition), number("ranks", ranks), length, byref(made)))
    return made.value


def partition_tokens(partition, format, sequences, ranks, rank, side="q"):
    """Tokens that `rank` of `ranks` holds, in the order of its local rows: an array of indices into the padded sequences laid one after another.

    format: "thd", or any dense one. side: "q" for Q, O, LSE and their gradients, "k" for K, V and theirs. Local: no group is needed.
    """
    layout = _abi.CP_FORMAT_PACKED if format == "thd" else _abi.CP_FORMAT_DENSE
    ranks, rank = number("ranks", ranks), number("rank", rank)
    fixed = (partition_code(partition), layout, sequences.pointer(ranks), ranks, rank, choice("side", side, _SIDES))
    count = c_size_t()
    check(lib.cp_partition_tokens(*fixed, None, 0, byref(count)))
    indices = np.zeros(count.value + 1, np.uint32)
    check(lib.cp_partition_tokens(*fixed, indices.ctypes.data, count.value, byref(count)))
    return indices[:-1].astype(np.intp)


def scatter(whole, tokens, format="bshd"):
    """A rank's rows of a whole array: a copy. `format` names the axes, a letter each: b and s, or t (so the LSE is "bhs" or "ht")."""
    rows, batch, axes = _rows_first(whole, format)
    return _from_rows(rows[tokens], batch, axes)


def gather_rows(whole, tokens, local, format="bshd"):
    """The inverse: writes a rank's rows to their places in `whole`."""
    if "t" in format:
        np.moveaxis(whole, format.index("t"), 0)[tokens] = np.moveaxis(local, format.index("t"), 0)
        return
    view = np.moveaxis(whole, (format.index("b"), format.index("s")), (0, 1))
    rows, _, _ = _rows_first(local, format)
    view[np.divmod(tokens, view.shape[1])] = rows


def _rows_first(array, format):
    """The array as [token, …], its batch, and where its axes were."""
    if "t" in format:
        return np.moveaxis(array, format.index("t"), 0), None, (format.index("t"),)
    axes = (format.index("b"), format.index("s"))
    moved = np.moveaxis(array, axes, (0, 1))
    return moved.reshape(-1, *moved.shape[2:]), moved.shape[0], axes


def _from_rows(rows, batch, axes):
    if batch is None:
        return np.ascontiguousarray(np.moveaxis(rows, 0, axes[0]))
    return np.ascontiguousarray(np.moveaxis(rows.reshape(batch, len(rows) // max(batch, 1), *rows.shape[1:]), (0, 1), axes))
