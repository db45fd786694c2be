// Backward attention, FlashAttention-2 (arXiv 2307.08691): a block owns a key tile of one key head, holds its dK and dV in registers and goes
// over the query tiles of all query heads of that key head. For every query tile:
//
//     S = Q·Kᵀ                P = 2^(S·scale·log2 e − lse·log2 e), 0 where masked       → P as bits in shared memory
//     dP = dO·Vᵀ              dS = P ∘ (dP − delta)                                     → dS as bits in shared memory
//     dV += Pᵀ·dO             dK += dSᵀ·Q             dQ += scale·dS·K, in global memory; dK is scaled at the end
//
// The warps divide each product among them in their own way, so P and dS go through shared memory. Two barriers a query tile where Q and dO
// have two stages each: behind the arrival of Q and dO, and behind the writing of P and dS.
//
// Grid: any, but with CP_DETERMINISTIC one block per piece of work, in which blocks wait only for blocks of lower number; a block that went on
// to its next piece could wait for one that has no multiprocessor yet.
#pragma once
#include "bounds.cuh"
#include "params.h"
#include "ptx.cuh"
#include "score.cuh"
#include "tile.cuh"

// BM×BN: query rows × keys of a tile. WARPS warps; of them lie along the query rows S_M in S and dP, DQ_M in dQ, and along the keys KEYS in dK
// and dV. A product's rows and columns per warp are multiples of 16. STAGES: tiles of Q and of dO in shared memory, 1 or 2. SCORE: with what
// score.cuh adds to scores and weights.
template <int BM_, int BN_, int DQK_, int DV_, int WARPS_, int S_M_, int KEYS_, int DQ_M_, int Q_STAGES_, int DO_STAGES_, bool SCORE_ = false>
struct BackwardShape {
    static constexpr bool SCORE = SCORE_;
    static constexpr int BM = BM_, BN = BN_, DQK = DQK_, DV = DV_, WARPS = WARPS_, THREADS = 32 * WARPS_;
    static constexpr int S_M = S_M_, S_N = WARPS / S_M, KEYS = KEYS_, DIMS = WARPS / KEYS, DQ_M = DQ_M_, DQ_N = WARPS / DQ_M;
    static constexpr int Q_STAGES = Q_STAGES_, DO_STAGES = DO_STAGES_;
    static_assert(BM % (16 * S_M) == 0 && BN % (16 * S_N) == 0, "S");
    static_assert(BN % (16 * KEYS) == 0 && DQK % (16 * DIMS) == 0 && DV % (16 * DIMS) == 0, "dK, dV");
    static_assert(BM % (16 * DQ_M) == 0 && DQK % (16 * DQ_N) == 0, "dQ");
    static_assert(BM <= THREADS && BN < 65536, "rows");

    using Q = Tile<BM, DQK>;
    using K = Tile<BN, DQK>;
    using V = Tile<BN, DV>;
    using DO = Tile<BM, DV>;
    using S = Tile<BM, BN>;

    // Places in shared memory.
    static constexpr int AT_K = 0, AT_V = AT_K + K::BYTES, AT_Q = AT_V + V::BYTES, AT_DO = AT_Q + Q_STAGES * Q::BYTES;
    static constexpr int AT_P = AT_DO + DO_STAGES * DO::BYTES, AT_DS = AT_P + S::BYTES;
    static constexpr int AT_LSE = AT_DS + S::BYTES, AT_DELTA = AT_LSE + BM * 4, AT_KEYS = AT_DELTA + BM * 4, AT_DQ = AT_KEYS + BM * 4;
    static constexpr int AT_TURN = AT_DQ + 2 * BM * 8, AT_WORK = AT_TURN + 2 * 16, AT_TOKENS = AT_WORK + 32;
    static constexpr int SHARED = AT_TOKENS + (SCORE ? BM * (int)sizeof(Token) : 0);
};

// acc += A·B. A: M blocks of rows, from a tile that holds it as [m][k]; B: N blocks of columns, from one that holds [n][k]; K blocks deep.
template <class T, class TA, class TB, int M, int N, int K>
DEVICE void multiply_nt(float (&acc)[M][2 * N][4], const unsigned char* a, const unsigned char* b, uint32_t a_row, uint32_t b_row, uint32_t lane) {
    uint32_t a_lane = TA::lane_across(a_row, lane), b_lane = TB::lane_down(b_row, lane);
#pragma unroll
    for (int k = 0; k < K; k++) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) TA::load_a(x[m], a, a_lane, m, k);
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t y[4];
            TB::load_b(y, b, b_lane, n, k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16<T>(acc[m][2 * n], x[m], y[0], y[1]);
                mma_m16n8k16<T>(acc[m][2 * n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

// The same with B from a tile that holds [k][n], columns from block b_col on.
template <class T, class TA, class TB, int M, int N, int K>
DEVICE void multiply_nn(float (&acc)[M][2 * N][4], const unsigned char* a, const unsigned char* b, uint32_t a_row, int b_col, uint32_t lane) {
    uint32_t a_lane = TA::lane_across(a_row, lane), b_lane = TB::lane_across(0, lane);
#pragma unroll
    for (int k = 0; k < K; k++) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) TA::load_a(x[m], a, a_lane, m, k);
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t y[4];
            TB::load_b_trans(y, b, b_lane, k, b_col + n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16<T>(acc[m][2 * n], x[m], y[0], y[1]);
                mma_m16n8k16<T>(acc[m][2 * n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

// The same with A too from a tile that holds it transposed, [k][m], columns from block a_col on.
template <class T, class TA, class TB, int M, int N, int K>
DEVICE void multiply_tn(float (&acc)[M][2 * N][4], const unsigned char* a, const unsigned char* b, int a_col, int b_col, uint32_t lane) {
    uint32_t a_lane = TA::lane_down(0, lane), b_lane = TB::lane_across(0, lane);
#pragma unroll
    for (int k = 0; k < K; k++) {
        uint32_t x[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) TA::load_a_trans(x[m], a, a_lane, k, a_col + m);
#pragma unroll
        for (int n = 0; n < N; n++) {
            uint32_t y[4];
            TB::load_b_trans(y, b, b_lane, k, b_col + n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16<T>(acc[m][2 * n], x[m], y[0], y[1]);
                mma_m16n8k16<T>(acc[m][2 * n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

template <int M, int N>
DEVICE void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[m][n][e] = 0.0f;
}

// Rounds a warp's part of S to the storage type and puts it into a tile, from `row` and `col` on.
template <class T, class S, int M, int N>
DEVICE void store_bits(unsigned char* tile, const float (&acc)[M][N][4], uint32_t row, uint32_t col, uint32_t lane) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t place = S::offset2(row + m * 16 + h * 8 + lane / 4, col + n * 8 + lane % 4 * 2);
                *(uint32_t*)(tile + place) = pack2<T>(acc[m][n][2 * h], acc[m][n][2 * h + 1]);
            }
}

// Where the sweep over the query side is: a tile of query rows row … row+BM, row a multiple of BM, of one part and one query head.
struct QueryTile {
    uint32_t head, part, row;
};

template <class T, class C>
struct Backward {
    const cp_attention_params& p;
    unsigned char* shared;
    uint32_t thread, warp, lane;

    // The piece of work, in shared memory rather than in registers.
    struct Work {
        cp_tile tile;
        uint32_t number, key_head, heads_begin, heads_end;  // query heads: empty if there is nothing to do
    };
    DEVICE Work& work() const { return *(Work*)(shared + C::AT_WORK); }
    DEVICE void find_work(uint32_t number) const {
        work().number = number;
        if (number >= p.tile_count * p.kv_heads) return;
        work().tile = load_tile(p.tiles, number / p.kv_heads);
        work().key_head = number % p.kv_heads;
        // Query heads h with (q_first + h) / head_group = kv_first + key_head.
        const uint32_t begin = (p.kv_first + number % p.kv_heads) * p.head_group, end = begin + p.head_group;
        work().heads_begin = begin > p.q_first ? begin - p.q_first : 0;
        work().heads_end = end <= p.q_first || work().tile.parts == 0 ? 0 : end - p.q_first < p.heads ? end - p.q_first : p.heads;
    }

    DEVICE float* lse_row(uint32_t row) const { return (float*)(shared + C::AT_LSE) + row; }
    DEVICE float* delta_row(uint32_t row) const { return (float*)(shared + C::AT_DELTA) + row; }
    DEVICE uint32_t* keys_row(uint32_t row) const { return (uint32_t*)(shared + C::AT_KEYS) + row; }
    DEVICE Token* token_row(uint32_t row) const { return (Token*)(shared + C::AT_TOKENS) + row; }
    DEVICE int64_t* dq_row(uint32_t stage, uint32_t row) const { return (int64_t*)(shared + C::AT_DQ) + stage * C::BM + row; }

    // Deterministic: the counter of a query tile, and what it must be before the adds; the turn's index.
    struct Turn {
        uint32_t* counter;
        uint32_t turn, index;
    };
    DEVICE Turn* turn_of(uint32_t stage) const { return (Turn*)(shared + C::AT_TURN) + stage; }

    // A part is swept from its last query tile to its first: under a causal or window mask the blocks of neighbouring key tiles, which start
    // together, then go over the same query tiles together, and in deterministic order none waits for long.
    DEVICE void enter_part(QueryTile& at) const { at.row = (load_part(p.parts, at.part).end - 1) / C::BM * C::BM; }

    // The next query tile: of the part, of the next part, of the next head. False: there is none.
    DEVICE bool advance(QueryTile& at) const {
        if (at.row > load_part(p.parts, at.part).begin) {
            at.row -= C::BM;
            return true;
        }
        if (++at.part == work().tile.part + work().tile.parts) {
            at.part = work().tile.part;
            if (++at.head == work().heads_end) return false;
        }
        enter_part(at);
        return true;
    }

    // Is no mask needed? In a tile of fewer keys than BN the missing ones are masked.
    DEVICE bool is_full(const QueryTile& at) const {
        cp_part part = load_part(p.parts, at.part);
        return work().tile.rows == C::BN && at.row >= part.full_begin && at.row + C::BM <= part.full_end;
    }

    // In a tile that needs no mask all rows are used.
    DEVICE void load_q(const QueryTile& at, bool full, uint32_t stage) const {
        TileLoader<C::BM, C::DQK, C::THREADS> loader;
        loader.start(p.q, at.head, at.row, thread);
        loader.load(shared + C::AT_Q + stage * C::Q::BYTES, p.q, at.row, load_part(p.parts, at.part).end, full ? 0 : p.q_used, p.dim_qk, thread);
    }
    DEVICE void load_d_out(const QueryTile& at, bool full, uint32_t stage) const {
        TileLoader<C::BM, C::DV, C::THREADS> loader;
        loader.start(p.d_out, at.head, at.row, thread);
        loader.load(shared + C::AT_DO + stage * C::DO::BYTES, p.d_out, at.row, load_part(p.parts, at.part).end, full ? 0 : p.q_used, p.dim_v, thread);
    }

    // What one thread knows about one query row.
    struct Row {
        float lse;       // · log2(e); +∞ for a row that sees nothing here: its P is 0
        float delta;
        uint32_t keys;   // that it sees, relative to the tile: first | number << 16
        int64_t dq;      // element offset of its dQ; −1: none
        Token token;     // SCORE
    };
    DEVICE Row load_row(const QueryTile& at) const {
        Row x{__builtin_huge_valf(), 0.0f, 0, -1, Token{0, 0, 0, 0}};
        uint32_t row = at.row + thread;
        cp_part part = load_part(p.parts, at.part);
        if (row < part.begin || row >= part.end) return x;
        const cp_tile tile = work().tile;
        KeyRange range{tile.row, tile.row + tile.rows};
        if (row < part.full_begin || row >= part.full_end) {
            KeyRange seen = keys_of_row(p.slices, part, row);
            range.lo = seen.lo > range.lo ? seen.lo : range.lo;
            range.hi = seen.hi < range.hi ? seen.hi : range.hi;
            if (range.hi <= range.lo) return x;
        }
        float lse = load_constant((const float*)p.lse.ptr + element_offset(p.lse, row, at.head));
        if (lse == -__builtin_huge_valf()) return x;
        x.lse = lse * 1.4426950408889634f;
        x.delta = load_constant((const float*)p.delta.ptr + element_offset(p.delta, row, at.head));
        x.keys = (range.lo - tile.row) | (range.hi - range.lo) << 16;
        x.dq = element_offset(p.dq, row, at.head);
        if constexpr (C::SCORE) x.token = load_token(p, row);
        return x;
    }
    DEVICE void store_turn(const QueryTile& at, uint32_t stage) const {
        cp_part part = load_part(p.parts, at.part);
        uint32_t number = at.row / C::BM;
        turn_of(stage)->counter = (uint32_t*)p.counters + (uint64_t)number * p.heads + at.head;
        turn_of(stage)->index = part.turn + (number - part.begin / C::BM);
        turn_of(stage)->turn = load_constant((const uint32_t*)p.turns + turn_of(stage)->index);
    }
    // How many heads have added to the gradient of a bias that they share, of this turn's queries and keys.
    DEVICE uint32_t* bias_counter(uint32_t stage) const { return (uint32_t*)p.bias_counters + turn_of(stage)->index; }
    DEVICE void store_row(const Row& x, uint32_t stage) const {
        *lse_row(thread) = x.lse;
        *delta_row(thread) = x.delta;
        *keys_row(thread) = x.keys;
        *dq_row(stage, thread) = x.dq;
        if constexpr (C::SCORE) *token_row(thread) = x.token;
    }

    static constexpr int SM = C::BM / C::S_M / 16, SN = C::BN / C::S_N / 16;  // blocks of S per warp
    static constexpr int DN = SM * SN > 4 && SN % 2 == 0 ? SN / 2 : SN;              // columns of dP at a time: registers

    // P and dS of a query tile, into shared memory. P is computed and stored beside and behind the products of dP, which do not need it.
    DEVICE void scores(const unsigned char* q, const unsigned char* d_out, bool full) const {
        const uint32_t thread = opaque(this->thread), warp = thread / 32, lane = thread % 32;
        const uint32_t row = warp % C::S_M * (SM * 16), col = warp / C::S_M * (SN * 16);
        float s[SM][2 * SN][4];
        clear(s);
        multiply_nt<T, typename C::Q, typename C::K, SM, SN, C::DQK / 16>(s, q, shared + C::AT_K, row, col, lane);
#pragma unroll
        for (int m = 0; m < SM; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float lse = *lse_row(row + m * 16 + h * 8 + lane / 4);
#pragma unroll
                for (int n = 0; n < 2 * SN; n++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) s[m][n][e] = s[m][n][e] * p.scale_log2 - lse;
            }
        if (!full) {
#pragma unroll
            for (int m = 0; m < SM; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    uint32_t keys = *keys_row(row + m * 16 + h * 8 + lane / 4);
                    uint32_t first = col + lane % 4 * 2 - (keys & 0xffff), count = keys >> 16;
#pragma unroll
                    for (int n = 0; n < 2 * SN; n++)
#pragma unroll
                        for (int e = 0; e < 2; e++) s[m][n][2 * h + e] = first + n * 8 + e < count ? s[m][n][2 * h + e] : -__builtin_huge_valf();
                }
        }
#pragma unroll
        for (int m = 0; m < SM; m++)
#pragma unroll
            for (int n = 0; n < 2 * SN; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = exp2_approx(s[m][n][e]);
#pragma unroll
        for (int c = 0; c < SN; c += DN) {
            float d[SM][2 * DN][4];
            clear(d);
            multiply_nt<T, typename C::DO, typename C::V, SM, DN, C::DV / 16>(d, d_out, shared + C::AT_V, row, col + c * 16, lane);
            if (c == 0) store_bits<T, typename C::S>(shared + C::AT_P, s, row, col, lane);
#pragma unroll
            for (int m = 0; m < SM; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float delta = *delta_row(row + m * 16 + h * 8 + lane / 4);
#pragma unroll
                    for (int n = 0; n < 2 * DN; n++)
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; e++) d[m][n][e] = s[m][2 * c + n][e] * (d[m][n][e] - delta);
                }
            store_bits<T, typename C::S>(shared + C::AT_DS, d, row, col + c * 16, lane);
        }
    }

    // The same with what score.cuh adds: P' = kept·P / (1 − p), dBias = P ∘ (kept·dP / (1 − p) − delta) and dS = dBias ∘ (derivative of the soft-cap).
    // P' is stored before dP is there; until then P and the derivative stay in registers, and a bit per score that says what is kept.
    DEVICE void finish_scores(const QueryTile& at, const unsigned char* q, const unsigned char* d_out) const {
        static_assert(!C::SCORE || SN * 8 <= 32, "a bit per score");
        const uint32_t thread = opaque(this->thread), warp = thread / 32, lane = thread % 32;
        const uint32_t row = warp % C::S_M * (SM * 16), col = warp / C::S_M * (SN * 16);
        const uint32_t first = col + lane % 4 * 2, last = work().tile.row + work().tile.rows - 1;  // keys past it are hidden
        float s[SM][2 * SN][4], derivatives[SM][2 * SN][4];
        clear(s);
        multiply_nt<T, typename C::Q, typename C::K, SM, SN, C::DQK / 16>(s, q, shared + C::AT_K, row, col, lane);
#pragma unroll
        for (int m = 0; m < SM; m++)
#pragma unroll
            for (int n = 0; n < 2 * SN; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] *= p.scale;
        if (p.softcap != 0.0f) {
#pragma unroll
            for (int m = 0; m < SM; m++)
#pragma unroll
                for (int n = 0; n < 2 * SN; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) s[m][n][e] = soft_cap(s[m][n][e], p.softcap, p.softcap_inverse);
        }
        uint32_t kept[SM];
#pragma unroll
        for (int m = 0; m < SM; m++) kept[m] = 0xffffffffu;
        if (p.drop_below != 0) {
            const uint64_t seed = dropout_seed(p);
            const uint32_t number = model_head(p, at.head);
#pragma unroll
            for (int m = 0; m < SM; m++) {
                kept[m] = 0;
                const Token queries[2] = {*token_row(row + m * 16 + lane / 4), *token_row(row + m * 16 + 8 + lane / 4)};
#pragma unroll 1
                for (uint32_t n = 0; n < 2 * SN; n++) {
                    const uint32_t key = work().tile.row + first + n * 8;
                    const uint32_t position = load_position(p, min(key, last)), next = load_position(p, min(key + 1, last));
#pragma unroll
                    for (int h = 0; h < 2; h++) kept[m] |= kept_pair(p, seed, number, queries[h], position, next) << (4 * n + 2 * h);
                }
            }
        }
        const float slope = slope_of(p, at.head);
#pragma unroll
        for (int m = 0; m < SM; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t r = row + m * 16 + h * 8 + lane / 4, keys = *keys_row(r);
                const float lse = *lse_row(r);
                const Token token = *token_row(r);
                const T* const bias = p.bias.ptr == 0 ? nullptr : bias_row<const T>(p.bias, at.row + r, at.head, token);
#pragma unroll
                for (int n = 0; n < 2 * SN; n++) {
                    float weights[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& x = s[m][n][2 * h + e];
                        // 1 − tanh²; without a soft-cap its inverse is 0.
                        const float t = x * p.softcap_inverse;
                        derivatives[m][n][2 * h + e] = 1.0f - t * t;
                        if (slope != 0.0f) x -= slope * distance(load_position(p, min(work().tile.row + first + (n * 8 + e), last)), token);
                        const bool seen = first + (n * 8 + e) - (keys & 0xffff) < keys >> 16;
                        if (bias != nullptr && seen) x += load_float(bias + load_position(p, work().tile.row + first + (n * 8 + e)));
                        x = exp2_approx(seen ? x * LOG2_E - lse : -__builtin_huge_valf());
                        weights[e] = kept[m] >> (4 * n + 2 * h + e) & 1 ? x * p.grow : 0.0f;
                    }
                    *(uint32_t*)(shared + C::AT_P + C::S::offset2(r, first + n * 8)) = pack2<T>(weights[0], weights[1]);
                }
            }
#pragma unroll
        for (int c = 0; c < SN; c += DN) {
            float d[SM][2 * DN][4];
            clear(d);
            sync_warp();  // as in `run`
            multiply_nt<T, typename C::DO, typename C::V, SM, DN, C::DV / 16>(d, d_out, shared + C::AT_V, row, col + c * 16, lane);
#pragma unroll
            for (int m = 0; m < SM; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const float delta = *delta_row(row + m * 16 + h * 8 + lane / 4);
#pragma unroll
                    for (int n = 0; n < 2 * DN; n++)
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; e++) {
                            const float grow = kept[m] >> (4 * (2 * c + n) + e) & 1 ? p.grow : 0.0f;
                            d[m][n][e] = s[m][2 * c + n][e] * (d[m][n][e] * grow - delta);
                        }
                }
            if (p.d_bias.ptr != 0) add_bias<2 * DN>(at, d, row, first + c * 16);
#pragma unroll
            for (int m = 0; m < SM; m++)
#pragma unroll
                for (int n = 0; n < 2 * DN; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) d[m][n][e] *= derivatives[m][2 * c + n][e];
            store_bits<T, typename C::S>(shared + C::AT_DS, d, row, col + c * 16, lane);
        }
    }

    // Every pair of a query of a head and a key is met once, so adds to one element are those of heads that share it; their order is that of
    // `bias_counters`, or none.
    template <int N>
    DEVICE void add_bias(const QueryTile& at, const float (&d)[SM][N][4], uint32_t row, uint32_t first) const {
#pragma unroll
        for (int m = 0; m < SM; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t r = row + m * 16 + h * 8 + thread % 32 / 4, keys = *keys_row(r);
                float* const bias = bias_row<float>(p.d_bias, at.row + r, at.head, *token_row(r));
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const uint32_t key = first + (n * 8 + e);
                        if (key - (keys & 0xffff) < keys >> 16) add_global(bias + load_position(p, work().tile.row + key), d[m][n][2 * h + e]);
                    }
            }
    }

    static constexpr int QM = C::BM / C::DQ_M / 16, QN = C::DQK / C::DQ_N / 16;  // blocks of dQ per warp

    static constexpr int QC = QM * QN > 4 && QN % 2 == 0 ? QN / 2 : QN;               // columns of them at a time: registers

    // `beside` is called when the first products are under way.
    template <class F>
    DEVICE void add_dq(uint32_t stage, const F& beside) const {
        const uint32_t thread = opaque(this->thread), warp = thread / 32, lane = thread % 32;
        const uint32_t row = warp % C::DQ_M * (QM * 16), block = warp / C::DQ_M * QN;
        const bool ordered = p.flags & CP_DETERMINISTIC;
#pragma unroll
        for (int c = 0; c < QN; c += QC) {
            float d[QM][2 * QC][4];
            sync_warp();  // as in `run`
            clear(d);
            multiply_nn<T, typename C::S, typename C::K, QM, QC, C::BN / 16>(d, shared + C::AT_DS, shared + C::AT_K, row, block + c, lane);
            if (c == 0) beside();
            if (ordered && c == 0) {
                if (thread == 0) wait_for(turn_of(stage)->counter, turn_of(stage)->turn);
                sync_block();
            }
            const uint32_t col = (block + c) * 16 + lane % 4 * 2;
#pragma unroll
            for (int m = 0; m < QM; m++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int64_t offset = *dq_row(stage, row + m * 16 + h * 8 + lane / 4);
                    const uint32_t end = offset < 0 ? 0 : p.dim_qk;
                    float* dq = (float*)p.dq.ptr + offset + col;
                    if (ordered) {
                        add_in_turn(d[m], h, dq, col, end);
                        continue;
                    }
#pragma unroll
                    for (int n = 0; n < 2 * QC; n++)
                        if (col + n * 8 < end) add_global_2(dq + n * 8, d[m][n][2 * h] * p.scale, d[m][n][2 * h + 1] * p.scale);
                }
        }
        if (ordered) {
            sync_block();
            if (thread == 0) add_release(turn_of(stage)->counter, 1);
            if (C::SCORE && p.bias_counters != 0 && thread == 0) add_release(bias_counter(stage), 1);
        }
    }
    DEVICE void add_in_turn(const float (&d)[2 * QC][4], int h, float* dq, uint32_t col, uint32_t end) const {
        float2 x[2 * QC];
#pragma unroll
        for (int n = 0; n < 2 * QC; n++)
            if (col + n * 8 < end) x[n] = load_global((const float2*)(dq + n * 8));
#pragma unroll
        for (int n = 0; n < 2 * QC; n++) {
            x[n].x += d[n][2 * h] * p.scale, x[n].y += d[n][2 * h + 1] * p.scale;
            if (col + n * 8 < end) store_global((float2*)(dq + n * 8), x[n]);
        }
    }

    static constexpr int KM = C::BN / C::KEYS / 16, KN = C::DQK / C::DIMS / 16, VN = C::DV / C::DIMS / 16;  // blocks of dK, dV per warp

    // Adds a warp's part of dK or dV to global memory.
    template <int N>
    DEVICE void add_gradient(const cp_view& view, const float (&acc)[KM][2 * N][4], float factor, uint32_t dim) const {
        const uint32_t col = warp / C::KEYS * (N * 16) + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < KM; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t row = warp % C::KEYS * (KM * 16) + m * 16 + h * 8 + lane / 4;
                if (row >= work().tile.rows) continue;
                float* out = (float*)view.ptr + element_offset(view, work().tile.row + row, work().key_head) + col;
#pragma unroll
                for (int n = 0; n < 2 * N; n++) {
                    if (col + n * 8 >= dim) break;
                    float2 x = load_global((const float2*)(out + n * 8));
                    x.x += acc[m][n][2 * h] * factor, x.y += acc[m][n][2 * h + 1] * factor;
                    store_global((float2*)(out + n * 8), x);
                }
            }
    }

    DEVICE void run() const {
        const cp_tile tile = work().tile;
        {
            TileLoader<C::BN, C::DQK, C::THREADS> loader;
            loader.start(p.k, work().key_head, tile.row, thread);
            loader.load(shared + C::AT_K, p.k, tile.row, tile.row + tile.rows, p.k_used, p.dim_qk, thread);
        }
        {
            TileLoader<C::BN, C::DV, C::THREADS> loader;
            loader.start(p.v, work().key_head, tile.row, thread);
            loader.load(shared + C::AT_V, p.v, tile.row, tile.row + tile.rows, p.k_used, p.dim_v, thread);
        }
        const bool ordered = p.flags & CP_DETERMINISTIC;
        QueryTile at{work().heads_begin, tile.part, 0};
        enter_part(at);
        bool full = is_full(at);
        load_q(at, full, 0);
        load_d_out(at, full, 0);
        cp_async_commit();
        if (thread < C::BM) store_row(load_row(at), 0);
        if (ordered && thread == 0) store_turn(at, 0);

        float dk[KM][2 * KN][4], dv[KM][2 * VN][4];
        clear(dk);
        clear(dv);
        const int keys = warp % C::KEYS * KM, dims = warp / C::KEYS;
        for (uint32_t stage = 0;; stage ^= 1) {
            const unsigned char* q = shared + C::AT_Q + (C::Q_STAGES == 2 ? stage : 0) * C::Q::BYTES;
            const unsigned char* d_out = shared + C::AT_DO + (C::DO_STAGES == 2 ? stage : 0) * C::DO::BYTES;
            // Heads one after another: those before are of this block, or of blocks of lower number.
            if (C::SCORE && p.bias_counters != 0 && thread == 0) wait_for(bias_counter(stage), at.head);
            cp_async_wait<0>();
            sync_block();  // this tile is there, and no one reads the one before any more
            if constexpr (C::SCORE) {
                finish_scores(at, q, d_out);
            } else {
                scores(q, d_out, full);
            }
            sync_block();  // P and dS are there; lse, delta and keys are read
            multiply_tn<T, typename C::S, typename C::DO, KM, VN, C::BM / 16>(dv, shared + C::AT_P, d_out, keys, dims * VN, lane);
            // Behind the first products, when s and dP are gone from the registers: the next tile.
            const bool more = advance(at), has_row = more && thread < C::BM;
            if (more) full = is_full(at);
            if (C::DO_STAGES == 1 && C::Q_STAGES == 2) sync_block();
            if (C::Q_STAGES == 2) {
                if (more) load_q(at, full, stage ^ 1);
                if (more) load_d_out(at, full, C::DO_STAGES == 2 ? stage ^ 1 : 0);
                cp_async_commit();
            }
            Row row;
            if (has_row) row = load_row(at);
            sync_warp();  // ldmatrix and mma want whole warps
            multiply_tn<T, typename C::S, typename C::Q, KM, KN, C::BM / 16>(dk, shared + C::AT_DS, q, keys, dims * KN, lane);
            if (C::Q_STAGES == 1) {
                sync_block();
                if (more) load_d_out(at, full, 0);
                if (more) load_q(at, full, 0);
                cp_async_commit();
            }
            add_dq(stage, [&] {
                if (has_row) store_row(row, stage ^ 1);
                if (ordered && more && thread == 0) store_turn(at, stage ^ 1);
            });
            if (!more) break;
        }
        add_gradient<KN>(p.dk, dk, p.scale, p.dim_qk);
        add_gradient<VN>(p.dv, dv, 1.0f, p.dim_v);
    }
};

template <class T, class C>
DEVICE void backward(const cp_attention_params& p) {
    SHARED_MEMORY(shared);
    const Backward<T, C> block{p, shared, threadIdx.x, threadIdx.x / 32, threadIdx.x % 32};
    if (threadIdx.x == 0) block.find_work(blockIdx.x);
    sync_block();
    while (block.work().number < p.tile_count * p.kv_heads) {
        if (block.work().heads_begin < block.work().heads_end) block.run();
        sync_block();  // before the tiles and the work become others
        if (threadIdx.x == 0) block.find_work(block.work().number + gridDim.x);
        sync_block();
    }
}

// The kernel of one row of shapes.h. One block per multiprocessor.
#define CP_BACKWARD_KERNEL(name, T, limit, dqk, dv, q_rows, k_rows, warps, s_m, keys, dq_m, q_stages, do_stages)               \
    extern "C" __global__ void __launch_bounds__(warps * 32, 1) name(const __grid_constant__ cp_attention_params p) {          \
        using Shape = BackwardShape<q_rows, k_rows, dqk, dv, warps, s_m, keys, dq_m, q_stages, do_stages>;                     \
        static_assert(Shape::SHARED == CP_BACKWARD_SHARED(dqk, dv, q_rows, k_rows, q_stages, do_stages), "shapes.h");          \
        static_assert(Shape::SHARED <= limit * 1024, "shared memory");                                                         \
        backward<T, Shape>(p);                                                                                                 \
    }
#define CP_BACKWARD_KERNEL_SCORE(name, T, dqk, dv, q_rows, k_rows, warps, s_m, keys, dq_m, q_stages, do_stages)                \
    extern "C" __global__ void __launch_bounds__(warps * 32, 1) name(const __grid_constant__ cp_attention_params p) {          \
        using Shape = BackwardShape<q_rows, k_rows, dqk, dv, warps, s_m, keys, dq_m, q_stages, do_stages, true>;               \
        static_assert(Shape::SHARED == CP_BACKWARD_SHARED_SCORE(dqk, dv, q_rows, k_rows, q_stages, do_stages), "shapes.h");    \
        static_assert(Shape::SHARED <= 99 * 1024, "shared memory");                                                            \
        backward<T, Shape>(p);                                                                                                 \
    }
