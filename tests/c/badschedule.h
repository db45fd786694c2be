/* badinput.c's part about schedules: pure functions, every argument wrong in turn. */
#ifndef CP_TEST_BADSCHEDULE_H
#define CP_TEST_BADSCHEDULE_H

#include "expect.h"

static cp_schedule_config four_ranks(void) {
    cp_schedule_config c;
    memset(&c, 0, sizeof c);
    c.struct_size = (uint32_t)sizeof c;
    c.ranks = 4;
    c.tokens_per_rank = 16;
    return c;
}

/* A configuration changed by `change` that must be refused, leaving the results alone. */
#define SCHEDULE(wanted, words, change)                                                  \
    do {                                                                                 \
        cp_schedule_config c = four_ranks();                                             \
        uint32_t lengths[2] = {40, 7}, batches = 77;                                     \
        cp_placement placed[2] = {{9, 9, 9, 9}, {9, 9, 9, 9}};                           \
        change;                                                                          \
        EXPECT(wanted, words, cp_schedule_samples(&c, lengths, 2, placed, &batches));    \
        TRUE_(batches == 77 && placed[0].pack == 9 && placed[1].first_rank == 9);        \
    } while (0)

static void schedules(void) {
    cp_schedule_config c = four_ranks();
    uint32_t lengths[2] = {40, 7}, batches = 77;
    cp_placement placed[2], wrong[2] = {{0, 0, 2, 0}, {0, 1, 2, 0}};
    double seconds = -1, bound = -1;
    unsigned char bytes[24];
    struct {
        cp_schedule_config c;
        uint64_t tail;
    } longer;
    memset(&longer, 0, sizeof longer);
    longer.c = c;
    longer.c.struct_size = (uint32_t)sizeof longer;
    longer.tail = 1;
    EXPECT(CP_ERR_VERSION, "config: byte", cp_schedule_samples(&longer.c, lengths, 2, placed, &batches));
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "config.struct_size: got 3", c.struct_size = 3);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "config.flags: got 0x1", c.flags = 1);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "ranks: got 0", c.ranks = 0);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "ranks: got 0", c.struct_size = 8);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "ranks: got 4294967295", c.ranks = UINT32_MAX);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "tokens_per_rank: got 0", c.tokens_per_rank = 0);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "config.scheduler: got 4", c.scheduler = 4);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "config.cp_size: got 0x2", c.cp_size = 2);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "min_cp_size: got 3", c.cp_size = 3; c.scheduler = CP_SCHEDULER_DYNAMIC);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "lengths[0]: got 40, allowed up to 16", c.scheduler = CP_SCHEDULER_DP_BALANCED);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "cost.call: got -1", c.cost_call = -1);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "pair and token are both 0", c.cost_call = 1);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "lengths[1]: got 0, allowed 1", lengths[1] = 0);
    SCHEDULE(CP_ERR_INVALID_ARGUMENT, "lengths[0]: got 65, allowed 1", lengths[0] = 65);
    SCHEDULE(CP_ERR_UNSUPPORTED, "Megatron's balanced scheduler fails on 3 ranks", c.ranks = 3; c.scheduler = CP_SCHEDULER_MEGATRON);
    BAD("config: got NULL", cp_schedule_samples(NULL, lengths, 2, placed, &batches));
    BAD("lengths: got NULL", cp_schedule_samples(&c, NULL, 2, placed, &batches));
    BAD("lengths: got a pointer that is not aligned", cp_schedule_samples(&c, (uint32_t *)(void *)(bytes + 1), 2, placed, &batches));
    BAD("placements: got", cp_schedule_samples(&c, lengths, 2, NULL, &batches));
    BAD("placements: got", cp_schedule_samples(&c, lengths, 2, (cp_placement *)(void *)(bytes + 1), &batches));
    BAD("micro_batches: got", cp_schedule_samples(&c, lengths, 2, placed, NULL));
    TRUE_(batches == 77);

    GOOD(cp_schedule_samples(&c, NULL, 0, NULL, &batches));
    TRUE_(batches == 0);
    GOOD(cp_schedule_samples(&c, lengths, 2, placed, &batches));
    TRUE_(batches == 1 && placed[0].rank_count >= 3 && placed[0].micro_batch == 0);
    BAD("config: got NULL", cp_schedule_time(NULL, lengths, 2, placed, &seconds, &bound));
    BAD("lengths: got NULL", cp_schedule_time(&c, NULL, 2, placed, &seconds, &bound));
    BAD("placements: got NULL", cp_schedule_time(&c, lengths, 2, NULL, &seconds, &bound));
    BAD("placements[0]: its pack has 40 tokens", cp_schedule_time(&c, lengths, 2, wrong, &seconds, &bound));
    wrong[0].rank_count = 3;
    wrong[1].rank_count = 3;
    BAD("overlap", cp_schedule_time(&c, lengths, 2, wrong, &seconds, &bound));
    wrong[1].micro_batch = UINT32_MAX;
    BAD("placements: got micro-batch 4294967294", cp_schedule_time(&c, lengths, 2, wrong, &seconds, &bound));
    BAD("seconds: got", cp_schedule_time(&c, lengths, 2, placed, NULL, &bound));
    BAD("bound: got", cp_schedule_time(&c, lengths, 2, placed, &seconds, (double *)(void *)(bytes + 1)));
    TRUE_(seconds == -1 && bound == -1);
    GOOD(cp_schedule_time(&c, lengths, 2, placed, &seconds, NULL));
    GOOD(cp_schedule_time(&c, lengths, 2, placed, &seconds, &bound));
    TRUE_(0 < bound && bound <= seconds && seconds < 1);
}

#endif /* CP_TEST_BADSCHEDULE_H */
