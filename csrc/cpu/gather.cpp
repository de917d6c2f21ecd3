#include "cpu/gather.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "cpu/require.h"

namespace flexlora::cpu {
namespace {

constexpr int64_t kMostThreads = 1024;

// Threads that are waited for, whatever happens.
class Workers {
public:
    // Begins `task` on at most `count` threads; says on how many the system allowed.
    template <typename Task>
    int64_t begin(int64_t count, const Task& task) {
        for (int64_t i = 0; i < count; ++i) {
            try {
                threads_.emplace_back(task);
            } catch (const std::system_error&) {
                return i;
            }
        }
        return count;
    }

    ~Workers() {
        for (std::thread& thread : threads_) thread.join();
    }

private:
    std::vector<std::thread> threads_;
};

// The first of the failures, whichever thread was faster: shares are taken in order, and what was taken is read, so all
// before a failed one are.
class FirstFailure {
public:
    void add(const Failure& failure) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!first_ || failure.range < first_->range) first_ = failure;
        any_ = true;
    }
    bool any() const { return any_; }
    const std::optional<Failure>& first() const { return first_; }

private:
    std::mutex mutex_;
    std::atomic<bool> any_{false};
    std::optional<Failure> first_;
};

// A reading whose parts of the buffer are opened one after another, and waited for one after another.
class Windows {
public:
    Windows(const Reading& reading, int64_t count) : left_(count) {
        for (const Share& share : reading.shares) ++left_[share.window];
    }

    // Lets threads read into the next part.
    void open() {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++opened_;
        changed_.notify_all();
    }

    // Ends all waiting.
    void stop() {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
        changed_.notify_all();
        filled_.notify_all();
    }

    bool stopped() const { return stopped_; }

    // Waits until a part is open; false where it never will be.
    bool wait_open(int64_t window) {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return stopped_ || window < opened_; });
        return window < opened_;
    }

    // Waits until a part is full; false where it never will be.
    bool wait_full(int64_t window) {
        std::unique_lock<std::mutex> lock(mutex_);
        filled_.wait(lock, [&] { return stopped_ || left_[window] == 0; });
        return !stopped_;
    }

    // One of the part's shares was read.
    void add(int64_t window) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--left_[window] == 0) filled_.notify_all();
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_, filled_;
    std::vector<int64_t> left_;  // shares of each part that are still to be read
    int64_t opened_ = 0;
    std::atomic<bool> stopped_{false};
};

}  // namespace

std::optional<Failure> gather(const Ranges& ranges, char* out, int64_t size, int64_t threads) {
    require(threads >= 1 && threads <= kMostThreads, "threads is ", threads, ": expected 1 to ", kMostThreads);
    const Reading reading = plan_reading(ranges, size, std::max<int64_t>(size, 1), threads);
    const int64_t shares = static_cast<int64_t>(reading.shares.size());
    std::atomic<int64_t> next{0};
    FirstFailure failures;
    const auto task = [&] {
        while (!failures.any()) {
            const int64_t s = next++;
            if (s >= shares) return;
            for (size_t i = reading.shares[s].begin; i < reading.shares[s].end; ++i) {
                const Piece& piece = reading.pieces[i];
                if (const auto failure = read_piece(ranges, piece, out + piece.target)) return failures.add(*failure);
            }
        }
    };
    {
        Workers workers;
        workers.begin(std::min(threads, shares) - 1, task);
        task();
    }
    return failures.first();
}

std::optional<Refusal> stage(const Ranges& ranges, uint64_t target, int64_t size, const Slots& slots,
                             const Device& device, int64_t threads) {
    require(threads >= 1 && threads <= kMostThreads, "threads is ", threads, ": expected 1 to ", kMostThreads);
    const int64_t count = (size + slots.bytes - 1) / slots.bytes;
    const Reading reading = plan_reading(ranges, size, slots.bytes, threads);
    const auto slot_of = [&](int64_t window) { return (slots.first + window) % slots.memory.size(); };
    Windows windows(reading, count);
    std::atomic<size_t> next{0};
    FirstFailure failures;
    const auto task = [&] {
        while (!windows.stopped()) {
            const size_t s = next++;
            if (s >= reading.shares.size() || !windows.wait_open(reading.shares[s].window)) return;
            const Share& share = reading.shares[s];
            char* const memory = slots.memory[slot_of(share.window)];
            for (size_t i = share.begin; i < share.end; ++i) {
                const Piece& piece = reading.pieces[i];
                if (const auto failure = read_piece(ranges, piece, memory + piece.target % slots.bytes)) {
                    failures.add(*failure);
                    return windows.stop();
                }
            }
            windows.add(share.window);
        }
    };

    // Half of the slots are being filled at a time. When the caller waits for a copy, to open the slot again, those of
    // the other half were begun after it: the device does not run out of them.
    const int64_t filling = std::max<int64_t>(1, slots.memory.size() / 2);
    int answer = 0;
    {
        Workers workers;
        const int64_t wanted = std::min<int64_t>(threads, reading.shares.size());
        if (workers.begin(wanted, task) == 0 && wanted > 0) throw std::runtime_error("the system allows no more threads");
        int64_t opened = 0;
        for (int64_t window = 0; window < count && answer == 0; ++window) {
            for (; opened < std::min(count, window + filling) && answer == 0; ++opened) {
                answer = device.wait(slots.done[slot_of(opened)]);
                if (answer == 0) windows.open();
            }
            if (answer != 0 || !windows.wait_full(window)) break;
            const size_t slot = slot_of(window);
            void* const stream = device.streams[window % device.streams.size()];
            const int64_t begin = window * slots.bytes;
            answer = device.copy(target + begin, slots.memory[slot], std::min(slots.bytes, size - begin), stream);
            if (answer == 0) answer = device.record(slots.done[slot], stream);
        }
        if (answer != 0) windows.stop();
    }
    if (answer != 0) return Refusal{{}, answer};
    if (failures.any()) return Refusal{*failures.first(), 0};
    return std::nullopt;
}

}  // namespace flexlora::cpu
