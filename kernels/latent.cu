// Keys and values from latents, and the gradients of those back to latents and weights: three products on tensor cores.
//
//     expand               K[rows][dim_k]       = c[rows][dim] · Wᵀ                        a block per (128 rows, head, 128 columns)
//     contract_latent      d_c[rows][dim]      += Σ over heads dK[rows][dim_k] · W         a block per (128 rows, 128 columns)
//     contract_weights     d_W[dim_k][dim]     += Σ over rows dKᵀ[dim_k][rows] · c         a block per (head, 128 rows, 128 columns)
//
// and likewise for values. fp32 gradients are rounded to the storage type on their way to the tensor cores. Each element of a result is made by
// one thread, which adds in a fixed order: the same bits in every run.
#include "rows.cuh"

constexpr int BLOCK = CP_LATENT_TILE, DEPTH = 64, THREADS = CP_LATENT_THREADS;  // rows and columns of a result; what a step sums over
constexpr int WARPS_M = 2, WARPS_N = 4, MT = BLOCK / WARPS_M / 16, NT = BLOCK / WARPS_N / 16;
constexpr int TILE_BYTES = BLOCK * DEPTH * 2, CHUNKS = BLOCK * DEPTH / 8 / THREADS;  // chunks of 8 elements of a tile per thread
static_assert(WARPS_M * WARPS_N * 32 == THREADS && 4 * TILE_BYTES == CP_LATENT_SHARED, "");

DEVICE uint32_t tiles_of(uint32_t n, uint32_t tile) { return (n + tile - 1) / tile; }

// The rows that are listed: the index-th of them.
struct listed_rows {
    run_search search;
    DEVICE listed_rows(const cp_latent_params& p) : search(p.runs, p.run_count) {}
    DEVICE uint32_t row(uint32_t index) {
        const uint32_t i = search.find(index);
        return search.run.dst + i * search.run.dst_step;
    }
};
struct all_rows {
    DEVICE uint32_t row(uint32_t index) { return index; }
};

// A part of one head of a tensor: rows first_row … end_row and columns first_col … end_col, of which a tile takes the first. Beyond is 0.
struct patch {
    const cp_view& view;
    uint32_t head, first_row, end_row, first_col, end_col;
};

// Asynchronously from the storage type.
template <class Shape, class Rows>
DEVICE void load_tile(unsigned char* tile, const patch& from, Rows& rows, uint32_t thread) {
    constexpr uint32_t PER_ROW = Shape::STRIDE / 16;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const uint32_t at = i * THREADS + thread, r = at / PER_ROW, chunk = at % PER_ROW;
        const uint32_t col = from.first_col + chunk * 8;
        const bool valid = from.first_row + r < from.end_row && col < from.end_col;
        const unsigned char* src = (const unsigned char*)from.view.ptr;
        if (valid) src += (element_offset(from.view, rows.row(from.first_row + r), from.head) + col) * 2;
        cp_async_16(tile + Shape::offset(r, chunk), src, valid);
    }
}

// From fp32 in two halves, so that a product hides the time that the first takes: to registers, and rounded to a tile.
template <class Shape>
struct wide_tile {
    float4 low[CHUNKS], high[CHUNKS];

    template <class Rows>
    DEVICE void load(const patch& from, Rows& rows, uint32_t thread) {
        constexpr uint32_t PER_ROW = Shape::STRIDE / 16;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const uint32_t at = i * THREADS + thread, r = at / PER_ROW, col = from.first_col + at % PER_ROW * 8;
            float4 zero;
            zero.x = zero.y = zero.z = zero.w = 0.0f;
            low[i] = high[i] = zero;
            if (from.first_row + r < from.end_row && col < from.end_col) {
                const float* src = (const float*)from.view.ptr + element_offset(from.view, rows.row(from.first_row + r), from.head) + col;
                low[i] = load_global((const float4*)src);
                high[i] = load_global((const float4*)(src + 4));
            }
        }
    }
    template <class T>
    DEVICE void store(unsigned char* tile, uint32_t thread) const {
        constexpr uint32_t PER_ROW = Shape::STRIDE / 16;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const uint32_t at = i * THREADS + thread;
            uint4 x;
            x.x = pack2<T>(low[i].x, low[i].y), x.y = pack2<T>(low[i].z, low[i].w);
            x.z = pack2<T>(high[i].x, high[i].y), x.w = pack2<T>(high[i].z, high[i].w);
            *(uint4*)(tile + Shape::offset(at / PER_ROW, at % PER_ROW)) = x;
        }
    }
};

// A block's result: warps lie WARPS_M × WARPS_N over it.
template <class T>
struct product {
    float sums[MT][2 * NT][4];
    uint32_t lane, warp_m, warp_n;

    DEVICE product(uint32_t thread) : lane(thread % 32), warp_m(thread / 32 / WARPS_N), warp_n(thread / 32 % WARPS_N) {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < 2 * NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;
    }

    // Adds A·Bᵀ of two tiles. A lies [m][k], with A_DOWN [k][m]; B lies [n][k], with B_DOWN [k][n].
    template <bool A_DOWN, bool B_DOWN>
    DEVICE void add(const unsigned char* a_tile, const unsigned char* b_tile) {
        using Across = Tile<BLOCK, DEPTH>;
        using Down = Tile<DEPTH, BLOCK>;
        const uint32_t a_lane = A_DOWN ? Down::lane_down(0, lane) : Across::lane_across(warp_m * MT * 16, lane);
        const uint32_t b_lane = B_DOWN ? Down::lane_across(0, lane) : Across::lane_down(warp_n * NT * 16, lane);
#pragma unroll
        for (int k = 0; k < DEPTH / 16; k++) {
            uint32_t b[NT][4];
#pragma unroll
            for (int j = 0; j < NT; j++) {
                if (B_DOWN) {
                    Down::load_b_trans(b[j], b_tile, b_lane, k, (int)warp_n * NT + j);
                } else {
                    Across::load_b(b[j], b_tile, b_lane, j, k);
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
                uint32_t a[4];
                if (A_DOWN) {
                    Down::load_a_trans(a, a_tile, a_lane, k, (int)warp_m * MT + i);
                } else {
                    Across::load_a(a, a_tile, a_lane, i, k);
                }
#pragma unroll
                for (int j = 0; j < NT; j++) {
                    mma_m16n8k16<T>(sums[i][2 * j], a, b[j][0], b[j][1]);
                    mma_m16n8k16<T>(sums[i][2 * j + 1], a, b[j][2], b[j][3]);
                }
            }
        }
    }

    // Calls out(row, column, two neighbours) for what lies in rows × cols; rows and columns count from the block's first. cols is even.
    template <class Out>
    DEVICE void each(uint32_t rows, uint32_t cols, Out out) const {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint32_t row = warp_m * MT * 16 + i * 16 + half * 8 + lane / 4;
                if (row >= rows) continue;
#pragma unroll
                for (int j = 0; j < 2 * NT; j++) {
                    const uint32_t col = warp_n * NT * 16 + j * 8 + lane % 4 * 2;
                    if (col < cols) out(row, col, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
                }
            }
    }
};

DEVICE void add_pair(float* to, float x, float y) {
    float2 sum = load_global((const float2*)to);
    sum.x += x, sum.y += y;
    store_global((float2*)to, sum);
}

// Grid: tiles of rows · heads · (tiles of dim_k + tiles of dim_v).
template <class T>
DEVICE void expand(const cp_latent_params& p) {
    SHARED_MEMORY(shared);
    const uint32_t thread = threadIdx.x, k_tiles = tiles_of(p.dim_k, BLOCK), tiles = k_tiles + tiles_of(p.dim_v, BLOCK);
    const uint32_t tile = blockIdx.x % tiles, head = blockIdx.x / tiles % p.heads, first = blockIdx.x / tiles / p.heads * BLOCK;
    const bool keys = tile < k_tiles;
    const cp_view &weights = keys ? p.up_k : p.up_v, &to = keys ? p.k : p.v;
    const uint32_t made = keys ? p.dim_k : p.dim_v, column = (keys ? tile : tile - k_tiles) * BLOCK;
    const uint32_t count = min(p.row_count - first, (uint32_t)BLOCK), steps = tiles_of(p.dim, DEPTH);
    listed_rows rows(p);
    all_rows all;
    product<T> result(thread);
    auto fetch = [&](uint32_t step) {
        unsigned char* const stage = shared + step % 2 * 2 * TILE_BYTES;
        load_tile<Tile<BLOCK, DEPTH>>(stage, patch{p.latent, 0, first, p.row_count, step * DEPTH, p.dim}, rows, thread);
        load_tile<Tile<BLOCK, DEPTH>>(stage + TILE_BYTES, patch{weights, p.first_head + head, column, made, step * DEPTH, p.dim}, all, thread);
        cp_async_commit();
    };
    fetch(0);
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step++) {
        cp_async_wait<0>();
        sync_block();  // this stage is there, and the other is no longer read
        if (step + 1 < steps) fetch(step + 1);
        const unsigned char* const stage = shared + step % 2 * 2 * TILE_BYTES;
        result.template add<false, false>(stage, stage + TILE_BYTES);
    }
    result.each(count, made - column, [&](uint32_t row, uint32_t col, float x, float y) {
        const int64_t at = element_offset(to, rows.row(first + row), head) + column + col;
        store_global((uint32_t*)((T*)to.ptr + at), pack2<T>(x, y));
    });
    if (tile != 0) return;
    const uint32_t units = p.rope / 8;
    for (uint32_t i = thread; i < count * units; i += THREADS) {
        const uint32_t row = rows.row(first + i / units), unit = i % units * 8;
        const T* const shared_part = (const T*)p.latent.ptr + element_offset(p.latent, row, 0) + p.dim + unit;
        store_global((uint4*)((T*)p.k.ptr + element_offset(p.k, row, head) + p.dim_k + unit), load_global((const uint4*)shared_part));
    }
}

// What all heads share of the keys: the sum over heads, in their order.
DEVICE void contract_rope(const cp_latent_params& p, uint32_t first, uint32_t thread) {
    const uint32_t count = min(p.row_count - first, (uint32_t)BLOCK), units = p.rope / 4;
    listed_rows rows(p);
    for (uint32_t i = thread; i < count * units; i += THREADS) {
        const uint32_t row = rows.row(first + i / units), unit = i % units * 4;
        float4* const to = (float4*)((float*)p.d_latent.ptr + element_offset(p.d_latent, row, 0) + p.dim + unit);
        float4 sum = load_global(to);
        for (uint32_t head = 0; head < p.heads; head++) {
            const float4 x = load_global((const float4*)((const float*)p.k.ptr + element_offset(p.k, row, head) + p.dim_k + unit));
            sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
        }
        store_global(to, sum);
    }
}

// Grid: tiles of rows · (tiles of dim, and one for what all heads share, if there is any).
template <class T>
DEVICE void contract_latent(const cp_latent_params& p) {
    SHARED_MEMORY(shared);
    const uint32_t thread = threadIdx.x, tiles = tiles_of(p.dim, BLOCK) + (p.rope != 0);
    const uint32_t first = blockIdx.x / tiles * BLOCK, column = blockIdx.x % tiles * BLOCK;
    if (column >= p.dim) return contract_rope(p, first, thread);
    const uint32_t k_steps = tiles_of(p.dim_k, DEPTH), head_steps = k_steps + tiles_of(p.dim_v, DEPTH), steps = p.heads * head_steps;
    listed_rows rows(p);
    all_rows all;
    product<T> result(thread);
    wide_tile<Tile<BLOCK, DEPTH>> wide;
    auto fetch = [&](uint32_t step) {
        unsigned char* const stage = shared + step % 2 * 2 * TILE_BYTES;
        const uint32_t head = step / head_steps, part = step % head_steps;
        const bool keys = part < k_steps;
        const uint32_t at = (keys ? part : part - k_steps) * DEPTH, end = keys ? p.dim_k : p.dim_v;
        load_tile<Tile<DEPTH, BLOCK>>(stage + TILE_BYTES, patch{keys ? p.up_k : p.up_v, p.first_head + head, at, end, column, p.dim}, all, thread);
        cp_async_commit();
        wide.load(patch{keys ? p.k : p.v, head, first, p.row_count, at, end}, rows, thread);
    };
    fetch(0);
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step++) {
        unsigned char* const stage = shared + step % 2 * 2 * TILE_BYTES;
        wide.template store<T>(stage, thread);
        cp_async_wait<0>();
        sync_block();  // this stage is there, and the other is no longer read
        if (step + 1 < steps) fetch(step + 1);
        result.template add<false, true>(stage, stage + TILE_BYTES);
    }
    result.each(min(p.row_count - first, (uint32_t)BLOCK), p.dim - column, [&](uint32_t row, uint32_t col, float x, float y) {
        add_pair((float*)p.d_latent.ptr + element_offset(p.d_latent, rows.row(first + row), 0) + column + col, x, y);
    });
}

// Grid: heads · (tiles of dim_k + tiles of dim_v) · tiles of dim.
template <class T>
DEVICE void contract_weights(const cp_latent_params& p) {
    SHARED_MEMORY(shared);
    const uint32_t thread = threadIdx.x, k_tiles = tiles_of(p.dim_k, BLOCK), tiles = k_tiles + tiles_of(p.dim_v, BLOCK), columns = tiles_of(p.dim, BLOCK);
    const uint32_t column = blockIdx.x % columns * BLOCK, tile = blockIdx.x / columns % tiles, head = blockIdx.x / columns / tiles;
    const bool keys = tile < k_tiles;
    const cp_view &from = keys ? p.k : p.v, &to = keys ? p.d_up_k : p.d_up_v;
    const uint32_t made = keys ? p.dim_k : p.dim_v, first = (keys ? tile : tile - k_tiles) * BLOCK, steps = tiles_of(p.row_count, DEPTH);
    listed_rows rows(p);
    product<T> result(thread);
    wide_tile<Tile<DEPTH, BLOCK>> wide;
    auto fetch = [&](uint32_t step) {
        unsigned char* const stage = shared + step % 2 * 2 * TILE_BYTES;
        load_tile<Tile<DEPTH, BLOCK>>(stage + TILE_BYTES, patch{p.latent, 0, step * DEPTH, p.row_count, column, p.dim}, rows, thread);
        cp_async_commit();
        wide.load(patch{from, head, step * DEPTH, p.row_count, first, made}, rows, thread);
    };
    fetch(0);
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step++) {
        unsigned char* const stage = shared + step % 2 * 2 * TILE_BYTES;
        wide.template store<T>(stage, thread);
        cp_async_wait<0>();
        sync_block();  // this stage is there, and the other is no longer read
        if (step + 1 < steps) fetch(step + 1);
        result.template add<true, true>(stage, stage + TILE_BYTES);
    }
    result.each(min(made - first, (uint32_t)BLOCK), p.dim - column, [&](uint32_t row, uint32_t col, float x, float y) {
        add_pair((float*)to.ptr + element_offset(to, first + row, p.first_head + head) + column + col, x, y);
    });
}

extern "C" __global__ void __launch_bounds__(256, 2) cp_expand_bf16(cp_latent_params p) { expand<bf16_t>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) cp_expand_f16(cp_latent_params p) { expand<f16_t>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) cp_contract_latent_bf16(cp_latent_params p) { contract_latent<bf16_t>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) cp_contract_latent_f16(cp_latent_params p) { contract_latent<f16_t>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) cp_contract_weights_bf16(cp_latent_params p) { contract_weights<bf16_t>(p); }
extern "C" __global__ void __launch_bounds__(256, 1) cp_contract_weights_f16(cp_latent_params p) { contract_weights<f16_t>(p); }
