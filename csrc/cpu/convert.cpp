#include "cpu/convert.h"

#include <algorithm>
#include <cstring>

// One version of each loop per instruction set, chosen when the library is loaded: the compiler vectorises them, and
// nothing is built with -march=native.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define FLEXLORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FLEXLORA_CLONES
#endif
#define FLEXLORA_INLINE static inline __attribute__((always_inline))

namespace flexlora::cpu {
namespace {

FLEXLORA_INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

FLEXLORA_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

struct F32 {
    using type = float;
    FLEXLORA_INLINE float load(float x) { return x; }
};
struct BF16 {
    using type = uint16_t;
    FLEXLORA_INLINE float load(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
};
struct F16 {
    using type = uint16_t;
    FLEXLORA_INLINE float load(uint16_t x) {
        // Exponents are rebased by a product with 2^112, which is exact and takes subnormals along; Inf and NaN keep
        // their all-ones exponent.
        const uint32_t magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
        const uint32_t finite = as_bits(as_float(magnitude) * as_float(0x77800000u));
        const uint32_t special = magnitude | 0x7f800000u;
        return as_float(sign | (magnitude >= 0x0f800000u ? special : finite));
    }
};

FLEXLORA_INLINE void store(float value, float* to) { *to = value; }
FLEXLORA_INLINE void store(float value, uint16_t* to) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // Adding to a NaN's mantissa could make an infinity of it; its quiet bit is set instead.
    *to = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// Rows of the transposed copy that are read side by side: their lines stay in the first-level cache.
constexpr int64_t kStripe = 16;

template <typename S, typename T>
FLEXLORA_INLINE void copy(const void* from, int64_t rows, int64_t cols, int64_t count_i, int64_t count_j, T* dst,
                          int64_t ld) {
    const auto* src = static_cast<const typename S::type*>(from);
    if (cols == 1) {
        for (int64_t i = 0; i < count_i; ++i) {
            const auto* line = src + i * rows;
            T* out = dst + i * ld;
            for (int64_t j = 0; j < count_j; ++j) store(S::load(line[j]), out + j);
        }
        return;
    }
    for (int64_t j0 = 0; j0 < count_j; j0 += kStripe) {
        const int64_t width = std::min(kStripe, count_j - j0);
        for (int64_t i = 0; i < count_i; ++i) {
            const auto* line = src + i * rows + j0 * cols;
            T* out = dst + i * ld + j0;
            for (int64_t j = 0; j < width; ++j) store(S::load(line[j * cols]), out + j);
        }
    }
}

#define FLEXLORA_COPY(S, T)                                                                                        \
    FLEXLORA_CLONES void copy_##S##_##T(const void* src, int64_t rows, int64_t cols, int64_t count_i,              \
                                        int64_t count_j, T* dst, int64_t ld) {                                     \
        copy<S, T>(src, rows, cols, count_i, count_j, dst, ld);                                                    \
    }
FLEXLORA_COPY(F32, float)
FLEXLORA_COPY(F16, float)
FLEXLORA_COPY(BF16, float)
FLEXLORA_COPY(F32, uint16_t)
FLEXLORA_COPY(F16, uint16_t)
FLEXLORA_COPY(BF16, uint16_t)
#undef FLEXLORA_COPY

FLEXLORA_CLONES void interleave_rows(const uint16_t* even, const uint16_t* odd, int64_t count, uint16_t* dst) {
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t pair = even[j] | static_cast<uint32_t>(odd[j]) << 16;
        std::memcpy(dst + 2 * j, &pair, 4);
    }
}

}  // namespace

void copy_block(const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t count_i, int64_t count_j,
                float* dst, int64_t ld) {
    const auto call = dtype == Dtype::f32 ? copy_F32_float : dtype == Dtype::f16 ? copy_F16_float : copy_BF16_float;
    call(src, rows, cols, count_i, count_j, dst, ld);
}

void copy_block(const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t count_i, int64_t count_j,
                uint16_t* dst, int64_t ld) {
    const auto call =
        dtype == Dtype::f32 ? copy_F32_uint16_t : dtype == Dtype::f16 ? copy_F16_uint16_t : copy_BF16_uint16_t;
    call(src, rows, cols, count_i, count_j, dst, ld);
}

void interleave(const uint16_t* even, const uint16_t* odd, int64_t count, uint16_t* dst) {
    interleave_rows(even, odd, count, dst);
}

}  // namespace flexlora::cpu
