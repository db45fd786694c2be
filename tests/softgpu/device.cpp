// Runs a kernel's grid on this OS thread: fibers, the scheduler that orders warps and blocks, the collectives of a warp, barriers,
// asynchronous copies, and the registry of memory that kernels may touch. The declarations are in device.h.
#include "device.h"

#include "access.h"
#include "race.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__x86_64__) && !defined(SOFTGPU_UCONTEXT)
#define SOFTGPU_SWITCH_X86
#else
#include <ucontext.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace softgpu {

__thread Lane* current;
__thread Range* ranges;
const RaceDetector* race_detector;
bool track_reads;

namespace {

const uint32_t ALL = 0xffffffffu;
const size_t STACK = 128 * 1024;  // of a fiber; only touched pages cost memory
const uint32_t BARRIERS = 16;
const uint64_t IDLE_LIMIT = 20000;  // polls by load_acquire without anything else happening, after which they count as a deadlock

uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
struct Random {
    uint64_t state;
    uint32_t below(uint32_t n) { return (uint32_t)((mix(state++) >> 32) * n >> 32); }
};

uint64_t environment_seed() {
    const char* s = getenv("SOFTGPU_SEED");
    return s && *s ? strtoull(s, nullptr, 0) : 1;
}

// ---- Fibers -------------------------------------------------------------------------------------------------------------------

#ifdef SOFTGPU_SWITCH_X86
struct Context {
    void* sp = nullptr;
};
extern "C" void softgpu_switch(void** save, void* load);
// Saves the registers that a call preserves on the old stack and takes them from the new one.
asm(R"(
.text
.p2align 4
.local softgpu_switch
.type softgpu_switch,@function
softgpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size softgpu_switch,.-softgpu_switch
)");
inline void switch_context(Context& from, Context& to) { softgpu_switch(&from.sp, to.sp); }
void start_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
    void** s = (void**)(stack + bytes);
    *--s = nullptr;  // where a return address of entry's caller would be: keeps the ABI's alignment
    *--s = (void*)entry;
    for (int i = 0; i < 6; i++) *--s = nullptr;
    c.sp = s;
}
#else
struct Context {
    ucontext_t u;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
void start_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&c.u);
    c.u.uc_stack.ss_sp = stack;
    c.u.uc_stack.ss_size = bytes;
    c.u.uc_link = nullptr;
    makecontext(&c.u, entry, 0);
}
#endif

// ---- State --------------------------------------------------------------------------------------------------------------------

struct Copy {
    void* to;
    const void* from;  // null: zeros
    uint64_t group;
};
struct Fiber : Lane {
    Context context;
    std::vector<Copy> copies;
    size_t first_copy = 0;
    uint64_t groups = 0;                // committed so far
    const uint32_t* awaited = nullptr;  // wait_for: the bytes in this process, their address as the kernel sees it, the value
    const uint32_t* awaited_address = nullptr;
    uint32_t awaited_value = 0;
};

enum Op { NONE, MMA_BF16, MMA_F16, LDMATRIX, LDMATRIX_TRANS, SHUFFLE, VOTE, SYNC_WARP, SYNC_BLOCK, SYNC_SOME };
const char* const OP_NAMES[] = {"nothing",           "mma_m16n8k16<bf16_t>", "mma_m16n8k16<f16_t>", "ldmatrix_x4",
                                "ldmatrix_x4_trans", "shuffle",              "any_lane",            "sync_warp",           "sync_block", "sync_some"};
}  // namespace

struct Block;
struct Warp {
    Block* block;
    Fiber* fibers;     // 32
    uint32_t index;
    uint32_t ready;    // lanes that can run
    uint32_t arrived;  // lanes in the collective `op`
    uint32_t polling;  // lanes in wait_for
    uint32_t exited;
    Op op;
    uint32_t op_argument;
    int barrier;       // that all lanes wait at, or −1
    int32_t quantum;   // collectives until the scheduler is asked again
    // Operands and results, by lane; results are written by the last lane to arrive, when all others have read the last ones.
    alignas(64) uint32_t a[16][8];     // mma: row, pair of columns
    alignas(64) uint32_t b[8][8];      // pair of rows, column
    alignas(64) float d[16][8];
    alignas(64) uint32_t matrix[4][32];
    const void* rows[32];
    uint32_t values[32], sources[32], shuffled[32];
};

struct Barrier {
    uint32_t arrived, expected;
};
struct Block {
    Launch* launch;
    uint3 index;
    uint64_t number;
    std::unique_ptr<Fiber[]> fibers;
    std::unique_ptr<Warp[]> warps;
    Barrier barriers[BARRIERS];
    unsigned char* shared = nullptr;
    uint32_t live = 0;  // warps
    Schedule schedule;
    bool lanes_descend;
    uint32_t last = 0;    // warp that ran last
    bool polled = false;  // it gave way in load_acquire
    Random random;
    char* stacks = nullptr;
    unsigned char* shared_map = nullptr;
    size_t stacks_bytes = 0, shared_map_bytes = 0;
    bool running = false;
    RaceBlock* races = nullptr;
};

struct Launch {
    void (*call)(void*);
    void* context;
    std::string name;
    dim3 grid, block;
    uint32_t shared_bytes, threads, warps;
    uint64_t devices;
    Context scheduler;
    std::vector<std::unique_ptr<Block>> blocks;
    Random random;
    Range ranges[RANGES];
    uint64_t generation;  // of the registry, when `ranges` was filled
    std::string failure;
    uint64_t idle = 0;
    Counts counts = {};
    Accesses own_accesses;
    Accesses* accesses = &own_accesses;
    uintptr_t last_page = ~(uintptr_t)0;
    PageAccess* last_words = nullptr;
};

namespace {
__thread Launch* running;
__thread Counts last_counts;

void to_scheduler() {
    Fiber* me = (Fiber*)current;
    running->counts.switches++;
    switch_context(me->context, running->scheduler);
}

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Ends the launch from inside a fiber, naming where it is. The fibers are dropped as they stand: kernels own nothing.
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

// Accesses to shared memory by lanes of the current warp, for the race detector.
void shared_access(const void* p, uint32_t bytes, uint32_t mask, bool write) {
    const Lane* l = current;
    if (!l->races) return;
    const std::string race =
        race_detector->access((RaceBlock*)l->races, l->warp->index, mask, (uint32_t)((const unsigned char*)p - l->shared), bytes, write);
    if (!race.empty()) fail("%s", race.c_str());
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

// ---- Registry -----------------------------------------------------------------------------------------------------------------

struct Piece {
    uintptr_t end;
    ptrdiff_t shift;
    std::string name;
    int device;
};
struct Registry {
    std::mutex mutex;
    std::map<uintptr_t, Piece> pieces;
    uint64_t generation = 1;
    const std::pair<const uintptr_t, Piece>* find(uintptr_t address) {
        auto i = pieces.upper_bound(address);
        if (i == pieces.begin()) return nullptr;
        --i;
        return address < i->second.end ? &*i : nullptr;
    }
};
Registry& registry() {
    static Registry* r = new Registry;  // outlives every static destructor
    return *r;
}

}  // namespace

void fail_here(const std::string& text) { fail("%s", text.c_str()); }

void register_memory(const void* address, size_t bytes, const char* name, ptrdiff_t shift, int device) {
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    const uintptr_t begin = (uintptr_t)address, end = begin + bytes;
    auto next = r.pieces.lower_bound(begin);
    if (bytes == 0 || (next != r.pieces.end() && next->first < end) || r.find(begin))
        throw error(std::string("register_memory: ") + name + " is empty or overlaps live memory");
    r.pieces[begin] = {end, shift, name, device};
    r.generation++;
}
void unregister_memory(const void* address) {
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    r.pieces.erase((uintptr_t)address);
    r.generation++;
}
void* resolve(const void* address, size_t bytes) {
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    const auto* p = r.find((uintptr_t)address);
    if (!p || bytes > p->second.end - (uintptr_t)address) return nullptr;
    return (char*)address + p->second.shift;
}

namespace {
const char* const ACCESS_NAMES[] = {"load_global", "load_constant", "store_global", "an atomic add"};

void track(uintptr_t address, uint32_t bytes, Access access) {
    Launch& l = *running;
    const uintptr_t page = address >> 12;
    if (page != l.last_page) {
        l.last_words = &l.accesses->pages[page];
        l.last_page = page;
    }
    const uint32_t first = (address & 4095) / 4, count = (bytes + 3) / 4;
    const uint64_t bits = ((1ull << count) - 1) << first % 64;  // aligned accesses of 16 bytes at most: one word of 64 bits
    PageAccess& w = *l.last_words;
    const uint32_t i = first / 64;
    uint64_t* const kinds[] = {w.read, w.constant, w.written, w.atomic};
    kinds[access][i] |= bits;
    if (access != READ && w.constant[i] & (w.written[i] | w.atomic[i]) & bits)
        fail("%s of %u bytes at %p: the launch both writes this and reads it with load_constant", ACCESS_NAMES[access], bytes, (void*)address);
}
}  // namespace

void* find_global(uintptr_t address, uint32_t bytes, Access access) {
    if (address % bytes) fail("%s of %u bytes at %p, which is not aligned", ACCESS_NAMES[access], bytes, (void*)address);
    if (access != READ) running->idle = 0;
    if (access != READ || track_reads) track(address, bytes, access);
    Range& r = ranges[(address >> 16) % RANGES];
    if (!(address >= r.begin && address + bytes <= r.end)) {
        Registry& all = registry();
        std::unique_lock<std::mutex> lock(all.mutex);
        const auto* p = all.find(address);
        if (!p || address + bytes > p->second.end) {
            std::string near = "no live memory is near";
            auto i = all.pieces.upper_bound(address);
            if (i != all.pieces.begin()) {
                --i;
                near = std::to_string(address - i->second.end) + " bytes after the end of " + i->second.name + " (" +
                       std::to_string(i->second.end - i->first) + " bytes)";
            } else if (i != all.pieces.end()) {
                near = std::to_string(i->first - address) + " bytes before " + i->second.name;
            }
            lock.unlock();
            fail("%s of %u bytes at %p, outside live memory: %s", ACCESS_NAMES[access], bytes, (void*)address, near.c_str());
        }
        if (p->second.device >= 0 && !(running->devices >> p->second.device & 1)) {
            const std::string name = p->second.name;
            lock.unlock();
            fail("%s at %p in %s: peer access is not enabled", ACCESS_NAMES[access], (void*)address, name.c_str());
        }
        r = {p->first, p->second.end, p->second.shift};
    }
    return (char*)address + r.shift;
}

namespace {

// ---- Warps --------------------------------------------------------------------------------------------------------------------

// Lets another lane of the warp run, or the scheduler; returns when this lane is to go on.
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

// ---- Blocks and the scheduler -------------------------------------------------------------------------------------------------

namespace {

void fiber_entry() {
    running->call(running->context);
    Fiber* me = (Fiber*)current;
    Warp& w = *me->warp;
    const uint32_t bit = 1u << me->lane;
    if (w.arrived) fail("exits while %s of the warp are in %s", lanes_text(w.arrived).c_str(), OP_NAMES[w.op]);
    w.exited |= bit;
    w.ready &= ~bit;
    running->idle = 0;
    if (w.exited == ALL) {
        w.block->live--;
        to_scheduler();
    } else {
        yield_lane();
    }
    abort();
}

size_t pages(size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}
char* map(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw error("softgpu: no memory for stacks");
    return (char*)p;
}

// A block's dynamic shared memory ends where an inaccessible MiB begins, give or take the alignment to 128 bytes, whose rest is checked
// when the block ends; before it lies another.
const unsigned char CANARY = 0xa5;

void start_block(Launch& l, Block& b, uint64_t number) {
    b.launch = &l;
    b.number = number;
    b.index = {(unsigned)(number % l.grid.x), (unsigned)(number / l.grid.x % l.grid.y), (unsigned)(number / ((uint64_t)l.grid.x * l.grid.y))};
    if (!b.fibers) {
        b.fibers.reset(new Fiber[l.threads]);
        b.warps.reset(new Warp[l.warps]);
        // Odd multiples of a cache line between the stacks, so that they do not all share the same sets.
        b.stacks_bytes = (STACK + 1088) * l.threads;
        b.stacks = map(b.stacks_bytes);
        const size_t page = pages(1 << 20), inner = pages(l.shared_bytes + 128);
        b.shared_map_bytes = inner + 2 * page;
        b.shared_map = (unsigned char*)map(b.shared_map_bytes);
        mprotect(b.shared_map, page, PROT_NONE);
        mprotect(b.shared_map + page + inner, page, PROT_NONE);
        if (race_detector) b.races = race_detector->make(l.shared_bytes, l.warps);
        b.shared = b.shared_map + page + inner - (l.shared_bytes + 127) / 128 * 128;
    }
    memset(b.shared, 0xff, l.shared_bytes);
    memset(b.shared + l.shared_bytes, CANARY, (128 - l.shared_bytes % 128) % 128);
    memset(b.barriers, 0, sizeof b.barriers);
    if (b.races) race_detector->reset(b.races);
    b.random.state = mix(l.random.state ^ mix(number));
    b.schedule = (Schedule)b.random.below(SCHEDULES);
    b.lanes_descend = b.random.below(2);
    b.last = b.random.below(l.warps);
    b.live = l.warps;
    b.running = true;
    for (uint32_t i = 0; i < l.warps; i++) {
        Warp& w = b.warps[i];
        memset((void*)&w, 0, sizeof w);
        w.block = &b;
        w.index = i;
        w.fibers = &b.fibers[32 * i];
        w.ready = ALL;
        w.barrier = -1;
    }
    for (uint32_t i = 0; i < l.threads; i++) {
        Fiber& f = b.fibers[i];
        f.thread = {i % l.block.x, i / l.block.x % l.block.y, i / (l.block.x * l.block.y)};
        f.block = b.index;
        f.block_dim = l.block;
        f.grid_dim = l.grid;
        f.shared = b.shared;
        f.shared_bytes = l.shared_bytes;
        f.lane = i % 32;
        f.warp = &b.warps[i / 32];
        f.launch = &l;
        f.races = b.races;
        f.copies.clear();
        f.first_copy = 0;
        f.groups = 0;
        f.awaited = nullptr;
        start_context(f.context, b.stacks + (STACK + 1088) * i, STACK, fiber_entry);
    }
}

// True if a lane of the warp can go on; takes lanes out of wait_for whose value has come.
bool runnable(Warp& w) {
    for (uint32_t m = w.polling; m; m &= m - 1) {
        Fiber& f = w.fibers[__builtin_ctz(m)];
        if (*f.awaited == f.awaited_value) {
            w.polling &= ~(1u << f.lane);
            w.ready |= 1u << f.lane;
        }
    }
    return w.ready != 0;
}

Warp* pick(Block& b) {
    const uint32_t n = b.launch->warps;
    const bool descend = b.schedule == REVERSED || (b.schedule == GREEDY && b.lanes_descend);
    uint32_t first = b.last + (descend ? n - 1 : 1);
    if (b.schedule == GREEDY && !b.polled) first = b.last;
    b.polled = false;
    if (b.schedule == RANDOM) first = b.random.below(n);
    for (uint32_t i = 0; i < n; i++) {
        Warp& w = b.warps[(first + (descend ? n - i : i)) % n];
        if (w.exited != ALL && runnable(w)) {
            b.last = w.index;
            return &w;
        }
    }
    return nullptr;
}

void run_warp(Launch& l, Block& b, Warp& w) {
    switch (b.schedule) {
        case GREEDY: w.quantum = 1 << 30; break;
        case RANDOM: w.quantum = (int32_t)b.random.below(16); break;
        default: w.quantum = 2; break;
    }
    uint32_t lane = b.lanes_descend ? 31 - __builtin_clz(w.ready) : __builtin_ctz(w.ready);
    if (w.ready != ALL)  // any of them, so that no lane's polling starves another
        for (lane = b.random.below(32); !(w.ready >> lane & 1); lane = (lane + 1) % 32) {
        }
    Fiber& f = w.fibers[lane];
    current = &f;
    switch_context(l.scheduler, f.context);
    current = nullptr;
}

std::string describe(const Block& b) {
    std::string s;
    char text[256];
    for (uint32_t i = 0; i < b.launch->warps; i++) {
        const Warp& w = b.warps[i];
        snprintf(text, sizeof text, "\n  block (%u,%u,%u) warp %u:", b.index.x, b.index.y, b.index.z, i);
        s += text;
        if (w.exited) s += " " + lanes_text(w.exited) + " exited;";
        if (w.barrier >= 0) {
            const Barrier& at = b.barriers[w.barrier];
            snprintf(text, sizeof text, " all lanes at %s %d (%u of %u threads there);", w.barrier ? "sync_some" : "sync_block, barrier", w.barrier,
                     at.arrived, at.expected);
            s += text;
        }
        if (w.arrived) s += " " + lanes_text(w.arrived) + " in " + OP_NAMES[w.op] + ";";
        for (uint32_t m = w.polling; m; m &= m - 1) {
            const Fiber& f = w.fibers[__builtin_ctz(m)];
            snprintf(text, sizeof text, " lane %u in wait_for(%p, %u), where %u is;", f.lane, (const void*)f.awaited_address, f.awaited_value, *f.awaited);
            s += text;
        }
    }
    return s;
}

void end_block(Launch& l, Block& b) {
    b.running = false;
    for (uint32_t i = l.shared_bytes; i % 128; i++)
        if (b.shared[i] != CANARY)
            throw error(l.name + ": block " + std::to_string(b.number) + " wrote past its " + std::to_string(l.shared_bytes) + " bytes of shared memory");
}

void free_block(Block& b) {
    if (b.stacks) munmap(b.stacks, b.stacks_bytes);
    if (b.races) race_detector->free(b.races);
    if (b.shared_map) munmap(b.shared_map, b.shared_map_bytes);
}

struct Cleanup {
    Launch& launch;
    ~Cleanup() {
        for (auto& b : launch.blocks) free_block(*b);
        last_counts = launch.counts;
        running = nullptr;
        ranges = nullptr;
        current = nullptr;
    }
};

// A plain access by a kernel to memory that is not there (past the shared memory's pages, device memory without ptx.cuh, null) ends the
// launch like any other mistake: the handler leaves for the scheduler and the fiber is dropped. Elsewhere the handler before has its turn.
struct sigaction handler_before;
void bad_address(int signal, siginfo_t* info, void* context) {
    if (current && running) {
        const ptrdiff_t offset = (const unsigned char*)info->si_addr - current->shared;
        fail("a plain access to %p, which is no memory the kernel has (offset %td of the block's %u bytes of shared memory)", info->si_addr, offset,
             current->shared_bytes);
    }
    if (handler_before.sa_flags & SA_SIGINFO)
        handler_before.sa_sigaction(signal, info, context);
    else if (handler_before.sa_handler != SIG_DFL && handler_before.sa_handler != SIG_IGN)
        handler_before.sa_handler(signal);
    else
        sigaction(SIGSEGV, &handler_before, nullptr);  // and the access is tried again
}
void catch_bad_addresses() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = bad_address;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigemptyset(&action.sa_mask);
        sigaction(SIGSEGV, &action, &handler_before);
    });
}

std::string kernel_name(const void* kernel, const Options& options) {
    if (options.name) return options.name;
    Dl_info info;
    return kernel && dladdr((void*)kernel, &info) && info.dli_sname ? info.dli_sname : "kernel";
}

}  // namespace

Counts counts() { return last_counts; }

void run(void (*call)(void*), void* context, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Options& options) {
    static uint64_t launches;
    const std::string name = kernel_name(kernel, options);
    if (running) throw error(name + ": launched from inside a kernel");
    const uint64_t threads = (uint64_t)block.x * block.y * block.z, total = (uint64_t)grid.x * grid.y * grid.z;
    if (threads == 0 || threads > 1024 || threads % 32) throw error(name + ": blocks of " + std::to_string(threads) + " threads; 32 … 1024 in whole warps");
    if (total == 0 || shared_bytes > (1u << 20)) throw error(name + ": empty grid or over 1 MiB of shared memory");
    catch_bad_addresses();
    Launch l;
    Cleanup cleanup{l};
    l.call = call;
    l.context = context;
    l.name = name;
    l.devices = options.devices;
    if (options.accesses) l.accesses = options.accesses;
    l.grid = grid;
    l.block = block;
    l.shared_bytes = (uint32_t)shared_bytes;
    l.threads = (uint32_t)threads;
    l.warps = (uint32_t)threads / 32;
    l.random.state = options.seed ? mix(options.seed) : mix(environment_seed() ^ mix(__atomic_fetch_add(&launches, 1, __ATOMIC_RELAXED)));
    memset((void*)l.ranges, 0, sizeof l.ranges);
    running = &l;
    ranges = l.ranges;
    uint64_t resident = options.resident ? options.resident : 1 + l.random.below(3);
    if (resident > total) resident = total;
    for (uint64_t i = 0; i < resident; i++) l.blocks.emplace_back(new Block());

    uint64_t next = 0, live = 0;
    uint32_t at = 0, turns = 0;
    while (next < total || live) {
        for (auto& b : l.blocks)
            if (!b->running && next < total) {
                start_block(l, *b, next++);
                if (options.schedule >= 0) b->schedule = (Schedule)options.schedule;
                live++;
            }
        // One block for some turns, then another; any that can run if this one cannot.
        if (turns-- == 0) {
            turns = l.random.below(64);
            at = l.random.below((uint32_t)resident);
        }
        Block* b = nullptr;
        Warp* w = nullptr;
        for (uint64_t i = 0; i < resident && !w; i++) {
            b = l.blocks[(at + i) % resident].get();
            if (b->running) w = pick(*b);
        }
        if (!w) {
            std::string text = name + ": deadlock, no thread can go on:";
            for (auto& r : l.blocks)
                if (r->running) text += describe(*r);
            throw error(text);
        }
        run_warp(l, *b, *w);
        if (!l.failure.empty()) throw error(l.failure);
        if (!b->live) {
            end_block(l, *b);
            live--;
        }
    }
}

}  // namespace softgpu
