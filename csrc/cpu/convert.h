// Copies of 2-D blocks between float32, float16, bfloat16 and float32, bfloat16, with any strides.

#pragma once

#include <cstdint>

namespace flexlora::cpu {

enum class Dtype { f32, f16, bf16 };

// dst[i * ld + j] = T(src[i * rows + j * cols]) for i < count_i, j < count_j; strides in elements.
// 16-bit values become float32 exactly; float32 becomes bfloat16 by rounding to nearest, ties to even. Fast where
// cols is 1; turn the problem round with `transpose` where rows is.
void copy_block(const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t count_i, int64_t count_j,
                float* dst, int64_t ld);
void copy_block(const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t count_i, int64_t count_j,
                uint16_t* dst, int64_t ld);

// dst[j * ld_dst + i] = src[i * ld_src + j] for i < count_i, j < count_j, both multiples of kTile; 4 bytes each.
constexpr int64_t kTile = 16;
void transpose(const void* src, int64_t ld_src, int64_t count_i, int64_t count_j, void* dst, int64_t ld_dst);

// Two rows of bfloat16 as the dot-product instructions want them: dst[j] = even[j] | odd[j] << 16.
void interleave(const uint16_t* even, const uint16_t* odd, int64_t count, uint32_t* dst);

// sums[x] = or += coefficient * values[x].
void add_scaled(const float* values, float coefficient, int64_t count, bool add, float* sums);

// values[x] *= factors[x].
void scale_row(const float* factors, int64_t count, float* values);

}  // namespace flexlora::cpu
