/* example_mpi.c on GPUs: tensors are device memory, calls are enqueued on a stream, NCCL moves the data; MPI is how the ranks find each other. Compares O
 * with one rank. Device memory comes from gpu.h here; a program of yours has cudaMalloc, cudaMemcpy and a cudaStream_t, and cudaSetDevice's number.
 *
 *     mpicc -std=gnu99 -Iinclude tests/c/example_cuda.c -Ltarget/release -lcontext_parallel -lm -o example
 *     LD_LIBRARY_PATH=target/release mpirun -n 4 ./example */
#include "gpu.h"

#include <context_parallel_mpi.h>
#include <math.h>

enum { TOKENS = 300, HEADS = 4, DIM = 64, ROW = HEADS * DIM };
#define CP(call) ((call) == CP_OK ? (void)0 : (fprintf(stderr, "%s\n", cp_last_error()), (void)MPI_Abort(MPI_COMM_WORLD, 1)))

static cp_tensor rows(void *x, size_t n, int device) { /* bf16 [1, n, HEADS, DIM] */
    cp_tensor t = {x, CP_DEVICE_CUDA, device, CP_CODE_BFLOAT, 16, 1, 4, {1, (int64_t)n, HEADS, DIM}, {(int64_t)n * ROW, ROW, DIM, 1}, 0};
    return t;
}

static float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint16_t to_bf16(float f) { /* towards zero */
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

/* O of the rows `mine`, for inputs that everyone can compute; then the gradients. */
static float *attend(cp_attention *attention, const uint32_t *mine, size_t n, int device, void *stream) {
    cp_sequences sequences = {.struct_size = sizeof sequences, .count = 1, .seq_q = TOKENS};
    cp_forward_args f = {.struct_size = sizeof f, .sequences = &sequences};
    cp_backward_args b = {.struct_size = sizeof b, .sequences = &sequences};
    cp_context context;
    float *out = malloc((n + 1) * ROW * sizeof *out);
    uint16_t *host = malloc((n + 1) * ROW * sizeof *host);
    void *x[8], *lse = (void *)(uintptr_t)gpu_alloc(n * HEADS * sizeof(float));
    for (int t = 0; t < 8; t++) {
        x[t] = (void *)(uintptr_t)gpu_alloc(n * ROW * sizeof *host);
        for (size_t i = 0; i < n * ROW; i++)
            host[i] = to_bf16(sinf((float)(mine[i / ROW] % 97 * (i % ROW + 1) + (size_t)t)));
        gpu_write((uintptr_t)x[t], host, n * ROW * sizeof *host);
    }
    f.q = b.q = rows(x[0], n, device), f.k = b.k = rows(x[1], n, device), f.v = b.v = rows(x[2], n, device);
    f.out = b.out = rows(x[3], n, device), b.d_out = rows(x[4], n, device);
    b.dq = rows(x[5], n, device), b.dk = rows(x[6], n, device), b.dv = rows(x[7], n, device);
    f.lse = (cp_tensor){lse, CP_DEVICE_CUDA, device, CP_CODE_FLOAT, 32, 1, 3, {1, HEADS, (int64_t)n}, {HEADS * (int64_t)n, (int64_t)n, 1}, 0};
    b.lse = f.lse;
    f.context = &context, b.context = &context;
    CP(cp_attention_forward(attention, &f, stream));
    CP(cp_attention_backward(attention, &b, stream)); /* both are enqueued; the host has waited for nothing */
    gpu_wait();                                       /* cudaStreamSynchronize(stream) */
    gpu_read(host, (uintptr_t)x[3], n * ROW * sizeof *host);
    for (size_t i = 0; i < n * ROW; i++)
        out[i] = from_bf16(host[i]);
    for (int t = 0; t < 8; t++)
        gpu_free((uintptr_t)x[t]);
    gpu_free((uintptr_t)lse);
    free(host);
    return out;
}

int main(int argc, char **argv) {
    static uint32_t mine[TOKENS], all[TOKENS];
    cp_group_config config = {.struct_size = sizeof config};
    cp_attention_config layer = {.struct_size = sizeof layer, .flags = CP_ATTENTION_CAUSAL, .heads = HEADS, .head_dim_qk = DIM, .dtype = CP_DTYPE_BF16};
    cp_sequences sequences = {.struct_size = sizeof sequences, .count = 1, .seq_q = TOKENS};
    cp_transport_ops mpi;
    cp_group *group;
    cp_attention *attention;
    size_t n;
    gpu own;
    float worst = 0;
    int rank, size, device;
    void *stream;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    gpu_open(&own, rank);
    device = own.device, stream = own.stream;

    CP(cp_mpi_transport(MPI_COMM_WORLD, &mpi)); /* how ranks agree; their data goes by NCCL */
    config.rank = (uint32_t)rank, config.size = (uint32_t)size, config.transport = &mpi;
    config.device_type = layer.device_type = CP_DEVICE_CUDA;
    config.device_id = layer.device_id = device;
    CP(cp_group_init(&config, &group));
    CP(cp_attention_create(&layer, &attention));
    CP(cp_set_group(attention, group, NULL));
    CP(cp_partition_tokens(CP_PARTITION_ZIGZAG, CP_FORMAT_DENSE, &sequences, config.size, config.rank, CP_SIDE_Q, mine, TOKENS, &n));
    float *out = attend(attention, mine, n, device, stream);

    CP(cp_set_group(attention, NULL, NULL)); /* the same alone */
    for (uint32_t t = 0; t < TOKENS; t++)
        all[t] = t;
    float *right = attend(attention, all, TOKENS, device, stream);
    for (size_t i = 0; i < n * ROW; i++)
        worst = fmaxf(worst, fabsf(out[i] - right[mine[i / ROW] * ROW + i % ROW]));
    MPI_Allreduce(MPI_IN_PLACE, &worst, 1, MPI_FLOAT, MPI_MAX, MPI_COMM_WORLD);
    if (rank == 0)
        printf("%d ranks, %d tokens: worst difference to one rank %.1e\n", size, TOKENS, (double)worst);
    free(out), free(right);
    CP(cp_attention_destroy(attention));
    CP(cp_group_destroy(group));
    gpu_close();
    MPI_Finalize();
    return worst < 0.02f ? 0 : 1;
}
