/* Ranks that die. Four processes over shared memory run backwards; then one kills itself in the middle of one, or leaves without a word, or
 * never comes, or all die. The others must get an error that names the dead rank, in time, and nothing may stay behind.
 * Prints "N passed, N failed".
 *
 * usage: fault [--keep-mounts]           everything; starts itself anew for every rank
 *        fault rank MODE VICTIM          one rank, found by its environment (also under mpirun); MODE none, kill, leave, absent or all
 * Compiled with -DCP_WITH_MPI the ranks are those of MPI_COMM_WORLD. */
#define _GNU_SOURCE
#include "context_parallel.h"
#ifdef CP_WITH_MPI
#include "context_parallel_mpi.h"
#endif

#include <dirent.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 4, TOKENS = 2048, HEADS = 8, DIM = 64, ROW = HEADS * DIM, TIMEOUT_MS = 4000, BACKWARDS = 40 };

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void die_now(int signal_number) {
    (void)signal_number;
    kill(getpid(), SIGKILL);
}

/* SIGKILL for this process after some seconds. */
static void die_in(double seconds) {
    struct itimerval t;
    memset(&t, 0, sizeof t);
    t.it_value.tv_sec = (time_t)seconds;
    t.it_value.tv_usec = (suseconds_t)(1e6 * (seconds - floor(seconds))) + 1;
    signal(SIGALRM, die_now);
    setitimer(ITIMER_REAL, &t, NULL);
}

static cp_tensor rows(float *x, int64_t n, int lse) {
    cp_tensor t;
    memset(&t, 0, sizeof t);
    t.data = x;
    t.device_type = CP_DEVICE_CPU;
    t.dtype_code = CP_CODE_FLOAT;
    t.dtype_bits = 32;
    t.dtype_lanes = 1;
    t.ndim = lse ? 3 : 4;
    t.shape[0] = 1;
    t.shape[1] = lse ? HEADS : n;
    t.shape[2] = lse ? n : HEADS;
    t.shape[3] = lse ? 0 : DIM;
    t.stride[0] = n * ROW;
    t.stride[1] = lse ? n : ROW;
    t.stride[2] = lse ? 1 : DIM;
    t.stride[3] = lse ? 0 : 1;
    return t;
}

static int said(const char *what, uint32_t rank, cp_status status, double seconds) {
    printf("  rank %u: %s after %.2f s: %s\n", rank, what, seconds, status == CP_OK ? "success" : cp_last_error());
    fflush(stdout);
    return 1;
}

/* One rank. 0 if it saw what it should. */
static int run_rank(cp_group_config config, const char *mode, uint32_t victim) {
    cp_attention_config layer;
    cp_sequences sequences;
    cp_forward_args f;
    cp_backward_args b;
    cp_context context;
    cp_group *group = NULL;
    cp_attention *attention = NULL;
    cp_status status;
    uint32_t rank, size;
    size_t n;
    float *x[8], *lse;
    double start = now(), seconds;
    char name[32];
    int t;
    snprintf(name, sizeof name, "rank %u", victim);
    config.struct_size = (uint32_t)sizeof config;
    config.timeout_ms = TIMEOUT_MS;
    status = cp_group_init(&config, &group);
    if (strcmp(mode, "absent") == 0)
        return status != CP_ERR_TIMEOUT || strstr(cp_last_error(), name) == NULL || now() - start > 1.5 * TIMEOUT_MS / 1000
                   ? said("init", 99, status, now() - start)
                   : 0;
    if (status != CP_OK)
        return said("init", 99, status, now() - start);
    cp_group_rank(group, &rank);
    cp_group_size(group, &size);
    memset(&layer, 0, sizeof layer);
    layer.struct_size = (uint32_t)sizeof layer;
    layer.flags = CP_ATTENTION_CAUSAL;
    layer.heads = HEADS;
    layer.head_dim_qk = DIM;
    layer.dtype = CP_DTYPE_F32;
    layer.threads = 1;
    memset(&sequences, 0, sizeof sequences);
    sequences.struct_size = (uint32_t)sizeof sequences;
    sequences.count = 1;
    sequences.seq_q = TOKENS;
    if (cp_attention_create(&layer, &attention) != CP_OK || cp_set_group(attention, group, NULL) != CP_OK ||
        cp_partition_tokens(CP_PARTITION_ZIGZAG, CP_FORMAT_DENSE, &sequences, size, rank, CP_SIDE_Q, NULL, 0, &n) != CP_OK)
        return said("set up", rank, CP_ERR_INTERNAL, 0);
    for (t = 0; t < 8; t++)
        x[t] = (float *)calloc(n * ROW, sizeof **x);
    lse = (float *)calloc(n * HEADS, sizeof *lse);
    memset(&f, 0, sizeof f);
    memset(&b, 0, sizeof b);
    f.struct_size = (uint32_t)sizeof f;
    b.struct_size = (uint32_t)sizeof b;
    f.sequences = b.sequences = &sequences;
    f.context = &context;
    b.context = &context;
    f.q = b.q = rows(x[0], (int64_t)n, 0);
    f.k = b.k = rows(x[1], (int64_t)n, 0);
    f.v = b.v = rows(x[2], (int64_t)n, 0);
    f.out = b.out = rows(x[3], (int64_t)n, 0);
    f.lse = b.lse = rows(lse, (int64_t)n, 1);
    b.d_out = rows(x[4], (int64_t)n, 0);
    b.dq = rows(x[5], (int64_t)n, 0);
    b.dk = rows(x[6], (int64_t)n, 0);
    b.dv = rows(x[7], (int64_t)n, 0);
    status = cp_attention_forward(attention, &f, NULL);
    start = now();
    if (status == CP_OK)
        status = cp_attention_backward(attention, &b, NULL);
    seconds = now() - start;
    if (status == CP_OK)
        status = cp_group_barrier(group);
    if (status != CP_OK)
        return said("the first pass", rank, status, seconds);
    if (strcmp(mode, "leave") == 0 && rank == victim)
        _exit(0);
    if ((strcmp(mode, "kill") == 0 && rank == victim) || strcmp(mode, "all") == 0)
        die_in(1.4 * seconds);
    for (t = 0; t < BACKWARDS && status == CP_OK; t++) {
        start = now();
        status = cp_attention_backward(attention, &b, NULL);
        seconds = now() - start;
        if (strcmp(mode, "none") == 0)
            break;
    }
    if (strcmp(mode, "none") == 0) {
        cp_attention_destroy(attention);
        cp_group_destroy(group);
        return status != CP_OK && said("backward", rank, status, seconds);
    }
    said("backward", rank, status, seconds);
    /* On a busy machine another's death may be noticed before its own, which comes all the same. */
    while (strcmp(mode, "all") == 0)
        pause();
#ifdef CP_WITH_MPI
    name[5] = 0; /* MPI does not tell who died: a survivor names the rank that it waited for, which may wait for the dead one in turn */
#endif
    if ((status != CP_ERR_PEER_LOST && status != CP_ERR_TIMEOUT && status != CP_ERR_TRANSPORT) || seconds > 1.5 * TIMEOUT_MS / 1000 ||
        strstr(cp_last_error(), name) == NULL)
        return 1;
    start = now();
    if (cp_attention_backward(attention, &b, NULL) != status || strstr(cp_last_error(), "the group is lost since") == NULL || now() - start > 1)
        return said("the call after it", rank, status, now() - start);
    cp_attention_destroy(attention);
    cp_group_destroy(group);
    return 0;
}

#ifdef CP_WITH_MPI

int main(int argc, char **argv) {
    cp_transport_ops ops;
    cp_group_config config;
    int rank, size, failed;
    if (argc != 4 || MPI_Init(&argc, &argv) != MPI_SUCCESS)
        return 2;
    /* MPICH's mpirun tells survivors of a death with it, if it lets them live (-disable-auto-cleanup). */
    signal(SIGUSR1, SIG_IGN);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    memset(&config, 0, sizeof config);
    if (cp_mpi_transport(MPI_COMM_WORLD, &ops) != CP_OK)
        return 2;
    config.rank = (uint32_t)rank;
    config.size = (uint32_t)size;
    config.transport = &ops;
    failed = run_rank(config, argv[2], (uint32_t)atoi(argv[3]));
    /* With a dead rank MPI_Finalize would wait for it. */
    if (strcmp(argv[2], "none") != 0)
        _exit(failed);
    MPI_Finalize();
    return failed;
}

#else

static pid_t pids[RANKS];

static void spawn(const char *self, const char *mode, int victim, int job) {
    char text[32];
    int r;
    for (r = 0; r < RANKS; r++) {
        pids[r] = 0;
        if (strcmp(mode, "absent") == 0 && r == victim)
            continue;
        pids[r] = fork();
        if (pids[r] != 0)
            continue;
        snprintf(text, sizeof text, "%d", r);
        setenv("RANK", text, 1);
        snprintf(text, sizeof text, "%d", RANKS);
        setenv("WORLD_SIZE", text, 1);
        snprintf(text, sizeof text, "fault-%ld-%d", (long)getppid(), job);
        setenv("MASTER_ADDR", text, 1);
        setenv("MASTER_PORT", "29501", 1);
        snprintf(text, sizeof text, "%d", victim);
        execl(self, self, "rank", mode, text, (char *)NULL);
        _exit(127);
    }
}

/* Names in a folder, one a line, sorted by nothing but the system: compared with itself later. */
static char *listing(const char *folder) {
    char *text = (char *)calloc(1, 1 << 20);
    struct dirent **names;
    int n = scandir(folder, &names, NULL, alphasort), i;
    for (i = 0; i < n; i++) {
        strncat(text, names[i]->d_name, 300);
        strcat(text, "\n");
        free(names[i]);
    }
    if (n >= 0)
        free(names);
    return text;
}

static int passed, failed;

/* One scenario: `survivors` is the status that all but the victim must exit with; the victim's is SIGKILL's or its own. */
static void scenario(const char *self, const char *mode, int victim, const char *what) {
    static int job;
    char *shm = listing("/dev/shm"), *tmp = listing("/tmp"), *shm_after, *tmp_after;
    int r, good = 1;
    double start = now();
    spawn(self, mode, victim, job++);
    for (r = 0; r < RANKS; r++) {
        int status = 0, dies = strcmp(mode, "all") == 0 || (strcmp(mode, "kill") == 0 && r == victim);
        if (pids[r] == 0)
            continue;
        if (waitpid(pids[r], &status, 0) != pids[r] || kill(pids[r], 0) == 0) {
            printf("FAIL %s: rank %d was not seen to end\n", what, r);
            good = 0;
        }
        if (dies ? !WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL : status != 0) {
            printf("FAIL %s: rank %d ended with status %#x\n", what, r, (unsigned)status);
            good = 0;
        }
    }
    shm_after = listing("/dev/shm");
    tmp_after = listing("/tmp");
    if (strcmp(shm, shm_after) != 0 || strcmp(tmp, tmp_after) != 0) {
        printf("FAIL %s: left behind; /dev/shm and /tmp were\n%s%sand are\n%s%s", what, shm, tmp, shm_after, tmp_after);
        good = 0;
    }
    printf("%-4s %s (%.1f s)\n", good ? "ok" : "FAIL", what, now() - start);
    fflush(stdout);
    passed += good;
    failed += !good;
    free(shm), free(tmp), free(shm_after), free(tmp_after);
}

int main(int argc, char **argv) {
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (argc == 4 && strcmp(argv[1], "rank") == 0) {
        cp_group_config config;
        memset(&config, 0, sizeof config);
        config.bootstrap = CP_BOOTSTRAP_ENV;
        return run_rank(config, argv[2], (uint32_t)atoi(argv[3]));
    }
    if (n <= 0)
        return 2;
    self[n] = 0;
    /* Where it is allowed, a /dev/shm and a /tmp of our own: then whatever is in there is ours. */
    if (argc == 1 && unshare(CLONE_NEWNS) == 0 && mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0) {
        if (strncmp(self, "/tmp/", 5) != 0 && mount("tmpfs", "/tmp", "tmpfs", 0, NULL) != 0)
            printf("note: /tmp is shared with other programs\n");
        if (mount("tmpfs", "/dev/shm", "tmpfs", 0, NULL) != 0)
            printf("note: /dev/shm is shared with other programs\n");
    }
    fflush(stdout);
    scenario(self, "none", 0, "nobody dies");
    scenario(self, "kill", 2, "rank 2 is killed in a backward");
    scenario(self, "kill", 0, "rank 0 is killed in a backward");
    scenario(self, "leave", 1, "rank 1 exits without a word");
    scenario(self, "absent", 3, "rank 3 never comes");
    scenario(self, "all", 0, "all are killed in a backward");
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

#endif
