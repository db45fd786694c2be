/* What is right, and how far from it a result may be: the float64 oracle, plain attention and the error contract of tests/data/README.md,
 * as double loops over positions. All tensors are global: [token, head, dim] over the padded sequences. */
#ifndef CP_TEST_ORACLE_H
#define CP_TEST_ORACLE_H

#include "case.h"
#include "latent.h"

enum { OUT, LSE, DQ, DK, DV, RESULTS };

/* Heads and elements per head of a result, and its side. */
static inline int result_heads(const test_case *c, int r) {
    return r == DK || r == DV ? c->kv_heads : c->heads;
}

static inline int result_dim(const test_case *c, int r) {
    return r == LSE ? 1 : r == DQ || r == DK ? c->dim_qk : c->dim_v;
}

static inline int result_side(int r) {
    return r == DK || r == DV ? CP_SIDE_K : CP_SIDE_Q;
}

static inline size_t result_size(const test_case *c, int r) {
    return (size_t)tokens_of(c, result_side(r)) * (size_t)result_heads(c, r) * (size_t)result_dim(c, r);
}

/* Everything that results of one case in one storage type are compared to. */
typedef struct reference {
    const test_case *c;
    cp_dtype dtype;
    float *q, *k, *v, *d_out;
    double *right[RESULTS], *terms[RESULTS];
    float *plain[RESULTS];
    char *seen, *looks, *is_true[2]; /* key tokens that are seen, query tokens that see something, tokens that are no padding */
    float sinks[MOST_HEADS];
    double d_sinks[MOST_HEADS], d_sinks_terms[MOST_HEADS], max_logit[MOST_HEADS];
    float *bias, *plain_bias; /* and its gradient */
    double *d_bias, *d_bias_terms;
    latents made; /* of which K and V are made */
} reference;

/* A global input tensor in fp32, its padding NaN. */
static inline float *make_input(const test_case *c, int id, int side, int width, cp_dtype dtype) {
    char *is_true = true_tokens(c, side);
    size_t t, n = (size_t)tokens_of(c, side), w = (size_t)width, i;
    float *x = (float *)must(malloc((n * w + 1) * sizeof *x));
    for (t = 0; t < n; t++)
        for (i = 0; i < w; i++)
            x[t * w + i] = is_true[t] ? rounded(element((uint64_t)id, t * w + i), dtype) : NAN;
    free(is_true);
    return x;
}

static inline double dot(const float *a, const float *b, int n) {
    double sum = 0;
    int i;
    for (i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

static inline double dot_terms(const float *a, const float *b, int n) {
    double sum = 0;
    int i;
    for (i = 0; i < n; i++)
        sum += fabs((double)a[i] * b[i]);
    return sum;
}

static inline float dot_plain(const float *a, const float *b, int n) {
    float sum = 0;
    int i;
    for (i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static inline void add(double *sums, double *terms, double factor, double factor_terms, const float *row, int n) {
    int i;
    for (i = 0; i < n; i++) {
        sums[i] += factor * row[i];
        terms[i] += factor_terms * fabs(row[i]);
    }
}

static inline void add_plain(float *sums, float factor, const float *row, int n) {
    int i;
    for (i = 0; i < n; i++)
        sums[i] += factor * row[i];
}

/* A key that a query sees: its row of K and V, its element of the bias, its distance from the diagonal, and whether dropout keeps its weight. */
typedef struct seen_key {
    size_t row, bias;
    int distance, kept;
} seen_key;

/* One query row: its own outputs, and what it adds to the gradients of the keys it sees. `s` has room for 2n. */
static inline void exact_row(reference *r, size_t row, const seen_key *keys, int n, double *s) {
    const test_case *c = r->c;
    int dqk = c->dim_qk, dv = c->dim_v, head = (int)(row % (size_t)c->heads), j;
    const float *q = r->q + row * (size_t)dqk, *d_out = r->d_out + row * (size_t)dv;
    double sink = c->sinks ? r->sinks[head] : -INFINITY, max = sink, sum = 0, lse, delta = 0, delta_terms = 0, scale = c->scale;
    double *out = r->right[OUT] + row * (size_t)dv, *slopes = s + n, grow = 1 / (1 - (double)c->dropout);
    for (j = 0; j < n; j++) {
        s[j] = scale * dot(q, r->k + keys[j].row * (size_t)dqk, dqk);
        slopes[j] = 1; /* the score's derivative by scale·q·k */
        if (c->softcap > 0) {
            double t = tanh(s[j] / c->softcap);
            s[j] = c->softcap * t;
            slopes[j] = 1 - t * t;
        }
        if (c->alibi)
            s[j] -= (double)alibi_slopes()[head] * keys[j].distance;
        if (c->bias)
            s[j] += r->bias[keys[j].bias];
        r->max_logit[head] = s[j] > r->max_logit[head] ? s[j] : r->max_logit[head];
        max = s[j] > max ? s[j] : max;
    }
    for (j = 0; j < n; j++)
        sum += exp(s[j] - max);
    r->right[LSE][row] = lse = max + log(sum + exp(sink - max));
    for (j = 0; j < n; j++) {
        double p = keys[j].kept ? grow * exp(s[j] - lse) : 0;
        r->seen[keys[j].row / (size_t)c->kv_heads] = r->looks[row / (size_t)c->heads] = 1;
        add(out, r->terms[OUT] + row * (size_t)dv, p, p, r->v + keys[j].row * (size_t)dv, dv);
    }
    for (j = 0; j < dv; j++) {
        delta += out[j] * d_out[j];
        delta_terms += fabs(out[j] * d_out[j]);
    }
    r->d_sinks[head] -= exp(sink - lse) * delta;
    r->d_sinks_terms[head] += exp(sink - lse) * delta_terms;
    for (j = 0; j < n; j++) {
        const float *k = r->k + keys[j].row * (size_t)dqk, *v = r->v + keys[j].row * (size_t)dv;
        double p = exp(s[j] - lse), kept = keys[j].kept ? grow : 0, dx = p * (kept * dot(d_out, v, dv) - delta), ds = scale * slopes[j] * dx;
        double dx_terms = p * (kept * dot_terms(d_out, v, dv) + delta_terms), ds_terms = fabs(scale) * slopes[j] * dx_terms;
        if (c->bias) {
            r->d_bias[keys[j].bias] += dx;
            r->d_bias_terms[keys[j].bias] += dx_terms;
        }
        add(r->right[DQ] + row * (size_t)dqk, r->terms[DQ] + row * (size_t)dqk, ds, ds_terms, k, dqk);
        add(r->right[DK] + keys[j].row * (size_t)dqk, r->terms[DK] + keys[j].row * (size_t)dqk, ds, ds_terms, q, dqk);
        add(r->right[DV] + keys[j].row * (size_t)dv, r->terms[DV] + keys[j].row * (size_t)dv, kept * p, kept * p, d_out, dv);
    }
}

/* The same as a careful single-rank implementation in the storage type computes it. */
static inline void plain_row(reference *r, size_t row, const seen_key *keys, int n, float *s) {
    const test_case *c = r->c;
    int dqk = c->dim_qk, dv = c->dim_v, head = (int)(row % (size_t)c->heads), j;
    const float *q = r->q + row * (size_t)dqk, *d_out = r->d_out + row * (size_t)dv;
    float sink = c->sinks ? r->sinks[head] : -INFINITY, max = sink, sum = 0, lse, delta;
    float *out = r->plain[OUT] + row * (size_t)dv, *slopes = s + n, grow = 1 / (1 - c->dropout);
    for (j = 0; j < n; j++) {
        s[j] = c->scale * dot_plain(q, r->k + keys[j].row * (size_t)dqk, dqk);
        slopes[j] = 1;
        if (c->softcap > 0) {
            float t = tanhf(s[j] / c->softcap);
            s[j] = c->softcap * t;
            slopes[j] = 1 - t * t;
        }
        if (c->alibi)
            s[j] -= alibi_slopes()[head] * (float)keys[j].distance;
        if (c->bias)
            s[j] += r->bias[keys[j].bias];
        max = s[j] > max ? s[j] : max;
    }
    for (j = 0; j < n; j++) {
        float p = expf(s[j] - max);
        sum += p;
        add_plain(out, rounded(keys[j].kept ? grow * p : 0, r->dtype), r->v + keys[j].row * (size_t)dv, dv);
    }
    sum += expf(sink - max);
    r->plain[LSE][row] = lse = max + logf(sum);
    for (j = 0; j < dv; j++)
        out[j] = rounded(out[j] / sum, r->dtype);
    delta = dot_plain(out, d_out, dv);
    for (j = 0; j < n; j++) {
        const float *k = r->k + keys[j].row * (size_t)dqk, *v = r->v + keys[j].row * (size_t)dv;
        float p = expf(s[j] - lse), kept = keys[j].kept ? grow : 0;
        float dx = p * (kept * dot_plain(d_out, v, dv) - delta), ds = rounded(dx * slopes[j], r->dtype);
        if (c->bias)
            r->plain_bias[keys[j].bias] += dx;
        add_plain(r->plain[DQ] + row * (size_t)dqk, ds, k, dqk);
        add_plain(r->plain[DK] + keys[j].row * (size_t)dqk, ds, q, dqk);
        add_plain(r->plain[DV] + keys[j].row * (size_t)dv, rounded(kept * p, r->dtype), d_out, dv);
    }
}

/* Plain attention's error is what others are measured by, so it must be small itself: else a mistake of the oracle would excuse all. */
static inline void check_yardstick(const reference *r) {
    int result;
    size_t i, dims[4];
    for (result = 0; result <= RESULTS; result++) {
        double error = 0, terms = 0;
        const float *plain = result == RESULTS ? r->plain_bias : r->plain[result];
        const double *right = result == RESULTS ? r->d_bias : r->right[result], *term = result == RESULTS ? r->d_bias_terms : r->terms[result];
        size_t n = result == RESULTS ? bias_dims(r->c, dims) : result_size(r->c, result);
        if (result == LSE)
            continue;
        for (i = 0; i < n; i++) {
            error += (plain[i] - right[i]) * (plain[i] - right[i]);
            terms += term[i] * term[i];
        }
        if (!(sqrt(error) <= 16 * epsilon_of(r->dtype) * sqrt(terms)))
            die("plain attention and the oracle differ too much", r->c->name);
    }
}

/* Keys or values as every rank attends them. */
static inline void attended(const test_case *c, float *x, int dim, cp_dtype dtype) {
    int row, at;
    for (row = 0; c->kv_wire != CP_KV_WIRE_STORAGE && row < tokens_of(c, 1) * c->kv_heads; row++)
        for (at = 0; at < dim; at += 32)
            travelled(x + (size_t)row * (size_t)dim + at, dim - at < 32 ? dim - at : 32, c->kv_wire, dtype);
}

static inline void make_reference(reference *r, const test_case *c, cp_dtype dtype) {
    int seq, head, i, j, n, result;
    size_t most = 1, at, dims[4];
    seen_key *keys;
    double *s;
    float *s_plain;
    memset(r, 0, sizeof *r);
    r->c = c;
    r->dtype = dtype;
    r->q = make_input(c, 1, 0, c->heads * c->dim_qk, dtype);
    r->k = make_input(c, 2, 1, c->kv_heads * c->dim_qk, dtype);
    r->v = make_input(c, 3, 1, c->kv_heads * c->dim_v, dtype);
    attended(c, r->k, c->dim_qk, dtype);
    attended(c, r->v, c->dim_v, dtype);
    r->d_out = make_input(c, 4, 0, c->heads * c->dim_v, dtype);
    if (c->latent_dim > 0) {
        make_latents(&r->made, c);
        expand_latents(&r->made, c, dtype, r->k, r->v);
    }
    r->is_true[0] = true_tokens(c, 0);
    r->is_true[1] = true_tokens(c, 1);
    r->seen = (char *)must(calloc((size_t)tokens_of(c, 1) + 1, 1));
    r->looks = (char *)must(calloc((size_t)tokens_of(c, 0) + 1, 1));
    at = bias_dims(c, dims) + 1;
    r->bias = (float *)must(calloc(at, sizeof(float)));
    r->plain_bias = (float *)must(calloc(at, sizeof(float)));
    r->d_bias = (double *)must(calloc(at, sizeof(double)));
    r->d_bias_terms = (double *)must(calloc(at, sizeof(double)));
    for (head = 0; head < c->heads; head++) {
        r->sinks[head] = element(5, (uint64_t)head);
        r->max_logit[head] = -INFINITY;
    }
    for (result = 0; result < RESULTS; result++) {
        size_t size = result_size(c, result);
        r->right[result] = (double *)must(calloc(size + 1, sizeof(double)));
        r->terms[result] = (double *)must(calloc(size + 1, sizeof(double)));
        r->plain[result] = (float *)must(calloc(size + 1, sizeof(float)));
        if (result == LSE)
            for (at = 0; at < size; at++) {
                r->right[LSE][at] = -INFINITY;
                r->plain[LSE][at] = -INFINITY;
            }
    }
    most += (size_t)longest(c, 1);
    keys = (seen_key *)must(malloc(most * sizeof *keys));
    s = (double *)must(malloc(2 * most * sizeof *s));
    s_plain = (float *)must(malloc(2 * most * sizeof *s_plain));
    for (seq = 0; seq < c->count; seq++)
        for (head = 0; head < c->heads; head++)
            for (i = 0; i < c->side[0][seq].len; i++) {
                size_t row = (size_t)(first_token(c, 0, seq) + i) * (size_t)c->heads + (size_t)head;
                size_t first = (size_t)first_token(c, 1, seq), kv_head = (size_t)(head / (c->heads / c->kv_heads));
                for (n = 0, j = 0; j < c->side[1][seq].len; j++)
                    if (sees(c, seq, i, j)) {
                        keys[n].row = (first + (size_t)j) * (size_t)c->kv_heads + kv_head;
                        keys[n].bias = c->bias ? bias_row(c, seq, head, i) + (size_t)j : 0;
                        r->bias[keys[n].bias] = rounded(element(6, keys[n].bias), dtype);
                        keys[n].distance = abs(after_diagonal(c, seq, i, j));
                        keys[n++].kept = keeps(c, seq, head, i, j);
                    }
                if (n == 0) {
                    if (c->sinks)
                        r->right[LSE][row] = r->plain[LSE][row] = r->sinks[head];
                    continue;
                }
                exact_row(r, row, keys, n, s);
                plain_row(r, row, keys, n, s_plain);
            }
    for (result = DQ; result <= DV; result++)
        for (at = 0; at < result_size(c, result); at++)
            r->plain[result][at] = rounded((result == DV ? 1.0f : c->scale) * r->plain[result][at], dtype);
    for (at = 0; at < bias_dims(c, dims); at++)
        r->plain_bias[at] = rounded(r->plain_bias[at], dtype);
    if (c->latent_dim > 0)
        contract_latents(&r->made, c, dtype, r->seen, r->right + DK, r->terms + DK, r->plain + DK);
    free(keys);
    free(s);
    free(s_plain);
    check_yardstick(r);
}

static inline void free_reference(reference *r) {
    int i;
    free(r->q), free(r->k), free(r->v), free(r->d_out), free(r->seen), free(r->looks), free(r->is_true[0]), free(r->is_true[1]);
    free(r->bias), free(r->plain_bias), free(r->d_bias), free(r->d_bias_terms);
    free_latents(&r->made);
    for (i = 0; i < RESULTS; i++)
        free(r->right[i]), free(r->terms[i]), free(r->plain[i]);
    memset(r, 0, sizeof *r);
}

static inline const char *result_name(int r) {
    static const char *const names[] = {"O", "LSE", "dQ", "dK", "dV"};
    return names[r];
}

static inline const char *dtype_name(cp_dtype d) {
    return d == CP_DTYPE_F32 ? "fp32" : d == CP_DTYPE_BF16 ? "bf16" : "fp16";
}

/* Error of one bucket of rows as a share of its bound; NaN if there is a NaN. */
static inline double bucket_ratio(const reference *r, int result, const float *got, int head, const int *rows, int n) {
    size_t heads = (size_t)result_heads(r->c, result), dim = (size_t)result_dim(r->c, result), i, d;
    double error = 0, plain = 0, size = 0, terms = 0, bound;
    for (i = 0; i < (size_t)n; i++)
        for (d = 0; d < dim; d++) {
            size_t at = ((size_t)rows[i] * heads + (size_t)head) * dim + d;
            double right = r->right[result][at];
            error += (got[at] - right) * (got[at] - right);
            plain += (r->plain[result][at] - right) * (r->plain[result][at] - right);
            size += right * right;
            terms += r->terms[result][at] * r->terms[result][at];
        }
    bound = (result == OUT ? 2 : 3) * sqrt(plain) + 4 * epsilon_of(r->dtype) * sqrt(size) + 1e-7 * sqrt(terms);
    return bound > 0 ? sqrt(error) / bound : error > 0 ? INFINITY : error;
}

/* Checks a global result. Returns the largest error as a share of its bound, at most 1; or something else after saying in `why` where
 * the contract is broken. */
static inline double check_result(const reference *r, int result, const float *got, char *why, size_t room) {
    const test_case *c = r->c;
    int side = result_side(result), heads = result_heads(c, result), dim = result_dim(c, result);
    int tokens = tokens_of(c, side), head, row, d, n, buckets, b;
    int *live = (int *)must(malloc(((size_t)tokens + 1) * sizeof *live));
    double worst = 0;
    float nothing = result == LSE ? -INFINITY : 0.0f;
    why[0] = 0;
    for (head = 0; head < heads && why[0] == 0; head++) {
        for (n = 0, row = 0; row < tokens && why[0] == 0; row++) {
            size_t at = (size_t)row * (size_t)heads + (size_t)head;
            if (result == LSE ? r->right[LSE][at] != -INFINITY : side == CP_SIDE_Q ? r->looks[row] != 0 : r->seen[row] != 0) {
                live[n++] = row;
                continue;
            }
            for (d = 0; d < dim; d++)
                if (!(got[at * (size_t)dim + (size_t)d] == nothing))
                    snprintf(why, room, "%s head %d row %d (%s): got %g, not %g", result_name(result), head, row,
                             r->is_true[side][row] ? "nothing to see" : "padding", got[at * (size_t)dim + (size_t)d], nothing);
        }
        buckets = n == 0 ? 0 : n < 64 ? 1 : n / 64;
        if (result == LSE)
            for (b = 0; b < n && why[0] == 0; b++) {
                size_t at = (size_t)live[b] * (size_t)heads + (size_t)head;
                double ratio = fabs(got[at] - r->right[LSE][at]) / 1e-5;
                worst = ratio > worst ? ratio : worst;
                if (!(ratio <= 1))
                    snprintf(why, room, "LSE head %d row %d: got %.9g, right is %.9g", head, live[b], got[at], r->right[LSE][at]);
            }
        else
            for (b = 0; b < buckets && why[0] == 0; b++) {
                int count = b + 1 == buckets ? n - 64 * b : 64;
                double ratio = bucket_ratio(r, result, got, head, live + 64 * b, count);
                worst = ratio > worst ? ratio : worst;
                if (!(ratio <= 1))
                    snprintf(why, room, "%s head %d rows %d..%d: error is %.3g of its bound", result_name(result), head, live[64 * b],
                             live[64 * b + count - 1], ratio);
            }
    }
    free(live);
    return why[0] != 0 ? INFINITY : worst;
}

/* Checks one of the numbers that are one per query head; the share of its bound, at most 1, as check_result. */
static inline double check_numbers(const reference *r, int gradient, const float *got, char *why, size_t room) {
    double worst = 0;
    int head;
    why[0] = 0;
    for (head = 0; head < r->c->heads && why[0] == 0; head++) {
        double right = gradient ? r->d_sinks[head] : r->max_logit[head];
        double bound = gradient ? (epsilon_of(r->dtype) + 1e-6) * r->d_sinks_terms[head] : 1e-5;
        double error = got[head] == right ? 0 : fabs(got[head] - right);
        if (!(error <= bound))
            snprintf(why, room, "%s head %d: got %.9g, right is %.9g, allowed is %.3g", gradient ? "d_sinks" : "max_logit", head, got[head],
                     right, bound);
        worst = error > worst * bound ? error / bound : worst;
    }
    return why[0] != 0 ? INFINITY : worst;
}

/* Checks the gradient of the bias, a global one: buckets of 64 of its rows, and 0 where no query and key use it. */
static inline double check_bias(const reference *r, const float *got, char *why, size_t room) {
    size_t dims[4], n = bias_dims(r->c, dims), from, i;
    double worst = 0;
    why[0] = 0;
    for (from = 0; from < n && why[0] == 0; from += 64 * dims[3]) {
        double error = 0, plain = 0, size = 0, terms = 0, bound, ratio;
        for (i = from; i < n && i < from + 64 * dims[3]; i++) {
            double right = r->d_bias[i];
            if (r->d_bias_terms[i] == 0 && !(got[i] == 0))
                snprintf(why, room, "d_bias element %zu: got %g, not 0", i, got[i]);
            error += (got[i] - right) * (got[i] - right);
            plain += (r->plain_bias[i] - right) * (r->plain_bias[i] - right);
            size += right * right;
            terms += r->d_bias_terms[i] * r->d_bias_terms[i];
        }
        bound = 3 * sqrt(plain) + 4 * epsilon_of(r->dtype) * sqrt(size) + 1e-7 * sqrt(terms);
        ratio = bound > 0 ? sqrt(error) / bound : error > 0 ? INFINITY : error;
        worst = ratio > worst ? ratio : worst;
        if (!(ratio <= 1))
            snprintf(why, room, "d_bias rows from element %zu: error is %.3g of its bound", from, ratio);
    }
    return why[0] != 0 ? INFINITY : worst;
}

#endif /* CP_TEST_ORACLE_H */
