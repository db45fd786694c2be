// What the host gives to the kernels: plain structs, laid out the same on the device, in the software GPU and in Rust
// (src/backend/cuda/params.rs mirrors this file; a test compares them).
//
// Rows, heads and slices mean what they mean in src/backend/mod.rs and src/mask.rs.
#pragma once
#include <stdint.h>

#define CP_F32 0u
#define CP_BF16 1u
#define CP_F16 2u
// Bytes of keys or values as they travel (fp8.cuh).
#define CP_E4M3 3u
#define CP_E5M2 4u

// A tensor [rows, heads, dim] in device memory, dim contiguous. Element (r, h, d) lies at
//   ptr + (r / rows_per_batch)·stride_batch + (r % rows_per_batch)·stride_row + h·stride_head + d      (strides in elements)
// and with rows_per_batch = 0 at ptr + r·stride_row + h·stride_head + d. A null ptr: absent.
struct cp_view {
    uint64_t ptr;
    int64_t stride_batch;
    int64_t stride_row;
    int64_t stride_head;
    uint32_t rows_per_batch;
    uint32_t rows;
};

// Rows q … q+q_len of the queries against rows k … k+k_len of the keys; row q+i sees row k+j when lo <= j − i <= hi.
struct cp_slice {
    uint32_t q, q_len, k, k_len;
    int32_t lo, hi;
};

// One sweep of a tile over the other side: forward over keys, backward over queries. In the slices of a part no query row occurs twice,
// so every query row has one range of keys [lo, hi), empty for rows in none.
struct cp_part {
    uint32_t begin, end;            // rows of the other side to go over (forward: keys; backward: queries)
    uint32_t full_begin, full_end;  // of those, rows whose pairs with every row of the tile are all visible: no mask needed; may be empty
    uint32_t slice, slices;         // index and number of the slices
    uint32_t turn;                  // backward, deterministic: index of the turn of the first query tile, begin / query tile rows
    uint32_t reserved;
};

// One block's work per head: rows row … row+rows of one side (forward: queries; backward: keys), and the sweeps. Longest first.
struct cp_tile {
    uint32_t row, rows;
    uint32_t part, parts;  // index and number of the parts; 0 parts: nothing is seen
};

// A query row's token: its position in its sequence, and which of the sequences that is; padding has position CP_NO_TOKEN.
#define CP_NO_TOKEN 0xffffffffu
struct cp_token {
    uint32_t position, sequence;
};

// A sequence: the key position on the diagonal of its query position 0; the caller's number for it; padding keys before its first true one,
// which the bias has columns for.
struct cp_sequence {
    int32_t diagonal;
    uint32_t number, padding, reserved;
};

// cp_attention_params.flags
#define CP_FIRST 1u          // forward: start from the empty state instead of reading it
#define CP_LAST 2u           // forward: normalise and write out and lse instead of leaving the state
#define CP_DETERMINISTIC 4u  // backward: dQ is added in the order of the tiles
#define CP_LARGEST 8u        // forward, *_score: the state's maximum is the true one in all steps, so that the last can write top
#define CP_SEED_AT 16u       // *_score: dropout_seed is the address of the seed, so that every replay of a graph may draw another mask

// One attend step. Forward uses q, k, v, acc_*, out, lse; backward q, k, v, d_out, lse, delta, dq, dk, dv.
// Work number w of the grid: forward tile w / heads, head w % heads; backward tile w / kv_heads, key head w % kv_heads, for all query heads
// of that key head. Block b does w = b, b + gridDim.x, … so that a smaller grid leaves SMs to others.
struct cp_attention_params {
    cp_view q, k, v;
    cp_view out, lse;                   // storage type; fp32 natural log
    cp_view acc_out, acc_max, acc_sum;  // fp32 running state: un-normalised output, maximum of score·scale_log2, sum of 2^(score·scale_log2 − max)
    cp_view d_out, delta;               // storage type; fp32
    cp_view dq, dk, dv;                 // fp32, added to
    uint64_t tiles, parts, slices;      // cp_tile[], cp_part[], cp_slice[]
    uint64_t q_used, k_used;            // bit r%32 of word r/32: row r is in some slice. Null: all are. Other rows may hold NaN and are read as 0.
    uint64_t turns;                     // deterministic: uint32_t, which turn an add to a query tile is
    uint64_t counters;                  // deterministic: uint32_t[query tiles · heads], zero before the launch: adds so far
    uint64_t bias_counters;             // deterministic, d_bias that heads share: uint32_t[turns], zero before the launch: heads so far
    uint32_t tile_count, heads, kv_heads;
    uint32_t q_first, head_group, kv_first;  // key head of local head h: (q_first + h) / head_group − kv_first
    uint32_t dim_qk, dim_v;                  // true dimensions, multiples of 8; the kernel's own are the next compiled ones
    uint32_t flags;
    float scale, scale_log2;  // softmax scale; the same times log2(e)
    float softcap, softcap_inverse;  // here and below, for kernels *_score only (score.cuh): 0: none; 1 / softcap
    uint32_t drop_below;             // dropout: weights whose random word is less become 0; 0: none
    float grow;                      // 1 / (1 − p), what the others are multiplied by
    uint32_t head_offset;            // dropout: added to the global number of a query head
    uint64_t dropout_seed;
    uint64_t q_tokens, k_positions, sequences;  // cp_token[] and uint32_t[], one per row; cp_sequence[]
    uint64_t alibi;                             // float per global query head; null: none
    cp_view sinks;                              // fp32, row 0, by global query head; null ptr: none
    cp_view top;                                // forward with CP_LAST and CP_LARGEST: fp32, the largest visible score of a row; null ptr: not asked for
    // Storage type; fp32, added to. Query rows; heads, or one for all with stride_head 0; an element for each key of the padded sequence, rows at
    // any multiple of the element. Null ptr: none.
    cp_view bias, d_bias;
    // Places of features that are not computed yet; all zero.
    uint64_t k_scale, v_scale;
    uint64_t reserved[4];
};

// Rows src + i·src_step → dst + i·dst_step, i < rows. `before`: rows of all runs before this one.
struct cp_run {
    uint32_t src, src_step, dst, dst_step, rows, before;
};

// Copies, converts or adds rows of some heads (cp_copy_rows), encodes or decodes them (cp_encode_rows, cp_decode_rows; dim is that of the stored side);
// writes `value` to rows of dst (cp_fill_rows, runs' dst only).
struct cp_rows_params {
    cp_view src, dst;
    uint64_t runs;  // cp_run[]
    uint32_t run_count, row_count;
    uint32_t src_type, dst_type;  // CP_F32, …
    uint32_t src_head, dst_head, heads, dim;
    uint32_t add;    // copy: add in fp32 (dst_type is CP_F32)
    uint32_t value;  // fill: bits of an fp32 number, −∞ or 0
};

// terms[r, h] = −exp(sinks[h] − lse)·delta for all rows, 0 where the LSE is −∞ (cp_sink_terms). All fp32.
struct cp_sink_params {
    cp_view sinks, lse, delta, terms;
    uint32_t row_count, heads;
};

// dst[dst_row, dst_head + h] = the sum over all rows r of src[r, h], or the largest (cp_reduce). Both fp32.
struct cp_reduce_params {
    cp_view src, dst;
    uint32_t row_count, heads, dst_row, dst_head;
    uint32_t largest, reserved;
};

// delta[r, h] = Σ_d out·d_out for all rows (cp_delta).
struct cp_delta_params {
    cp_view out, d_out, delta;
    uint32_t row_count, heads, dim, type;
};
