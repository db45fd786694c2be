// Forward attention: O = softmax(scale·Q·Kᵀ)·V and its logarithmic sums, one attend step, for GPUs since sm_80.
//
// A block takes one (tile of query rows, head) after another; each warp WM of the tile's rows, all columns. Per key tile:
//
//     wait for K         K of this tile and Q are there; every warp is done with V
//       load V           while  S = Q·Kᵀ  goes on
//     wait for V         V is there; every warp is done with K
//       load next K      while  P = softmax(S), O += P·V  go on
//
// S, P and O stay in registers: accumulators of one product are the A operand of the next. Key tiles of all parts of a tile are one sequence.
#pragma once
#include <math.h>

#include "bounds.cuh"
#include "score.cuh"
#include "shapes.h"
#include "softmax.cuh"
#include "tile.cuh"

// SCORE: with what score.cuh adds to scores and weights, sinks, and the largest score of every row.
template <class T, int DQK, int DV, int BM, int BN, int WARPS, bool SCORE>
struct Forward {
    static constexpr int THREADS = WARPS * 32;
    static constexpr int WM = BM / WARPS;  // rows of a warp
    static constexpr int M = WM / 16, N = BN / 8, D = DV / 8;
    static_assert(WM % 16 == 0 && WM <= 32, "a lane finds the keys of one row");

    using QTile = Tile<BM, DQK>;
    using KTile = Tile<BN, DQK>;
    using VTile = Tile<BN, DV>;
    using OutTile = Tile<WM, DV>;
    static_assert(OutTile::BYTES <= WM * QTile::STRIDE, "the output of a warp takes the place of its Q");

    // Shared memory.
    static constexpr int K_AT = QTile::BYTES, V_AT = K_AT + KTile::BYTES, RANGES_AT = V_AT + VTile::BYTES;
    static_assert(RANGES_AT + BM * (int)sizeof(KeyRange) == CP_FORWARD_SHARED(DQK, DV, BM, BN), "");

    const cp_attention_params& p;
    unsigned char* const shared;
    const uint32_t thread, lane, warp;
    uint32_t work;  // number of the work in progress
    float out[M][D][4];
    RunningSoftmax<M> softmax;

    DEVICE Forward(const cp_attention_params& params, unsigned char* memory)
        : p(params), shared(memory), thread(threadIdx.x), lane(thread % 32), warp(thread / 32) {}

    DEVICE void run() {
        for (work = blockIdx.x; work < p.tile_count * p.heads; work += gridDim.x) {
            const bool sees = tile().parts != 0;
            if (!sees && !(p.flags & (CP_FIRST | CP_LAST))) {
                continue;
            }
            start();
            if (sees) {
                sweep();
            }
            finish();
        }
    }

    // Read anew where needed, not kept: the sweep has no register to spare.
    DEVICE cp_tile tile() {
        uint4 x = load_global((const uint4*)p.tiles + work / p.heads);
        return cp_tile{x.x, x.y, x.z, x.w};
    }
    DEVICE uint32_t head() { return work % p.heads; }

    // A lane's rows of the warp are m·16 + h·8 + lane/4; whether the tile has them.
    DEVICE int row_of(int m, int h) { return m * 16 + h * 8 + lane / 4; }
    DEVICE bool inside(const cp_tile& tile, int r) { return warp * WM + r < tile.rows; }

    // Element offsets in a tensor: of row `lane` of the warp; and of row r, when every lane has its own. So each is computed once.
    DEVICE int64_t offset_of_lane(const cp_tile& tile, const cp_view& view) {
        return element_offset(view, tile.row + warp * WM + lane % WM, head());
    }
    DEVICE int64_t offset_of_row(int64_t of_lane, int r) {
        return (int64_t)((uint64_t)shuffle((uint32_t)((uint64_t)of_lane >> 32), r) << 32 | shuffle((uint32_t)of_lane, r));
    }

    // The state before: empty, or what the step before left.
    DEVICE void start() {
        softmax.clear();
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int d = 0; d < D; d++) {
                out[m][d][0] = out[m][d][1] = out[m][d][2] = out[m][d][3] = 0.0f;
            }
        }
        if (p.flags & CP_FIRST) {
            return;
        }
        const cp_tile tile = this->tile();
        const int64_t out_at = offset_of_lane(tile, p.acc_out), max_at = offset_of_lane(tile, p.acc_max), sum_at = offset_of_lane(tile, p.acc_sum);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row_of(m, h);
                const float* from = (const float*)p.acc_out.ptr + offset_of_row(out_at, r) + lane % 4 * 2;
                const float* max_from = (const float*)p.acc_max.ptr + offset_of_row(max_at, r);
                const float* sum_from = (const float*)p.acc_sum.ptr + offset_of_row(sum_at, r);
                if (!inside(tile, r)) {
                    continue;
                }
                softmax.max[m][h] = fmaxf(load_global(max_from), softmax.NONE);
                softmax.sum[m][h] = lane % 4 == 0 ? load_global(sum_from) : 0.0f;
#pragma unroll
                for (int d = 0; d < D; d++) {
                    if (d * 8 < (int)p.dim_v) {
                        float2 x = load_global((const float2*)(from + d * 8));
                        out[m][d][2 * h] = x.x;
                        out[m][d][2 * h + 1] = x.y;
                    }
                }
            }
        }
    }

    DEVICE void sweep() {
        unsigned char* const q_tile = shared;
        unsigned char* const k_tile = shared + K_AT;
        unsigned char* const v_tile = shared + V_AT;
        KeyRange* const ranges = (KeyRange*)(shared + RANGES_AT) + warp * WM;

        const cp_tile tile = this->tile();
        uint32_t index = tile.part, key = 0;
        cp_part part{};
        TileLoader<BM, DQK, THREADS> q;
        TileLoader<BN, DQK, THREADS> k;
        TileLoader<BN, DV, THREADS> v;
        // |scale·log2(e)|, or 1 for 0: flip() does the rest. On bits, so that it stays in a register of the whole warp.
        const uint32_t magnitude = __float_as_uint(p.scale_log2) & 0x7fffffffu;
        // With SCORE they become scores of scale 1 before anything else happens to them.
        const float scale_log2 = SCORE ? LOG2_E : __uint_as_float(magnitude == 0 ? 0x3f800000u : magnitude);
        Token tokens[M][2];
        uint32_t kept[M] = {};
        if constexpr (SCORE) {
            load_tokens(tile, tokens);
        }

        sync_block();  // all warps are done with the work before
        q.start(p.q, head(), tile.row, thread);
        q.load(q_tile, p.q, tile.row, tile.row + tile.rows, p.q_used, p.dim_qk, thread);
        if (!SCORE && p.scale_log2 <= 0.0f) {
            cp_async_commit();
            cp_async_wait<0>();
            sync_block();
            flip(q_tile);
        }

        // The loop is turned so that every piece of code is there once: S of one pass becomes P in the next.
        float scores[M][N][4];
        bool pending = false;  // there are scores
        for (bool more = true; more;) {
            const bool turn = key >= part.end;  // to the next part
            if (turn) {
                const cp_tile tile = this->tile();
                more = index < tile.part + tile.parts;
                if (more) {
                    sync_warp();  // its lanes have read the ranges before
                    ask(ranges, tile.row, index);
                    part = load_part(p.parts, index++);
                    key = part.begin;
                    const uint32_t kv_head = (p.q_first + head()) / p.head_group - p.kv_first;
                    k.start(p.k, kv_head, key, thread);
                    v.start(p.v, kv_head, key, thread);
                }
            }
            if (more) {
                k.load(k_tile, p.k, key, part.end, p.k_used, p.dim_qk, thread);
                cp_async_commit();
            }
            if (pending) {
                softmax.meet(scores, out, scale_log2, SCORE && p.flags & CP_LARGEST ? 0.0f : softmax.SLACK);
                multiply_values(scores, v_tile, scale_log2, kept);
            }
            if (more) {
                if (turn) {
                    answer(ranges);
                }
                cp_async_wait<0>();
                sync_block();
                v.load(v_tile, p.v, key, part.end, p.k_used, p.dim_v, thread);
                cp_async_commit();
                multiply_keys(scores, q_tile, k_tile);
                cp_async_wait<0>();
                sync_block();
                // What this warp's rows see of the tile: nothing, or something, or all. Finer than the part's own full_begin, full_end.
                const KeyRange range = ranges[lane % WM];
                pending = any_lane(range.lo < key + BN && range.hi > key);
                if constexpr (SCORE) {
                    if (pending) {
                        finish_scores(scores, tokens, kept, key, part.end - 1);
                        if (p.bias.ptr != 0) {
                            add_bias(scores, ranges, key);
                        }
                    }
                }
                if (any_lane(range.lo > key || range.hi < key + BN)) {
                    hide(scores, ranges, key, lane);
                }
                key += BN;
            }
        }
    }

    // What the rows of this warp see in a part: looked up between other work, so asked first (row and part, in the place of the answer) and
    // answered later. Only this warp reads it.
    DEVICE void ask(KeyRange* ranges, uint32_t row, uint32_t part) {
        if (lane < WM) {
            ranges[lane] = KeyRange{row + warp * WM + lane, part};
        }
    }
    DEVICE void answer(KeyRange* ranges) {
        if (lane < WM) {
            const uint32_t row = ranges[lane].lo;
            const cp_part part = load_part(p.parts, ranges[lane].hi);
            KeyRange range = keys_of_row(p.slices, part, row);
            range.lo = max(range.lo, part.begin);
            range.hi = max(min(range.hi, part.end), range.lo);
            ranges[lane] = range;
        }
        sync_warp();
    }

    // The maximum of score·scale needs scale > 0. Gives this warp's Q the sign (or zero) of the scale instead.
    DEVICE void flip(unsigned char* q_tile) {
        const uint32_t keep = p.scale_log2 == 0.0f ? 0 : 0xffffffffu, sign = p.scale_log2 == 0.0f ? 0 : 0x80008000u;
        uint32_t* const words = (uint32_t*)(q_tile + warp * WM * QTile::STRIDE);
        for (uint32_t i = lane; i < WM * QTile::STRIDE / 4; i += 32) {
            words[i] = (words[i] & keep) ^ sign;
        }
        sync_warp();
    }

    // The tokens of a lane's rows.
    DEVICE void load_tokens(const cp_tile& tile, Token (&tokens)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row_of(m, h);
                tokens[m][h] = inside(tile, r) ? load_token(p, tile.row + warp * WM + r) : Token{CP_NO_TOKEN, 0, 0, 0};
            }
        }
    }

    // Scores q·k get their final values; bit 4·n + i of `kept`: dropout keeps the weight of scores[m][n][i]. Keys past `last` are hidden afterwards.
    DEVICE void finish_scores(float (&scores)[M][N][4], const Token (&tokens)[M][2], uint32_t (&kept)[M], uint32_t key, uint32_t last) {
        static_assert(!SCORE || N * 4 <= 32, "a bit per score");
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    scores[m][n][i] *= p.scale;
                }
            }
        }
        if (p.softcap != 0.0f) {
#pragma unroll
            for (int m = 0; m < M; m++) {
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        scores[m][n][i] = soft_cap(scores[m][n][i], p.softcap, p.softcap_inverse);
                    }
                }
            }
        }
        const uint32_t first = key + lane % 4 * 2;
        if (p.alibi != 0) {
            const float slope = slope_of(p, head());
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const uint32_t position = load_position(p, min(first + (n * 8 + e), last));
#pragma unroll
                    for (int m = 0; m < M; m++) {
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            scores[m][n][2 * h + e] -= slope * distance(position, tokens[m][h]);
                        }
                    }
                }
            }
        }
        if (p.drop_below != 0) {
            const uint64_t seed = dropout_seed(p);
            const uint32_t number = model_head(p, head());
#pragma unroll
            for (int m = 0; m < M; m++) {
                kept[m] = 0;
            }
#pragma unroll 1
            for (int n = 0; n < N; n++) {
                const uint32_t position = load_position(p, min(first + n * 8, last)), next = load_position(p, min(first + n * 8 + 1, last));
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        kept[m] |= kept_pair(p, seed, number, tokens[m][h], position, next) << (4 * n + 2 * h);
                    }
                }
            }
        }
    }

    // Each element where it lies: rows start at any multiple of an element, and positions need not be consecutive.
    DEVICE void add_bias(float (&scores)[M][N][4], const KeyRange* ranges, uint32_t key) {
        const uint32_t lane = opaque(this->lane), row = tile().row + warp * WM, first = key + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = m * 16 + h * 8 + lane / 4;
                const KeyRange range = ranges[r];
                if (range.hi == range.lo) {
                    continue;
                }
                const T* const bias = bias_row<const T>(p.bias, row + r, head(), load_token(p, row + r));
#pragma unroll
                for (int n = 0; n < N; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const uint32_t k = first + (n * 8 + e);
                        if (k - range.lo < range.hi - range.lo) {
                            scores[m][n][2 * h + e] += load_float(bias + load_position(p, k));
                        }
                    }
                }
            }
        }
    }

    // Four weights, of which the lowest bits say which are kept. The sum has them all.
    DEVICE static void drop(float (&x)[4], uint32_t kept) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = kept >> i & 1 ? x[i] : 0.0f;
        }
    }

    // scores = Q·Kᵀ
    DEVICE void multiply_keys(float (&scores)[M][N][4], const unsigned char* q_tile, const unsigned char* k_tile) {
        const uint32_t q_lane = QTile::lane_across(warp * WM, lane), k_lane = KTile::lane_down(0, lane);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
                scores[m][n][0] = scores[m][n][1] = scores[m][n][2] = scores[m][n][3] = 0.0f;
            }
        }
#pragma unroll
        for (int k = 0; k < DQK / 16; k++) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                QTile::load_a(a[m], q_tile, q_lane, m, k);
            }
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                uint32_t b[4];
                KTile::load_b(b, k_tile, k_lane, n / 2, k);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma_m16n8k16<T>(scores[m][n], a[m], b[0], b[1]);
                    mma_m16n8k16<T>(scores[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // out += P·V, P = softmax of the scores, made 16 columns at a time
    DEVICE void multiply_values(float (&scores)[M][N][4], const unsigned char* v_tile, float scale_log2, const uint32_t (&kept)[M]) {
        const uint32_t v_lane = VTile::lane_across(0, lane);
#pragma unroll
        for (int k = 0; k < BN / 16; k++) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                softmax.weigh(scores[m][2 * k], m, scale_log2);
                softmax.weigh(scores[m][2 * k + 1], m, scale_log2);
                if constexpr (SCORE) {
                    if (p.drop_below != 0) {
                        drop(scores[m][2 * k], kept[m] >> (8 * k));
                        drop(scores[m][2 * k + 1], kept[m] >> (8 * k + 4));
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float(&x)[4] = scores[m][2 * k + i / 2];
                    a[m][i] = pack2<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int d = 0; d < D; d += 2) {
                uint32_t b[4];
                VTile::load_b_trans(b, v_tile, v_lane, k, d / 2);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma_m16n8k16<T>(out[m][d], a[m], b[0], b[1]);
                    mma_m16n8k16<T>(out[m][d + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    DEVICE void finish() {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                softmax.sum[m][h] = quad_sum(softmax.sum[m][h]);
            }
        }
        if (p.flags & CP_LAST) {
            write_result();
        } else {
            write_state();
        }
    }

    DEVICE void write_state() {
        const cp_tile tile = this->tile();
        const int64_t out_at = offset_of_lane(tile, p.acc_out), max_at = offset_of_lane(tile, p.acc_max), sum_at = offset_of_lane(tile, p.acc_sum);
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row_of(m, h);
                float* to = (float*)p.acc_out.ptr + offset_of_row(out_at, r) + lane % 4 * 2;
                float* max_to = (float*)p.acc_max.ptr + offset_of_row(max_at, r);
                float* sum_to = (float*)p.acc_sum.ptr + offset_of_row(sum_at, r);
                if (!inside(tile, r)) {
                    continue;
                }
                if (lane % 4 == 0) {
                    store_global(max_to, softmax.max[m][h]);
                    store_global(sum_to, softmax.sum[m][h]);
                }
#pragma unroll
                for (int d = 0; d < D; d++) {
                    if (d * 8 < (int)p.dim_v) {
                        store_global((float2*)(to + d * 8), make_float2(out[m][d][2 * h], out[m][d][2 * h + 1]));
                    }
                }
            }
        }
    }

    // O and LSE. O goes through the shared memory that held the warp's Q, to be written 16 bytes at a time.
    DEVICE void write_result() {
        unsigned char* const staged = shared + warp * WM * QTile::STRIDE;
        const cp_tile tile = this->tile();
        const int64_t out_at = offset_of_lane(tile, p.out), lse_at = offset_of_lane(tile, p.lse);
        [[maybe_unused]] const int64_t top_at = SCORE && p.top.ptr != 0 ? offset_of_lane(tile, p.top) : 0;
        sync_warp();
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int r = row_of(m, h);
                float factor = p.grow;
                if constexpr (SCORE) {
                    const int64_t top = offset_of_row(top_at, r);
                    if (p.top.ptr != 0 && inside(tile, r) && lane % 4 == 0) {
                        store_global((float*)p.top.ptr + top, softmax.sum[m][h] == 0.0f ? -INFINITY : softmax.max[m][h] / LOG2_E);
                    }
                    if (p.sinks.ptr != 0 && inside(tile, r) && load_token(p, tile.row + warp * WM + r).position != CP_NO_TOKEN) {
                        factor *= softmax.join(m, h, load_constant((const float*)p.sinks.ptr + (p.q_first + head()) * p.sinks.stride_head) * LOG2_E);
                    }
                }
                const float sum = softmax.sum[m][h];
                float scale = sum == 0.0f ? 0.0f : 1.0f / sum;  // a row that saw nothing: 0
                if constexpr (SCORE) {
                    scale *= factor;
                }
#pragma unroll
                for (int d = 0; d < D; d++) {
                    uint32_t* to = (uint32_t*)(staged + OutTile::offset2(r, d * 8 + lane % 4 * 2));
                    *to = pack2<T>(out[m][d][2 * h] * scale, out[m][d][2 * h + 1] * scale);
                }
                float* lse_to = (float*)p.lse.ptr + offset_of_row(lse_at, r);
                if (inside(tile, r) && lane % 4 == 0) {
                    store_global(lse_to, sum == 0.0f ? -INFINITY : (softmax.max[m][h] + log2_approx(sum)) * 0.693147180559945f);
                }
            }
        }
        sync_warp();
        constexpr uint32_t CHUNKS = DV / 8;
#pragma unroll 1
        for (uint32_t i = lane; i < WM * CHUNKS; i += 32) {
            const uint32_t r = i / CHUNKS, chunk = i % CHUNKS;
            uint16_t* to = (uint16_t*)p.out.ptr + offset_of_row(out_at, r) + chunk * 8;
            if (inside(tile, r) && chunk * 8 < p.dim_v) {
                store_global((uint4*)to, *(const uint4*)(staged + OutTile::offset(r, chunk)));
            }
        }
    }
};

// Two blocks per multiprocessor: at most 255 registers.
#define CP_FORWARD_KERNEL(name, T, dqk, dv, q_rows, k_rows, warps)                                                \
    extern "C" __global__ void __launch_bounds__(warps * 32, 2) name(const __grid_constant__ cp_attention_params p) { \
        SHARED_MEMORY(shared);                                                                                    \
        Forward<T, dqk, dv, q_rows, k_rows, warps, false>(p, shared).run();                                       \
    }
// One: the same limit for twice the warps.
#define CP_FORWARD_KERNEL_SCORE(name, T, dqk, dv, q_rows, k_rows, warps)                                          \
    extern "C" __global__ void __launch_bounds__(warps * 32, 1) name(const __grid_constant__ cp_attention_params p) { \
        SHARED_MEMORY(shared);                                                                                    \
        Forward<T, dqk, dv, q_rows, k_rows, warps, true>(p, shared).run();                                        \
    }
