// Ranges of bytes in files and in memory, and in which portions threads read them.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace flexlora::cpu {

// Where `count` ranges of bytes come from, and where they go: from an offset in the file of a descriptor, or from an
// address where the descriptor is -1, to `target` bytes behind the beginning of a buffer.
struct Ranges {
    int64_t count;
    const int64_t *descriptor, *start, *nbytes, *target;
};

// The first range that could not be read, and its errno; 0 where the file ends before the range does.
struct Failure {
    int64_t range;
    int error;
};

// Neighbours in file and buffer, or a part of one range; `range` is its first.
struct Piece {
    int64_t descriptor, start, nbytes, target, range;
};

// Pieces [begin, end), which one thread reads. `window`: which part of the buffer they go to.
struct Share {
    size_t begin, end;
    int64_t window;
};

struct Reading {
    std::vector<Piece> pieces;
    std::vector<Share> shares;
};

// How to fill a buffer of `size` bytes: ranges are joined where they come one after another and are neighbours in both
// places, split where they are long, and cut at every multiple of `window`.
// Throws std::invalid_argument for a range that does not fit the buffer or is none.
Reading plan_reading(const Ranges& ranges, int64_t size, int64_t window, int64_t threads);

// Reads one piece to `to`.
std::optional<Failure> read_piece(const Ranges& ranges, const Piece& piece, char* to);

}  // namespace flexlora::cpu
