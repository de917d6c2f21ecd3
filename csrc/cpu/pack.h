// Parts of matrices in the order in which the block kernels read them.

#pragma once

#include <cstdint>

#include "cpu/kernel.h"
#include "cpu/matrix.h"

namespace flexlora::cpu {

// Memory that stays with the thread, one piece for each purpose: fresh pages cost more than what is written to them.
enum class Purpose { panel, staging, sums, shared };
template <typename T>
T* scratch(Purpose purpose, int64_t count);

// Up to kBlock rows of a left operand, kDepth steps of K: in one part, or in some where they lie in different pieces.
template <typename T>
struct Panel {
    struct Part {
        int64_t row, height;
        const T* data;
        int64_t ld;
    };
    static constexpr int kMost = 8;
    Part part[kMost];
    int parts = 0;
};

// Elements of a packed panel. Its rows are a cache line longer than kDepth: at a power of two apart, the columns of a
// client would share a few lines of the cache, and copying them takes 15 % longer.
template <typename T>
constexpr int64_t kRow = kDepth + 64 / sizeof(T);
template <typename T>
constexpr int64_t kPanel = kBlock * kRow<T>;

// A's rows [i, i + height <= kBlock) and columns [k, k + count <= kDepth), times scale[k] in float32 where given.
// `in_place`: where they lie in memory as they should, they are left there; else they are written to dst (kPanel).
template <typename T>
Panel<T> pack_left(const Matrix& A, int64_t i, int64_t height, int64_t k, int64_t count, const float* scale,
                   bool in_place, T* dst);

// B's rows [k, k + count <= kDepth) and columns [j, j + width) into blocks of kBlock columns, `apart` elements apart,
// with zeros up to the next multiple of 16 columns; bfloat16 in pairs of rows, with zeros for the one that is missing.
template <typename T>
void pack_right(const Matrix& B, int64_t k, int64_t count, int64_t j, int64_t width, T* dst, int64_t apart);

}  // namespace flexlora::cpu
