// The race detector of race.h. Each warp counts the barriers it passed and knows how many of them each other warp had passed when they last
// met (vector clocks); lanes of a warp are ordered by sync_warp and barriers only. Every two bytes of shared memory remember their last
// writer and, of every warp, the last lanes that read them.
//
// __tsan_*: what a compiler calls before each load and store with -fsanitize=thread. This is not ThreadSanitizer and its library is not linked.
#include "race.h"

#include <stdio.h>
#include <string.h>

#include <vector>

#include "device.h"

namespace softgpu {

const uint32_t GRAIN = 2;
struct Mark {
    uint32_t lanes, synced, passed;  // who, and the warp's counts at the time; no lanes: nothing yet
};
struct RaceBlock {
    uint32_t warps, cells;
    std::vector<uint32_t> synced;  // by warp: sync_warp and barriers
    std::vector<uint32_t> passed;  // by warp: barriers
    std::vector<uint32_t> known;   // [warp][other]: barriers of the other that are before now
    std::vector<Mark> reads;       // [cell][warp]
    std::vector<Mark> writes;      // [cell]
    std::vector<uint8_t> writer;   // [cell]: warp
};

namespace {

RaceBlock* make(uint32_t shared_bytes, uint32_t warps) {
    RaceBlock* b = new RaceBlock;
    b->warps = warps;
    b->cells = (shared_bytes + GRAIN - 1) / GRAIN;
    b->reads.resize((size_t)b->cells * warps);
    b->writes.resize(b->cells);
    b->writer.resize(b->cells);
    b->synced.resize(warps);
    b->passed.resize(warps);
    b->known.resize((size_t)warps * warps);
    return b;
}
void reset(RaceBlock* b) {
    memset(b->reads.data(), 0, b->reads.size() * sizeof(Mark));
    memset(b->writes.data(), 0, b->writes.size() * sizeof(Mark));
    b->synced.assign(b->warps, 0);
    b->passed.assign(b->warps, 0);
    b->known.assign((size_t)b->warps * b->warps, 0);
}
void destroy(RaceBlock* b) { delete b; }

// Whether what the mark says is not before an access by `mask` of warp `warp` now.
inline bool unordered(const RaceBlock& b, const Mark& m, uint32_t of, uint32_t warp, uint32_t mask) {
    if (!m.lanes) return false;
    if (of == warp) return m.synced == b.synced[warp] && !(m.lanes == mask && !(mask & (mask - 1)));
    return m.passed >= b.known[warp * b.warps + of];
}
std::string text(uint32_t offset, bool write, const char* other, uint32_t warp, uint32_t lanes) {
    char s[200];
    snprintf(s, sizeof s, "race: %s offset %u of shared memory, %s by warp %u lane %d%s with no barrier between", write ? "writes" : "reads", offset, other,
             warp, __builtin_ctz(lanes), lanes & (lanes - 1) ? " (and others)" : "");
    return s;
}

std::string access(RaceBlock* block, uint32_t warp, uint32_t mask, uint32_t offset, uint32_t bytes, bool write) {
    RaceBlock& b = *block;
    const Mark now = {mask, b.synced[warp], b.passed[warp]};
    for (uint32_t c = offset / GRAIN; c <= (offset + bytes - 1) / GRAIN && c < b.cells; c++) {
        Mark& last = b.writes[c];
        if (unordered(b, last, b.writer[c], warp, mask)) return text(offset, write, "written", b.writer[c], last.lanes);
        Mark* reads = &b.reads[(size_t)c * b.warps];
        if (write) {
            for (uint32_t w = 0; w < b.warps; w++)
                if (unordered(b, reads[w], w, warp, mask)) return text(offset, write, "read", w, reads[w].lanes);
            last = now;
            b.writer[c] = (uint8_t)warp;
        } else if (reads[warp].lanes && reads[warp].synced == now.synced) {
            reads[warp].lanes |= mask;
        } else {
            reads[warp] = now;
        }
    }
    return {};
}
void sync_warp(RaceBlock* b, uint32_t warp) { b->synced[warp]++; }
void sync(RaceBlock* b, const bool* warps) {
    std::vector<uint32_t> joined(b->warps, 0);
    for (uint32_t w = 0; w < b->warps; w++)
        if (warps[w]) {
            b->synced[w]++;
            b->known[w * b->warps + w] = ++b->passed[w];
            for (uint32_t o = 0; o < b->warps; o++)
                if (joined[o] < b->known[w * b->warps + o]) joined[o] = b->known[w * b->warps + o];
        }
    for (uint32_t w = 0; w < b->warps; w++)
        if (warps[w]) memcpy(&b->known[w * b->warps], joined.data(), b->warps * sizeof(uint32_t));
}

const RaceDetector detector = {make, reset, destroy, access, sync_warp, sync};
struct Install {
    Install() { race_detector = &detector; }
} install;

inline void plain(const void* p, uint32_t bytes, bool write) {
    const Lane* l = current;
    if (!l || !l->races) return;
    const uintptr_t offset = (uintptr_t)p - (uintptr_t)l->shared;
    if (offset >= l->shared_bytes) return;
    // The warp's number and lane are found from the thread's.
    const uint32_t thread = l->thread.x + l->block_dim.x * (l->thread.y + l->block_dim.y * l->thread.z);
    std::string race = access((RaceBlock*)l->races, thread / 32, 1u << l->lane, (uint32_t)offset, bytes, write);
    if (!race.empty()) fail_here(race);
}

}  // namespace
}  // namespace softgpu

#define HOOKS(n)                                                                            \
    extern "C" void __tsan_read##n(void* p) { softgpu::plain(p, n, false); }                \
    extern "C" void __tsan_write##n(void* p) { softgpu::plain(p, n, true); }                \
    extern "C" void __tsan_volatile_read##n(void* p) { softgpu::plain(p, n, false); }       \
    extern "C" void __tsan_volatile_write##n(void* p) { softgpu::plain(p, n, true); }       \
    extern "C" void __tsan_unaligned_read##n(void* p) { softgpu::plain(p, n, false); }      \
    extern "C" void __tsan_unaligned_write##n(void* p) { softgpu::plain(p, n, true); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* p, unsigned long n) { softgpu::plain(p, (uint32_t)n, false); }
extern "C" void __tsan_write_range(void* p, unsigned long n) { softgpu::plain(p, (uint32_t)n, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
// Atomics of host code in the same file (reference counts).
extern "C" int __tsan_atomic32_fetch_add(volatile int* p, int x, int) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
extern "C" int __tsan_atomic32_load(const volatile int* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
extern "C" char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
