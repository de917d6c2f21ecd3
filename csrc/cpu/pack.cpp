#include "cpu/pack.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/kernel.h"

namespace flexlora::cpu {
namespace {

// What the instructions multiply at a time along K: a float, or two bfloat16 side by side.
template <typename T>
constexpr int64_t kPair = 4 / sizeof(T);

template <typename T>
uint32_t* cells(T* data) {
    return reinterpret_cast<uint32_t*>(data);
}

// (count, width) of X at (k, j) as cells [ceil(count / kPair)][width], rows ld cells apart, zeros up to full tiles.
template <typename T>
void copy_cells(const Matrix& X, int64_t k, int64_t count, int64_t j, int64_t width, uint32_t* dst, int64_t ld,
                T* rows) {
    if constexpr (std::is_same_v<T, float>) {
        if (width % kTile != 0) std::memset(dst, 0, count * ld * sizeof(float));
        X.copy(k, count, j, width, reinterpret_cast<float*>(dst), ld);
    } else {
        if (width % kTile != 0 || count % 2 != 0) std::memset(rows, 0, ceil_to(count, 2) * kBlock * sizeof(T));
        X.copy(k, count, j, width, rows, kBlock);
        for (int64_t r = 0; r < count; r += 2) {
            interleave(rows + r * kBlock, rows + (r + 1) * kBlock, ceil_to(width, kTile), dst + r / 2 * ld);
        }
    }
}

// (height, count) of X at (i, k) into rows ld apart, with a zero after an odd number of bfloat16.
template <typename T>
void copy_rows(const Matrix& X, int64_t i, int64_t height, int64_t k, int64_t count, T* dst, int64_t ld) {
    X.copy(i, height, k, count, dst, ld);
    if (count % kPair<T> == 0) return;
    for (int64_t r = 0; r < height; ++r) dst[r * ld + count] = 0;
}

}  // namespace

template <typename T>
T* scratch(Purpose purpose, int64_t count) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    struct Memory {
        std::unique_ptr<void, Free> data;
        int64_t bytes = 0;
    };
    thread_local Memory memories[3];
    Memory& memory = memories[static_cast<int>(purpose)];
    const int64_t bytes = ceil_to(count * static_cast<int64_t>(sizeof(T)), 64);
    if (bytes > memory.bytes) {
        memory.data.reset();
        memory.bytes = 0;
        memory.data.reset(std::aligned_alloc(64, bytes));
        if (!memory.data) throw std::bad_alloc();
        memory.bytes = bytes;
    }
    return static_cast<T*>(memory.data.get());
}

template <typename T>
Rows<T> pack_left(const Matrix& A, int64_t i, int64_t height, int64_t k, int64_t count, const float* scale,
                  bool in_place, T* dst) {
    if (in_place && count % kPair<T> == 0 && (scale == nullptr || kPair<T> == 2)) {
        int64_t ld = 0;
        if (const T* data = A.rows_at<T>(i, height, k, count, &ld)) return {data, ld};
    }
    if (A.column_major()) {
        // Cells [K][rows], as they lie in memory, and their transposed.
        T* rows = scratch<T>(Purpose::staging, 3 * kDepth * kBlock);
        uint32_t* stage = cells(rows + kDepth * kBlock);
        copy_cells(A.transposed(), k, count, i, height, stage, kBlock, rows);
        transpose(stage, kBlock, ceil_to(ceil_div(count, kPair<T>), kTile), ceil_to(height, kTile), dst,
                  kDepth / kPair<T>);
    } else {
        copy_rows(A, i, height, k, count, dst, kDepth);
    }
    if constexpr (std::is_same_v<T, float>) {
        for (int64_t r = 0; scale != nullptr && r < height; ++r) {
            for (int64_t x = 0; x < count; ++x) dst[r * kDepth + x] *= scale[k + x];
        }
    }
    return {dst, kDepth};
}

template <typename T>
void pack_right(const Matrix& B, int64_t k, int64_t count, int64_t j, int64_t width, T* dst) {
    T* stage = scratch<T>(Purpose::staging, 3 * kDepth * kBlock);
    if (!B.column_major()) return copy_cells(B, k, count, j, width, cells(dst), kBlock, stage);
    if (width % kTile != 0) std::memset(stage, 0, kDepth * kBlock * sizeof(T));
    copy_rows(B.transposed(), j, width, k, count, stage, kDepth);
    transpose(stage, kDepth / kPair<T>, ceil_to(width, kTile), ceil_to(ceil_div(count, kPair<T>), kTile),
              dst, kBlock);
}

#define FLEXLORA_PACK(T)                                                                                            \
    template T* scratch<T>(Purpose, int64_t);                                                                       \
    template Rows<T> pack_left(const Matrix&, int64_t, int64_t, int64_t, int64_t, const float*, bool, T*);          \
    template void pack_right(const Matrix&, int64_t, int64_t, int64_t, int64_t, T*);
FLEXLORA_PACK(float)
FLEXLORA_PACK(uint16_t)
#undef FLEXLORA_PACK

}  // namespace flexlora::cpu
