/* badinput.c's part about meshes, communication types per layer and padding: pure functions, every argument wrong in turn. */
#ifndef CP_TEST_BADMESH_H
#define CP_TEST_BADMESH_H

#include "expect.h"

static cp_mesh sixteen(void) {
    cp_mesh m;
    memset(&m, 0, sizeof m);
    m.struct_size = (uint32_t)sizeof m;
    m.tp = m.cp = m.pp = 2;
    m.world_size = 16;
    return m;
}

/* A mesh changed by `change` that every function must refuse, leaving its results alone. */
#define MESH(words, change)                                                              \
    do {                                                                                 \
        cp_mesh m = sixteen(), made = m;                                                 \
        size_t got = 99;                                                                 \
        change;                                                                          \
        BAD(words, cp_mesh_fill(&m, &made));                                             \
        BAD(words, cp_mesh_expert(&m, 1, 1, &made));                                     \
        BAD(words, cp_mesh_members(&m, "cp", 0, NULL, 0, &got, NULL));                   \
        BAD(words, cp_mesh_groups(&m, "cp", NULL, 0, &got));                             \
        BAD(words, cp_mesh_level_members(&m, "cp", &m.cp, 1, 0, 0, NULL, 0, &got, NULL)); \
        BAD(words, cp_mesh_consecutive_members(&m, "cp", 1, 0, NULL, 0, &got, NULL));    \
        TRUE_(got == 99 && made.dp == 0);                                                \
    } while (0)

static void wrong_meshes(void) {
    MESH("mesh.struct_size: got 3", m.struct_size = 3);
    MESH("mesh.flags: got unknown flag(s) 0x1", m.flags = 1);
    MESH("mesh.reserved: got 0x7", m.reserved = 7);
    MESH("\"xx\" is no axis; axes are tp, cp, ep, dp, pp", m.order = "tp-cp-xx");
    MESH("names cp twice", m.order = "tp-cp-cp");
    MESH("does not name pp, whose size is 2", m.order = "tp-dp-cp");
    MESH("which is not UTF-8", m.order = "\xff");
    MESH("ep: got 2 with cp 2", m.ep = 2);
    MESH("does not divide", m.world_size = 15);
    MESH("world size: got 16, but tp 2", m.dp = 3);
    MESH("at most 1048576", m.world_size = m.tp = UINT32_MAX; m.cp = m.pp = 1);
    MESH("at most 1048576", m.first_rank = UINT32_MAX);
}

static void meshes(void) {
    cp_mesh m = sixteen(), made = m;
    uint32_t ranks[16] = {77}, index = 77, sizes[2] = {2, 1};
    size_t n = 99;
    struct {
        cp_mesh m;
        uint64_t tail;
    } longer;
    wrong_meshes();
    BAD("mesh: got NULL", cp_mesh_fill(NULL, &made));
    BAD("filled: got NULL", cp_mesh_fill(&m, NULL));
    BAD("expert: got NULL", cp_mesh_expert(&m, 1, 1, NULL));
    BAD("ep: got size 0", cp_mesh_expert(&m, 1, 0, &made));
    BAD("tp: got size 0", cp_mesh_expert(&m, 0, 1, &made));
    BAD("does not divide", cp_mesh_expert(&m, 1, 3, &made));
    BAD("axes: got NULL", cp_mesh_members(&m, NULL, 0, ranks, 16, &n, &index));
    BAD("axes: got \"\"", cp_mesh_members(&m, "", 0, ranks, 16, &n, &index));
    BAD("\"c\" is no axis", cp_mesh_groups(&m, "c", ranks, 16, &n));
    BAD("rank: got 16, the mesh has ranks 0", cp_mesh_members(&m, "cp", 16, ranks, 16, &n, &index));
    BAD("members: got", cp_mesh_members(&m, "cp", 0, (uint32_t *)(void *)((char *)ranks + 1), 15, &n, &index));
    BAD("count: got", cp_mesh_members(&m, "cp", 0, ranks, 16, NULL, &index));
    BAD("index: got", cp_mesh_members(&m, "cp", 0, ranks, 16, &n, (uint32_t *)(void *)((char *)ranks + 1)));
    BAD("capacity: got 15, the mesh has 16", cp_mesh_groups(&m, "cp", ranks, 15, &n));
    BAD("group_size: got", cp_mesh_groups(&m, "cp", ranks, 16, NULL));
    BAD("sizes: got", cp_mesh_level_members(&m, "cp", NULL, 2, 0, 0, ranks, 16, &n, &index));
    BAD("with 33 levels", cp_mesh_level_members(&m, "cp", sizes, 33, 0, 0, ranks, 16, &n, &index));
    BAD("the group has 4 ranks", cp_mesh_level_members(&m, "dp-cp", sizes, 2, 0, 0, ranks, 16, &n, &index));
    BAD("level: got 2, there are levels 0 … 1", cp_mesh_level_members(&m, "cp", sizes, 2, 2, 0, ranks, 16, &n, &index));
    BAD("group size: got 0, allowed 1 … 4", cp_mesh_consecutive_members(&m, "dp-cp", 0, 0, ranks, 16, &n, &index));
    BAD("leave over [6]", cp_mesh_consecutive_members(&m, "dp-cp", 3, 6, ranks, 16, &n, &index));
    TRUE_(n == 99 && index == 77 && ranks[0] == 77 && made.dp == 0);

    /* The shortest struct there is, and one longer than known. */
    GOOD(cp_mesh_fill(&m, &made));
    TRUE_(made.dp == 2 && made.ep == 1 && made.world_size == 16);
    memset(&made, 0, sizeof made);
    made.struct_size = 8;
    GOOD(cp_mesh_groups(&made, "tp-dp-cp", ranks, 16, &n));
    TRUE_(n == 1 && ranks[0] == 0);
    memset(&longer, 0, sizeof longer);
    longer.m = m;
    longer.m.struct_size = (uint32_t)sizeof longer;
    GOOD(cp_mesh_groups(&longer.m, "cp", NULL, 0, &n));
    longer.tail = 1;
    EXPECT(CP_ERR_VERSION, "mesh: byte", cp_mesh_groups(&longer.m, "cp", NULL, 0, &n));

    /* No more is written than fits. */
    ranks[1] = 77;
    GOOD(cp_mesh_members(&m, "cp", 7, ranks, 1, &n, &index));
    TRUE_(n == 2 && index == 1 && ranks[0] == 5 && ranks[1] == 77);
    GOOD(cp_mesh_groups(&m, "dp-cp", ranks, 16, &n));
    TRUE_(n == 4 && ranks[0] == 0 && ranks[3] == 6 && ranks[4] == 1 && ranks[12] == 9 && ranks[15] == 15);
    GOOD(cp_mesh_level_members(&m, "cp", sizes, 2, 0, 7, ranks, 16, &n, NULL));
    TRUE_(n == 2 && ranks[0] == 5 && ranks[1] == 7);
    GOOD(cp_mesh_consecutive_members(&m, "dp-cp", 3, 4, ranks, 16, &n, &index));
    TRUE_(n == 3 && index == 2 && ranks[0] == 0 && ranks[2] == 4);
    GOOD(cp_mesh_expert(&m, 1, 4, &m)); /* in place */
    TRUE_(m.tp == 1 && m.cp == 1 && m.ep == 4 && m.dp == 2 && m.pp == 2 && m.world_size == 16);
}

static void types_of_layers(void) {
    cp_comm_type types[4] = {9, 9, 9, 9};
    BAD("types: got", cp_comm_types_per_layer("p2p", 4, NULL));
    BAD("names: got NULL", cp_comm_types_per_layer(NULL, 4, types));
    BAD("layers: got 0", cp_comm_types_per_layer("p2p", 0, types));
    BAD("layers: got 1048577", cp_comm_types_per_layer("p2p", (1 << 20) + 1, types));
    BAD("got 3 names for 4 layers", cp_comm_types_per_layer("p2p a2a a2a", 4, types));
    BAD("allowed p2p, all_gather (or allgather), a2a, a2a+p2p", cp_comm_types_per_layer("p2p,ring", 4, types));
    TRUE_(types[0] == 9 && types[3] == 9);
    GOOD(cp_comm_types_per_layer("allgather, a2a+p2p", 4, types));
    TRUE_(types[0] == CP_COMM_ALL_GATHER && types[1] == CP_COMM_A2A_P2P && types[2] == types[0] && types[3] == types[1]);
}

static void paddings(void) {
    cp_padding_config c, ok;
    cp_tail_config t, tail;
    int32_t cu[3] = {0, 5, 12}, padded[3] = {0, 8, 16}, made[8] = {77}, made_padded[8], down[3] = {0, 5, 4}, huge[2] = {0, INT32_MAX};
    uint64_t number = 99, length = 99, rest = 99;
    uint64_t rows[3] = {4, 4, 4}, media[2] = {1, 2}, bounds[3] = {77, 77, 77};
    cp_format format = 77;
    size_t n = 99;
    memset(&ok, 0, sizeof ok);
    ok.struct_size = (uint32_t)sizeof ok;
    ok.cp = 2;
    ok.fp8 = CP_FP8_ROWS_32;
    BAD("config: got NULL", cp_padding_factor(NULL, &number));
    BAD("factor: got", cp_padding_factor(&ok, NULL));
    BAD("config.struct_size: got 7", (c = ok, c.struct_size = 7, cp_padding_factor(&c, &number)));
    BAD("config.flags: got unknown flag(s) 0x8", (c = ok, c.flags = 8, cp_padding_factor(&c, &number)));
    BAD("config.reserved", (c = ok, c.reserved = 1, cp_padding_factor(&c, &number)));
    BAD("config.fp8: got 3", (c = ok, c.fp8 = 3, cp_padding_factor(&c, &number)));
    BAD("cp: got 4294967295", (c = ok, c.cp = UINT32_MAX, cp_padding_factor(&c, &number)));
    BAD("padding: got", cp_padding_amount(&ok, 10, NULL));
    BAD("length: got 18446744073709551615", cp_padding_amount(&ok, UINT64_MAX, &number));
    c = ok;
    c.flags = CP_PADDING_SEQUENCE_PARALLEL | CP_PADDING_TP_OVERLAP;
    BAD("decoder length: got 0, the sequence has 10", cp_padding_amount(&c, 10, &number));
    TRUE_(number == 99);
    c.decoder_length = 64;
    GOOD(cp_padding_amount(&c, 10, &number));
    TRUE_(number == 54);
    GOOD(cp_padding_factor(&ok, &number));
    TRUE_(number == 64);
    ok.flags = CP_PADDING_MEGATRON;
    GOOD(cp_padding_amount(&ok, 10, &number));
    TRUE_(number == 2);

    BAD("cu_seqlens: got", cp_padding_sequences(NULL, 3, 8, made));
    BAD("with 0 entries", cp_padding_sequences(cu, 0, 8, made));
    BAD("cu_seqlens_padded: got", cp_padding_sequences(cu, 3, 8, NULL));
    BAD("factor: got 0", cp_padding_sequences(cu, 3, 0, made));
    BAD("got 4 after 5", cp_padding_sequences(down, 3, 8, made));
    BAD("do not fit in int32", cp_padding_sequences(huge, 2, 8, made));
    BAD("got -3, must not be negative", (down[1] = -3, cp_padding_sequences(down, 3, 8, made)));
    TRUE_(made[0] == 77);
    GOOD(cp_padding_sequences(cu, 3, 8, made));
    TRUE_(made[0] == 0 && made[1] == 8 && made[2] == 16);

    memset(&tail, 0, sizeof tail);
    tail.struct_size = (uint32_t)sizeof tail;
    tail.ranks = 2;
    tail.rows = 10;
    made[0] = 77;
#define TAIL(words, change) BAD(words, (t = tail, change, cp_padding_tail(&t, cu, padded, 3, made, made_padded, 8, &n, &number)))
    TAIL("config.struct_size: got 0", t.struct_size = 0);
    TAIL("config.flags", t.flags = 1);
    TAIL("ranks: got 0", t.ranks = 0);
    TAIL("config.partition: got 2", t.partition = CP_PARTITION_STRIPED);
    TAIL("config.tail: got 2", t.tail = 2);
    TAIL("slots: got 2", t.slots = 2);
    TAIL("config.multiple, rows: got 4 and 10", t.multiple = 4);
    TAIL("config.multiple, rows: got 0 and 0", t.rows = 0);
    TAIL("the sequences need 16", t.rows = 7);
    TAIL("2 × 2 ranks do not divide", t.rows = 9);
    TAIL("do not fit in int32", t.rows = (uint64_t)1 << 31);
    TAIL("too many rows", t.rows = UINT64_MAX);
    BAD("config: got NULL", cp_padding_tail(NULL, cu, padded, 3, made, made_padded, 8, &n, &number));
    BAD("cu_seqlens: got", cp_padding_tail(&tail, NULL, padded, 3, made, made_padded, 8, &n, &number));
    BAD("result: got", cp_padding_tail(&tail, cu, padded, 3, NULL, made_padded, 8, &n, &number));
    BAD("result_padded: got", cp_padding_tail(&tail, cu, padded, 3, made, NULL, 8, &n, &number));
    BAD("made: got", cp_padding_tail(&tail, cu, padded, 3, made, made_padded, 8, NULL, &number));
    TRUE_(made[0] == 77 && n == 99);
    made[2] = 77;
    GOOD(cp_padding_tail(&tail, cu, padded, 3, made, made_padded, 2, &n, NULL));
    TRUE_(n == 4 && made[1] == 5 && made[2] == 77);
    GOOD(cp_padding_tail(&tail, padded, NULL, 3, made, made_padded, 8, &n, &number));
    TRUE_(n == 4 && made[3] == 20 && made_padded[3] == 20 && number == 8);

    made[0] = 77;
    format = 77;
    BAD("13 of them padding", cp_padding_batch(2, 12, 13, 2, 0, made, made_padded, &format));
    BAD("do not fit in int32", cp_padding_batch(2, 1 << 30, 0, 2, 0, made, made_padded, &format));
    BAD("cu_seqlens: got", cp_padding_batch(2, 12, 2, 2, 0, NULL, made_padded, &format));
    BAD("cu_seqlens_padded: got", cp_padding_batch(2, 12, 2, 2, 0, made, NULL, &format));
    BAD("format: got", cp_padding_batch(2, 12, 2, 2, 0, made, made_padded, NULL));
    TRUE_(made[0] == 77 && format == 77);
    GOOD(cp_padding_batch(2, 12, 2, 2, 0, made, made_padded, &format));
    TRUE_(made[2] == 20 && made_padded[2] == 24 && format == CP_FORMAT_PACKED);

    bounds[0] = 77;
    BAD("rows: got", cp_padding_image_bounds(NULL, 3, media, 2, 2, 2, 0, bounds));
    BAD("not 3 images", cp_padding_image_bounds(rows, 3, media, 1, 2, 2, 0, bounds));
    BAD("media: got", cp_padding_image_bounds(rows, 3, (uint64_t *)(void *)((char *)media + 1), 1, 2, 2, 0, bounds));
    BAD("flags: got unknown flag(s) 0x1", cp_padding_image_bounds(rows, 3, media, 2, 2, 2, 1, bounds));
    BAD("ranks, tubelet: got 0", cp_padding_image_bounds(rows, 3, media, 2, 2, 0, 0, bounds));
    BAD("bounds: got", cp_padding_image_bounds(rows, 3, media, 2, 2, 2, 0, NULL));
    EXPECT(CP_ERR_UNSUPPORTED, "single images only", cp_padding_image_bounds(rows, 3, media, 2, 2, 2, CP_PADDING_MEGATRON, bounds));
    TRUE_(bounds[0] == 77);
    GOOD(cp_padding_image_bounds(rows, 3, media, 2, 2, 2, 0, bounds));
    TRUE_(bounds[0] == 0 && bounds[1] == 1 && bounds[2] == 3);
    GOOD(cp_padding_image_bounds(rows, 3, NULL, 0, 0, 2, 0, bounds));
    TRUE_(bounds[1] == 2 && bounds[2] == 3);
    GOOD(cp_padding_image_bounds(NULL, 0, NULL, 0, 0, 2, 0, bounds));
    TRUE_(bounds[2] == 0);

    number = 99;
    BAD("rank: got 2 of 2", cp_padding_split(5, 2, 2, &number, &length, &rest));
    BAD("rank: got 0 of 0", cp_padding_split(5, 0, 0, &number, &length, &rest));
    BAD("length: got", cp_padding_split(5, 2, 1, &number, NULL, &rest));
    TRUE_(number == 99 && length == 99 && rest == 99);
    GOOD(cp_padding_split(5, 2, 1, &number, &length, &rest));
    TRUE_(number == 3 && length == 2 && rest == 1);
    GOOD(cp_padding_split(UINT64_MAX, UINT32_MAX, UINT32_MAX - 1, &number, &length, &rest));
    TRUE_(number + length == UINT64_MAX && rest == 0);
}

#endif
