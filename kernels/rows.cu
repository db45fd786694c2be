// Kernels on rows of tensors: copy and convert, add, encode and decode, fill, the row sums of O∘dO, gradients of sinks, and sums over rows. All are bound by memory.
#include "fp8.cuh"
#include "rows.cuh"

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

// Equal types: bits are moved, whatever they mean. W: the word, 1, 2, 4 or 16 bytes.
template <class W>
DEVICE void move_rows(const cp_rows_params& p, uint32_t units, uint32_t element) {
    uint32_t lanes = row_lanes(units);
    run_search search(p.runs, p.run_count);
    for (row_pairs pair(p.row_count, p.heads, lanes); pair.valid(); pair.next()) {
        uint32_t i = search.find(pair.row);
        uint32_t from = search.run.src + i * search.run.src_step, to = search.run.dst + i * search.run.dst_step;
        const W* src = (const W*)(p.src.ptr + element_offset(p.src, from, p.src_head + pair.head) * (int64_t)element);
        W* dst = (W*)(p.dst.ptr + element_offset(p.dst, to, p.dst_head + pair.head) * (int64_t)element);
        for (uint32_t u = pair.lane; u < units; u += lanes) store_global(dst + u, load_global(src + u));
    }
}

template <class S, class D, int N, bool ADD>
DEVICE void convert_rows(const cp_rows_params& p) {
    uint32_t units = p.dim / N, lanes = row_lanes(units);
    run_search search(p.runs, p.run_count);
    for (row_pairs pair(p.row_count, p.heads, lanes); pair.valid(); pair.next()) {
        uint32_t i = search.find(pair.row);
        uint32_t from = search.run.src + i * search.run.src_step, to = search.run.dst + i * search.run.dst_step;
        const S* src = (const S*)p.src.ptr + element_offset(p.src, from, p.src_head + pair.head);
        D* dst = (D*)p.dst.ptr + element_offset(p.dst, to, p.dst_head + pair.head);
        for (uint32_t u = pair.lane; u < units; u += lanes) {
            float x[N];
            elements<S, N>::load(src + u * N, x);
            if (ADD) {
                float y[N];
                elements<D, N>::load(dst + u * N, y);
                for (int e = 0; e < N; e++) x[e] += y[e];
            }
            elements<D, N>::store(dst + u * N, x);
        }
    }
}

// Four or eight elements at a time where both sides allow it.
template <class S, class D, bool ADD>
DEVICE void convert_rows(const cp_rows_params& p) {
    constexpr int N = sizeof(S) == 2 && sizeof(D) == 2 ? 8 : 4;
    bool vectors = p.dim % N == 0 && rows_aligned(p.src, sizeof(S), N * sizeof(S)) && rows_aligned(p.dst, sizeof(D), N * sizeof(D));
    if (vectors) {
        convert_rows<S, D, N, ADD>(p);
    } else {
        convert_rows<S, D, 1, ADD>(p);
    }
}

// Units of a pair: dim / 4, dim / 8 if no side is fp32, dim if not aligned; of bytes that travel dim / 16, dim / 4 or dim.
extern "C" __global__ void __launch_bounds__(256, 4) cp_copy_rows(cp_rows_params p) {
    if (p.add) {
        switch (p.src_type) {
            case CP_F32: return convert_rows<float, float, true>(p);
            case CP_BF16: return convert_rows<bf16_t, float, true>(p);
            case CP_F16: return convert_rows<f16_t, float, true>(p);
        }
        return;
    }
    if (p.src_type == p.dst_type) {
        uint32_t element = p.src_type == CP_F32 ? 4 : p.src_type >= CP_E4M3 ? 1 : 2, bytes = p.dim * element;
        if (bytes % 16 == 0 && rows_aligned(p.src, element, 16) && rows_aligned(p.dst, element, 16)) return move_rows<uint4>(p, bytes / 16, element);
        if (element == 4) return move_rows<uint32_t>(p, p.dim, element);
        if (element == 2) return move_rows<bf16_t>(p, p.dim, element);
        if (bytes % 4 == 0 && rows_aligned(p.src, element, 4) && rows_aligned(p.dst, element, 4)) return move_rows<uint32_t>(p, bytes / 4, element);
        return move_rows<uint8_t>(p, bytes, element);
    }
    switch (p.src_type * 3 + p.dst_type) {
        case CP_F32 * 3 + CP_BF16: return convert_rows<float, bf16_t, false>(p);
        case CP_F32 * 3 + CP_F16: return convert_rows<float, f16_t, false>(p);
        case CP_BF16 * 3 + CP_F32: return convert_rows<bf16_t, float, false>(p);
        case CP_BF16 * 3 + CP_F16: return convert_rows<bf16_t, f16_t, false>(p);
        case CP_F16 * 3 + CP_F32: return convert_rows<f16_t, float, false>(p);
        case CP_F16 * 3 + CP_BF16: return convert_rows<f16_t, bf16_t, false>(p);
    }
}

// Whole warps go through the loop together, for the largest of four threads: until the pair of lane 0, the least of the warp, is past the end.
template <class S, class W>
DEVICE void encode_rows(const cp_rows_params& p) {
    const fp8_numbers format(p.dst_type);
    const uint32_t units = p.dim / 8, lanes = row_lanes(units < 4 ? 4 : units);
    run_search search(p.runs, p.run_count);
    for (row_pairs pair(p.row_count, p.heads, lanes); shuffle(pair.valid(), 0); pair.next()) {
        const S* src = nullptr;
        uint64_t dst = 0;
        if (pair.valid()) {
            uint32_t i = search.find(pair.row);
            uint32_t from = search.run.src + i * search.run.src_step, to = search.run.dst + i * search.run.dst_step;
            src = (const S*)p.src.ptr + element_offset(p.src, from, p.src_head + pair.head);
            dst = p.dst.ptr + element_offset(p.dst, to, p.dst_head + pair.head);
        }
        for (uint32_t first = 0; first < units; first += lanes) {
            const uint32_t u = first + pair.lane;
            const bool there = pair.valid() && u < units;
            float x[8] = {};
            uint32_t largest = 0;
            if (there) {
                elements<S, 8>::load(src + u * 8, x);
                for (int e = 0; e < 8; e++) {
                    const uint32_t bits = __float_as_uint(x[e]) & 0x7fffffff;
                    largest = bits > largest ? bits : largest;
                }
            }
            const uint32_t byte = format.scale(fp8_largest(largest));
            if (!there) continue;
            uint64_t codes = 0x7f7f7f7f7f7f7f7full;  // NaN
            if (byte != 255) {
                const float inverse = __uint_as_float((254 - byte) << 23);
                codes = 0;
                for (int e = 0; e < 8; e++) codes |= (uint64_t)format.code(x[e] * inverse) << 8 * e;
            }
            store_8<W>(dst + u * 8, codes);
            if (u % 4 == 0) store_global((uint8_t*)dst + p.dim + u / 4, (uint8_t)byte);
        }
    }
}

// What rounds to a number beyond the storage type's largest becomes that.
template <class D, class W>
DEVICE void decode_rows(const cp_rows_params& p) {
    const fp8_numbers format(p.src_type);
    const float most = __uint_as_float(p.dst_type == CP_BF16 ? 0x7f7f0000u : 0x477fe000u);
    const uint32_t units = p.dim / 8, lanes = row_lanes(units);
    run_search search(p.runs, p.run_count);
    for (row_pairs pair(p.row_count, p.heads, lanes); pair.valid(); pair.next()) {
        uint32_t i = search.find(pair.row);
        uint32_t from = search.run.src + i * search.run.src_step, to = search.run.dst + i * search.run.dst_step;
        const uint64_t src = p.src.ptr + element_offset(p.src, from, p.src_head + pair.head);
        D* dst = (D*)p.dst.ptr + element_offset(p.dst, to, p.dst_head + pair.head);
        for (uint32_t u = pair.lane; u < units; u += lanes) {
            const uint64_t codes = load_8<W>(src + u * 8);
            const float scale = fp8_scale(load_global((const uint8_t*)src + p.dim + u / 4));
            float x[8];
            for (int e = 0; e < 8; e++) {
                const float y = format.number((uint32_t)(codes >> 8 * e) & 0xff) * scale;
                x[e] = y > most ? most : y < -most ? -most : y;
            }
            elements<D, 8>::store(dst + u * 8, x);
        }
    }
}

// Units of a pair: dim / 8, at least 4. Rows of src are aligned to 16 bytes, those of dst need not be.
extern "C" __global__ void __launch_bounds__(256, 4) cp_encode_rows(cp_rows_params p) {
    if (rows_aligned(p.dst, 1, 4)) {
        if (p.src_type == CP_BF16) return encode_rows<bf16_t, uint32_t>(p);
        return encode_rows<f16_t, uint32_t>(p);
    }
    if (p.src_type == CP_BF16) return encode_rows<bf16_t, uint8_t>(p);
    encode_rows<f16_t, uint8_t>(p);
}

// Units of a pair: dim / 8. Rows of dst are aligned to 16 bytes, those of src need not be.
extern "C" __global__ void __launch_bounds__(256, 4) cp_decode_rows(cp_rows_params p) {
    if (rows_aligned(p.src, 1, 4)) {
        if (p.dst_type == CP_BF16) return decode_rows<bf16_t, uint32_t>(p);
        return decode_rows<f16_t, uint32_t>(p);
    }
    if (p.dst_type == CP_BF16) return decode_rows<bf16_t, uint8_t>(p);
    decode_rows<f16_t, uint8_t>(p);
}

template <class D, int N>
DEVICE void fill_rows(const cp_rows_params& p, float value) {
    uint32_t units = p.dim / N, lanes = row_lanes(units);
    float x[N];
    for (int e = 0; e < N; e++) x[e] = value;
    run_search search(p.runs, p.run_count);
    for (row_pairs pair(p.row_count, p.heads, lanes); pair.valid(); pair.next()) {
        uint32_t i = search.find(pair.row);
        D* dst = (D*)p.dst.ptr + element_offset(p.dst, search.run.dst + i * search.run.dst_step, p.dst_head + pair.head);
        for (uint32_t u = pair.lane; u < units; u += lanes) elements<D, N>::store(dst + u * N, x);
    }
}

template <class D>
DEVICE void fill_rows(const cp_rows_params& p) {
    constexpr int N = 16 / sizeof(D);
    float value = __builtin_bit_cast(float, p.value);
    if (p.dim % N == 0 && rows_aligned(p.dst, sizeof(D), 16)) {
        fill_rows<D, N>(p, value);
    } else {
        fill_rows<D, 1>(p, value);
    }
}

// Units of a pair: 16 bytes, or elements if not aligned. `src` of the runs is not read.
extern "C" __global__ void __launch_bounds__(256, 4) cp_fill_rows(cp_rows_params p) {
    switch (p.dst_type) {
        case CP_F32: return fill_rows<float>(p);
        case CP_BF16: return fill_rows<bf16_t>(p);
        case CP_F16: return fill_rows<f16_t>(p);
    }
}

// Whole warps go through the loop together, for the sums over lanes: until the pair of lane 0, the least of the warp, is past the end.
// The order of the sums is fixed: the same bits in every run.
template <class T>
DEVICE void sum_rows(const cp_delta_params& p) {
    uint32_t units = p.dim / 8, lanes = row_lanes(units);
    for (row_pairs pair(p.row_count, p.heads, lanes); shuffle(pair.valid(), 0); pair.next()) {
        float sum = 0.0f;
        if (pair.valid()) {
            const T* out = (const T*)p.out.ptr + element_offset(p.out, pair.row, pair.head);
            const T* d_out = (const T*)p.d_out.ptr + element_offset(p.d_out, pair.row, pair.head);
            for (uint32_t u = pair.lane; u < units; u += lanes) {
                float x[8], y[8];
                elements<T, 8>::load(out + u * 8, x);
                elements<T, 8>::load(d_out + u * 8, y);
                for (int e = 0; e < 8; e++) sum += x[e] * y[e];
            }
        }
        for (uint32_t other = lanes / 2; other > 0; other /= 2) sum += shuffle_xor(sum, (int)other);
        if (pair.valid() && pair.lane == 0) store_global((float*)p.delta.ptr + element_offset(p.delta, pair.row, pair.head), sum);
    }
}

// Units of a pair: dim / 8. Rows of out and d_out are aligned to 16 bytes; those of delta to 4.
extern "C" __global__ void __launch_bounds__(256, 4) cp_delta(cp_delta_params p) {
    if (p.type == CP_BF16) {
        sum_rows<bf16_t>(p);
    } else {
        sum_rows<f16_t>(p);
    }
}

// Units of a pair: 1.
extern "C" __global__ void __launch_bounds__(256, 4) cp_sink_terms(cp_sink_params p) {
    for (row_pairs pair(p.row_count, p.heads, 1); pair.valid(); pair.next()) {
        float lse = load_global((const float*)p.lse.ptr + element_offset(p.lse, pair.row, pair.head)), term = 0.0f;
        if (lse != -__builtin_huge_valf()) {  // else the row is padding, and its delta perhaps NaN
            float sink = load_global((const float*)p.sinks.ptr + element_offset(p.sinks, 0, pair.head));
            term = -exp2_approx((sink - lse) * 1.4426950408889634f) * load_global((const float*)p.delta.ptr + element_offset(p.delta, pair.row, pair.head));
        }
        store_global((float*)p.terms.ptr + element_offset(p.terms, pair.row, pair.head), term);
    }
}

// Grid: a block of 256 threads per head; 32 bytes of dynamic shared memory. The order of the sums is fixed: every thread its rows in order,
// then the lanes of a warp, then the warps.
extern "C" __global__ void __launch_bounds__(256, 4) cp_reduce(cp_reduce_params p) {
    SHARED_MEMORY(shared);
    float* const of_warp = (float*)shared;
    const uint32_t head = blockIdx.x, thread = threadIdx.x;
    const float* const src = (const float*)p.src.ptr;
    float x = p.largest ? -__builtin_huge_valf() : 0.0f;
    for (uint32_t row = thread; row < p.row_count; row += 256) {
        float y = load_global(src + element_offset(p.src, row, head));
        x = p.largest ? fmaxf(x, y) : x + y;
    }
    for (int other = 16; other > 0; other /= 2) {
        float y = shuffle_xor(x, other);
        x = p.largest ? fmaxf(x, y) : x + y;
    }
    if (thread % 32 == 0) of_warp[thread / 32] = x;
    sync_block();
    if (thread != 0) return;
    for (uint32_t warp = 1; warp < 8; warp++) x = p.largest ? fmaxf(x, of_warp[warp]) : x + of_warp[warp];
    store_global((float*)p.dst.ptr + element_offset(p.dst, p.dst_row, p.dst_head + head), x);
}
