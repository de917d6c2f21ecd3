// oneDNN's block kernels as torch exports them, for float32 and, in uint16_t, bfloat16.

#pragma once

#include <cstdint>
#include <string>

namespace flexlora::cpu {

// Columns of a block of C, and the depth of what is packed together. The kernels reach 117 GFLOP/s in float32 and 232
// in bfloat16 on a Zen 4 core, at any height from 8 to 128 rows and any depth above 64; a depth of 16 costs 10 % in
// float32 and 20 % in bfloat16. The first product of each shape takes 0.15 ms longer: its kernel is compiled then.
constexpr int64_t kBlock = 64;
constexpr int64_t kDepth = 256;

inline int64_t ceil_div(int64_t x, int64_t step) { return (x + step - 1) / step; }
inline int64_t ceil_to(int64_t x, int64_t step) { return ceil_div(x, step) * step; }

// Why there are no kernels for T here; empty if there are.
template <typename T>
std::string obstacle();

// C (height, width) = or += A (height, depth) · B (depth, width), float32 sums. The width is a multiple of 16, and the
// rows of B and C are kBlock apart. bfloat16: B has rows 2k and 2k + 1 interleaved, and an odd depth is rounded up.
template <typename T>
void multiply(int64_t height, int64_t width, int64_t depth, const T* A, int64_t ld, const T* B, float* C, bool add);

// Gives the registers back that a processor with matrix tiles reserves; once after the last product of a task.
template <typename T>
void release();

}  // namespace flexlora::cpu
