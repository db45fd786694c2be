// Proves the race detector: what is ordered passes, each missing barrier is found whatever the order of execution.
// Built with tests/softgpu/build race, and run, by tests/softgpu/build selftest.
#include "ptx.cuh"

#include <stdio.h>

#include <string>
#include <vector>

// Warp w writes its row and reads its neighbour's; the rows are staged in shared memory several times over.
struct Params {
    const uint32_t* in;
    uint32_t* out;
    int which;
};
static void kernel(const Params p) {
    SHARED_MEMORY(shared);
    const int t = threadIdx.x, n = blockDim.x, other = (t + 32) % n, lane = t % 32;
    volatile uint32_t* const words = (volatile uint32_t*)shared;
    for (int i = 0; i < 3; i++) {
        if (p.which == 3) {  // within a warp
            words[t] = i;
            store_global(p.out + t, words[t ^ 1]);
            sync_warp();
            continue;
        }
        if (p.which == 4) {  // a warp's own row, through ldmatrix
            words[t] = i;
            uint32_t r[4];
            ldmatrix_x4(r, shared + t / 32 * 128 + lane % 8 * 16);
            sync_warp();
            continue;
        }
        if (p.which == 5) {  // asynchronous copies, awaited by the thread but not announced to the others
            cp_async_16(shared + t * 16, p.in + t * 4, true);
            cp_async_commit();
            cp_async_wait<0>();
            store_global(p.out + t, words[other * 4]);
            sync_block();
            continue;
        }
        if (p.which == 6) {  // each half of the block has its own barrier
            words[t] = i;
            sync_some(1 + t / (n / 2), n / 2);
            store_global(p.out + t, words[(t + n / 2) % n]);
            sync_block();
            continue;
        }
        words[t] = t + i;
        if (p.which != 1) sync_block();
        store_global(p.out + t, words[other]);
        if (p.which != 2) sync_block();
    }
}

int main() {
    const char* const names[] = {"a barrier after the writes and one after the reads", "no barrier after the writes", "no barrier after the reads",
                                 "lanes of a warp without sync_warp", "ldmatrix of what other lanes stored, without sync_warp",
                                 "asynchronous copies without a barrier", "barriers of other threads"};
    int failures = 0;
    std::vector<uint32_t> in(512), out(128);
    softgpu::Registered ri(in.data(), 2048, "in"), ro(out.data(), 512, "out");
    for (int which = 0; which < 7; which++) {
        int found = 0;
        std::string said;
        for (int schedule = 0; schedule < softgpu::SCHEDULES; schedule++) {
            softgpu::Options o;
            o.schedule = schedule;
            o.seed = 3 + (uint64_t)schedule;
            try {
                softgpu::launch(kernel, 2, 128, 2048, o, Params{in.data(), out.data(), which});
            } catch (const softgpu::error& e) {
                said = e.what();
                found += said.find("race:") != std::string::npos;
            }
        }
        const bool ok = found == (which ? softgpu::SCHEDULES : 0);
        printf("%s %s: a race under %d of %d schedules %s\n", ok ? "ok  " : "FAIL", names[which], found, (int)softgpu::SCHEDULES, said.c_str());
        failures += !ok;
    }
    printf(failures ? "%d failed\n" : "all passed\n", failures);
    return failures != 0;
}
