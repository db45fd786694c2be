// The memory that the ranks of a communicator share; see nccl_segment.h. A new file is all zeros, and that is a valid beginning.
#include "nccl_segment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace softnccl {

size_t Channel::write(const void* from, size_t bytes) {
    uint64_t at = written.load();
    bytes = std::min(bytes, room());
    size_t first = std::min<uint64_t>(bytes, ROOM - at % ROOM);
    memcpy(ring + at % ROOM, from, first);
    memcpy(ring, (const char*)from + first, bytes - first);
    written.store(at + bytes);
    return bytes;
}

size_t Channel::take(void* to, size_t bytes) {
    uint64_t at = read.load();
    bytes = std::min(bytes, ready());
    size_t first = std::min<uint64_t>(bytes, ROOM - at % ROOM);
    memcpy(to, ring + at % ROOM, first);
    memcpy((char*)to + first, ring, bytes - first);
    read.store(at + bytes);
    return bytes;
}

std::string Segment::open(uint64_t id, int rank_, int size_, int device) {
    rank = rank_;
    size = size_;
    if (size > SEATS) return "at most " + std::to_string(SEATS) + " ranks";
    char text[64];
    snprintf(text, sizeof text, "/softnccl-%016llx", (unsigned long long)id);
    int file = shm_open(text, O_RDWR | O_CREAT, 0600);
    if (file < 0) return std::string("shm_open: ") + strerror(errno);
    name = text;
    const size_t front = (sizeof(Header) + 4095) / 4096 * 4096;
    mapped = front + sizeof(Channel) * size * size;
    void* memory = MAP_FAILED;
    if (ftruncate(file, (off_t)mapped) == 0) memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    std::string error = strerror(errno);
    close(file);
    if (memory == MAP_FAILED) return "mapping the ranks' memory: " + error;
    header = (Header*)memory;
    channels = (Channel*)((char*)memory + front);

    uint32_t none = 0;
    if (!header->size.compare_exchange_strong(none, (uint32_t)size) && none != (uint32_t)size)
        return "got " + std::to_string(size) + " ranks, another rank gave " + std::to_string(none);
    uint32_t empty = EMPTY;
    if (!seat(rank).presence.compare_exchange_strong(empty, HERE)) {
        munmap(header, mapped);
        header = nullptr;
        return "rank " + std::to_string(rank) + " is there already";
    }
    seat(rank).pid = getpid();
    seat(rank).device = device;
    header->here++;
    return "";
}

bool Segment::complete() {
    if (header->here.load() != (uint32_t)size) return false;
    if (!name.empty()) shm_unlink(name.c_str());
    name.clear();
    return true;
}

void Segment::leave(Presence how) {
    if (!header) return;
    seat(rank).presence.store(how);
    if (!name.empty()) shm_unlink(name.c_str());
    name.clear();
}

Segment::~Segment() {
    if (header) munmap(header, mapped);
}

void Segment::fail(int r, int code, const std::string& why) const {
    Seat& s = seat(r);
    if (s.failing.exchange(1)) return;
    snprintf(s.why, sizeof s.why, "%s", why.c_str());
    s.failed.store((uint32_t)code);
}

}  // namespace softnccl
