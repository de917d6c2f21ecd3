// The small eigenproblem of a Rayleigh-Ritz step, before and after the eigensolver: for G = XᵀH, C = HᵀY it is that of
// Tᵀ·C·T with Tᵀ·G·T = I (whiten.cuh), and X·T·V are the Ritz vectors for its eigenvectors V.
// The twin: ritz of flexlora_fast/backends/small.py.
//
// Kernels:
//   flexlora_ritz(G, C, T, small, shifted, spoiled, workspace, l)
//       G, C (L, l, l) float64 -> T and small = the symmetric part of Tᵀ·C·T (L, l, l) float64; shifted (L,) bool as
//       flexlora_whiten has it; spoiled (L,) bool where small was not finite, and zeros stand for it. Grid L, block
//       256. Shared bytes: 8·(l(l+1) + 26·l + 8) with workspace = null, up to l = 157 in 227 KB and l = 131 in 163 KB.
//       Otherwise 8·(26·l + 8), and both packed matrices go through L2: workspace has L·l(l+1) doubles.
//   flexlora_rotate(T, vectors, values, spoiled, rotation, scaled, found, l, k)
//       T (L, l, l) as above, vectors (L, l, l) and values (L, l) as cusolverDnXsyevBatched leaves them: ascending,
//       and eigenvector j is row j of the memory. -> rotation (L, l, k) float32 = T·V, the largest value's vector
//       first. scaled = null: found (L, k) float64 are the values, 0 where they are negative. Otherwise found is their
//       square root S, and scaled (L, l, k) = T·V·diag(1/S), 0 where S ≤ 1e-7 of the largest. found is NaN where
//       spoiled. Grid (⌈l/32⌉·⌈k/32⌉, L), block 256, shared bytes 8·64·(l + 1 − l mod 2): 131 KB for l = 256.

#pragma once

#include "whiten.cuh"

namespace flexlora {

constexpr int STRIP = 16;      // rows of T'·C at a time
constexpr int STRIP_ROWS = 4;  // of them, a thread has

FLEXLORA_FORMULA int ritz_doubles(int l) { return whitening_doubles(l) + STRIP * l; }

FLEXLORA_FORMULA long long ritz_shared(int l, bool in_shared) {
    return 8LL * (ritz_doubles(l) + (in_shared ? 2 * packed(l) : 0));
}

// strip (STRIP × l) = rows first … of A·S for a lower triangular packed A and a symmetric packed S.
template <typename Block>
FLEXLORA_DEVICE void multiply_strip(Block& block, const double* A, const double* S, double* strip, int l, int first) {
    for_each(block, STRIP / STRIP_ROWS * l, [&](int task) {
        const int row = first + task / l * STRIP_ROWS, j = task % l, base = packed(j);
        if (row >= l) return;
        double sums[STRIP_ROWS] = {};
        const int end = row + STRIP_ROWS < l ? row + STRIP_ROWS : l;
        for (int k = 0; k < end; ++k) {
            const double s = S[k < j ? base + k : packed(k) + j];
            FLEXLORA_UNROLL
            for (int x = 0; x < STRIP_ROWS; ++x)
                if (row + x < l && k <= row + x) sums[x] += A[packed(row + x) + k] * s;
        }
        FLEXLORA_UNROLL
        for (int x = 0; x < STRIP_ROWS; ++x) strip[(row - first + x) * l + j] = sums[x];
    });
}

// Rows first … of small = strip·Aᵀ, and the columns they mirror. Whether all of this thread's entries are finite.
template <typename Block>
FLEXLORA_DEVICE bool multiply_back(Block& block, const double* A, const double* strip, double* small, int l,
                                   int first) {
    bool good = true;
    for_each(block, STRIP / STRIP_ROWS * l, [&](int task) {
        const int row = first + task / l * STRIP_ROWS, j = task % l;
        if (row >= l || j >= row + STRIP_ROWS) return;
        double sums[STRIP_ROWS] = {};
        for (int k = 0; k <= j; ++k) {
            const double a = A[packed(j) + k];
            FLEXLORA_UNROLL
            for (int x = 0; x < STRIP_ROWS; ++x) sums[x] += strip[(row - first + x) * l + k] * a;
        }
        FLEXLORA_UNROLL
        for (int x = 0; x < STRIP_ROWS; ++x) {
            const int i = row + x;
            if (i >= l || j > i) continue;
            good &= finite(sums[x]);
            small[static_cast<size_t>(i) * l + j] = sums[x];
            small[static_cast<size_t>(j) * l + i] = sums[x];
        }
    });
    return good;
}

// Matrix `layer` of flexlora_ritz.
template <typename Block>
FLEXLORA_DEVICE void ritz(Block& block, const double* G, const double* C, double* T, double* small, flag* shifted,
                          flag* spoiled, double* workspace, int l, size_t layer, double* shared) {
    const size_t at = layer * l * l;
    double* const strip = shared + whitening_doubles(l);
    double* const A = workspace ? workspace + 2 * layer * packed(l) : strip + STRIP * l;
    double* const S = A + packed(l);
    const Whitening w(A, shared, l);
    const bool was_shifted = factor(block, G + at, w);
    pack_transposed(block, w);
    write_upper(block, A, l, T + at, static_cast<float*>(nullptr));
    for_entries(block, l, l, [&](int i, int j) {
        if (i >= j) S[slot(i, j)] = C[at + static_cast<size_t>(i) * l + j];
    });
    block.sync();
    for_entries(block, l, l, [&](int j, int i) {
        if (i > j) S[slot(i, j)] = (S[slot(i, j)] + C[at + static_cast<size_t>(j) * l + i]) / 2;
    });
    block.sync();
    bool good = true;
    for (int first = 0; first < l; first += STRIP) {
        multiply_strip(block, A, S, strip, l, first);
        block.sync();
        good &= multiply_back(block, A, strip, small + at, l, first);
        block.sync();
    }
    const bool was_spoiled = block.any(!good);
    if (was_spoiled) for_entries(block, l, l, [&](int i, int j) { small[at + static_cast<size_t>(i) * l + j] = 0.0; });
    if (block.rank() == 0) {
        shifted[layer] = was_shifted;
        spoiled[layer] = was_spoiled;
    }
}

constexpr int SQUARE = 32;

FLEXLORA_FORMULA long long rotate_shared(int l) { return 8LL * 2 * SQUARE * (l | 1); }

// What flexlora_rotate works on.
struct Rotation {
    const double *T, *vectors, *values;
    const flag* spoiled;
    float *rotation, *scaled;
    double* found;
    int l, k;
};

// What flexlora_rotate's `found` has in column j.
FLEXLORA_DEVICE double found_value(const Rotation& r, size_t layer, int j) {
    const double value = r.values[layer * r.l + r.l - 1 - j];
    if (r.spoiled[layer]) return sqrt(-1.0);
    const double clamped = value < 0 ? 0.0 : value;  // NaN stays
    return r.scaled ? sqrt(clamped) : clamped;
}

// 32×32 entries of matrix `layer`: `square` counts them row by row.
template <typename Block>
FLEXLORA_DEVICE void rotate(Block& block, const Rotation& r, size_t layer, int square, double* shared) {
    const int l = r.l, across = (r.k + SQUARE - 1) / SQUARE, ld = l | 1;
    const int row = square / across * SQUARE, column = square % across * SQUARE;
    const double* const T = r.T + layer * l * l;
    const double* const vectors = r.vectors + layer * l * l;
    double *const left = shared, *const right = shared + SQUARE * ld;
    for_entries(block, SQUARE, l, [&](int i, int p) {
        left[i * ld + p] = row + i < l ? T[static_cast<size_t>(row + i) * l + p] : 0.0;
        // The largest eigenvalue is the last.
        right[i * ld + p] = column + i < r.k ? vectors[static_cast<size_t>(l - 1 - column - i) * l + p] : 0.0;
    });
    block.sync();
    const double largest = r.scaled ? found_value(r, layer, 0) : 0.0;
    for_entries(block, SQUARE, SQUARE, [&](int i, int j) {
        if (row + i >= l || column + j >= r.k) return;
        double sum = 0;
        for (int p = row + i; p < l; ++p) sum += left[i * ld + p] * right[j * ld + p];
        const size_t at = (layer * l + row + i) * r.k + column + j;
        r.rotation[at] = static_cast<float>(sum);
        if (!r.scaled) return;
        const double S = found_value(r, layer, column + j);
        r.scaled[at] = static_cast<float>(1e-7 * largest < S ? sum / S : 0 * sum);
    });
    if (row == 0)
        for_each(block, SQUARE, [&](int j) {
            if (column + j < r.k) r.found[layer * r.k + column + j] = found_value(r, layer, column + j);
        });
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_ritz(const double* G, const double* C, double* T, double* small, flexlora::flag* shifted,
                  flexlora::flag* spoiled, double* workspace, int l) {
    flexlora::Threads block;
    flexlora::ritz(block, G, C, T, small, shifted, spoiled, workspace, l, blockIdx.x, flexlora_shared);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_rotate(const double* T, const double* vectors, const double* values, const flexlora::flag* spoiled,
                    float* rotation, float* scaled, double* found, int l, int k) {
    flexlora::Threads block;
    const flexlora::Rotation r{T, vectors, values, spoiled, rotation, scaled, found, l, k};
    flexlora::rotate(block, r, blockIdx.y, blockIdx.x, flexlora_shared);
}
#endif
