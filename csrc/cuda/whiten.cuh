// T (l×l, upper triangular, float64) with Tᵀ·G·T = I for Gram matrices G, by Cholesky's factorisation of the unit
// diagonal form: G = D·U·D, U = L·Lᵀ, T = D⁻¹·L⁻ᵀ. Where U is too near to a singular matrix for its pivots to be more
// than rounding, that of U + 1e-5·I (shifted Cholesky QR: Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, SIAM J.
// Sci. Comput. 42, 2020). The twin: whiten and condition of flexlora_fast/backends/small.py.
//
// Kernels (one thread block of 256 a matrix, grid = number of matrices):
//   flexlora_whiten(gram, T, T32, shifted, workspace, l)     gram (L, l, l) float64 -> T (L, l, l) float64 and T32, the
//       same in float32 (either may be null), shifted (L,) bool
//   flexlora_condition(gram, T32, workspace, l)              always with the shift, float32 only
// Shared bytes: 8·(l(l+1)/2 + 10·l + 8) with workspace = null, up to l = 230 in the 227 KB of sm_90 and l = 194 in the
// 163 KB of sm_80. Otherwise 8·(10·l + 8), and the packed matrix goes through L2: workspace has L·l(l+1)/2 doubles.

#pragma once

#include "block.cuh"
#include "eliminate.cuh"
#include "platform.cuh"

namespace flexlora {

// Unit columns whose part outside the columns before them is smaller have lost it to float32 rounding of the products.
constexpr double SHARE = 3e-3;
constexpr double SHIFT = 1e-5;
// Squares of columns that vanish: float32 products can leave one that is not even positive.
constexpr double VANISHED = 1e-60;

FLEXLORA_FORMULA int whitening_doubles(int l) { return elimination_doubles(l) + l; }

FLEXLORA_FORMULA long long whiten_shared(int l, bool in_shared) {
    return 8LL * (whitening_doubles(l) + (in_shared ? packed(l) : 0));
}

// The memory of one matrix: the packed matrix, norms of its columns, and what elimination needs.
struct Whitening {
    double* norms;  // l: inverse norms
    Elimination elimination;

    FLEXLORA_DEVICE Whitening(double* matrix, double* shared, int l)
        : norms(shared), elimination(matrix, shared + l, l) {}
};

// e.A = the symmetric part of `gram` (l×l) with unit diagonal, plus shift·I, and the norms taken out. False, for all
// threads alike, where that is not finite: the identity stands for it. Ends with a sync().
template <typename Block>
FLEXLORA_DEVICE bool load_unit(Block& block, const double* gram, double shift, const Whitening& w,
                               double vanished = VANISHED) {
    const int l = w.elimination.l;
    double* const A = w.elimination.A;
    for_each(block, l, [&](int i) {
        const double square = gram[static_cast<size_t>(i) * l + i];
        w.norms[i] = square > vanished ? 1 / sqrt(square) : 0.0;
    });
    // Both triangles are read along their rows, so one after the other.
    for_entries(block, l, l, [&](int i, int j) {
        if (i >= j) A[slot(i, j)] = gram[static_cast<size_t>(i) * l + j];
    });
    block.sync();
    bool bad = false;
    for_entries(block, l, l, [&](int j, int i) {
        if (i < j) return;
        const double unit = (A[slot(i, j)] + gram[static_cast<size_t>(j) * l + i]) / 2 * w.norms[j] * w.norms[i];
        bad |= !finite(unit);
        A[slot(i, j)] = i == j ? unit + shift : unit;
    });
    bad = block.any(bad);
    if (!bad) return true;
    for_entries(block, l, l, [&](int i, int j) {
        if (i >= j) A[slot(i, j)] = i == j ? 1 + shift : 0.0;
    });
    block.sync();
    return false;
}

// The factor with the shift, as load_unit and eliminate leave it; the identity, in place of a factor, where there is
// none.
template <typename Block>
FLEXLORA_DEVICE void factor_shifted(Block& block, const double* gram, const Whitening& w) {
    const Elimination& e = w.elimination;
    load_unit(block, gram, SHIFT, w);
    if (eliminate(block, e, [](double d) { return d > 0; })) return;
    block.sync();
    for_entries(block, e.l, e.l, [&](int i, int j) {
        if (i > j) e.A[slot(i, j)] = 0.0;
    });
    for_each(block, e.l, [&](int i) { e.pivots[i] = 1.0; });
}

// The factor of the unit diagonal form of `gram`, and whether it had to be shifted.
template <typename Block>
FLEXLORA_DEVICE bool factor(Block& block, const double* gram, const Whitening& w) {
    const bool usable = load_unit(block, gram, 0.0, w);
    if (usable && eliminate(block, w.elimination, [](double d) { return sqrt(d) > SHARE; })) return false;
    factor_shifted(block, gram, w);
    return true;
}

// Packs Tᵀ in place of what `factor` left: the entry {i, j}, j ≤ i, becomes T[j][i].
template <typename Block>
FLEXLORA_DEVICE void pack_transposed(Block& block, const Whitening& w) {
    const Elimination& e = w.elimination;
    for_each(block, e.l, [&](int i) { e.pivots[i] = 1 / sqrt(e.pivots[i]); });
    block.sync();
    for_entries(block, e.l, e.l, [&](int i, int j) {
        if (j > i) return;
        const double factor_entry = i == j ? 1.0 : e.A[slot(i, j)];
        e.A[slot(i, j)] = factor_entry * e.pivots[i] * w.norms[j];
    });
    block.sync();
}

// T (l×l) from its packed transpose; null outputs are left out.
template <typename Block>
FLEXLORA_DEVICE void write_upper(Block& block, const double* A, int l, double* T, float* T32) {
    for_entries(block, l, l, [&](int i, int j) {
        const double x = i <= j ? A[slot(j, i)] : 0.0;
        const size_t at = static_cast<size_t>(i) * l + j;
        if (T) T[at] = x;
        if (T32) T32[at] = static_cast<float>(x);
    });
}

// Matrix `layer` of flexlora_whiten.
template <typename Block>
FLEXLORA_DEVICE void whiten(Block& block, const double* gram, double* T, float* T32, flag* shifted, double* workspace,
                            int l, size_t layer, double* shared) {
    const size_t at = layer * l * l;
    double* const matrix = workspace ? workspace + layer * packed(l) : shared + whitening_doubles(l);
    const Whitening w(matrix, shared, l);
    const bool was_shifted = factor(block, gram + at, w);
    if (block.rank() == 0) shifted[layer] = was_shifted;
    pack_transposed(block, w);
    write_upper(block, matrix, l, T ? T + at : nullptr, T32 ? T32 + at : nullptr);
}

// Matrix `layer` of flexlora_condition.
template <typename Block>
FLEXLORA_DEVICE void condition(Block& block, const double* gram, float* T32, double* workspace, int l, size_t layer,
                               double* shared) {
    const size_t at = layer * l * l;
    double* const matrix = workspace ? workspace + layer * packed(l) : shared + whitening_doubles(l);
    const Whitening w(matrix, shared, l);
    factor_shifted(block, gram + at, w);
    pack_transposed(block, w);
    write_upper(block, matrix, l, static_cast<double*>(nullptr), T32 + at);
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_whiten(const double* gram, double* T, float* T32, flexlora::flag* shifted, double* workspace, int l) {
    flexlora::Threads block;
    flexlora::whiten(block, gram, T, T32, shifted, workspace, l, blockIdx.x, flexlora_shared);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_condition(const double* gram, float* T32, double* workspace, int l) {
    flexlora::Threads block;
    flexlora::condition(block, gram, T32, workspace, l, blockIdx.x, flexlora_shared);
}
#endif
