#include "cpu/matmul.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/convert.h"
#include "cpu/matrix.h"
#include "cpu/require.h"

#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define FLEXLORA_BRGEMM 1
#endif

namespace flexlora::cpu {
namespace {

// Side of a block of C, and the depth of one call of the block kernel. 64 x 64 x 256 reaches 228 of 230 GFLOP/s in
// float32 and 452 of 460 in bfloat16 on two Zen 4 cores; 32 rows or a depth of 512 are within 1 %.
constexpr int64_t kBlock = 64;
constexpr int64_t kDepth = 256;
// Columns of C that share one packed panel of A, so that packing A costs a few percent at most.
constexpr int64_t kGroup = 512;
// Elements of B that are packed at a time.
constexpr int64_t kPacked = int64_t{8} << 20;

int64_t ceil_to(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// What one thread packs into; it stays with the thread, for fresh pages cost more than what is computed in them.
template <typename T>
T* scratch(int slot, int64_t count) {
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<void, Free> memory[3];
    thread_local int64_t held[3] = {0, 0, 0};
    const int64_t bytes = ceil_to(count * static_cast<int64_t>(sizeof(T)), 64);
    if (bytes > held[slot]) {
        memory[slot].reset(std::aligned_alloc(64, bytes));
        if (!memory[slot]) throw std::bad_alloc();
        held[slot] = bytes;
    }
    return static_cast<T*>(memory[slot].get());
}

// Runs task(0) … task(count - 1) on torch's threads, each taking the next when it is free.
template <typename Task>
void share(int64_t count, const Task& task) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t t = next++; t < count; t = next++) task(t);
    });
}

// Steps of K: chunk by chunk, and within a superblock of what is packed together.
struct Chunk {
    int64_t begin, count;  // of K
    int64_t offset;  // in the packed superblock, in steps of K
    float coefficient;
};

struct Superblock {
    std::vector<Chunk> chunks;
    int64_t depth = 0;  // packed steps of K
};

// bfloat16 is packed in pairs, so odd chunks are padded by a row of zeros.
std::vector<Superblock> split(int64_t K, int64_t N, bool pairs, const float* coefficients) {
    const int64_t limit = std::clamp(kPacked / std::max<int64_t>(N, 1), kDepth, 16 * kDepth);
    std::vector<Superblock> blocks(1);
    for (int64_t k = 0; k < K;) {
        int64_t count = std::min(kDepth, K - k);
        if (coefficients != nullptr) {
            int64_t run = 1;
            while (run < count && coefficients[k + run] == coefficients[k]) ++run;
            count = run;
        }
        if (blocks.back().depth >= limit) blocks.emplace_back();
        Superblock& block = blocks.back();
        block.chunks.push_back({k, count, block.depth, coefficients == nullptr ? 1.0f : coefficients[k]});
        block.depth += pairs ? ceil_to(count, 2) : count;
        k += count;
    }
    return blocks;
}

template <typename T>
struct Kernel;

#ifdef FLEXLORA_BRGEMM
template <>
struct Kernel<float> {
    static constexpr bool pairs = false;
    static void multiply(int64_t M, int64_t N, int64_t K, const float* A, const float* B, float* C, bool add) {
        at::native::cpublas::brgemm(M, N, K, kDepth, kBlock, kBlock, add, A, B, C, false);
    }
    // (K, width) of B at (k, j) into rows of kBlock.
    static void pack(const Matrix& B, int64_t k, int64_t count, int64_t j, int64_t width, float* dst) {
        if (width % 16 != 0) std::memset(dst, 0, count * kBlock * sizeof(float));
        B.copy(k, count, j, width, dst, kBlock);
    }
    static void release() { at::native::cpublas::brgemm_release(false); }
};

template <>
struct Kernel<uint16_t> {
    static constexpr bool pairs = true;
    static void multiply(int64_t M, int64_t N, int64_t K, const uint16_t* A, const uint16_t* B, float* C, bool add) {
        at::native::cpublas::brgemm(M, N, ceil_to(K, 2), kDepth, kBlock, kBlock, add,
                                    reinterpret_cast<const at::BFloat16*>(A),
                                    reinterpret_cast<const at::BFloat16*>(B), C, true);
    }
    // Two steps of K side by side, as the dot-product instruction reads them.
    static void pack(const Matrix& B, int64_t k, int64_t count, int64_t j, int64_t width, uint16_t* dst) {
        uint16_t* rows = scratch<uint16_t>(2, kDepth * kBlock);
        if (width % 16 != 0 || count % 2 != 0) std::memset(rows, 0, ceil_to(count, 2) * kBlock * sizeof(uint16_t));
        B.copy(k, count, j, width, rows, kBlock);
        for (int64_t i = 0; i < count; i += 2) {
            interleave(rows + i * kBlock, rows + (i + 1) * kBlock, kBlock, dst + i * kBlock);
        }
    }
    static void release() { at::native::cpublas::brgemm_release(true); }
};

// A's rows [i, i + height) and K's [k, k + count) into rows of kDepth, times the coefficients in float32.
void pack_rows(const Matrix& A, int64_t i, int64_t height, const Chunk& chunk, const float* scale, float* dst) {
    A.copy(i, height, chunk.begin, chunk.count, dst, kDepth);
    if (scale == nullptr) return;
    for (int64_t r = 0; r < height; ++r) {
        for (int64_t k = 0; k < chunk.count; ++k) dst[r * kDepth + k] *= scale[chunk.begin + k];
    }
}

void pack_rows(const Matrix& A, int64_t i, int64_t height, const Chunk& chunk, const float*, uint16_t* dst) {
    A.copy(i, height, chunk.begin, chunk.count, dst, kDepth);
    if (chunk.count % 2 == 0) return;
    for (int64_t r = 0; r < height; ++r) dst[r * kDepth + chunk.count] = 0;
}

// A block of sums (height, kBlock) into C, or added to it.
void write(const float* sums, int64_t height, int64_t width, float* C, int64_t ld, bool add) {
    for (int64_t r = 0; r < height; ++r) {
        float* to = C + r * ld;
        const float* from = sums + r * kBlock;
        if (add) {
            for (int64_t j = 0; j < width; ++j) to[j] += from[j];
        } else {
            std::memcpy(to, from, width * sizeof(float));
        }
    }
}

struct Target {
    float* data;
    int64_t ld;
    bool add;
};

// sums (+)= coefficient · A·B of one chunk; a coefficient of 1 needs no pass of its own.
template <typename T>
void accumulate(int64_t height, int64_t width, const Chunk& chunk, const T* A, const T* B, float* sums, bool add) {
    const int64_t padded = ceil_to(width, 16);
    if (chunk.coefficient == 1.0f) {
        Kernel<T>::multiply(height, padded, chunk.count, A, B, sums, add);
        return;
    }
    alignas(64) float product[kBlock * kBlock];
    Kernel<T>::multiply(height, padded, chunk.count, A, B, product, false);
    for (int64_t x = 0; x < height * kBlock; ++x) {
        sums[x] = add ? sums[x] + chunk.coefficient * product[x] : chunk.coefficient * product[x];
    }
}

// B is packed once for all, A's rows block by block by whoever needs them.
template <typename T>
void multiply_by_rows(const Matrix& A, const Matrix& B, const Superblock& block, const float* scale, bool symmetric,
                      Target C) {
    const int64_t M = A.rows(), N = B.cols(), panels = ceil_to(N, kBlock) / kBlock;
    const at::Tensor memory = at::empty({panels * block.depth * kBlock + 64},
                                        Kernel<T>::pairs ? at::kBFloat16 : at::kFloat);
    T* packed = static_cast<T*>(memory.mutable_data_ptr());
    const int64_t steps = static_cast<int64_t>(block.chunks.size());
    // Few panels of great depth, or many of little: either way there is enough to share out.
    share(panels * steps, [&](int64_t t) {
        const int64_t j = t / steps * kBlock;
        const Chunk& chunk = block.chunks[t % steps];
        Kernel<T>::pack(B, chunk.begin, chunk.count, j, std::min(kBlock, N - j),
                        packed + j * block.depth + chunk.offset * kBlock);
    });
    const int64_t rows = ceil_to(M, kBlock) / kBlock, groups = ceil_to(N, kGroup) / kGroup;
    share(rows * groups, [&](int64_t t) {
        const int64_t i = t / groups * kBlock, height = std::min(kBlock, M - i);
        const int64_t first = t % groups * kGroup, last = std::min(N, first + kGroup);
        if (symmetric && last <= i) return;
        T* a = scratch<T>(0, kBlock * kDepth);
        float* sums = scratch<float>(1, kBlock * kGroup);
        const int64_t start = symmetric ? std::max(first, i / kBlock * kBlock) : first;
        for (const Chunk& chunk : block.chunks) {
            pack_rows(A, i, height, chunk, scale, a);
            for (int64_t j = start; j < last; j += kBlock) {
                accumulate(height, std::min(kBlock, N - j), chunk, a, packed + j * block.depth + chunk.offset * kBlock,
                           sums + (j - first) * kBlock, &chunk != block.chunks.data());
            }
        }
        Kernel<T>::release();
        for (int64_t j = start; j < last; j += kBlock) {
            write(sums + (j - first) * kBlock, height, std::min(kBlock, N - j), C.data + i * C.ld + j, C.ld, C.add);
        }
    });
}

// For few rows of A: they are packed once for all, and each panel of B where it is used.
template <typename T>
void multiply_by_columns(const Matrix& A, const Matrix& B, const Superblock& block, const float* scale, Target C) {
    const int64_t M = A.rows(), N = B.cols(), rows = ceil_to(M, kBlock) / kBlock;
    const int64_t steps = static_cast<int64_t>(block.chunks.size());
    const at::Tensor memory = at::empty({steps * M * kDepth + 64}, Kernel<T>::pairs ? at::kBFloat16 : at::kFloat);
    T* packed = static_cast<T*>(memory.mutable_data_ptr());
    share(steps * rows, [&](int64_t t) {
        const int64_t i = t % rows * kBlock;
        pack_rows(A, i, std::min(kBlock, M - i), block.chunks[t / rows], scale,
                  packed + (t / rows * M + i) * kDepth);
    });
    share(ceil_to(N, kBlock) / kBlock, [&](int64_t t) {
        const int64_t j = t * kBlock, width = std::min(kBlock, N - j);
        T* b = scratch<T>(0, kDepth * kBlock);
        float* sums = scratch<float>(1, M * kBlock);
        for (int64_t s = 0; s < steps; ++s) {
            const Chunk& chunk = block.chunks[s];
            Kernel<T>::pack(B, chunk.begin, chunk.count, j, width, b);
            for (int64_t i = 0; i < M; i += kBlock) {
                accumulate(std::min(kBlock, M - i), width, chunk, packed + (s * M + i) * kDepth, b,
                           sums + i * kBlock, s > 0);
            }
        }
        Kernel<T>::release();
        for (int64_t i = 0; i < M; i += kBlock) {
            write(sums + i * kBlock, std::min(kBlock, M - i), width, C.data + i * C.ld + j, C.ld, C.add);
        }
    });
}

// The upper triangle's blocks into the lower one.
void mirror(float* C, int64_t n, int64_t ld) {
    share(ceil_to(n, kBlock) / kBlock, [&](int64_t t) {
        const int64_t i0 = t * kBlock, height = std::min(kBlock, n - i0);
        for (int64_t j0 = 0; j0 < i0; j0 += kBlock) {
            copy_block(C + j0 * ld + i0, Dtype::f32, 1, ld, height, std::min(kBlock, n - j0), C + i0 * ld + j0, ld);
        }
    });
}

template <typename T>
void multiply(const Matrix& A, const Matrix& B, bool symmetric, const float* scale, Target C) {
    // In bfloat16 the coefficients stay out of the operands, and only the first order of loops knows them.
    const float* coefficients = Kernel<T>::pairs ? scale : nullptr;
    const bool few = A.rows() <= kGroup && B.cols() > A.rows() && !symmetric;
    for (const Superblock& block : split(A.cols(), few ? A.rows() : B.cols(), Kernel<T>::pairs, coefficients)) {
        if (few) {
            multiply_by_columns<T>(A, B, block, scale, C);
        } else {
            multiply_by_rows<T>(A, B, block, scale, symmetric, C);
        }
        C.add = true;
    }
}

bool has_bf16_instructions() {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// The smallest product that uses the kernel, compared with what must come out.
template <typename T>
bool probe(T one) {
    try {
        std::vector<T> A(kDepth * 16, one), B(kBlock * 16, one);
        std::vector<float> C(16 * kBlock, 0.0f);
        Kernel<T>::multiply(16, 16, 16, A.data(), B.data(), C.data(), false);
        Kernel<T>::release();
        return C[0] == 16.0f;
    } catch (const c10::Error&) {
        return false;
    }
}
#endif  // FLEXLORA_BRGEMM

}  // namespace

bool can_multiply(Precision precision) {
#ifdef FLEXLORA_BRGEMM
    static const bool f32 = probe<float>(1.0f);
    // Without the instructions, products in bfloat16 would be emulated: slower than in float32.
    static const bool bf16 = has_bf16_instructions() && probe<uint16_t>(0x3f80);
    return precision == Precision::bf16 ? bf16 : f32;
#else
    (void)precision;
    return false;
#endif
}

at::Tensor matmul(const std::vector<at::Tensor>& a, int64_t a_axis, const std::vector<at::Tensor>& b, int64_t b_axis,
                  Precision precision, bool symmetric, const std::optional<at::Tensor>& scale,
                  const std::optional<at::Tensor>& out) {
    const c10::NoGradGuard no_grad;
    const Matrix A(a, a_axis, "A"), B(b, b_axis, "B");
    const int64_t M = A.rows(), N = B.cols(), K = A.cols();
    require(K == B.rows(), "A is (", M, ", ", K, ") and B is (", B.rows(), ", ", N, "): they cannot be multiplied");
    require(!symmetric || M == N, "a symmetric product cannot be (", M, ", ", N, ")");
    require(can_multiply(precision), "this machine or this torch has no block kernels for this precision");
    if (scale) {
        require(scale->device().is_cpu() && scale->scalar_type() == at::kDouble && scale->dim() == 1 &&
                    scale->size(0) == K,
                "scale is ", scale->scalar_type(), " of shape ", scale->sizes(), ": expected float64 [", K, "]");
    }
    if (out) {
        require(out->device().is_cpu() && out->scalar_type() == at::kFloat && out->dim() == 2 && out->size(0) == M &&
                    out->size(1) == N && out->stride(1) == 1 && !symmetric,
                "out is ", out->scalar_type(), " of shape ", out->sizes(), " and strides ", out->strides(),
                ": expected float32 rows [", M, ", ", N, "], and no symmetric product");
    }
    at::Tensor result = out ? *out : at::empty({M, N}, at::kFloat);
    if (M == 0 || N == 0) return result;
    if (K == 0) return out ? result : result.zero_();
#ifdef FLEXLORA_BRGEMM
    const at::Tensor coefficients = scale ? scale->to(at::kFloat).contiguous() : at::Tensor();
    const float* d = scale ? coefficients.const_data_ptr<float>() : nullptr;
    const auto run = [&](const Matrix& left, const Matrix& right, Target C) {
        if (precision == Precision::bf16) {
            multiply<uint16_t>(left, right, symmetric, d, C);
        } else {
            multiply<float>(left, right, symmetric, d, C);
        }
    };
    // Reading down the columns of a wide A for a few columns of B is slow; the transposed product reads along them.
    if (!out && !symmetric && A.column_major() && N <= kGroup && N < M) {
        at::Tensor transposed = at::empty({N, M}, at::kFloat);
        run(B.transposed(), A.transposed(), {transposed.mutable_data_ptr<float>(), M, false});
        return transposed.t();
    }
    float* C = result.mutable_data_ptr<float>();
    const int64_t ld = result.stride(0);
    run(A, B, {C, ld, out.has_value()});
    if (symmetric) mirror(C, M, ld);
#endif
    return result;
}

}  // namespace flexlora::cpu
