// The running softmax of the query rows a warp works on, base 2: of every row the (nearly) maximal score·scale_log2 and the sum
// of 2^(score·scale_log2 − maximum). FlashAttention-2, arXiv 2307.08691.
//
// Accumulators are those of mma.m16n8k16: x[m][n][2·h + e] is row 16·m + 8·h + lane/4, column 8·n + 2·(lane%4) + e. So a row is shared by
// the four lanes of a quad, and a lane has parts of 2·M rows.
#pragma once
#include "bounds.cuh"
#include "ptx.cuh"

// Every lane's result: the maximum, the sum over its quad.
DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

template <int M>
struct RunningSoftmax {
    // The maximum of a row that has seen nothing: below every score, but finite, because −∞ − −∞ must not happen.
    static constexpr float NONE = -1e30f;

    float max[M][2];
    float sum[M][2];  // of the lane's own columns; the quad's total is the row's

    DEVICE void clear() {
#pragma unroll
        for (int m = 0; m < M; m++) {
            max[m][0] = max[m][1] = NONE;
            sum[m][0] = sum[m][1] = 0.0f;
        }
    }

    // Takes note of scores q·k (hidden ones −∞): `out` belongs to the maximum and is scaled when that changes. The maximum follows only when a
    // score exceeds it by SLACK: any number near the true one serves, and so `out` is rarely touched. With 0 it is the true one. scale_log2 > 0.
    static constexpr float SLACK = 8.0f;
    template <int N, int D>
    DEVICE void meet(const float (&scores)[M][N][4], float (&out)[M][D][4], float scale_log2, float slack = SLACK) {
        float top[M][2];
        bool grows = false;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float most = scores[m][0][2 * h];
#pragma unroll
                for (int n = 0; n < N; n++) {
                    most = fmaxf(most, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
                }
                top[m][h] = quad_max(most) * scale_log2;
                grows = grows || top[m][h] > max[m][h] + slack;
            }
        }
        if (any_lane(grows)) {
            follow(top, out);
        }
    }

    // Four scores of block row m become weights 2^(score·scale_log2 − maximum), added to the sum.
    DEVICE void weigh(float (&x)[4], int m, float scale_log2) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            x[e] = exp2_approx(fmaf(x[e], scale_log2, -max[m][e / 2]));
            sum[m][e / 2] += x[e];
        }
    }

    // One more weight in the finished sum of a row, that of no key: 2^sink. Returns the factor for the row's output; the maximum may be another.
    DEVICE float join(int m, int h, float sink) {
        const float higher = fmaxf(max[m][h], sink), shrink = exp2_approx(max[m][h] - higher);
        max[m][h] = higher;
        sum[m][h] = sum[m][h] * shrink + exp2_approx(sink - higher);
        return shrink;
    }

    // The maximum becomes at least `top`.
    template <int D>
    DEVICE void follow(const float (&top)[M][2], float (&out)[M][D][4]) {
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float higher = fmaxf(max[m][h], top[m][h]);
                const float shrink = exp2_approx(max[m][h] - higher);
                max[m][h] = higher;
                sum[m][h] *= shrink;
#pragma unroll
                for (int d = 0; d < D; d++) {
                    out[m][d][2 * h] *= shrink;
                    out[m][d][2 * h + 1] *= shrink;
                }
            }
        }
    }
};

// Hides scores: column c of the accumulators is key row key + c; `ranges` are those of the warp's rows.
template <int M, int N>
DEVICE void hide(float (&scores)[M][N][4], const KeyRange* ranges, uint32_t key, uint32_t lane) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            KeyRange range = ranges[m * 16 + h * 8 + lane / 4];
            uint32_t first = key + lane % 4 * 2 - range.lo, count = range.hi - range.lo;
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (first + (n * 8 + e) >= count) {
                        scores[m][n][2 * h + e] = -INFINITY;
                    }
                }
            }
        }
    }
}
