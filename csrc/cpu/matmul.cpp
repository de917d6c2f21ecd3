#include "cpu/matmul.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/convert.h"
#include "cpu/kernel.h"
#include "cpu/matrix.h"
#include "cpu/pack.h"
#include "cpu/require.h"

namespace flexlora::cpu {
namespace {

// Up to so many rows of A are packed once for all, and B where it is used; from there on it is the other way round.
constexpr int64_t kFew = 512;
// Bytes that are packed at a time: they stay in the last-level cache, and the memory that stays with the thread small.
constexpr int64_t kPacked = int64_t{8} << 20;
// Up to so many columns of B, rows of A are read where they lie: copying them would take longer than it saves.
constexpr int64_t kInPlace = 256;

// Runs task(0) … task(count - 1) on torch's threads, each taking the next when it is free.
template <typename Task>
void share(int64_t count, const Task& task) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
        for (int64_t t = next++; t < count; t = next++) task(t);
    });
}

// Steps of K that are multiplied in one go, with one coefficient; they lie within one multiple of kDepth.
struct Run {
    int64_t begin, count;
    float coefficient;
};

// Steps of K that are packed together; begins at a multiple of kDepth.
struct Span {
    int64_t begin, count;
    std::vector<Run> runs;

    int64_t panels() const { return ceil_div(count, kDepth); }
    // Steps of the p-th panel of kDepth.
    int64_t steps(int64_t p) const { return std::min(kDepth, count - p * kDepth); }
};

// Runs of equal coefficients, cut at multiples of kDepth: the order in which an entry is summed.
std::vector<Run> runs_of(int64_t K, const float* coefficients) {
    std::vector<Run> runs;
    for (int64_t k = 0; k < K; k += runs.back().count) {
        int64_t count = std::min(K, (k / kDepth + 1) * kDepth) - k;
        if (coefficients != nullptr) {
            const float* end = std::find_if(coefficients + k, coefficients + k + count,
                                            [&](float c) { return c != coefficients[k]; });
            count = end - (coefficients + k);
        }
        runs.push_back({k, count, coefficients == nullptr ? 1.0f : coefficients[k]});
    }
    return runs;
}

// `width`: of what is packed.
template <typename T>
std::vector<Span> spans_of(int64_t K, int64_t width, const float* coefficients) {
    const int64_t fitting = kPacked / (ceil_to(width, kBlock) * static_cast<int64_t>(sizeof(T)));
    const int64_t most = std::clamp(fitting / kDepth, int64_t{1}, int64_t{16}) * kDepth;
    std::vector<Span> spans;
    for (const Run& run : runs_of(K, coefficients)) {
        if (run.begin % most == 0) spans.push_back({run.begin, std::min(most, K - run.begin), {}});
        spans.back().runs.push_back(run);
    }
    return spans;
}

// Where a product goes. `turned`: its transposed is computed, so that rows are written down the columns.
struct Target {
    float* data;
    int64_t ld;
    bool add, turned;

    float* at(int64_t i, int64_t j) const { return turned ? data + j * ld + i : data + i * ld + j; }
};

void copy_rows(const float* from, int64_t ld_from, float* to, int64_t ld_to, int64_t height, int64_t width) {
    for (int64_t r = 0; r < height; ++r) std::memcpy(to + r * ld_to, from + r * ld_from, width * sizeof(float));
}

// A block between C, at (i, j), and sums (kBlock, kBlock).
void read(const Target& C, int64_t i, int64_t j, int64_t height, int64_t width, float* sums) {
    if (!C.turned) return copy_rows(C.at(i, j), C.ld, sums, kBlock, height, width);
    alignas(64) float columns[kBlock * kBlock] = {};
    copy_rows(C.at(i, j), C.ld, columns, kBlock, width, height);
    transpose(columns, kBlock, kBlock, kBlock, sums, kBlock);
}

void write(const float* sums, int64_t height, int64_t width, const Target& C, int64_t i, int64_t j) {
    if (!C.turned) return copy_rows(sums, kBlock, C.at(i, j), C.ld, height, width);
    alignas(64) float columns[kBlock * kBlock];
    transpose(sums, kBlock, ceil_to(height, kTile), ceil_to(width, kTile), columns, kBlock);
    copy_rows(columns, kBlock, C.at(i, j), C.ld, width, height);
}

// sums (height, kBlock) = or += coefficient · A · B; a coefficient of 1 needs no pass of its own.
template <typename T>
void accumulate(int64_t height, int64_t width, const Run& run, const Rows<T>& A, const T* B, float* sums, bool add) {
    if (run.coefficient == 1.0f) return multiply<T>(height, width, run.count, A.data, A.ld, B, sums, add);
    alignas(64) float product[kBlock * kBlock];
    multiply<T>(height, width, run.count, A.data, A.ld, B, product, false);
    for (int64_t x = 0; x < height * kBlock; ++x) {
        sums[x] = add ? sums[x] + run.coefficient * product[x] : run.coefficient * product[x];
    }
}

// One block of C at (i, j): what is there, if it is added to, and then the runs of the span in turn.
// A: its rows, panel by panel of kDepth; B: (span.count, kBlock) packed.
template <typename T>
void compute(const Span& span, const Rows<T>* A, const T* B, int64_t i, int64_t height, int64_t j, int64_t width,
             const Target& C, bool diagonal) {
    alignas(64) float sums[kBlock * kBlock];
    const int64_t padded = ceil_to(width, kTile);
    bool add = C.add;
    if (add) read(C, i, j, height, width, sums);
    for (const Run& run : span.runs) {
        const int64_t at = run.begin - span.begin, in_panel = at % kDepth;
        const Rows<T>& panel = A[at / kDepth];
        const Rows<T> rows = {panel.data + in_panel, panel.ld};
        // A diagonal block of a symmetric product needs its upper half only.
        const int64_t step = diagonal ? kTile : height;
        for (int64_t r = 0; r < height; r += step) {
            const int64_t skipped = diagonal ? r : 0;
            accumulate<T>(std::min(step, height - r), padded - skipped, run, {rows.data + r * rows.ld, rows.ld},
                          B + at * kBlock + skipped * (4 / sizeof(T)), sums + r * kBlock + skipped, add);
        }
        add = true;
    }
    write(sums, height, width, C, i, j);
}

// B is packed once for all, A's rows block by block by whoever needs them.
template <typename T>
void multiply_by_rows(const Matrix& A, const Matrix& B, const Span& span, const float* scale, bool symmetric,
                      Target C) {
    const int64_t M = A.rows(), N = B.cols(), depth = ceil_to(span.count, 2 * kTile);
    const int64_t blocks = ceil_div(N, kBlock), panels = span.panels();
    T* packed = scratch<T>(Purpose::shared, blocks * depth * kBlock);
    share(blocks * panels, [&](int64_t t) {
        const int64_t j = t / panels * kBlock, p = t % panels;
        pack_right(B, span.begin + p * kDepth, span.steps(p), j, std::min(kBlock, N - j),
                   packed + j * depth + p * kDepth * kBlock);
    });
    // Where A has few rows for the threads, the columns are shared out as well.
    const int64_t rows = ceil_div(M, kBlock);
    const int64_t groups = std::clamp<int64_t>(4 * at::get_num_threads() / rows, 1, ceil_div(blocks, 8));
    const int64_t columns = ceil_div(blocks, groups) * kBlock;
    share(rows * groups, [&](int64_t t) {
        const int64_t i = t / groups * kBlock, height = std::min(kBlock, M - i);
        const int64_t start = std::max(t % groups * columns, symmetric ? i : 0), end = std::min(N, (t % groups + 1) * columns);
        if (start >= end) return;
        T* memory = scratch<T>(Purpose::panel, panels * kBlock * kDepth);
        Rows<T> left[16];
        for (int64_t p = 0; p < panels; ++p) {
            left[p] = pack_left(A, i, height, span.begin + p * kDepth, span.steps(p), scale, N <= kInPlace,
                                memory + p * kBlock * kDepth);
        }
        for (int64_t j = start; j < end; j += kBlock) {
            compute(span, left, packed + j * depth, i, height, j, std::min(kBlock, N - j), C, symmetric && i == j);
        }
        release<T>();
    });
}

// For few rows of A: they are packed once for all, and each panel of B where it is used.
template <typename T>
void multiply_by_columns(const Matrix& A, const Matrix& B, const Span& span, const float* scale, Target C) {
    const int64_t M = A.rows(), N = B.cols(), depth = ceil_to(span.count, 2 * kTile);
    const int64_t rows = ceil_div(M, kBlock), panels = span.panels();
    T* packed = scratch<T>(Purpose::shared, rows * panels * kBlock * kDepth);
    std::vector<Rows<T>> left(rows * panels);
    share(rows * panels, [&](int64_t t) {
        const int64_t i = t / panels * kBlock, p = t % panels;
        left[t] = pack_left(A, i, std::min(kBlock, M - i), span.begin + p * kDepth, span.steps(p), scale, false,
                            packed + t * kBlock * kDepth);
    });
    share(ceil_div(N, kBlock), [&](int64_t t) {
        const int64_t j = t * kBlock, width = std::min(kBlock, N - j);
        T* right = scratch<T>(Purpose::panel, depth * kBlock);
        for (int64_t p = 0; p < panels; ++p) {
            pack_right(B, span.begin + p * kDepth, span.steps(p), j, width, right + p * kDepth * kBlock);
        }
        for (int64_t i = 0; i < M; i += kBlock) {
            compute(span, left.data() + i / kBlock * panels, right, i, std::min(kBlock, M - i), j, width, C, false);
        }
        release<T>();
    });
}

// The upper triangle into the lower one.
void mirror(float* C, int64_t n, int64_t ld) {
    share(ceil_div(n, kBlock), [&](int64_t t) {
        const int64_t i0 = t * kBlock, end = std::min(n, i0 + kBlock);
        for (int64_t j0 = 0; j0 < end; j0 += kTile) {
            for (int64_t i = i0; i < end; ++i) {
                for (int64_t j = j0; j < std::min(j0 + kTile, i); ++j) C[i * ld + j] = C[j * ld + i];
            }
        }
    });
}

template <typename T>
void multiply(const Matrix& A, const Matrix& B, bool symmetric, const float* scale, Target C) {
    // In bfloat16 the coefficients stay out of the operands.
    const float* coefficients = sizeof(T) == 2 ? scale : nullptr;
    const bool few = A.rows() <= kFew && B.cols() > A.rows() && !symmetric;
    for (const Span& span : spans_of<T>(A.cols(), few ? A.rows() : B.cols(), coefficients)) {
        if (few) {
            multiply_by_columns<T>(A, B, span, scale, C);
        } else {
            multiply_by_rows<T>(A, B, span, scale, symmetric, C);
        }
        C.add = true;
    }
}

// Whether bfloat16 pairs, two steps of K side by side, never hold two coefficients.
bool pairs_agree(const float* scale, int64_t K) {
    for (int64_t k = 1; k < K; k += 2) {
        if (scale[k] != scale[k - 1]) return false;
    }
    return true;
}

}  // namespace

std::string obstacle(Precision precision) {
    return precision == Precision::bf16 ? obstacle<uint16_t>() : obstacle<float>();
}

at::Tensor matmul(const std::vector<at::Tensor>& a, int64_t a_axis, const std::vector<at::Tensor>& b, int64_t b_axis,
                  Precision precision, bool symmetric, const std::optional<at::Tensor>& scale,
                  const std::optional<at::Tensor>& out) {
    const c10::NoGradGuard no_grad;
    const Matrix A(a, a_axis, "A"), B(b, b_axis, "B");
    const int64_t M = A.rows(), N = B.cols(), K = A.cols();
    require(K == B.rows(), "A is (", M, ", ", K, ") and B is (", B.rows(), ", ", N, "): they cannot be multiplied");
    require(!symmetric || M == N, "a symmetric product cannot be (", M, ", ", N, ")");
    const std::string missing = obstacle(precision);
    require(missing.empty(), "no products in this precision: ", missing);
    if (scale) {
        require(scale->device().is_cpu(), "scale is on ", scale->device(), ": expected the CPU");
        require(scale->scalar_type() == at::kDouble && scale->dim() == 1 && scale->size(0) == K, "scale is ",
                scale->scalar_type(), " of shape ", scale->sizes(), ": expected Double [", K, "]");
    }
    if (out) {
        require(!symmetric, "a symmetric product takes no out");
        require(out->device().is_cpu(), "out is on ", out->device(), ": expected the CPU");
        const bool shaped = out->scalar_type() == at::kFloat && out->dim() == 2 && out->size(0) == M &&
                            out->size(1) == N;
        require(shaped && (N <= 1 || out->stride(1) == 1) && (M <= 1 || out->stride(0) >= N), "out is ",
                out->scalar_type(), " of shape ", out->sizes(), " and strides ", out->strides(),
                ": expected Float [", M, ", ", N, "] in rows");
    }
    at::Tensor result = out ? *out : at::empty({M, N}, at::kFloat);
    if (M == 0 || N == 0) return result;
    if (K == 0) return out ? result : result.zero_();
    const at::Tensor coefficients = scale ? scale->to(at::kFloat).contiguous() : at::Tensor();
    const float* d = scale ? coefficients.const_data_ptr<float>() : nullptr;
    const bool bf16 = precision == Precision::bf16 && (d == nullptr || pairs_agree(d, K));
    const auto run = [&](const Matrix& left, const Matrix& right, Target C) {
        if (bf16) {
            multiply<uint16_t>(left, right, symmetric, d, C);
        } else {
            multiply<float>(left, right, symmetric, d, C);
        }
    };
    float* C = result.mutable_data_ptr<float>();
    const int64_t ld = M > 1 ? result.stride(0) : N;
    // Reading down the columns of a wide A for a few columns of B is slow; the transposed product reads along them. It
    // would scale the other operand, which rounds otherwise: layouts must not change the result.
    if (!symmetric && d == nullptr && A.column_major() && N <= kFew && N < M) {
        run(B.transposed(), A.transposed(), {C, ld, out.has_value(), true});
    } else {
        run(A, B, {C, ld, out.has_value(), false});
    }
    if (symmetric) mirror(C, M, ld);
    return result;
}

}  // namespace flexlora::cpu
