// Parts of matrices in the order in which the block kernels read them.

#pragma once

#include <cstdint>

#include "cpu/matrix.h"

namespace flexlora::cpu {

// Memory that stays with the thread, one piece for each purpose: fresh pages cost more than what is written to them.
enum class Purpose { panel, staging, shared };
template <typename T>
T* scratch(Purpose purpose, int64_t count);

// Rows of a left operand: element (r, k) at data[r * ld + k].
template <typename T>
struct Rows {
    const T* data;
    int64_t ld;
};

// A's rows [i, i + height <= kBlock) and columns [k, k + count <= kDepth), times scale[k] in float32 where given.
// `in_place`: where they lie in memory as they should, they are left there; else they are written to dst, which holds
// kBlock rows of kDepth.
template <typename T>
Rows<T> pack_left(const Matrix& A, int64_t i, int64_t height, int64_t k, int64_t count, const float* scale,
                  bool in_place, T* dst);

// B's rows [k, k + count <= kDepth) and columns [j, j + width <= kBlock) into rows of kBlock, with zeros up to the next
// multiple of 16 columns; bfloat16 in pairs of rows, with zeros for the one that is missing.
template <typename T>
void pack_right(const Matrix& B, int64_t k, int64_t count, int64_t j, int64_t width, T* dst);

}  // namespace flexlora::cpu
