#!/usr/bin/env python3
"""What the PTX manual says of the instructions that kernels use, compared with what the probe found on a machine.

usage: layouts.py FILE.json…        exit status 1 if anything differs

Chapters of the PTX ISA: "Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix", "cp.async", "cvt", "ex2", "lg2", "Register
Fragments and Shared Memory Matrix Layouts" (wgmma), "Tensor swizzling modes".
"""

import json
import math
import struct
import sys


def floats(text):
    return [struct.unpack("<f", struct.pack("<I", int(text[i : i + 8], 16)))[0] for i in range(0, len(text), 8)]


def words(text):
    return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]


# Fragments of one warp: slot → (row, column), slots as in probe.h.


def mma_a(slot):
    lane, register, half = slot // 8, slot // 2 % 4, slot % 2
    return lane // 4 + register % 2 * 8, lane % 4 * 2 + half + register // 2 * 8


def mma_b(slot):
    """(k, n)"""
    lane, register, half = slot // 4, slot // 2 % 2, slot % 2
    return lane % 4 * 2 + half + register * 8, lane // 4


def mma_d(slot):
    lane, i = slot // 4, slot % 4
    return lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2


def mma():
    """For each slot of A: [slot of D, slot of B] wherever it has a part, by slots of D."""
    at_b = {mma_b(s): s for s in range(128)}
    rows = []
    for a in range(256):
        m, k = mma_a(a)
        rows.append([[d, at_b[k, mma_d(d)[1]]] for d in range(128) if mma_d(d)[0] == m])
    return rows


def ldmatrix(transposed):
    """Register i of a lane holds two neighbours in a row (transposed: in a column) of matrix i."""
    elements = []
    for lane in range(32):
        for matrix in range(4):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if transposed:
                    row, column = column, row
                elements.append(matrix * 64 + row * 8 + column)
    return elements


def cp_async():
    """Lanes copy 16 bytes each; what is not valid becomes zero."""
    return [i + 1 if i // 4 % 2 == 0 else 0 for i in range(128)]


def to_bf16(bits):
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def to_f16(bits):
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 16 & 0x8000
    if magnitude > 0x7F800000:
        return 0x7FFF
    exponent, mantissa = magnitude >> 23, magnitude & 0x7FFFFF | 0x800000
    # The last place of the result counts for 2^(e − 10), e at least −14.
    shift = 13 + max(0, 113 - exponent)
    if exponent == 0 or shift > 24:
        return sign
    kept, rest = mantissa >> shift, mantissa & ((1 << shift) - 1)
    kept += rest > 1 << (shift - 1) or (rest == 1 << (shift - 1) and kept & 1)
    # A carry runs on into the exponent by itself.
    value = kept + ((exponent - 113) << 10 if exponent > 113 else 0)
    return sign | min(value, 0x7C00)


def convert(found):
    return [to_f16(x) << 16 | to_bf16(x) for x in words(found["convert_in"])]


def powers(found):
    """Faults of ex2.approx.ftz (relative error 2^-22) and lg2.approx.ftz (absolute error 2^-22 for x in [0.5, 2], relative else)."""
    tiny = 2.0**-126

    def flushed(x):
        return math.copysign(0.0, x) if abs(x) < tiny else x

    wrong = []
    results = floats(found["powers_out_exp2_log2"])
    for i, x in enumerate(floats(found["powers_in"])):
        x, exp2, log2 = flushed(x), results[2 * i], results[2 * i + 1]
        want = x if math.isnan(x) else math.inf if x >= 128 else flushed(2.0**x)
        # At the edge of what is flushed either side is right.
        if not (same(exp2, want) or abs(exp2 - want) <= 2.0**-22 * want or (exp2 == 0.0 and want < tiny * 1.001)):
            wrong.append(f"2^{x}: {exp2}, wanted {want}")
        want = math.nan if math.isnan(x) or x < 0 else -math.inf if x == 0 else x if math.isinf(x) else math.log2(x)
        if not (same(log2, want) or abs(log2 - want) <= 2.0**-22 * max(1.0 if 0.5 <= x <= 2 else 0.0, abs(want))):
            wrong.append(f"log2 {x}: {log2}, wanted {want}")
    return wrong


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


# Hopper: a warpgroup of four warps, each with 16 of 64 rows, in the layout of mma.m16n8k16.


def wgmma_d():
    """(thread, register) → 64·row + column"""
    labels = []
    for thread in range(128):
        for register in range(32):
            row = thread // 32 * 16 + thread % 32 // 4 + register // 2 % 2 * 8
            column = register // 4 * 8 + thread % 4 * 2 + register % 2
            labels.append(row * 64 + column)
    return labels


def wgmma_a():
    """slot (thread · 8 + register · 2 + half) → 16·row + k"""
    labels = []
    for slot in range(1024):
        row, k = mma_a(slot % 256)
        labels.append((slot // 256 * 16 + row) * 16 + k)
    return labels


def swizzled(first_row):
    """Chunk c (16 bytes) of row r of 128 bytes lies where chunk c ^ r % 8 would. Element (r, c) is r·64 + c + 1; 0 outside the tensor."""
    tile = [0] * 4096
    for row in range(64):
        for column in range(64):
            inside = first_row + row < 64
            place = row * 64 + (column // 8 ^ row % 8) * 8 + column % 8
            tile[place] = (first_row + row) * 64 + column + 1 if inside else 0
    return tile


def descriptors(way):
    """The strides that the manual gives for a tile of 64 × 128 bytes with 128-byte swizzle."""
    if way.endswith("columns"):
        return lambda d: d["stride"] == 1024 and d["step"] == 32  # `leading` is not used
    return None  # the manual leaves room: the probe decides


def faults(found):
    """What differs from the manual, in words."""
    wrong = []

    def compare(key, wanted):
        if found.get(key) != wanted:
            places = "missing"
            if key in found:
                differing = [i for i, (a, b) in enumerate(zip(found[key], wanted)) if a != b]
                places = f"{len(differing)} of {len(wanted)} differ" + (f", the first at {differing[0]}: {found[key][differing[0]]}, manual {wanted[differing[0]]}" if differing else "")
            wrong.append(f"{key}: {places}")

    compare("ldmatrix_x4", ldmatrix(False))
    compare("ldmatrix_x4_trans", ldmatrix(True))
    for storage in ("bf16", "f16"):
        compare(f"mma_{storage}", mma())
        compare(f"mma_{storage}_accumulator", list(range(128)))
    compare("cp_async", cp_async())
    if words(found.get("convert_out_f16_bf16", "")) != convert(found):
        pairs = zip(words(found["convert_in"]), words(found["convert_out_f16_bf16"]), convert(found))
        x, got, want = next((x, a, b) for x, a, b in pairs if a != b)
        wrong.append(f"convert: {x:08x} gives {got:08x}, wanted {want:08x}")
    wrong += powers(found)
    if found["hopper"]:
        compare("wgmma_accumulators", wgmma_d())
        compare("wgmma_a_registers", wgmma_a())
        compare("tma_swizzle_128", swizzled(0))
        compare("tma_swizzle_128_from_row_32", swizzled(32))
        for way in [key for key in found if key.startswith("wgmma_descriptor")]:
            right = [d for d in found[way] if d["wrong"] == 0]
            manual = descriptors(way)
            if not right:
                wrong.append(f"{way}: no strides gave the product")
            for d in found[way]:
                if manual and manual(d) != (d["wrong"] == 0):
                    wrong.append(f"{way}: {d}, manual {manual(d)}")
    return wrong


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    failed = False
    for path in sys.argv[1:]:
        with open(path) as file:
            found = json.load(file)
        wrong = faults(found)
        failed |= bool(wrong)
        what = "mma, ldmatrix, cp.async, conversions, 2^x, log2" + (", wgmma, TMA" if found["hopper"] else "")
        print(f"{found['device']} ({found['capability']}): {what}: {'as the PTX manual says' if not wrong else f'{len(wrong)} differences'}")
        for line in wrong[:20]:
            print("  " + line)
        for way in [key for key in found if key.startswith("wgmma_descriptor")]:
            right = [f"leading {d['leading']} stride {d['stride']} step {d['step']}" for d in found[way] if d["wrong"] == 0]
            print(f"  {way}: right with {'; '.join(right) or 'nothing'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
