// What happens to a score between q·k and the softmax, and to its weight after it: src/score.rs on the device. Only the kernels *_score have it.
//
//     x = scale·q·k        x = cap·tanh(x / cap)        x = x − slope·|key position − diagonal|        x = x + bias[query row, head, column]
//     kept = word(key position) >= drop_below           column = padding + key position
//
// Positions come from tables, a number per row: rows need not be consecutive tokens (striped, packed, padded).
#pragma once
#include <math.h>

#include "params.h"
#include "ptx.cuh"
#include "tile.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// What the scores of a query row depend on.
struct Token {
    uint32_t position;  // in its sequence; CP_NO_TOKEN: the row is padding, nothing else counts
    int32_t diagonal;   // the key position on its diagonal
    uint32_t number;    // the caller's, of its sequence
    uint32_t padding;   // keys before its sequence's first
};
DEVICE Token load_token(const cp_attention_params& p, uint32_t row) {
    const uint2 at = load_constant((const uint2*)p.q_tokens + row);
    if (at.x == CP_NO_TOKEN) return Token{at.x, 0, 0, 0};
    const uint4 sequence = load_constant((const uint4*)p.sequences + at.y);
    return Token{at.x, (int32_t)(at.x + sequence.x), sequence.y, sequence.z};
}

// Position of a key row.
DEVICE uint32_t load_position(const cp_attention_params& p, uint32_t row) { return load_constant((const uint32_t*)p.k_positions + row); }

// Numbers of a query head: its slope, 0 without ALiBi; its number over all of the model, for dropout.
DEVICE float slope_of(const cp_attention_params& p, uint32_t head) {
    return p.alibi == 0 ? 0.0f : load_constant((const float*)p.alibi + p.q_first + head);
}
DEVICE uint32_t model_head(const cp_attention_params& p, uint32_t head) { return p.head_offset + p.q_first + head; }

// cap·tanh(x / cap), inverse = 1 / cap. tanh |y| = (1 − e) / (1 + e), e = 2^(−2·log2(e)·|y|); a series where 1 − e would lose digits.
// Good to a few ulp; tanh.approx is good to 2^-11 of cap, which the softmax makes a relative error of every weight.
DEVICE float soft_cap(float x, float cap, float inverse) {
    const float a = fabsf(x * inverse), s = a * a;
    const float e = exp2_approx(a * (-2.0f * LOG2_E));
    const float far = (1.0f - e) * reciprocal_approx(1.0f + e);
    const float near = a * (1.0f - s * (1.0f / 3 - s * (2.0f / 15 - s * (17.0f / 315 - s * (62.0f / 2835)))));
    return cap * copysignf(a < 0.25f ? near : far, x);
}

// A query's row of the bias, or of its gradient, from key position 0 on. Only for keys that the query sees: others may be of a longer sequence.
template <class E>
DEVICE E* bias_row(const cp_view& view, uint32_t row, uint32_t head, const Token& query) {
    return (E*)view.ptr + element_offset(view, row, head) + query.padding;
}

// A number of 16 bits that no one writes during the launch.
template <class T>
DEVICE float load_float(const T* at) {
    return to_float(T{load_constant(&at->bits)});
}

DEVICE float distance(uint32_t key, const Token& query) {
    const int32_t d = (int32_t)(key - (uint32_t)query.diagonal);
    return (float)(d < 0 ? -d : d);
}

// Philox4x32-10 (Salmon et al., SC 2011): four random words for the keys 4·block … 4·block + 3 of a query.
struct Words {
    uint32_t x[4];
    DEVICE uint32_t of(uint32_t key) const { return key & 2 ? key & 1 ? x[3] : x[2] : key & 1 ? x[1] : x[0]; }
};
DEVICE Words random_words(uint64_t seed, uint32_t sequence, uint32_t head, uint32_t query, uint32_t block) {
    Words c{{block, query, head, sequence}};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)c.x[0] * 0xD2511F53u, b = (uint64_t)c.x[2] * 0xCD9E8D57u;
        c = Words{{(uint32_t)(b >> 32) ^ c.x[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c.x[3] ^ k1, (uint32_t)a}};
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c;
}

DEVICE uint64_t dropout_seed(const cp_attention_params& p) {
    if (!(p.flags & CP_SEED_AT)) return p.dropout_seed;
    const uint2 seed = load_constant((const uint2*)p.dropout_seed);
    return (uint64_t)seed.y << 32 | seed.x;
}

// Bits 0 and 1: does dropout keep a query's weights of two keys? Neighbours mostly share their words.
DEVICE uint32_t kept_pair(const cp_attention_params& p, uint64_t seed, uint32_t head, const Token& query, uint32_t key, uint32_t next) {
    Words words = random_words(seed, query.number, head, query.position, key / 4);
    const uint32_t first = words.of(key) >= p.drop_below;
    if (next / 4 != key / 4) words = random_words(seed, query.number, head, query.position, next / 4);
    return first | (uint32_t)(words.of(next) >= p.drop_below) << 1;
}
