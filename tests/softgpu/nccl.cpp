// The stand-in for libnccl.so.2 on the software GPU: the functions that this project calls, with NCCL's rules made strict. Links libcuda.so.1,
// the software GPU's.
//
//   SOFTNCCL_DUPLICATE=1   two ranks on one device are refused, as NCCL before 2.30 does
//   SOFTNCCL_REMOTE=1      a peer that aborts or dies is reported (ncclRemoteError); else its peers hang, which NCCL allows itself as well
//   SOFTNCCL_VERSION       what ncclGetVersion says, 22907 if unset
//   NCCL_DEBUG             errors are printed to stderr
//   SOFTGPU_FAULT=KIND:N   the N-th call (from 1) of this kind on rank SOFTNCCL_FAULT_RANK (0 if unset) goes wrong:
//     nccl_drop_group_end  the end of a group is lost
//     nccl_swap_groups     a group is enqueued after the next one
//     nccl_size            a send or receive is one byte shorter
//     nccl_drop_send       a send is lost
//     nccl_second_stream   a group goes to another stream
//     nccl_async_error     an asynchronous error, seen at this question for one
//   SOFTGPU_FAULT=count    how many calls there were of each kind, at the end of the process
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <signal.h>
#include <stdarg.h>

#include <algorithm>
#include <random>
#include <thread>

#include "nccl_comm.h"
#include "softgpu.h"

extern "C" {
int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority);
int cuStreamIsCapturing(void* stream, int* status);
}

using namespace softnccl;

namespace {

typedef struct {
    char internal[128];
} ncclUniqueId;
// ncclConfig_t up to what is read here.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
};
const int UNSET = (int)0x80000000;
const double OPEN_LIMIT = 1;      // seconds that a group may be open
const double BLOCKING_LIMIT = 60; // seconds that a blocking call may take

// ---- Errors -------------------------------------------------------------------------------------------------------------------

std::mutex registry_mutex;
std::map<void*, CommPtr> registry;
std::string last_error;  // of calls without a communicator

Code refuse(Comm* comm, Code code, const char* format, ...) __attribute__((format(printf, 3, 4)));
Code refuse(Comm* comm, Code code, const char* format, ...) {
    char text[600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (getenv("NCCL_DEBUG")) fprintf(stderr, "softnccl: %s\n", text);
    std::lock_guard<std::mutex> lock(registry_mutex);
    last_error = text;
    if (comm) comm->last = text;
    return code;
}

// What no library may ever do to NCCL: not an error that somebody might handle.
void forbidden(const Comm& comm, const char* what) {
    fprintf(stderr, "softnccl: rank %d of %d: %s\n", comm.rank, comm.size, what);
    abort();
}

CommPtr find(void* handle) {
    std::lock_guard<std::mutex> lock(registry_mutex);
    const auto it = registry.find(handle);
    return it == registry.end() ? nullptr : it->second;
}

// A call that is in a communicator: none may be while another thread is.
struct Inside {
    Comm& comm;
    Inside(Comm& c, const char* call) : comm(c) {
        if (comm.inside++ > 0 && !comm.blocking) forbidden(comm, (std::string(call) + " while another thread is in the communicator").c_str());
    }
    ~Inside() { comm.inside--; }
};

// ---- Faults -------------------------------------------------------------------------------------------------------------------

const char* const FAULTS[] = {"nccl_drop_group_end", "nccl_swap_groups", "nccl_size", "nccl_drop_send", "nccl_second_stream", "nccl_async_error"};
struct Faults {
    std::mutex mutex;
    bool count = false;
    std::string kind;
    uint64_t which = 0;
    long rank = 0;
    std::map<std::string, uint64_t> seen;
    Faults() {
        const char* s = getenv("SOFTGPU_FAULT");
        rank = number("SOFTNCCL_FAULT_RANK", 0);
        if (!s || !*s) return;
        count = !strcmp(s, "count");
        const char* colon = strchr(s, ':');
        if (!colon || strncmp(s, "nccl_", 5)) return;
        kind.assign(s, colon);
        which = strtoull(colon + 1, nullptr, 10);
        const bool known = std::any_of(std::begin(FAULTS), std::end(FAULTS), [&](const char* f) { return kind == f; });
        if (known && which) return;
        fprintf(stderr, "softnccl: SOFTGPU_FAULT=%s: not one of", s);
        for (const char* f : FAULTS) fprintf(stderr, " %s:N", f);
        fprintf(stderr, ", N from 1\n");
        abort();
    }
    ~Faults() {
        if (!count) return;
        fprintf(stderr, "softnccl: counts");
        for (const char* f : FAULTS) fprintf(stderr, " %s=%llu", f, (unsigned long long)seen[f]);
        fprintf(stderr, "\n");
    }
} faults;

bool fault(const char* f, const Comm& comm) {
    if (comm.rank != faults.rank) return false;
    std::lock_guard<std::mutex> lock(faults.mutex);
    const uint64_t n = ++faults.seen[f];
    if (faults.kind != f || n != faults.which) return false;
    fprintf(stderr, "softgpu: fault %s:%llu\n", f, (unsigned long long)n);
    return true;
}

// ---- Communicators ------------------------------------------------------------------------------------------------------------

// Waits for the other ranks, until all are there or the communicator is aborted.
void join(const CommPtr& comm, double seconds) {
    Comm& c = *comm;
    const double until = now() + seconds;
    while (!c.segment.complete()) {
        if (c.aborted) return;
        if (now() > until) {
            std::lock_guard<std::mutex> lock(c.mutex);
            return c.fail(SYSTEM_ERROR, "not all ranks came");
        }
        usleep(200);
    }
    usleep((unsigned)(mix(softgpu_seed() + (uint64_t)c.rank) % 3000));
    std::lock_guard<std::mutex> lock(c.mutex);
    for (int i = 0; number("SOFTNCCL_DUPLICATE", 0) && i < c.size; i++)
        for (int j = 0; j < i; j++)
            if (c.segment.seat(i).device == c.segment.seat(j).device)
                c.fail(INVALID_USAGE, "Duplicate GPU detected : rank " + std::to_string(i) + " and rank " + std::to_string(j) +
                                          " both on CUDA device " + std::to_string(c.segment.seat(i).device));
    c.phase = Phase::READY;
}

Code init(void** handle, int size, const ncclUniqueId& id, int rank, const Config* config) {
    if (!handle) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommInitRank: the communicator's place is NULL");
    *handle = nullptr;
    if (size < 1 || rank < 0 || rank >= size)
        return refuse(nullptr, INVALID_ARGUMENT, "ncclCommInitRank: got rank %d of %d", rank, size);
    uint64_t key;
    memcpy(&key, id.internal + 8, sizeof key);
    if (memcmp(id.internal, "softnccl", 8)) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommInitRank: not a unique id");
    const int device = softgpu_stream_device(nullptr);
    if (device < 0) return refuse(nullptr, UNHANDLED_CUDA_ERROR, "Cuda failure: no device is current");
    CommPtr comm = std::make_shared<Comm>(rank, size, device);
    if (config) {
        if (config->magic != 0xcafebeef || config->size < sizeof(Config))
            return refuse(nullptr, INVALID_ARGUMENT, "ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER");
        for (int n : {config->min_ctas, config->max_ctas})
            if (n != UNSET && n <= 0) return refuse(nullptr, INVALID_ARGUMENT, "Invalid config min/maxCTAs attribute value %d", n);
        comm->blocking = config->blocking != 0;
    }
    const std::string error = comm->segment.open(key, rank, size, device);
    if (!error.empty()) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommInitRank: %s", error.c_str());
    if (comm->blocking) {
        join(comm, BLOCKING_LIMIT);
        if (comm->code) {
            comm->segment.leave(ABORTED);
            return refuse(nullptr, (Code)comm->code, "%s", comm->why.c_str());
        }
    } else {
        std::thread([comm] { join(comm, 1e9); }).detach();
    }
    *handle = comm.get();
    std::lock_guard<std::mutex> lock(registry_mutex);
    registry[comm.get()] = comm;
    return comm->blocking ? SUCCESS : IN_PROGRESS;
}

void connect_first(Comm& c, const std::vector<Transfer>& transfers) {
    for (const Transfer& t : transfers) c.connected[t.peer] = true;
}

// Puts what waits onto its streams. Without the communicator's mutex, which an operation that is polled takes.
Code flush(Comm& c, std::vector<Operation*> operations) {
    for (Operation* o : operations) {
        const int result = o->enqueue();
        if (result == 0) continue;
        std::lock_guard<std::mutex> lock(c.mutex);
        if (!o->captured) c.pending--;
        delete o;
        c.fail(UNHANDLED_CUDA_ERROR, "Cuda failure " + std::to_string(result) + " where a group was enqueued");
        return UNHANDLED_CUDA_ERROR;
    }
    return SUCCESS;
}

// The state that ncclCommGetAsyncError tells; each question brings a non-blocking communicator further.
int ask(Comm& c) {
    std::vector<Operation*> ready;
    {
        std::lock_guard<std::mutex> lock(c.mutex);
        if (c.error()) return c.code;
        if (c.open_since > 0 && now() > c.open_since + OPEN_LIMIT)
            c.fail(INVALID_USAGE, "a group has been open for over a second: is its ncclGroupEnd missing?");
        if (number("SOFTNCCL_REMOTE", 0) && c.phase == Phase::READY && c.pending > 0)
            for (int r = 0; r < c.size; r++) {
                const Seat& seat = c.segment.seat(r);
                if (seat.presence == ABORTED || (seat.presence == HERE && kill(seat.pid, 0) != 0))
                    c.fail(REMOTE_ERROR, "remote process exited or there was a network error: rank " + std::to_string(r));
            }
        if (c.code) return c.code;
        if (c.phase == Phase::JOINING) return IN_PROGRESS;
        if (c.phase == Phase::FINALIZING) {
            if (c.pending) return IN_PROGRESS;
            c.segment.seat(c.rank).presence = FINALIZED;
            for (int r = 0; r < c.size; r++)
                if (c.segment.seat(r).presence == HERE) return IN_PROGRESS;
            c.phase = Phase::FINALIZED;
        }
        if (c.phase != Phase::ENQUEUING) return SUCCESS;
        if (c.lag-- > 0) return IN_PROGRESS;
        ready.assign(c.deferred.begin(), c.deferred.end());
        c.deferred.clear();
    }
    const Code code = flush(c, ready);
    std::lock_guard<std::mutex> lock(c.mutex);
    c.phase = Phase::READY;
    return code;
}

// A communicator that takes messages: not joining, not finalized, not failed.
Code ensure_ready(Comm& c, const char* call) {
    std::lock_guard<std::mutex> lock(c.mutex);
    if (int code = c.error()) return (Code)code;
    if (c.phase == Phase::JOINING || c.phase == Phase::ENQUEUING)
        return refuse(&c, INVALID_ARGUMENT, "%s: the communicator is still in progress with another call", call);
    if (c.phase != Phase::READY) return refuse(&c, INVALID_USAGE, "%s: the communicator is finalized", call);
    return SUCCESS;
}

// ---- Groups -------------------------------------------------------------------------------------------------------------------

struct Part {
    CommPtr comm;
    Operation* operation;
};
struct Group {
    int depth = 0;
    Code code = SUCCESS;
    std::vector<Part> parts;  // one per communicator
} thread_local group;

Operation* held = nullptr;  // by nccl_swap_groups

Code end_group() {
    std::vector<Part> parts;
    parts.swap(group.parts);
    const Code bad = group.code;
    group.code = SUCCESS;
    Code answer = SUCCESS;
    for (Part& part : parts) {
        Comm& c = *part.comm;
        Inside inside(c, "ncclGroupEnd");
        {
            std::lock_guard<std::mutex> lock(c.mutex);
            c.open_since = 0;
        }
        std::vector<Operation*> operations = {part.operation};
        if (bad) {
            delete part.operation;
            continue;
        }
        if (fault("nccl_second_stream", c)) {
            void* other = nullptr;
            if (cuStreamCreateWithPriority(&other, 1, 0) == 0) part.operation->stream = other;
        }
        if (fault("nccl_swap_groups", c)) {
            held = part.operation;
            continue;
        }
        if (held && held->comm.get() == &c) operations.push_back(held), held = nullptr;
        bool later = false;
        {
            std::lock_guard<std::mutex> lock(c.mutex);
            for (Operation* o : operations) {
                int capturing = 0;
                cuStreamIsCapturing(o->stream, &capturing);
                o->captured = capturing != 0;
                if (!o->captured) c.pending++;
                o->number = c.groups++;
                connect_first(c, o->sends);
                connect_first(c, o->recvs);
            }
            later = !c.blocking && c.random.below(4);
            if (later) {
                c.deferred.assign(operations.begin(), operations.end());
                c.lag = (int)c.random.below(4);
                c.phase = Phase::ENQUEUING;
            }
        }
        const Code code = later ? IN_PROGRESS : flush(c, operations);
        if (code != SUCCESS) answer = code;
    }
    return bad ? bad : answer;
}

// One send or receive: into the open group, or a group of its own.
Code transfer(bool is_send, uint64_t address, size_t count, int type, int peer, void* handle, void* stream) {
    const char* call = is_send ? "ncclSend" : "ncclRecv";
    const auto bad = [](Code code) { return group.depth ? group.code = code : code; };
    CommPtr comm = find(handle);
    if (!comm) return bad(refuse(nullptr, INVALID_ARGUMENT, "%s: not a communicator that lives", call));
    Comm& c = *comm;
    Inside inside(c, call);
    if (Code code = ensure_ready(c, call)) return bad(code);
    if (peer < 0 || peer >= c.size) return bad(refuse(&c, INVALID_ARGUMENT, "%s: got peer %d, allowed 0 to %d", call, peer, c.size - 1));
    if (!type_bytes(type)) return bad(refuse(&c, INVALID_ARGUMENT, "%s: got type %d", call, type));
    if (softgpu_stream_device(stream) != c.device)
        return bad(refuse(&c, INVALID_ARGUMENT, "%s: the stream is not one of the communicator's device %d", call, c.device));
    uint64_t bytes = count * type_bytes(type);
    if (bytes && !softgpu_resolve(address, bytes))
        return bad(refuse(&c, INVALID_ARGUMENT, "%s: %llu bytes at 0x%llx are not in one allocation", call, (unsigned long long)bytes, (unsigned long long)address));
    if (fault("nccl_size", c) && bytes) bytes--;
    if (is_send && fault("nccl_drop_send", c)) return SUCCESS;

    auto part = std::find_if(group.parts.begin(), group.parts.end(), [&](const Part& p) { return p.comm == comm; });
    if (part == group.parts.end()) {
        Operation* o = new Operation;
        o->comm = comm;
        o->stream = stream;
        group.parts.push_back({comm, o});
        part = group.parts.end() - 1;
        std::lock_guard<std::mutex> lock(c.mutex);
        c.open_since = now();
    }
    Operation& o = *part->operation;
    if (o.stream != stream) return bad(refuse(&c, INVALID_USAGE, "%s: a second stream in one group", call));
    (is_send ? o.sends : o.recvs).push_back({peer, address, bytes, type});
    return SUCCESS;
}

}  // namespace

// ---- NCCL's functions -----------------------------------------------------------------------------------------------------------

#define API extern "C" SOFTGPU_EXPORT

API int ncclGetVersion(int* version) {
    if (!version) return INVALID_ARGUMENT;
    *version = (int)number("SOFTNCCL_VERSION", 22907);
    return SUCCESS;
}

API int ncclGetUniqueId(ncclUniqueId* id) {
    if (!id) return INVALID_ARGUMENT;
    memset(id, 0, sizeof *id);
    std::random_device random;
    const uint64_t key = (uint64_t)random() << 32 | random();
    memcpy(id->internal, "softnccl", 8);
    memcpy(id->internal + 8, &key, sizeof key);
    return SUCCESS;
}

API int ncclCommInitRank(void** comm, int size, ncclUniqueId id, int rank) { return init(comm, size, id, rank, nullptr); }
API int ncclCommInitRankConfig(void** comm, int size, ncclUniqueId id, int rank, const Config* config) {
    return init(comm, size, id, rank, config);
}

namespace {
int tell(void* handle, int* to, int Comm::*field, const char* call) {
    CommPtr comm = find(handle);
    if (!comm || !to) return refuse(nullptr, INVALID_ARGUMENT, "%s: not a communicator that lives", call);
    if (Code code = ensure_ready(*comm, call)) return code;
    *to = (*comm).*field;
    return SUCCESS;
}
}  // namespace
API int ncclCommCount(void* comm, int* count) { return tell(comm, count, &Comm::size, "ncclCommCount"); }
API int ncclCommUserRank(void* comm, int* rank) { return tell(comm, rank, &Comm::rank, "ncclCommUserRank"); }
API int ncclCommCuDevice(void* comm, int* device) { return tell(comm, device, &Comm::device, "ncclCommCuDevice"); }

API int ncclCommGetAsyncError(void* handle, int* state) {
    CommPtr comm = find(handle);
    if (!comm || !state) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommGetAsyncError: not a communicator that lives");
    Inside inside(*comm, "ncclCommGetAsyncError");
    if (fault("nccl_async_error", *comm)) {
        std::lock_guard<std::mutex> lock(comm->mutex);
        comm->fail(UNHANDLED_CUDA_ERROR, "a planted asynchronous error");
    }
    *state = ask(*comm);
    return SUCCESS;
}

API int ncclCommFinalize(void* handle) {
    CommPtr comm = find(handle);
    if (!comm) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommFinalize: not a communicator that lives");
    Inside inside(*comm, "ncclCommFinalize");
    if (Code code = ensure_ready(*comm, "ncclCommFinalize")) return code;
    {
        std::lock_guard<std::mutex> lock(comm->mutex);
        comm->phase = Phase::FINALIZING;
    }
    int state = ask(*comm);
    for (const double until = now() + BLOCKING_LIMIT; comm->blocking && state == IN_PROGRESS && now() < until; state = ask(*comm)) usleep(200);
    return state;
}

namespace {
// The end of a communicator. Its operations on streams, if any, end without having moved anything.
void end(const CommPtr& comm, Presence how) {
    {
        std::lock_guard<std::mutex> lock(registry_mutex);
        registry.erase(comm.get());
    }
    comm->aborted = true;
    comm->segment.leave(how);
    {
        std::lock_guard<std::mutex> lock(comm->mutex);
        for (Operation* o : comm->deferred) delete o;
        comm->deferred.clear();
    }
    softgpu_wake();
}
}  // namespace

API int ncclCommDestroy(void* handle) {
    CommPtr comm = find(handle);
    if (!comm) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommDestroy: not a communicator that lives");
    if (comm->phase != Phase::FINALIZED) {
        const int code = ncclCommFinalize(handle);
        int state = code;
        for (const double until = now() + BLOCKING_LIMIT; state == IN_PROGRESS && now() < until; state = ask(*comm)) usleep(200);
        if (state != SUCCESS) fprintf(stderr, "softnccl: rank %d of %d: ncclCommDestroy of a communicator that was not through\n", comm->rank, comm->size);
    }
    end(comm, GONE);
    return SUCCESS;
}

API int ncclCommAbort(void* handle) {
    CommPtr comm = find(handle);
    if (!comm) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommAbort: not a communicator that lives");
    Inside inside(*comm, "ncclCommAbort");
    end(comm, ABORTED);
    return SUCCESS;
}

API int ncclGroupStart(void) {
    group.depth++;
    return SUCCESS;
}

API int ncclGroupEnd(void) {
    if (group.depth == 0) return refuse(nullptr, INVALID_USAGE, "ncclGroupEnd: not in a group call.");
    if (group.depth == 1 && !group.parts.empty() && fault("nccl_drop_group_end", *group.parts[0].comm)) return SUCCESS;
    return --group.depth ? SUCCESS : end_group();
}

namespace {
Code alone(bool is_send, uint64_t address, size_t count, int type, int peer, void* comm, void* stream) {
    const Code code = transfer(is_send, address, count, type, peer, comm, stream);
    return code || group.depth ? code : end_group();
}
}  // namespace
API int ncclSend(const void* from, size_t count, int type, int peer, void* comm, void* stream) {
    return alone(true, (uint64_t)from, count, type, peer, comm, stream);
}
API int ncclRecv(void* to, size_t count, int type, int peer, void* comm, void* stream) {
    return alone(false, (uint64_t)to, count, type, peer, comm, stream);
}

// A connection is taken to be 1 MiB of the device, made at the first message with a peer.
API int ncclCommMemStats(void* handle, int which, uint64_t* bytes) {
    CommPtr comm = find(handle);
    if (!comm || !bytes || which < 0 || which > 3) return refuse(nullptr, INVALID_ARGUMENT, "ncclCommMemStats: wrong argument");
    Inside inside(*comm, "ncclCommMemStats");
    if (Code code = ensure_ready(*comm, "ncclCommMemStats")) return code;
    std::lock_guard<std::mutex> lock(comm->mutex);
    *bytes = (uint64_t)std::count(comm->connected.begin(), comm->connected.end(), true) << 20;
    return SUCCESS;
}

API const char* ncclGetErrorString(int code) {
    switch (code) {
        case SUCCESS: return "no error";
        case UNHANDLED_CUDA_ERROR: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
        case SYSTEM_ERROR: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
        case INTERNAL_ERROR: return "internal error - please report this issue to the NCCL developers";
        case INVALID_ARGUMENT: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
        case INVALID_USAGE: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        case IN_PROGRESS: return "NCCL operation in progress";
    }
    return "unknown result code";
}

API const char* ncclGetLastError(void* handle) {
    static thread_local std::string text;
    const CommPtr comm = find(handle);
    {
        std::lock_guard<std::mutex> lock(registry_mutex);
        text = comm ? comm->last : last_error;
    }
    if (comm) {
        std::lock_guard<std::mutex> lock(comm->mutex);
        if (comm->code) text = comm->why;
    }
    return text.c_str();
}

// For tests: an asynchronous error of this communicator.
API void softnccl_inject(void* handle, int code, const char* text) {
    if (CommPtr comm = find(handle)) {
        std::lock_guard<std::mutex> lock(comm->mutex);
        comm->fail((Code)code, text);
    }
}
