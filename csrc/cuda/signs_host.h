// The arithmetic of signs.cuh, compiled for the CPU: what its test compares with random.py.

#pragma once

#include <cstdint>

namespace flexlora::emulated {

// As the kernel `signs`: addresses (count, 2), out (count, rows, cols), 16-byte aligned.
void signs(const std::int64_t* addresses, std::int64_t count, int rows, int cols, float* out);

}  // namespace flexlora::emulated
