// Devices, contexts, memory, modules and launches of the stand-in for libcuda.so.1. README.md lists the environment variables.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"
#include "device.h"

using namespace softgpu::driver;

#define CUDA extern "C" SOFTGPU_EXPORT int

softgpu_kernel* softgpu_kernel::first = nullptr;

namespace softgpu {
namespace driver {

Driver& driver = *new Driver;  // outlives every static destructor: the device thread uses it to the end

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
uint64_t mix64(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

Result complain(Result result, const char* format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "softgpu: error %d: %s\n", (int)result, text);
    return result;
}

namespace {

uint64_t number(const char* name, uint64_t otherwise) {
    const char* s = getenv(name);
    return s && *s ? strtoull(s, nullptr, 0) : otherwise;
}

// ---- Faults -------------------------------------------------------------------------------------------------------------------

const char* const FAULTS[] = {"drop_wait", "drop_record", "drop_copy", "drop_memset", "early_sync"};
const int FAULT_KINDS = 5;
struct Faults {
    bool count = false;
    int kind = -1;
    uint64_t which = 0, seen[FAULT_KINDS] = {};
} faults;

void read_faults() {
    const char* s = getenv("SOFTGPU_FAULT");
    if (!s || !*s) return;
    if (!strcmp(s, "count")) {
        faults.count = true;
        return;
    }
    if (!strncmp(s, "nccl_", 5)) return;  // libnccl.so.2's
    const char* colon = strchr(s, ':');
    for (int i = 0; colon && i < FAULT_KINDS; i++)
        if (!strncmp(s, FAULTS[i], (size_t)(colon - s)) && FAULTS[i][colon - s] == 0) faults.kind = i;
    faults.which = colon ? strtoull(colon + 1, nullptr, 10) : 0;
    if (faults.kind < 0 || !faults.which) {
        fprintf(stderr, "softgpu: SOFTGPU_FAULT=%s: not count, nor one of", s);
        for (const char* f : FAULTS) fprintf(stderr, " %s:N", f);
        fprintf(stderr, ", N from 1\n");
        abort();
    }
}

// ---- The end of the process ---------------------------------------------------------------------------------------------------

void at_exit() {
    Lock lock(driver.mutex);
    if (getpid() != driver.pid) return;
    if (faults.count) {
        fprintf(stderr, "softgpu: counts");
        for (int i = 0; i < FAULT_KINDS; i++) fprintf(stderr, " %s=%llu", FAULTS[i], (unsigned long long)faults.seen[i]);
        fprintf(stderr, "\n");
    }
    const uint64_t leaks = number("SOFTGPU_LEAKS", 0);
    if (!leaks) return;
    bool leaked = false;
    for (const auto& a : driver.allocations) {
        fprintf(stderr, "softgpu: leak: %s\n", a.second.name.c_str());
        leaked = true;
    }
    const struct {
        const char* what;
        size_t count;
    } rest[] = {{"streams", driver.streams.size()}, {"events", driver.events.size()}, {"graphs", driver.graphs.size()},
                {"instantiated graphs", driver.execs.size()}, {"modules", driver.modules.size()}, {"captures", driver.captures.size()}};
    for (const auto& r : rest)
        if (r.count) {
            fprintf(stderr, "softgpu: leak: %zu %s\n", r.count, r.what);
            leaked = true;
        }
    if (leaked && leaks > 1) {
        fflush(nullptr);
        _exit(66);
    }
}

// ---- Devices ------------------------------------------------------------------------------------------------------------------

const int MULTIPROCESSORS = 4;
struct Model {
    int major, minor;
    uint32_t shared_block, shared_multiprocessor;  // bytes
};
Model model;

bool read_model() {
    const struct {
        const char* name;
        Model model;
    } models[] = {{"80", {8, 0, 166912, 167936}}, {"86", {8, 6, 101376, 102400}}, {"87", {8, 7, 166912, 167936}}, {"89", {8, 9, 101376, 102400}},
                  {"90", {9, 0, 232448, 233472}}, {"100", {10, 0, 232448, 233472}}, {"103", {10, 3, 232448, 233472}},
                  {"120", {12, 0, 101376, 102400}}, {"75", {7, 5, 65536, 65536}}};
    const char* s = getenv("SOFTGPU_SM");
    if (!s || !*s) s = "90";
    for (const auto& m : models)
        if (!strcmp(m.name, s)) {
            model = m.model;
            return true;
        }
    fprintf(stderr, "softgpu: SOFTGPU_SM=%s: not one of 75 80 86 87 89 90 100 103 120\n", s);
    return false;
}

thread_local std::vector<Context*> stack;  // of current contexts

const uint64_t RESERVED = 1ull << 42;  // addresses for device memory
uint64_t reserved_begin, reserved_next;
uint64_t memory_bytes;

}  // namespace

bool fault(const char* kind) {
    for (int i = 0; i < FAULT_KINDS; i++)
        if (!strcmp(kind, FAULTS[i])) {
            const uint64_t n = ++faults.seen[i];
            if (i != faults.kind || n != faults.which) return false;
            fprintf(stderr, "softgpu: fault %s:%llu\n", kind, (unsigned long long)n);
            return true;
        }
    return false;
}

Result enter() {
    if (on_device_thread) return complain(NOT_PERMITTED, "a CUDA call from a host function or an operation of a stream");
    if (!driver.pid) return complain(NOT_INITIALIZED, "a CUDA call before cuInit");
    if (getpid() != driver.pid) return complain(NOT_INITIALIZED, "a CUDA call in a child of the process that called cuInit");
    return stack.empty() ? SUCCESS : sticky(stack.back()->device);
}
Result enter(Context*& context) {
    if (Result r = enter()) return r;
    if (stack.empty()) return complain(INVALID_CONTEXT, "no context is current in this thread");
    context = stack.back();
    if (!context->retained) return complain(INVALID_CONTEXT, "the current context was released");
    return SUCCESS;
}
Result sticky(int device) { return driver.contexts[(size_t)device]->sticky; }

bool is_device_address(uint64_t address) { return address >= reserved_begin && address < reserved_begin + RESERVED; }

const Allocation* find_allocation(uint64_t address) {
    auto i = driver.allocations.upper_bound(address);
    if (i == driver.allocations.begin()) return nullptr;
    --i;
    return address < i->second.address + i->second.bytes ? &i->second : nullptr;
}

}  // namespace driver
}  // namespace softgpu

// ---- Start and devices ----------------------------------------------------------------------------------------------------------

CUDA cuInit(unsigned flags) {
    Lock lock(driver.mutex);
    if (flags) return INVALID_VALUE;
    if (driver.pid) return getpid() == driver.pid ? SUCCESS : NOT_INITIALIZED;
    if (!read_model()) return NO_DEVICE;
    const uint64_t devices = number("SOFTGPU_DEVICES", 1);
    if (!devices) return NO_DEVICE;
    read_faults();
    driver.seed = number("SOFTGPU_SEED", 1);
    driver.trace = number("SOFTGPU_TRACE", 0);
    driver.races = softgpu::track_reads = number("SOFTGPU_RACES", 0);
    driver.timeout = 1e-3 * (double)number("SOFTGPU_TIMEOUT_MS", 60000);
    memory_bytes = number("SOFTGPU_MEMORY_MB", 8192) << 20;
    void* p = mmap(nullptr, RESERVED, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return complain(OUT_OF_MEMORY, "cuInit: no addresses for device memory");
    reserved_begin = reserved_next = (uint64_t)p;
    driver.pid = getpid();
    for (uint64_t i = 0; i < devices; i++) {
        driver.contexts.emplace_back(new Context());
        driver.contexts.back()->device = (int)i;
    }
    atexit(at_exit);
    return SUCCESS;
}
CUDA cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}
CUDA cuDeviceGetCount(int* count) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    *count = (int)driver.contexts.size();
    return SUCCESS;
}
static Result check_device(int device, const char* call) {
    if (Result r = enter()) return r;
    if (device < 0 || (size_t)device >= driver.contexts.size()) return complain(INVALID_DEVICE, "%s: device %d of %zu", call, device, driver.contexts.size());
    return SUCCESS;
}
CUDA cuDeviceGet(int* device, int ordinal) {
    Lock lock(driver.mutex);
    if (Result r = check_device(ordinal, "cuDeviceGet")) return r;
    *device = ordinal;
    return SUCCESS;
}
CUDA cuDeviceGetName(char* name, int bytes, int device) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDeviceGetName")) return r;
    snprintf(name, (size_t)bytes, "Software GPU sm_%d%d", model.major, model.minor);
    return SUCCESS;
}
CUDA cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDeviceGetUuid")) return r;
    memset(uuid, 0x5f, 16);
    uuid[15] = (unsigned char)device;
    return SUCCESS;
}
CUDA cuDeviceGetUuid(unsigned char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
CUDA cuDeviceTotalMem_v2(size_t* bytes, int device) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDeviceTotalMem")) return r;
    *bytes = memory_bytes;
    return SUCCESS;
}
CUDA cuDeviceGetPCIBusId(char* id, int bytes, int device) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDeviceGetPCIBusId")) return r;
    snprintf(id, (size_t)bytes, "0000:%02x:00.0", device + 1);
    return SUCCESS;
}
CUDA cuDeviceGetAttribute(int* value, int attribute, int device) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDeviceGetAttribute")) return r;
    switch (attribute) {
        case 1: *value = 1024; break;                                // threads per block
        case 2: case 3: *value = 1024; break;                        // block x, y
        case 4: *value = 64; break;                                  // block z
        case 5: *value = 0x7fffffff; break;                          // grid x
        case 6: case 7: *value = 65535; break;                       // grid y, z
        case 8: *value = 49152; break;                               // shared memory per block without opting in
        case 9: *value = 65536; break;                               // constant memory
        case 10: *value = 32; break;                                 // warp
        case 12: *value = 65536; break;                              // registers per block
        case 13: *value = 1000000; break;                            // clock, kHz
        case 15: *value = 1; break;                                  // copies overlap kernels
        case 16: *value = MULTIPROCESSORS; break;
        case 17: *value = 0; break;                                  // time limit of kernels
        case 18: *value = 0; break;                                  // integrated
        case 19: *value = 1; break;                                  // can map host memory
        case 20: *value = 0; break;                                  // compute mode
        case 31: *value = 1; break;                                  // concurrent kernels
        case 32: *value = 0; break;                                  // ECC
        case 33: *value = device + 1; break;                         // PCI bus
        case 34: *value = 0; break;                                  // PCI device
        case 50: *value = 0; break;                                  // PCI domain
        case 36: *value = 1000000; break;                            // memory clock
        case 37: *value = 1024; break;                               // bus width
        case 38: *value = 4 << 20; break;                            // L2 cache
        case 39: *value = 2048; break;                               // threads per multiprocessor
        case 40: *value = 2; break;                                  // copy engines
        case 41: *value = 1; break;                                  // unified addressing
        case 75: *value = model.major; break;
        case 76: *value = model.minor; break;
        case 78: *value = 1; break;                                  // stream priorities
        case 81: *value = (int)model.shared_multiprocessor; break;
        case 82: *value = 65536; break;                              // registers per multiprocessor
        case 83: *value = 0; break;                                  // managed memory
        case 89: *value = 0; break;                                  // concurrent managed access
        case 95: *value = 1; break;                                  // cooperative launch
        case 97: *value = (int)model.shared_block; break;            // shared memory per block, opting in
        case 106: *value = 32; break;                                // blocks per multiprocessor
        case 111: *value = 1024; break;                              // shared memory the system keeps per block
        case 115: *value = 0; break;                                 // memory pools
        default: return complain(INVALID_VALUE, "cuDeviceGetAttribute: attribute %d is not modelled", attribute);
    }
    return SUCCESS;
}
CUDA cuDeviceCanAccessPeer(int* can, int device, int peer) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDeviceCanAccessPeer")) return r;
    if (Result r = check_device(peer, "cuDeviceCanAccessPeer")) return r;
    *can = device != peer;
    return SUCCESS;
}

// ---- Contexts -------------------------------------------------------------------------------------------------------------------

CUDA cuDevicePrimaryCtxRetain(void** context, int device) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDevicePrimaryCtxRetain")) return r;
    Context& c = *driver.contexts[(size_t)device];
    c.retained++;
    if (!c.legacy) c.legacy = new Stream{make_queue(device, "default stream"), device, false, true, 0, nullptr, {}};
    *context = &c;
    return SUCCESS;
}
CUDA cuDevicePrimaryCtxRelease_v2(int device) {
    Lock lock(driver.mutex);
    if (!driver.pid || device < 0 || (size_t)device >= driver.contexts.size()) return INVALID_DEVICE;
    Context& c = *driver.contexts[(size_t)device];
    if (!c.retained) return complain(INVALID_CONTEXT, "cuDevicePrimaryCtxRelease: device %d is not retained", device);
    c.retained--;
    return SUCCESS;
}
CUDA cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    Lock lock(driver.mutex);
    if (Result r = check_device(device, "cuDevicePrimaryCtxGetState")) return r;
    *flags = 0;
    *active = driver.contexts[(size_t)device]->retained > 0;
    return SUCCESS;
}
static Result check_context(void* context, const char* call) {
    if (!driver.pid || on_device_thread) return enter();
    for (auto& c : driver.contexts)
        if (c.get() == context) return c->retained ? SUCCESS : complain(INVALID_CONTEXT, "%s: the context was released", call);
    return complain(INVALID_CONTEXT, "%s: %p is not a context", call, context);
}
CUDA cuCtxPushCurrent_v2(void* context) {
    Lock lock(driver.mutex);
    if (Result r = check_context(context, "cuCtxPushCurrent")) return r;
    stack.push_back((Context*)context);
    return SUCCESS;
}
CUDA cuCtxPopCurrent_v2(void** context) {
    if (stack.empty()) return INVALID_CONTEXT;
    if (context) *context = stack.back();
    stack.pop_back();
    return SUCCESS;
}
CUDA cuCtxGetCurrent(void** context) {
    *context = stack.empty() ? nullptr : stack.back();
    return SUCCESS;
}
CUDA cuCtxSetCurrent(void* context) {
    Lock lock(driver.mutex);
    if (context)
        if (Result r = check_context(context, "cuCtxSetCurrent")) return r;
    if (!stack.empty()) stack.pop_back();
    if (context) stack.push_back((Context*)context);
    return SUCCESS;
}
CUDA cuCtxGetDevice(int* device) {
    Lock lock(driver.mutex);
    Context* c;
    if (Result r = enter(c)) return r;
    *device = c->device;
    return SUCCESS;
}
CUDA cuCtxSynchronize() {
    Lock lock(driver.mutex);
    Context* c;
    if (Result r = enter(c)) return r;
    if (Result r = forbidden_in_capture("cuCtxSynchronize")) return r;
    if (Result r = wait_host(lock, all_work(c->device), "cuCtxSynchronize")) return r;
    order_host_device(c->device);
    return sticky(c->device);
}
CUDA cuCtxEnablePeerAccess(void* peer, unsigned flags) {
    Lock lock(driver.mutex);
    Context* c;
    if (Result r = enter(c)) return r;
    if (Result r = check_context(peer, "cuCtxEnablePeerAccess")) return r;
    if (flags) return INVALID_VALUE;
    if (peer == c) return complain(INVALID_DEVICE, "cuCtxEnablePeerAccess of the device itself");
    return c->peers.insert(((Context*)peer)->device).second ? SUCCESS : PEER_ACCESS_ALREADY_ENABLED;
}

// ---- Memory ---------------------------------------------------------------------------------------------------------------------
// Device memory has addresses that no one can dereference; its bytes lie elsewhere. Addresses are not used again.

static const char* const MEMORY_KINDS[] = {"device memory", "pinned host memory"};

static Result allocate(uint64_t* out, size_t bytes, bool pinned, const char* call) {
    Lock lock(driver.mutex);
    Context* c;
    if (Result r = enter(c)) return r;
    if (!out || !bytes) return complain(INVALID_VALUE, "%s: no bytes or nowhere to return the address", call);
    if (Result r = forbidden_in_capture(call)) return r;
    if (!pinned && c->used + bytes > memory_bytes)
        return complain(OUT_OF_MEMORY, "%s: %zu bytes, %llu of %llu are in use", call, bytes, (unsigned long long)c->used, (unsigned long long)memory_bytes);
    const size_t page = 4096, mapped = (bytes + page - 1) / page * page;
    // Pinned memory has a page on either side that cannot be touched; device memory is checked access by access.
    char* host = (char*)mmap(nullptr, mapped + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (host == (char*)MAP_FAILED || mprotect(host + page, mapped, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    host += page;
    memset(host, 0xff, bytes);  // a NaN in every type
    uint64_t address = (uint64_t)host;
    if (!pinned) {
        address = reserved_next;
        reserved_next += mapped + page;
        if (reserved_next > reserved_begin + RESERVED) return complain(OUT_OF_MEMORY, "%s: addresses are used up", call);
        c->used += bytes;
    }
    const std::string name = std::string(MEMORY_KINDS[pinned]) + " #" + std::to_string(++driver.statistics.allocations) + " of device " +
                             std::to_string(c->device) + ", " + std::to_string(bytes) + " bytes";
    driver.allocations[address] = Allocation{address, bytes, host, c->device, pinned, name};
    driver.statistics.live_bytes += bytes;
    softgpu::register_memory((const void*)address, bytes, name.c_str(), host - (char*)address, pinned ? -1 : c->device);
    *out = address;
    return SUCCESS;
}
static Result release(uint64_t address, bool pinned, const char* call) {
    Lock lock(driver.mutex);
    if (!address) return SUCCESS;
    if (on_device_thread || !driver.pid || getpid() != driver.pid) return enter();
    auto i = driver.allocations.find(address);
    if (i == driver.allocations.end() || i->second.pinned != pinned)
        return complain(INVALID_VALUE, "%s: %#llx is not the begin of live %s", call, (unsigned long long)address, MEMORY_KINDS[pinned]);
    if (Result r = forbidden_in_capture(call)) return r;
    const Allocation a = i->second;
    // Not for the work that is enqueued, only for what is in the middle of it: work that still uses the memory will fail.
    wait_not_executing(lock);
    driver.allocations.erase(address);
    softgpu::unregister_memory((const void*)address);
    forget_memory(address, a.bytes);
    driver.statistics.live_bytes -= a.bytes;
    if (!pinned) driver.contexts[(size_t)a.device]->used -= a.bytes;
    const size_t page = 4096, mapped = (a.bytes + page - 1) / page * page;
    // Freed pinned memory cannot be touched any more either.
    if (pinned)
        mmap(a.host, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    else
        munmap(a.host - page, mapped + 2 * page);
    return SUCCESS;
}
CUDA cuMemAlloc_v2(uint64_t* address, size_t bytes) { return allocate(address, bytes, false, "cuMemAlloc"); }
CUDA cuMemFree_v2(uint64_t address) { return release(address, false, "cuMemFree"); }
CUDA cuMemHostAlloc(void** address, size_t bytes, unsigned) { return allocate((uint64_t*)address, bytes, true, "cuMemHostAlloc"); }
CUDA cuMemAllocHost_v2(void** address, size_t bytes) { return allocate((uint64_t*)address, bytes, true, "cuMemAllocHost"); }
CUDA cuMemFreeHost(void* address) { return release((uint64_t)address, true, "cuMemFreeHost"); }
CUDA cuMemHostGetDevicePointer_v2(uint64_t* device, void* host, unsigned) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    const Allocation* a = find_allocation((uint64_t)host);
    if (!a || !a->pinned) return complain(INVALID_VALUE, "cuMemHostGetDevicePointer: %p is not pinned memory", host);
    *device = (uint64_t)host;
    return SUCCESS;
}
CUDA cuMemGetInfo_v2(size_t* free, size_t* total) {
    Lock lock(driver.mutex);
    Context* c;
    if (Result r = enter(c)) return r;
    *total = memory_bytes;
    *free = memory_bytes - c->used;
    return SUCCESS;
}
CUDA cuMemGetAddressRange_v2(uint64_t* base, size_t* bytes, uint64_t p) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    const Allocation* a = find_allocation(p);
    if (!a) return complain(NOT_FOUND, "cuMemGetAddressRange: %#llx is not live memory", (unsigned long long)p);
    if (base) *base = a->address;
    if (bytes) *bytes = a->bytes;
    return SUCCESS;
}
CUDA cuPointerGetAttribute(void* data, int attribute, uint64_t p) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    const Allocation* a = find_allocation(p);
    if (!a) return INVALID_VALUE;  // as CUDA says for pageable memory: callers ask to find out, so no complaint
    switch (attribute) {
        case 1: *(void**)data = driver.contexts[(size_t)a->device].get(); break;
        case 2: *(unsigned*)data = a->pinned ? 1 : 2; break;  // CU_MEMORYTYPE_HOST, _DEVICE
        case 3: *(uint64_t*)data = p; break;
        case 4:
            if (!a->pinned) return INVALID_VALUE;
            *(uint64_t*)data = p;
            break;
        case 8: *(unsigned*)data = 0; break;  // managed
        case 9: *(int*)data = a->device; break;
        case 11: *(uint64_t*)data = a->address; break;
        case 12: *(size_t*)data = a->bytes; break;
        case 13: *(unsigned*)data = 1; break;  // mapped
        default: return complain(INVALID_VALUE, "cuPointerGetAttribute: attribute %d is not modelled", attribute);
    }
    return SUCCESS;
}

// ---- Modules and launches -------------------------------------------------------------------------------------------------------

CUDA cuModuleLoadData(void** module, const void* image) {
    Lock lock(driver.mutex);
    Context* c;
    if (Result r = enter(c)) return r;
    if (!module || !image) return complain(INVALID_VALUE, "cuModuleLoadData: null");
    if (Result r = forbidden_in_capture("cuModuleLoadData")) return r;
    uint32_t magic;
    memcpy(&magic, image, sizeof magic);
    const bool fatbin = magic == 0xBA55ED50u, cubin = !memcmp(image, "\177ELF", 4), ptx = !memcmp(image, "//", 2) || !memcmp(image, ".ver", 4);
    if (!fatbin && !cubin && !ptx) return complain(INVALID_IMAGE, "cuModuleLoadData: begins with %#x, which is no fat binary, cubin or PTX", magic);
    if (fatbin && (uintptr_t)image % 8) return complain(INVALID_IMAGE, "cuModuleLoadData: a fat binary at %p, which is not aligned", image);
    Module* m = new Module{c->device};
    driver.modules.insert(m);
    *module = m;
    return SUCCESS;
}
CUDA cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) { return cuModuleLoadData(module, image); }
CUDA cuModuleLoadFatBinary(void** module, const void* image) { return cuModuleLoadData(module, image); }
CUDA cuModuleUnload(void* module) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    Module* m = (Module*)module;
    if (!driver.modules.erase(m)) return complain(INVALID_HANDLE, "cuModuleUnload: %p is not a module", module);
    for (auto i = driver.functions.begin(); i != driver.functions.end();)
        if ((*i)->module == m) {
            delete *i;
            i = driver.functions.erase(i);
        } else {
            ++i;
        }
    delete m;
    return SUCCESS;
}
CUDA cuModuleGetFunction(void** function, void* module, const char* name) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    Module* m = (Module*)module;
    if (!driver.modules.count(m)) return complain(INVALID_HANDLE, "cuModuleGetFunction: %p is not a module", module);
    for (softgpu_kernel* k = softgpu_kernel::first; k; k = k->next)
        if (!strcmp(k->name, name)) {
            for (Function* f : driver.functions)
                if (f->kernel == k && f->module == m) {
                    *function = f;
                    return SUCCESS;
                }
            Function* f = new Function{k, m, 49152};
            driver.functions.insert(f);
            *function = f;
            return SUCCESS;
        }
    return complain(NOT_FOUND, "cuModuleGetFunction: no kernel %s is compiled into the software GPU", name);
}
static Result find_function(void* handle, Function*& f) {
    if (Result r = enter()) return r;
    f = (Function*)handle;
    return driver.functions.count(f) ? SUCCESS : complain(INVALID_HANDLE, "%p is not a function", handle);
}
CUDA cuFuncSetAttribute(void* function, int attribute, int value) {
    Lock lock(driver.mutex);
    Function* f;
    if (Result r = find_function(function, f)) return r;
    if (attribute == 9) return SUCCESS;  // preferred carve-out
    if (attribute != 8) return complain(INVALID_VALUE, "cuFuncSetAttribute: attribute %d is not modelled", attribute);
    if (value < 0 || (uint32_t)value > model.shared_block)
        return complain(INVALID_VALUE, "cuFuncSetAttribute: %s with %d bytes of shared memory, the device has %u", f->kernel->name, value, model.shared_block);
    f->max_shared = (uint32_t)value;
    return SUCCESS;
}
CUDA cuFuncGetAttribute(int* value, int attribute, void* function) {
    Lock lock(driver.mutex);
    Function* f;
    if (Result r = find_function(function, f)) return r;
    switch (attribute) {
        case 0: *value = (int)f->kernel->max_threads; break;
        case 1: case 2: case 3: *value = 0; break;  // static shared, constant, local memory
        case 4: *value = 128; break;                // registers
        case 5: case 6: *value = model.major * 10 + model.minor; break;
        case 8: *value = (int)f->max_shared; break;
        default: return complain(INVALID_VALUE, "cuFuncGetAttribute: attribute %d is not modelled", attribute);
    }
    return SUCCESS;
}
CUDA cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads, size_t shared) {
    Lock lock(driver.mutex);
    Function* f;
    if (Result r = find_function(function, f)) return r;
    if (threads <= 0 || (uint32_t)threads > f->kernel->max_threads || shared > f->max_shared) {
        *blocks = 0;
        return SUCCESS;
    }
    const int by_threads = 2048 / threads, by_shared = (int)(model.shared_multiprocessor / (shared + 1024));
    *blocks = by_threads < by_shared ? by_threads : by_shared;
    return SUCCESS;
}
CUDA cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                    void** extra) {
    Lock lock(driver.mutex);
    Function* f;
    Stream* s;
    if (Result r = find_function(function, f)) return r;
    if (Result r = find_stream(stream, s)) return r;
    const softgpu_kernel* k = f->kernel;
    if (f->module->device != s->device)
        return complain(INVALID_HANDLE, "cuLaunchKernel: %s was loaded on device %d, the stream is of device %d", k->name, f->module->device, s->device);
    const uint64_t threads = (uint64_t)bx * by * bz;
    if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || !threads || threads > k->max_threads)
        return complain(INVALID_VALUE, "cuLaunchKernel: %s with grid %u×%u×%u of blocks of %llu threads; its launch bounds allow %u", k->name, gx, gy, gz,
                        (unsigned long long)threads, k->max_threads);
    if (shared > f->max_shared)
        return complain(INVALID_VALUE, "cuLaunchKernel: %s with %u bytes of shared memory, %u are set", k->name, shared, f->max_shared);
    if (extra || !params || !params[0]) return complain(INVALID_VALUE, "cuLaunchKernel: %s needs its parameters by pointer", k->name);
    auto copy = std::make_shared<std::vector<uint64_t>>((k->params_bytes + 7) / 8);
    memcpy(copy->data(), params[0], k->params_bytes);
    ActionPtr action = std::make_shared<Action>();
    action->name = k->name;
    action->count = &driver.statistics.kernels;
    const dim3 grid(gx, gy, gz), block(bx, by, bz);
    const Context* const context = driver.contexts[(size_t)s->device].get();
    action->execute = [=](uint64_t run, std::string& why) -> int {
        softgpu::Options options;
        options.accesses = recording;
        {
            Lock lock(driver.mutex);
            options.devices = 1ull << context->device % 64;
            for (int peer : context->peers) options.devices |= 1ull << peer % 64;
        }
        options.name = k->name;
        options.seed = mix64(driver.seed ^ mix64(run));
        // What the launch was given, from here and not where it was copied to: a kernel does not write its parameters.
        try {
            softgpu::run(k->call, copy->data(), k->function, grid, block, shared, options);
        } catch (const softgpu::error& e) {
            why = e.what();
            return -ILLEGAL_ADDRESS;
        }
        return SOFTGPU_DONE;
    };
    return enqueue(*s, action);
}

// ---- Errors ---------------------------------------------------------------------------------------------------------------------

static const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", "peer access is not supported between these two devices"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED", "peer access is already enabled"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {902, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD", "attempt to terminate a thread-local capture sequence from another thread"},
};
CUDA cuGetErrorName(int code, const char** text) {
    for (const auto& e : ERRORS)
        if (e.code == code) {
            *text = e.name;
            return SUCCESS;
        }
    *text = nullptr;
    return INVALID_VALUE;
}
CUDA cuGetErrorString(int code, const char** text) {
    for (const auto& e : ERRORS)
        if (e.code == code) {
            *text = e.text;
            return SUCCESS;
        }
    *text = nullptr;
    return INVALID_VALUE;
}

// ---- Beyond CUDA ----------------------------------------------------------------------------------------------------------------

extern "C" void* softgpu_resolve(uint64_t p, size_t bytes) { return softgpu::resolve((const void*)p, bytes); }
extern "C" uint64_t softgpu_seed(void) { return number("SOFTGPU_SEED", 1); }
extern "C" void softgpu_get_statistics(softgpu_statistics* statistics) {
    Lock lock(driver.mutex);
    driver.statistics.live_streams = driver.streams.size();
    driver.statistics.live_events = driver.events.size();
    *statistics = driver.statistics;
}
