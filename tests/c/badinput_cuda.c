/* What CUDA adds to arguments, each wrong in turn: its own status, a message that names it, everything usable after; and what is CUDA's on the
 * CPU. With libcuda.so.1 (LD_LIBRARY_PATH=target/softgpu for the software GPU); without it, that nothing but CUDA is missing. Prints
 * "N passed, N failed".
 *
 * usage: badinput_cuda [--without]      --without: there must be no libcuda.so.1 */
#define _GNU_SOURCE
#include "expect.h"
#include "gpu.h"

#include <math.h>

enum { TOKENS = 40, HEADS = 4, DIM = 16, ELEMENTS = TOKENS * HEADS * DIM };

static cp_group_config alone(int32_t type, int32_t id) {
    cp_group_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = (uint32_t)sizeof c;
    c.size = 1;
    c.device_type = type;
    c.device_id = id;
    return c;
}

static cp_attention_config layer_on(int32_t type, int32_t id, cp_dtype dtype) {
    cp_attention_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = (uint32_t)sizeof c;
    c.heads = HEADS;
    c.head_dim_qk = DIM;
    c.dtype = dtype;
    c.flags = CP_ATTENTION_CAUSAL;
    c.device_type = type;
    c.device_id = id;
    return c;
}

static cp_tensor tensor(int32_t type, int32_t id, void *data, int lse) {
    cp_tensor t;
    memset(&t, 0, sizeof t);
    t.data = data;
    t.device_type = type;
    t.device_id = id;
    t.dtype_code = lse ? CP_CODE_FLOAT : CP_CODE_BFLOAT;
    t.dtype_bits = lse ? 32 : 16;
    t.dtype_lanes = 1;
    t.ndim = lse ? 3 : 4;
    t.shape[0] = 1;
    t.shape[1] = lse ? HEADS : TOKENS;
    t.shape[2] = lse ? TOKENS : HEADS;
    t.shape[3] = lse ? 0 : DIM;
    t.stride[0] = lse ? HEADS * TOKENS : ELEMENTS;
    t.stride[1] = lse ? TOKENS : HEADS * DIM;
    t.stride[2] = lse ? 1 : DIM;
    t.stride[3] = lse ? 0 : 1;
    return t;
}

/* A layer with its tensors; on the CPU or a device. */
typedef struct side {
    cp_attention *layer;
    cp_sequences sequences;
    cp_context context;
    cp_forward_args f;
    cp_backward_args b;
    void *stream;
    float host[9][ELEMENTS];
    device_pointer device[9];
} side;

static void *place(side *s, int i) {
    return here == NULL ? (void *)s->host[i] : (void *)(uintptr_t)s->device[i];
}

static side *open_side(void) {
    side *s = (side *)calloc(1, sizeof *s);
    cp_attention_config c = layer_on(place_type(), place_id(), CP_DTYPE_BF16);
    cp_tensor *of[9];
    int i;
    s->f.struct_size = (uint32_t)sizeof s->f;
    s->b.struct_size = (uint32_t)sizeof s->b;
    s->sequences.struct_size = (uint32_t)sizeof s->sequences;
    s->sequences.count = 1;
    s->sequences.seq_q = TOKENS;
    of[0] = &s->f.q, of[1] = &s->f.k, of[2] = &s->f.v, of[3] = &s->f.out, of[4] = &s->f.lse;
    of[5] = &s->b.d_out, of[6] = &s->b.dq, of[7] = &s->b.dk, of[8] = &s->b.dv;
    for (i = 0; i < 9; i++) {
        if (here != NULL) {
            s->device[i] = gpu_alloc(sizeof s->host[i]);
            gpu_write(s->device[i], s->host[i], sizeof s->host[i]);
        }
        *of[i] = tensor(place_type(), place_id(), place(s, i), i == 4);
    }
    s->stream = gpu_stream();
    s->f.sequences = s->b.sequences = &s->sequences;
    s->f.context = &s->context;
    s->b.context = &s->context;
    s->b.q = s->f.q, s->b.k = s->f.k, s->b.v = s->f.v, s->b.out = s->f.out, s->b.lse = s->f.lse;
    GOOD(cp_attention_create(&c, &s->layer));
    return s;
}

/* Still good after what was refused. */
static void works(side *s) {
    GOOD(cp_attention_forward(s->layer, &s->f, s->stream));
    GOOD(cp_attention_backward(s->layer, &s->b, s->stream));
    if (here != NULL)
        gpu_wait();
}

static void close_side(side *s) {
    int i;
    GOOD(cp_attention_destroy(s->layer));
    for (i = 0; i < 9; i++)
        gpu_free(s->device[i]);
    free(s);
}

/* The arguments changed by `change`, a call that must fail, and one that must not. */
#define FORWARD(wanted, words, change)                                              \
    do {                                                                            \
        cp_forward_args a = s->f;                                                   \
        void *stream = s->stream;                                                   \
        change;                                                                     \
        EXPECT(wanted, words, cp_attention_forward(s->layer, &a, stream));          \
        works(s);                                                                   \
    } while (0)
#define BACKWARD(wanted, words, change)                                             \
    do {                                                                            \
        cp_backward_args a = s->b;                                                  \
        void *stream = s->stream;                                                   \
        GOOD(cp_attention_forward(s->layer, &s->f, stream));                        \
        change;                                                                     \
        EXPECT(wanted, words, cp_attention_backward(s->layer, &a, stream));         \
        works(s);                                                                   \
    } while (0)

/* What is CUDA's, on a layer that computes on the CPU. */
static void cuda_on_the_cpu(void) {
    side *s = open_side();
    cp_group_config c = alone(CP_DEVICE_CPU, 0);
    cp_group *g = NULL;
    int some = 0;
    works(s);
    FORWARD(CP_ERR_UNSUPPORTED, "q.device_type: got 2, this layer computes on the CPU", a.q.device_type = CP_DEVICE_CUDA);
    FORWARD(CP_ERR_UNSUPPORTED, "out.device_type: got 2", a.out.device_type = CP_DEVICE_CUDA);
    BACKWARD(CP_ERR_UNSUPPORTED, "dk.device_type: got 2", a.dk.device_type = CP_DEVICE_CUDA);
    FORWARD(CP_ERR_INVALID_ARGUMENT, "v.device_id: got 1, must be 0 on the CPU", a.v.device_id = 1);
    FORWARD(CP_ERR_INVALID_ARGUMENT, "stream: got", stream = &some);
    BACKWARD(CP_ERR_INVALID_ARGUMENT, "must be NULL on the CPU", stream = &some);
    c.transport_kind = CP_TRANSPORT_NCCL;
    EXPECT(CP_ERR_UNSUPPORTED, "config.transport_kind: got 3", cp_group_init(&c, &g));
    c.transport_kind = CP_TRANSPORT_STAGED;
    EXPECT(CP_ERR_UNSUPPORTED, "config.transport_kind: got 4", cp_group_init(&c, &g));
    c = alone(CP_DEVICE_CPU, 0);
    c.nccl_comm = &some;
    EXPECT(CP_ERR_INVALID_ARGUMENT, "nccl_comm", cp_group_init(&c, &g));
    c = alone(CP_DEVICE_CPU, 0);
    c.nccl_library = "libnccl.so.2";
    EXPECT(CP_ERR_INVALID_ARGUMENT, "nccl_library", cp_group_init(&c, &g));
    close_side(s);
}

/* A machine without CUDA: refused by name, and the CPU goes on. */
static void without(void) {
    cp_group_config c = alone(CP_DEVICE_CUDA, 0);
    cp_attention_config k = layer_on(CP_DEVICE_CUDA, 0, CP_DTYPE_BF16);
    cp_comm_config ring;
    cp_group *g = NULL;
    cp_attention *layer = NULL;
    memset(&ring, 0, sizeof ring);
    ring.struct_size = (uint32_t)sizeof ring;
    TRUE_(gpu_find() == NULL);
    EXPECT(CP_ERR_UNSUPPORTED, "libcuda", cp_group_init(&c, &g));
    TRUE_(g == NULL);
    EXPECT(CP_ERR_UNSUPPORTED, "libcuda", cp_attention_create(&k, &layer));
    TRUE_(layer == NULL);
    EXPECT(CP_ERR_UNSUPPORTED, "libcuda", cp_query_support(&k, &ring, 2));
    EXPECT(CP_ERR_UNSUPPORTED, "libcuda", cp_group_init(&c, &g)); /* the second time too */
    c = alone(CP_DEVICE_CPU, 0);
    GOOD(cp_group_init(&c, &g));
    GOOD(cp_group_destroy(g));
    TRUE_(strstr(cp_build_info(), "\"version\":\"") != NULL);
}

static void wrong_tensors(void) {
    side *s = open_side();
    works(s);
    FORWARD(CP_ERR_UNSUPPORTED, "q.device_type, device_id: got 1, 0; this layer computes on CUDA device 0",
            (a.q.device_type = CP_DEVICE_CPU, a.q.data = s->host[0]));
    FORWARD(CP_ERR_UNSUPPORTED, "lse.device_type, device_id: got 1, 0", a.lse.device_type = CP_DEVICE_CPU);
    FORWARD(CP_ERR_UNSUPPORTED, "k.device_type, device_id: got 2, 1", a.k.device_id = 1);
    FORWARD(CP_ERR_UNSUPPORTED, "k.device_type, device_id: got 2, -1", a.k.device_id = -1);
    BACKWARD(CP_ERR_UNSUPPORTED, "dv.device_type, device_id: got 2, 7", a.dv.device_id = 7);
    BACKWARD(CP_ERR_UNSUPPORTED, "d_out.device_type, device_id: got 1, 0", a.d_out.device_type = CP_DEVICE_CPU);
    FORWARD(CP_ERR_INVALID_ARGUMENT, "v.data: got", a.v.data = (char *)a.v.data + 8);
    FORWARD(CP_ERR_INVALID_ARGUMENT, "out.data: got", a.out.data = (char *)a.out.data + 2);
    FORWARD(CP_ERR_INVALID_ARGUMENT, "q.stride[2]: got 17", (a.q.stride[2] = 17, a.q.shape[1] = TOKENS));
    FORWARD(CP_ERR_INVALID_ARGUMENT, "k.stride[1]: got 68", (a.k.stride[1] = HEADS * DIM + 4));
    BACKWARD(CP_ERR_INVALID_ARGUMENT, "dq.data: got", a.dq.data = (char *)a.dq.data + 4);
    FORWARD(CP_ERR_INVALID_ARGUMENT, "q.dtype", (a.q.dtype_code = CP_CODE_FLOAT, a.q.dtype_bits = 32));
    FORWARD(CP_ERR_INVALID_ARGUMENT, "workspace", (a.workspace = (void *)(uintptr_t)(s->device[8] + 16), a.workspace_bytes = 1024));
    FORWARD(CP_ERR_OUT_OF_MEMORY, "workspace", (a.workspace = (void *)(uintptr_t)s->device[8], a.workspace_bytes = 64));
    close_side(s);
}

static void *nothing(void *ctx, size_t bytes, void *stream) {
    (void)ctx, (void)bytes, (void)stream;
    return NULL;
}

static void *misaligned(void *ctx, size_t bytes, void *stream) {
    (void)bytes, (void)stream;
    return (char *)ctx + 16;
}

static void take(void *ctx, void *ptr, size_t bytes, void *stream) {
    (void)ctx, (void)ptr, (void)bytes, (void)stream;
}

static void wrong_layers(void) {
    cp_attention_config c = layer_on(CP_DEVICE_CUDA, 0, CP_DTYPE_F32);
    cp_attention *layer = NULL;
    side *s = open_side();
    EXPECT(CP_ERR_UNSUPPORTED, "fp32", cp_attention_create(&c, &layer));
    c = layer_on(CP_DEVICE_CUDA, 99, CP_DTYPE_F16);
    EXPECT(CP_ERR_INVALID_ARGUMENT, "99", cp_attention_create(&c, &layer));
    c = layer_on(CP_DEVICE_CUDA, -1, CP_DTYPE_F16);
    EXPECT(CP_ERR_INVALID_ARGUMENT, "config.device_id: got -1", cp_attention_create(&c, &layer));
    c = layer_on(7, 0, CP_DTYPE_F16);
    EXPECT(CP_ERR_INVALID_ARGUMENT, "config.device_type: got 7", cp_attention_create(&c, &layer));
    c = layer_on(CP_DEVICE_CUDA, 0, CP_DTYPE_F16);
    c.device_alloc = nothing;
    EXPECT(CP_ERR_INVALID_ARGUMENT, "device_free", cp_attention_create(&c, &layer));
    TRUE_(layer == NULL);
    c = layer_on(CP_DEVICE_CUDA, 0, CP_DTYPE_BF16);
    c.device_alloc = nothing, c.device_free = take;
    GOOD(cp_attention_destroy(s->layer));
    GOOD(cp_attention_create(&c, &s->layer));
    EXPECT(CP_ERR_OUT_OF_MEMORY, "allocator", cp_attention_forward(s->layer, &s->f, s->stream));
    GOOD(cp_attention_destroy(s->layer));
    c.device_alloc = misaligned, c.device_alloc_ctx = (void *)(uintptr_t)s->device[8];
    GOOD(cp_attention_create(&c, &s->layer));
    EXPECT(CP_ERR_INVALID_ARGUMENT, "alloc", cp_attention_forward(s->layer, &s->f, s->stream));
    close_side(s);
}

static void wrong_groups(void) {
    cp_group_config c = alone(CP_DEVICE_CUDA, 99);
    cp_attention_config k = layer_on(CP_DEVICE_CUDA, 0, CP_DTYPE_BF16);
    cp_attention *layer = NULL;
    cp_group *g = NULL;
    int some = 0;
    EXPECT(CP_ERR_INVALID_ARGUMENT, "99", cp_group_init(&c, &g));
    c = alone(CP_DEVICE_CUDA, -1);
    EXPECT(CP_ERR_INVALID_ARGUMENT, "config.device_id: got -1", cp_group_init(&c, &g));
    c = alone(9, 0);
    EXPECT(CP_ERR_INVALID_ARGUMENT, "config.device_type: got 9", cp_group_init(&c, &g));
    c = alone(CP_DEVICE_CUDA, 0);
    c.transport_kind = CP_TRANSPORT_SHM;
    EXPECT(CP_ERR_UNSUPPORTED, "config.transport_kind: got CP_TRANSPORT_SHM", cp_group_init(&c, &g));
    c.transport_kind = 5;
    EXPECT(CP_ERR_INVALID_ARGUMENT, "config.transport_kind: got 5", cp_group_init(&c, &g));
    c = alone(CP_DEVICE_CUDA, 0);
    c.nccl_comm = &some, c.transport_kind = CP_TRANSPORT_LOCAL;
    EXPECT(CP_ERR_INVALID_ARGUMENT, "config.transport_kind: got 1 with nccl_comm", cp_group_init(&c, &g));
    c = alone(CP_DEVICE_CUDA, 0);
    c.flags = 2;
    EXPECT(CP_ERR_INVALID_ARGUMENT, "config.flags", cp_group_init(&c, &g));
    TRUE_(g == NULL);
    /* A layer and a group in different places, both ways. */
    GOOD(cp_attention_create(&k, &layer));
    c = alone(CP_DEVICE_CPU, 0);
    GOOD(cp_group_init(&c, &g));
    EXPECT(CP_ERR_INVALID_ARGUMENT, "group: computes on the CPU, the layer on CUDA device 0", cp_set_group(layer, g, NULL));
    GOOD(cp_group_destroy(g));
    if (gpu_count() > 1) {
        c = alone(CP_DEVICE_CUDA, 1);
        GOOD(cp_group_init(&c, &g));
        EXPECT(CP_ERR_INVALID_ARGUMENT, "group: computes on CUDA device 1, the layer on CUDA device 0", cp_set_group(layer, g, NULL));
        GOOD(cp_group_destroy(g));
    }
    GOOD(cp_attention_destroy(layer));
    c = alone(CP_DEVICE_CUDA, 0);
    k = layer_on(CP_DEVICE_CPU, 0, CP_DTYPE_BF16);
    GOOD(cp_attention_create(&k, &layer));
    GOOD(cp_group_init(&c, &g));
    EXPECT(CP_ERR_INVALID_ARGUMENT, "group: computes on CUDA device 0, the layer on the CPU", cp_set_group(layer, g, NULL));
    GOOD(cp_group_destroy(g));
    GOOD(cp_attention_destroy(layer));
}

int main(int argc, char **argv) {
    gpu mine;
    if (argc > 1 && strcmp(argv[1], "--without") == 0) {
        without();
        cuda_on_the_cpu();
    } else {
        cuda_on_the_cpu();
        gpu_open(&mine, 0);
        wrong_tensors();
        wrong_layers();
        wrong_groups();
        gpu_close();
        cuda_on_the_cpu();
    }
    printf("%d passed, %d failed\n", passed_count, failed_count);
    return failed_count > 0;
}
