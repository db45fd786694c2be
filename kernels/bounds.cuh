// The work list, and which keys a query row sees in one part of it.
#pragma once
#include "params.h"
#include "ptx.cuh"

// Tables are read in vectors: cp_tile and cp_part lie at multiples of 16 bytes, cp_slice at multiples of 8.
DEVICE cp_tile load_tile(uint64_t tiles, uint32_t index) {
    uint4 x = load_constant((const uint4*)tiles + index);
    return cp_tile{x.x, x.y, x.z, x.w};
}
DEVICE cp_part load_part(uint64_t parts, uint32_t index) {
    const uint4* p = (const uint4*)parts + 2 * index;
    uint4 x = load_constant(p), y = load_constant(p + 1);
    return cp_part{x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
}
DEVICE cp_slice load_slice(uint64_t slices, uint32_t index) {
    const uint2* p = (const uint2*)slices + 3 * index;
    uint2 x = load_constant(p), y = load_constant(p + 1), z = load_constant(p + 2);
    return cp_slice{x.x, x.y, y.x, y.y, (int32_t)z.x, (int32_t)z.y};
}

// Key rows [lo, hi); empty when lo == hi.
struct KeyRange {
    uint32_t lo, hi;
};

// Rows of the slice's keys that its row i sees (mask.rs, Slice::keys_of).
DEVICE KeyRange keys_of(const cp_slice& s, uint32_t i) {
    int64_t n = s.k_len, lo = (int64_t)i + s.lo, hi = (int64_t)i + s.hi + 1;
    lo = lo < 0 ? 0 : lo > n ? n : lo;
    hi = hi < lo ? lo : hi > n ? n : hi;
    return KeyRange{s.k + (uint32_t)lo, s.k + (uint32_t)hi};
}

// What query row `row` sees in a part: a row is in at most one of its slices.
DEVICE KeyRange keys_of_row(uint64_t slices, const cp_part& part, uint32_t row) {
    KeyRange range{part.begin, part.begin};
#pragma unroll 1
    for (uint32_t n = 0; n < part.slices; n++) {
        cp_slice s = load_slice(slices, part.slice + n);
        if (row - s.q < s.q_len) {
            range = keys_of(s, row - s.q);
        }
    }
    return range;
}
