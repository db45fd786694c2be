// Streams, events, copies and host functions of the stand-in for libcuda.so.1: everything that is enqueued but kernels.
#include <stdio.h>
#include <string.h>

#include "access.h"
#include "device.h"
#include "driver.h"

using namespace softgpu::driver;

#define CUDA extern "C" SOFTGPU_EXPORT int

namespace softgpu {
namespace driver {

Result find_stream(void* handle, Stream*& stream) {
    if (handle == nullptr || handle == (void*)1) {  // CU_STREAM_LEGACY
        Context* context;
        if (Result r = enter(context)) return r;
        stream = context->legacy;
        return SUCCESS;
    }
    stream = (Stream*)handle;
    if (!driver.streams.count(stream)) return complain(INVALID_HANDLE, "%p is not a stream", handle);
    return sticky(stream->device);
}

}  // namespace driver
}  // namespace softgpu

namespace {

Result find_event(void* handle, Event*& event) {
    event = (Event*)handle;
    if (!driver.events.count(event)) return complain(INVALID_HANDLE, "%p is not an event", handle);
    return sticky(event->device);
}

// ---- Streams ------------------------------------------------------------------------------------------------------------------

Result create_stream(void** out, unsigned flags, int priority) {
    Lock lock(driver.mutex);
    Context* context;
    if (Result r = enter(context)) return r;
    if (!out || flags > 1) return complain(INVALID_VALUE, "cuStreamCreate: null or unknown flags %#x", flags);
    Stream* s = new Stream{make_queue(context->device, "stream"), context->device, !(flags & 1), false, priority, nullptr, {}};
    driver.streams.insert(s);
    *out = s;
    return SUCCESS;
}

}  // namespace

CUDA cuStreamCreate(void** stream, unsigned flags) { return create_stream(stream, flags, 0); }
CUDA cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) { return create_stream(stream, flags, priority); }
CUDA cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}
CUDA cuStreamGetPriority(void* stream, int* priority) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    *priority = s->priority;
    return SUCCESS;
}
CUDA cuStreamGetFlags(void* stream, unsigned* flags) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    *flags = !s->blocking && !s->legacy;
    return SUCCESS;
}
CUDA cuStreamGetDevice(void* stream, int* device) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    *device = s->device;
    return SUCCESS;
}
CUDA cuStreamGetCtx(void* stream, void** context) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    *context = driver.contexts[(size_t)s->device].get();
    return SUCCESS;
}
CUDA cuStreamGetId(void* stream, unsigned long long* id) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    *id = s->queue->id;
    return SUCCESS;
}
// What is enqueued is still executed.
CUDA cuStreamDestroy_v2(void* stream) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    Stream* s = (Stream*)stream;
    if (!driver.streams.count(s)) return complain(INVALID_HANDLE, "cuStreamDestroy: %p is not a stream", stream);
    if (s->capture) {
        s->capture->invalid = true;
        s->capture->streams.erase(s);
        if (s->capture->origin == s) {
            for (Stream* other : s->capture->streams) other->capture = nullptr;
            driver.captures.erase(s->capture);
        }
    }
    driver.streams.erase(s);
    delete s;
    return SUCCESS;
}
CUDA cuStreamSynchronize(void* stream) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (s->capture) {
        s->capture->invalid = true;
        return complain(CAPTURE_UNSUPPORTED, "cuStreamSynchronize of a stream that captures");
    }
    if (Result r = forbidden_in_capture("cuStreamSynchronize")) return r;
    if (fault("early_sync")) return SUCCESS;
    const int device = s->device;
    std::vector<DonePtr> all;
    if (s->legacy) {
        // The default stream's end is that of the blocking streams, too.
        for (Stream* other : driver.streams)
            if (other->blocking && other->device == device && other->queue->last) all.push_back(other->queue->last);
    }
    if (s->queue->last) all.push_back(s->queue->last);
    if (Result r = wait_host(lock, all, ("cuStreamSynchronize of " + s->queue->name).c_str())) return r;
    return sticky(device);
}
CUDA cuStreamQuery(void* stream) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (s->capture) {
        s->capture->invalid = true;
        return complain(CAPTURE_UNSUPPORTED, "cuStreamQuery of a stream that captures");
    }
    if (s->queue->last && !s->queue->last->done) return NOT_READY;
    if (s->queue->last) order_host(*s->queue->last);
    return SUCCESS;
}
CUDA cuStreamWaitEvent(void* stream, void* event, unsigned) {
    Lock lock(driver.mutex);
    Stream* s;
    Event* e;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (Result r = find_event(event, e)) return r;
    driver.statistics.waits++;
    if (fault("drop_wait")) return SUCCESS;
    bool handled = false;
    const Result r = capture_wait(*s, *e, handled);
    if (handled) return r;
    if (!e->record || (e->record->done && !driver.races)) return SUCCESS;
    return enqueue(*s, nullptr, {e->record});
}

// ---- Events -------------------------------------------------------------------------------------------------------------------

CUDA cuEventCreate(void** out, unsigned flags) {
    Lock lock(driver.mutex);
    Context* context;
    if (Result r = enter(context)) return r;
    if (!out || flags > 7) return complain(INVALID_VALUE, "cuEventCreate: null or unknown flags %#x", flags);
    Event* e = new Event{context->device, !(flags & 2), nullptr, nullptr, {}};
    driver.events.insert(e);
    *out = e;
    return SUCCESS;
}
CUDA cuEventDestroy_v2(void* event) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    Event* e = (Event*)event;
    if (!driver.events.erase(e)) return complain(INVALID_HANDLE, "cuEventDestroy: %p is not an event", event);
    delete e;
    return SUCCESS;
}
CUDA cuEventRecord(void* event, void* stream) {
    Lock lock(driver.mutex);
    Stream* s;
    Event* e;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (Result r = find_event(event, e)) return r;
    if (e->device != s->device)
        return complain(INVALID_HANDLE, "cuEventRecord: an event of device %d on a stream of device %d", e->device, s->device);
    driver.statistics.records++;
    if (fault("drop_record")) return SUCCESS;
    if (s->capture) return capture_record(*s, *e);
    DonePtr done = std::make_shared<Done>();
    done->what = "an event record on " + s->queue->name;
    if (Result r = enqueue(*s, nullptr, {}, done)) return r;
    e->record = done;
    e->capture = nullptr;
    return SUCCESS;
}
CUDA cuEventRecordWithFlags(void* event, void* stream, unsigned flags) { return flags ? NOT_SUPPORTED : cuEventRecord(event, stream); }
CUDA cuEventQuery(void* event) {
    Lock lock(driver.mutex);
    Event* e;
    if (Result r = enter()) return r;
    if (Result r = find_event(event, e)) return r;
    if (Result r = forbidden_in_capture("cuEventQuery")) return r;
    if (Result r = not_captured(*e, "cuEventQuery")) return r;
    if (e->record && !e->record->done) return fault("early_sync") ? SUCCESS : NOT_READY;
    if (e->record) order_host(*e->record);
    return SUCCESS;
}
CUDA cuEventSynchronize(void* event) {
    Lock lock(driver.mutex);
    Event* e;
    if (Result r = enter()) return r;
    if (Result r = find_event(event, e)) return r;
    if (Result r = forbidden_in_capture("cuEventSynchronize")) return r;
    if (Result r = not_captured(*e, "cuEventSynchronize")) return r;
    if (!e->record) return SUCCESS;
    if (!e->record->done && fault("early_sync")) return SUCCESS;
    const int device = e->device;
    if (Result r = wait_host(lock, {e->record}, "cuEventSynchronize")) return r;
    return sticky(device);
}
CUDA cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    Lock lock(driver.mutex);
    Event *a, *b;
    if (Result r = enter()) return r;
    if (Result r = find_event(start, a)) return r;
    if (Result r = find_event(end, b)) return r;
    if (Result r = not_captured(*a, "cuEventElapsedTime")) return r;
    if (Result r = not_captured(*b, "cuEventElapsedTime")) return r;
    if (!a->timing || !b->timing || !a->record || !b->record)
        return complain(INVALID_HANDLE, "cuEventElapsedTime: an event without timing, or never recorded");
    if (!a->record->done || !b->record->done) return NOT_READY;
    *milliseconds = (float)((b->record->time - a->record->time) * 1e3);
    return SUCCESS;
}
CUDA cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) { return cuEventElapsedTime(milliseconds, start, end); }

// ---- Copies -------------------------------------------------------------------------------------------------------------------

namespace {

enum Side { DEVICE_SIDE, PINNED_SIDE, PAGEABLE_SIDE };

// What the pointer is; device memory must be live and large enough.
Result classify(uint64_t p, size_t bytes, const char* call, Side& side) {
    const Allocation* a = find_allocation(p);
    if (!a) {
        // In the reserved addresses, or a host pointer.
        if (is_device_address(p)) return complain(INVALID_VALUE, "%s: %#llx is device memory that is not live", call, (unsigned long long)p);
        side = PAGEABLE_SIDE;
        return SUCCESS;
    }
    if (p + bytes > a->address + a->bytes)
        return complain(INVALID_VALUE, "%s: %zu bytes at %#llx reach past the end of %s", call, bytes, (unsigned long long)p, a->name.c_str());
    side = a->pinned ? PINNED_SIDE : DEVICE_SIDE;
    return SUCCESS;
}

// The operation touches this.
void note(uint64_t p, size_t bytes, bool write) {
    if (recording && bytes) recording->add(p, bytes, write);
}

// The bytes of a pointer when the operation is executed.
char* at(uint64_t p, size_t bytes, Side side, std::string& why) {
    if (side == PAGEABLE_SIDE) return (char*)p;
    char* host = (char*)softgpu::resolve((const void*)p, bytes);
    if (!host) {
        char text[128];
        snprintf(text, sizeof text, "%zu bytes at %#llx are not (any more) live memory", bytes, (unsigned long long)p);
        why = text;
    }
    return host;
}

// The lock is held.
Result copy(Lock& lock, uint64_t to, uint64_t from, size_t bytes, void* stream, bool wait, const char* call) {
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (bytes == 0) return SUCCESS;
    Side to_side, from_side;
    if (Result r = classify(to, bytes, call, to_side)) return r;
    if (Result r = classify(from, bytes, call, from_side)) return r;
    if (wait)
        if (Result r = forbidden_in_capture(call)) return r;
    if (fault("drop_copy")) return SUCCESS;
    ActionPtr action = std::make_shared<Action>();
    char text[160];
    snprintf(text, sizeof text, "%s of %zu bytes %#llx -> %#llx", call, bytes, (unsigned long long)from, (unsigned long long)to);
    action->name = text;
    action->count = &driver.statistics.copies;
    // Pageable memory is read when the copy is asked for, pinned memory when it is executed.
    std::shared_ptr<std::vector<char>> taken;
    if (from_side == PAGEABLE_SIDE && !s->capture) taken = std::make_shared<std::vector<char>>((const char*)from, (const char*)from + bytes);
    action->execute = [=](uint64_t, std::string& why) -> int {
        note(to, bytes, true);
        if (!taken) note(from, bytes, false);
        char* d = at(to, bytes, to_side, why);
        const char* f = taken ? taken->data() : at(from, bytes, from_side, why);
        if (!d || !f) return -ILLEGAL_ADDRESS;
        memmove(d, f, bytes);
        return SOFTGPU_DONE;
    };
    if (Result r = enqueue(*s, action)) return r;
    if (s->capture || (!wait && to_side != PAGEABLE_SIDE)) return SUCCESS;
    const int device = s->device;
    if (Result r = wait_host(lock, {s->queue->last}, call)) return r;
    return sticky(device);
}
Result copy_call(uint64_t to, uint64_t from, size_t bytes, void* stream, bool wait, const char* call) {
    Lock lock(driver.mutex);
    return copy(lock, to, from, bytes, stream, wait, call);
}
// The side that must be device memory is.
Result copy_checked(uint64_t to, bool to_device, uint64_t from, bool from_device, size_t bytes, void* stream, bool wait, const char* call) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    if (bytes && ((to_device && !find_allocation(to)) || (from_device && !find_allocation(from))))
        return complain(INVALID_VALUE, "%s: %#llx is not live device memory", call, (unsigned long long)(to_device && !find_allocation(to) ? to : from));
    return copy(lock, to, from, bytes, stream, wait, call);
}

Result fill(uint64_t to, uint32_t value, size_t size, size_t count, void* stream, bool wait, const char* call) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    const size_t bytes = size * count;
    if (bytes == 0) return SUCCESS;
    Side side;
    if (Result r = classify(to, bytes, call, side)) return r;
    if (side == PAGEABLE_SIDE || to % size) return complain(INVALID_VALUE, "%s: %#llx is not device memory, or not aligned", call, (unsigned long long)to);
    if (wait)
        if (Result r = forbidden_in_capture(call)) return r;
    if (fault("drop_memset")) return SUCCESS;
    ActionPtr action = std::make_shared<Action>();
    char text[160];
    snprintf(text, sizeof text, "%s of %zu bytes at %#llx", call, bytes, (unsigned long long)to);
    action->name = text;
    action->count = &driver.statistics.memsets;
    action->execute = [=](uint64_t, std::string& why) -> int {
        note(to, bytes, true);
        char* d = at(to, bytes, side, why);
        if (!d) return -ILLEGAL_ADDRESS;
        if (size == 1)
            memset(d, (int)value, bytes);
        else
            for (size_t i = 0; i < count; i++) memcpy(d + i * size, &value, size);
        return SOFTGPU_DONE;
    };
    return enqueue(*s, action);
}

}  // namespace

CUDA cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
    return copy_checked(to, true, (uint64_t)from, false, bytes, nullptr, true, "cuMemcpyHtoD");
}
CUDA cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
    return copy_checked((uint64_t)to, false, from, true, bytes, nullptr, true, "cuMemcpyDtoH");
}
CUDA cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) { return copy_checked(to, true, from, true, bytes, nullptr, false, "cuMemcpyDtoD"); }
CUDA cuMemcpy(uint64_t to, uint64_t from, size_t bytes) { return copy_call(to, from, bytes, nullptr, true, "cuMemcpy"); }
CUDA cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    return copy_checked(to, true, (uint64_t)from, false, bytes, stream, false, "cuMemcpyHtoDAsync");
}
CUDA cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    return copy_checked((uint64_t)to, false, from, true, bytes, stream, false, "cuMemcpyDtoHAsync");
}
CUDA cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
    return copy_checked(to, true, from, true, bytes, stream, false, "cuMemcpyDtoDAsync");
}
CUDA cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) { return copy_call(to, from, bytes, stream, false, "cuMemcpyAsync"); }
CUDA cuMemcpyPeerAsync(uint64_t to, void*, uint64_t from, void*, size_t bytes, void* stream) {
    return copy_checked(to, true, from, true, bytes, stream, false, "cuMemcpyPeerAsync");
}
CUDA cuMemsetD8_v2(uint64_t to, unsigned char value, size_t count) { return fill(to, value, 1, count, nullptr, true, "cuMemsetD8"); }
CUDA cuMemsetD32_v2(uint64_t to, unsigned value, size_t count) { return fill(to, value, 4, count, nullptr, true, "cuMemsetD32"); }
CUDA cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, void* stream) { return fill(to, value, 1, count, stream, false, "cuMemsetD8Async"); }
CUDA cuMemsetD16Async(uint64_t to, unsigned short value, size_t count, void* stream) { return fill(to, value, 2, count, stream, false, "cuMemsetD16Async"); }
CUDA cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void* stream) { return fill(to, value, 4, count, stream, false, "cuMemsetD32Async"); }

// ---- Host functions and operations --------------------------------------------------------------------------------------------

CUDA cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (!function) return complain(INVALID_VALUE, "cuLaunchHostFunc: null function");
    ActionPtr action = std::make_shared<Action>();
    action->name = "a host function";
    action->count = &driver.statistics.host_functions;
    action->execute = [=](uint64_t, std::string&) -> int {
        if (driver.races) {
            Lock inner(driver.mutex);
            order_host(*executing);  // it may tell a host thread
        }
        function(data);
        return SOFTGPU_DONE;
    };
    return enqueue(*s, action);
}

extern "C" int softgpu_enqueue(void* stream, const softgpu_operation* operation) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (!operation || !operation->poll) return complain(INVALID_VALUE, "softgpu_enqueue: no operation");
    ActionPtr action = std::make_shared<Action>();
    const softgpu_operation o = *operation;
    action->name = o.name ? o.name : "an operation";
    action->polls = true;
    action->count = &driver.statistics.operations;
    action->execute = [=](uint64_t run, std::string& why) -> int {
        const int r = o.poll(o.data, run);
        if (r == SOFTGPU_DONE || r == SOFTGPU_NOT_YET) return r;
        why = "the operation failed";
        return -LAUNCH_FAILED;
    };
    if (Result r = enqueue(*s, action)) return r;
    if (o.release) action->release = [=] { o.release(o.data); };  // not before it is enqueued: on an error the caller keeps the data
    return SUCCESS;
}
extern "C" void softgpu_note(uint64_t p, size_t bytes, int write) { note(p, bytes, write != 0); }
extern "C" int softgpu_stream_device(void* stream) {
    Lock lock(driver.mutex);
    Stream* s;
    if (stream == nullptr || stream == (void*)1) {
        Context* context;
        return enter(context) ? -1 : context->device;
    }
    s = (Stream*)stream;
    return driver.streams.count(s) ? s->device : -1;
}
