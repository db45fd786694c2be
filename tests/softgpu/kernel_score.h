// Features of scores for the tests of kernels: tables of tokens, and what src/score.rs says in float64 and in plain fp32 arithmetic.
#pragma once
#include "kernel_test.h"

namespace kernel_test {

// Philox4x32-10 as its paper writes it.
inline uint32_t philox(uint64_t seed, const uint32_t (&counter)[4], int word) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (uint32_t round = 0; round < 10; round++) {
        const uint32_t k0 = (uint32_t)seed + round * 0x9E3779B9u, k1 = (uint32_t)(seed >> 32) + round * 0xBB67AE85u;
        const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0, n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = (uint32_t)b, c2 = n2, c3 = (uint32_t)a;
    }
    return word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
}
// The known answers published with Random123.
inline std::string philox_is_right() {
    const uint32_t zero[4] = {0, 0, 0, 0}, pi[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    const uint32_t of_zero[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, of_pi[4] = {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1};
    for (int word = 0; word < 4; word++)
        if (philox(0, zero, word) != of_zero[word] || philox(0x299f31d0a4093822ull, pi, word) != of_pi[word]) return "the test's own Philox is wrong";
    return "";
}

// Which queries and heads a bias is of: every one; every query, but one for all heads; the same, but one for all batch entries of so many rows
// too; one for all.
enum Bias { NO_BIAS, BIAS, BIAS_OF_HEADS, BIAS_OF_ENTRIES, BIAS_OF_ALL };

// What a case asks for. Rows up to `boundary` are of one sequence, the others of a second.
struct Features {
    bool on = false;  // kernels *_score
    float softcap = 0, dropout = 0;
    bool alibi = false, sinks = false, top = false;
    uint32_t q_start = 0, q_step = 1, k_start = 0, k_step = 1, boundary = UINT32_MAX;
    int32_t diagonal = 0;  // of the first sequence; of the second one more
    uint32_t head_offset = 0;
    uint64_t seed = 0x0123456789abcdefull;
    bool seed_at = false;  // by its address
    Bias bias = NO_BIAS;
    uint32_t padding = 0, rows_per_batch = 0;  // of keys before the first sequence, which has columns; the second has two more. For BIAS_OF_ENTRIES
};

struct Scores {
    const Features f;
    const uint32_t q_first;
    std::vector<cp_token> tokens;
    std::vector<cp_sequence> sequences;
    std::vector<float> slopes, sinks;  // by global head
    Table<cp_token> token_table{"tokens", {}};
    Table<cp_sequence> sequence_table{"sequences", {}};
    Table<float> slope_table{"slopes", {}}, sink_table{"sinks", {}};
    Table<uint64_t> seed_table{"seed", {}};
    Tensor<float> biases;  // what is in the kernel's bias, which `bias_memory` holds
    cp_view bias_view{};
    std::shared_ptr<softgpu::Registered> bias_memory;
    std::vector<uint16_t> bias_bits;

    Scores(const Features& f_, uint32_t q_rows, uint32_t heads, uint32_t q_first_, const std::vector<bool>& used) : f(f_), q_first(q_first_) {
        for (uint32_t r = 0; r < q_rows; r++)
            tokens.push_back(used[r] ? cp_token{f.q_start + r * f.q_step, r >= f.boundary ? 1u : 0u} : cp_token{CP_NO_TOKEN, 77});
        sequences = {{f.diagonal, 11, f.padding, 0}, {f.diagonal + 1, 4000000000u, f.padding + 2, 0}};
        for (uint32_t h = 0; h < q_first + heads; h++) {
            slopes.push_back(0.03f + 0.02f * h);
            sinks.push_back(h == q_first ? -INFINITY : 0.5f * h - 1);
        }
        if (heads == 1) sinks[q_first] = 0.7f;
        token_table = Table<cp_token>("tokens", tokens), sequence_table = Table<cp_sequence>("sequences", sequences);
        slope_table = Table<float>("slopes", slopes), sink_table = Table<float>("sinks", sinks);
        seed_table = Table<uint64_t>("seed", {f.seed});
    }
    uint32_t key(uint32_t row) const { return f.k_start + row * f.k_step; }
    std::vector<uint32_t> keys(uint32_t rows) const {
        std::vector<uint32_t> list;
        for (uint32_t row = 0; row < rows; row++) list.push_back(key(row));
        return list;
    }
    // Column of the bias; rows of the bias, and its heads.
    uint32_t column(uint32_t row, uint32_t key_row) const { return sequences[tokens[row].sequence].padding + key(key_row); }
    uint32_t bias_row_of(uint32_t row) const { return f.bias == BIAS_OF_ALL ? 0 : f.bias == BIAS_OF_ENTRIES ? row % f.rows_per_batch : row; }
    uint32_t bias_heads(uint32_t heads) const { return f.bias == BIAS ? heads : 1; }
    // Makes the bias with so many columns, the last that any query sees among them: about 1 where a pair is visible, sometimes −∞, and all of it
    // for row 5; NaN elsewhere. Rows start at any multiple of two bytes.
    template <class T>
    void make_bias(uint32_t q_rows, uint32_t heads, uint32_t columns, const std::function<bool(uint32_t, uint32_t)>& visible) {
        if (f.bias == NO_BIAS) return;
        const uint32_t rows = f.bias == BIAS_OF_ALL ? 1 : f.bias == BIAS_OF_ENTRIES ? f.rows_per_batch : q_rows;
        biases = Tensor<float>("biases", rows, bias_heads(heads), columns, TIGHT);
        bias_bits.assign((size_t)rows * biases.heads * columns + 1, 0xffff);
        for (uint32_t r = 0; r < q_rows; r++)
            for (uint32_t c = 0; c < columns; c++)
                for (uint32_t h = 0; visible(r, c) && h < biases.heads; h++) {
                    const uint32_t row = bias_row_of(r);
                    Random random(((uint64_t)row * 64 + h) * 100003 + c);
                    const T x = rounded<T>(random.below(11) == 0 || (row == 5 && f.bias != BIAS_OF_ALL) ? -INFINITY : random.value());
                    biases.at(row, h, c) = widened(x);
                    bias_bits[1 + biases.offset(row, h, c)] = x.bits;
                }
        bias_memory = std::make_shared<softgpu::Registered>(&bias_bits[1], (bias_bits.size() - 1) * 2, "bias");
        bias_view = biases.view;
        bias_view.ptr = (uint64_t)(uintptr_t)&bias_bits[1];
        bias_view.rows = q_rows;
        if (f.bias != BIAS) bias_view.stride_head = 0;
        if (f.bias == BIAS_OF_ALL) bias_view.stride_row = 0;
        if (f.bias == BIAS_OF_ENTRIES) bias_view.rows_per_batch = f.rows_per_batch;
    }
    uint32_t below() const { return (uint32_t)((double)f.dropout * 4294967296.0); }
    void fill(cp_attention_params& p, uint64_t k_positions) const {
        p.q_tokens = token_table.address(), p.sequences = sequence_table.address(), p.k_positions = k_positions;
        p.alibi = f.alibi ? slope_table.address() : 0;
        p.softcap = f.softcap, p.softcap_inverse = f.softcap > 0 ? 1 / f.softcap : 0;
        p.drop_below = below(), p.grow = grow(), p.dropout_seed = f.seed, p.head_offset = f.head_offset;
        if (f.seed_at) p.flags |= CP_SEED_AT, p.dropout_seed = seed_table.address();
        if (f.sinks) p.sinks.ptr = sink_table.address(), p.sinks.stride_head = 1, p.sinks.rows = 1;
        p.bias = bias_view;
    }
    float grow() const { return 1 / (1 - f.dropout); }

    bool is_token(uint32_t row) const { return tokens[row].position != CP_NO_TOKEN; }
    // Of the sink; −∞ without.
    float sink(uint32_t row, uint32_t head) const { return f.sinks && is_token(row) ? sinks[q_first + head] : -INFINITY; }
    // F: double or float. The final score, and its derivative by scale·q·k.
    template <class F>
    F value(F x, uint32_t row, uint32_t head, uint32_t key_row, F* derivative = nullptr) const {
        F slope_of_cap = 1;
        if (f.softcap > 0) {
            const F t = std::tanh(x / (F)f.softcap);
            x = f.softcap * t, slope_of_cap = 1 - t * t;
        }
        if (f.alibi) {
            const cp_token& token = tokens[row];
            const int64_t distance = (int64_t)key(key_row) - token.position - sequences[token.sequence].diagonal;
            x -= slopes[q_first + head] * (F)std::abs(distance);
        }
        if (f.bias != NO_BIAS) x += const_cast<Tensor<float>&>(biases).at(bias_row_of(row), f.bias == BIAS ? head : 0, column(row, key_row));
        if (derivative) *derivative = slope_of_cap;
        return x;
    }
    bool kept(uint32_t row, uint32_t head, uint32_t key_row) const {
        if (f.dropout == 0) return true;
        const uint32_t counter[4] = {key(key_row) / 4, tokens[row].position, f.head_offset + q_first + head, sequences[tokens[row].sequence].number};
        return philox(f.seed, counter, key(key_row) % 4) >= below();
    }
};

}  // namespace kernel_test
