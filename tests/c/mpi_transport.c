/* The MPI transport table by itself, under mpirun: random groups, subset allgathers, a wrong length, a rank that never comes.
 * Built once with CP_MPI_CHUNK small, so that streams are cut, and once as it is. Prints "ok" on rank 0; anything else is a failure. */
#include "context_parallel_mpi.h"

#include <stdio.h>

#define CHECK(c)                                                                          \
    do {                                                                                  \
        if (!(c)) {                                                                       \
            fprintf(stderr, "rank %d: %s:%d: %s\n", rank, __FILE__, __LINE__, #c);        \
            MPI_Abort(MPI_COMM_WORLD, 1);                                                 \
        }                                                                                 \
    } while (0)

enum { LARGEST = 5000, MOST_RANKS = 16, MOST_PIECES = 8 };

static int rank, size;

static uint64_t next_random(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (*state * UINT64_C(0x2545f4914f6cdd1d)) >> 33;
}

/* What `from` sends `to` in a group, -1 for nothing; every rank can tell. */
static int content(uint64_t seed, int from, int to, unsigned char *bytes) {
    uint64_t state = (seed * 1000 + (uint64_t)from * 100 + (uint64_t)to + 1) * UINT64_C(0x9e3779b97f4a7c15) | 1;
    int i, length;
    next_random(&state);
    switch (next_random(&state) % 6) {
    case 0: return -1;
    case 1: length = 0; break;
    case 2: length = LARGEST; break;
    default: length = (int)(next_random(&state) % (LARGEST + 1));
    }
    for (i = 0; i < length; i++)
        bytes[i] = (unsigned char)next_random(&state);
    return length;
}

/* Cuts a stream at random. */
static cp_message cut(int peer, unsigned char *bytes, int length, cp_piece *pieces, uint64_t *state) {
    cp_message m;
    m.peer = (uint32_t)peer;
    m.n_pieces = 0;
    m.pieces = pieces;
    while (length > 0) {
        int n = m.n_pieces == MOST_PIECES - 1 ? length : 1 + (int)(next_random(state) % (uint64_t)length);
        pieces[m.n_pieces].ptr = bytes;
        pieces[m.n_pieces].bytes = (size_t)n;
        m.n_pieces++;
        bytes += n;
        length -= n;
    }
    return m;
}

static int32_t finish(cp_transport_ops *ops, double seconds) {
    double end = MPI_Wtime() + seconds;
    int32_t done = 0, status = 0;
    while (!done && status == 0 && MPI_Wtime() < end)
        status = ops->test(ops->ctx, &done);
    return status != 0 ? status : done ? 0 : 12;
}

static void random_group(cp_transport_ops *ops, uint64_t seed) {
    static unsigned char out[MOST_RANKS][LARGEST], in[MOST_RANKS][LARGEST], wanted[LARGEST];
    static cp_piece pieces[2 * MOST_RANKS][MOST_PIECES];
    cp_message sends[MOST_RANKS], recvs[MOST_RANKS];
    size_t n_sends = 0, n_recvs = 0;
    uint64_t state = seed * 31 + (uint64_t)rank + 1;
    uint32_t members[MOST_RANKS], mine, all[MOST_RANKS];
    size_t n = 0;
    int p, length;
    for (p = 0; p < size; p++) {
        if (p == rank)
            continue;
        length = content(seed, rank, p, out[p]);
        if (length >= 0) {
            sends[n_sends] = cut(p, out[p], length, pieces[p], &state);
            n_sends++;
        }
        length = content(seed, p, rank, wanted);
        if (length >= 0) {
            recvs[n_recvs] = cut(p, in[p], length, pieces[MOST_RANKS + p], &state);
            n_recvs++;
        }
    }
    memset(in, 0x55, sizeof in);
    CHECK(ops->start(ops->ctx, sends, n_sends, recvs, n_recvs) == 0);
    CHECK(finish(ops, 20) == 0);
    for (p = 0; p < size; p++) {
        length = p == rank ? -1 : content(seed, p, rank, wanted);
        CHECK(length < 0 || memcmp(in[p], wanted, (size_t)length) == 0);
        CHECK(length >= LARGEST || in[p][length < 0 ? 0 : length] == 0x55);
    }
    for (p = 0; p < size; p++)
        if (seed % 3 != 1 || p % 2 == (int)(seed % 2))
            members[n++] = (uint32_t)p;
    mine = (uint32_t)(rank * 1000) + (uint32_t)seed;
    for (p = 0; p < (int)n; p++)
        if ((int)members[p] == rank) {
            CHECK(ops->allgather(ops->ctx, members, n, &mine, all, sizeof mine, 20000) == 0);
            for (p = 0; p < (int)n; p++)
                CHECK(all[p] == members[p] * 1000 + (uint32_t)seed);
        }
}

static void fill_members(uint32_t *members) {
    int p;
    for (p = 0; p < size; p++)
        members[p] = (uint32_t)p;
}

/* Rank 0 sends one byte more, then one less, than rank 1 expects. */
static void wrong_length(int difference) {
    unsigned char bytes[200];
    cp_piece piece;
    cp_message m;
    cp_transport_ops ops;
    uint32_t peer = 99;
    CHECK(cp_mpi_transport(MPI_COMM_WORLD, &ops) == 0);
    memset(bytes, 0, sizeof bytes);
    piece.ptr = bytes;
    piece.bytes = rank == 0 ? (size_t)(100 + difference) : 100;
    m.peer = (uint32_t)(1 - rank);
    m.n_pieces = 1;
    m.pieces = &piece;
    if (rank == 0) {
        CHECK(ops.start(ops.ctx, &m, 1, NULL, 0) == 0);
        CHECK(finish(&ops, 5) == 0);
    } else if (rank == 1) {
        CHECK(ops.start(ops.ctx, NULL, 0, &m, 1) == 0);
        CHECK(finish(&ops, 5) == 8);
        CHECK(ops.waiting_for(ops.ctx, &peer) == 0 && peer == 0);
        ops.cancel(ops.ctx);
    }
    ops.destroy(ops.ctx);
    MPI_Barrier(MPI_COMM_WORLD);
}

/* The last rank stays away from an allgather, and then from an exchange. */
static void missing_rank(void) {
    static unsigned char bytes[1 << 20];
    uint32_t members[MOST_RANKS], mine = 1, all[MOST_RANKS], peer = 99, last = (uint32_t)(size - 1);
    cp_transport_ops ops;
    cp_piece piece;
    cp_message m;
    double began;
    CHECK(cp_mpi_transport(MPI_COMM_WORLD, &ops) == 0);
    fill_members(members);
    began = MPI_Wtime();
    if (rank != size - 1) {
        CHECK(ops.allgather(ops.ctx, members, (size_t)size, &mine, all, sizeof mine, 200) == 12);
        CHECK(ops.waiting_for(ops.ctx, &peer) == 0 && peer == last);
        CHECK(MPI_Wtime() - began < 5);
    }
    ops.destroy(ops.ctx);
    MPI_Barrier(MPI_COMM_WORLD);
    CHECK(cp_mpi_transport(MPI_COMM_WORLD, &ops) == 0);
    began = MPI_Wtime();
    if (rank != size - 1) {
        piece.ptr = bytes;
        piece.bytes = sizeof bytes;
        m.peer = last;
        m.n_pieces = 1;
        m.pieces = &piece;
        CHECK(ops.start(ops.ctx, NULL, 0, &m, 1) == 0);
        CHECK(finish(&ops, 0.2) == 12);
        CHECK(ops.waiting_for(ops.ctx, &peer) == 0 && peer == last);
        ops.cancel(ops.ctx);
        memset(bytes, 1, sizeof bytes);
        CHECK(MPI_Wtime() - began < 5);
    }
    ops.destroy(ops.ctx);
    MPI_Barrier(MPI_COMM_WORLD);
}

int main(int argc, char **argv) {
    cp_transport_ops ops;
    uint64_t seed;
    CHECK(cp_mpi_transport(MPI_COMM_WORLD, &ops) == 3);
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    CHECK(size >= 1 && size <= MOST_RANKS);
    CHECK(cp_mpi_transport(MPI_COMM_NULL, &ops) == 1);
    CHECK(cp_mpi_transport(MPI_COMM_WORLD, NULL) == 1);
    CHECK(cp_mpi_transport(MPI_COMM_WORLD, &ops) == 0);
    for (seed = 0; seed < 60; seed++)
        random_group(&ops, seed);
    ops.destroy(ops.ctx);
    if (size > 1) {
        wrong_length(1);
        wrong_length(-1);
        missing_rank();
    }
    MPI_Finalize();
    if (rank == 0)
        printf("ok\n");
    return 0;
}
