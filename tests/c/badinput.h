/* The collective half of badinput.c: passes with one wrong argument, ranks that disagree, groups that are lost. Ranks are threads. */
#ifndef CP_TEST_BADINPUT_H
#define CP_TEST_BADINPUT_H

#include "expect.h"

#include <math.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CANARY ((uintptr_t)0x5A5A5A50)

enum { TOKENS = 16, HEADS = 4, KV_HEADS = 2, DIM = 8, SAVED = 1 << 16 };

static cp_group_config alone(void) {
    cp_group_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = (uint32_t)sizeof c;
    c.size = 1;
    return c;
}

static cp_attention_config small_layer(void) {
    cp_attention_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = (uint32_t)sizeof c;
    c.flags = CP_ATTENTION_CAUSAL | CP_ATTENTION_SAVE;
    c.heads = HEADS;
    c.kv_heads = KV_HEADS;
    c.head_dim_qk = DIM;
    c.dtype = CP_DTYPE_F32;
    c.threads = 1;
    return c;
}

static cp_comm_config ring(void) {
    cp_comm_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = (uint32_t)sizeof c;
    return c;
}

static cp_sequences dense(uint32_t length) {
    cp_sequences s;
    memset(&s, 0, sizeof s);
    s.struct_size = (uint32_t)sizeof s;
    s.count = 1;
    s.seq_q = length;
    return s;
}

/* One rank with a layer, tensors and good arguments. */
typedef struct side {
    int rank, size;
    cp_unique_id id;
    cp_group *group;
    cp_attention *layer;
    cp_sequences s;
    cp_context context;
    cp_forward_args f;
    cp_backward_args b;
    float q[TOKENS * HEADS * DIM], k[TOKENS * KV_HEADS * DIM], v[TOKENS * KV_HEADS * DIM], d_out[TOKENS * HEADS * DIM];
    /* What passes write, and what the first good ones wrote. */
    struct outputs {
        float out[TOKENS * HEADS * DIM], lse[TOKENS * HEADS], dq[TOKENS * HEADS * DIM], dk[TOKENS * KV_HEADS * DIM];
        float dv[TOKENS * KV_HEADS * DIM], d_sinks[HEADS], max_logit[HEADS];
        float d_bias[HEADS * TOKENS * TOKENS];
        float d_latent[TOKENS * DIM], d_up_k[HEADS * DIM * DIM], d_up_v[HEADS * DIM * DIM];
    } o, good;
    float sinks[HEADS], bias[HEADS * TOKENS * TOKENS];
    float latent[TOKENS * DIM], up_k[HEADS * DIM * DIM], up_v[HEADS * DIM * DIM];
    void *memory, *saved;
    void (*body)(struct side *);
} side;

static cp_tensor rows(float *data, int tokens, int heads) {
    cp_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.device_type = CP_DEVICE_CPU;
    t.dtype_code = CP_CODE_FLOAT;
    t.dtype_bits = 32;
    t.dtype_lanes = 1;
    t.ndim = 4;
    t.shape[0] = 1;
    t.shape[1] = tokens;
    t.shape[2] = heads;
    t.shape[3] = DIM;
    t.stride[0] = tokens * heads * DIM;
    t.stride[1] = heads * DIM;
    t.stride[2] = DIM;
    t.stride[3] = 1;
    return t;
}

static cp_tensor per_head(float *data) {
    cp_tensor t = rows(data, 1, 1);
    t.ndim = 1;
    t.shape[0] = HEADS;
    t.stride[0] = 1;
    return t;
}

/* [1, heads, queries, keys] */
static cp_tensor per_pair(float *data, int queries) {
    cp_tensor t = rows(data, 1, 1);
    t.shape[1] = HEADS;
    t.shape[2] = queries;
    t.shape[3] = TOKENS;
    t.stride[0] = HEADS * queries * TOKENS;
    t.stride[1] = queries * TOKENS;
    t.stride[2] = TOKENS;
    return t;
}

static void fill(float *x, size_t n, int seed) {
    size_t i;
    for (i = 0; i < n; i++)
        x[i] = sinf((float)(i * 7 + (size_t)seed * 13));
}

/* Group, layer with its group, and arguments that work. */
static void side_open(side *s, cp_transport_kind kind, uint64_t timeout_ms) {
    cp_group_config g = alone();
    cp_attention_config config = small_layer();
    cp_comm_config comm = ring();
    int n = TOKENS / s->size;
    comm.comm_type = CP_COMM_A2A;
    g.rank = (uint32_t)s->rank;
    g.size = (uint32_t)s->size;
    g.id = &s->id;
    g.transport_kind = kind;
    g.timeout_ms = timeout_ms;
    GOOD(cp_group_init(&g, &s->group));
    GOOD(cp_attention_create(&config, &s->layer));
    GOOD(cp_set_group(s->layer, s->group, &comm));
    fill(s->q, TOKENS * HEADS * DIM, 1);
    fill(s->k, TOKENS * KV_HEADS * DIM, 2);
    fill(s->v, TOKENS * KV_HEADS * DIM, 3);
    fill(s->d_out, TOKENS * HEADS * DIM, 4);
    s->s = dense(TOKENS);
    s->memory = malloc(SAVED + 128);
    s->saved = (char *)s->memory + 64 - (uintptr_t)s->memory % 64;
    memset(&s->f, 0, sizeof s->f);
    s->f.struct_size = (uint32_t)sizeof s->f;
    s->f.sequences = &s->s;
    s->f.q = rows(s->q, n, HEADS);
    s->f.k = rows(s->k, n, KV_HEADS);
    s->f.v = rows(s->v, n, KV_HEADS);
    s->f.out = rows(s->o.out, n, HEADS);
    s->f.lse = rows(s->o.lse, n, HEADS);
    s->f.lse.ndim = 3;
    s->f.lse.shape[1] = HEADS;
    s->f.lse.shape[2] = n;
    s->f.lse.stride[0] = HEADS * n;
    s->f.lse.stride[1] = n;
    s->f.lse.stride[2] = 1;
    s->f.saved = s->saved;
    s->f.saved_bytes = SAVED;
    s->f.context = &s->context;
    memset(&s->b, 0, sizeof s->b);
    s->b.struct_size = (uint32_t)sizeof s->b;
    s->b.sequences = &s->s;
    s->b.context = &s->context;
    s->b.q = s->f.q;
    s->b.k = s->f.k;
    s->b.v = s->f.v;
    s->b.out = s->f.out;
    s->b.lse = s->f.lse;
    s->b.d_out = rows(s->d_out, n, HEADS);
    s->b.dq = rows(s->o.dq, n, HEADS);
    s->b.dk = rows(s->o.dk, n, KV_HEADS);
    s->b.dv = rows(s->o.dv, n, KV_HEADS);
    s->b.saved = s->saved;
    s->b.saved_bytes = SAVED;
}

static void side_close(side *s) {
    GOOD(cp_attention_destroy(s->layer));
    GOOD(cp_group_destroy(s->group));
    free(s->memory);
}

/* The arguments as they should be still work, and give the same bits. */
static int works(side *s) {
    memset(&s->o, 0x77, sizeof s->o);
    if (!GOOD(cp_attention_forward(s->layer, &s->f, NULL)) || !GOOD(cp_attention_backward(s->layer, &s->b, NULL)))
        return 0;
    return memcmp(&s->o, &s->good, sizeof s->o) == 0;
}

/* The last rank was wrong: its own error there, elsewhere one that names it; nothing was written. */
static void refused(side *s, int line, const char *change, cp_status got, cp_status wanted, const char *words, const char *call,
                    const struct outputs *before, const cp_context *context) {
    char named[256];
    snprintf(named, sizeof named, "rank %d refused %s: %s", s->size - 1, call, words);
    if (s->rank == s->size - 1)
        expect_at("badinput.h", line, change, got, wanted, words);
    else
        expect_at("badinput.h", line, change, got, CP_ERR_MISMATCH, named);
    true_at("badinput.h", line, "nothing was written", memcmp(before, &s->o, sizeof s->o) == 0);
    true_at("badinput.h", line, "the context was not written", memcmp(context, &s->context, sizeof *context) == 0);
}

/* `change` spoils `a`, `p`, `sequences` or `stream` of the last rank. */
#define PASS(pass, args_type, args, wanted, words, change)                                                                  \
    do {                                                                                                                    \
        args_type a = args, *p = &a;                                                                                        \
        cp_sequences sequences = s->s;                                                                                      \
        void *stream = NULL;                                                                                                \
        struct outputs before;                                                                                              \
        cp_context context = s->context;                                                                                    \
        cp_status got;                                                                                                      \
        a.sequences = &sequences;                                                                                           \
        before = s->o;                                                                                                      \
        if (s->rank == s->size - 1) {                                                                                       \
            change;                                                                                                         \
        }                                                                                                                   \
        got = pass(s->layer, p, stream);                                                                                    \
        refused(s, __LINE__, #change, got, wanted, words, #pass, &before, &context);                                        \
    } while (0)
#define FORWARD(wanted, words, change) PASS(cp_attention_forward, cp_forward_args, s->f, wanted, words, change)
#define BACKWARD(wanted, words, change) PASS(cp_attention_backward, cp_backward_args, s->b, wanted, words, change)
#define INVALID CP_ERR_INVALID_ARGUMENT

/* Everything that can be wrong with one tensor of a pass. */
#define TENSOR(PASS_, t, output)                                                                                            \
    do {                                                                                                                    \
        PASS_(INVALID, #t ".data: got", a.t.data = NULL);                                                                   \
        PASS_(INVALID, #t ".data: got", a.t.data = (char *)a.t.data + 2);                                                   \
        PASS_(CP_ERR_UNSUPPORTED, #t ".device_type: got 2", a.t.device_type = CP_DEVICE_CUDA);                              \
        PASS_(INVALID, #t ".device_id: got 1", a.t.device_id = 1);                                                          \
        PASS_(INVALID, #t ".dtype: got (code, bits, lanes) = (4, 32, 1)", a.t.dtype_code = CP_CODE_BFLOAT);                 \
        PASS_(INVALID, #t ".dtype: got (code, bits, lanes) = (2, 16, 1)", a.t.dtype_bits = 16);                             \
        PASS_(INVALID, #t ".dtype: got (code, bits, lanes) = (2, 32, 2)", a.t.dtype_lanes = 2);                             \
        PASS_(INVALID, #t ".ndim: got 2", a.t.ndim = 2);                                                                    \
        PASS_(INVALID, #t ".ndim: got 4294967295", a.t.ndim = UINT32_MAX);                                                  \
        PASS_(INVALID, #t ".reserved", a.t.reserved = 1);                                                                   \
        PASS_(INVALID, #t ": got shape", a.t.shape[0] = 2);                                                                 \
        PASS_(INVALID, #t ": got shape", a.t.shape[1] += 1);                                                                \
        PASS_(INVALID, #t ": got shape", a.t.shape[2] -= 1);                                                                \
        PASS_(INVALID, #t ".shape[1]: got -1", a.t.shape[1] = -1);                                                          \
        PASS_(INVALID, #t ".shape[0]: got 9223372036854775807", a.t.shape[0] = INT64_MAX);                                  \
        PASS_(INVALID, #t ".stride[1]: got -8", a.t.stride[1] = -8);                                                        \
        PASS_(INVALID, #t ".stride[2]: got 9223372036854775807", a.t.stride[2] = INT64_MAX);                                \
        if (output) {                                                                                                       \
            PASS_(INVALID, #t ".stride: 0 elements overlap", a.t.stride[1] = 0);                                            \
            PASS_(INVALID, #t ".stride: 4 elements overlap", (a.t.stride[1] = 4, a.t.stride[2] = 4));                       \
        }                                                                                                                   \
    } while (0)

#define ROWS(PASS_, t)                                                                                                      \
    do {                                                                                                                    \
        PASS_(INVALID, #t ": got shape", a.t.shape[3] = 4);                                                                 \
        PASS_(INVALID, #t ".stride[3]: got 2", a.t.stride[3] = 2);                                                          \
    } while (0)

/* Memory that the caller may bring. */
#define BUFFERS(PASS_)                                                                                                      \
    do {                                                                                                                    \
        PASS_(INVALID, "args.workspace: got NULL with 64 bytes", a.workspace_bytes = 64);                                   \
        PASS_(INVALID, "workspace: got address", (a.workspace = (char *)s->saved + 32, a.workspace_bytes = SAVED));         \
        PASS_(INVALID, "args.saved: got NULL with", a.saved = NULL);                                                        \
        if (s->size > 1) {                                                                                                  \
            PASS_(CP_ERR_OUT_OF_MEMORY, "workspace: got 1 bytes", (a.workspace = s->saved, a.workspace_bytes = 1));         \
            PASS_(CP_ERR_OUT_OF_MEMORY, "saved: got 0 bytes", (a.saved = NULL, a.saved_bytes = 0));                         \
            PASS_(CP_ERR_OUT_OF_MEMORY, "saved: got 64 bytes", a.saved_bytes = 64);                                         \
            PASS_(INVALID, "saved: got address", a.saved = (char *)s->saved + 4);                                           \
        }                                                                                                                   \
    } while (0)

/* The frame of the arguments. */
#define FRAME(PASS_)                                                                                                        \
    do {                                                                                                                    \
        PASS_(INVALID, "args: got NULL", p = NULL);                                                                         \
        PASS_(INVALID, "args: got a pointer that is not aligned", p = (void *)((char *)p + 4));                             \
        PASS_(INVALID, "args.struct_size: got 0", a.struct_size = 0);                                                       \
        PASS_(INVALID, "args.flags: got", a.flags = 2);                                                                 \
        PASS_(INVALID, "stream: got", stream = s);                                                                          \
        PASS_(INVALID, "sequences: got NULL", a.sequences = NULL);                                                          \
        PASS_(INVALID, "sequences.flags", sequences.flags = 1);                                                             \
        PASS_(INVALID, "sequences.count: got 0", sequences.count = 0);                                                      \
    } while (0)

static void wrong_forward(side *s) {
    const uint32_t number = 1;
    const cp_mask_slice beyond = {0, 0, 99999, 0, 1, 0, 0, 0};
    struct {
        cp_forward_args a;
        uint64_t tail;
    } wide;
    memset(&wide, 0, sizeof wide);
    FRAME(FORWARD);
    FORWARD(CP_ERR_VERSION, "args: byte", (wide.a = a, wide.a.struct_size = sizeof wide, wide.tail = 1, p = &wide.a));
    FORWARD(INVALID, "q.", a.struct_size = 16); /* the rest is zero */
    FORWARD(INVALID, "args.context: got", a.context = (cp_context *)(void *)((char *)s->memory + 1));
    FORWARD(INVALID, "q: got shape", sequences.seq_q = 20);
    FORWARD(INVALID, "k: got shape", sequences.seq_k = 20);
    FORWARD(INVALID, "q: got shape", sequences.count = 2);
    FORWARD(INVALID, "sequences.slice_count: got 1", sequences.slice_count = 1);
    FORWARD(INVALID, "slices[0]: got queries 0", (sequences.slices = &beyond, sequences.slice_count = 1));
    FORWARD(INVALID, "args.sinks: given, but the layer was created without", a.sinks = per_head(s->sinks));
    FORWARD(INVALID, "args.max_logit: given, but the layer was created without", a.max_logit = per_head(s->o.max_logit));
    FORWARD(INVALID, "args.bias: given, but the layer was created without", a.bias = per_pair(s->bias, 2));
    FORWARD(INVALID, "args.latent: given, but the layer was created without", a.latent = a.k);
    FORWARD(INVALID, "args.up_k: given, but the layer was created without", a.up_k = a.k);
    FORWARD(INVALID, "args.up_v: given, but the layer was created without", a.up_v = a.k);
    FORWARD(INVALID, "args.dropout_seed: without dropout", a.dropout_seed = 1);
    FORWARD(INVALID, "args.sequence_ids: got", a.sequence_ids = &number);
    TENSOR(FORWARD, q, 0);
    TENSOR(FORWARD, k, 0);
    TENSOR(FORWARD, v, 0);
    TENSOR(FORWARD, out, 1);
    TENSOR(FORWARD, lse, 1);
    ROWS(FORWARD, q);
    ROWS(FORWARD, k);
    ROWS(FORWARD, v);
    ROWS(FORWARD, out);
    BUFFERS(FORWARD);
}

static void wrong_backward(side *s) {
    const uint32_t number = 1;
    cp_context unknown = s->context, another = s->context;
    struct {
        cp_backward_args a;
        uint64_t tail;
    } wide;
    memset(&wide, 0, sizeof wide);
    unknown.attached ^= 1;
    another.problem ^= 1;
    FRAME(BACKWARD);
    BACKWARD(CP_ERR_VERSION, "args: byte", (wide.a = a, wide.a.struct_size = sizeof wide, wide.tail = 1, p = &wide.a));
    BACKWARD(INVALID, "args.context: got", a.struct_size = 16);
    BACKWARD(INVALID, "args.context: got", a.context = NULL);
    BACKWARD(INVALID, "args.context: got", a.context = (cp_context *)(void *)((char *)s->memory + 1));
    BACKWARD(INVALID, "context: made by another layer", a.context = &unknown);
    BACKWARD(INVALID, "context: belongs to problem", a.context = &another);
    BACKWARD(INVALID, "context: belongs to problem", sequences.seq_q = 20);
    BACKWARD(INVALID, "args.sinks: given, but the layer was created without", a.sinks = per_head(s->sinks));
    BACKWARD(INVALID, "args.d_sinks: given, but the layer was created without", a.d_sinks = per_head(s->o.d_sinks));
    BACKWARD(INVALID, "args.bias: given, but the layer was created without", a.bias = per_pair(s->bias, 2));
    BACKWARD(INVALID, "args.d_bias: given, but the layer was created without", a.d_bias = per_pair(s->o.d_bias, 2));
    BACKWARD(INVALID, "args.latent: given, but the layer was created without", a.latent = a.k);
    BACKWARD(INVALID, "args.d_latent: given, but the layer was created without", a.d_latent = a.k);
    BACKWARD(INVALID, "args.d_up_v: given, but the layer was created without", a.d_up_v = a.k);
    BACKWARD(INVALID, "args.sequence_ids: got", a.sequence_ids = &number);
    TENSOR(BACKWARD, q, 0);
    TENSOR(BACKWARD, k, 0);
    TENSOR(BACKWARD, v, 0);
    TENSOR(BACKWARD, out, 0);
    TENSOR(BACKWARD, lse, 0);
    TENSOR(BACKWARD, d_out, 0);
    TENSOR(BACKWARD, dq, 1);
    TENSOR(BACKWARD, dk, 1);
    TENSOR(BACKWARD, dv, 1);
    ROWS(BACKWARD, q);
    ROWS(BACKWARD, d_out);
    ROWS(BACKWARD, dq);
    ROWS(BACKWARD, dk);
    ROWS(BACKWARD, dv);
    BUFFERS(BACKWARD);
}

static void wrong_passes(side *s) {
    cp_attention_config tight = small_layer();
    memset(&s->context, 0, sizeof s->context);
    side_open(s, CP_TRANSPORT_AUTO, 30000);
    BAD("context: made by another layer", cp_attention_backward(s->layer, &s->b, NULL)); /* before any forward */
    works(s);
    s->good = s->o;
    wrong_forward(s);
    TRUE_(works(s));
    wrong_backward(s);
    TRUE_(works(s));
    EXPECT(CP_ERR_INVALID_HANDLE, "attention: got NULL", cp_attention_forward(NULL, &s->f, NULL));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_attention_backward((cp_attention *)s->group, &s->b, NULL));
    GOOD(cp_attention_destroy(s->layer));
    tight.max_tokens_per_rank = 7;
    GOOD(cp_attention_create(&tight, &s->layer));
    GOOD(cp_set_group(s->layer, s->group, NULL));
    EXPECT(CP_ERR_OUT_OF_MEMORY, "tokens per rank: got", cp_attention_forward(s->layer, &s->f, NULL));
    side_close(s);
}

/* Everything that can be wrong with a tensor of one number per head. */
#define PER_HEAD(PASS_, t, output)                                                                                          \
    do {                                                                                                                    \
        PASS_(INVALID, #t ".data: got 0x0", a.t.data = NULL);                                    \
        PASS_(INVALID, "args." #t ": got NULL, the layer asks for it", memset(&a.t, 0, sizeof a.t));                        \
        PASS_(INVALID, #t ".data: got", a.t.data = (char *)a.t.data + 2);                                                   \
        PASS_(CP_ERR_UNSUPPORTED, #t ".device_type: got 2", a.t.device_type = CP_DEVICE_CUDA);                              \
        PASS_(INVALID, #t ".dtype: got (code, bits, lanes) = (4, 16, 1)", (a.t.dtype_code = CP_CODE_BFLOAT, a.t.dtype_bits = 16)); \
        PASS_(INVALID, #t ".ndim: got 2, must be 1 for [heads]", a.t.ndim = 2);                                             \
        PASS_(INVALID, #t ".reserved", a.t.reserved = 1);                                                                   \
        PASS_(INVALID, #t ": got shape [3], must be [4]", a.t.shape[0] = HEADS - 1);                                        \
        PASS_(INVALID, #t ".shape[0]: got -1", a.t.shape[0] = -1);                                                          \
        PASS_(INVALID, #t ".stride[0]: got -1", a.t.stride[0] = -1);                                                        \
        if (output)                                                                                                         \
            PASS_(INVALID, #t ".stride: 0 elements overlap", a.t.stride[0] = 0);                                            \
    } while (0)

/* And with the bias or its gradient. */
#define PER_PAIR(PASS_, t, output)                                                                                          \
    do {                                                                                                                    \
        PASS_(INVALID, #t ".data: got 0x0", a.t.data = NULL);                                    \
        PASS_(INVALID, #t ".data: got", a.t.data = (char *)a.t.data + 2);                                                   \
        PASS_(CP_ERR_UNSUPPORTED, #t ".device_type: got 2", a.t.device_type = CP_DEVICE_CUDA);                              \
        PASS_(INVALID, #t ".dtype: got (code, bits, lanes) = (4, 16, 1)", (a.t.dtype_code = CP_CODE_BFLOAT, a.t.dtype_bits = 16)); \
        PASS_(INVALID, #t ".ndim: got 3", a.t.ndim = 3);                                                                    \
        PASS_(INVALID, #t ": got shape", a.t.shape[0] = 2);                                                                 \
        PASS_(INVALID, #t ": got shape", a.t.shape[1] = 1);                                                                 \
        PASS_(INVALID, #t ": got shape", a.t.shape[2] -= 1);                                                                \
        PASS_(INVALID, #t ": got shape", a.t.shape[3] -= 1);                                                                \
        PASS_(INVALID, #t ".stride[3]: got 2", a.t.stride[3] = 2);                                                          \
        if (output)                                                                                                         \
            PASS_(INVALID, #t ".stride: 0 elements overlap", a.t.stride[1] = 0);                                            \
    } while (0)

/* A layer with scores beyond scale·q·k: what belongs to them wrong in turn, and ranks that do not agree about what is dropped. */
static void wrong_scores(side *s) {
    static const float slopes[HEADS] = {0.5f, 0.25f, 0.125f, 0.0625f};
    static const uint32_t numbers[2] = {7, 8};
    cp_attention_config config = small_layer();
    cp_comm_config comm = ring();
    cp_forward_args other;
    config.softcap = 2;
    config.alibi_slopes = slopes;
    config.dropout = 0.25f;
    config.sinks = CP_REACH_GROUP;
    config.max_logit = CP_REACH_RANK;
    config.bias = CP_BIAS | CP_BIAS_HEADS | CP_BIAS_QUERIES | CP_BIAS_GRADIENT;
    comm.comm_type = CP_COMM_A2A;
    side_open(s, CP_TRANSPORT_AUTO, 30000);
    GOOD(cp_attention_destroy(s->layer));
    GOOD(cp_attention_create(&config, &s->layer));
    GOOD(cp_set_group(s->layer, s->group, &comm));
    fill(s->sinks, HEADS, 5);
    fill(s->bias, HEADS * TOKENS * TOKENS, 6);
    s->f.bias = s->b.bias = per_pair(s->bias, TOKENS / s->size);
    s->b.d_bias = per_pair(s->o.d_bias, TOKENS / s->size);
    s->f.sinks = s->b.sinks = per_head(s->sinks);
    s->f.max_logit = per_head(s->o.max_logit);
    s->b.d_sinks = per_head(s->o.d_sinks);
    s->f.dropout_seed = 99;
    works(s);
    s->good = s->o;
    PER_HEAD(FORWARD, sinks, 0);
    PER_HEAD(FORWARD, max_logit, 1);
    PER_PAIR(FORWARD, bias, 0);
    FORWARD(INVALID, "args.sequence_ids: got", a.sequence_ids = (const uint32_t *)((const char *)numbers + 1));
    TRUE_(works(s));
    PER_HEAD(BACKWARD, sinks, 0);
    PER_HEAD(BACKWARD, d_sinks, 1);
    PER_PAIR(BACKWARD, bias, 0);
    PER_PAIR(BACKWARD, d_bias, 1);
    BACKWARD(INVALID, "args.sequence_ids: got", a.sequence_ids = (const uint32_t *)((const char *)numbers + 1));
    TRUE_(works(s));
    if (s->size > 1) {
        cp_backward_args back = s->b;
        other = s->f;
        other.dropout_seed += (uint64_t)s->rank;
        EXPECT(CP_ERR_MISMATCH, "asks for another problem: it calls cp_attention_forward", cp_attention_forward(s->layer, &other, NULL));
        other = s->f;
        other.sequence_ids = numbers + s->rank;
        EXPECT(CP_ERR_MISMATCH, "asks for another problem: it calls cp_attention_forward", cp_attention_forward(s->layer, &other, NULL));
        back.sequence_ids = numbers + s->rank;
        EXPECT(INVALID, "sequence_ids: not those that forward had", cp_attention_backward(s->layer, &back, NULL));
        TRUE_(works(s));
    }
    side_close(s);
}

#include "badlatent.h"

static void *run_side(void *p) {
    side *s = (side *)p;
    s->body(s);
    return NULL;
}

/* The ranks of one group, each a thread. */
static void on_ranks(int size, void (*body)(side *)) {
    pthread_t threads[2];
    side *sides = (side *)calloc((size_t)size, sizeof *sides);
    int i;
    GOOD(cp_get_unique_id(&sides[0].id));
    for (i = 0; i < size; i++) {
        sides[i].id = sides[0].id;
        sides[i].rank = i;
        sides[i].size = size;
        sides[i].body = body;
        pthread_create(&threads[i], NULL, run_side, &sides[i]);
    }
    for (i = 0; i < size; i++)
        pthread_join(threads[i], NULL);
    free(sides);
}

static void passes(int size) {
    on_ranks(size, wrong_passes);
    on_ranks(size, wrong_scores);
    on_ranks(size, wrong_latents);
}

/* Both ranks see that they disagree; `words` say about what. */
#define DISAGREE(words, call) EXPECT(CP_ERR_MISMATCH, words, call)

static void set_group_differs(side *s, const char *words, cp_attention_config config, cp_comm_config comm) {
    cp_attention *layer = NULL;
    GOOD(cp_attention_create(&config, &layer));
    DISAGREE(words, cp_set_group(layer, s->group, &comm));
    GOOD(cp_attention_destroy(layer));
}

static void disagree(side *s) {
    int odd = s->rank == 1;
    cp_attention_config c = small_layer();
    cp_comm_config comm = ring();
    cp_attention *layer = NULL;
    cp_group *mine = NULL;
    cp_sequences as_long;
    cp_forward_args a;
    uint32_t order[2];
    side_open(s, CP_TRANSPORT_AUTO, 30000);
    works(s);
    s->good = s->o;
    /* Layers of other kinds. */
    c.dtype = odd ? CP_DTYPE_BF16 : CP_DTYPE_F32;
    set_group_differs(s, "asks for another problem: it calls cp_set_group", c, comm);
    c = small_layer();
    c.flags &= odd ? ~(uint32_t)CP_ATTENTION_CAUSAL : ~(uint32_t)0;
    set_group_differs(s, "asks for another problem: it calls cp_set_group", c, comm);
    c = small_layer();
    comm.comm_type = odd ? CP_COMM_A2A : CP_COMM_P2P;
    set_group_differs(s, "asks for another problem: it calls cp_set_group", c, comm);
    /* A communication that one rank cannot read. */
    comm.comm_type = odd ? 9 : CP_COMM_P2P;
    GOOD(cp_attention_create(&c, &layer));
    if (odd)
        BAD("comm.comm_type: got 9", cp_set_group(layer, s->group, &comm));
    else
        DISAGREE("rank 1 refused cp_set_group: comm.comm_type: got 9", cp_set_group(layer, s->group, &comm));
    comm.comm_type = CP_COMM_P2P;
    GOOD(cp_set_group(layer, s->group, &comm));
    GOOD(cp_attention_destroy(layer));
    /* Another call, another problem, another list of ranks. */
    if (odd)
        DISAGREE("is in another call", cp_group_barrier(s->group));
    else
        DISAGREE("is in another call", cp_attention_forward(s->layer, &s->f, NULL));
    if (odd)
        DISAGREE("is in another call", cp_attention_backward(s->layer, &s->b, NULL));
    else
        DISAGREE("is in another call", cp_attention_forward(s->layer, &s->f, NULL));
    as_long = s->s;
    as_long.seq_k = odd ? TOKENS : TOKENS + 1; /* of 17 keys rank 0 would hold 9 */
    a = s->f;
    a.sequences = &as_long;
    if (odd)
        DISAGREE("rank 0 refused cp_attention_forward: k: got shape", cp_attention_forward(s->layer, &a, NULL));
    else
        BAD("k: got shape", cp_attention_forward(s->layer, &a, NULL));
    {
        /* The same rows here, another mask there: 16 true tokens, or 15 and one of padding. */
        static const int32_t sixteen[] = {TOKENS}, fifteen[] = {TOKENS - 1};
        as_long = s->s;
        as_long.lens_q = as_long.lens_k = odd ? fifteen : sixteen;
        DISAGREE("asks for another problem: it calls cp_attention_forward", cp_attention_forward(s->layer, &a, NULL));
    }
    order[0] = (uint32_t)odd;
    order[1] = (uint32_t)!odd;
    GOOD(cp_group_subset(s->group, order, 2, &mine));
    GOOD(cp_set_group(s->layer, mine, NULL));
    DISAGREE("calls another list of ranks", cp_attention_forward(s->layer, &s->f, NULL));
    GOOD(cp_group_destroy(mine));
    comm.comm_type = CP_COMM_A2A;
    GOOD(cp_set_group(s->layer, s->group, &comm));
    TRUE_(works(s));
    side_close(s);
}

/* Ranks that cannot even make a group: another size, another kind. */
static void no_group(side *s) {
    cp_group_config g = alone();
    cp_group *group = (cp_group *)CANARY;
    g.rank = (uint32_t)s->rank;
    g.size = s->rank == 1 ? 3 : 2;
    g.id = &s->id;
    g.timeout_ms = 5000;
    DISAGREE("rank 1 joins a group of 3 ranks, rank 0 a group of 2", cp_group_init(&g, &group));
    TRUE_(group == (cp_group *)CANARY);
}

static void no_kind(side *s) {
    cp_group_config g = alone();
    cp_group *group = (cp_group *)CANARY;
    g.rank = (uint32_t)s->rank;
    g.size = 2;
    g.id = &s->id;
    g.transport_kind = s->rank == 1 ? CP_TRANSPORT_LOCAL : CP_TRANSPORT_SHM;
    g.timeout_ms = 5000;
    DISAGREE("rank", cp_group_init(&g, &group));
    TRUE_(group == (cp_group *)CANARY);
}

static void disagreements(void) {
    on_ranks(2, disagree);
    on_ranks(2, no_group);
    on_ranks(2, no_kind);
}

static void nap(long ms) {
    struct timespec t;
    t.tv_sec = ms / 1000;
    t.tv_nsec = ms % 1000 * 1000000;
    nanosleep(&t, NULL);
}

/* A rank that does not come. */
static void absent(side *s) {
    side_open(s, CP_TRANSPORT_AUTO, 300);
    if (s->rank == 0) {
        EXPECT(CP_ERR_TIMEOUT, "rank 1", cp_attention_forward(s->layer, &s->f, NULL));
        EXPECT(CP_ERR_TIMEOUT, "the group is lost since", cp_attention_forward(s->layer, &s->f, NULL));
        EXPECT(CP_ERR_TIMEOUT, "the group is lost since", cp_set_group(s->layer, s->group, NULL));
        GOOD(cp_set_group(s->layer, NULL, NULL)); /* the layer itself is fine */
    } else {
        nap(900);
    }
    side_close(s);
}

/* A rank that leaves. */
static void leaves(side *s) {
    side_open(s, CP_TRANSPORT_AUTO, 30000);
    if (s->rank == 0)
        EXPECT(CP_ERR_PEER_LOST, "rank 1", cp_attention_forward(s->layer, &s->f, NULL));
    side_close(s);
}

static void *interfere(void *p) {
    side *s = (side *)p;
    size_t bytes;
    nap(100);
    EXPECT(CP_ERR_INVALID_USAGE, "attention: is in use by another thread", cp_attention_workspace_size(s->layer, 16, &bytes));
    EXPECT(CP_ERR_INVALID_USAGE, "attention: is in use by another thread", cp_attention_destroy(s->layer));
    GOOD(cp_group_abort(s->group));
    return NULL;
}

/* A call that is ended from another thread. */
static void aborted(side *s) {
    pthread_t thread;
    side_open(s, CP_TRANSPORT_AUTO, 30000);
    if (s->rank == 0) {
        pthread_create(&thread, NULL, interfere, s);
        EXPECT(CP_ERR_ABORTED, "rank 0", cp_attention_forward(s->layer, &s->f, NULL));
        pthread_join(thread, NULL);
    } else {
        nap(300);
    }
    EXPECT(CP_ERR_ABORTED, "", cp_group_barrier(s->group));
    EXPECT(CP_ERR_ABORTED, "the group is lost since", cp_group_barrier(s->group));
    side_close(s);
}

static void lost_groups(void) {
    on_ranks(2, absent);
    on_ranks(2, leaves);
    on_ranks(2, aborted);
}

#endif /* CP_TEST_BADINPUT_H */
