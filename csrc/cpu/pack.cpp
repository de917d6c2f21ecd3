#include "cpu/pack.h"

#include <algorithm>
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

// The panel where it lies, if in few parts.
template <typename T>
bool lie_as_rows(const Matrix& A, int64_t i, int64_t height, int64_t k, int64_t count, Panel<T>* panel) {
    for (int64_t r = 0; r < height;) {
        if (panel->parts == Panel<T>::kMost) return false;
        auto& part = panel->part[panel->parts++];
        part = {r, height - r, nullptr, 0};
        part.data = A.rows_at<T>(i + r, &part.height, k, count, &part.ld);
        if (part.data == nullptr) return false;
        r += part.height;
    }
    return true;
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
    thread_local Memory memories[4];
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
Panel<T> pack_left(const Matrix& A, int64_t i, int64_t height, int64_t k, int64_t count, const float* scale,
                   bool in_place, T* dst) {
    Panel<T> panel;
    in_place = in_place && count % kPair<T> == 0 && (scale == nullptr || kPair<T> == 2);
    if (in_place && lie_as_rows(A, i, height, k, count, &panel)) return panel;
    if (A.column_major()) {
        // Cells [K][rows], as they lie in memory, and their transposed.
        T* rows = scratch<T>(Purpose::staging, 2 * kDepth * kBlock);
        uint32_t* stage = cells(rows + kDepth * kBlock);
        copy_cells(A.transposed(), k, count, i, height, stage, kBlock, rows);
        transpose(stage, kBlock, ceil_to(ceil_div(count, kPair<T>), kTile), ceil_to(height, kTile), dst,
                  kRow<T> / kPair<T>);
    } else {
        copy_rows(A, i, height, k, count, dst, kRow<T>);
    }
    if constexpr (std::is_same_v<T, float>) {
        for (int64_t r = 0; scale != nullptr && r < height; ++r) scale_row(scale + k, count, dst + r * kRow<T>);
    }
    panel.part[0] = {0, height, dst, kRow<T>};
    panel.parts = 1;
    return panel;
}

template <typename T>
void pack_right(const Matrix& B, int64_t k, int64_t count, int64_t j, int64_t width, T* dst, int64_t apart) {
    T* stage = scratch<T>(Purpose::staging, kPanel<T>);
    if (!B.column_major()) {
        // Of long rows, a few at a time for all blocks, because in memory the blocks lie side by side.
        const int64_t step = B.row_length() > kBlock ? kTile : kDepth;
        for (int64_t r = 0; r < count; r += step) {
            for (int64_t x = 0; x < width; x += kBlock) {
                copy_cells(B, k + r, std::min(step, count - r), j + x, std::min(kBlock, width - x),
                           cells(dst + x / kBlock * apart + r * kBlock), kBlock, stage);
            }
        }
        return;
    }
    const Matrix Bt = B.transposed();
    for (int64_t x = 0; x < width; x += kBlock) {
        const int64_t columns = std::min(kBlock, width - x);
        if (columns % kTile != 0) std::memset(stage, 0, kPanel<T> * sizeof(T));
        copy_rows(Bt, j + x, columns, k, count, stage, kRow<T>);
        transpose(stage, kRow<T> / kPair<T>, ceil_to(columns, kTile), ceil_to(ceil_div(count, kPair<T>), kTile),
                  dst + x / kBlock * apart, kBlock);
    }
}

#define FLEXLORA_PACK(T)                                                                                            \
    template T* scratch<T>(Purpose, int64_t);                                                                       \
    template Panel<T> pack_left(const Matrix&, int64_t, int64_t, int64_t, int64_t, const float*, bool, T*);         \
    template void pack_right(const Matrix&, int64_t, int64_t, int64_t, int64_t, T*, int64_t);
FLEXLORA_PACK(float)
FLEXLORA_PACK(uint16_t)
#undef FLEXLORA_PACK

}  // namespace flexlora::cpu
