// What the ranks of a communicator of the stand-in for libnccl.so.2 share: a memory-mapped file with a seat for every rank and a channel
// for every ordered pair of ranks. Ranks may be threads or processes of one host; device memory stays private, bytes go through channels.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <string>

namespace softnccl {

// Bytes in front of a message's own.
struct Frame {
    uint64_t bytes;
    uint32_t type;
    uint32_t group;  // number of the sender's group, for reports
};

// A byte stream from one rank to another: frame, bytes, frame, bytes, … Written by one rank, read by the other.
struct Channel {
    alignas(64) std::atomic<uint64_t> written;  // bytes so far
    alignas(64) std::atomic<uint64_t> read;
    std::atomic<uint64_t> taken;  // messages received in full: only then is a send done (rendezvous)
    static const uint64_t ROOM = 1 << 18;
    unsigned char ring[ROOM];

    // As much as there is room for; returns how much.
    size_t write(const void* from, size_t bytes);
    // As much as there is; returns how much.
    size_t take(void* to, size_t bytes);
    size_t room() const { return ROOM - (written.load() - read.load()); }
    size_t ready() const { return written.load() - read.load(); }
};

enum Presence : uint32_t { EMPTY, HERE, FINALIZED, GONE, ABORTED };

struct Seat {
    std::atomic<uint32_t> presence;
    std::atomic<uint32_t> failing;  // 1: `why` is being written
    std::atomic<uint32_t> failed;   // an ncclResult_t that the rank's communicator reports from now on
    int32_t pid, device;
    char why[400];
};

struct Segment {
    int rank = -1, size = 0;

    // Maps the file of a unique id and takes the seat. Empty text: it worked.
    std::string open(uint64_t id, int rank, int size, int device);
    // Are all ranks here? The file's name goes then: nothing stays behind.
    bool complete();
    // Gives the seat up.
    void leave(Presence how);
    ~Segment();

    Seat& seat(int r) const { return header->seats[r]; }
    Channel& channel(int from, int to) const { return channels[from * size + to]; }
    // A rank's first failure stays.
    void fail(int r, int code, const std::string& why) const;

private:
    static const int SEATS = 256;
    struct Header {
        std::atomic<uint32_t> size, here;
        Seat seats[SEATS];
    };
    Header* header = nullptr;
    Channel* channels = nullptr;
    size_t mapped = 0;
    std::string name;
};

}  // namespace softnccl
