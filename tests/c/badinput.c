/* Every argument of every function wrong in turn: its own status, a message that names it, outputs untouched, everything usable after.
 * Passes are tried alone and with two ranks, threads of this process, of which the second is wrong: it gets its error, the first one
 * CP_ERR_MISMATCH with the same words. Prints "N passed, N failed".
 *
 * usage: badinput [--no-stale]      --no-stale leaves out the use of destroyed handles, which valgrind rightly minds */
#define _GNU_SOURCE
#include "badinput.h"
#include "badmesh.h"
#include "badschedule.h"

static void about(void) {
    char text[16];
    size_t full;
    int i, j;
    TRUE_(cp_version() > 0);
    TRUE_(strstr(cp_build_info(), "\"version\":\"") != NULL);
    TRUE_(strcmp(cp_last_error(), "") == 0);
    TRUE_(cp_last_error_copy(NULL, 0) == 0);
    for (i = CP_OK; i <= CP_ERR_INTERNAL; i++)
        for (j = i; j <= CP_ERR_INTERNAL + 1; j++)
            TRUE_(i == j || strcmp(cp_status_string(i), cp_status_string(j)) != 0);
    TRUE_(strcmp(cp_status_string(-1), "unknown status") == 0);
    TRUE_(strcmp(cp_status_string(16), "unknown status") == 0);
    TRUE_(strcmp(cp_status_string(INT32_MIN), "unknown status") == 0);
    BAD("id: got", cp_get_unique_id(NULL));
    full = strlen(cp_last_error());
    memset(text, 'x', sizeof text);
    TRUE_(cp_last_error_copy(NULL, 5) == full);
    TRUE_(cp_last_error_copy(text, 0) == full && text[0] == 'x');
    TRUE_(cp_last_error_copy(text, 8) == full && strcmp(text, "invalid") == 0 && text[8] == 'x');
    GOOD(cp_group_destroy(NULL));
    TRUE_(strlen(cp_last_error()) == full); /* success does not clear it */
}

/* config changed by `change`, an init that must fail and leave `group` alone. */
#define INIT(wanted, words, change)                                      \
    do {                                                                 \
        cp_group_config c = alone();                                     \
        cp_group *group = (cp_group *)CANARY;                            \
        change;                                                          \
        EXPECT(wanted, words, cp_group_init(&c, &group));                \
        TRUE_(group == (cp_group *)CANARY);                              \
    } while (0)

static void *no_alloc(void *ctx, size_t bytes, void *stream) {
    (void)ctx, (void)bytes, (void)stream;
    return NULL;
}

static void no_free(void *ctx, void *ptr, size_t bytes, void *stream) {
    (void)ctx, (void)ptr, (void)bytes, (void)stream;
}

static int32_t refusing_allgather(void *ctx, const void *mine, void *all, size_t bytes) {
    (void)ctx, (void)mine, (void)all, (void)bytes;
    return 7;
}

static int32_t lying_allgather(void *ctx, const void *mine, void *all, size_t bytes) {
    (void)ctx, (void)mine;
    memset(all, 0, 2 * bytes);
    return 0;
}

static void group_init(void) {
    struct {
        cp_group_config c;
        uint64_t tail;
    } longer;
    cp_group_config ok = alone();
    cp_group *g = NULL;
    cp_unique_id id, foreign;
    unsigned char bytes[sizeof ok + 8];
    BAD("config: got NULL", cp_group_init(NULL, &g));
    BAD("group: got", cp_group_init(&ok, NULL));
    BAD("group: got", cp_group_init(&ok, (cp_group **)(void *)(bytes + 1)));
    BAD("config: got a pointer that is not aligned", cp_group_init((cp_group_config *)(void *)(bytes + 1), &g));
    INIT(CP_ERR_INVALID_ARGUMENT, "config.struct_size: got 0", c.struct_size = 0);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.struct_size: got 7", c.struct_size = 7);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.size: got 0", c.struct_size = 8);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.flags: got unknown flag(s) 0x2", c.flags = CP_GROUP_AGREE | 2);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.size: got 0", c.size = 0);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.rank: got 1", c.rank = 1);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.bootstrap: got 2", c.bootstrap = 2);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.transport_kind: got 5", c.transport_kind = 5);
    INIT(CP_ERR_UNSUPPORTED, "config.transport_kind: got 3", c.transport_kind = CP_TRANSPORT_NCCL);
    INIT(CP_ERR_UNSUPPORTED, "config.transport_kind: got 4", c.transport_kind = CP_TRANSPORT_STAGED);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.nccl_comm", c.nccl_comm = &ok);
    INIT(CP_ERR_INVALID_ARGUMENT, "nccl_library", c.nccl_library = "libnccl.so.2");
    INIT(CP_ERR_INVALID_ARGUMENT, "config.device_type: got 9", c.device_type = 9);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.device_id: got 1", c.device_id = 1);
    INIT(CP_ERR_INVALID_ARGUMENT, "config.device_id: got -1", (c.device_type = CP_DEVICE_CUDA, c.device_id = -1));
    INIT(CP_ERR_INVALID_ARGUMENT, "config.transport_kind: got 5", (c.device_type = CP_DEVICE_CUDA, c.transport_kind = 5));
    INIT(CP_ERR_UNSUPPORTED, "CP_TRANSPORT_SHM", (c.device_type = CP_DEVICE_CUDA, c.transport_kind = CP_TRANSPORT_SHM));
    INIT(CP_ERR_INVALID_ARGUMENT, "size 2 needs an id", (c.device_type = CP_DEVICE_CUDA, c.size = 2));
    if (strstr(cp_build_info(), "\"cuda\":null"))
        INIT(CP_ERR_UNSUPPORTED, "CUDA: libcuda.so.1 was not found", c.device_type = CP_DEVICE_CUDA);
    else
        INIT(CP_ERR_INVALID_ARGUMENT, "device_id: got 4095", (c.device_type = CP_DEVICE_CUDA, c.device_id = 4095));
    INIT(CP_ERR_INVALID_ARGUMENT, "size 2 needs an id", c.size = 2);
    INIT(CP_ERR_INVALID_ARGUMENT, "RANK and WORLD_SIZE", c.bootstrap = CP_BOOTSTRAP_ENV);
    setenv("RANK", "3", 1);
    INIT(CP_ERR_INVALID_ARGUMENT, "WORLD_SIZE is not set", c.bootstrap = CP_BOOTSTRAP_ENV);
    setenv("WORLD_SIZE", "3", 1);
    INIT(CP_ERR_INVALID_ARGUMENT, "RANK is \"3\"", c.bootstrap = CP_BOOTSTRAP_ENV);
    unsetenv("RANK");
    unsetenv("WORLD_SIZE");
    GOOD(cp_get_unique_id(&id));
    foreign = id;
    foreign.bytes[0] ^= 1;
    INIT(CP_ERR_INVALID_ARGUMENT, "give one of id, allgather, transport", (c.id = &id, c.allgather = refusing_allgather));
    INIT(CP_ERR_INVALID_ARGUMENT, "CP_BOOTSTRAP_ENV", (c.id = &id, c.bootstrap = CP_BOOTSTRAP_ENV));
    INIT(CP_ERR_INVALID_ARGUMENT, "not a unique id", (c.size = 2, c.id = &foreign));
    foreign = id;
    foreign.bytes[8] ^= 1;
    INIT(CP_ERR_UNSUPPORTED, "made on another host", (c.size = 2, c.id = &foreign));
    INIT(CP_ERR_TIMEOUT, "rank 1", (c.size = 2, c.id = &id, c.timeout_ms = 50));
    INIT(CP_ERR_INVALID_ARGUMENT, "used already", (c.size = 2, c.id = &id));
    INIT(CP_ERR_PEER_LOST, "rank 1: nobody listens", (c.size = 2, c.rank = 1, c.id = &id));
    INIT(CP_ERR_TRANSPORT, "config.allgather: returned 7", (c.size = 2, c.allgather = refusing_allgather));
    INIT(CP_ERR_INVALID_ARGUMENT, "did not return this rank's bytes", (c.size = 2, c.allgather = lying_allgather));
    memset(&longer, 0, sizeof longer);
    longer.c = alone();
    longer.c.struct_size = (uint32_t)sizeof longer;
    GOOD(cp_group_init(&longer.c, &g));
    GOOD(cp_group_destroy(g));
    longer.tail = (uint64_t)1 << 56;
    EXPECT(CP_ERR_VERSION, "config: byte", cp_group_init(&longer.c, &g));
    ok.struct_size = 16; /* up to `size` */
    GOOD(cp_group_init(&ok, &g));
    GOOD(cp_group_destroy(g));
}

static int32_t no_start(void *ctx, const cp_message *s, size_t ns, const cp_message *r, size_t nr) {
    (void)ctx, (void)s, (void)ns, (void)r, (void)nr;
    return CP_ERR_TRANSPORT;
}

static int32_t no_test(void *ctx, int32_t *done) {
    (void)ctx, (void)done;
    return CP_ERR_TRANSPORT;
}

static void no_cancel(void *ctx) {
    (void)ctx;
}

static int32_t odd_allgather(void *ctx, const uint32_t *members, size_t n, const void *mine, void *all, size_t bytes, uint64_t ms) {
    (void)ctx, (void)members, (void)n, (void)mine, (void)all, (void)bytes, (void)ms;
    return 12345;
}

static void user_transport(void) {
    cp_transport_ops ops;
    cp_group_config c = alone();
    cp_group *g = NULL;
    memset(&ops, 0, sizeof ops);
    ops.struct_size = (uint32_t)sizeof ops;
    ops.start = no_start;
    ops.test = no_test;
    ops.cancel = no_cancel;
    ops.allgather = odd_allgather;
    c.size = 2;
    c.transport = &ops;
    ops.struct_size = 0;
    BAD("ops.struct_size is 0", cp_group_init(&c, &g));
    ops.struct_size = (uint32_t)sizeof ops;
    ops.flags = 2;
    BAD("ops.flags is 0x2", cp_group_init(&c, &g));
    ops.flags = 0;
    ops.start = NULL;
    BAD("ops.start is NULL", cp_group_init(&c, &g));
    ops.start = no_start;
    ops.allgather = NULL;
    BAD("ops.allgather is NULL", cp_group_init(&c, &g));
    ops.allgather = odd_allgather;
    GOOD(cp_group_init(&c, &g));
    EXPECT(CP_ERR_TRANSPORT, "rank 0: allgather of the user transport returned 12345", cp_group_barrier(g));
    EXPECT(CP_ERR_TRANSPORT, "the group is lost since", cp_group_barrier(g));
    GOOD(cp_group_destroy(g));
}

static void group_functions(cp_group *g, cp_attention *layer) {
    union {
        uint32_t n[4];
        unsigned char bytes[16];
    } out = {{77, 77, 77, 77}};
    uint32_t members[2] = {0, 0};
    cp_group *subset = (cp_group *)CANARY;
    cp_statistics s;
    struct {
        cp_statistics s;
        uint64_t tail;
    } longer;
    const cp_group *not_a_group = (const cp_group *)layer;
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_subset(NULL, members, 1, &subset));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_group_subset(not_a_group, members, 1, &subset));
    BAD("ranks: got", cp_group_subset(g, NULL, 1, &subset));
    BAD("ranks: got", cp_group_subset(g, (uint32_t *)(void *)(out.bytes + 1), 1, &subset));
    BAD("ranks: got none", cp_group_subset(g, members, 0, &subset));
    BAD("with count 18446744073709551615", cp_group_subset(g, members, SIZE_MAX, &subset));
    BAD("0 is named twice", cp_group_subset(g, members, 2, &subset));
    members[0] = 9;
    BAD("ranks: got 9, the group has ranks 0", cp_group_subset(g, members, 1, &subset));
    members[0] = 0;
    BAD("subset: got", cp_group_subset(g, members, 1, NULL));
    TRUE_(subset == (cp_group *)CANARY);
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_rank(NULL, out.n));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_group_rank(not_a_group, out.n));
    BAD("rank: got", cp_group_rank(g, NULL));
    BAD("rank: got", cp_group_rank(g, (uint32_t *)(void *)(out.bytes + 1)));
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_size(NULL, out.n));
    BAD("size: got", cp_group_size(g, NULL));
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_global_ranks(NULL, out.n, 1));
    BAD("ranks: got", cp_group_global_ranks(g, NULL, 1));
    BAD("capacity: got 0", cp_group_global_ranks(g, out.n, 0));
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_barrier(NULL));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_group_barrier((cp_group *)layer));
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_abort(NULL));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_group_destroy((cp_group *)layer));
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got a pointer that is no handle", cp_group_destroy((cp_group *)(void *)(out.bytes + 1)));
    GOOD(cp_group_destroy(NULL));
    memset(&s, 0x55, sizeof s);
    s.struct_size = 4;
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_statistics(NULL, &s));
    BAD("statistics: got NULL", cp_group_statistics(g, NULL));
    BAD("statistics.struct_size: got 4", cp_group_statistics(g, &s));
    s.struct_size = 16;
    GOOD(cp_group_statistics(g, &s));
    TRUE_(s.struct_size == 16 && s.flags == 0 && s.sent_bytes == 0 && s.received_bytes == UINT64_C(0x5555555555555555));
    memset(&longer, 0, sizeof longer);
    longer.s.struct_size = (uint32_t)sizeof longer;
    GOOD(cp_group_statistics(g, &longer.s));
    longer.tail = 1;
    EXPECT(CP_ERR_VERSION, "statistics: byte", cp_group_statistics(g, &longer.s));
    TRUE_(out.n[0] == 77 && out.n[1] == 77);
}

static void partitions(void) {
    uint64_t padded = 99;
    uint32_t tokens[16];
    size_t n = 99;
    cp_sequences s;
    memset(&s, 0, sizeof s);
    s.struct_size = (uint32_t)sizeof s;
    s.count = 1;
    s.seq_q = 16;
    BAD("partition: got 5", cp_partition_padded_length(5, 2, 10, &padded));
    BAD("a caller's list has no padded length", cp_partition_padded_length(CP_PARTITION_LIST, 2, 10, &padded));
    BAD("balanced gives ranks equal shares", cp_partition_padded_length(CP_PARTITION_BALANCED, 2, 10, &padded));
    BAD("0 ranks", cp_partition_padded_length(CP_PARTITION_ZIGZAG, 0, 10, &padded));
    BAD("length 18446744073709551615", cp_partition_padded_length(CP_PARTITION_ZIGZAG, 2, UINT64_MAX, &padded));
    BAD("padded: got", cp_partition_padded_length(CP_PARTITION_ZIGZAG, 2, 10, NULL));
    TRUE_(padded == 99);
    GOOD(cp_partition_padded_length(CP_PARTITION_ZIGZAG, 2, 10, &padded));
    TRUE_(padded == 12);
    BAD("partition: got 9", cp_partition_tokens(9, 0, &s, 2, 0, 0, tokens, 16, &n));
    BAD("format: got 2", cp_partition_tokens(0, 2, &s, 2, 0, 0, tokens, 16, &n));
    BAD("sequences: got NULL", cp_partition_tokens(0, 0, NULL, 2, 0, 0, tokens, 16, &n));
    BAD("ranks: got 0", cp_partition_tokens(0, 0, &s, 0, 0, 0, tokens, 16, &n));
    BAD("ranks: got 4294967295", cp_partition_tokens(0, 0, &s, UINT32_MAX, 0, 0, tokens, 16, &n));
    BAD("rank: got 2", cp_partition_tokens(0, 0, &s, 2, 2, 0, tokens, 16, &n));
    BAD("side: got 2", cp_partition_tokens(0, 0, &s, 2, 0, 2, tokens, 16, &n));
    BAD("indices: got", cp_partition_tokens(0, 0, &s, 2, 0, 0, (uint32_t *)(void *)((char *)tokens + 1), 8, &n));
    BAD("count: got", cp_partition_tokens(0, 0, &s, 2, 0, 0, tokens, 16, NULL));
    TRUE_(n == 99);
    tokens[3] = 1234;
    GOOD(cp_partition_tokens(0, 0, &s, 2, 0, 0, tokens, 3, &n));
    TRUE_(n == 8 && tokens[0] == 0 && tokens[3] == 1234);
}

/* What goes with a rank's rows: one sequence of 16 tokens on two ranks, zigzag; rank 0 has 0 … 3 and 12 … 15. */
static void rows_and_losses(void) {
    uint32_t list[8], other[8], counts[2][2];
    float weights[8];
    double factor = 99;
    uint64_t tokens = 99;
    size_t n = 99;
    cp_sequences s;
    cp_loss_config loss;
    memset(&s, 0, sizeof s);
    s.struct_size = (uint32_t)sizeof s;
    s.count = 1;
    s.seq_q = 16;
    memset(&loss, 0, sizeof loss);
    loss.struct_size = (uint32_t)sizeof loss;
    BAD("rank: got 2", cp_partition_positions(0, 0, &s, 2, 2, 0, list, 8, &n));
    BAD("side: got 7", cp_partition_positions(0, 0, &s, 2, 0, 7, list, 8, &n));
    BAD("values: got", cp_partition_positions(0, 0, &s, 2, 0, 0, (uint32_t *)(void *)((char *)list + 1), 7, &n));
    BAD("count: got", cp_partition_positions(0, 0, &s, 2, 0, 0, list, 8, NULL));
    BAD("sequences: got NULL", cp_partition_shift(0, 0, NULL, 2, 0, 0, 1, list, 8, &n));
    EXPECT(CP_ERR_UNSUPPORTED, "balanced deals out packed documents", cp_partition_shift(CP_PARTITION_BALANCED, 0, &s, 2, 0, 0, 1, list, 8, &n));
    BAD("ranks: got 0", cp_partition_order(0, 0, &s, 0, 0, list, 8, &n));
    BAD("send_counts: got", cp_partition_shift_exchange(0, 0, &s, 2, 0, 0, 1, list, NULL, other, counts[1], 8));
    BAD("rank: got 3", cp_loss_weights(0, 0, &s, 2, 3, 1, weights, 8, &n));
    BAD("count: got", cp_loss_tokens(0, &s, 1, NULL));
    BAD("config: got NULL", cp_loss_scale(NULL, &factor));
    loss.mean = 2;
    BAD("config.mean: got 2", cp_loss_scale(&loss, &factor));
    loss.mean = 0;
    loss.gradients = 3;
    BAD("config.gradients: got 3", cp_loss_scale(&loss, &factor));
    loss.gradients = CP_GRADIENTS_AVERAGED;
    loss.tokens = -1;
    BAD("tokens: got -1", cp_loss_scale(&loss, &factor));
    TRUE_(n == 99 && tokens == 99 && factor == 99);
    loss.tokens = 8;
    loss.cp_size = 4;
    GOOD(cp_loss_scale(&loss, &factor));
    TRUE_(factor == 0.5);
    GOOD(cp_loss_tokens(0, &s, 3, &tokens));
    TRUE_(tokens == 13);
    GOOD(cp_partition_positions(0, 0, &s, 2, 0, 0, list, 8, &n));
    TRUE_(n == 8 && list[3] == 3 && list[4] == 12);
    GOOD(cp_partition_lengths(0, 0, &s, 2, 0, 0, list, NULL, 8, &n));
    TRUE_(n == 1 && list[0] == 8);
    GOOD(cp_partition_shift(0, 0, &s, 2, 0, 0, 1, list, 8, &n));
    TRUE_(n == 8 && list[3] == 4 && list[7] == CP_NO_TOKEN);
    GOOD(cp_partition_shift_exchange(0, 0, &s, 2, 0, 0, 1, list, counts[0], other, counts[1], 8));
    TRUE_(counts[0][0] == 6 && counts[0][1] == 1 && list[6] == 4 && counts[1][0] == 6 && counts[1][1] == 1 && other[6] == 3);
    GOOD(cp_loss_weights(0, 0, &s, 2, 0, 1, weights, 8, &n));
    TRUE_(n == 8 && weights[6] == 1 && weights[7] == 0);
}

/* On a group of one everything is there already. */
static void rows_of_a_group(const cp_group *group) {
    uint32_t local[16], out[16];
    cp_sequences s;
    cp_rows_args a;
    int i;
    memset(&s, 0, sizeof s);
    s.struct_size = (uint32_t)sizeof s;
    s.count = 1;
    s.seq_q = 16;
    memset(&a, 0, sizeof a);
    a.struct_size = (uint32_t)sizeof a;
    a.sequences = &s;
    a.shift = 2;
    a.row_bytes = 4;
    a.local = local;
    a.local_rows = 16;
    a.out = out;
    a.out_rows = 16;
    for (i = 0; i < 16; i++) {
        local[i] = 100 + (uint32_t)i;
        out[i] = 7;
    }
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got NULL", cp_group_shift(NULL, &a));
    BAD("args: got NULL", cp_group_shift(group, NULL));
    BAD("args.shift: got 2", cp_group_gather(group, &a));
    a.flags = 1;
    BAD("args.flags: got 0x1", cp_group_shift(group, &a));
    a.flags = 0;
    a.row_bytes = 0;
    BAD("args.row_bytes: got 0", cp_group_shift(group, &a));
    a.row_bytes = SIZE_MAX / 2;
    BAD("args.local: got", cp_group_shift(group, &a));
    a.row_bytes = 4;
    a.out = NULL;
    BAD("args.out: got", cp_group_shift(group, &a));
    a.out = out;
    a.local_rows = 15;
    BAD("local_rows: got 15, must be 16", cp_group_shift(group, &a));
    a.local_rows = 16;
    a.out_rows = 17;
    BAD("out_rows: got 17, must be 16", cp_group_gather(group, (a.shift = 0, &a)));
    TRUE_(out[0] == 7);
    a.shift = 2;
    a.out_rows = 16;
    GOOD(cp_group_shift(group, &a));
    TRUE_(out[0] == 102 && out[13] == 115 && out[14] == 7);
    a.shift = 0;
    GOOD(cp_group_gather(group, &a));
    TRUE_(out[0] == 100 && out[15] == 115);
}

/* A layer that must be refused, by cp_attention_create and cp_query_support alike. */
#define LAYER(wanted, words, change)                                      \
    do {                                                                  \
        cp_attention_config c = small_layer();                            \
        cp_attention *layer = (cp_attention *)CANARY;                     \
        change;                                                           \
        EXPECT(wanted, words, cp_attention_create(&c, &layer));           \
        TRUE_(layer == (cp_attention *)CANARY);                           \
        EXPECT(wanted, words, cp_query_support(&c, NULL, 2));             \
    } while (0)

static void layers(void) {
    struct {
        cp_attention_config c;
        uint32_t tail[3];
    } longer;
    cp_attention_config ok = small_layer();
    cp_attention *layer = NULL;
    unsigned char bytes[sizeof ok + 8];
    float zero = 0, slopes[HEADS] = {1, 1, 1, 1};
    BAD("config: got NULL", cp_attention_create(NULL, &layer));
    BAD("attention: got", cp_attention_create(&ok, NULL));
    BAD("config: got a pointer that is not aligned", cp_attention_create((cp_attention_config *)(void *)(bytes + 1), &layer));
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.struct_size: got 4", c.struct_size = 4);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.flags: got unknown flag(s) 0x100", c.flags |= 0x100);
    LAYER(CP_ERR_UNSUPPORTED, "CP_ATTENTION_KV_CACHE", c.flags |= CP_ATTENTION_KV_CACHE);
    LAYER(CP_ERR_INVALID_ARGUMENT, "heads: got 0", c.heads = 0);
    LAYER(CP_ERR_INVALID_ARGUMENT, "heads: got 4 query heads and 3", c.kv_heads = 3);
    LAYER(CP_ERR_INVALID_ARGUMENT, "heads: got 4 query heads and 8", c.kv_heads = 8);
    LAYER(CP_ERR_INVALID_ARGUMENT, "head_dim_qk: got 0", c.head_dim_qk = 0);
    LAYER(CP_ERR_INVALID_ARGUMENT, "head_dim_qk: got 12", c.head_dim_qk = 12);
    LAYER(CP_ERR_INVALID_ARGUMENT, "head_dim_qk: got 264", c.head_dim_qk = 264);
    LAYER(CP_ERR_INVALID_ARGUMENT, "head_dim_v: got 20", c.head_dim_v = 20);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.dtype: got 0", c.dtype = 0);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.dtype: got 4", c.dtype = 4);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.format: got 2", c.format = 2);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.partition: got 5", c.partition = 5);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.window_left: got 3 without its flag", c.window_left = 3);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.window_right: got 3 without its flag", c.window_right = 3);
    LAYER(CP_ERR_INVALID_ARGUMENT, "softmax_scale: got inf", c.softmax_scale = 1 / zero);
    LAYER(CP_ERR_INVALID_ARGUMENT, "softmax_scale: got", c.softmax_scale = zero / zero);
    LAYER(CP_ERR_INVALID_ARGUMENT, "softcap: got -1", c.softcap = -1);
    LAYER(CP_ERR_INVALID_ARGUMENT, "softcap: got inf", c.softcap = 1 / zero);
    LAYER(CP_ERR_INVALID_ARGUMENT, "softcap: got NaN", c.softcap = zero / zero);
    LAYER(CP_ERR_INVALID_ARGUMENT, "dropout: got 1, allowed 0", c.dropout = 1);
    LAYER(CP_ERR_INVALID_ARGUMENT, "dropout: got -0.25", c.dropout = -0.25f);
    LAYER(CP_ERR_INVALID_ARGUMENT, "dropout: got NaN", c.dropout = zero / zero);
    LAYER(CP_ERR_INVALID_ARGUMENT, "alibi_slopes: got NaN", (slopes[2] = zero / zero, c.alibi_slopes = slopes));
    LAYER(CP_ERR_INVALID_ARGUMENT, "alibi_slopes: got -inf", (slopes[2] = -1 / zero, c.alibi_slopes = slopes));
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.alibi_slopes: got", c.alibi_slopes = (const float *)(const void *)((const char *)slopes + 1));
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.sinks: got 3, allowed CP_REACH_NONE (0)", c.sinks = 3);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.max_logit: got 3, allowed CP_REACH_NONE (0)", c.max_logit = 3);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.kv_wire: got 3, allowed CP_KV_WIRE_STORAGE (0), _E4M3 (1), _E5M2 (2)", c.kv_wire = 3);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.reserved", c.reserved = 1);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.bias: got unknown flag(s) 0x20", c.bias = CP_BIAS | 0x20);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.bias: got 0x4 without CP_BIAS", c.bias = CP_BIAS_HEADS);
    LAYER(CP_ERR_INVALID_ARGUMENT, "bias: a gradient needs one bias per query", c.bias = CP_BIAS | CP_BIAS_GRADIENT);
    LAYER(CP_ERR_INVALID_ARGUMENT, "latent_dim: got 12, allowed multiples of 8", c.latent_dim = 12);
    LAYER(CP_ERR_INVALID_ARGUMENT, "latent_dim: got 4104", c.latent_dim = 4104);
    LAYER(CP_ERR_INVALID_ARGUMENT, "latent_rope: got 12", (c.latent_dim = 16, c.latent_rope = 12));
    LAYER(CP_ERR_INVALID_ARGUMENT, "latent_rope: got 4096, allowed multiples of 8 below", (c.latent_dim = 16, c.latent_rope = 4096));
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.latent_rope: got 8 without latent_dim", c.latent_rope = 8);
    LAYER(CP_ERR_INVALID_ARGUMENT, "with a latent, which is expanded for each of the", (c.latent_dim = 16, c.kv_heads = 1));
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.threads: got 1025", c.threads = 1025);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.device_type: got 3", c.device_type = 3);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.device_id: got 2", c.device_id = 2);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.sm_margin", c.sm_margin = 8);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.max_segments", c.max_segments = 8);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.device_alloc: given", (c.device_alloc = no_alloc, c.device_free = no_free));
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.device_alloc, device_free: give both", c.device_alloc = no_alloc);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.device_alloc, device_free: give both", c.device_alloc_ctx = &ok);
    LAYER(CP_ERR_INVALID_ARGUMENT, "config.threads: got 4", (c.device_type = CP_DEVICE_CUDA, c.threads = 4));
    setenv("CP_THREADS", "many", 1);
    LAYER(CP_ERR_INVALID_ARGUMENT, "CP_THREADS: got \"many\"", c.threads = 0);
    setenv("CP_THREADS", "0", 1);
    LAYER(CP_ERR_INVALID_ARGUMENT, "CP_THREADS: got \"0\"", c.threads = 0);
    unsetenv("CP_THREADS");
    {
        const char *had = getenv("CP_SIMD");
        char *kept = had == NULL ? NULL : strdup(had);
        setenv("CP_SIMD", "mmx", 1);
        BAD("CP_SIMD", cp_attention_create(&ok, &layer));
        if (kept == NULL)
            unsetenv("CP_SIMD");
        else
            setenv("CP_SIMD", kept, 1);
        free(kept);
    }
    memset(&longer, 0, sizeof longer);
    longer.c = ok;
    longer.c.struct_size = (uint32_t)sizeof longer;
    GOOD(cp_attention_create(&longer.c, &layer));
    GOOD(cp_attention_destroy(layer));
    longer.tail[2] = 1;
    EXPECT(CP_ERR_VERSION, "config: byte", cp_attention_create(&longer.c, &layer));
    ok.struct_size = 32; /* up to `format` */
    GOOD(cp_attention_create(&ok, &layer));
    GOOD(cp_attention_destroy(layer));
}

/* A communication that must be refused on four ranks. */
#define COMM(wanted, words, change)                               \
    do {                                                          \
        cp_comm_config m = ring();                                \
        change;                                                   \
        EXPECT(wanted, words, cp_query_support(&c, &m, 4));       \
    } while (0)

static void communications(void) {
    cp_attention_config c = small_layer();
    cp_comm_config odd = ring();
    odd.struct_size = 3;
    BAD("ranks: got 0", cp_query_support(&c, NULL, 0));
    BAD("config: got NULL", cp_query_support(NULL, NULL, 2));
    BAD("comm.struct_size: got 3", cp_query_support(&c, &odd, 2));
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.flags: got unknown flag(s) 0x4", m.flags = 4);
    COMM(CP_ERR_UNSUPPORTED, "CP_COMM_MOVE_QUERIES", m.flags = CP_COMM_MOVE_QUERIES);
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.comm_type: got 4", m.comm_type = 4);
    COMM(CP_ERR_INVALID_ARGUMENT, "stages: got 4, allowed 1..=3", m.stages = 4);
    COMM(CP_ERR_INVALID_ARGUMENT, "relay", (m.flags = CP_COMM_RELAY, m.stages = 1));
    COMM(CP_ERR_INVALID_ARGUMENT, "stages: got 1", (m.comm_type = CP_COMM_A2A, m.stages = 1));
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.level_count: got 1", m.level_count = 1);
    COMM(CP_ERR_UNSUPPORTED, "comm.level_count: got 3", m.level_count = 3);
    COMM(CP_ERR_INVALID_ARGUMENT, "unused sizes must be 0", m.level_sizes[0] = 2);
    COMM(CP_ERR_INVALID_ARGUMENT, "p2p has no levels", (m.level_count = 2, m.level_sizes[0] = m.level_sizes[1] = 2));
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.level_sizes: got 3 x 2, the group has 4",
         (m.comm_type = CP_COMM_A2A_P2P, m.level_count = 2, m.level_sizes[0] = 3, m.level_sizes[1] = 2));
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.level_sizes",
         (m.comm_type = CP_COMM_A2A_P2P, m.level_count = 2, m.level_sizes[0] = 0, m.level_sizes[1] = 4));
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.reserved", m.reserved = 1);
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.memory_cap_bytes: got 0 with CP_STAGES_AUTO", m.stages = CP_STAGES_AUTO);
    COMM(CP_ERR_INVALID_ARGUMENT, "comm.memory_cap_bytes: got 5 without", m.memory_cap_bytes = 5);
}

/* Functions of a layer other than its passes. */
static void layer_functions(cp_group *g, cp_attention *layer) {
    cp_sequences s = dense(16);
    cp_comm_config comm = ring();
    cp_report r;
    size_t n = 99;
    char text[64];
    cp_attention *wrong = (cp_attention *)g;
    EXPECT(CP_ERR_INVALID_HANDLE, "attention: got NULL", cp_set_group(NULL, g, &comm));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_set_group(wrong, g, &comm));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_set_group(layer, (cp_group *)layer, &comm));
    comm.comm_type = 7;
    BAD("comm.comm_type: got 7", cp_set_group(layer, g, &comm));
    BAD("comm.comm_type: got 7", cp_set_group(layer, NULL, &comm));
    EXPECT(CP_ERR_INVALID_HANDLE, "attention: got NULL", cp_attention_workspace_size(NULL, 16, &n));
    BAD("bytes: got", cp_attention_workspace_size(layer, 16, NULL));
    EXPECT(CP_ERR_UNSUPPORTED, "4294967295 tokens", cp_attention_workspace_size(layer, UINT32_MAX, &n));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_attention_saved_size(wrong, &s, &n));
    BAD("sequences: got NULL", cp_attention_saved_size(layer, NULL, &n));
    BAD("bytes: got", cp_attention_saved_size(layer, &s, NULL));
    memset(&r, 0, sizeof r);
    EXPECT(CP_ERR_INVALID_HANDLE, "attention: got NULL", cp_attention_report(NULL, &s, &r));
    BAD("sequences: got NULL", cp_attention_report(layer, NULL, &r));
    BAD("report: got NULL", cp_attention_report(layer, &s, NULL));
    BAD("report.struct_size: got 0", cp_attention_report(layer, &s, &r));
    r.struct_size = 24;
    GOOD(cp_attention_report(layer, &s, &r));
    TRUE_(r.struct_size == 24 && r.backward_workspace > 0 && r.forward_flops == 0);
    EXPECT(CP_ERR_INVALID_HANDLE, "attention: got NULL", cp_attention_plan(NULL, &s, 0, 0, text, 64, &n));
    BAD("sequences: got NULL", cp_attention_plan(layer, NULL, 0, 0, text, 64, &n));
    BAD("pass: got 2", cp_attention_plan(layer, &s, 2, 0, text, 64, &n));
    BAD("format: got 2", cp_attention_plan(layer, &s, 0, 2, text, 64, &n));
    BAD("capacity: got 0", cp_attention_plan(layer, &s, 0, 0, text, 0, &n));
    BAD("length: got", cp_attention_plan(layer, &s, 0, 0, text, 64, NULL));
    TRUE_(n == 99);
    GOOD(cp_attention_plan(layer, &s, 0, 0, text, 64, &n));
    TRUE_(n > 64 && strlen(text) == 63);
    GOOD(cp_attention_plan(layer, &s, 1, 1, NULL, 0, &n));
    GOOD(cp_attention_destroy(NULL));
    EXPECT(CP_ERR_INVALID_HANDLE, "of another kind", cp_attention_destroy(wrong));
}

/* Lengths that make no sense, to a function that does not touch tensors. */
#define SEQUENCES(layer, words, change)                                        \
    do {                                                                       \
        cp_sequences s = base;                                                 \
        size_t bytes = 99;                                                     \
        change;                                                                \
        BAD(words, cp_attention_saved_size(layer, &s, &bytes));                \
        TRUE_(bytes == 99);                                                    \
    } while (0)

/* The same with two slices, of which the second is spoilt. */
#define SLICES(layer, words, change)                                           \
    do {                                                                       \
        cp_mask_slice slices[2] = {{0, 0, 8, 0, 5, 0, 0, 0}, {0, 4, 8, 5, 8, 0, 0, 0}}; \
        SEQUENCES(layer, words, (s.slices = slices, s.slice_count = 2, change)); \
    } while (0)

static void lengths(void) {
    static const cp_mask_slice slices[1] = {{0, 0, 8, 0, 5, 0, 0, 0}};
    static const int32_t cu[] = {0, 5, 16}, from_one[] = {1, 5, 16}, falling[] = {0, 16, 5}, wide[] = {0, 8, 20}, narrow[] = {0, 4, 16};
    static const int32_t negative[] = {-1, 5}, lens[] = {10, 17}, before[] = {7, 0}, extreme[] = {0, INT32_MAX, INT32_MIN};
    cp_stretch list[3] = {{0, 0, 1, 16}, {1, 0, 1, 16}, {1, 0, 1, 1}};
    uint32_t counts[1] = {2};
    cp_attention_config config = small_layer();
    cp_attention *layer = NULL;
    cp_sequences base = dense(16);
    base.count = 2;
    GOOD(cp_attention_create(&config, &layer));
    SEQUENCES(layer, "sequences.struct_size: got 1", s.struct_size = 1);
    SEQUENCES(layer, "sequences.flags", s.flags = 1);
    SEQUENCES(layer, "sequences.reserved", s.reserved = 1);
    SEQUENCES(layer, "sequences.count: got 0", s.count = 0);
    SEQUENCES(layer, "sequences.seq_q: got 0", s.seq_q = 0);
    SEQUENCES(layer, "sequences.lens_q[0]: got -1", s.lens_q = negative);
    SEQUENCES(layer, "sequences.lens_q[1]: got 17", s.lens_q = lens);
    SEQUENCES(layer, "sequences.lens_k[1]: got 17", s.lens_k = lens);
    SEQUENCES(layer, "sequences.before_q[0]: got -1", s.before_q = negative);
    SEQUENCES(layer, "sequences.lens_q[0]: got 10 tokens after 7", (s.before_q = before, s.lens_q = lens));
    SEQUENCES(layer, "sequences.lens_q: got a pointer that is not aligned", s.lens_q = (const int32_t *)((const char *)lens + 1));
    SEQUENCES(layer, "CP_FORMAT_DENSE", s.cu_seqlens_q = cu);
    SEQUENCES(layer, "sequences.list_*: given", s.list_q = list);
    SEQUENCES(layer, "sequences.slice_count: got 1 with slices", s.slice_count = 1);
    SEQUENCES(layer, "sequences.slice_count: got 0 with slices", s.slices = slices);
    SEQUENCES(layer, "sequences.slice_count: got 4294967296", (s.slices = slices, s.slice_count = (uint64_t)1 << 32));
    SLICES(layer, "sequences.slices: got a pointer that is not aligned", s.slices = (const cp_mask_slice *)((const char *)slices + 2));
    SLICES(layer, "slices[1].flags: got unknown flag(s) 0x4", slices[1].flags = 4);
    SLICES(layer, "slices[1].lo: without its flag", slices[1].lo = 1);
    SLICES(layer, "slices[1].hi: without its flag", slices[1].hi = -1);
    SLICES(layer, "slices[1]: got sequence 2, there are 2", slices[1].sequence = 2);
    SLICES(layer, "slices[1]: got queries 4 … 17", slices[1].q_end = 17);
    SLICES(layer, "slices[1]: got queries 4 … 4", slices[1].q_end = 4);
    SLICES(layer, "slices[1]: got keys 9 … 8", slices[1].k_begin = 9);
    SLICES(layer, "slices[1]: got lo 3 and hi 2", (slices[1].flags = 3, slices[1].lo = 3, slices[1].hi = 2));
    SLICES(layer, "slices[0] and slices[1] both let query 7 of sequence 0 see key 4", slices[1].k_begin = 4);
    GOOD(cp_attention_destroy(layer));
    config.format = CP_FORMAT_PACKED;
    base = dense(0);
    base.count = 2;
    base.cu_seqlens_q = cu;
    GOOD(cp_attention_create(&config, &layer));
    SEQUENCES(layer, "CP_FORMAT_DENSE; a packed layer", s.seq_q = 16);
    SEQUENCES(layer, "CP_FORMAT_DENSE; a packed layer", s.lens_k = lens);
    SEQUENCES(layer, "sequences.cu_seqlens_q: got NULL", s.cu_seqlens_q = NULL);
    SEQUENCES(layer, "sequences.cu_seqlens_q[0]: got 1", s.cu_seqlens_q = from_one);
    SEQUENCES(layer, "sequences.cu_seqlens_q[2]: got 5 after 16", s.cu_seqlens_q = falling);
    SEQUENCES(layer, "sequences.cu_seqlens_k[2]: got 5 after 16", s.cu_seqlens_k = falling);
    SEQUENCES(layer, "sequences.cu_seqlens_q[2]: got -2147483648", s.cu_seqlens_q = extreme);
    SEQUENCES(layer, "sequences.cu_seqlens_q: sequence 0 has 5", s.cu_seqlens_q_padded = narrow);
    SEQUENCES(layer, "sequences.cu_seqlens_k: got NULL although", s.cu_seqlens_k_padded = wide);
    SEQUENCES(layer, "sequences.cu_seqlens_q_padded[0]: got 1", s.cu_seqlens_q_padded = from_one);
    GOOD(cp_attention_destroy(layer));
    config.format = CP_FORMAT_DENSE;
    config.partition = CP_PARTITION_LIST;
    base = dense(16);
    base.count = 2;
    base.list_q = list;
    base.list_q_counts = counts;
    GOOD(cp_attention_create(&config, &layer));
    SEQUENCES(layer, "sequences.list_q: got NULL, but", s.list_q = NULL; s.list_q_counts = NULL);
    SEQUENCES(layer, "list_q and list_q_counts must both be given", s.list_q_counts = NULL);
    SEQUENCES(layer, "list_k and list_k_counts must both be given", s.list_k = list);
    counts[0] = 1;
    SEQUENCES(layer, "q partition list: position 0 of sequence 1 is on no rank", (void)0);
    counts[0] = 3;
    SEQUENCES(layer, "position 0 of sequence 1 is on rank 0 and", (void)0);
    counts[0] = 2;
    list[1].seq = 2;
    SEQUENCES(layer, "sequence 2 does not exist", (void)0);
    list[1].seq = 1;
    list[1].start = 1;
    SEQUENCES(layer, "position 16 is beyond sequence 1", (void)0);
    list[1].start = 0;
    list[1].step = 0;
    SEQUENCES(layer, "step and length must be at least 1", (void)0);
    list[1].step = 1;
    list[1].len = UINT32_MAX;
    list[1].step = UINT32_MAX;
    SEQUENCES(layer, "is beyond sequence 1", (void)0);
    GOOD(cp_attention_destroy(layer));
}

/* Best effort, by a number at the start of every handle. */
static void stale(void) {
    cp_group_config c = alone();
    cp_attention_config k = small_layer();
    cp_group *g = NULL;
    cp_attention *layer = NULL;
    uint32_t rank = 77;
    size_t bytes;
    GOOD(cp_group_init(&c, &g));
    GOOD(cp_group_destroy(g));
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got a handle that was destroyed", cp_group_rank(g, &rank));
    EXPECT(CP_ERR_INVALID_HANDLE, "group: got a handle that was destroyed", cp_group_destroy(g));
    GOOD(cp_attention_create(&k, &layer));
    GOOD(cp_attention_destroy(layer));
    EXPECT(CP_ERR_INVALID_HANDLE, "attention: got a handle that was destroyed", cp_attention_workspace_size(layer, 16, &bytes));
    EXPECT(CP_ERR_INVALID_HANDLE, "attention: got a handle that was destroyed", cp_attention_destroy(layer));
    TRUE_(rank == 77);
}

/* A child of fork has no peers: its parent's handles are refused by name. */
static void forked(cp_group *g, cp_attention *layer) {
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        uint32_t rank;
        size_t bytes;
        int good = cp_group_rank(g, &rank) == CP_ERR_INVALID_USAGE && strstr(cp_last_error(), "group: was made before fork") != NULL;
        good &= cp_attention_workspace_size(layer, 16, &bytes) == CP_ERR_INVALID_USAGE;
        good &= cp_group_destroy(g) != CP_OK && cp_version() > 0;
        _exit(good ? 0 : 1);
    }
    TRUE_(child > 0 && waitpid(child, &status, 0) == child && status == 0);
}

int main(int argc, char **argv) {
    cp_group_config one = alone();
    cp_attention_config config = small_layer();
    cp_group *g = NULL;
    cp_attention *layer = NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    about();
    GOOD(cp_group_init(&one, &g));
    GOOD(cp_attention_create(&config, &layer));
    group_init();
    user_transport();
    group_functions(g, layer);
    partitions();
    rows_and_losses();
    rows_of_a_group(g);
    meshes();
    types_of_layers();
    paddings();
    schedules();
    layers();
    communications();
    layer_functions(g, layer);
    lengths();
    forked(g, layer);
    if (!(argc > 1 && strcmp(argv[1], "--no-stale") == 0))
        stale();
    GOOD(cp_attention_destroy(layer));
    GOOD(cp_group_destroy(g));
    passes(1);
    passes(2);
    disagreements();
    lost_groups();
    printf("%d passed, %d failed\n", passed_count, failed_count);
    return failed_count > 0;
}
