// What a thread of a kernel executes: the collectives of its warp, barriers, asynchronous copies, waits. The declarations are in device.h.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "fiber.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace softgpu {

__thread Lane* current;
__thread Range* ranges;
const RaceDetector* race_detector;
bool track_reads;
__thread Launch* running;

void to_scheduler() {
    Fiber* me = (Fiber*)current;
    running->counts.switches++;
    switch_context(me->context, running->scheduler);
}

[[noreturn]] void fail(const char* format, ...) {
    char text[1024], where[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    const Lane* l = current;
    snprintf(where, sizeof where, "%s: block (%u,%u,%u) thread %u (warp %u lane %u): ", running->name.c_str(), l->block.x, l->block.y, l->block.z,
             l->thread.x + l->block_dim.x * (l->thread.y + l->block_dim.y * l->thread.z), l->warp->index, l->lane);
    running->failure = std::string(where) + text;
    to_scheduler();
    abort();
}

std::string lanes_text(uint32_t mask) {
    if (mask == ALL) return "all lanes";
    std::string s = "lanes";
    for (uint32_t i = 0; i < 32; i++)
        if (mask >> i & 1) {
            uint32_t j = i;
            while (j < 31 && mask >> (j + 1) & 1) j++;
            s += " " + std::to_string(i) + (j > i ? "-" + std::to_string(j) : "");
            i = j;
        }
    return s;
}

void fail_here(const std::string& text) { fail("%s", text.c_str()); }

void yield_lane() {
    Fiber* me = (Fiber*)current;
    Warp& w = *me->warp;
    const uint32_t ready = w.ready & ~(1u << me->lane);
    if (!ready) {
        to_scheduler();
    } else {
        uint32_t next;
        if (w.block->lanes_descend) {
            const uint32_t below = ready & ((1u << me->lane) - 1);
            next = 31 - __builtin_clz(below ? below : ready);
        } else {
            const uint32_t above = ready & ~((2u << me->lane) - 1);
            next = __builtin_ctz(above ? above : ready);
        }
        Fiber* other = &w.fibers[next];
        current = other;
        running->counts.switches++;
        switch_context(me->context, other->context);
    }
}

namespace {

const uint64_t IDLE_LIMIT = 20000;  // polls by load_acquire without anything else happening, after which they count as a deadlock

// Accesses to shared memory by lanes of the current warp, for the race detector.
void shared_access(const void* p, uint32_t bytes, uint32_t mask, bool write) {
    const Lane* l = current;
    if (!l->races) return;
    const std::string race =
        race_detector->access((RaceBlock*)l->races, l->warp->index, mask, (uint32_t)((const unsigned char*)p - l->shared), bytes, write);
    if (!race.empty()) fail("%s", race.c_str());
}

// ---- Warps --------------------------------------------------------------------------------------------------------------------

// Where all lanes of the warp meet. True for the last to arrive, who does the work and calls `leave`; for the others, true work is done
// when this returns false.
inline bool meet(Op op, uint32_t argument = 0) {
    Fiber* me = (Fiber*)current;
    Warp& w = *me->warp;
    if (!w.arrived) {
        w.op = op;
        w.op_argument = argument;
        if (w.exited) fail("%s needs all 32 lanes; exited: %s", OP_NAMES[op], lanes_text(w.exited).c_str());
    } else if (w.op != op || w.op_argument != argument) {
        if (w.op == op)
            fail("%s (argument %#x) while %s are in %s (argument %#x)", OP_NAMES[op], argument, lanes_text(w.arrived).c_str(), OP_NAMES[w.op],
                 w.op_argument);
        fail("%s while %s of the warp are in %s", OP_NAMES[op], lanes_text(w.arrived).c_str(), OP_NAMES[w.op]);
    }
    const uint32_t bit = 1u << me->lane;
    w.arrived |= bit;
    if (w.arrived == ALL) return true;
    w.ready &= ~bit;
    yield_lane();
    return false;
}
inline void leave() {
    Warp& w = *current->warp;
    w.arrived = 0;
    w.ready = ALL;
    running->idle = 0;
    if (--w.quantum < 0) to_scheduler();
}

typedef float float8 __attribute__((vector_size(32)));
typedef uint32_t uint8v __attribute__((vector_size(32)));

inline void halves_bf16(const uint32_t* pairs, float8& low, float8& high) {
    uint8v x;
    memcpy(&x, pairs, sizeof x);
    low = (float8)(x << 16);
    high = (float8)(x & 0xffff0000u);
}
inline void halves_f16(const uint32_t* pairs, float8& low, float8& high) {
#if defined(__F16C__) && defined(__AVX2__)
    __m256i x;
    memcpy(&x, pairs, sizeof x);
    const __m256i lo = _mm256_and_si256(x, _mm256_set1_epi32(0xffff)), hi = _mm256_srli_epi32(x, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);  // eight low halves, eight high halves
    low = (float8)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    high = (float8)_mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
#else
    for (int i = 0; i < 8; i++) {
        low[i] = f16_to_float((uint16_t)pairs[i]);
        high[i] = f16_to_float((uint16_t)(pairs[i] >> 16));
    }
#endif
}

// d += a·b with every product exact and sums in fp32.
template <bool F16>
void multiply(Warp& w) {
    float8 b_low[8], b_high[8];
    for (int p = 0; p < 8; p++) F16 ? halves_f16(w.b[p], b_low[p], b_high[p]) : halves_bf16(w.b[p], b_low[p], b_high[p]);
    for (int i = 0; i < 16; i += 4) {
        float8 low[4], high[4], d[4];
        for (int r = 0; r < 4; r++) {
            F16 ? halves_f16(w.a[i + r], low[r], high[r]) : halves_bf16(w.a[i + r], low[r], high[r]);
            memcpy(&d[r], w.d[i + r], sizeof d[r]);
        }
        for (int p = 0; p < 8; p++)
            for (int r = 0; r < 4; r++) d[r] = d[r] + low[r][p] * b_low[p] + high[r][p] * b_high[p];
        for (int r = 0; r < 4; r++) memcpy(w.d[i + r], &d[r], sizeof d[r]);
    }
}

void load_matrices(Warp& w, bool transposed) {
    for (int m = 0; m < 4; m++) {
        uint16_t in[8][8];
        for (int r = 0; r < 8; r++) memcpy(in[r], w.rows[8 * m + r], 16);
        if (!transposed) {
            memcpy(w.matrix[m], in, sizeof in);  // row-major pairs: lane l holds row l/4, columns 2(l%4) and +1
        } else {
            uint16_t out[8][8];
#ifdef __SSE2__
            __m128i x[8], y[8];
            for (int r = 0; r < 8; r++) x[r] = _mm_loadu_si128((const __m128i*)in[r]);
            for (int r = 0; r < 4; r++) {
                y[2 * r] = _mm_unpacklo_epi16(x[r], x[r + 4]);
                y[2 * r + 1] = _mm_unpackhi_epi16(x[r], x[r + 4]);
            }
            for (int r = 0; r < 4; r++) {
                x[2 * r] = _mm_unpacklo_epi16(y[r], y[r + 4]);
                x[2 * r + 1] = _mm_unpackhi_epi16(y[r], y[r + 4]);
            }
            for (int r = 0; r < 4; r++) {
                y[2 * r] = _mm_unpacklo_epi16(x[r], x[r + 4]);
                y[2 * r + 1] = _mm_unpackhi_epi16(x[r], x[r + 4]);
            }
            memcpy(out, y, sizeof out);
#else
            for (int r = 0; r < 8; r++)
                for (int c = 0; c < 8; c++) out[c][r] = in[r][c];
#endif
            memcpy(w.matrix[m], out, sizeof out);
        }
    }
}

// Shared memory of the block; addresses must be of 16 aligned bytes inside it.
void check_shared(const void* p, const char* what) {
    const Lane* l = current;
    const uintptr_t offset = (uintptr_t)p - (uintptr_t)l->shared;
    if (offset > l->shared_bytes || l->shared_bytes - offset < 16)
        fail("%s at offset %td of shared memory, which has %u bytes", what, (ptrdiff_t)offset, l->shared_bytes);
    if (offset % 16) fail("%s at offset %td of shared memory, which is not a multiple of 16", what, (ptrdiff_t)offset);
}

// Eight rows of 16 bytes are read at once: two that start in the same four of the 32 banks but differ cost another pass.
void count_conflicts(const Warp& w) {
    for (int m = 0; m < 4; m++) {
        uint32_t used[8] = {}, most = 0;
        for (int r = 0; r < 8; r++) {
            const uint32_t bank = (uintptr_t)w.rows[8 * m + r] / 16 % 8;
            bool repeated = false;
            for (int s = 0; s < r; s++) repeated |= w.rows[8 * m + s] == w.rows[8 * m + r];
            if (!repeated && ++used[bank] > most) most = used[bank];
        }
        running->counts.bank_conflicts += most - 1;
    }
}

}  // namespace

// ---- Collectives --------------------------------------------------------------------------------------------------------------

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool f16) {
    Warp& w = *current->warp;
    const uint32_t group = current->lane / 4, in_group = current->lane % 4;
    w.a[group][in_group] = a[0];
    w.a[group + 8][in_group] = a[1];
    w.a[group][in_group + 4] = a[2];
    w.a[group + 8][in_group + 4] = a[3];
    w.b[in_group][group] = b0;
    w.b[in_group + 4][group] = b1;
    memcpy(&w.d[group][2 * in_group], d, 8);
    memcpy(&w.d[group + 8][2 * in_group], d + 2, 8);
    if (meet(f16 ? MMA_F16 : MMA_BF16)) {
        f16 ? multiply<true>(w) : multiply<false>(w);
        running->counts.mma++;
        leave();
    }
    memcpy(d, &w.d[group][2 * in_group], 8);
    memcpy(d + 2, &w.d[group + 8][2 * in_group], 8);
}

void ldmatrix(uint32_t* r, const void* row, bool transposed) {
    Warp& w = *current->warp;
    const uint32_t lane = current->lane;
    check_shared(row, transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4");
    w.rows[lane] = row;
    if (meet(transposed ? LDMATRIX_TRANS : LDMATRIX)) {
        if (current->races)
            for (const void* p : w.rows) shared_access(p, 16, ALL, false);
        load_matrices(w, transposed);
        running->counts.ldmatrix++;
        count_conflicts(w);
        leave();
    }
    for (int i = 0; i < 4; i++) r[i] = w.matrix[i][lane];
}

uint32_t shuffle_from(uint32_t x, uint32_t source) {
    Warp& w = *current->warp;
    const uint32_t lane = current->lane;
    if (source > 31) fail("shuffle from lane %u", source);
    w.values[lane] = x;
    w.sources[lane] = source;
    if (meet(SHUFFLE)) {
        for (int i = 0; i < 32; i++) w.shuffled[i] = w.values[w.sources[i]];
        leave();
    }
    return w.shuffled[lane];
}

uint32_t vote(bool x) {
    Warp& w = *current->warp;
    const uint32_t lane = current->lane;
    w.values[lane] = x;
    if (meet(VOTE)) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; i++) bits |= w.values[i] << i;
        for (int i = 0; i < 32; i++) w.shuffled[i] = bits;
        leave();
    }
    return w.shuffled[lane];
}

void warp_barrier() {
    if (!meet(SYNC_WARP)) return;
    if (current->races) race_detector->sync_warp((RaceBlock*)current->races, current->warp->index);
    leave();
}

void barrier(uint32_t id, uint32_t threads, bool whole_block) {
    Launch& l = *running;
    if (whole_block) {
        threads = l.threads;
    } else if (id < 1 || id >= BARRIERS || threads == 0 || threads % 32 || threads > l.threads) {
        fail("sync_some(%u, %u): barriers are 1 … 15, of whole warps of the block's %u threads", id, threads, l.threads);
    }
    if (!meet(whole_block ? SYNC_BLOCK : SYNC_SOME, id << 16 | threads)) return;
    Warp& w = *current->warp;
    Block& block = *w.block;
    Barrier& b = block.barriers[id];
    if (b.arrived && b.expected != threads) fail("barrier %u with %u threads while others wait there for %u", id, threads, b.expected);
    b.expected = threads;
    b.arrived += 32;
    if (b.arrived == threads) {
        b.arrived = 0;
        if (block.races) {
            bool passed[32];
            for (uint32_t i = 0; i < l.warps; i++) passed[i] = i == w.index || block.warps[i].barrier == (int)id;
            race_detector->sync(block.races, passed);
        }
        for (uint32_t i = 0; i < l.warps; i++)
            if (block.warps[i].barrier == (int)id) {
                block.warps[i].barrier = -1;
                block.warps[i].ready = ALL;
            }
        leave();
    } else {
        w.arrived = 0;
        w.ready = 0;
        w.barrier = (int)id;
        l.idle = 0;
        to_scheduler();
    }
}

// ---- One thread's instructions ------------------------------------------------------------------------------------------------

void copy_async(void* shared, const void* global_address, bool valid) {
    Fiber* me = (Fiber*)current;
    check_shared(shared, "cp_async_16");
    const void* from = valid ? global(global_address, 16, READ) : nullptr;
    shared_access(shared, 16, 1u << me->lane, true);
    memset(shared, 0xff, 16);  // a NaN in every type, until the wait
    if (me->first_copy == me->copies.size()) {
        me->copies.clear();
        me->first_copy = 0;
    }
    me->copies.push_back({shared, from, me->groups});
}
void copy_commit() { ((Fiber*)current)->groups++; }
void copy_wait(uint32_t newest) {
    Fiber* me = (Fiber*)current;
    // Groups 0 … groups−1 are committed; all of them but the newest are done now.
    for (; me->first_copy < me->copies.size(); me->first_copy++) {
        const Copy& c = me->copies[me->first_copy];
        if (c.group + newest >= me->groups) break;
        shared_access(c.to, 16, 1u << me->lane, true);
        c.from ? (void)memcpy(c.to, c.from, 16) : (void)memset(c.to, 0, 16);
    }
}

uint32_t poll(const uint32_t* p) {
    const uint32_t* q = (const uint32_t*)global(p, sizeof *p, READ);
    if (++running->idle > IDLE_LIMIT * running->threads) fail("load_acquire of %p (now %u) again and again, and nothing else can run", (void*)p, *q);
    current->warp->block->polled = true;
    to_scheduler();
    return *q;
}
void wait_value(const uint32_t* p, uint32_t x) {
    Fiber* me = (Fiber*)current;
    const uint32_t* q = (const uint32_t*)global(p, sizeof *p, READ);
    if (*q == x) return;
    me->awaited = q;
    me->awaited_address = p;
    me->awaited_value = x;
    me->warp->polling |= 1u << me->lane;
    me->warp->ready &= ~(1u << me->lane);
    yield_lane();
}

uint16_t float_to_f16(float x) {
#ifdef __F16C__
    if (x != x) return 0x7fff;
    return (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t u = __float_as_uint(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u)  // subnormal: a multiple of 2^−24, which the rounding of a sum with 0.5 yields
        return (uint16_t)(sign | (__float_as_uint(fabsf(x) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13));
#endif
}
float f16_to_float(uint16_t x) {
#ifdef __F16C__
    return _cvtsh_ss(x);
#else
    const uint32_t sign = (uint32_t)(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) return __uint_as_float(sign | __float_as_uint((float)magnitude * 0x1p-24f));
    return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
#endif
}

}  // namespace softgpu
