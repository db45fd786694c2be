/* Latents that K and V are made of, and the gradients of them and of the weights from dK and dV: tests/data/README.md, "Latents". */
#ifndef CP_TEST_LATENT_H
#define CP_TEST_LATENT_H

#include "case.h"

/* Half the distance from 1 to the next value. */
static inline double epsilon_of(cp_dtype d) {
    return d == CP_DTYPE_F32 ? 0x1p-24 : d == CP_DTYPE_BF16 ? 0x1p-8 : 0x1p-11;
}

enum { D_LATENT, D_UP_K, D_UP_V, LATENTS };

/* What a case has of them, global: `[key token, width]`, `[head, rows, dim]`. */
typedef struct latents {
    float *x[LATENTS]; /* latents, up_k, up_v */
    double *right[LATENTS], *terms[LATENTS];
    float *plain[LATENTS];
} latents;

/* Groups of rows, rows of a group and elements of a row: latents are one group, weights one per head. */
static inline void latent_shape(const test_case *c, int which, size_t shape[3]) {
    int rows = which == D_LATENT ? tokens_of(c, 1) : which == D_UP_K ? c->dim_qk - c->latent_rope : c->dim_v;
    shape[0] = c->latent_dim == 0 ? 0 : which == D_LATENT ? 1 : (size_t)c->heads;
    shape[1] = (size_t)rows;
    shape[2] = (size_t)(c->latent_dim + (which == D_LATENT ? c->latent_rope : 0));
}

static inline size_t latent_size(const test_case *c, int which) {
    size_t shape[3];
    latent_shape(c, which, shape);
    return shape[0] * shape[1] * shape[2];
}

/* Of all three. */
static inline size_t latents_size(const test_case *c) {
    return latent_size(c, D_LATENT) + latent_size(c, D_UP_K) + latent_size(c, D_UP_V);
}

/* Element of latents or weights: eighths, weights times the least 2^-s with 4^s at least dim. */
static inline float latent_element(const test_case *c, int which, size_t index) {
    float x = floorf(8 * element((uint64_t)(7 + which), index) + 0.5f) / 8;
    int reach;
    for (reach = 1; which != D_LATENT && reach < c->latent_dim; reach *= 4)
        x /= 2;
    return x;
}

static inline void make_latents(latents *l, const test_case *c) {
    char *is_true = true_tokens(c, 1);
    int which;
    for (which = 0; which < LATENTS; which++) {
        size_t n = latent_size(c, which), width = (size_t)(c->latent_dim + c->latent_rope), i;
        l->x[which] = (float *)must(malloc((n + 1) * sizeof(float)));
        l->right[which] = (double *)must(calloc(n + 1, sizeof(double)));
        l->terms[which] = (double *)must(calloc(n + 1, sizeof(double)));
        l->plain[which] = (float *)must(calloc(n + 1, sizeof(float)));
        for (i = 0; i < n; i++)
            l->x[which][i] = which == D_LATENT && !is_true[i / width] ? NAN : latent_element(c, which, i);
    }
    free(is_true);
}

static inline void free_latents(latents *l) {
    int which;
    for (which = 0; which < LATENTS; which++)
        free(l->x[which]), free(l->right[which]), free(l->terms[which]), free(l->plain[which]);
}

/* K and V as attention has them. */
static inline void expand_latents(const latents *l, const test_case *c, cp_dtype dtype, float *k, float *v) {
    int token, head, n, i, nope = c->dim_qk - c->latent_rope, dim = c->latent_dim;
    for (token = 0; token < tokens_of(c, 1); token++)
        for (head = 0; head < c->heads; head++) {
            const float *x = l->x[D_LATENT] + (size_t)token * (size_t)(dim + c->latent_rope);
            for (n = 0; n < c->dim_qk + c->dim_v; n++) {
                int of_v = n >= c->dim_qk, row = of_v ? n - c->dim_qk : n, rows = of_v ? c->dim_v : nope;
                double sum = 0;
                if (!of_v && n >= nope)
                    sum = x[dim + n - nope];
                else
                    for (i = 0; i < dim; i++)
                        sum += (double)l->x[of_v ? D_UP_V : D_UP_K][(size_t)(head * rows + row) * (size_t)dim + (size_t)i] * x[i];
                (of_v ? v : k)[(size_t)(token * c->heads + head) * (size_t)(of_v ? c->dim_v : c->dim_qk) + (size_t)row] =
                    rounded((float)sum, dtype);
            }
        }
}

/* From dK and dV, each [0] and [1]: the oracle's, their terms, plain attention's. */
static inline void contract_latents(latents *l, const test_case *c, cp_dtype dtype, const char *seen, double *const *right,
                                    double *const *terms, float *const *plain) {
    int token, head, n, i, nope = c->dim_qk - c->latent_rope, dim = c->latent_dim;
    size_t at;
    for (token = 0; token < tokens_of(c, 1); token++)
        for (head = 0; seen[token] && head < c->heads; head++)
            for (n = 0; n < c->dim_qk + c->dim_v; n++) {
                int of_v = n >= c->dim_qk, row = of_v ? n - c->dim_qk : n, rows = of_v ? c->dim_v : nope, which = of_v ? D_UP_V : D_UP_K;
                size_t from = (size_t)(token * c->heads + head) * (size_t)(of_v ? c->dim_v : c->dim_qk) + (size_t)row;
                size_t to = (size_t)token * (size_t)(dim + c->latent_rope), weight = (size_t)(head * rows + row) * (size_t)dim;
                if (!of_v && n >= nope) {
                    to += (size_t)(dim + n - nope);
                    l->right[D_LATENT][to] += right[0][from];
                    l->terms[D_LATENT][to] += terms[0][from];
                    l->plain[D_LATENT][to] += plain[0][from];
                    continue;
                }
                for (i = 0; i < dim; i++, to++, weight++) {
                    float w = l->x[which][weight], x = l->x[D_LATENT][to];
                    l->right[D_LATENT][to] += right[of_v][from] * w;
                    l->terms[D_LATENT][to] += terms[of_v][from] * fabsf(w);
                    l->plain[D_LATENT][to] += plain[of_v][from] * w;
                    l->right[which][weight] += right[of_v][from] * x;
                    l->terms[which][weight] += terms[of_v][from] * fabsf(x);
                    l->plain[which][weight] += plain[of_v][from] * x;
                }
            }
    for (at = 0; at < latent_size(c, D_LATENT); at++)
        l->plain[D_LATENT][at] = rounded(l->plain[D_LATENT][at], dtype);
}

/* Checks all three, one after another in `got`, as check_result does: rows of latents that some query sees, and all rows of weights, in buckets of 64 of
 * a group; other rows are 0. */
static inline double check_latents(const latents *l, const test_case *c, cp_dtype dtype, const char *seen, const float *got, char *why,
                                   size_t room) {
    static const char *const names[] = {"d_latent", "d_up_k", "d_up_v"};
    double worst = 0;
    size_t shape[3], group, row, i;
    int which;
    why[0] = 0;
    for (which = 0; which < LATENTS && why[0] == 0; which++) {
        latent_shape(c, which, shape);
        for (group = 0; group < shape[0] && why[0] == 0; group++) {
            size_t live = 0, done = 0;
            double error = 0, plain = 0, size = 0, terms = 0;
            for (row = 0; row < shape[1]; row++)
                live += which != D_LATENT || seen[row];
            for (row = 0; row < shape[1] && why[0] == 0; row++) {
                int alive = which != D_LATENT || seen[row];
                for (i = (group * shape[1] + row) * shape[2]; i < (group * shape[1] + row + 1) * shape[2]; i++) {
                    double right = l->right[which][i];
                    if (!alive && !(got[i] == 0))
                        snprintf(why, room, "%s row %zu: got %g, not 0", names[which], row, got[i]);
                    error += (got[i] - right) * (got[i] - right);
                    plain += (l->plain[which][i] - right) * (l->plain[which][i] - right);
                    size += right * right;
                    terms += l->terms[which][i] * l->terms[which][i];
                }
                done += (size_t)alive;
                /* The last bucket takes the remainder. */
                if (alive && (done == live || (done % 64 == 0 && live - done >= 64))) {
                    double bound = 3 * sqrt(plain) + 4 * epsilon_of(dtype) * sqrt(size) + 1e-7 * sqrt(terms);
                    double ratio = bound > 0 ? sqrt(error) / bound : error > 0 ? INFINITY : error;
                    worst = ratio > worst ? ratio : worst;
                    if (!(ratio <= 1))
                        snprintf(why, room, "%s group %zu, to row %zu: error is %.3g of its bound", names[which], group, row, ratio);
                    error = plain = size = terms = 0;
                }
            }
        }
        got += latent_size(c, which);
    }
    return why[0] != 0 ? INFINITY : worst;
}

#endif /* CP_TEST_LATENT_H */
