// Proves the software GPU's device: its instructions compute what the PTX manual says, and each mistake it is meant to catch is caught.
// Built and run by tests/softgpu/build selftest.
#include "ptx.cuh"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <vector>

static int failures = 0;
static void check(bool ok, const char* what, const char* detail = "") {
    printf("%s %s%s%s\n", ok ? "ok  " : "FAIL", what, *detail ? ": " : "", detail);
    failures += !ok;
}
// The launch must fail under every schedule, and say `text`.
static void refused(const char* what, const char* text, const std::function<void(const softgpu::Options&)>& launch, int least = softgpu::SCHEDULES) {
    int caught = 0;
    std::string last;
    for (int schedule = 0; schedule < softgpu::SCHEDULES; schedule++) {
        softgpu::Options o;
        o.name = "k";
        o.schedule = schedule;
        o.seed = 7 + (uint64_t)schedule;
        try {
            launch(o);
        } catch (const softgpu::error& e) {
            last = e.what();
            caught += last.find(text) != std::string::npos;
        }
    }
    check(caught >= least, what, last.c_str());
}

static float number(uint64_t& s) {
    s = s * 6364136223846793005ull + 1442695040888963407ull;
    return (float)((int)(s >> 40) % 64 - 32) / 16.0f;  // exact in both storage types
}

// One warp: c[16·m.., 8] = a·b through shared memory, as a kernel would: cp.async, ldmatrix, mma. a: 16×16 row-major; b: 16×16 as rows k.
struct Gemm {
    const uint16_t *a, *b;
    float* c;
    int repeat, forget_wait, trans;
};
template <class T>
static void gemm(const Gemm p) {
    SHARED_MEMORY(shared);
    const int lane = threadIdx.x % 32;
    // a at 0 (16 rows of 32 bytes), b at 512.
    cp_async_16(shared + lane * 16, p.a + lane * 8, true);
    cp_async_16(shared + 512 + lane * 16, p.b + lane * 8, true);
    cp_async_commit();
    if (!p.forget_wait) cp_async_wait<0>();
    sync_block();
    uint32_t a[4], b[4];
    // Matrices of a: rows 0–7 and 8–15 of columns 0–7, then the same of columns 8–15.
    ldmatrix_x4(a, shared + (lane % 16) * 32 + (lane / 16) * 16);
    if (p.trans)
        ldmatrix_x4_trans(b, shared + 512 + (lane % 16) * 32 + (lane / 16) * 16);  // rows k: transposed to columns
    else
        ldmatrix_x4(b, shared + 512 + (lane % 8 + lane / 16 * 8) * 32 + (lane / 8 % 2) * 16);  // rows n
    float d[2][4] = {};
    for (int i = 0; i < p.repeat; i++) {
        mma_m16n8k16<T>(d[0], a, b[0], b[1]);
        mma_m16n8k16<T>(d[1], a, b[2], b[3]);
    }
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++)
            store_global(p.c + (lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2, d[n][i]);
}

template <class T>
static void test_gemm(const char* what, int trans) {
    std::vector<uint16_t> a(256), b(256);
    std::vector<float> af(256), bf(256), c(256, -1);
    uint64_t s = 5;
    for (int i = 0; i < 256; i++) {
        af[i] = number(s);
        bf[i] = number(s);
        a[i] = (uint16_t)pack2<T>(af[i], 0);
        b[i] = (uint16_t)pack2<T>(bf[i], 0);
    }
    softgpu::Registered ra(a.data(), 512, "a"), rb(b.data(), 512, "b"), rc(c.data(), 1024, "c");
    softgpu::launch(gemm<T>, 1, 32, 1024, Gemm{a.data(), b.data(), c.data(), 1, 0, trans});
    bool ok = true;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float want = 0;
            for (int k = 0; k < 16; k++) want += af[i * 16 + k] * (trans ? bf[k * 16 + j] : bf[j * 16 + k]);
            ok &= c[i * 16 + j] == want;
        }
    check(ok, what);
}

static void test_types() {
    bool ok = true;
    for (uint32_t i = 0; i < 65536; i++) {
        const float f = to_float(f16_t{(uint16_t)i}), g = to_float(bf16_t{(uint16_t)i});
        ok &= f != f ? (pack2<f16_t>(f, 0) & 0xffff) == 0x7fff : (pack2<f16_t>(f, 0) & 0xffff) == i;
        ok &= g != g ? (pack2<bf16_t>(g, 0) & 0xffff) == 0x7fff : (pack2<bf16_t>(0, g) >> 16) == i;
    }
    ok &= pack2<f16_t>(65519.0f, 65520.0f) == (0x7c00u << 16 | 0x7bffu);
    ok &= pack2<bf16_t>(1.00390625f, 1.01171875f) == (0x3f82u << 16 | 0x3f80u);  // ties to even
    ok &= pack2<f16_t>(0x1p-25f, 0x1.8p-25f) == (1u << 16 | 0u);
    check(ok, "storage types round trip, round to nearest even, overflow to infinity");
    check(exp2_approx(-INFINITY) == 0 && exp2_approx(-140.0f) == 0 && exp2_approx(3.0f) == 8 && log2_approx(0.0f) == -INFINITY, "exp2, log2 flush");
}

// A ring of two stages over `tiles` tiles of 512 bytes per warp; each warp copies for its neighbour, so barriers matter.
struct Ring {
    const uint32_t* in;
    uint32_t* out;
    int tiles, wait, no_barrier_after_wait, no_barrier_before_reload;
};
static void ring(const Ring p) {
    SHARED_MEMORY(shared);
    const int t = threadIdx.x, n = blockDim.x, other = (t + 32) % n;
    auto copy = [&](int tile) { cp_async_16(shared + (tile % 2 * n + t) * 16, p.in + (tile * n + t) * 4, true); };
    copy(0);
    cp_async_commit();
    for (int i = 0; i < p.tiles; i++) {
        if (i + 1 < p.tiles) copy(i + 1);
        cp_async_commit();
        p.wait == 2 ? (void)0 : p.wait == 1 ? cp_async_wait<2>() : cp_async_wait<1>();
        if (!p.no_barrier_after_wait) sync_block();
        uint32_t x[4];
        ldmatrix_x4(x, shared + (i % 2 * n + other) * 16);
        store_global((uint4*)p.out + i * n + t, make_uint4(x[0], x[1], x[2], x[3]));
        if (!p.no_barrier_before_reload) sync_block();
    }
}
// How many of the schedules make the ring wrong.
static int ring_wrong(int wait, int no_after, int no_before) {
    const int tiles = 6, n = 128;
    std::vector<uint32_t> in(tiles * n * 4), out(in.size()), want;
    for (size_t i = 0; i < in.size(); i++) in[i] = (uint32_t)i * 2654435761u;
    softgpu::Registered ri(in.data(), in.size() * 4, "in"), ro(out.data(), out.size() * 4, "out");
    int wrong = 0;
    for (int schedule = -1; schedule < softgpu::SCHEDULES; schedule++) {
        softgpu::Options o;
        o.schedule = schedule < 0 ? 0 : schedule;
        o.seed = 11 + (uint64_t)schedule;
        softgpu::launch(ring, 1, n, n * 32, o, schedule < 0 ? Ring{in.data(), out.data(), tiles, 0, 0, 0} : Ring{in.data(), out.data(), tiles, wait, no_after, no_before});
        if (schedule < 0) {
            want = out;
            for (size_t i = 0; i < in.size(); i++)
                if (std::find(in.begin(), in.end(), out[i]) == in.end()) return -1;
        } else {
            wrong += out != want;
        }
    }
    return wrong;
}

static void test_ring() {
    check(ring_wrong(0, 0, 0) == 0, "a ring of copies is right under every schedule");
    check(ring_wrong(2, 0, 0) == softgpu::SCHEDULES, "no wait: wrong under every schedule");
    check(ring_wrong(1, 0, 0) == softgpu::SCHEDULES, "wait for one group too few: wrong under every schedule");
    check(ring_wrong(0, 1, 0) >= 2, "no barrier after the wait: wrong under some schedule");
    check(ring_wrong(0, 0, 1) >= 1, "no barrier before a tile is loaded again: wrong under some schedule");
}

struct Mistake {
    uint32_t* p;
    const unsigned char* far;
    int which;
};
static void mistake(const Mistake m) {
    SHARED_MEMORY(shared);
    const int t = threadIdx.x, lane = t % 32;
    uint32_t r[4];
    float d[4] = {};
    const uint32_t a[4] = {};
    switch (m.which) {
        case 0:
            if (lane != 5) sync_warp();
            break;
        case 1: lane < 16 ? (void)shuffle(1, 0) : sync_warp(); break;
        case 2: t < 32 ? sync_block() : (void)shuffle(1, 0); break;
        case 3: t < 32 ? sync_some(1, 64) : sync_some(2, 64); break;
        case 4: ldmatrix_x4(r, shared + 1024 - 8 * (lane == 3)); break;
        case 5: ldmatrix_x4(r, shared + 4); break;
        case 6: cp_async_16(shared + 1024, m.p, true); break;
        case 7: cp_async_16(shared, m.p + 1, true); break;
        case 8: cp_async_16(shared, m.far, true); break;
        case 9: load_global(m.p + 64); break;
        case 10: store_global(m.p - 1, 1u); break;
        case 11: load_constant((const uint2*)(m.p + 1)); break;
        case 12: add_global((float*)m.p + 64, 1.0f); break;
        case 13: t == 0 ? store_global(m.p, 1u) : (void)load_constant(m.p); break;
        case 14: t == 0 ? wait_for(m.p + 3, 99) : (void)0; sync_block(); break;
        case 15: while (load_acquire(m.p + 3) != 99) {} break;
        case 16: shuffle_xor(1.0f, 32); break;
        case 22: *(volatile int*)(shared + 8192) = 1; break;
        case 23: *(volatile int*)((uintptr_t)t * 4) = 1; break;
        case 17: shared[1001] = 1; break;
        case 18: mma_m16n8k16<bf16_t>(d, a, 0, 0); lane < 31 ? mma_m16n8k16<bf16_t>(d, a, 0, 0) : mma_m16n8k16<f16_t>(d, a, 0, 0); break;
        case 19: sync_some(16, 64); break;
        case 20: sync_some(1, 48); break;
        case 21: t < 32 ? sync_some(1, 32) : (void)0; t >= 32 ? sync_block() : (void)0; break;
    }
}
static void test_mistakes() {
    std::vector<uint32_t> memory(64);
    std::vector<unsigned char> far(64);
    softgpu::Registered rm(memory.data(), 256, "memory");
    const char* const texts[] = {"exits while lanes", "while lanes", "sync_block", "sync_some 1", "past", "not a multiple of 16",
                                 "cp_async_16 at offset 1024", "not aligned", "outside live memory", "outside live memory", "store_global", "not aligned",
                                 "atomic add", "load_constant", "wait_for", "load_acquire", "shuffle from lane", "shared memory", "mma_m16n8k16", "barriers are 1", "barriers are 1",
                                 "sync_block"};
    const char* const names[] = {"one lane leaves before a collective", "two collectives in one warp", "a warp in a barrier while another never comes",
                                 "two warps at different barriers", "", "ldmatrix off by 4 bytes", "cp.async past the end of shared memory",
                                 "cp.async from an unaligned address", "cp.async outside registered memory", "load past the end", "store before the beginning",
                                 "unaligned vector load", "atomic past the end", "load_constant of what the launch writes", "wait_for what never comes",
                                 "load_acquire of what never comes", "shuffle beyond the warp", "a write past the size asked", "mma of two types in one warp",
                                 "barrier 16", "a barrier of 48 threads", "a block barrier after other warps left"};
    for (int i = 0; i < 22; i++)
        if (i != 4)
            refused(names[i], texts[i], [&](const softgpu::Options& o) {
                softgpu::launch(mistake, 1, 64, i == 17 ? 1001 : 1024, o, Mistake{memory.data(), far.data(), i});
            });
    for (int i = 22; i < 24; i++)
        refused(i == 22 ? "a plain write far past shared memory" : "a plain write through a null pointer", "a plain access", [&](const softgpu::Options& o) {
            softgpu::launch(mistake, 1, 64, 1024, o, Mistake{memory.data(), far.data(), i});
        });
    refused("ldmatrix past the end", "offset 1024", [&](const softgpu::Options& o) {
        softgpu::launch(mistake, 1, 64, 1024, o, Mistake{memory.data(), far.data(), 4});
    });
    refused("use after unregister", "outside live memory", [&](const softgpu::Options& o) {
        std::vector<uint32_t> gone(64);
        { softgpu::Registered r(gone.data(), 256, "gone"); }
        softgpu::launch(mistake, 1, 64, 1024, o, Mistake{gone.data() + 1, far.data(), 10});
    });
}

// Uninitialised shared memory is NaN.
static void poison(float* out) {
    SHARED_MEMORY(shared);
    store_global(out + threadIdx.x, ((float*)shared)[threadIdx.x]);
}
// Blocks add their number in turn: the order of dispatch lets each wait for those before it.
static void turns(uint32_t* counter, float* order) {
    if (threadIdx.x == 0) wait_for(counter, blockIdx.x);
    sync_block();
    if (threadIdx.x == 33) store_global(order + blockIdx.x, (float)load_acquire(counter));
    sync_block();
    if (threadIdx.x == 0) add_release(counter, 1);
}
static void test_blocks() {
    std::vector<float> out(64, 0);
    uint32_t counter = 0;
    softgpu::Registered ro(out.data(), 256, "out"), rc(&counter, 4, "counter");
    softgpu::launch(poison, 1, 64, 256, out.data());
    bool nan = true;
    for (float x : out) nan &= x != x;
    check(nan, "shared memory starts as NaN");
    bool ok = true;
    for (int i = 0; i < 20; i++) {
        counter = 0;
        softgpu::launch(turns, 40, 64, 0, &counter, out.data());
        for (int b = 0; b < 40; b++) ok &= out[b] == (float)b;
    }
    check(ok, "blocks that wait for earlier ones make progress");
}

static void test_speed() {
    std::vector<uint16_t> a(256), b(256);
    std::vector<float> c(256);
    softgpu::Registered ra(a.data(), 512, "a"), rb(b.data(), 512, "b"), rc(c.data(), 1024, "c");
    for (int f16 = 0; f16 < 2; f16++) {
        const auto start = std::chrono::steady_clock::now();
        const int repeat = 2000, blocks = 20;
        for (int i = 0; i < blocks; i++) softgpu::launch(f16 ? gemm<f16_t> : gemm<bf16_t>, 1, 32, 1024, Gemm{a.data(), b.data(), c.data(), repeat, 0, 1});
        const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        printf("%s: %.1f GFLOP/s, %.0f ns per collective\n", f16 ? "fp16" : "bf16", 8192.0 * repeat * blocks / s * 1e-9, s / (2.0 * repeat * blocks) * 1e9);
    }
}

int main(int argc, char**) {
    test_types();
    test_gemm<bf16_t>("mma and ldmatrix, bf16", 0);
    test_gemm<f16_t>("mma and ldmatrix, fp16", 0);
    test_gemm<bf16_t>("mma and ldmatrix_trans, bf16", 1);
    test_gemm<f16_t>("mma and ldmatrix_trans, fp16", 1);
    test_ring();
    test_mistakes();
    test_blocks();
    if (argc > 1) test_speed();
    printf(failures ? "%d failed\n" : "all passed\n", failures);
    return failures != 0;
}
