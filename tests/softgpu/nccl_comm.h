// Inside of the stand-in for libnccl.so.2: a communicator of one rank, and its operations on streams.
//   nccl.cpp          NCCL's functions: communicators, groups, faults
//   nccl_comm.cpp     operations: rendezvous with the other ranks
//   nccl_segment.cpp  the memory that ranks share
#pragma once
#include <stdint.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "nccl_segment.h"

namespace softnccl {

enum Code : int {
    SUCCESS = 0,
    UNHANDLED_CUDA_ERROR = 1,
    SYSTEM_ERROR = 2,
    INTERNAL_ERROR = 3,
    INVALID_ARGUMENT = 4,
    INVALID_USAGE = 5,
    REMOTE_ERROR = 6,
    IN_PROGRESS = 7,
};

double now();  // seconds
uint64_t mix(uint64_t x);
struct Random {
    uint64_t state;
    uint32_t below(uint32_t n);
};
long number(const char* variable, long otherwise);

struct Operation;

// A non-blocking communicator is IN_PROGRESS while it joins, enqueues a group, or finalizes.
enum class Phase { JOINING, READY, ENQUEUING, FINALIZING, FINALIZED };

struct Comm {
    int rank, size, device;
    bool blocking = true;
    Segment segment;
    std::atomic<bool> aborted{false};
    std::atomic<int> inside{0};  // calls that are in it right now
    Random random;

    std::mutex mutex;  // guards what follows
    Phase phase = Phase::JOINING;
    int code = SUCCESS;  // its first error
    std::string why;
    Operation* running = nullptr;  // that has started and is not done
    uint64_t groups = 0, pending = 0;  // operations made, and those on streams that are not done
    std::vector<uint64_t> sent, received;  // messages by peer
    std::deque<Operation*> deferred;  // of a group that is not on its stream yet
    int lag = 0;                      // answers of IN_PROGRESS until they are
    std::vector<bool> connected;      // to peers, by a first message
    double open_since = 0;            // a group with messages of this communicator waits for its end
    std::string last;                 // why a call was refused; guarded by nccl.cpp's registry

    Comm(int rank, int size, int device);
    // The first error stays; what is in flight hangs until the communicator is aborted, as a kernel of NCCL does.
    void fail(Code code, const std::string& why);
    // Its own error, one that another rank found, or SUCCESS. With the mutex held.
    int error();
};
typedef std::shared_ptr<Comm> CommPtr;

struct Transfer {
    int peer;
    uint64_t address, bytes;
    int type;
};

// A group of one communicator, on a stream.
struct Operation {
    CommPtr comm;
    void* stream;
    uint64_t number;
    std::vector<Transfer> sends, recvs;
    bool captured = false;  // runs whenever its graph does

    // Enqueues it; a CUresult. From then on the stream owns it.
    int enqueue();

private:
    struct Progress {
        uint64_t index;  // of the message among all of its pair
        uint64_t done = 0;
        bool framed = false;
    };
    uint64_t run = ~0ull;
    double begin_at = 0, end_at = 0;
    bool moved = false;
    std::vector<Progress> sending, receiving;

    static int poll(void* data, uint64_t run);
    int step(uint64_t run);
    bool start(uint64_t run);
    bool send(const Transfer& t, Progress& p, uint64_t limit);
    bool receive(const Transfer& t, Progress& p, uint64_t limit);
    void* memory(const Transfer& t, const char* what, uint64_t from, uint64_t bytes);
    std::string place() const;
};

size_t type_bytes(int type);  // 0: no such type

}  // namespace softnccl
