// Row kernels' common part: how a launch is spread over (row, head) pairs, and reading and writing elements as fp32.
//
// Grid of every row kernel: 1-D, 256 threads a block, any number of blocks; about min(⌈pairs · lanes(dim) / 256⌉, 8 · SMs) is right.
#pragma once
#include "params.h"
#include "ptx.cuh"
#include "tile.cuh"

// The pairs of one group of `lanes` neighbouring threads: the first, and then every (number of groups)-th. No division after the first.
struct row_pairs {
    uint32_t row, head, lane;
    uint32_t step_row, step_head, heads, rows;

    DEVICE row_pairs(uint32_t rows, uint32_t heads, uint32_t lanes) : heads(heads), rows(rows) {
        uint64_t thread = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
        uint64_t groups = (uint64_t)gridDim.x * blockDim.x / lanes;
        uint64_t group = thread / lanes;
        lane = threadIdx.x % lanes;
        row = (uint32_t)min_u64(group / heads, rows);
        head = (uint32_t)(group % heads);
        step_row = (uint32_t)min_u64(groups / heads, rows);
        step_head = (uint32_t)(groups % heads);
    }
    DEVICE static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
    DEVICE bool valid() const { return row < rows; }
    DEVICE void next() {
        head += step_head;
        uint32_t carry = head >= heads;
        head -= carry ? heads : 0;
        uint32_t left = rows - row;  // saturates at the end, so that no number of rows overflows
        row = left <= step_row + carry ? rows : row + step_row + carry;
    }
};

// The run that row `index` of all rows belongs to: the last that starts at or before it. Neighbouring rows mostly share one.
struct run_search {
    const cp_run* runs;
    uint32_t count;
    cp_run run;

    DEVICE run_search(uint64_t table, uint32_t count) : runs((const cp_run*)table), count(count), run{} {}
    DEVICE uint32_t find(uint32_t index) {
        if (index - run.before < run.rows) return index - run.before;
        uint32_t low = 0, high = count;  // runs[low].before <= index < runs[high].before
        while (high - low > 1) {
            uint32_t middle = low + (high - low) / 2;
            if (load_constant(&runs[middle].before) <= index) {
                low = middle;
            } else {
                high = middle;
            }
        }
        run.src = load_constant(&runs[low].src);
        run.src_step = load_constant(&runs[low].src_step);
        run.dst = load_constant(&runs[low].dst);
        run.dst_step = load_constant(&runs[low].dst_step);
        run.rows = load_constant(&runs[low].rows);
        run.before = load_constant(&runs[low].before);
        return index - run.before;
    }
};

// Threads that share a pair: the power of two that covers the units of a row, at most a warp.
DEVICE uint32_t row_lanes(uint32_t units) {
    uint32_t lanes = 1;
    while (lanes < units && lanes < 32) lanes *= 2;
    return lanes;
}

// Do all rows and heads start at multiples of `bytes`?
DEVICE bool rows_aligned(const cp_view& view, uint32_t element, uint32_t bytes) {
    uint64_t strides = (uint64_t)view.stride_row | (uint64_t)view.stride_head;
    if (view.rows_per_batch != 0) strides |= (uint64_t)view.stride_batch;
    return ((view.ptr | strides * element) & (bytes - 1)) == 0;
}

// N elements at once: 1, or 4 or 8 with one access of 8 or 16 bytes.
template <class T, int N>
struct elements;

template <>
struct elements<float, 1> {
    DEVICE static void load(const float* p, float (&x)[1]) { x[0] = load_global(p); }
    DEVICE static void store(float* p, const float (&x)[1]) { store_global(p, x[0]); }
};
template <>
struct elements<float, 4> {
    DEVICE static void load(const float* p, float (&x)[4]) {
        float4 v = load_global((const float4*)p);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    DEVICE static void store(float* p, const float (&x)[4]) {
        float4 v;
        v.x = x[0], v.y = x[1], v.z = x[2], v.w = x[3];
        store_global((float4*)p, v);
    }
};

// Two elements of 16 bits.
template <class T>
DEVICE void unpack2(uint32_t pair, float& low, float& high) {
    T a, b;
    a.bits = (uint16_t)pair;
    b.bits = (uint16_t)(pair >> 16);
    low = to_float(a), high = to_float(b);
}

template <class T>
struct elements<T, 1> {
    DEVICE static void load(const T* p, float (&x)[1]) { x[0] = to_float(load_global(p)); }
    DEVICE static void store(T* p, const float (&x)[1]) {
        T bits;
        bits.bits = (uint16_t)pack2<T>(x[0], 0.0f);
        store_global(p, bits);
    }
};
template <class T>
struct elements<T, 4> {
    DEVICE static void load(const T* p, float (&x)[4]) {
        uint2 v = load_global((const uint2*)p);
        unpack2<T>(v.x, x[0], x[1]);
        unpack2<T>(v.y, x[2], x[3]);
    }
    DEVICE static void store(T* p, const float (&x)[4]) {
        uint2 v;
        v.x = pack2<T>(x[0], x[1]), v.y = pack2<T>(x[2], x[3]);
        store_global((uint2*)p, v);
    }
};
template <class T>
struct elements<T, 8> {
    DEVICE static void load(const T* p, float (&x)[8]) {
        uint4 v = load_global((const uint4*)p);
        unpack2<T>(v.x, x[0], x[1]);
        unpack2<T>(v.y, x[2], x[3]);
        unpack2<T>(v.z, x[4], x[5]);
        unpack2<T>(v.w, x[6], x[7]);
    }
    DEVICE static void store(T* p, const float (&x)[8]) {
        uint4 v;
        v.x = pack2<T>(x[0], x[1]), v.y = pack2<T>(x[2], x[3]);
        v.z = pack2<T>(x[4], x[5]), v.w = pack2<T>(x[6], x[7]);
        store_global((uint4*)p, v);
    }
};
