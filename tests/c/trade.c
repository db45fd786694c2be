/* Sequence <-> heads through the C ABI: two tensors, of which one has fewer heads than there are ranks, there and back, padded batches and
 * packed documents, dense and strided; then wrong arguments of one rank. Ranks are threads, processes, or MPI's (-DCP_WITH_MPI).
 *
 * usage: trade [--ranks N] [--processes] [--cuda local|nccl|staged] */
#define _GNU_SOURCE
#include "ranks.h"

enum { HEADS = 6, GROUPS = 2, DIM = 5, STATE = 3, TENSORS = 2, PADDED = 26, BATCH = 2, TOKENS = BATCH * PADDED };

static const uint32_t heads_of[TENSORS] = {HEADS, GROUPS}, dim_of[TENSORS] = {DIM, STATE};

#define MUST(condition)                                                                                  \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            fprintf(stderr, "rank %d, line %d: %s (%s)\n", w->rank, __LINE__, #condition, cp_last_error()); \
            exit(1);                                                                                     \
        }                                                                                                \
    } while (0)

/* Memory of one tensor: on the host, and where the calls find it. */
typedef struct array {
    float *host;
    device_pointer device;
    size_t bytes;
    cp_tensor t;
} array;

/* [batch, rows, heads, dim], or packed [rows, heads, dim], with `gap` unused elements after every row. Starts as NaN. */
static array make(int packed, int64_t batch, int64_t rows, int64_t heads, int64_t dim, int64_t gap) {
    array a;
    int64_t row = heads * dim + gap;
    const int64_t shape[4] = {batch, rows, heads, dim}, stride[4] = {rows * row, row, dim, 1};
    memset(&a, 0, sizeof a);
    a.bytes = (size_t)(batch * rows * row) * sizeof(float);
    a.host = (float *)malloc(a.bytes + 1);
    memset(a.host, 0xFF, a.bytes);
    a.t.data = a.host;
    if (here != NULL) {
        a.device = gpu_alloc(a.bytes);
        gpu_write(a.device, a.host, a.bytes);
        a.t.data = (void *)(uintptr_t)a.device;
    }
    a.t.device_type = place_type();
    a.t.device_id = place_id();
    a.t.dtype_code = CP_CODE_FLOAT;
    a.t.dtype_bits = 32;
    a.t.dtype_lanes = 1;
    a.t.ndim = packed ? 3 : 4;
    memcpy(a.t.shape, shape + packed, (size_t)(4 - packed) * sizeof *shape);
    memcpy(a.t.stride, stride + packed, (size_t)(4 - packed) * sizeof *stride);
    return a;
}

static void drop(array *a) {
    gpu_free(a->device);
    free(a->host);
}

/* The element of a tensor's whole sequence; 0 in padding. */
static float value(int tensor, uint32_t token, uint32_t head, uint32_t i, const char *alive) {
    return alive[token] ? (float)((token * 31 + head * 7 + i * 3 + (uint32_t)tensor * 11) % 23) - 9.0f : 0.0f;
}

static float *at(const array *a, uint32_t row, uint32_t head, uint32_t i, uint32_t heads, uint32_t dim, uint32_t gap) {
    return a->host + (size_t)row * (heads * dim + gap) + head * dim + i;
}

typedef struct trip {
    cp_sequences s;
    cp_partition partition;
    int packed;
    uint32_t gap;
    char alive[TOKENS];
} trip;

static void round_trip(world *w, const trip *p) {
    uint32_t mine[TOKENS], first[TENSORS], count[TENSORS], row, head, i, n;
    size_t rows, bytes;
    cp_trade_args a;
    cp_tensor local[TENSORS], whole[TENSORS], back[TENSORS];
    array l[TENSORS], h[TENSORS], b[TENSORS];
    cp_format format = p->packed ? CP_FORMAT_PACKED : CP_FORMAT_DENSE;
    int64_t batch = p->packed ? 1 : BATCH;
    MUST(cp_partition_tokens(p->partition, format, &p->s, (uint32_t)w->size, (uint32_t)w->rank, CP_SIDE_Q, mine, TOKENS, &rows) == CP_OK);
    for (n = 0; n < TENSORS; n++) {
        uint32_t heads = heads_of[n], dim = dim_of[n];
        MUST(cp_trade_share(HEADS, heads, (uint32_t)w->size, (uint32_t)w->rank, &first[n], &count[n]) == CP_OK);
        l[n] = make(p->packed, batch, (int64_t)rows / batch, heads, dim, p->gap);
        h[n] = make(p->packed, batch, TOKENS / batch, count[n], dim, p->gap);
        b[n] = make(p->packed, batch, (int64_t)rows / batch, heads, dim, 0);
        for (row = 0; row < rows; row++)
            for (head = 0; head < heads; head++)
                for (i = 0; i < dim && p->alive[mine[row]]; i++)
                    *at(&l[n], row, head, i, heads, dim, p->gap) = value((int)n, mine[row], head, i, p->alive);
        if (here != NULL)
            gpu_write(l[n].device, l[n].host, l[n].bytes);
        local[n] = l[n].t;
        whole[n] = h[n].t;
        back[n] = b[n].t;
    }
    memset(&a, 0, sizeof a);
    a.struct_size = (uint32_t)sizeof a;
    a.sequences = &p->s;
    a.partition = p->partition;
    a.format = format;
    a.count = TENSORS;
    a.local = local;
    a.whole = whole;
    MUST(cp_trade_workspace_size(w->group, &a, &bytes) == CP_OK);
    MUST(cp_sequence_to_heads(w->group, &a, gpu_stream()) == CP_OK);
    a.local = back;
    MUST(cp_heads_to_sequence(w->group, &a, gpu_stream()) == CP_OK);
    if (here != NULL)
        gpu_wait();
    for (n = 0; n < TENSORS; n++) {
        uint32_t heads = heads_of[n], dim = dim_of[n], other, f, c;
        if (here != NULL) {
            gpu_read(h[n].host, h[n].device, h[n].bytes);
            gpu_read(b[n].host, b[n].device, b[n].bytes);
        }
        for (row = 0; row < TOKENS; row++)
            for (head = 0; head < count[n]; head++)
                for (i = 0; i < dim; i++)
                    MUST(*at(&h[n], row, head, i, count[n], dim, p->gap) == value((int)n, row, first[n] + head, i, p->alive));
        for (head = 0; head < heads; head++) {
            float holders = 0;
            for (other = 0; other < (uint32_t)w->size; other++) {
                MUST(cp_trade_share(HEADS, heads, (uint32_t)w->size, other, &f, &c) == CP_OK);
                holders += f <= head && head < f + c;
            }
            for (row = 0; row < rows; row++)
                for (i = 0; i < dim; i++)
                    MUST(*at(&b[n], row, head, i, heads, dim, 0) == holders * value((int)n, mine[row], head, i, p->alive));
        }
        drop(&l[n]), drop(&h[n]), drop(&b[n]);
    }
}

static cp_sequences no_sequences(void) {
    cp_sequences s;
    memset(&s, 0, sizeof s);
    s.struct_size = (uint32_t)sizeof s;
    return s;
}

/* One thing wrong on the last rank: it gets its error, the others a mismatch, and nothing is lost. */
static void refused(world *w, const char *words, int what) {
    trip good;
    uint32_t rows, first, count;
    cp_trade_args a;
    array l, h;
    cp_status status;
    int wrong = w->rank == w->size - 1;
    memset(&good, 0, sizeof good);
    rows = TOKENS / (uint32_t)w->size;
    good.s = no_sequences();
    good.s.count = 1;
    good.s.seq_q = rows * (uint32_t)w->size;
    MUST(cp_trade_share(HEADS, HEADS, (uint32_t)w->size, (uint32_t)w->rank, &first, &count) == CP_OK);
    l = make(0, 1, rows, HEADS, DIM, 0);
    h = make(0, 1, good.s.seq_q, count, DIM, 0);
    memset(&a, 0, sizeof a);
    a.struct_size = (uint32_t)sizeof a;
    a.sequences = &good.s;
    a.partition = CP_PARTITION_CONTIGUOUS;
    a.count = 1;
    a.local = &l.t;
    a.whole = &h.t;
    if (wrong) {
        switch (what) {
            case 0: a.flags = 1; break;
            case 1: a.count = 17; break;
            case 2: a.local = NULL; break;
            case 3: a.partition = 9; break;
            case 4: a.sequences = NULL; break;
            case 5: a.heads = 5; break;
            case 6: h.t.shape[1] -= 1; break;
            case 7: l.t.dtype_bits = 64; break;
            case 8: h.t.stride[2] = 1; break;
            case 9: a.workspace_bytes = 64; break;
            default: a.struct_size = 0; break;
        }
    }
    status = cp_sequence_to_heads(w->group, &a, gpu_stream());
    if (wrong)
        MUST(status == CP_ERR_INVALID_ARGUMENT && strstr(cp_last_error(), words) != NULL);
    else
        MUST(status == CP_ERR_MISMATCH && strstr(cp_last_error(), words) != NULL);
    drop(&l), drop(&h);
}

static int body(world *w) {
    static const int32_t lens[BATCH] = {PADDED, 17}, before[BATCH] = {0, 4};
    static const int32_t cu[5] = {0, 1, 20, 20, 44}, padded[5] = {0, 3, 24, 26, TOKENS};
    static const cp_partition partitions[3] = {CP_PARTITION_ZIGZAG, CP_PARTITION_CONTIGUOUS, CP_PARTITION_STRIPED};
    static const char *const words[11] = {"args.flags",          "args.count: got 17", "args.local: got NULL", "args.partition: got 9",
                                          "sequences: got NULL", "6 heads",            "whole[0]: got shape",  "local[0].dtype",
                                          "whole[0].stride",     "args.workspace",     "args.struct_size"};
    int trips = 0, i, token;
    for (i = 0; i < 12; i++) {
        trip p;
        memset(&p, 0, sizeof p);
        p.s = no_sequences();
        p.partition = partitions[i % 3];
        p.packed = i / 3 % 2;
        p.gap = i / 6 * 4;
        if (p.packed) {
            p.s.count = 4;
            p.s.cu_seqlens_q = cu;
            p.s.cu_seqlens_q_padded = padded;
        } else {
            p.s.count = BATCH;
            p.s.seq_q = PADDED;
            p.s.lens_q = lens;
            p.s.before_q = before;
        }
        for (token = 0; token < TOKENS; token++) {
            int entry = token / PADDED, inside = token % PADDED, d = 0;
            if (p.packed) {
                while (token >= padded[d + 1])
                    d++;
                p.alive[token] = token - padded[d] < cu[d + 1] - cu[d];
            } else {
                p.alive[token] = inside >= before[entry] && inside < before[entry] + lens[entry];
            }
        }
        round_trip(w, &p);
        trips++;
    }
    /* More ranks than heads have nothing to be wrong about; a rank alone has nobody to tell. */
    for (i = 0; i < 11 && w->size > 1 && w->size <= HEADS; i++)
        refused(w, words[i], i);
    check(cp_group_barrier(w->group), w, "cp_group_barrier");
    if (w->rank == 0)
        printf("%d passed, 0 failed\n", trips + i);
    return 0;
}

int main(int argc, char **argv) {
    static const char *const names[] = {"auto", "local", "nccl", "staged"};
    static const cp_transport_kind kinds[] = {CP_TRANSPORT_AUTO, CP_TRANSPORT_LOCAL, CP_TRANSPORT_NCCL, CP_TRANSPORT_STAGED};
    int ranks = 4, processes = 0, i;
    for (i = 1; i < argc; i++) {
        const char *option = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--processes") == 0)
            processes = 1;
        else if (strcmp(argv[i], "--ranks") == 0 && ++i)
            ranks = atoi(option);
        else if (strcmp(argv[i], "--cuda") == 0 && ++i)
            on_cuda = 1, data_transport = kinds[word_of(option, names, 4, "--cuda")];
        else
            die("unknown option", argv[i]);
    }
    if (ranks < 1 || ranks > MOST_RANKS)
        die("--ranks out of range", "");
    return run_ranks(&argc, &argv, ranks, processes, body);
}
