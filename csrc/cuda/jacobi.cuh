// One-sided Jacobi (Hestenes): plane rotations of the columns of A (l×l float64) until all are orthogonal, A·V = U·Σ.
// A pair a, b of columns with α = ‖a‖², β = ‖b‖², γ = aᵀb is turned by t = sign(ζ)/(|ζ| + √(1 + ζ²)), ζ = (β − α)/2γ
// (Golub and Van Loan, Matrix Computations, 4th edition, section 8.6.3; the parallel order is round-robin: in each of
// l − 1 rounds every column meets one other). Pairs of |γ| ≤ √(αβ)·√l·2⁻⁵² stay as they are, so that what comes out is
// orthogonal to that, down to columns of 1e-70 of the largest entry, where squares of squares vanish (Demmel and
// Veselić, SIAM J. Matrix Anal. Appl. 13, 1992). Columns are not sorted on the way: that doubled the sweeps of this
// order (l = 80, values 1/j: 9 without, 18 with).
//
// flexlora_jacobi_eigh: of a symmetric C, the columns of C + ‖C‖_F·I are rotated, which is positive semidefinite, and
// so the normalised columns are the eigenvectors, and their norms less ‖C‖_F the eigenvalues. No V is gathered: l×l
// numbers are all that is needed. Errors are a multiple of 2⁻⁵²·‖C‖_F, as those of the usual solvers. 9 to 11 sweeps
// for spectra that decay, 17 where most of the spectrum is nearly 0. The twin: eigh_small of
// flexlora_fast/backends/reference.py.
// flexlora_jacobi_svd: A = U·diag(S)·Vᵀ with V gathered. Columns of U whose S is 0 are 0. The twin: torch.linalg.svd.
//
// Kernels (one thread block a matrix, grid L; block 8·⌈l/2⌉ rounded up to a multiple of 32, 512 at most: 8 threads for
// each pair):
//   flexlora_jacobi_eigh(C, values, vectors, converged, workspace, l)
//       C (L, l, l), of which the symmetric part counts -> values (L, l) ascending and vectors (L, l, l) with
//       eigenvector j in row j, as cusolverDnXsyevBatched leaves them; converged (L,) bool.
//   flexlora_jacobi_svd(A, U, S, V, converged, workspace, l)
//       A (L, l, l) -> U, V (L, l, l) row by row, S (L, l) descending; converged (L,) bool.
// What is not finite gives NaN, and converged false, as 60 sweeps without an end do.
// Shared bytes: 8·(l·s + 3·l) with s = l + 1 − l mod 2 for eigh, 8·(2·l·s + 3·l) for svd, workspace = null: up to
// l = 168 and 119 in 227 KB, 142 and 101 in 163 KB. Otherwise 8·3·l, and the matrices go through L2: workspace has
// L·l·s doubles for eigh, 2·L·l·s for svd.

#pragma once

#include "block.cuh"
#include "platform.cuh"

namespace flexlora {

constexpr int SWEEPS = 60;
constexpr double ROUNDING = 2.220446049250313e-16;  // 2⁻⁵²

// Distance of columns: odd, for different banks.
FLEXLORA_FORMULA int column_stride(int l) { return l | 1; }

FLEXLORA_FORMULA int jacobi_matrix(int l) { return l * column_stride(l); }

FLEXLORA_FORMULA long long jacobi_shared(int l, int matrices) { return 8LL * (matrices * jacobi_matrix(l) + 3 * l); }

// Turns columns i and j of A, and those of V where there is one; whether they were not orthogonal. One team.
template <typename Block>
FLEXLORA_DEVICE bool rotate_pair(Block& block, double* A, double* V, int l, int i, int j) {
    const int stride = column_stride(l);
    double *const a = A + i * stride, *const b = A + j * stride;
    double alpha = 0, beta = 0, gamma = 0;
    for (int x = block.lane(); x < l; x += block.lanes()) {
        alpha += a[x] * a[x];
        beta += b[x] * b[x];
        gamma += a[x] * b[x];
    }
    alpha = block.sum(alpha), beta = block.sum(beta), gamma = block.sum(gamma);
    if (!(gamma * gamma > ROUNDING * ROUNDING * l * alpha * beta)) return false;
    const double zeta = (beta - alpha) / (2 * gamma);
    // The square of a large one can overflow, and adds nothing.
    const double t = fabs(zeta) > 1e8 ? 0.5 / zeta : (zeta < 0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
    // Rutishauser's form (Numer. Math. 9, 1966): small turns round small changes, and leave the rest as it is.
    const double root = sqrt(1 + t * t), s = t / root, tau = t / (1 + root);
    const auto turn = [&](double* left, double* right) {
        for (int x = block.lane(); x < l; x += block.lanes()) {
            const double old = left[x];
            left[x] -= s * (right[x] + tau * old);
            right[x] += s * (old - tau * right[x]);
        }
    };
    turn(a, b);
    if (V) turn(V + i * stride, V + j * stride);
    return true;
}

// Rotates until nothing is left to do; false, for all threads alike, where that does not happen.
template <typename Block>
FLEXLORA_DEVICE bool orthogonalise(Block& block, double* A, double* V, int l) {
    const int players = l + l % 2, rounds = players - 1;  // an odd one pauses
    for (int sweep = 0; sweep < SWEEPS; ++sweep) {
        bool busy = false;
        for (int round = 0; round < rounds; ++round) {
            for (int pair = block.team(); pair < players / 2; pair += block.teams()) {
                const int i = pair ? (round + pair) % rounds : players - 1, j = (round + rounds - pair) % rounds;
                if (i < l && j < l) busy |= rotate_pair(block, A, V, l, i < j ? i : j, i < j ? j : i);
            }
            block.sync();
        }
        if (!block.any(busy)) return true;
    }
    return false;
}

// norms[j] = ‖column j‖ and place[j] = how many columns are longer, or as long and before it. Ends with a sync().
template <typename Block>
FLEXLORA_DEVICE void measure(Block& block, const double* A, double* norms, int* place, int l) {
    for (int j = block.team(); j < l; j += block.teams()) {
        double square = 0;
        for (int x = block.lane(); x < l; x += block.lanes())
            square += A[j * column_stride(l) + x] * A[j * column_stride(l) + x];
        square = block.sum(square);
        if (block.lane() == 0) norms[j] = sqrt(square);
    }
    block.sync();
    for_each(block, l, [&](int j) {
        int longer = 0;
        for (int i = 0; i < l; ++i) longer += norms[i] > norms[j] || (norms[i] == norms[j] && i < j);
        place[j] = longer;
    });
    block.sync();
}

// A power of two that brings the largest entry of A near 1, where squares neither overflow nor vanish, for all threads
// alike; A is multiplied by it. Ends with a sync().
template <typename Block>
FLEXLORA_DEVICE double scale_to_one(Block& block, double* A, double* largest, int l) {
    const int stride = column_stride(l);
    for_each(block, l, [&](int j) {
        double most = 0;
        for (int i = 0; i < l; ++i) most = fabs(A[j * stride + i]) > most ? fabs(A[j * stride + i]) : most;
        largest[j] = most;
    });
    block.sync();
    double most = 0;
    for (int j = 0; j < l; ++j) most = largest[j] > most ? largest[j] : most;
    int exponent = 0;
    frexp(most, &exponent);
    const double scale = ldexp(1.0, exponent < -1000 ? 1000 : exponent > 1000 ? -1000 : -exponent);
    for_entries(block, l, l, [&](int j, int i) { A[j * stride + i] *= scale; });
    block.sync();
    return scale;
}

// scale·(the symmetric part of C) + shift·I, column by column in A: `scale`, a power of two, and `shift` for all
// threads alike. False where C is not finite. Ends with a sync().
template <typename Block>
FLEXLORA_DEVICE bool load_shifted(Block& block, const double* C, double* A, double* sums, int l, double& scale,
                                  double& shift) {
    const int stride = column_stride(l);
    bool good = true;
    for_entries(block, l, l, [&](int i, int j) {
        const double x = C[static_cast<size_t>(i) * l + j];
        good &= finite(x);
        A[i * stride + j] = x;
    });
    if (block.any(!good)) return false;
    for_entries(block, l, l, [&](int i, int j) {
        if (j >= i) return;
        // Each pair of entries belongs to one thread.
        A[i * stride + j] = A[j * stride + i] = A[i * stride + j] / 2 + A[j * stride + i] / 2;
    });
    block.sync();
    scale = scale_to_one(block, A, sums, l);
    for_each(block, l, [&](int j) {
        double square = 0;
        for (int i = 0; i < l; ++i) square += A[j * stride + i] * A[j * stride + i];
        sums[j] = square;
    });
    block.sync();
    double square = 0;
    for (int j = 0; j < l; ++j) square += sums[j];
    shift = sqrt(square);
    for_each(block, l, [&](int j) { A[j * stride + j] += shift; });
    block.sync();
    return true;
}

// Matrix `layer` of flexlora_jacobi_eigh.
template <typename Block>
FLEXLORA_DEVICE void jacobi_eigh(Block& block, const double* C, double* values, double* vectors, flag* converged,
                                 double* workspace, int l, size_t layer, double* shared) {
    const size_t at = layer * l * l;
    const int stride = column_stride(l);
    double *const norms = shared, *const sums = shared + l;
    int* const place = reinterpret_cast<int*>(shared + 2 * l);
    double* const A = workspace ? workspace + layer * jacobi_matrix(l) : shared + 3 * l;
    double scale = 1, shift = 0;
    const bool good = load_shifted(block, C + at, A, sums, l, scale, shift);
    const bool done = good && orthogonalise(block, A, static_cast<double*>(nullptr), l);
    if (good) measure(block, A, norms, place, l);
    const double nan = sqrt(-1.0);
    for_entries(block, l, l, [&](int j, int x) {
        // A matrix of zeros keeps the identity as its vectors.
        const double unit = norms[j] > 0 ? A[j * stride + x] / norms[j] : x == j ? 1.0 : 0.0;
        const int row = good ? l - 1 - place[j] : j;
        vectors[at + static_cast<size_t>(row) * l + x] = good ? unit : nan;
    });
    for_each(block, l, [&](int j) {
        const int row = good ? l - 1 - place[j] : j;
        values[layer * l + row] = good ? (norms[j] - shift) / scale : nan;
    });
    if (block.rank() == 0) converged[layer] = done;
}

// Matrix `layer` of flexlora_jacobi_svd.
template <typename Block>
FLEXLORA_DEVICE void jacobi_svd(Block& block, const double* A, double* U, double* S, double* V, flag* converged,
                                double* workspace, int l, size_t layer, double* shared) {
    const size_t at = layer * l * l;
    const int stride = column_stride(l);
    double* const norms = shared;
    int* const place = reinterpret_cast<int*>(shared + 2 * l);
    double* const left = workspace ? workspace + 2 * layer * jacobi_matrix(l) : shared + 3 * l;
    double* const right = left + jacobi_matrix(l);
    bool good = true;
    for_entries(block, l, l, [&](int i, int j) {
        const double x = A[at + static_cast<size_t>(i) * l + j];
        good &= finite(x);
        left[j * stride + i] = x;
        right[j * stride + i] = i == j ? 1.0 : 0.0;
    });
    good = !block.any(!good);
    const double scale = good ? scale_to_one(block, left, shared + l, l) : 1.0;
    const bool done = good && orthogonalise(block, left, right, l);
    if (good) measure(block, left, norms, place, l);
    const double nan = sqrt(-1.0);
    for_entries(block, l, l, [&](int i, int j) {
        const size_t to = at + static_cast<size_t>(i) * l + (good ? place[j] : j);
        const double unit = norms[j] > 0 ? left[j * stride + i] / norms[j] : 0.0;
        U[to] = good ? unit : nan;
        V[to] = good ? right[j * stride + i] : nan;
    });
    for_each(block, l, [&](int j) { S[layer * l + (good ? place[j] : j)] = good ? norms[j] / scale : nan; });
    if (block.rank() == 0) converged[layer] = done;
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(512, 1)
    flexlora_jacobi_eigh(const double* C, double* values, double* vectors, flexlora::flag* converged, double* workspace,
                         int l) {
    flexlora::Threads block;
    flexlora::jacobi_eigh(block, C, values, vectors, converged, workspace, l, blockIdx.x, flexlora_shared);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    flexlora_jacobi_svd(const double* A, double* U, double* S, double* V, flexlora::flag* converged, double* workspace,
                        int l) {
    flexlora::Threads block;
    flexlora::jacobi_svd(block, A, U, S, V, converged, workspace, l, blockIdx.x, flexlora_shared);
}
#endif
