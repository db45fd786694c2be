// What the stand-in for libcuda.so.1 offers beyond CUDA: to the stand-in for libnccl.so.2, which links it, and to test programs.
// Plain C; every function is exported by libcuda.so.1.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SOFTGPU_EXPORT __attribute__((visibility("default")))

// What an operation's poll returns.
#define SOFTGPU_NOT_YET 0
#define SOFTGPU_DONE 1
#define SOFTGPU_FAILED 2  // the device gets a sticky CUDA_ERROR_LAUNCH_FAILED; say why on stderr first

// An operation on a stream that is neither a kernel nor a copy.
struct softgpu_operation {
    const char* name;  // for reports of what a stream waits for; copied
    void* data;
    // Called by the device thread when the operation is at the head of its stream and what it depends on is done, again and again until
    // it is done or failed; other streams go on in between. `run` is new for each execution (a graph replays the operation with another
    // run), so the first call with a run starts it. Must not block, nor call CUDA; softgpu_resolve and softgpu_wake are fine.
    int (*poll)(void* data, uint64_t run);
    // Called once when the operation will never be polled again: after its end, or when its graph and all graphs made of it are gone.
    // May be null.
    void (*release)(void* data);
};

// Enqueues on a CUstream (null: the legacy default stream of the current context); during capture the operation becomes a node of the
// graph. Returns a CUresult.
SOFTGPU_EXPORT int softgpu_enqueue(void* stream, const struct softgpu_operation* operation);

// Where in this process the bytes of [device_pointer, device_pointer + bytes) are (device memory or pinned host memory), or null if that is
// not inside one live allocation. Device pointers themselves cannot be dereferenced by the host.
SOFTGPU_EXPORT void* softgpu_resolve(uint64_t device_pointer, size_t bytes);

// From a poll, in the run's first call: it will read, or write, this memory at some time before it is done (for SOFTGPU_RACES).
SOFTGPU_EXPORT void softgpu_note(uint64_t device_pointer, size_t bytes, int write);

// Says that a poll that returned SOFTGPU_NOT_YET may now do better. Without it the device thread polls again after at most a millisecond.
SOFTGPU_EXPORT void softgpu_wake(void);

// SOFTGPU_SEED, 1 if unset.
SOFTGPU_EXPORT uint64_t softgpu_seed(void);

// Number of the device a stream belongs to, −1 for no such stream; of the current context for null.
SOFTGPU_EXPORT int softgpu_stream_device(void* stream);

// Counts, for tests: kernels, copies and memsets executed, operations polled to their end.
struct softgpu_statistics {
    uint64_t kernels, copies, memsets, operations, host_functions, waits, records, allocations, live_bytes, live_streams, live_events;
};
SOFTGPU_EXPORT void softgpu_get_statistics(struct softgpu_statistics* statistics);

#ifdef __cplusplus
}
#endif
