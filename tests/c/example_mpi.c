/* Causal attention over 4096 tokens, split across the ranks of mpirun, forward and backward; compares O with one rank.
 *
 *     mpicc -std=c99 -Iinclude tests/c/example_mpi.c -Ltarget/release -lcontext_parallel -lm -o example
 *     LD_LIBRARY_PATH=target/release mpirun -n 4 ./example */
#include <context_parallel_mpi.h>
#include <math.h>
#include <stdio.h>

enum { TOKENS = 4096, HEADS = 4, DIM = 64, ROW = HEADS * DIM };
#define CP(call) ((call) == CP_OK ? (void)0 : (fprintf(stderr, "%s\n", cp_last_error()), (void)MPI_Abort(MPI_COMM_WORLD, 1)))

static cp_tensor rows(float *x, size_t n) { /* [1, n, HEADS, DIM] */
    cp_tensor t = {x, CP_DEVICE_CPU, 0, CP_CODE_FLOAT, 32, 1, 4, {1, (int64_t)n, HEADS, DIM}, {(int64_t)n * ROW, ROW, DIM, 1}, 0};
    return t;
}

/* O of the rows `mine`, for inputs that everyone can compute; then the gradients. */
static float *attend(cp_attention *attention, const uint32_t *mine, size_t n) {
    cp_sequences sequences = {.struct_size = sizeof sequences, .count = 1, .seq_q = TOKENS};
    cp_forward_args f = {.struct_size = sizeof f, .sequences = &sequences};
    cp_backward_args b = {.struct_size = sizeof b, .sequences = &sequences};
    cp_context context;
    float *x[8], *lse = malloc(n * HEADS * sizeof *lse);
    for (int t = 0; t < 8; t++) {
        x[t] = malloc(n * ROW * sizeof **x);
        for (size_t i = 0; i < n * ROW; i++)
            x[t][i] = sinf((float)(mine[i / ROW] % 97 * (i % ROW + 1) + (size_t)t));
    }
    f.q = b.q = rows(x[0], n), f.k = b.k = rows(x[1], n), f.v = b.v = rows(x[2], n), f.out = b.out = rows(x[3], n);
    b.d_out = rows(x[4], n), b.dq = rows(x[5], n), b.dk = rows(x[6], n), b.dv = rows(x[7], n);
    f.lse = (cp_tensor){lse, CP_DEVICE_CPU, 0, CP_CODE_FLOAT, 32, 1, 3, {1, HEADS, (int64_t)n}, {HEADS * (int64_t)n, (int64_t)n, 1}, 0};
    b.lse = f.lse;
    f.context = &context, b.context = &context;
    CP(cp_attention_forward(attention, &f, NULL));
    CP(cp_attention_backward(attention, &b, NULL));
    for (int t = 0; t < 8; t++)
        if (t != 3)
            free(x[t]);
    free(lse);
    return x[3];
}

int main(int argc, char **argv) {
    static uint32_t mine[TOKENS], all[TOKENS];
    cp_group_config config = {.struct_size = sizeof config};
    cp_attention_config layer = {.struct_size = sizeof layer, .flags = CP_ATTENTION_CAUSAL, .heads = HEADS, .head_dim_qk = DIM, .dtype = CP_DTYPE_F32};
    cp_sequences sequences = {.struct_size = sizeof sequences, .count = 1, .seq_q = TOKENS};
    cp_transport_ops mpi;
    cp_group *group;
    cp_attention *attention;
    size_t n;
    float worst = 0;
    int rank, size;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);

    CP(cp_mpi_transport(MPI_COMM_WORLD, &mpi));
    config.rank = (uint32_t)rank, config.size = (uint32_t)size, config.transport = &mpi;
    CP(cp_group_init(&config, &group));
    CP(cp_attention_create(&layer, &attention));
    CP(cp_set_group(attention, group, NULL)); /* ring attention */
    CP(cp_partition_tokens(CP_PARTITION_ZIGZAG, CP_FORMAT_DENSE, &sequences, config.size, config.rank, CP_SIDE_Q, mine, TOKENS, &n));
    float *out = attend(attention, mine, n);

    CP(cp_set_group(attention, NULL, NULL)); /* the same alone */
    for (uint32_t t = 0; t < TOKENS; t++)
        all[t] = t;
    float *right = attend(attention, all, TOKENS);
    for (size_t i = 0; i < n * ROW; i++)
        worst = fmaxf(worst, fabsf(out[i] - right[mine[i / ROW] * ROW + i % ROW]));
    MPI_Allreduce(MPI_IN_PLACE, &worst, 1, MPI_FLOAT, MPI_MAX, MPI_COMM_WORLD);
    if (rank == 0)
        printf("%d ranks, %d tokens: worst difference to one rank %.1e\n", size, TOKENS, (double)worst);
    free(out), free(right);
    CP(cp_attention_destroy(attention));
    CP(cp_group_destroy(group));
    MPI_Finalize();
    return worst < 1e-5f ? 0 : 1;
}
