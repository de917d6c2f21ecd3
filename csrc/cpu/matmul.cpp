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
// Bytes and columns that are packed at a time: they stay in the last-level cache, and the memory that stays with the
// thread small. Fewer columns leave more depth, and less of C is read and written again: at 2048 x 11008, K = 1600, 104
// GFLOP/s a core in float32 and 205 in bfloat16 instead of 91 and 167 without this limit.
constexpr int64_t kPacked = int64_t{4} << 20;
constexpr int64_t kWide = 1024;
// Columns of C that are summed side by side. Where there are no more, rows of A are read where they lie: copying them
// would take longer than it saves.
constexpr int64_t kStrip = 4 * kBlock;

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
            // From the next one on: a NaN is not even equal to itself.
            const float* end = std::find_if(coefficients + k + 1, coefficients + k + count,
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
    const int64_t most = std::clamp<int64_t>(fitting / kDepth, 1, 16) * kDepth;
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
    bool mirror;  // of a symmetric product, the lower triangle is written as well

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
void accumulate(int64_t height, int64_t width, const Run& run, const T* A, int64_t ld, const T* B, float* sums,
                bool add) {
    if (run.coefficient == 1.0f) return multiply<T>(height, width, run.count, A, ld, B, sums, add);
    alignas(64) float product[kBlock * kBlock];
    multiply<T>(height, width, run.count, A, ld, B, product, false);
    add_scaled(product, run.coefficient, height * kBlock, add, sums);
}

// One block's sums over one panel of K that begins at k. A diagonal block of a symmetric product needs its upper half.
template <typename T>
void accumulate(const Run* first, const Run* last, int64_t k, const Panel<T>& A, const T* B, int64_t width,
                bool diagonal, float* sums, bool add) {
    const int64_t step = diagonal ? kTile : kBlock;
    for (const auto* part = A.part; part != A.part + A.parts; ++part) {
        const int64_t end = part->row + part->height;
        for (int64_t r = part->row, next; r < end; r = next) {
            next = std::min(end, (r / step + 1) * step);
            const int64_t skipped = diagonal ? r / kTile * kTile : 0;
            const T* rows = part->data + (r - part->row) * part->ld;
            for (const Run* run = first; run != last; ++run) {
                const int64_t at = run->begin - k;
                accumulate(next - r, ceil_to(width, kTile) - skipped, *run, rows + at, part->ld,
                           B + at * kBlock + skipped * (4 / sizeof(T)), sums + r * kBlock + skipped,
                           add || run != first);
            }
        }
    }
}

// A rectangle of C: what is there, if it is added to, and then the runs of the span in turn. All its blocks are summed
// side by side, so that a panel is used while it is in the second-level cache.
// left(p, i), right(p, j): panel p of K for the block of rows at i, or of columns at j.
template <typename T, typename Left, typename Right>
void compute(const Span& span, int64_t i0, int64_t i1, int64_t j0, int64_t j1, const Target& C, bool symmetric,
             const Left& left, const Right& right) {
    const int64_t across = ceil_div(j1 - j0, kBlock);
    float* memory = scratch<float>(Purpose::sums, ceil_div(i1 - i0, kBlock) * across * kBlock * kBlock);
    const auto each = [&](const auto& task) {
        for (int64_t j = j0; j < j1; j += kBlock) {
            for (int64_t i = i0; i < i1 && !(symmetric && i > j); i += kBlock) {
                task(i, std::min(kBlock, i1 - i), j, std::min(kBlock, j1 - j),
                     memory + ((i - i0) / kBlock * across + (j - j0) / kBlock) * kBlock * kBlock);
            }
        }
    };
    if (C.add) {
        each([&](int64_t i, int64_t height, int64_t j, int64_t width, float* sums) {
            read(C, i, j, height, width, sums);
        });
    }
    const Run* run = span.runs.data();
    const Run* const last = run + span.runs.size();
    for (int64_t p = 0; p < span.panels(); ++p) {
        const int64_t k = span.begin + p * kDepth;
        const Run* const end = std::find_if(run, last, [&](const Run& r) { return r.begin >= k + kDepth; });
        each([&](int64_t i, int64_t, int64_t j, int64_t width, float* sums) {
            accumulate<T>(run, end, k, left(p, i), right(p, j), width, symmetric && i == j, sums, C.add || p > 0);
        });
        run = end;
    }
    each([&](int64_t i, int64_t height, int64_t j, int64_t width, float* sums) {
        if (symmetric && i == j) {
            for (int64_t r = 1; r < height; ++r) {
                for (int64_t c = 0; c < r; ++c) sums[r * kBlock + c] = sums[c * kBlock + r];
            }
        }
        write(sums, height, width, C, i, j);
        if (C.mirror && i != j) write(sums, height, width, {C.data, C.ld, false, true, false}, i, j);
    });
    release<T>();
}

// B's columns [begin, end) are packed once for all, A's rows by whoever needs them.
template <typename T>
void multiply_by_rows(const Matrix& A, const Matrix& B, int64_t begin, int64_t end, const Span& span,
                      const float* scale, bool symmetric, const Target& C) {
    const int64_t M = symmetric ? end : A.rows(), panels = span.panels();
    const int64_t apart = ceil_to(span.count, 2 * kTile) * kBlock, strips = ceil_div(end - begin, kStrip);
    T* packed = scratch<T>(Purpose::shared, strips * kStrip / kBlock * apart);
    const auto right = [&](int64_t p, int64_t j) { return packed + (j - begin) / kBlock * apart + p * kDepth * kBlock; };
    share(strips * panels, [&](int64_t t) {
        const int64_t j = begin + t / panels * kStrip, p = t % panels;
        pack_right(B, span.begin + p * kDepth, span.steps(p), j, std::min(kStrip, end - j), right(p, j), apart);
    });
    // Two blocks of rows take turns with what comes of B from the last-level cache. Where A has few rows for the
    // threads, they are taken one by one, and then the columns are shared out as well.
    const int64_t threads = at::get_num_threads();
    const int64_t height = B.cols() > kStrip && M >= 8 * kBlock * threads ? 2 * kBlock : kBlock;
    const int64_t rows = ceil_div(M, height);
    const int64_t groups = std::clamp<int64_t>(4 * threads / rows, 1, ceil_div(strips, 2));
    const int64_t columns = ceil_div(strips, groups) * kStrip;
    share(rows * groups, [&](int64_t t) {
        const int64_t i0 = t / groups * height, i1 = std::min(M, i0 + height);
        const int64_t first = begin + t % groups * columns, last = std::min(end, first + columns);
        T* memory = scratch<T>(Purpose::panel, height / kBlock * panels * kPanel<T>);
        std::vector<Panel<T>> kept(height / kBlock * panels);
        const auto left = [&](int64_t p, int64_t i) -> const Panel<T>& {
            const int64_t at = (i - i0) / kBlock * panels + p;
            if (kept[at].parts == 0) {
                kept[at] = pack_left(A, i, std::min(kBlock, i1 - i), span.begin + p * kDepth, span.steps(p), scale,
                                     B.cols() <= kStrip, memory + at * kPanel<T>);
            }
            return kept[at];
        };
        for (int64_t j = symmetric ? std::max(first, i0) : first; j < last; j += kStrip) {
            compute<T>(span, i0, i1, j, std::min(last, j + kStrip), C, symmetric, left, right);
        }
    });
}

// For few rows of A: they are packed once for all, and each strip of B where it is used.
template <typename T>
void multiply_by_columns(const Matrix& A, const Matrix& B, const Span& span, const float* scale, const Target& C) {
    const int64_t M = A.rows(), N = B.cols(), panels = span.panels();
    T* packed = scratch<T>(Purpose::shared, ceil_div(M, kBlock) * panels * kPanel<T>);
    std::vector<Panel<T>> kept(ceil_div(M, kBlock) * panels);
    share(static_cast<int64_t>(kept.size()), [&](int64_t t) {
        const int64_t i = t / panels * kBlock, p = t % panels;
        kept[t] = pack_left(A, i, std::min(kBlock, M - i), span.begin + p * kDepth, span.steps(p), scale, false,
                            packed + t * kPanel<T>);
    });
    const int64_t strip = std::clamp(2 * kStrip / M * kBlock, kBlock, kStrip), apart = kDepth * kBlock;
    share(ceil_div(N, strip), [&](int64_t t) {
        const int64_t j0 = t * strip, j1 = std::min(N, j0 + strip);
        T* memory = scratch<T>(Purpose::panel, strip / kBlock * apart);
        int64_t ready = -1;
        const auto right = [&](int64_t p, int64_t j) {
            if (p != ready) pack_right(B, span.begin + p * kDepth, span.steps(p), j0, j1 - j0, memory, apart);
            ready = p;
            return memory + (j - j0) / kBlock * apart;
        };
        const auto left = [&](int64_t p, int64_t i) -> const Panel<T>& { return kept[i / kBlock * panels + p]; };
        compute<T>(span, 0, M, j0, j1, C, false, left, right);
    });
}

template <typename T>
void multiply(const Matrix& A, const Matrix& B, bool symmetric, const float* scale, Target C) {
    // In bfloat16 the coefficients stay out of the operands.
    const float* coefficients = sizeof(T) == 2 ? scale : nullptr;
    const int64_t K = A.cols(), N = B.cols();
    const bool few = A.rows() <= kFew && N > A.rows() && !symmetric, add = C.add;
    for (int64_t j = 0; j < N; j += few ? N : kWide) {
        C.add = add;
        for (const Span& span : spans_of<T>(K, few ? A.rows() : std::min(N, kWide), coefficients)) {
            C.mirror = symmetric && span.begin + span.count == K;
            if (few) {
                multiply_by_columns<T>(A, B, span, scale, C);
            } else {
                multiply_by_rows<T>(A, B, j, std::min(N, j + kWide), span, scale, symmetric, C);
            }
            C.add = true;
        }
    }
}

// Whether bfloat16 products pay: each run of equal coefficients is summed by itself, which is slower than float32
// products for runs of 8 (92 to 103 GFLOP/s a core) and faster for 16 (120 to 100). A pair, two steps of K side by
// side, can have one coefficient only.
bool runs_are_long(const float* scale, int64_t K) {
    int64_t runs = 1;
    for (int64_t k = 1; k < K; ++k) {
        if (scale[k] == scale[k - 1]) continue;
        if (k % 2 != 0) return false;
        ++runs;
    }
    return K >= 12 * runs;
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
    const bool bf16 = precision == Precision::bf16 && (d == nullptr || runs_are_long(d, K));
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
        run(B.transposed(), A.transposed(), {C, ld, out.has_value(), true, false});
    } else {
        run(A, B, {C, ld, out.has_value(), false, false});
    }
    return result;
}

}  // namespace flexlora::cpu
