// Inside of the software GPU's device: fibers, and the state of a launch, its blocks and its warps.
//   device.cpp         what a thread executes: collectives, barriers, asynchronous copies
//   device_memory.cpp  the registry of memory that kernels may touch
//   device_run.cpp     blocks, and the scheduler that orders them and their warps
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "access.h"
#include "device.h"
#include "race.h"

#if defined(__x86_64__) && !defined(SOFTGPU_UCONTEXT)
#define SOFTGPU_SWITCH_X86
#else
#include <ucontext.h>
#endif

namespace softgpu {

const uint32_t ALL = 0xffffffffu;
const uint32_t BARRIERS = 16;

inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
struct Random {
    uint64_t state;
    uint32_t below(uint32_t n) { return (uint32_t)((mix(state++) >> 32) * n >> 32); }
};

// What a fiber is when it does not run.
#ifdef SOFTGPU_SWITCH_X86
struct Context {
    void* sp = nullptr;
};
extern "C" void softgpu_switch(void** save, void* load) __attribute__((visibility("hidden")));
inline void switch_context(Context& from, Context& to) { softgpu_switch(&from.sp, to.sp); }
#else
struct Context {
    ucontext_t u;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
#endif

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
inline const char* const OP_NAMES[] = {"nothing",           "mma_m16n8k16<bf16_t>", "mma_m16n8k16<f16_t>", "ldmatrix_x4",
                                "ldmatrix_x4_trans", "shuffle",              "any_lane",            "sync_warp",           "sync_block", "sync_some"};
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
    std::string failure;
    uint64_t idle = 0;
    Counts counts = {};
    Accesses own_accesses;
    Accesses* accesses = &own_accesses;
    uintptr_t last_page = ~(uintptr_t)0;
    PageAccess* last_words = nullptr;
};

extern __thread Launch* running __attribute__((tls_model("initial-exec")));  // on this OS thread

// Lets another lane of the warp run, or the scheduler; returns when this lane is to go on.
void yield_lane();
void to_scheduler();
// Ends the launch from inside a fiber, naming where it is. The fibers are dropped as they stand: kernels own nothing.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string lanes_text(uint32_t mask);

}  // namespace softgpu
