#include "cpu/ranges.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "cpu/require.h"

namespace flexlora::cpu {
namespace {

constexpr int64_t kMemory = -1;  // the descriptor of what lies in memory

// Bytes of a share: enough for a system call and a lock to vanish beside the copy, and little enough for threads to end
// together.
constexpr int64_t kLeast = 128 << 10, kMost = 2 << 20;

constexpr int64_t kWindows = 4;  // that `stage` fills at a time, of eight slots

void check(const Ranges& ranges, int64_t size) {
    for (int64_t i = 0; i < ranges.count; ++i) {
        const int64_t descriptor = ranges.descriptor[i], start = ranges.start[i], nbytes = ranges.nbytes[i];
        const int64_t target = ranges.target[i], first = descriptor == kMemory ? 1 : 0;
        const bool is_one = descriptor >= kMemory && descriptor <= INT32_MAX && nbytes >= 0 &&
                            (nbytes == 0 || (start >= first && start <= INT64_MAX - nbytes));
        require(is_one && target >= 0 && target <= size && nbytes <= size - target, "range ", i, " of ", nbytes,
                " bytes, from ", start, " of descriptor ", descriptor, ", would go to byte ", target,
                " of a buffer of ", size);
    }
}

std::vector<Piece> joined(const Ranges& ranges) {
    std::vector<Piece> runs;
    for (int64_t i = 0; i < ranges.count; ++i) {
        const Piece next{ranges.descriptor[i], ranges.start[i], ranges.nbytes[i], ranges.target[i], i};
        if (next.nbytes == 0) continue;
        if (!runs.empty()) {
            Piece& last = runs.back();
            if (last.descriptor == next.descriptor && last.start + last.nbytes == next.start &&
                last.target + last.nbytes == next.target) {
                last.nbytes += next.nbytes;
                continue;
            }
        }
        runs.push_back(next);
    }
    return runs;
}

// Which of a run's ranges, from the piece's first on, holds byte `position` of the source.
int64_t range_at(const Ranges& ranges, const Piece& piece, int64_t position) {
    int64_t i = piece.range;
    while (ranges.nbytes[i] == 0 || position >= ranges.start[i] + ranges.nbytes[i]) ++i;
    return i;
}

}  // namespace

Reading plan_reading(const Ranges& ranges, int64_t size, int64_t window, int64_t threads) {
    check(ranges, size);
    const std::vector<Piece> runs = joined(ranges);
    int64_t total = 0;
    for (const Piece& run : runs) total += run.nbytes;
    // Of what may be read at the same time, a few shares for every thread.
    const int64_t most = std::clamp(std::min(total, kWindows * window) / (8 * threads), kLeast, kMost);

    Reading reading;
    int64_t held = 0;
    for (Piece rest : runs) {
        while (rest.nbytes > 0) {
            Piece piece = rest;
            const int64_t in_window = window - rest.target % window;
            piece.nbytes = std::min({rest.nbytes, most, in_window});
            const int64_t at = rest.target / window;
            if (reading.shares.empty() || held + piece.nbytes > most || reading.shares.back().window != at) {
                reading.shares.push_back({reading.pieces.size(), reading.pieces.size(), at});
                held = 0;
            }
            reading.pieces.push_back(piece);
            reading.shares.back().end = reading.pieces.size();
            held += piece.nbytes;
            rest.start += piece.nbytes;
            rest.target += piece.nbytes;
            rest.nbytes -= piece.nbytes;
        }
    }
    return reading;
}

std::optional<Failure> read_piece(const Ranges& ranges, const Piece& piece, char* to) {
    if (piece.descriptor == kMemory) {
        std::memcpy(to, reinterpret_cast<const void*>(piece.start), piece.nbytes);
        return std::nullopt;
    }
    for (int64_t done = 0; done < piece.nbytes;) {
        const ssize_t got =
            pread(static_cast<int>(piece.descriptor), to + done, piece.nbytes - done, piece.start + done);
        if (got > 0) {
            done += got;
        } else if (got == 0 || errno != EINTR) {
            const int error = got == 0 ? 0 : errno;
            return Failure{range_at(ranges, piece, piece.start + done), error};
        }
    }
    return std::nullopt;
}

}  // namespace flexlora::cpu
