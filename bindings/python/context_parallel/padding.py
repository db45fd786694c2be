"""How far sequences are padded. Names and formulas are those of Megatron and TransformerEngine; where ours differ, both are there.

This library's own attention needs none of it: lengths may divide by nothing.
"""

from ctypes import byref, c_size_t, c_uint32, c_uint64

import numpy as np

from . import _abi
from ._lib import argument_error, check, lib, number
from .partition import _int32, choice

_FP8 = {None: _abi.CP_FP8_OFF, False: _abi.CP_FP8_OFF, "mxfp8": _abi.CP_FP8_ROWS_32}
_RECIPES = ("tensorwise", "delayed", "blockwise", "custom")
_TAILS = {"append_dummy_seq": _abi.CP_TAIL_APPEND_DUMMY, "extend_last": _abi.CP_TAIL_EXTEND_LAST}
_PARTITIONS = {"zigzag": _abi.CP_PARTITION_ZIGZAG, "contiguous": _abi.CP_PARTITION_CONTIGUOUS}


def _length(name, value):
    if not hasattr(value, "__index__") or not 0 <= value.__index__() <= 1 << 60:
        raise argument_error(f"{name}: got {value!r}, must be an integer from 0 to 2^60")
    return value.__index__()


def _config(cp_size, tp_size, has_sp, fp8, rule, overlap=False, decoder_length=0):
    if fp8 in _RECIPES or fp8 is True:
        rows = _abi.CP_FP8_ROWS_16
    elif isinstance(fp8, str | bool | None) and fp8 in _FP8:
        rows = _FP8[fp8]
    else:
        raise argument_error(f"fp8: got {fp8!r}, allowed None, True, 'mxfp8', {', '.join(map(repr, _RECIPES))}")
    flags = _abi.CP_PADDING_SEQUENCE_PARALLEL if has_sp else 0
    flags |= choice("rule", rule, {"every": 0, "megatron": _abi.CP_PADDING_MEGATRON})
    flags |= _abi.CP_PADDING_TP_OVERLAP if overlap else 0
    sizes = {name: number(name, size) for name, size in (("tp", tp_size), ("cp", cp_size))}
    if 0 in sizes.values():
        raise argument_error(f"tp_size, cp_size: got {tp_size} and {cp_size}, must be at least 1")
    return _abi.cp_padding_config(flags=flags, fp8=rows, decoder_length=decoder_length, **sizes)


def padding_factor(cp_size, tp_size=1, has_sp=False, *, fp8=None, rule="every"):
    """What the length of a sequence must be a multiple of.

    fp8: a recipe ("mxfp8": rows in multiples of 32; "tensorwise", "delayed", "blockwise", True: 16) or None. rule "megatron" is Megatron's: 2·cp·tp with
    sequence parallelism and cp > 1, 2·cp with cp > 1, tp with sequence parallelism, and only where none of these holds FP8's 16 or 32. Rule "every" meets
    all needs at once: the least common multiple with cp times FP8's number, since a matrix product sees a rank's rows.
    """
    made = c_uint64()
    check(lib.cp_padding_factor(byref(_config(cp_size, tp_size, has_sp, fp8, rule)), byref(made)))
    return made.value


def get_padding(
    seq_len, cp_size, tp_size, has_sp, decoder_tp_comm_overlap=False, decoder_seq_len=None, fp8_enabled=False, fp8_recipe=None, *, rule="megatron"
):
    """Tokens to add to a sequence, with the arguments and, unless rule="every", the result of Megatron's function of this name.

    Where tensor-parallel communication overlaps and has_sp, the sequence is padded to decoder_seq_len; one that is longer is an error here.
    """
    fp8 = (fp8_recipe or True) if fp8_enabled else None
    fixed = bool(decoder_tp_comm_overlap and has_sp)
    if fixed and decoder_seq_len is None:
        raise argument_error("decoder_seq_len: got None; with tensor-parallel overlap it is the length to pad to")
    config = _config(cp_size, tp_size, has_sp, fp8, rule, fixed, _length("decoder_seq_len", decoder_seq_len) if fixed else 0)
    made = c_uint64()
    check(lib.cp_padding_amount(byref(config), _length("seq_len", seq_len), byref(made)))
    return made.value


def pad_cu_seqlens(cu_seqlens, divisibility_factor):
    """Cumulative lengths (int32) with every sequence padded to a multiple."""
    cu = _int32("cu_seqlens", cu_seqlens)
    made = np.zeros(len(cu) + 1, np.int32)
    check(lib.cp_padding_sequences(cu.ctypes.data, len(cu), number("divisibility_factor", divisibility_factor), made.ctypes.data))
    return made[:-1]


def pad_thd_sequences_for_cp(input_ids, labels, cu_seqlens, divisibility_factor, padding_token_id=0, padding_label_id=-100):
    """TransformerEngine's: pads every sequence of a pack to a multiple of a factor. (input_ids, labels, cumulative padded lengths), NumPy arrays.

    input_ids and labels are [tokens] or [1, tokens] (NumPy, or anything that becomes it), the results [tokens].
    """
    padded = pad_cu_seqlens(cu_seqlens, divisibility_factor)
    cu = _int32("cu_seqlens", cu_seqlens).astype(np.intp)
    made = []
    for name, values, fill in (("input_ids", input_ids, padding_token_id), ("labels", labels, padding_label_id)):
        values = np.asarray(values)
        rows = values[0] if values.ndim == 2 and len(values) == 1 else values
        if rows.ndim != 1 or len(rows) != cu[-1]:
            raise argument_error(f"{name}: got shape {values.shape}, cu_seqlens say {cu[-1]} tokens")
        whole = np.full(padded[-1], fill, rows.dtype)
        # Token t of a sequence that begins at s moves to where its padded sequence begins.
        whole[np.arange(len(rows)) + np.repeat(padded[:-1] - cu[:-1], np.diff(cu))] = rows
        made.append(whole)
    return (*made, padded)


def generate_positional_ids_for_cp(cu_seqlens, divisibility_factor):
    """TransformerEngine's: positions of a pack whose sequences are padded to a multiple of a factor; they count on through the padding."""
    padded = pad_cu_seqlens(cu_seqlens, divisibility_factor)
    return np.arange(padded[-1]) - np.repeat(padded[:-1], np.diff(padded))


def pad_sequence_tail(cu_seqlens, cu_seqlens_padded=None, *, cp_size=1, alignment=None, target_len=None, tail="append_dummy_seq", max_num_seqs=None, partition="zigzag"):
    """Fills up a pack of sequences to a number of rows per rank: (cu_seqlens, cu_seqlens_padded, max_seqlen), as Megatron's packing does.

    alignment: a multiple of it per rank; or target_len: so many per rank. tail: "append_dummy_seq", a sequence of its own, or "extend_last", padding of
    the last sequence. max_num_seqs: always so many sequences, the dummy included; missing ones are empty and max_seqlen is all rows, so that shapes do
    not depend on the batch. Before tokens are cut by ranks.
    """
    if (alignment is None) == (target_len is None):
        raise argument_error(f"alignment, target_len: got {alignment!r} and {target_len!r}, exactly one must be given")
    if max_num_seqs is not None and number("max_num_seqs", max_num_seqs) == 0:
        raise argument_error("max_num_seqs: got 0, must be at least 1")
    cu = _int32("cu_seqlens", cu_seqlens)
    padded = cu if cu_seqlens_padded is None else _int32("cu_seqlens_padded", cu_seqlens_padded, len(cu))
    config = _abi.cp_tail_config(
        ranks=number("cp_size", cp_size),
        partition=choice("partition", partition, _PARTITIONS),
        tail=choice("tail", tail, _TAILS),
        slots=0 if max_num_seqs is None else max_num_seqs,
        multiple=0 if alignment is None else _length("alignment", alignment),
        rows=0 if target_len is None else _length("target_len", target_len),
    )
    results = np.zeros((2, max(len(cu), config.slots) + 1), np.int32)
    count, longest = c_size_t(), c_uint64()
    rows = (results[0].ctypes.data, results[1].ctypes.data, results.shape[1])
    check(lib.cp_padding_tail(byref(config), cu.ctypes.data, padded.ctypes.data, len(cu), *rows, byref(count), byref(longest)))
    return results[0, : count.value], results[1, : count.value], longest.value


def get_packed_seq_params(batch, seq_len, padding_needed, cp_size, use_packed_sequence=False):
    """Lengths of a padded multimodal batch, as Megatron's function of this name decides: a dict with the fields of its PackedSeqParams.

    seq_len: of every entry, images and `padding_needed` included. Packed (thd) with padded lengths where cp_size > 1 and there is padding or packing;
    else dense, and cu_seqlens_padded is None.
    """
    batch = number("batch", batch)
    if batch > 1 << 24:
        raise argument_error(f"batch: got {batch}, at most {1 << 24}")
    format, lengths = c_uint32(), np.zeros((2, batch + 1), np.int32)
    sizes = _length("seq_len", seq_len), _length("padding_needed", padding_needed), number("cp_size", cp_size), int(bool(use_packed_sequence))
    check(lib.cp_padding_batch(batch, *sizes, lengths[0].ctypes.data, lengths[1].ctypes.data, byref(format)))
    packed = format.value == _abi.CP_FORMAT_PACKED
    return dict(
        qkv_format="thd" if packed else "sbhd",
        cu_seqlens=lengths[0],
        cu_seqlens_padded=lengths[1] if packed else None,
        max_seqlen=sizes[0],
    )


def context_parallel_image_bounds(seqlens, cp_size, *, num_frames=None, temporal_patch_size=1, rule="every"):
    """Where images are cut among ranks, every one whole: rank r gets images bounds[r] up to bounds[r + 1] (cp_size + 1 numbers).

    seqlens: tokens of every image, or frame. num_frames: how many of them belong to each medium (None: all are pictures), of which temporal_patch_size stay
    together. Rule "every": the fullest rank has as few tokens as it can have. Rule "megatron": ⌊images/cp_size⌋ each and the rest on the last rank;
    with fewer images than ranks one each, where indices beyond the images are dummies.
    """
    rows = np.array([_length("seqlens", n) for n in seqlens], np.uint64)
    media = np.ones(len(rows), np.uint64) if num_frames is None else np.array([_length("num_frames", n) for n in num_frames], np.uint64)
    ranks, flags = number("cp_size", cp_size), choice("rule", rule, {"every": 0, "megatron": _abi.CP_PADDING_MEGATRON})
    if ranks > 1 << 20 or number("temporal_patch_size", temporal_patch_size) == 0:
        raise argument_error(f"cp_size, temporal_patch_size: got {cp_size} and {temporal_patch_size}, must be at least 1")
    made = np.zeros(ranks + 1, np.uint64)
    arrays = rows.ctypes.data, len(rows), media.ctypes.data, len(media)
    check(lib.cp_padding_image_bounds(*arrays, temporal_patch_size, ranks, flags, made.ctypes.data))
    return made.tolist()


def context_parallel_split(count, cp_size, cp_rank):
    """Entries of a batch of `count` that a rank gets: (start, length, padding), length + padding the same on all ranks."""
    made = c_uint64(), c_uint64(), c_uint64()
    check(lib.cp_padding_split(_length("count", count), number("cp_size", cp_size), number("cp_rank", cp_rank), *map(byref, made)))
    return tuple(n.value for n in made)


def split_to_context_parallel_ranks(batch, cp_size, cp_rank, pad_value=0, *, axis=0):
    """Megatron's: a rank's entries of a batch, ⌈count/cp_size⌉ along `axis`, the last ranks' filled up with pad_value; and the padding of all ranks."""
    batch = np.asarray(batch)
    start, length, padding = context_parallel_split(batch.shape[axis], cp_size, cp_rank)
    part = np.take(batch, range(start, start + length), axis)
    widths = [(0, padding if i == axis % batch.ndim else 0) for i in range(batch.ndim)]
    return np.pad(part, widths, constant_values=pad_value), (length + padding) * cp_size - batch.shape[axis]


def join_context_parallel_ranks(parts, global_pad, *, axis=0):
    """The inverse, from the parts of all ranks in order: what Megatron's gather_from_context_parallel_ranks has after its all-gather."""
    whole = np.concatenate([np.asarray(part) for part in parts], axis)
    return np.take(whole, range(whole.shape[axis] - global_pad), axis)
