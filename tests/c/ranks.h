/* A test's ranks: under MPI (compiled with -DCP_WITH_MPI), as threads of one process, or as processes that find each other by the
 * environment. The test is a function of its world; results are collected on rank 0. */
#ifndef CP_TEST_RANKS_H
#define CP_TEST_RANKS_H

#include "case.h"
#include "gpu.h"

#ifdef CP_WITH_MPI
#include "context_parallel_mpi.h"
#include <time.h>
#else
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

/* Floats that a rank may hand to `collect`. */
enum { ARENA = 2 << 20 };

typedef struct world {
    int rank, size;
    cp_group *group;
    float *arena; /* ARENA floats for every rank, seen by all of them; not under MPI */
} world;

typedef int (*test_body)(world *w);

/* Ranks are on CUDA devices, dealt out in turn, and their data moves this way; they agree before every call unless they trust each other. */
static int on_cuda, trusting;
static cp_transport_kind data_transport = CP_TRANSPORT_AUTO;

static inline void check(cp_status status, const world *w, const char *what) {
    if (status == CP_OK)
        return;
    fprintf(stderr, "rank %d: %s: %s\n", w->rank, what, cp_last_error());
    exit(1);
}

/* Sums `x` over all ranks; the sum is in `x` of rank 0. */
static inline void collect(world *w, float *x, size_t n) {
#ifdef CP_WITH_MPI
    /* Polled, with naps: a blocking call would take a core from the ranks that compute. */
    struct timespec nap = {0, 100000};
    MPI_Request request;
    int done = 0;
    MPI_Ireduce(w->rank == 0 ? MPI_IN_PLACE : x, w->rank == 0 ? x : NULL, (int)n, MPI_FLOAT, MPI_SUM, 0, MPI_COMM_WORLD, &request);
    while (MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && !done)
        nanosleep(&nap, NULL);
#else
    int r;
    size_t i;
    if (n > ARENA)
        die("results too large for the arena", "");
    memcpy(w->arena + (size_t)w->rank * ARENA, x, n * sizeof *x);
    check(cp_group_barrier(w->group), w, "collect");
    if (w->rank == 0)
        for (r = 1; r < w->size; r++)
            for (i = 0; i < n; i++)
                x[i] += w->arena[(size_t)r * ARENA + i];
    check(cp_group_barrier(w->group), w, "collect");
#endif
}

/* The world is there: runs the test. */
static inline int run_rank(world *w, cp_group_config *config, test_body body) {
    int failed;
    gpu mine;
    config->struct_size = (uint32_t)sizeof *config;
    config->timeout_ms = 60000;
    if (on_cuda) {
        gpu_open(&mine, w->rank);
        config->transport_kind = data_transport;
        config->flags = trusting ? 0 : CP_GROUP_AGREE;
    }
    config->device_type = place_type();
    config->device_id = place_id();
    check(cp_group_init(config, &w->group), w, "cp_group_init");
    failed = body(w);
    check(cp_group_destroy(w->group), w, "cp_group_destroy");
    gpu_close();
    return failed;
}

#ifdef CP_WITH_MPI

static inline int32_t gather_by_mpi(void *ctx, const void *mine, void *all, size_t bytes) {
    (void)ctx;
    return MPI_Allgather(mine, (int)bytes, MPI_BYTE, all, (int)bytes, MPI_BYTE, MPI_COMM_WORLD) != MPI_SUCCESS;
}

/* Ranks are those of MPI_COMM_WORLD, over MPI, or over shared memory with MPI only to find each other. */
static inline int run_ranks(int *argc, char ***argv, int size, int processes, test_body body) {
    world w;
    cp_transport_ops ops;
    cp_group_config config;
    int failed, provided;
    (void)size;
    memset(&w, 0, sizeof w);
    memset(&config, 0, sizeof config);
    MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(MPI_COMM_WORLD, &w.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &w.size);
    config.rank = (uint32_t)w.rank;
    config.size = (uint32_t)w.size;
    if (processes) {
        config.allgather = gather_by_mpi;
    } else {
        check(cp_mpi_transport(MPI_COMM_WORLD, &ops), &w, "cp_mpi_transport");
        config.transport = &ops;
    }
    failed = run_rank(&w, &config, body);
    MPI_Finalize();
    return failed;
}

#else

typedef struct thread_rank {
    world w;
    cp_unique_id id;
    test_body body;
    int failed;
} thread_rank;

static inline void *run_thread(void *p) {
    thread_rank *t = (thread_rank *)p;
    cp_group_config config;
    memset(&config, 0, sizeof config);
    config.rank = (uint32_t)t->w.rank;
    config.size = (uint32_t)t->w.size;
    config.id = &t->id;
    t->failed = run_rank(&t->w, &config, t->body);
    return NULL;
}

static inline int run_threads(int size, float *arena, test_body body) {
    thread_rank ranks[MOST_RANKS];
    pthread_t threads[MOST_RANKS];
    int i, failed = 0;
    memset(ranks, 0, sizeof ranks);
    check(cp_get_unique_id(&ranks[0].id), &ranks[0].w, "cp_get_unique_id");
    for (i = 0; i < size; i++) {
        ranks[i].w.rank = i;
        ranks[i].w.size = size;
        ranks[i].w.arena = arena;
        ranks[i].id = ranks[0].id;
        ranks[i].body = body;
        if (pthread_create(&threads[i], NULL, run_thread, &ranks[i]) != 0)
            die("pthread_create", "");
    }
    for (i = 0; i < size; i++) {
        pthread_join(threads[i], NULL);
        failed |= ranks[i].failed;
    }
    return failed;
}

/* What torchrun would set. Called in a child, before the library is used. */
static inline void torchrun_environment(int rank, int size, long job) {
    char text[32];
    snprintf(text, sizeof text, "%d", rank);
    setenv("RANK", text, 1);
    snprintf(text, sizeof text, "%d", size);
    setenv("WORLD_SIZE", text, 1);
    setenv("LOCAL_WORLD_SIZE", text, 1);
    snprintf(text, sizeof text, "test-%ld", job);
    setenv("MASTER_ADDR", text, 1);
    setenv("MASTER_PORT", "29500", 1);
}

static inline int run_processes(int size, float *arena, test_body body) {
    int i, status, failed = 0;
    long job = (long)getpid();
    fflush(NULL);
    for (i = 0; i < size; i++)
        if (fork() == 0) {
            cp_group_config config;
            world w;
            memset(&config, 0, sizeof config);
            w.rank = i;
            w.size = size;
            w.arena = arena;
            torchrun_environment(i, size, job);
            config.bootstrap = CP_BOOTSTRAP_ENV;
            exit(run_rank(&w, &config, body));
        }
    for (i = 0; i < size; i++)
        if (wait(&status) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
            failed = 1;
    return failed;
}

/* Ranks are threads, or processes over shared memory. */
static inline int run_ranks(int *argc, char ***argv, int size, int processes, test_body body) {
    size_t bytes = (size_t)size * ARENA * sizeof(float);
    void *arena = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int failed;
    (void)argc, (void)argv;
    if (arena == MAP_FAILED || size > MOST_RANKS)
        die("no room for so many ranks", "");
    failed = processes ? run_processes(size, (float *)arena, body) : run_threads(size, (float *)arena, body);
    munmap(arena, bytes);
    return failed;
}

#endif

#endif /* CP_TEST_RANKS_H */
