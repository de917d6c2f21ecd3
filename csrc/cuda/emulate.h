// Running one thread block at a time on the CPU, in shared memory of the size that a kernel's formula gives.

#pragma once

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/host_block.h"

namespace flexlora::host {

// work(block, shared) by so many threads. Shared memory begins as NaN, so that reading what nobody wrote shows, and
// writing behind it is an error.
template <typename Work>
void emulate(const char* name, int threads, long long shared_bytes, const Work& work) {
    constexpr int GUARD = 64;
    constexpr double MARK = -6.25e-123;
    const size_t count = static_cast<size_t>(shared_bytes + 7) / 8;
    // float2 and double2 accesses, and asynchronous copies, want 16 bytes.
    std::vector<double> memory(count + GUARD + 1, std::numeric_limits<double>::quiet_NaN());
    double* const shared = memory.data() + (reinterpret_cast<uintptr_t>(memory.data()) % 16 ? 1 : 0);
    for (int i = 0; i < GUARD; ++i) shared[count + i] = MARK;
    run(threads, [&](auto& block) { work(block, shared); });
    for (int i = 0; i < GUARD; ++i)
        if (shared[count + i] != MARK)
            throw std::logic_error(std::string(name) + " wrote behind its " + std::to_string(shared_bytes) +
                                   " bytes of shared memory");
}

}  // namespace flexlora::host
