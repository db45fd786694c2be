/* The library as a C program sees it: cases of the corpus, forward and backward, with all communication types and storage types, compared
 * with the oracle on rank 0; then groups, subsets and refusals. Prints a line per case and "N passed, N failed".
 *
 * usage: harness [--data FILE] [--ranks N] [--processes] [--tag TAG] [--most TOKENS] [--every K] [--exact] [--cuda WAY [--trust]]
 *   --ranks N      threads, each a rank (default 4); under mpirun its ranks
 *   --processes    the ranks are processes that find each other by RANK and WORLD_SIZE; under mpirun by its allgather, and use shared memory
 *   --tag TAG      only cases with this tag
 *   --most TOKENS  only cases with at most so many tokens
 *   --every K      one in K of case × storage × communication, others for every number of ranks
 *   --exact        no guard bytes around tensors, so that valgrind sees a step beyond them
 *   --cuda WAY     tensors are on the devices that libcuda.so.1 offers; data moves by auto, local, nccl or staged
 *   --trust        the ranks do not agree before calls, as is the default with NCCL; leaves out what needs that */
#define _GNU_SOURCE
#include "job.h"
#include "ranks.h"

static const char *data_path = "tests/data/cases.csv", *only_tag;
static unsigned every = 1;
static int most_tokens = 1 << 30;
static test_case cases[MOST_CASES];
static int case_count;

static const test_case *find(const char *name) {
    int i;
    for (i = 0; i < case_count; i++)
        if (strcmp(cases[i].name, name) == 0)
            return &cases[i];
    die("no such case", name);
    return NULL;
}

/* The same on all ranks, another for every run. */
static unsigned vary_of(const test_case *c, cp_dtype dtype, cp_comm_type comm) {
    uint64_t h = dtype * 4 + comm;
    const char *s;
    for (s = c->name; *s != 0; s++)
        h = mix(h ^ (uint64_t)(unsigned char)*s);
    return (unsigned)(h >> 20);
}

typedef struct tally {
    int passed, failed;
} tally;

/* Checks d_sinks or max_logit, from what every rank wrote: their sum, their largest, or what all of them have. */
static double judge_numbers(const reference *r, int gradient, cp_reach reach, const float *ranks, char *why, size_t room) {
    float all[MOST_HEADS];
    int rank, head, first = 1;
    for (rank = 0; rank < MOST_RANKS; rank++) {
        const float *mine = ranks + rank * NUMBERS;
        const float *got = mine + 1 + (gradient ? 0 : MOST_HEADS);
        for (head = 0; mine[0] == 1 && head < r->c->heads; head++) {
            if (!first && reach == CP_REACH_GROUP && got[head] != all[head]) {
                snprintf(why, room, "%s head %d: rank %d got %.9g, others %.9g", gradient ? "d_sinks" : "max_logit", head, rank, got[head], all[head]);
                return INFINITY;
            }
            if (first || (reach == CP_REACH_RANK && !gradient && !(got[head] <= all[head])))
                all[head] = got[head];
            else if (reach == CP_REACH_RANK && gradient)
                all[head] += got[head];
        }
        first &= mine[0] != 1;
    }
    return check_numbers(r, gradient, all, why, room);
}

/* Rank 0 checks the five results of all ranks, and the numbers per head. `failed` is this rank's own; everyone calls. Returns the worst share of a bound. */
static double judge(world *w, const test_case *c, const reference *r, float *global, int failed, tally *t, const char *what) {
    size_t n = results_size(c), at = 0, dims[4];
    double worst = 0;
    char why[256];
    int result, bad = 0;
    global[n] = (float)failed;
    collect(w, global, n + 1);
    if (w->rank != 0)
        return 0;
    if (global[n] > 0) {
        printf("FAIL %s, %s: %.0f rank(s) had an error\n", c->name, what, global[n]);
        bad = 1;
    }
    for (result = 0; result < RESULTS && !bad; result++) {
        /* Of K and V that are made of latents there are no gradients. */
        double ratio = c->latent_dim > 0 && result >= DK ? 0 : check_result(r, result, global + at, why, sizeof why);
        worst = ratio > worst ? ratio : worst;
        at += result_size(c, result);
        if (!(ratio <= 1)) {
            printf("FAIL %s, %s: %s\n", c->name, what, why);
            bad = 1;
        }
    }
    for (result = 0; result < 2 && !bad; result++) {
        cp_reach reach = result == 0 ? c->sinks : c->max_logit;
        double ratio = reach == CP_REACH_NONE ? 0 : judge_numbers(r, result == 0, reach, global + at, why, sizeof why);
        worst = ratio > worst ? ratio : worst;
        if (!(ratio <= 1)) {
            printf("FAIL %s, %s: %s\n", c->name, what, why);
            bad = 1;
        }
    }
    if (c->bias & CP_BIAS_QUERIES && !bad) {
        double ratio = check_bias(r, global + at + MOST_RANKS * NUMBERS, why, sizeof why);
        worst = ratio > worst ? ratio : worst;
        if (!(ratio <= 1)) {
            printf("FAIL %s, %s: %s\n", c->name, what, why);
            bad = 1;
        }
    }
    if (c->latent_dim > 0 && !bad) {
        const float *got = global + at + MOST_RANKS * NUMBERS + bias_dims(c, dims);
        double ratio = check_latents(&r->made, c, r->dtype, r->seen, got, why, sizeof why);
        worst = ratio > worst ? ratio : worst;
        if (!(ratio <= 1)) {
            printf("FAIL %s, %s: %s\n", c->name, what, why);
            bad = 1;
        }
    }
    t->passed += !bad;
    t->failed += bad;
    return worst;
}

/* One case on one group: forward, backward; bytes moved must be those that the report states. `group` NULL computes alone. */
static int run_case(const test_case *c, cp_dtype dtype, const cp_group *group, cp_comm_type comm, unsigned vary, float *global) {
    static const char *const passes[] = {"forward", "backward"};
    cp_attention_config config = layer_config(c, dtype, vary);
    cp_attention *layer = NULL;
    cp_comm_config communication;
    cp_statistics before, after;
    cp_report report;
    uint32_t size = 1, rank = 0;
    int failed, pass;
    job *j = (job *)must(malloc(sizeof *j));
    memset(&before, 0, sizeof before);
    memset(&report, 0, sizeof report);
    before.struct_size = (uint32_t)sizeof before;
    after = before;
    report.struct_size = (uint32_t)sizeof report;
    if (group != NULL) {
        cp_group_size(group, &size);
        cp_group_rank(group, &rank);
        cp_group_statistics(group, &before);
    }
    communication = comm_config(comm, (int)size, vary);
    job_make(j, c, dtype, NULL, (int)size, (int)rank, vary);
    if (job_ok(j, cp_query_support(&config, &communication, size), "cp_query_support") &&
        job_ok(j, cp_attention_create(&config, &layer), "cp_attention_create") &&
        job_ok(j, cp_set_group(layer, group, &communication), "cp_set_group")) {
        j->layer = layer;
        job_ok(j, cp_attention_report(layer, &j->seq.s, &report), "cp_attention_report");
        for (pass = 0; pass < 2; pass++) {
            uint64_t sent = pass ? report.backward_sent : report.forward_sent;
            uint64_t received = pass ? report.backward_received : report.forward_received;
            if (!(pass ? job_backward(j) : job_forward(j)))
                break;
            if (group == NULL)
                continue;
            cp_group_statistics(group, &after);
            if (after.sent_bytes - before.sent_bytes != sent || after.received_bytes - before.received_bytes != received) {
                fprintf(stderr, "rank %u: %s, %s: moved %llu and %llu bytes, the report says %llu and %llu\n", rank, c->name, passes[pass],
                        (unsigned long long)(after.sent_bytes - before.sent_bytes),
                        (unsigned long long)(after.received_bytes - before.received_bytes), (unsigned long long)sent,
                        (unsigned long long)received);
                j->failed = 1;
            }
            before = after;
        }
    }
    job_results(j, global);
    job_ok(j, cp_attention_destroy(layer), "cp_attention_destroy");
    failed = j->failed;
    job_free(j);
    free(j);
    return failed;
}

/* The storage type of tests that are about something else. */
static cp_dtype plain_type(void) {
    return on_cuda ? CP_DTYPE_BF16 : CP_DTYPE_F32;
}

static float *zeroed(const test_case *c) {
    return (float *)must(calloc(results_size(c) + 1, sizeof(float)));
}

/* Every storage type × communication type of a case. */
static void whole_case(world *w, const test_case *c, tally *t) {
    static const char *const names[] = {"p2p", "all_gather", "a2a", "a2a+p2p"};
    cp_dtype dtype;
    cp_comm_type comm;
    tally before = *t;
    double worst = 0;
    for (dtype = on_cuda ? CP_DTYPE_BF16 : CP_DTYPE_F32; dtype <= CP_DTYPE_F16; dtype++) {
        reference r;
        int ready = 0;
        for (comm = CP_COMM_P2P; comm <= CP_COMM_A2A_P2P; comm++) {
            unsigned vary = vary_of(c, dtype, comm);
            float *global;
            char what[64];
            double ratio;
            int failed;
            if ((vary / 512 + (unsigned)w->size) % every != 0)
                continue;
            if (w->rank == 0 && !ready++)
                make_reference(&r, c, dtype);
            global = zeroed(c);
            snprintf(what, sizeof what, "%s, %s, variation %u", dtype_name(dtype), names[comm], vary % 512);
            failed = run_case(c, dtype, w->group, comm, vary, global);
            ratio = judge(w, c, &r, global, failed, t, what);
            worst = ratio > worst ? ratio : worst;
            free(global);
        }
        if (ready)
            free_reference(&r);
    }
    if (w->rank == 0 && t->passed + t->failed > before.passed + before.failed)
        printf("%-4s %s: %d run(s), worst %.2f of the bound\n", t->failed > before.failed ? "FAIL" : "ok", c->name,
               t->passed + t->failed - before.passed - before.failed, worst);
}

static void verdict(world *w, int good, const char *what, tally *t) {
    float failed = good ? 0 : 1;
    collect(w, &failed, 1);
    if (w->rank != 0)
        return;
    printf("%-4s %s\n", failed > 0 ? "FAIL" : "ok", what);
    t->passed += failed == 0;
    t->failed += failed > 0;
}

/* The lower and the upper half of the ranks, and all of them backwards, as subsets: numbers, members, results. */
static void subsets(world *w, tally *t) {
    const test_case *of[3] = {find("causal_33"), find("thd_1_2_14_33_5"), find("pad_both")};
    static const char *const what[3] = {"subset of the lower half", "subset of the upper half", "subset of all, backwards"};
    int half = (w->size + 1) / 2, s, i;
    for (s = 0; s < 3; s++) {
        int first = s == 1 ? half : 0, last = s == 0 ? half : w->size, n = last - first;
        uint32_t ranks[MOST_RANKS], got[MOST_RANKS] = {0}, size = 0, rank = 99;
        float *global = zeroed(of[s]);
        reference r;
        cp_group *subset = NULL;
        int failed = 0;
        if (n == 0) {
            free(global);
            continue;
        }
        for (i = 0; i < n; i++)
            ranks[i] = (uint32_t)(s == 2 ? last - 1 - i : first + i);
        if (w->rank >= first && w->rank < last) {
            check(cp_group_subset(w->group, ranks, (size_t)n, &subset), w, "cp_group_subset");
            check(cp_group_size(subset, &size), w, "cp_group_size");
            check(cp_group_rank(subset, &rank), w, "cp_group_rank");
            check(cp_group_global_ranks(subset, got, MOST_RANKS), w, "cp_group_global_ranks");
            failed = size != (uint32_t)n || rank >= size || ranks[rank] != (uint32_t)w->rank || memcmp(ranks, got, (size_t)n * 4) != 0;
            failed |= run_case(of[s], CP_DTYPE_BF16, subset, s == 0 ? CP_COMM_A2A : CP_COMM_P2P, 4 + (unsigned)s, global);
            check(cp_group_destroy(subset), w, "cp_group_destroy");
        }
        if (w->rank == 0)
            make_reference(&r, of[s], CP_DTYPE_BF16);
        judge(w, of[s], &r, global, failed, t, what[s]);
        if (w->rank == 0) {
            printf("done %s\n", what[s]);
            free_reference(&r);
        }
        free(global);
    }
}

/* One layer, three calls in flight: forward on all ranks, on a half, alone; then backward of each, in another order, each on the group that
 * its forward used. */
static void interleaved(world *w, tally *t) {
    static const int lengths[3] = {33, 50, 21}, order[3] = {0, 2, 1};
    static const char *const what[3] = {"switched groups: all", "switched groups: a half", "switched groups: alone"};
    test_case c[3];
    cp_attention_config config;
    cp_attention *layer = NULL;
    cp_group *part = NULL;
    cp_comm_config ring = comm_config(CP_COMM_P2P, w->size, 0), heads = comm_config(CP_COMM_A2A, w->size, 0);
    uint32_t members[MOST_RANKS];
    int half = (w->size + 1) / 2, lower = w->rank < half, i, first = lower ? 0 : half, n = lower ? half : w->size - half;
    job *j = (job *)must(malloc(3 * sizeof *j));
    for (i = 0; i < n; i++)
        members[i] = (uint32_t)(first + i);
    for (i = 0; i < 3; i++) {
        c[i] = *find("causal_33");
        c[i].side[0][0].len = c[i].side[0][0].padded = c[i].side[1][0].len = c[i].side[1][0].padded = lengths[i];
    }
    config = layer_config(&c[0], plain_type(), VARY_SAVE);
    check(cp_attention_create(&config, &layer), w, "cp_attention_create");
    check(cp_group_subset(w->group, members, (size_t)n, &part), w, "cp_group_subset");
    job_make(&j[0], &c[0], plain_type(), layer, w->size, w->rank, 0);
    job_make(&j[1], &c[1], plain_type(), layer, n, w->rank - first, 0);
    job_make(&j[2], &c[2], plain_type(), layer, 1, 0, 0);
    job_ok(&j[0], cp_set_group(layer, w->group, &ring), "cp_set_group");
    job_forward(&j[0]);
    job_ok(&j[1], cp_set_group(layer, part, &heads), "cp_set_group");
    job_forward(&j[1]);
    check(cp_group_destroy(part), w, "cp_group_destroy"); /* the layer keeps it alive */
    job_ok(&j[2], cp_set_group(layer, NULL, NULL), "cp_set_group");
    job_forward(&j[2]);
    for (i = 0; i < 3; i++)
        job_backward(&j[order[i]]);
    for (i = 0; i < 3; i++) {
        /* Of the halves, the one with rank 0 is checked; alone, rank 0. */
        float *global = zeroed(&c[i]), *unused = zeroed(&c[i]);
        int counts = i == 0 || (i == 1 && lower) || (i == 2 && w->rank == 0);
        reference r;
        job_results(&j[i], counts ? global : unused);
        if (w->rank == 0)
            make_reference(&r, &c[i], plain_type());
        judge(w, &c[i], &r, global, j[i].failed, t, what[i]);
        if (w->rank == 0) {
            printf("done %s\n", what[i]);
            free_reference(&r);
        }
        free(global);
        free(unused);
        job_free(&j[i]);
    }
    free(j);
    check(cp_attention_destroy(layer), w, "cp_attention_destroy");
}

/* The last rank gives a wrong shape: its own error there, a mismatch that names it elsewhere; then the same layer works. */
static void refused(world *w, tally *t) {
    const test_case *c = find("causal_33");
    cp_attention_config config = layer_config(c, plain_type(), 0);
    cp_attention *layer = NULL;
    job *j = (job *)must(malloc(sizeof *j));
    float *global = zeroed(c);
    reference r;
    char named[64];
    cp_status status;
    int odd = w->rank == w->size - 1, good;
    check(cp_attention_create(&config, &layer), w, "cp_attention_create");
    check(cp_set_group(layer, w->group, NULL), w, "cp_set_group");
    job_make(j, c, plain_type(), layer, w->size, w->rank, 0);
    {
        cp_forward_args a;
        memset(&a, 0, sizeof a);
        a.struct_size = (uint32_t)sizeof a;
        a.sequences = &j->seq.s;
        a.q = j->t[T_Q].t;
        a.k = j->t[T_K].t;
        a.v = j->t[T_V].t;
        a.out = j->t[T_OUT].t;
        a.lse = j->t[T_LSE].t;
        a.v.shape[2] += odd;
        status = cp_attention_forward(layer, &a, gpu_stream());
    }
    snprintf(named, sizeof named, "rank %d refused cp_attention_forward: v: got shape", w->size - 1);
    good = odd ? status == CP_ERR_INVALID_ARGUMENT && strstr(cp_last_error(), "v: got shape") != NULL
               : status == CP_ERR_MISMATCH && strstr(cp_last_error(), named) != NULL;
    if (!good)
        fprintf(stderr, "rank %d: got status %d: %s\n", w->rank, status, cp_last_error());
    verdict(w, good, "a rank with a wrong shape is named", t);
    job_forward(j);
    job_backward(j);
    job_results(j, global);
    if (w->rank == 0)
        make_reference(&r, c, plain_type());
    judge(w, c, &r, global, j->failed, t, "after a refusal");
    if (w->rank == 0)
        free_reference(&r);
    check(cp_attention_destroy(layer), w, "cp_attention_destroy");
    job_free(j);
    free(j);
    free(global);
}

/* The examples in tests/data/README.md. */
static void documented(world *w, tally *t) {
    static const float first[4][3] = {{-2.29913330078125f, -2.0272216796875f, 0.83514404296875f},
                                      {-1.8909912109375f, 0.913055419921875f, -1.805389404296875f},
                                      {-0.74847412109375f, 0.155609130859375f, -1.826751708984375f},
                                      {0.806182861328125f, 0.9083251953125f, 1.0416259765625f}};
    static const int queries[7] = {1, 0, 1, 1, 1, 0, 2}, keys[7] = {1, 0, 1, 1, 2, 2, 1}, second[7] = {2, 2, 0, 1, 0, 1, 1};
    int good = mix(0) == UINT64_C(0xE220A8397B1DCDAF), id, i;
    uint32_t u;
    for (id = 0; id < 4; id++)
        for (i = 0; i < 3; i++)
            good &= element((uint64_t)id + 1, (uint64_t)i) == first[id][i];
    for (i = 0; i < 7; i++)
        good &= mix((uint64_t)i) % 3 == (uint64_t)queries[i] && mix(((uint64_t)1 << 62) + (uint64_t)i) % 3 == (uint64_t)keys[i] &&
                mix(((uint64_t)1 << 31) + (uint64_t)i) % 3 == (uint64_t)second[i];
    /* Every 16-bit pattern survives the way to fp32 and back. */
    for (u = 0; u < 65536; u++) {
        float half = decode(u, CP_DTYPE_F16), brain = decode(u, CP_DTYPE_BF16);
        good &= half != half || encode(half, CP_DTYPE_F16) == u;
        good &= brain != brain || encode(brain, CP_DTYPE_BF16) == u;
    }
    good &= rounded(1.0f + 0x1p-9f, CP_DTYPE_BF16) == 1.0f && rounded(1.0f + 0x1.8p-8f, CP_DTYPE_BF16) == 1.0f + 0x1p-7f;
    good &= rounded(65519.0f, CP_DTYPE_F16) == 65504.0f && isinf(rounded(65520.0f, CP_DTYPE_F16)) && rounded(0x1p-25f, CP_DTYPE_F16) == 0;
    verdict(w, good, "generator, partition and rounding as documented", t);
}

static int body(world *w) {
    tally t = {0, 0};
    int i, left_out = 0;
    documented(w, &t);
    for (i = 0; i < case_count; i++)
        if (on_cuda && cases[i].latent_dim > 0)
            left_out++; /* not on CUDA yet */
        else if ((only_tag == NULL || has_tag(&cases[i], only_tag)) && tokens_of(&cases[i], 0) <= most_tokens && tokens_of(&cases[i], 1) <= most_tokens)
            whole_case(w, &cases[i], &t);
    subsets(w, &t);
    interleaved(w, &t);
    if (!trusting)
        refused(w, &t);
    if (w->rank == 0 && left_out > 0)
        printf("left out: %d cases with latents, which are not on CUDA yet\n", left_out);
    if (w->rank == 0)
        printf("%d passed, %d failed\n", t.passed, t.failed);
    return t.failed > 0;
}

static void ways(const char *name) {
    static const char *const names[] = {"auto", "local", "nccl", "staged"};
    static const cp_transport_kind kinds[] = {CP_TRANSPORT_AUTO, CP_TRANSPORT_LOCAL, CP_TRANSPORT_NCCL, CP_TRANSPORT_STAGED};
    on_cuda = 1;
    data_transport = kinds[word_of(name, names, 4, "--cuda")];
}

int main(int argc, char **argv) {
    int ranks = 4, processes = 0, i;
    for (i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (strcmp(argv[i], "--processes") == 0)
            processes = 1;
        else if (strcmp(argv[i], "--exact") == 0)
            guard_bytes = 0;
        else if (strcmp(argv[i], "--trust") == 0)
            trusting = 1;
        else if (strcmp(argv[i], "--cuda") == 0 && ++i)
            ways(value);
        else if (strcmp(argv[i], "--most") == 0 && ++i)
            most_tokens = atoi(value);
        else if (strcmp(argv[i], "--data") == 0 && ++i)
            data_path = value;
        else if (strcmp(argv[i], "--ranks") == 0 && ++i)
            ranks = atoi(value);
        else if (strcmp(argv[i], "--tag") == 0 && ++i)
            only_tag = value;
        else if (strcmp(argv[i], "--every") == 0 && ++i)
            every = (unsigned)atoi(value);
        else
            die("unknown option", argv[i]);
    }
    if (ranks < 1 || ranks > MOST_RANKS || every < 1)
        die("--ranks or --every out of range", "");
    case_count = read_cases(data_path, cases);
    return run_ranks(&argc, &argv, ranks, processes, body);
}
