// Inside of the stand-in for libcuda.so.1: its objects, and what its files offer each other.
//   driver.cpp         devices, contexts, memory, modules, launches, errors
//   driver_stream.cpp  streams, events, copies, host functions: what is enqueued
//   driver_graph.cpp   stream capture and graphs
//   driver_race.cpp    whether two operations touch the same memory in no order
//   driver_queue.cpp   the device thread, which executes it, and host-side waits
// One mutex guards everything; the device thread lets go of it while it executes.
#pragma once
#include <stdint.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "entry.h"
#include "softgpu.h"

namespace softgpu {
struct Accesses;
namespace driver {

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    PEER_ACCESS_UNSUPPORTED = 217,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_TIMEOUT = 702,
    PEER_ACCESS_ALREADY_ENABLED = 704,
    LAUNCH_FAILED = 719,
    NOT_PERMITTED = 800,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

struct Order;  // driver_race.cpp
// Something that happens once.
struct Done {
    bool done = false;
    uint32_t number = 0;  // with SOFTGPU_RACES: of the operation, and all that are before its end
    std::shared_ptr<const Order> order;
    double time = 0;   // seconds, when it was done
    std::string what;  // for reports
};
typedef std::shared_ptr<Done> DonePtr;

// What an operation does. Shared by the graphs that hold it; executes once per `run`.
struct Action {
    std::string name;
    std::function<int(uint64_t run, std::string& why)> execute;  // SOFTGPU_DONE, SOFTGPU_NOT_YET, or an error: −Result with `why`
    std::function<void()> release;
    bool polls = false;
    uint64_t* count = nullptr;  // of the statistics
    ~Action() {
        if (release) release();
    }
};
typedef std::shared_ptr<Action> ActionPtr;

struct Op {
    ActionPtr action;  // null: nothing to do
    std::vector<DonePtr> waits;
    DonePtr done;
    uint64_t run;
};
// Executed in order: a stream, or one node of a graph in flight.
struct Queue {
    uint64_t id;
    int device;
    std::string name;
    std::deque<Op> ops;
    DonePtr last;  // of the newest operation
};
typedef std::shared_ptr<Queue> QueuePtr;

struct Node {
    ActionPtr action;
    std::vector<size_t> after;
};
struct Stream;
struct Capture {
    uint64_t id;
    int mode;
    std::thread::id thread;
    Stream* origin;
    std::vector<Node> nodes;
    std::set<Stream*> streams;
    bool invalid = false;
    bool ended = false;
};
typedef std::shared_ptr<Capture> CapturePtr;

struct Stream {
    QueuePtr queue;
    int device;
    bool blocking;  // with respect to the legacy default stream
    bool legacy;    // is it
    int priority;
    CapturePtr capture;
    std::vector<size_t> tails;  // newest nodes of the capture in this stream
};
struct Event {
    int device;
    bool timing;
    DonePtr record;  // the latest; null: none
    CapturePtr capture;  // or it was recorded in this capture, after these nodes
    std::vector<size_t> tails;
};
struct Graph {
    std::vector<Node> nodes;
    int device;
};
struct GraphExec {
    std::vector<Node> nodes;
    int device;
    DonePtr last;
};
struct Module {
    int device;
};
struct Function {
    softgpu_kernel* kernel;
    Module* module;
    uint32_t max_shared;
};
struct Allocation {
    uint64_t address;
    size_t bytes;
    char* host;
    int device;
    bool pinned;
    std::string name;
};
struct Context {
    int device;
    int retained = 0;
    uint64_t used = 0;  // bytes
    Stream* legacy = nullptr;
    Result sticky = SUCCESS;
    std::set<int> peers;
};

struct Driver {
    std::mutex mutex;
    std::condition_variable work, progress;
    int pid = 0;
    uint64_t seed = 1;
    bool trace = false;
    bool races = false;
    double timeout = 60;

    std::vector<std::unique_ptr<Context>> contexts;  // by device
    std::set<Stream*> streams;                       // but not the legacy ones
    std::set<Event*> events;
    std::set<Graph*> graphs;
    std::set<GraphExec*> execs;
    std::set<Module*> modules;
    std::set<Function*> functions;
    std::map<uint64_t, Allocation> allocations;  // by address
    std::set<CapturePtr> captures;               // begun and not ended

    std::vector<QueuePtr> queues;  // with something to do
    bool thread_started = false;
    bool executing = false;  // an operation, without the lock
    bool busy = false;       // and it is not a poll
    bool woken = false;
    int host_waits = 0;       // threads waiting for the device
    uint64_t completed = 0;   // operations
    uint64_t next_id = 1;
    softgpu_statistics statistics = {};
};
extern Driver& driver;

typedef std::unique_lock<std::mutex> Lock;

// Says on stderr what went wrong; a result alone does not.
Result complain(Result result, const char* format, ...) __attribute__((format(printf, 2, 3)));
double now();
uint64_t mix64(uint64_t x);

// True if the N-th call of this kind is to go wrong (SOFTGPU_FAULT=kind:N). Counts calls.
bool fault(const char* kind);

// Every entry point starts with one of these: the driver is up, this is not the device thread, and the context is current and healthy.
Result enter();
Result enter(Context*& context);
// The stream of a handle.
Result find_stream(void* handle, Stream*& stream);
Result sticky(int device);

// driver.cpp: memory
const Allocation* find_allocation(uint64_t address);
bool is_device_address(uint64_t address);

// driver_queue.cpp
extern thread_local bool on_device_thread;
extern thread_local const Done* executing;  // on the device thread: the end of the operation being executed
extern thread_local Accesses* recording;  // of the operation being executed; null: not recorded
// Puts an operation at the end of a stream, or into its capture. Call with the lock held.
Result enqueue(Stream& stream, const ActionPtr& action, std::vector<DonePtr> waits = {}, DonePtr done = nullptr);
void push(const QueuePtr& queue, Op op);
QueuePtr make_queue(int device, const std::string& name);
// Until all are done; deadline and report.
Result wait_host(Lock& lock, const std::vector<DonePtr>& all, const char* what);
void wait_not_executing(Lock& lock);
// Everything enqueued on a device.
std::vector<DonePtr> all_work(int device);

// driver_race.cpp; all do nothing without SOFTGPU_RACES
// Called with the operation about to go to the end of the queue.
void order_push(const Queue& queue, Op& op);
// Some host thread knows that this is done.
void order_host(const Done& done);
void order_host_device(int device);  // and everything enqueued on this device
void forget_memory(uint64_t address, size_t bytes);
// What the operation touched and nothing orders after others; empty: nothing.
std::string find_race(const Done& done, const Accesses& accesses);

// driver_graph.cpp
// A call that may not happen while some stream captures, as CUDA's modes have it; invalidates the captures it would disturb.
Result forbidden_in_capture(const char* call);
// The node is added to the stream's capture.
Result capture_node(Stream& stream, const ActionPtr& action);
Result capture_record(Stream& stream, Event& event);
// A wait where stream or event take part in a capture; `handled` is false if neither does.
Result capture_wait(Stream& stream, Event& event, bool& handled);
// For calls that need the event outside a capture.
Result not_captured(const Event& event, const char* call);

}  // namespace driver
}  // namespace softgpu
