/* The corpus: tests/data/cases.csv, described in tests/data/README.md. Cases, their masks and scores, their inputs and the `list` partition. */
#ifndef CP_TEST_CASE_H
#define CP_TEST_CASE_H

#include "context_parallel.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SEQS = 64, MOST_CASES = 256, MOST_STRETCHES = 4096, MOST_RANKS = 16, MOST_HEADS = 18, MOST_SLICES = 64, COLUMNS = 29 };
enum { BSHD, SBHD, THD };

typedef struct extent {
    int before, len, padded;
} extent;

/* One line of the corpus. `side[CP_SIDE_Q]` and `side[CP_SIDE_K]` hold the lengths. */
typedef struct test_case {
    char name[64], tags[64];
    int format, count;
    extent side[2][MOST_SEQS];
    int heads, kv_heads, dim_qk, dim_v;
    int causal, bottom_right, left, right; /* -1: no limit */
    cp_partition partition;
    int has_scale;
    float scale;
    float softcap, dropout; /* 0: none */
    int alibi;
    uint32_t bias; /* CP_BIAS_*; 0: none */
    cp_reach sinks, max_logit;
    int latent_dim, latent_rope; /* 0: none */
    int slice_count;
    cp_mask_slice slices[MOST_SLICES];
    cp_kv_wire kv_wire;
} test_case;

/* Key of the corpus' dropout. */
#define DROPOUT_SEED UINT64_C(0x0123456789abcdef)

/* Tells what is wrong with the test itself, and ends it. */
static inline void die(const char *what, const char *which) {
    fprintf(stderr, "test: %s: %s\n", what, which);
    exit(2);
}

static inline void *must(void *memory) {
    if (memory == NULL)
        die("out of memory", "");
    return memory;
}

static inline int word_of(const char *word, const char *const *words, int n, const char *name) {
    int i;
    for (i = 0; i < n; i++)
        if (strcmp(word, words[i]) == 0)
            return i;
    die(name, word);
    return -1;
}

/* A list of `count` numbers, one number for all, or `-` for the given ones. */
static inline void numbers(const char *text, int count, int *out, const int *absent) {
    int i, n = 0;
    char *end;
    if (strcmp(text, "-") == 0) {
        for (i = 0; i < count; i++)
            out[i] = absent == NULL ? 0 : absent[i];
        return;
    }
    while (*text != 0 && n < count) {
        out[n++] = (int)strtol(text, &end, 10);
        if (end == text)
            die("not a number", text);
        text = end;
    }
    if (n == 1)
        for (; n < count; n++)
            out[n] = out[0];
    if (n != count)
        die("too few numbers", text);
}

static inline void extents(extent *out, int count, const char *lens, const char *padded, const char *before) {
    int l[MOST_SEQS], p[MOST_SEQS], b[MOST_SEQS], i;
    numbers(lens, count, l, NULL);
    numbers(padded, count, p, l);
    numbers(before, count, b, NULL);
    for (i = 0; i < count; i++) {
        out[i].before = b[i];
        out[i].len = l[i];
        out[i].padded = p[i];
    }
}

/* Two numbers with a colon between them; what stands where, and which are there: 1 the first, 2 the second. Moves `text` behind them. */
static inline uint32_t pair(const char **text, long out[2]) {
    uint32_t there = 0;
    int n;
    for (n = 0; n < 2; n++) {
        char *end;
        out[n] = strtol(*text, &end, 10);
        there |= end == *text ? 0u : 1u << n;
        out[n] = end == *text ? 0 : out[n];
        if (n == 0 && *end++ != ':')
            die("not two numbers with a colon", *text);
        *text = end;
    }
    return there;
}

/* The slices: `seq/q0:q1/k0:k1`, some with `/lo:hi`. */
static inline void parse_slices(const char *text, test_case *c) {
    while (strcmp(text, "-") != 0 && *text != 0) {
        cp_mask_slice s;
        long q[2], k[2], band[2] = {0, 0};
        char *end;
        memset(&s, 0, sizeof s);
        s.sequence = (uint32_t)strtol(text, &end, 10);
        text = end + 1;
        if (*end != '/' || pair(&text, q) != 3 || *text++ != '/' || pair(&text, k) != 3 || c->slice_count == MOST_SLICES)
            die("slices that this reader cannot read", c->name);
        if (*text == '/') {
            text++;
            s.flags = pair(&text, band);
        }
        s.q_begin = (uint32_t)q[0];
        s.q_end = (uint32_t)q[1];
        s.k_begin = (uint32_t)k[0];
        s.k_end = (uint32_t)k[1];
        s.lo = (int32_t)band[0];
        s.hi = (int32_t)band[1];
        c->slices[c->slice_count++] = s;
        text += *text == ' ';
    }
}

static inline test_case parse_case(char *line) {
    static const char *const formats[] = {"bshd", "sbhd", "thd"};
    static const char *const partitions[] = {"zigzag", "contiguous", "striped", "list", "balanced"};
    static const char *const reaches[] = {"-", "rank", "group"};
    static const char *const biases[] = {"-", "1hss", "11ss", "b1ss", "bhss", "111s"};
    static const uint32_t full = CP_BIAS | CP_BIAS_QUERIES | CP_BIAS_GRADIENT;
    const uint32_t shapes[] = {0, full | CP_BIAS_HEADS, full, full | CP_BIAS_BATCH, full | CP_BIAS_BATCH | CP_BIAS_HEADS, CP_BIAS};
    static const char *const wires[] = {"-", "e4m3", "e5m2"};
    char *f[COLUMNS];
    test_case c;
    int n = 0;
    memset(&c, 0, sizeof c);
    for (f[n++] = line; *line != 0; line++)
        if (*line == ',') {
            *line = 0;
            if (n == COLUMNS)
                die("too many fields", f[0]);
            f[n++] = line + 1;
        }
    if (n != COLUMNS || strlen(f[0]) >= sizeof c.name || strlen(f[1]) >= sizeof c.tags || atoi(f[3]) > MOST_SEQS)
        die("a line that this reader cannot read", f[0]);
    strcpy(c.name, f[0]);
    strcpy(c.tags, f[1]);
    c.format = word_of(f[2], formats, 3, f[0]);
    c.count = atoi(f[3]);
    extents(c.side[0], c.count, f[4], f[6], f[8]);
    extents(c.side[1], c.count, f[5], f[7], f[9]);
    c.heads = atoi(f[10]);
    c.kv_heads = atoi(f[11]);
    c.dim_qk = atoi(f[12]);
    c.dim_v = atoi(f[13]);
    c.causal = atoi(f[14]);
    c.bottom_right = atoi(f[15]);
    c.left = strcmp(f[16], "-") == 0 ? -1 : atoi(f[16]);
    c.right = strcmp(f[17], "-") == 0 ? -1 : atoi(f[17]);
    c.partition = (cp_partition)word_of(f[18], partitions, 5, f[0]);
    c.has_scale = strcmp(f[19], "-") != 0;
    c.scale = c.has_scale ? (float)atof(f[19]) : 1.0f / sqrtf((float)c.dim_qk);
    c.softcap = strcmp(f[20], "-") == 0 ? 0 : (float)atof(f[20]);
    c.alibi = atoi(f[21]);
    c.dropout = strcmp(f[23], "-") == 0 ? 0 : (float)atof(f[23]);
    c.sinks = (cp_reach)word_of(f[24], reaches, 3, f[0]);
    c.max_logit = (cp_reach)word_of(f[25], reaches, 3, f[0]);
    c.bias = shapes[word_of(f[22], biases, 6, f[0])];
    parse_slices(f[26], &c);
    c.kv_wire = (cp_kv_wire)word_of(f[28], wires, 3, f[0]);
    if (strcmp(f[27], "-") != 0 && sscanf(f[27], "%d:%d", &c.latent_dim, &c.latent_rope) != 2)
        die("latent is dim:rope", f[0]);
    if (c.heads > MOST_HEADS)
        die("a case with more heads than this reader knows", f[0]);
    return c;
}

/* Reads the corpus; returns the number of cases. */
static inline int read_cases(const char *path, test_case *out) {
    static const char header[] = "name,tags,format,batch,lens_q,lens_k,padded_q,padded_k,before_q,before_k,heads,kv_heads,dim_qk,dim_v,"
                                 "causal,bottom_right,window_left,window_right,partition,scale,softcap,alibi,bias,dropout,sinks,max_logit,"
                                 "slices,latent,kv_wire";
    char line[4096];
    int n = 0;
    FILE *file = fopen(path, "r");
    if (file == NULL || fgets(line, sizeof line, file) == NULL)
        die("cannot read", path);
    line[strcspn(line, "\r\n")] = 0;
    if (strcmp(line, header) != 0)
        die("the header changed, this reader did not", path);
    while (fgets(line, sizeof line, file) != NULL) {
        line[strcspn(line, "\r\n")] = 0;
        if (n == MOST_CASES)
            die("too many cases", path);
        out[n++] = parse_case(line);
    }
    fclose(file);
    return n;
}

static inline int has_tag(const test_case *c, const char *tag) {
    const char *at = c->tags;
    size_t n = strlen(tag);
    while (*at != 0) {
        size_t word = strcspn(at, " ");
        if (word == n && strncmp(at, tag, n) == 0)
            return 1;
        at += word + (at[word] == ' ');
    }
    return 0;
}

/* How many keys key j is after the diagonal of query i of its sequence. Positions count from the first true token. */
static inline int after_diagonal(const test_case *c, int seq, int i, int j) {
    return j - i - (c->bottom_right ? c->side[1][seq].len - c->side[0][seq].len : 0);
}

/* May query i of a sequence see its key j? This is the definition of the mask. */
static inline int sees(const test_case *c, int seq, int i, int j) {
    int after = after_diagonal(c, seq, i, j), n, in = c->slice_count == 0;
    if (c->causal && after > 0)
        return 0;
    for (n = 0; n < c->slice_count && !in; n++) {
        const cp_mask_slice *s = &c->slices[n];
        in = (int)s->sequence == seq && (int)s->q_begin <= i && i < (int)s->q_end && (int)s->k_begin <= j && j < (int)s->k_end &&
             (!(s->flags & CP_SLICE_LO) || s->lo <= j - i) && (!(s->flags & CP_SLICE_HI) || j - i <= s->hi);
    }
    if (!in)
        return 0;
    return (c->left < 0 || after >= -c->left) && (c->causal || c->right < 0 || after <= c->right);
}

/* ALiBi: the slopes of all query heads. */
static inline const float *alibi_slopes(void) {
    static const float slopes[MOST_HEADS] = {0x1p-1f, 0x1p-2f, 0x1p-3f, 0x1p-4f, 0x1p-5f, 0x1p-6f, 0x1p-1f, 0x1p-2f, 0x1p-3f,
                                             0x1p-4f, 0x1p-5f, 0x1p-6f, 0x1p-1f, 0x1p-2f, 0x1p-3f, 0x1p-4f, 0x1p-5f, 0x1p-6f};
    return slopes;
}

/* The caller's number for a sequence. */
static inline uint32_t sequence_number(int seq) {
    return 7 * (uint32_t)seq + 3;
}

/* One word of Philox4x32-10: the counter is x, the key is DROPOUT_SEED, low halves first. */
static inline uint32_t random_word(uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3, int word) {
    uint32_t k0 = (uint32_t)DROPOUT_SEED, k1 = (uint32_t)(DROPOUT_SEED >> 32);
    int round;
    for (round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53 * x0, b = (uint64_t)0xCD9E8D57 * x2;
        x0 = (uint32_t)(b >> 32) ^ x1 ^ k0;
        x1 = (uint32_t)b;
        x2 = (uint32_t)(a >> 32) ^ x3 ^ k1;
        x3 = (uint32_t)a;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return word == 0 ? x0 : word == 1 ? x1 : word == 2 ? x2 : x3;
}

/* Does dropout keep the weight of key j for query i of a sequence? */
static inline int keeps(const test_case *c, int seq, int head, int i, int j) {
    return c->dropout == 0 || random_word((uint32_t)j / 4, (uint32_t)i, (uint32_t)head, sequence_number(seq), j % 4) >= floor(c->dropout * 0x1p32);
}

/* Tokens of a side, padding included. */
static inline int tokens_of(const test_case *c, int side) {
    int i, n = 0;
    for (i = 0; i < c->count; i++)
        n += c->side[side][i].padded;
    return n;
}

/* Global index of a sequence's first true token. */
static inline int first_token(const test_case *c, int side, int seq) {
    int i, n = c->side[side][seq].before;
    for (i = 0; i < seq; i++)
        n += c->side[side][i].padded;
    return n;
}

/* 1 for every true token, 0 for padding; the caller frees it. */
static inline char *true_tokens(const test_case *c, int side) {
    char *is_true = (char *)must(calloc((size_t)tokens_of(c, side) + 1, 1));
    int s;
    for (s = 0; s < c->count; s++)
        memset(is_true + first_token(c, side, s), 1, (size_t)c->side[side][s].len);
    return is_true;
}

/* Most padded tokens of a sequence. */
static inline int longest(const test_case *c, int side) {
    int s, most = 0;
    for (s = 0; s < c->count; s++)
        most = c->side[side][s].padded > most ? c->side[side][s].padded : most;
    return most;
}

/* [batch, heads, queries, keys] of the global bias; returns its number of elements, 0 without one. */
static inline size_t bias_dims(const test_case *c, size_t dims[4]) {
    dims[0] = c->bias & CP_BIAS_BATCH ? (size_t)c->count : 1;
    dims[1] = c->bias & CP_BIAS_HEADS ? (size_t)c->heads : 1;
    dims[2] = !(c->bias & CP_BIAS_QUERIES) ? 1 : c->format == THD ? (size_t)tokens_of(c, 0) : (size_t)longest(c, 0);
    dims[3] = c->bias ? (size_t)longest(c, 1) : 0;
    return dims[0] * dims[1] * dims[2] * dims[3];
}

/* Index in the global bias of query i of a sequence and its sequence's first true key. */
static inline size_t bias_row(const test_case *c, int seq, int head, int i) {
    size_t dims[4], b = c->bias & CP_BIAS_BATCH ? (size_t)seq : 0, h = c->bias & CP_BIAS_HEADS ? (size_t)head : 0, row;
    bias_dims(c, dims);
    row = !(c->bias & CP_BIAS_QUERIES) ? 0 : (size_t)(i + (c->format == THD ? first_token(c, 0, seq) : c->side[0][seq].before));
    return ((b * dims[1] + h) * dims[2] + row) * dims[3] + (size_t)c->side[1][seq].before;
}

/* SplitMix64's output for counter n. */
static inline uint64_t mix(uint64_t n) {
    uint64_t z = (n + 1) * UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* Element `index` of global tensor `id`: Q 1, K 2, V 3, dO 4, sinks 5, bias 6, latents 7, their weights 8 and 9. Exact in fp32. */
static inline float element(uint64_t id, uint64_t index) {
    uint64_t z = mix((id << 40) + index);
    uint64_t sum = (z & 0xFFFF) + (z >> 16 & 0xFFFF) + (z >> 32 & 0xFFFF) + (z >> 48);
    return ((float)sum - 131070.0f) / 32768.0f;
}

static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* fp32 to the bits of a storage type: nearest, ties to even. */
static inline uint32_t encode(float x, cp_dtype dtype) {
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & 0x7FFFFFFF;
    if (dtype == CP_DTYPE_F32)
        return u;
    if (dtype == CP_DTYPE_BF16)
        return a > 0x7F800000 ? (u >> 16 | 0x40) : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
    if (a > 0x7F800000)
        return sign | 0x7E00;
    if (a >= 0x477FF000)
        return sign | 0x7C00;
    if (a < 0x38800000) /* below the least normal: in 1/2 the last place of fp32 is that of a subnormal fp16 */
        return sign | (bits_of(float_of(a) + 0.5f) - bits_of(0.5f));
    return sign | (a + 0xFFF + (a >> 13 & 1) - 0x38000000) >> 13;
}

static inline float decode(uint32_t bits, cp_dtype dtype) {
    uint32_t sign = (bits & 0x8000) << 16, a = bits & 0x7FFF;
    if (dtype == CP_DTYPE_F32)
        return float_of(bits);
    if (dtype == CP_DTYPE_BF16)
        return float_of(bits << 16);
    if (a >= 0x7C00)
        return float_of(sign | 0x7F800000 | (a & 0x3FF) << 13);
    if (a < 0x400)
        return (sign ? -1.0f : 1.0f) * (float)a * (1.0f / 16777216.0f);
    return float_of(sign | ((a << 13) + 0x38000000));
}

static inline float rounded(float x, cp_dtype dtype) {
    return dtype == CP_DTYPE_F32 ? x : decode(encode(x, dtype), dtype);
}

/* The nearest number with so many mantissa bits and the least exponent of a normal number, ties to even. */
static inline double nearest(double x, int mantissa, int least) {
    int exponent;
    double step;
    frexp(x, &exponent);
    step = ldexp(1, (exponent - 1 > least ? exponent - 1 : least) - mantissa);
    return rint(x / step) * step;
}

/* What is left of n <= 32 elements that travelled as 8-bit numbers with a common power of two. */
static inline void travelled(float *x, int n, cp_kv_wire to, cp_dtype dtype) {
    int mantissa = to == CP_KV_WIRE_E4M3 ? 3 : 2, least = to == CP_KV_WIRE_E4M3 ? -6 : -14, e = -127, i;
    double top = to == CP_KV_WIRE_E4M3 ? 448 : 57344, largest = 0;
    double most = dtype == CP_DTYPE_F16 ? 65504 : float_of(dtype == CP_DTYPE_BF16 ? 0x7F7F0000 : 0x7F7FFFFF);
    for (i = 0; i < n && isfinite(x[i]); i++)
        largest = fabs((double)x[i]) > largest ? fabs((double)x[i]) : largest;
    if (i < n)
        largest = NAN;
    while (largest == largest && nearest(ldexp(largest, -e), mantissa, least) > top)
        e++;
    for (i = 0; i < n; i++) {
        double back = ldexp(nearest(ldexp((double)x[i], -e), mantissa, least), e);
        x[i] = largest != largest ? NAN : (float)(back > most ? most : back < -most ? -most : back);
    }
}

/* The sequences of a case as the library wants them. The arrays live in here. */
typedef struct sequences {
    cp_sequences s;
    int32_t lens[2][MOST_SEQS], before[2][MOST_SEQS], cu[2][2 * MOST_SEQS + 1], cu_padded[2][2 * MOST_SEQS + 1];
    cp_stretch stretches[2][MOST_STRETCHES];
    uint32_t counts[2][MOST_RANKS];
    uint32_t numbers[2 * MOST_SEQS]; /* the caller's own, for dropout */
} sequences;

/* The corpus' own partition: blocks of 5 positions dealt by a hash; odd ranks hold their blocks of a sequence in descending order. */
static inline void list_partition(const test_case *c, int side, int ranks, sequences *out) {
    int rank, seq, at = 0, i;
    for (rank = 0; rank < ranks; rank++) {
        int from = at;
        for (seq = 0; seq < c->count; seq++) {
            int padded = c->side[side][seq].padded, blocks = (padded + 4) / 5;
            for (i = 0; i < blocks; i++) {
                int b = rank % 2 == 1 ? blocks - 1 - i : i;
                uint64_t document = c->format == THD ? (uint64_t)seq : 0;
                if (mix(((uint64_t)side << 62) + (document << 31) + (uint64_t)b) % (uint64_t)ranks != (uint64_t)rank)
                    continue;
                if (at == MOST_STRETCHES)
                    die("too many stretches", c->name);
                out->stretches[side][at].seq = (uint32_t)seq;
                out->stretches[side][at].start = (uint32_t)b * 5;
                out->stretches[side][at].step = 1;
                out->stretches[side][at].len = (uint32_t)(padded - b * 5 < 5 ? padded - b * 5 : 5);
                at++;
            }
        }
        out->counts[side][rank] = (uint32_t)(at - from);
    }
}

/* Fills `out` for a group of `ranks`. With `explicit_k`, the key side is spelt out even where NULL would say the same. Packed sequences know
 * no padding before the tokens: such a document becomes an empty one and itself, which a contiguous partition of the buffer cannot tell. */
static inline void make_sequences(const test_case *c, int ranks, int explicit_k, sequences *out) {
    int side, i, n = 0, same = 1, trivial[2] = {1, 1};
    memset(out, 0, sizeof *out);
    out->s.struct_size = (uint32_t)sizeof out->s;
    for (side = 0; side < 2; side++) {
        n = 0;
        for (i = 0; i < c->count; i++) {
            extent e = c->side[side][i];
            same &= e.before == c->side[0][i].before && e.len == c->side[0][i].len && e.padded == c->side[0][i].padded;
            trivial[side] &= e.before == 0 && e.len == e.padded;
            out->lens[side][i] = e.len;
            out->before[side][i] = e.before;
            if (c->format == THD && (c->side[0][i].before > 0 || c->side[1][i].before > 0)) {
                if (c->partition != CP_PARTITION_CONTIGUOUS || c->slice_count > 0)
                    die("padding before packed tokens needs a contiguous partition here, and no slices", c->name);
                out->cu[side][n + 1] = out->cu[side][n];
                out->cu_padded[side][n + 1] = out->cu_padded[side][n] + e.before;
                n++;
                e.padded -= e.before;
            }
            out->numbers[n] = sequence_number(i);
            out->cu[side][n + 1] = out->cu[side][n] + e.len;
            out->cu_padded[side][n + 1] = out->cu_padded[side][n] + e.padded;
            n++;
        }
    }
    explicit_k = explicit_k || !same;
    if (c->format == THD) {
        out->s.count = (uint32_t)n;
        out->s.cu_seqlens_q = out->cu[0];
        out->s.cu_seqlens_k = explicit_k ? out->cu[1] : NULL;
        out->s.cu_seqlens_q_padded = trivial[0] ? NULL : out->cu_padded[0];
        out->s.cu_seqlens_k_padded = explicit_k && !trivial[1] ? out->cu_padded[1] : NULL;
    } else {
        out->s.count = (uint32_t)c->count;
        out->s.seq_q = (uint32_t)c->side[0][0].padded;
        out->s.seq_k = explicit_k ? (uint32_t)c->side[1][0].padded : 0;
        out->s.lens_q = trivial[0] ? NULL : out->lens[0];
        out->s.before_q = trivial[0] ? NULL : out->before[0];
        out->s.lens_k = explicit_k && !trivial[1] ? out->lens[1] : NULL;
        out->s.before_k = explicit_k && !trivial[1] ? out->before[1] : NULL;
    }
    out->s.slices = c->slice_count > 0 ? c->slices : NULL;
    out->s.slice_count = (uint64_t)c->slice_count;
    if (c->partition == CP_PARTITION_LIST) {
        list_partition(c, 0, ranks, out);
        list_partition(c, 1, ranks, out);
        out->s.list_q = out->stretches[0];
        out->s.list_q_counts = out->counts[0];
        out->s.list_k = out->stretches[1];
        out->s.list_k_counts = out->counts[1];
    }
}

#endif /* CP_TEST_CASE_H */
