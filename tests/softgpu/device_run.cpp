// Runs a kernel's grid on this OS thread: starts the fibers of its blocks and decides which warp goes on.
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <mutex>

#include "fiber.h"

#ifdef SOFTGPU_SWITCH_X86
// Saves the registers that a call preserves on the old stack and takes them from the new one.
asm(R"(
.text
.p2align 4
.globl softgpu_switch
.hidden softgpu_switch
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
#endif

namespace softgpu {

namespace {

__thread Counts last_counts;
const size_t STACK = 128 * 1024;  // of a fiber; only touched pages cost memory

uint64_t environment_seed() {
    const char* s = getenv("SOFTGPU_SEED");
    return s && *s ? strtoull(s, nullptr, 0) : 1;
}

#ifdef SOFTGPU_SWITCH_X86
void start_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
    void** s = (void**)(stack + bytes);
    *--s = nullptr;  // where a return address of entry's caller would be: keeps the ABI's alignment
    *--s = (void*)entry;
    for (int i = 0; i < 6; i++) *--s = nullptr;
    c.sp = s;
}
#else
void start_context(Context& c, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&c.u);
    c.u.uc_stack.ss_sp = stack;
    c.u.uc_stack.ss_size = bytes;
    c.u.uc_link = nullptr;
    makecontext(&c.u, entry, 0);
}
#endif

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

// Stacks are kept from launch to launch: to map and touch them anew costs more than a small kernel.
struct Stacks {
    std::vector<std::pair<size_t, char*>> kept;
    char* take(size_t bytes) {
        for (auto& k : kept)
            if (k.first == bytes) {
                char* stacks = k.second;
                k = kept.back();
                kept.pop_back();
                return stacks;
            }
        return map(bytes);
    }
    void give(size_t bytes, char* stacks) {
        if (kept.size() < 8)
            kept.push_back({bytes, stacks});
        else
            munmap(stacks, bytes);
    }
    ~Stacks() {
        for (auto& k : kept) munmap(k.second, k.first);
    }
};
thread_local Stacks stacks;

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
        b.stacks = stacks.take(b.stacks_bytes);
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
    if (b.stacks) stacks.give(b.stacks_bytes, b.stacks);
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
