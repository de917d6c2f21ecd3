// Bytes of many files and of memory, copied by several threads: into one buffer, or through slots to a device.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/ranges.h"

namespace flexlora::cpu {

// Copies all ranges into the `size` bytes at `out`, with at most `threads` threads, the caller's among them. What is to
// lie side by side in the buffer should come in its order (see plan_reading). Targets must not overlap. After a failure
// the buffer holds anything.
// Throws std::invalid_argument, before anything is read, for a range that does not fit the buffer or is none.
std::optional<Failure> gather(const Ranges& ranges, char* out, int64_t size, int64_t threads);

// What a device is asked to do, by functions with C linkage that return 0 where they succeed; CUDA's driver has them.
// Only the thread that calls `stage` calls them.
struct Device {
    int (*copy)(uint64_t target, const void* source, size_t nbytes, void* stream);  // begins a copy
    int (*record)(void* event, void* stream);  // the event comes after what the stream was given so far
    int (*wait)(void* event);  // until it has come
    std::vector<void*> streams;
};

// Memory that copies are made from, `bytes` each, and the events that come when the last copy from each is done.
// `first`: the one to be filled first; the others follow in turn.
struct Slots {
    std::vector<char*> memory;
    std::vector<void*> done;
    int64_t bytes;
    size_t first;
};

// A range that could not be read, or, where `device` is not 0, what the device answered.
struct Refusal {
    Failure failure;
    int device;
};

// Copies all ranges to `target` on the device, a buffer of `size` bytes: they are read into slots by `threads` threads,
// and the caller's has every slot copied as soon as it and those before it are full. Returns when all copies have begun.
// Throws as gather does.
std::optional<Refusal> stage(const Ranges& ranges, uint64_t target, int64_t size, const Slots& slots,
                             const Device& device, int64_t threads);

}  // namespace flexlora::cpu
