// Bytes of many files and of memory, copied into one buffer by several threads.

#pragma once

#include <cstdint>
#include <optional>

namespace flexlora::cpu {

// Where `count` ranges of bytes come from, and where they go: from an offset in the file of a descriptor, or from an
// address where the descriptor is -1, to `target` bytes behind the beginning of the buffer.
struct Ranges {
    int64_t count;
    const int64_t *descriptor, *start, *nbytes, *target;
};

// The first range that could not be read, and its errno; 0 where the file ends before the range does.
struct Failure {
    int64_t range;
    int error;
};

// Copies all ranges into the `size` bytes at `out`, with at most `threads` threads, the caller's among them. What is to
// lie side by side in the buffer should come in its order: such ranges are read in one go where they are neighbours in
// their file as well, and long ones are split. Targets must not overlap. After a failure the buffer holds anything.
// Throws std::invalid_argument, before anything is read, for a range that does not fit the buffer or is none.
std::optional<Failure> gather(const Ranges& ranges, char* out, int64_t size, int64_t threads);

}  // namespace flexlora::cpu
