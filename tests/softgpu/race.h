// Races on shared memory: accesses by two threads, one of them a write, without a barrier between them that both took part in.
// device.cpp reports accesses and barriers here if race.o is linked; kernels compiled with -fsanitize=thread report their plain loads and
// stores to it, too (tests/softgpu/build race).
#pragma once
#include <stdint.h>

#include <string>

namespace softgpu {

struct RaceBlock;  // what is known of one block in flight
struct RaceDetector {
    RaceBlock* (*make)(uint32_t shared_bytes, uint32_t warps);
    void (*reset)(RaceBlock*);
    void (*free)(RaceBlock*);
    // Lanes `mask` of the warp touch the bytes; the text of a race, or none.
    std::string (*access)(RaceBlock*, uint32_t warp, uint32_t mask, uint32_t offset, uint32_t bytes, bool write);
    void (*sync_warp)(RaceBlock*, uint32_t warp);
    void (*sync)(RaceBlock*, const bool* warps);  // those with warps[w] passed a barrier together
};
extern const RaceDetector* race_detector;  // null unless race.o is linked

// Ends the launch with this text, where it is.
[[noreturn]] void fail_here(const std::string& text);

}  // namespace softgpu
