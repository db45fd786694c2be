"""Masks by slices: which queries see which keys, said by the caller for every call."""

import numpy as np

from . import _abi
from ._lib import argument_error, number

_TYPES = {"full": (False, False), "causal": (False, True), "inv_causal": (True, False), "bi_causal": (True, True)}
_FIELD = np.dtype([(name, np.int32 if name in ("lo", "hi") else np.uint32) for name, _ in _abi.cp_mask_slice._fields_])


def mask_slices(q_ranges, k_ranges, types="full", sequence=0):
    """Slices from ranges, as MagiAttention has them: queries q_ranges[n] = (begin, end) see keys k_ranges[n] as types[n] says.

    types: one of these for all, or a list; MagiAttention's numbers 0 … 3 are the same. "full"; "causal": the diagonal ends in the last query and last
    key of the rectangle, later keys are hidden; "inv_causal": it begins at the first query and first key, earlier keys are hidden; "bi_causal": both.
    Returns what Sequences takes as `slices`; those of several sequences are added. A layer for them has no mask of its own, or one that holds as well.
    """
    if isinstance(types, str) or not hasattr(types, "__len__") or getattr(types, "ndim", 1) == 0:
        types = [types] * len(q_ranges)
    if not len(q_ranges) == len(k_ranges) == len(types):
        raise argument_error(f"q_ranges, k_ranges, types: got {len(q_ranges)}, {len(k_ranges)} and {len(types)}, need as many")
    made = []
    for n, (q, k, kind) in enumerate(zip(q_ranges, k_ranges, types)):
        names = list(_TYPES)
        name = kind if isinstance(kind, str) else names[kind] if hasattr(kind, "__index__") and 0 <= kind < len(names) else kind
        if name not in _TYPES:
            raise argument_error(f"types: got {kind!r}, allowed {', '.join(map(repr, names))} or 0 to 3")
        begins, ends = _TYPES[name]
        try:
            (q_begin, q_end), (k_begin, k_end) = q, k
        except (TypeError, ValueError):
            raise argument_error(f"q_ranges[{n}], k_ranges[{n}]: got {q!r} and {k!r}, need (begin, end) each") from None
        lo, hi = k_begin - q_begin if begins else None, k_end - q_end if ends else None
        # More queries than keys have no key between both diagonals.
        if lo is None or hi is None or lo <= hi:
            made.append((sequence, (q_begin, q_end), (k_begin, k_end), lo, hi))
    return made


def slice_array(slices):
    """The C structs of a list of slices."""
    try:
        slices = list(slices)
    except TypeError:
        raise argument_error(f"slices: got {slices!r}, need a list of (sequence, (q begin, q end), (k begin, k end)), each with lo, hi if keys are limited") from None
    if not slices:
        raise argument_error("slices: got none; a query sees nothing without one, and None is the layer's mask alone")
    made = np.zeros(len(slices), _FIELD)
    for n, one in enumerate(slices):
        try:
            sequence, (q_begin, q_end), (k_begin, k_end), *band = one
            lo, hi = (*band, None, None)[: max(2, len(band))]
        except (TypeError, ValueError):
            raise argument_error(f"slices[{n}]: got {one!r}, need (sequence, (q begin, q end), (k begin, k end)), and lo, hi if keys are limited") from None
        plain = [number(f"slices[{n}]", x) for x in (sequence, q_begin, q_end, k_begin, k_end)]
        flags = (lo is not None) * _abi.CP_SLICE_LO + (hi is not None) * _abi.CP_SLICE_HI
        made[n] = (*plain, flags, _limit(n, lo), _limit(n, hi))
    return made


def _limit(n, value):
    if value is None:
        return 0
    if not hasattr(value, "__index__") or not -(2**31) <= value.__index__() < 2**31:
        raise argument_error(f"slices[{n}]: got {value!r} as lo or hi, need None or an integer of 32 bits")
    return value.__index__()
