// Proves the stand-in for libcuda.so.1: what CUDA promises holds under every order, what it does not promise fails under some.
// Each case is a process of its own for each of several seeds. Built and run by tests/softgpu/build selftest.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "device.h"
#include "entry.h"
#include "softgpu.h"

extern "C" {
int cuInit(unsigned);
int cuDeviceGetAttribute(int*, int, int);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuCtxGetCurrent(void**);
int cuCtxEnablePeerAccess(void*, unsigned);
int cuCtxSynchronize();
int cuMemAlloc_v2(uint64_t*, size_t);
int cuMemFree_v2(uint64_t);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemcpyHtoD_v2(uint64_t, const void*, size_t);
int cuMemcpyDtoH_v2(void*, uint64_t, size_t);
int cuMemcpyHtoDAsync_v2(uint64_t, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, uint64_t, size_t, void*);
int cuMemcpyDtoDAsync_v2(uint64_t, uint64_t, size_t, void*);
int cuMemsetD32Async(uint64_t, unsigned, size_t, void*);
int cuStreamCreate(void**, unsigned);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamQuery(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuStreamBeginCapture_v2(void*, int);
int cuStreamEndCapture(void*, void**);
int cuStreamIsCapturing(void*, int*);
int cuThreadExchangeStreamCaptureMode(int*);
int cuEventCreate(void**, unsigned);
int cuEventDestroy_v2(void*);
int cuEventRecord(void*, void*);
int cuEventQuery(void*);
int cuEventSynchronize(void*);
int cuEventElapsedTime_v2(float*, void*, void*);
int cuGraphInstantiateWithFlags(void**, void*, unsigned long long);
int cuGraphLaunch(void*, void*);
int cuGraphExecDestroy(void*);
int cuGraphDestroy(void*);
int cuLaunchHostFunc(void*, void (*)(void*), void*);
int cuModuleLoadData(void**, const void*);
int cuModuleUnload(void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuFuncGetAttribute(int*, int, void*);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuPointerGetAttribute(void*, int, uint64_t);
int cuGetErrorName(int, const char**);
}

// to[i] = from[i] + add
struct AddParams {
    uint64_t from, to;
    uint32_t count, add;
};
static void test_add(const AddParams p) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += blockDim.x * gridDim.x)
        store_global((uint32_t*)p.to + i, load_global((const uint32_t*)p.from + i) + p.add);
}
SOFTGPU_KERNEL(test_add, 128)

static int wrong = 0;
static void expect(bool ok, const char* what, int line) {
    if (!ok) {
        fprintf(stderr, "line %d: %s\n", line, what);
        wrong++;
    }
}
#define EXPECT(x) expect(x, #x, __LINE__)
#define OK(x) expect((x) == 0, #x, __LINE__)
#define GIVES(code, x) expect((x) == (code), #x " gives " #code, __LINE__)

static const size_t N = 1000, BYTES = 4 * N;
static void* function;
static void start() {
    OK(cuInit(0));
    void* context;
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxSetCurrent(context));
    alignas(16) static const uint32_t image[4] = {0xBA55ED50u, 0, 0, 0};
    void* module;
    OK(cuModuleLoadData(&module, image));
    OK(cuModuleGetFunction(&function, module, "test_add"));
}
static uint64_t device_memory() {
    uint64_t p = 0;
    OK(cuMemAlloc_v2(&p, BYTES));
    return p;
}
static uint32_t* pinned() {
    void* p = nullptr;
    OK(cuMemHostAlloc(&p, BYTES, 0));
    return (uint32_t*)p;
}
static void* stream(unsigned flags = 1) {
    void* s = nullptr;
    OK(cuStreamCreate(&s, flags));
    return s;
}
static void* event(unsigned flags = 2) {
    void* e = nullptr;
    OK(cuEventCreate(&e, flags));
    return e;
}
static int add(uint64_t from, uint64_t to, uint32_t x, void* s) {
    AddParams p{from, to, (uint32_t)N, x};
    void* params[] = {&p};
    const int r = cuLaunchKernel(function, 4, 1, 1, 64, 1, 1, 0, s, params, nullptr);
    memset(&p, 0xff, sizeof p);  // was copied
    return r;
}
static bool all(uint64_t p, uint32_t x) {
    std::vector<uint32_t> v(N);
    OK(cuMemcpyDtoH_v2(v.data(), p, BYTES));
    for (uint32_t y : v)
        if (y != x) return false;
    return true;
}

// ---- What must hold -----------------------------------------------------------------------------------------------------------

static void streams_and_events() {
    start();
    void *a = stream(), *b = stream(), *e = event();
    const uint64_t x = device_memory(), y = device_memory();
    for (uint32_t i = 0; i < 20; i++) {
        OK(cuMemsetD32Async(x, i, N, a));
        OK(add(x, x, 5, a));
        OK(cuEventRecord(e, a));
        OK(cuStreamWaitEvent(b, e, 0));
        OK(add(x, y, 7, b));
        OK(cuEventRecord(e, b));
        OK(cuStreamWaitEvent(a, e, 0));
    }
    OK(cuEventDestroy_v2(e));  // while it is in use
    OK(cuStreamDestroy_v2(b));
    OK(cuStreamSynchronize(a));
    EXPECT(all(y, 19 + 12));
    // A wait refers to the record before it, not to a later one; on an event never recorded it does nothing.
    void *c = stream(), *f = event(), *never = event();
    OK(cuMemsetD32Async(x, 1, N, a));
    OK(cuEventRecord(f, a));
    OK(cuStreamWaitEvent(c, f, 0));
    OK(cuEventRecord(f, c));
    OK(cuStreamWaitEvent(c, never, 0));
    OK(cuStreamSynchronize(c));
    OK(cuEventQuery(f));
    OK(cuEventSynchronize(never));
    GIVES(0, cuStreamQuery(c));
    void *t0 = event(0), *t1 = event(0);
    OK(cuEventRecord(t0, a));
    OK(cuMemsetD32Async(x, 1, N, a));
    OK(cuEventRecord(t1, a));
    OK(cuEventSynchronize(t1));
    float ms = -1;
    OK(cuEventElapsedTime_v2(&ms, t0, t1));
    EXPECT(ms >= 0);
    GIVES(400, cuEventElapsedTime_v2(&ms, f, t1));
}

static void default_stream() {
    start();
    void *blocking = stream(0), *c = stream(0);
    const uint64_t x = device_memory(), y = device_memory();
    for (uint32_t i = 0; i < 20; i++) {
        OK(cuMemsetD32Async(x, i, N, blocking));
        OK(add(x, y, 1, nullptr));
        OK(add(y, x, 1, c));
        OK(add(x, y, 1, nullptr));
    }
    EXPECT(all(y, 19 + 3));
}

static void copies() {
    start();
    void* s = stream();
    const uint64_t x = device_memory(), y = device_memory();
    EXPECT(all(x, 0xffffffffu));  // poison
    uint32_t* h = pinned();
    EXPECT(h[0] == 0xffffffffu);
    // Pageable memory is read at the call.
    std::vector<uint32_t> v(N, 3);
    OK(cuMemcpyHtoDAsync_v2(x, v.data(), BYTES, s));
    v.assign(N, 4);
    OK(cuMemcpyDtoDAsync_v2(y, x, BYTES, s));
    OK(cuMemcpyDtoHAsync_v2(h, y, BYTES, s));
    OK(cuStreamSynchronize(s));
    EXPECT(h[0] == 3 && h[N - 1] == 3);
    OK(cuMemcpyDtoHAsync_v2(v.data(), y, BYTES, s));  // to pageable memory: done when it returns
    EXPECT(v[5] == 3);
    int type = 0;
    OK(cuPointerGetAttribute(&type, 2, x + 40));
    EXPECT(type == 2);
    OK(cuPointerGetAttribute(&type, 2, (uint64_t)h));
    EXPECT(type == 1);
    GIVES(1, cuPointerGetAttribute(&type, 2, (uint64_t)v.data()));
    GIVES(1, cuMemcpyHtoDAsync_v2(x + 4, v.data(), BYTES, s));  // past the end
    GIVES(1, cuMemcpyDtoDAsync_v2(y, (uint64_t)v.data(), 4, s));
    EXPECT(softgpu_resolve(x, BYTES) && !softgpu_resolve(x, BYTES + 1) && !softgpu_resolve(x + BYTES, 1));
    OK(cuMemFree_v2(y));
    EXPECT(!softgpu_resolve(y, 1));
    GIVES(1, cuMemFree_v2(y));
    GIVES(1, cuMemFree_v2(x + 512));
    OK(cuMemFreeHost(h));
}

static void launches() {
    start();
    void* s = stream();
    const uint64_t x = device_memory();
    AddParams p{x, x, N, 1};
    void* params[] = {&p};
    GIVES(1, cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, 0, s, params, nullptr));  // launch bounds are 128
    GIVES(1, cuLaunchKernel(function, 1, 1, 1, 64, 1, 1, 50000, s, params, nullptr));
    GIVES(1, cuLaunchKernel(function, 0, 1, 1, 64, 1, 1, 0, s, params, nullptr));
    GIVES(1, cuFuncSetAttribute(function, 8, 232449));
    OK(cuFuncSetAttribute(function, 8, 232448));
    OK(cuMemsetD32Async(x, 1, N, s));
    OK(cuLaunchKernel(function, 1, 1, 1, 64, 1, 1, 232448, s, params, nullptr));
    OK(cuStreamSynchronize(s));
    EXPECT(all(x, 2));
    void *m, *f;
    alignas(16) const uint32_t bad[4] = {1, 2, 3, 4}, good[4] = {0xBA55ED50u, 0, 0, 0};
    GIVES(200, cuModuleLoadData(&m, bad));
    OK(cuModuleLoadData(&m, good));
    GIVES(500, cuModuleGetFunction(&f, m, "no_such_kernel"));
    OK(cuModuleGetFunction(&f, m, "test_add"));
    int threads = 0;
    OK(cuFuncGetAttribute(&threads, 0, f));
    EXPECT(threads == 128);
    OK(cuModuleUnload(m));
    GIVES(400, cuFuncGetAttribute(&threads, 0, f));
    GIVES(400, cuStreamSynchronize((void*)&p));
}

static void graphs() {
    start();
    void *a = stream(), *b = stream(), *e = event(), *e2 = event();
    const uint64_t x = device_memory(), y = device_memory(), z = device_memory();
    auto capture = [&](bool join) {
        OK(cuStreamBeginCapture_v2(a, 1));
        OK(add(x, x, 1, a));
        OK(cuEventRecord(e, a));
        OK(cuStreamWaitEvent(b, e, 0));
        OK(add(x, y, 10, b));
        OK(add(x, z, 20, a));
        OK(cuEventRecord(e2, b));
        if (join) OK(cuStreamWaitEvent(a, e2, 0));
        if (join) OK(add(y, x, 100, a));
    };
    void *graph, *exec;
    int status = 0;
    capture(true);
    OK(cuStreamIsCapturing(b, &status));
    EXPECT(status == 1);
    OK(cuStreamEndCapture(a, &graph));
    OK(cuStreamIsCapturing(b, &status));
    EXPECT(status == 0);
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphDestroy(graph));
    OK(cuMemsetD32Async(x, 0, N, a));
    for (int i = 0; i < 5; i++) OK(cuGraphLaunch(exec, a));
    OK(add(x, x, 1000, a));
    OK(cuStreamSynchronize(a));
    EXPECT(all(x, 5 * 111 + 1000) && all(z, 4 * 111 + 21));
    OK(cuGraphExecDestroy(exec));
    GIVES(907, cuEventQuery(e));  // still belongs to a capture
    OK(cuEventRecord(e, a));
    OK(cuEventSynchronize(e));

    capture(false);
    GIVES(904, cuStreamEndCapture(a, &graph));
    capture(true);
    GIVES(900, cuStreamSynchronize(a));
    GIVES(901, cuStreamEndCapture(a, &graph));
    capture(true);
    uint64_t p;
    GIVES(900, cuMemAlloc_v2(&p, 4));
    GIVES(901, cuStreamEndCapture(a, &graph));
    capture(true);
    int mode = 2;  // relaxed: this thread may, and the capture goes on
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    EXPECT(mode == 0);
    OK(cuMemAlloc_v2(&p, 4));
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    EXPECT(mode == 2);
    OK(cuStreamEndCapture(a, &graph));
    OK(cuGraphDestroy(graph));
    OK(cuMemFree_v2(p));
    capture(true);
    std::thread([&] { cuCtxSetCurrent(nullptr); GIVES(908, cuStreamEndCapture(a, &graph)); }).join();
    GIVES(903, cuStreamEndCapture(b, &graph));
    GIVES(901, cuStreamEndCapture(a, &graph));
    capture(true);
    GIVES(905, (cuEventRecord(e, stream()), cuStreamWaitEvent(a, e, 0)));  // an event from outside
    GIVES(901, cuStreamEndCapture(a, &graph));
    void* blocking = stream(0);
    OK(cuStreamBeginCapture_v2(blocking, 1));
    GIVES(906, add(x, x, 1, nullptr));
    GIVES(901, cuStreamEndCapture(blocking, &graph));
    GIVES(900, cuStreamBeginCapture_v2(nullptr, 1));
    OK(cuMemsetD32Async(x, 0, N, a));
    OK(cuStreamSynchronize(a));
    EXPECT(all(x, 0));
}

// Operations of the communication stand-in: two that wait for each other on different streams, others going on meanwhile.
struct Meeting {
    std::atomic<int> here{0}, released{0}, polls{0};
    uint64_t last_run = 0;
    int need = 2;
};
static int meet(void* data, uint64_t run) {
    Meeting& m = *(Meeting*)data;
    m.polls++;
    if (m.last_run != run && m.here < m.need) {
        m.here += m.last_run != run;
        m.last_run = run;
    }
    return m.here >= m.need ? SOFTGPU_DONE : SOFTGPU_NOT_YET;
}
static void release_meeting(void* data) { ((Meeting*)data)->released++; }
static void operations() {
    start();
    Meeting m;
    void *a = stream(), *b = stream(), *c = stream(), *e = event();
    const uint64_t x = device_memory();
    const softgpu_operation o = {"meeting", &m, meet, release_meeting};
    OK(softgpu_enqueue(a, &o));
    OK(cuEventRecord(e, a));
    OK(cuStreamWaitEvent(c, e, 0));
    OK(cuMemsetD32Async(x, 2, N, c));
    OK(cuMemsetD32Async(x, 1, N, b));
    OK(cuStreamSynchronize(b));
    EXPECT(all(x, 1));
    GIVES(600, cuStreamQuery(a));
    OK(softgpu_enqueue(b, &o));
    OK(cuStreamSynchronize(c));
    EXPECT(all(x, 2));
    OK(cuCtxSynchronize());
    EXPECT(m.released == 2 && m.polls >= 2);
    // In a graph: once per launch, released with the graph.
    Meeting g;
    g.need = 1;
    const softgpu_operation alone = {"alone", &g, meet, release_meeting};
    void *graph, *exec;
    OK(cuStreamBeginCapture_v2(a, 1));
    OK(softgpu_enqueue(a, &alone));
    OK(cuStreamEndCapture(a, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphDestroy(graph));
    OK(cuGraphLaunch(exec, a));
    OK(cuGraphLaunch(exec, a));
    OK(cuStreamSynchronize(a));
    EXPECT(g.polls == 2 && g.released == 0);
    OK(cuGraphExecDestroy(exec));
    EXPECT(g.released == 1);
}

static void host_functions() {
    start();
    static int result = -1;
    void* s = stream();
    OK(cuLaunchHostFunc(s, [](void* p) { *(int*)p = cuCtxSynchronize(); }, &result));
    OK(cuStreamSynchronize(s));
    EXPECT(result == 800);  // no CUDA calls there
}

static void use_after_free() {
    start();
    void *s = stream(), *other = stream();
    const uint64_t x = device_memory(), y = device_memory();
    Meeting m;
    m.need = 1;
    const softgpu_operation never = {"never", &m, [](void* d, uint64_t) { return ((Meeting*)d)->here > 0 ? SOFTGPU_DONE : SOFTGPU_NOT_YET; }, nullptr};
    OK(softgpu_enqueue(s, &never));
    OK(add(x, y, 1, s));
    OK(cuMemFree_v2(x));
    m.here = 1;
    GIVES(700, cuStreamSynchronize(s));
    GIVES(700, cuMemsetD32Async(y, 1, N, other));  // for ever
}
static void out_of_bounds() {
    start();
    void* s = stream();
    const uint64_t x = device_memory();
    AddParams p{x, x, N + 1, 1};
    void* params[] = {&p};
    OK(cuLaunchKernel(function, 1, 1, 1, 64, 1, 1, 0, s, params, nullptr));
    GIVES(700, cuStreamSynchronize(s));
}
static void two_devices() {
    setenv("SOFTGPU_DEVICES", "2", 1);
    start();
    void *s = stream(), *e = event(), *peer, *own;
    const uint64_t x = device_memory();
    OK(cuCtxGetCurrent(&own));
    OK(cuDevicePrimaryCtxRetain(&peer, 1));
    OK(cuCtxSetCurrent(peer));
    void *t = stream(), *f = event();
    const uint64_t y = device_memory(), z = device_memory();
    GIVES(400, cuEventRecord(f, s));  // of another device
    GIVES(400, add(y, z, 1, t));      // loaded on another device
    OK(cuMemsetD32Async(y, 5, N, t));
    OK(cuEventRecord(f, t));
    OK(cuStreamWaitEvent(s, f, 0));  // events order devices
    OK(cuMemcpyDtoDAsync_v2(x, y, BYTES, s));
    OK(cuEventRecord(e, s));
    OK(cuStreamWaitEvent(t, e, 0));
    OK(cuMemsetD32Async(y, 6, N, t));
    OK(cuStreamSynchronize(t));
    OK(cuCtxSetCurrent(own));
    EXPECT(all(x, 5) && all(y, 6));
    OK(cuCtxEnablePeerAccess(peer, 0));
    GIVES(704, cuCtxEnablePeerAccess(peer, 0));
    OK(add(y, x, 1, s));
    OK(cuStreamSynchronize(s));
    EXPECT(all(x, 7));
}
static void no_peer_access() {
    setenv("SOFTGPU_DEVICES", "2", 1);
    start();
    void *s = stream(), *peer, *own;
    const uint64_t x = device_memory();
    OK(cuCtxGetCurrent(&own));
    OK(cuDevicePrimaryCtxRetain(&peer, 1));
    OK(cuCtxSetCurrent(peer));
    const uint64_t y = device_memory();
    OK(cuMemsetD32Async(y, 1, N, nullptr));
    OK(cuCtxSynchronize());
    OK(cuCtxSetCurrent(own));
    OK(add(y, x, 1, s));
    GIVES(700, cuStreamSynchronize(s));
    OK(cuCtxSetCurrent(peer));
    EXPECT(all(y, 1));  // the other device goes on
}
static void timeout() {
    setenv("SOFTGPU_TIMEOUT_MS", "300", 1);
    start();
    void *s = stream(), *t = stream(), *e = event();
    const softgpu_operation never = {"never", nullptr, [](void*, uint64_t) { return SOFTGPU_NOT_YET; }, nullptr};
    OK(softgpu_enqueue(s, &never));
    OK(cuEventRecord(e, s));
    OK(cuStreamWaitEvent(t, e, 0));
    GIVES(702, cuStreamSynchronize(t));
}
static void forked() {
    start();
    const pid_t child = fork();
    if (child == 0) _exit(cuCtxSynchronize() == 3 ? 0 : 1);
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
static void host_cannot_dereference() {
    start();
    const uint64_t x = device_memory();
    const pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        _exit(*(volatile char*)x);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}

// ---- What must fail under some seed: each is wrong in one way ------------------------------------------------------------------

static void no_event() {
    start();
    void *a = stream(), *b = stream();
    const uint64_t x = device_memory(), y = device_memory();
    OK(cuMemsetD32Async(x, 1, N, a));
    OK(add(x, y, 1, b));
    OK(cuStreamSynchronize(b));
    EXPECT(all(y, 2));
}
static void staging_reused() {
    start();
    void* s = stream();
    const uint64_t x = device_memory();
    uint32_t* h = pinned();
    for (size_t i = 0; i < N; i++) h[i] = 1;
    OK(cuMemcpyHtoDAsync_v2(x, h, BYTES, s));
    for (size_t i = 0; i < N; i++) h[i] = 2;
    OK(cuStreamSynchronize(s));
    EXPECT(all(x, 1));
}
static void result_read_early() {
    start();
    void* s = stream();
    const uint64_t x = device_memory();
    uint32_t* h = pinned();
    OK(cuMemsetD32Async(x, 7, N, s));
    OK(cuMemcpyDtoHAsync_v2(h, x, BYTES, s));
    EXPECT(h[0] == 7);
}
static void default_stream_and_non_blocking() {
    start();
    void* s = stream(1);
    const uint64_t x = device_memory(), y = device_memory();
    OK(cuMemsetD32Async(x, 1, N, s));
    OK(add(x, y, 1, nullptr));
    EXPECT(all(y, 2));
}
static void graph_without_dependency() {
    start();
    void *a = stream(), *b = stream(), *e = event(), *e2 = event(), *graph, *exec;
    const uint64_t x = device_memory(), y = device_memory();
    OK(cuStreamBeginCapture_v2(a, 1));
    OK(cuEventRecord(e, a));
    OK(cuStreamWaitEvent(b, e, 0));
    OK(cuMemsetD32Async(x, 1, N, a));
    OK(add(x, y, 1, b));
    OK(cuEventRecord(e2, b));
    OK(cuStreamWaitEvent(a, e2, 0));
    OK(cuStreamEndCapture(a, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphLaunch(exec, a));
    OK(cuStreamSynchronize(a));
    EXPECT(all(y, 2));
}

// Runs a case with a seed in a process of its own; true if it found nothing wrong.
static bool passes(void (*test)(), int seed, bool quiet, const char* fault = nullptr) {
    fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        setenv("SOFTGPU_SEED", std::to_string(seed).c_str(), 1);
        if (fault) setenv("SOFTGPU_FAULT", fault, 1);
        if (quiet && !freopen("/dev/null", "w", stderr)) _exit(2);
        alarm(60);
        test();
        fflush(nullptr);
        _exit(wrong != 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Both streams read, then one writes again.
static void readers_and_writer(bool ordered) {
    start();
    void *a = stream(), *b = stream(), *e = event();
    const uint64_t x = device_memory(), y = device_memory(), z = device_memory();
    OK(cuMemsetD32Async(x, 1, N, a));
    OK(cuEventRecord(e, a));
    OK(cuStreamWaitEvent(b, e, 0));
    OK(add(x, y, 1, a));
    OK(add(x, z, 1, b));
    OK(cuEventRecord(e, b));
    if (ordered) OK(cuStreamWaitEvent(a, e, 0));
    OK(cuMemsetD32Async(x, 2, N, a));
    OK(cuStreamSynchronize(a));
    OK(cuCtxSynchronize());
    OK(cuMemsetD32Async(x, 3, N, b));  // the host has seen all
    OK(cuCtxSynchronize());
}
static void readers_then_writer() { readers_and_writer(true); }
static void writer_beside_reader() { readers_and_writer(false); }

int main(int argc, char** argv) {
    const bool verbose = argc > 1 && !strcmp(argv[1], "-v");
    const int seeds = 12;
    int failures = 0;
    const struct {
        const char* name;
        void (*test)();
    } hold[] = {{"streams and events", streams_and_events}, {"the default stream", default_stream}, {"copies", copies}, {"launches are checked", launches},
                {"capture and graphs", graphs}, {"operations of the communication stand-in", operations}, {"host functions may not call CUDA", host_functions},
                {"use after free is a sticky error", use_after_free}, {"a kernel out of bounds is a sticky error", out_of_bounds},
                {"two devices", two_devices},
                {"no peer access", no_peer_access}, {"readers, then a writer", readers_then_writer}, {"a stream that never goes on times out", timeout}, {"a forked child is refused", forked},
                {"the host cannot dereference device memory", host_cannot_dereference}},
      fail[] = {{"two streams without an event", no_event}, {"a staging buffer reused early", staging_reused}, {"a result read early", result_read_early},
                {"the default stream and a non-blocking one", default_stream_and_non_blocking}, {"graph nodes without a dependency", graph_without_dependency}};
    const struct {
        const char* name;
        void (*test)();
        const char* fault;
    } races[] = {{"two streams without an event", no_event, nullptr}, {"a writer beside a reader", writer_beside_reader, nullptr},
                 {"the default stream and a non-blocking one", default_stream_and_non_blocking, nullptr},
                 {"graph nodes without a dependency", graph_without_dependency, nullptr}, {"a wait that is dropped", streams_and_events, "drop_wait:3"},
                 {"a record that is dropped", streams_and_events, "drop_record:4"}};
    for (const auto& t : hold) {
        int good = 0;
        for (int seed = 1; seed <= seeds; seed++) good += passes(t.test, seed, !verbose);
        printf("%s %s: right under %d of %d seeds\n", good == seeds ? "ok  " : "FAIL", t.name, good, seeds);
        failures += good != seeds;
    }
    for (const auto& t : fail) {
        int good = 0;
        for (int seed = 1; seed <= seeds; seed++) good += passes(t.test, seed, !verbose);
        printf("%s %s: caught under %d of %d seeds\n", good < seeds ? "ok  " : "FAIL", t.name, seeds - good, seeds);
        failures += good == seeds;
    }
    // With SOFTGPU_RACES, what is right stays so and what is wrong between streams is found under every seed, in whatever order it ran.
    setenv("SOFTGPU_RACES", "1", 1);
    for (const auto& t : hold) {
        if (t.test == operations) continue;  // two writes there are ordered by the meeting alone
        int good = 0;
        for (int seed = 1; seed <= 4; seed++) good += passes(t.test, seed, !verbose);
        printf("%s %s, looking for races: right under %d of 4 seeds\n", good == 4 ? "ok  " : "FAIL", t.name, good);
        failures += good != 4;
    }
    for (const auto& t : races) {
        int good = 0;
        for (int seed = 1; seed <= seeds; seed++) good += passes(t.test, seed, !verbose, t.fault);
        printf("%s %s, looking for races: caught under %d of %d seeds\n", good == 0 ? "ok  " : "FAIL", t.name, seeds - good, seeds);
        failures += good != 0;
    }
    unsetenv("SOFTGPU_RACES");
    const struct {
        const char* fault;
        void (*test)();
    } faults[] = {{"drop_wait:39", streams_and_events}, {"drop_record:39", streams_and_events}, {"drop_memset:1", no_event}, {"drop_copy:2", copies}, {"early_sync:1", copies}};
    for (const auto& t : faults) {
        int good = 0;
        for (int seed = 1; seed <= seeds; seed++) good += passes(t.test, seed, !verbose, t.fault);
        printf("%s fault %s: caught under %d of %d seeds\n", good < seeds ? "ok  " : "FAIL", t.fault, seeds - good, seeds);
        failures += good == seeds;
    }
    printf(failures ? "%d failed\n" : "all passed\n", failures);
    return failures != 0;
}
