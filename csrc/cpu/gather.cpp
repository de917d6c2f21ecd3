#include "cpu/gather.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/require.h"

namespace flexlora::cpu {
namespace {

constexpr int64_t kMemory = -1;  // the descriptor of what lies in memory

// Bytes that are read at a time: enough for a system call to vanish beside the copy, and little enough for threads to
// end together.
constexpr int64_t kLeast = 128 << 10, kMost = 2 << 20;

// Neighbours in file and buffer, or a part of one range; `range` is its first.
struct Piece {
    int64_t descriptor, start, nbytes, target, range;
};

// What a thread takes at a time: pieces [begin, end).
struct Share {
    size_t begin, end;
};

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

std::vector<Piece> split(const std::vector<Piece>& runs, int64_t most) {
    std::vector<Piece> pieces;
    for (Piece rest : runs) {
        while (rest.nbytes > 0) {
            Piece piece = rest;
            piece.nbytes = std::min(rest.nbytes, most);
            pieces.push_back(piece);
            rest.start += piece.nbytes;
            rest.target += piece.nbytes;
            rest.nbytes -= piece.nbytes;
        }
    }
    return pieces;
}

std::vector<Share> shares_of(const std::vector<Piece>& pieces) {
    std::vector<Share> shares;
    int64_t held = kLeast;
    for (size_t i = 0; i < pieces.size(); ++i) {
        if (held >= kLeast) {
            shares.push_back({i, i});
            held = 0;
        }
        shares.back().end = i + 1;
        held += pieces[i].nbytes;
    }
    return shares;
}

// Which of a run's ranges, from the piece's first on, holds byte `position` of the source.
int64_t range_at(const Ranges& ranges, const Piece& piece, int64_t position) {
    int64_t i = piece.range;
    while (ranges.nbytes[i] == 0 || position >= ranges.start[i] + ranges.nbytes[i]) ++i;
    return i;
}

std::optional<Failure> copy(const Ranges& ranges, const Piece& piece, char* out) {
    char* to = out + piece.target;
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

// Threads that are waited for, whatever happens.
class Workers {
public:
    // Runs `task` on `count` threads, the caller's among them. Where the system has no more threads, fewer do the work.
    template <typename Task>
    void run(int64_t count, const Task& task) {
        for (int64_t i = 1; i < count; ++i) {
            try {
                threads_.emplace_back(task);
            } catch (const std::system_error&) {
                break;
            }
        }
        task();
    }

    ~Workers() {
        for (std::thread& thread : threads_) thread.join();
    }

private:
    std::vector<std::thread> threads_;
};

}  // namespace

std::optional<Failure> gather(const Ranges& ranges, char* out, int64_t size, int64_t threads) {
    require(threads >= 1, "threads is ", threads, ": expected at least 1");
    check(ranges, size);
    const std::vector<Piece> runs = joined(ranges);
    int64_t total = 0;
    for (const Piece& run : runs) total += run.nbytes;
    const std::vector<Piece> pieces = split(runs, std::clamp(total / (8 * threads), kLeast, kMost));
    const std::vector<Share> shares = shares_of(pieces);

    // Shares are taken in order, so all before a failed one were begun and are finished: of several failures the first
    // range's is known, whichever thread was faster.
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::optional<Failure> first;
    const auto task = [&] {
        for (size_t s = next++; s < shares.size() && !failed; s = next++) {
            for (size_t i = shares[s].begin; i < shares[s].end; ++i) {
                if (const auto failure = copy(ranges, pieces[i], out)) {
                    const std::lock_guard<std::mutex> lock(mutex);
                    if (!first || failure->range < first->range) first = failure;
                    failed = true;
                    break;
                }
            }
        }
    };
    {
        Workers workers;
        workers.run(std::min<int64_t>(threads, static_cast<int64_t>(shares.size())), task);
    }
    return first;
}

}  // namespace flexlora::cpu
