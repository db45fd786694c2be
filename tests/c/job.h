/* One rank's part of one case: its rows in a layout of many, forward and backward, and the results at their global places. Memory that
 * nobody may touch (padding between rows, around tensors and buffers) is checked afterwards. */
#ifndef CP_TEST_JOB_H
#define CP_TEST_JOB_H

#include "gpu.h"
#include "oracle.h"

enum { GUARD = 64, UNTOUCHED = 0xFF };

/* What a run varies besides its case, storage and communication type: bits of a number. */
enum {
    VARY_LAYOUT = 3,     /* bits 0 and 1, differently on every rank */
    VARY_SAVE = 4,       /* head-split tensors are kept for backward */
    VARY_WORKSPACE = 8,  /* the caller's workspace, of the size that the query says */
    VARY_WIRE = 16,      /* gradients travel as fp32 */
    VARY_THREADS = 32,   /* two threads; on CUDA the deterministic kernels */
    VARY_STAGES = 64,    /* p2p: one stage, a2a+p2p: all ranks inside or outside */
    VARY_EXPLICIT = 128, /* the key side is spelt out */
    VARY_RELAY = 256     /* p2p: the neighbour ring; with the bit above, the number of stages is chosen under a cap */
};

/* 0 when every tensor shall end where its memory ends, so that valgrind sees a read beyond. */
static size_t guard_bytes = GUARD;

/* A local tensor [batch, seq, heads, dim] in memory of its own. */
typedef struct local {
    cp_tensor t;
    cp_dtype dtype;
    unsigned char *memory, *copy; /* on the host; the elements' own memory on the CPU */
    device_pointer device;        /* a rank on CUDA: as many bytes there */
    size_t bytes, at;             /* all bytes, and where the first element is */
    size_t shape[4], stride[4];
} local;

static inline size_t element_bytes(cp_dtype d) {
    return d == CP_DTYPE_F32 ? 4 : 2;
}

/* What a tensor has for every token: rows of heads, a number per head (the LSE), or nothing: then it is one number per head (sinks). And the
 * bias, [batch, heads, queries, keys]: rows of keys. */
enum { ROWS, STATISTIC, PER_HEAD, KEYS };

/* `layout`: 0 bshd, 1 sbhd, 2 heads first, 3 with gaps everywhere and not aligned to more than is asked for: an element, on CUDA 16 bytes. */
static inline void local_make(local *l, cp_dtype dtype, int packed, int kind, size_t b, size_t s, size_t h, size_t d, int layout, int null) {
    size_t span = 1, i, n = element_bytes(dtype), step = here == NULL ? n : 16, gap = layout == 3 && kind % 3 == 0 ? (here == NULL ? 3 : 16 / n) : 0;
    size_t order[4][4] = {{0, 1, 2, 3}, {1, 0, 2, 3}, {0, 2, 1, 3}, {0, 1, 2, 3}}; /* outermost first */
    size_t shape[4] = {b, s, h, d};
    memset(l, 0, sizeof *l);
    l->dtype = dtype;
    for (i = 4; i-- > 0;) {
        size_t axis = order[kind % 3 == 0 ? layout : 2 - layout % 2][i];
        l->shape[axis] = shape[axis];
        l->stride[axis] = span;
        if (shape[axis] > 0)
            span = span * shape[axis] + (i > 0 ? gap : 0);
    }
    for (i = 0, span = 1; i < 4; i++)
        span = shape[i] == 0 || span == 0 ? 0 : span + (shape[i] - 1) * l->stride[i];
    l->at = guard_bytes + (layout == 3 ? step : 0);
    l->bytes = l->at + span * n + guard_bytes;
    l->memory = (unsigned char *)must(malloc(l->bytes + 1));
    memset(l->memory, UNTOUCHED, l->bytes);
    if (here != NULL)
        l->device = gpu_alloc(l->bytes);
    l->t.data = span == 0 && null ? NULL : here == NULL ? (void *)(l->memory + l->at) : (void *)(uintptr_t)(l->device + l->at);
    l->t.device_type = place_type();
    l->t.device_id = place_id();
    l->t.dtype_code = dtype == CP_DTYPE_BF16 ? CP_CODE_BFLOAT : CP_CODE_FLOAT;
    l->t.dtype_bits = (uint8_t)(n * 8);
    l->t.dtype_lanes = 1;
    {
        /* The tensor's axes as axes of [batch, seq, heads, dim]. */
        static const size_t axes[8][4] = {{0, 1, 2, 3}, {1, 2, 3, 0}, {0, 2, 1, 0}, {2, 1, 0, 0},
                                          {2, 0, 0, 0}, {2, 0, 0, 0}, {0, 2, 1, 3}, {0, 2, 1, 3}};
        const size_t *axis = axes[kind * 2 + packed];
        l->t.ndim = kind == KEYS ? 4 : kind == PER_HEAD ? 1 : (uint32_t)(4 - kind - packed);
        for (i = 0; i < l->t.ndim; i++) {
            l->t.shape[i] = (int64_t)shape[axis[i]];
            l->t.stride[i] = (int64_t)l->stride[axis[i]];
        }
    }
}

/* Byte offset of the first element of a row's head; rows count through batch entries. */
static inline size_t local_at(const local *l, size_t row, size_t head) {
    size_t s = l->shape[1];
    return l->at + (row / s * l->stride[0] + row % s * l->stride[1] + head * l->stride[2]) * element_bytes(l->dtype);
}

static inline void local_put(local *l, size_t row, size_t head, size_t d, float x) {
    uint32_t bits = encode(x, l->dtype);
    uint16_t half = (uint16_t)bits;
    size_t at = local_at(l, row, head) + d * l->stride[3] * element_bytes(l->dtype);
    memcpy(l->memory + at, l->dtype == CP_DTYPE_F32 ? (void *)&bits : (void *)&half, element_bytes(l->dtype));
}

static inline float local_get(const local *l, size_t row, size_t head, size_t d) {
    uint32_t bits = 0;
    uint16_t half = 0;
    size_t at = local_at(l, row, head) + d * l->stride[3] * element_bytes(l->dtype);
    memcpy(l->dtype == CP_DTYPE_F32 ? (void *)&bits : (void *)&half, l->memory + at, element_bytes(l->dtype));
    return decode(l->dtype == CP_DTYPE_F32 ? bits : half, l->dtype);
}

/* Inputs: the same bytes as before? Outputs: nothing written but elements? */
static inline int local_intact(const local *l) {
    size_t row, head, d, i, n = element_bytes(l->dtype), bad = 0;
    unsigned char *ours;
    if (l->copy != NULL)
        return memcmp(l->memory, l->copy, l->bytes) == 0;
    ours = (unsigned char *)must(calloc(l->bytes + 1, 1));
    for (row = 0; row < l->shape[0] * l->shape[1]; row++)
        for (head = 0; head < l->shape[2]; head++)
            for (d = 0; d < l->shape[3]; d++)
                memset(ours + local_at(l, row, head) + d * l->stride[3] * n, 1, n);
    for (i = 0; i < l->bytes; i++)
        bad += !ours[i] && l->memory[i] != UNTOUCHED;
    free(ours);
    return bad == 0;
}

/* A caller's buffer, aligned to 64, with guards. */
typedef struct buffer {
    unsigned char *memory, *at; /* on the host */
    device_pointer device;
    void *given; /* what the library gets */
    size_t bytes;
} buffer;

static inline void buffer_make(buffer *b, size_t bytes) {
    b->memory = (unsigned char *)must(malloc(bytes + 2 * GUARD + 64));
    memset(b->memory, UNTOUCHED, bytes + 2 * GUARD + 64);
    b->at = b->memory + GUARD + (64 - ((uintptr_t)b->memory + GUARD) % 64) % 64;
    b->bytes = bytes;
    b->given = b->at;
    if (here != NULL) {
        b->device = gpu_alloc(bytes + 2 * GUARD);
        gpu_write(b->device, b->at - GUARD, bytes + 2 * GUARD);
        b->given = (void *)(uintptr_t)(b->device + GUARD);
    }
}

/* On CUDA the rank's stream is empty. */
static inline int buffer_intact(const buffer *b) {
    size_t i;
    if (b->device != 0)
        gpu_read(b->at - GUARD, b->device, b->bytes + 2 * GUARD);
    for (i = 0; b->memory != NULL && i < GUARD; i++)
        if (b->at[-1 - (long)i] != UNTOUCHED || b->at[b->bytes + i] != UNTOUCHED)
            return 0;
    return 1;
}

enum { T_Q, T_K, T_V, T_D_OUT, T_SINKS, T_BIAS, T_LATENT, T_UP_K, T_UP_V, T_OUT, T_LSE, T_DQ, T_DK, T_DV, T_D_SINKS, T_MAX_LOGIT, T_D_BIAS,
       T_D_LATENT, T_D_UP_K, T_D_UP_V, TENSORS };

typedef struct job {
    const test_case *c;
    cp_dtype dtype;
    cp_attention *layer;
    int ranks, rank;
    unsigned vary;
    sequences seq;
    uint32_t *rows[2]; /* global tokens of this rank's rows */
    size_t count[2];
    local t[TENSORS];
    buffer saved, workspace;
    cp_context context;
    int failed;
} job;

static inline int job_ok(job *j, cp_status status, const char *what) {
    if (status == CP_OK)
        return 1;
    fprintf(stderr, "rank %d: %s, %s: %s: %s\n", j->rank, j->c->name, dtype_name(j->dtype), what, cp_last_error());
    j->failed = 1;
    return 0;
}

static inline cp_attention_config layer_config(const test_case *c, cp_dtype dtype, unsigned vary) {
    cp_attention_config k;
    memset(&k, 0, sizeof k);
    k.struct_size = (uint32_t)sizeof k;
    k.flags = (c->causal ? (uint32_t)CP_ATTENTION_CAUSAL : 0) | (c->bottom_right ? (uint32_t)CP_ATTENTION_BOTTOM_RIGHT : 0) |
              (c->left >= 0 ? (uint32_t)CP_ATTENTION_WINDOW_LEFT : 0) | (c->right >= 0 ? (uint32_t)CP_ATTENTION_WINDOW_RIGHT : 0) |
              (vary & VARY_SAVE ? (uint32_t)CP_ATTENTION_SAVE : 0) | (vary & VARY_WIRE ? (uint32_t)CP_ATTENTION_WIRE_F32 : 0);
    k.heads = (uint32_t)c->heads;
    k.kv_heads = c->kv_heads == c->heads ? 0 : (uint32_t)c->kv_heads;
    k.head_dim_qk = (uint32_t)c->dim_qk;
    k.head_dim_v = c->dim_v == c->dim_qk ? 0 : (uint32_t)c->dim_v;
    k.dtype = dtype;
    k.format = c->format == THD ? CP_FORMAT_PACKED : CP_FORMAT_DENSE;
    k.partition = c->partition;
    k.window_left = c->left >= 0 ? (uint32_t)c->left : 0;
    k.window_right = c->right >= 0 ? (uint32_t)c->right : 0;
    k.softmax_scale = c->has_scale ? c->scale : 0;
    k.softcap = c->softcap;
    k.dropout = c->dropout;
    k.alibi_slopes = c->alibi ? alibi_slopes() : NULL;
    k.sinks = c->sinks;
    k.max_logit = c->max_logit;
    k.bias = c->bias;
    k.latent_dim = (uint32_t)c->latent_dim;
    k.latent_rope = (uint32_t)c->latent_rope;
    k.kv_wire = c->kv_wire;
    k.threads = here != NULL ? 0 : vary & VARY_THREADS ? 2 : 1;
    k.device_type = place_type();
    k.device_id = place_id();
    if (here != NULL && vary & VARY_THREADS)
        k.flags |= CP_ATTENTION_DETERMINISTIC;
    return k;
}

static inline cp_comm_config comm_config(cp_comm_type type, int ranks, unsigned vary) {
    cp_comm_config k;
    memset(&k, 0, sizeof k);
    k.struct_size = (uint32_t)sizeof k;
    k.comm_type = type;
    if (type == CP_COMM_P2P && ranks > 1)
        switch (vary & (VARY_STAGES | VARY_RELAY)) {
        case VARY_STAGES: k.stages = 1; break;
        case VARY_RELAY: k.flags = CP_COMM_RELAY; break;
        case VARY_STAGES | VARY_RELAY:
            k.stages = CP_STAGES_AUTO;
            k.memory_cap_bytes = (uint64_t)1 << 40;
            break;
        }
    if (type == CP_COMM_A2A_P2P && vary & VARY_STAGES) {
        k.level_count = 2;
        k.level_sizes[vary & VARY_RELAY ? 0 : 1] = (uint32_t)ranks;
        k.level_sizes[vary & VARY_RELAY ? 1 : 0] = 1;
    }
    return k;
}

/* Where in the global bias a row of this rank's begins; rows count through batch entries. */
static inline size_t job_bias_row(const job *j, size_t row, size_t head) {
    const test_case *c = j->c;
    size_t dims[4], batch = c->format == THD ? 1 : (size_t)c->count, per = j->count[0] / batch, entry = 0, position = 0;
    bias_dims(c, dims);
    if (c->bias & CP_BIAS_QUERIES) {
        entry = row / per;
        position = j->rows[0][row] - (c->format == THD ? 0 : entry * (size_t)c->side[0][0].padded);
    } else {
        entry = row;
    }
    return ((entry * dims[1] + head) * dims[2] + position) * dims[3];
}

/* Inputs and results of the bias: 1 for what a true query and key use, for all of the global tensor; the caller frees it. */
static inline char *bias_used(const test_case *c) {
    size_t dims[4], n = bias_dims(c, dims);
    char *used = (char *)must(calloc(n + 1, 1));
    int seq, head, i;
    for (seq = 0; seq < c->count; seq++)
        for (head = 0; head < c->heads; head++)
            for (i = 0; i < c->side[0][seq].len; i++)
                memset(used + bias_row(c, seq, head, i), 1, (size_t)c->side[1][seq].len);
    return used;
}

/* This rank's bias, or the memory for its gradient. */
static inline void job_bias(job *j, local *l, int layout, int gradient) {
    const test_case *c = j->c;
    size_t dims[4], batch = c->format == THD ? 1 : (size_t)c->count, row, head, k;
    char *used = bias_used(c);
    bias_dims(c, dims);
    local_make(l, j->dtype, c->format == THD, KEYS, dims[0], c->bias & CP_BIAS_QUERIES ? j->count[0] / batch : 1, dims[1], dims[3], layout,
               j->rank % 2);
    for (row = 0; !gradient && row < l->shape[0] * l->shape[1]; row++)
        for (head = 0; head < dims[1]; head++)
            for (k = 0; k < dims[3]; k++) {
                size_t at = job_bias_row(j, row, head) + k;
                local_put(l, row, head, k, used[at] ? element(6, at) : NAN);
            }
    free(used);
}

/* Latents (0) or weights (1, 2) of a case with them, or the memory for their gradients. */
static inline void job_latent(job *j, local *l, int which, int layout, int gradient) {
    const test_case *c = j->c;
    size_t shape[3], batch = c->format == THD ? 1 : (size_t)c->count, row, head, d, i;
    char *is_true = true_tokens(c, 1);
    latent_shape(c, which, shape);
    if (which == D_LATENT) {
        local_make(l, j->dtype, c->format == THD, ROWS, batch, j->count[1] / batch, 1, shape[2], layout, j->rank % 2);
    } else {
        local_make(l, gradient ? CP_DTYPE_F32 : j->dtype, 0, KEYS, 1, shape[1], shape[0], shape[2], layout, 0);
        l->t.ndim = 3; /* [heads, rows, dim] */
        for (i = 0; i < 4; i++) {
            l->t.shape[i] = i < 3 ? l->t.shape[i + 1] : 0;
            l->t.stride[i] = i < 3 ? l->t.stride[i + 1] : 0;
        }
    }
    for (row = 0; !gradient && row < l->shape[0] * l->shape[1]; row++)
        for (head = 0; head < l->shape[2]; head++)
            for (d = 0; d < shape[2]; d++) {
                size_t global = which == D_LATENT ? j->rows[1][row] : head * shape[1] + row;
                float x = latent_element(c, which, global * shape[2] + d);
                local_put(l, row, head, d, which == D_LATENT && !is_true[global] ? NAN : x);
            }
    free(is_true);
}

/* This rank's rows of a case on a group of `ranks`, inputs filled in. The layer may get its group later. */
static inline void job_make(job *j, const test_case *c, cp_dtype dtype, cp_attention *layer, int ranks, int rank, unsigned vary) {
    int packed = c->format == THD, side, i;
    size_t batch = packed ? 1 : (size_t)c->count, row, head, d;
    memset(j, 0, sizeof *j);
    j->c = c;
    j->dtype = dtype;
    j->layer = layer;
    j->ranks = ranks;
    j->rank = rank;
    j->vary = vary;
    make_sequences(c, ranks, (vary & VARY_EXPLICIT) != 0, &j->seq);
    for (side = 0; side < 2; side++) {
        cp_format format = packed ? CP_FORMAT_PACKED : CP_FORMAT_DENSE;
        size_t n = 0;
        if (!job_ok(j,
                    cp_partition_tokens(c->partition, format, &j->seq.s, (uint32_t)ranks, (uint32_t)rank, (cp_side)side, NULL, 0, &n),
                    "cp_partition_tokens"))
            return;
        j->rows[side] = (uint32_t *)must(malloc((n + 1) * sizeof(uint32_t)));
        j->count[side] = n;
        job_ok(j,
               cp_partition_tokens(c->partition, format, &j->seq.s, (uint32_t)ranks, (uint32_t)rank, (cp_side)side, j->rows[side], n, &n),
               "cp_partition_tokens");
    }
    for (i = 0; i < TENSORS; i++) {
        int key = i == T_K || i == T_V || i == T_DK || i == T_DV, qk = i == T_Q || i == T_K || i == T_DQ || i == T_DK;
        int kind = i == T_LSE ? STATISTIC : i == T_SINKS || i == T_D_SINKS || i == T_MAX_LOGIT ? PER_HEAD : ROWS;
        int layout = (int)(((vary & VARY_LAYOUT) + (unsigned)rank + (unsigned)i * (vary & 1)) % 4);
        size_t heads = (size_t)(key ? c->kv_heads : c->heads), dim = kind != ROWS ? 1 : (size_t)(qk ? c->dim_qk : c->dim_v);
        if (kind == PER_HEAD && (i == T_MAX_LOGIT ? c->max_logit : c->sinks) == CP_REACH_NONE)
            continue; /* no such tensor */
        if (c->latent_dim > 0 && key)
            continue; /* made of latents */
        if ((i >= T_LATENT && i <= T_UP_V) || i >= T_D_LATENT) {
            int gradient = i >= T_D_LATENT;
            if (c->latent_dim > 0)
                job_latent(j, &j->t[i], i - (gradient ? T_D_LATENT : T_LATENT), layout, gradient);
        } else if (i == T_BIAS || i == T_D_BIAS) {
            if (i == T_BIAS ? c->bias : c->bias & CP_BIAS_QUERIES)
                job_bias(j, &j->t[i], layout, i == T_D_BIAS);
        } else
            local_make(&j->t[i], kind == ROWS ? dtype : CP_DTYPE_F32, packed, kind, kind == PER_HEAD ? 1 : batch,
                   kind == PER_HEAD ? 1 : j->count[key] / batch, heads, dim, c->format == SBHD && layout == 0 ? 1 : layout, rank % 2);
        for (head = 0; i == T_SINKS && head < heads; head++)
            local_put(&j->t[i], 0, head, 0, element(5, head));
        if (i <= T_D_OUT) {
            char *is_true = true_tokens(c, key);
            for (row = 0; row < j->count[key]; row++)
                for (head = 0; head < heads; head++)
                    for (d = 0; d < dim; d++) {
                        size_t token = j->rows[key][row];
                        uint64_t index = (token * heads + head) * dim + d;
                        local_put(&j->t[i], row, head, d, is_true[token] ? element((uint64_t)i + 1, index) : NAN);
                    }
            free(is_true);
        }
        if (here != NULL)
            gpu_write(j->t[i].device, j->t[i].memory, j->t[i].bytes);
        if (i > T_UP_V || j->t[i].memory == NULL)
            continue;
        j->t[i].copy = (unsigned char *)must(malloc(j->t[i].bytes + 1));
        memcpy(j->t[i].copy, j->t[i].memory, j->t[i].bytes);
    }
}

/* Most rows that any rank of the job's group holds. */
static inline size_t job_most_rows(const job *j) {
    size_t most = 0, n;
    int rank, side;
    for (rank = 0; rank < j->ranks; rank++)
        for (side = 0; side < 2; side++) {
            if (cp_partition_tokens(j->c->partition, j->c->format == THD ? CP_FORMAT_PACKED : CP_FORMAT_DENSE, &j->seq.s,
                                    (uint32_t)j->ranks, (uint32_t)rank, (cp_side)side, NULL, 0, &n) == CP_OK)
                most = n > most ? n : most;
        }
    return most;
}

/* The layer has the job's group. */
static inline int job_forward(job *j) {
    cp_forward_args a;
    size_t bytes;
    if (j->failed)
        return 0;
    memset(&a, 0, sizeof a);
    a.struct_size = (uint32_t)sizeof a;
    a.sequences = &j->seq.s;
    a.q = j->t[T_Q].t;
    a.k = j->t[T_K].t;
    a.v = j->t[T_V].t;
    a.out = j->t[T_OUT].t;
    a.lse = j->t[T_LSE].t;
    a.sinks = j->t[T_SINKS].t;
    a.max_logit = j->t[T_MAX_LOGIT].t;
    a.bias = j->t[T_BIAS].t;
    a.latent = j->t[T_LATENT].t;
    a.up_k = j->t[T_UP_K].t;
    a.up_v = j->t[T_UP_V].t;
    if (j->c->dropout > 0) {
        a.dropout_seed = DROPOUT_SEED;
        a.sequence_ids = j->seq.numbers;
    }
    a.context = &j->context;
    if (!job_ok(j, cp_attention_saved_size(j->layer, &j->seq.s, &bytes), "cp_attention_saved_size"))
        return 0;
    if (bytes > 0) {
        buffer_make(&j->saved, bytes);
        a.saved = j->saved.given;
        a.saved_bytes = bytes;
    }
    if (j->vary & VARY_WORKSPACE) {
        if (!job_ok(j, cp_attention_workspace_size(j->layer, (uint32_t)job_most_rows(j), &bytes), "cp_attention_workspace_size"))
            return 0;
        buffer_make(&j->workspace, bytes);
        a.workspace = j->workspace.given;
        a.workspace_bytes = bytes;
    }
    return job_ok(j, cp_attention_forward(j->layer, &a, gpu_stream()), "cp_attention_forward");
}

/* After forward; the layer may have another group by now. */
static inline int job_backward(job *j) {
    cp_backward_args a;
    if (j->failed)
        return 0;
    memset(&a, 0, sizeof a);
    a.struct_size = (uint32_t)sizeof a;
    a.sequences = &j->seq.s;
    a.context = &j->context;
    a.q = j->t[T_Q].t;
    a.k = j->t[T_K].t;
    a.v = j->t[T_V].t;
    a.out = j->t[T_OUT].t;
    a.lse = j->t[T_LSE].t;
    a.d_out = j->t[T_D_OUT].t;
    a.dq = j->t[T_DQ].t;
    a.dk = j->t[T_DK].t;
    a.dv = j->t[T_DV].t;
    a.sinks = j->t[T_SINKS].t;
    a.d_sinks = j->t[T_D_SINKS].t;
    a.bias = j->t[T_BIAS].t;
    a.d_bias = j->t[T_D_BIAS].t;
    a.latent = j->t[T_LATENT].t;
    a.up_k = j->t[T_UP_K].t;
    a.up_v = j->t[T_UP_V].t;
    a.d_latent = j->t[T_D_LATENT].t;
    a.d_up_k = j->t[T_D_UP_K].t;
    a.d_up_v = j->t[T_D_UP_V].t;
    a.sequence_ids = j->c->dropout > 0 ? j->seq.numbers : NULL;
    a.saved = j->saved.given;
    a.saved_bytes = j->saved.bytes;
    a.workspace = j->workspace.given;
    a.workspace_bytes = j->workspace.bytes;
    return job_ok(j, cp_attention_backward(j->layer, &a, gpu_stream()), "cp_attention_backward");
}

/* A rank's own numbers per head, beside the results that all ranks have parts of: whether it is there, d_sinks, max_logit. */
enum { NUMBERS = 1 + 2 * MOST_HEADS };

/* Floats of the five global results of a case, one after another, of the numbers of every rank, and of the gradients of the bias and of latents. */
static inline size_t results_size(const test_case *c) {
    size_t dims[4], n = MOST_RANKS * NUMBERS + bias_dims(c, dims) + latents_size(c);
    int r;
    for (r = 0; r < RESULTS; r++)
        n += result_size(c, r);
    return n;
}

/* Adds this rank's results to zeroed global ones, and checks what should be untouched. */
static inline void job_results(job *j, float *global) {
    static const int of[RESULTS] = {T_OUT, T_LSE, T_DQ, T_DK, T_DV};
    size_t row, head, d, dims[4];
    int i, r;
    if (here != NULL)
        gpu_wait();
    if (j->failed)
        return;
    for (i = 0; here != NULL && i < TENSORS; i++)
        gpu_read(j->t[i].memory, j->t[i].device, j->t[i].bytes);
    for (r = 0; r < RESULTS; r++) {
        const local *l = &j->t[of[r]];
        int side = result_side(r);
        for (row = 0; row < j->count[side]; row++)
            for (head = 0; head < l->shape[2]; head++)
                for (d = 0; d < l->shape[3]; d++)
                    global[(j->rows[side][row] * l->shape[2] + head) * l->shape[3] + d] += local_get(l, row, head, d);
        global += result_size(j->c, r);
    }
    global += j->rank * NUMBERS;
    global[0] = 1;
    for (i = 0; i < 2; i++)
        for (head = 0; head < j->t[T_D_SINKS + i].shape[2]; head++)
            global[1 + (size_t)i * MOST_HEADS + head] = local_get(&j->t[T_D_SINKS + i], 0, head, 0);
    global += (MOST_RANKS - j->rank) * NUMBERS;
    for (row = 0; row < j->t[T_D_BIAS].shape[0] * j->t[T_D_BIAS].shape[1]; row++)
        for (head = 0; head < j->t[T_D_BIAS].shape[2]; head++)
            for (d = 0; d < j->t[T_D_BIAS].shape[3]; d++)
                global[job_bias_row(j, row, head) + d] += local_get(&j->t[T_D_BIAS], row, head, d);
    global += bias_dims(j->c, dims);
    for (i = 0; i < LATENTS; i++) {
        const local *l = &j->t[T_D_LATENT + i];
        for (row = 0; row < l->shape[0] * l->shape[1]; row++)
            for (head = 0; head < l->shape[2]; head++)
                for (d = 0; d < l->shape[3]; d++)
                    global[(i == D_LATENT ? j->rows[1][row] : head * l->shape[1] + row) * l->shape[3] + d] += local_get(l, row, head, d);
        global += latent_size(j->c, i);
    }
    for (i = 0; i < TENSORS; i++)
        if (!local_intact(&j->t[i])) {
            fprintf(stderr, "rank %d: %s: tensor %d: bytes outside of its elements were written\n", j->rank, j->c->name, i);
            j->failed = 1;
        }
    if (!buffer_intact(&j->saved) || !buffer_intact(&j->workspace)) {
        fprintf(stderr, "rank %d: %s: written outside of the saved buffer or the workspace\n", j->rank, j->c->name);
        j->failed = 1;
    }
}

static inline void job_free(job *j) {
    int i;
    for (i = 0; i < TENSORS; i++) {
        free(j->t[i].memory), free(j->t[i].copy);
        gpu_free(j->t[i].device);
    }
    free(j->rows[0]), free(j->rows[1]), free(j->saved.memory), free(j->workspace.memory);
    gpu_free(j->saved.device), gpu_free(j->workspace.device);
}

#endif /* CP_TEST_JOB_H */
