// T with orthonormal columns in Y·T, from the Gram matrix of Y (l×l float64): Cholesky QR with diagonal pivoting. With
// unit columns, the next pivot is the column of the largest part outside those before it, and when no part is above
// 1e-6 the rest is rounding of float32: its columns of T are zeros, and Y·T has zero columns at their places. Nothing
// is shifted, so what is kept is as orthonormal as rounding allows; done twice, to rounding of float32 (Yamamoto et
// al., ETNA 44, 2015; diagonal pivoting: Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, 10.3).
// The twin: orthonormalize and _inverse_root of flexlora_fast/backends/reference.py, which drops eigenvectors instead.
//
// A Gram matrix summed in float64 has errors of m·2⁻⁵³ at worst. For parts above 1e-5 they are far below the square,
// and a second pass has nothing left to lose; parts between 1e-6 and 1e-5 may come out of the first one skewed, and get
// a third: `again` says so, layer by layer, and is the `only` of that pass.
//
// Kernel (one thread block of 256 a matrix, grid = number of matrices):
//   flexlora_root(gram, T, rank, again, only, workspace, l)    gram (L, l, l) -> T (L, l, l) float64; rank (L,) int32:
//       columns kept, −1 and T = 0 where the Gram matrix is not finite; again (L,) bool, or null. only: null, or (L,)
//       bool of the layers to compute; nothing is written for others.
// Shared bytes: 8·(l(l+1)/2 + 12·l + 16) with workspace = null, up to l = 228 in 227 KB and l = 192 in 163 KB.
// Otherwise 8·(12·l + 16), and the packed matrix goes through L2: workspace has L·l(l+1)/2 doubles.

#pragma once

#include "eliminate.cuh"
#include "whiten.cuh"

namespace flexlora {

// Squares of the parts below which columns are dropped, and below which a third pass is due.
constexpr double DROPPED = 1e-12;
constexpr double SKEWED = 1e-10;

// whitening_doubles, the diagonal, and 2·l + SEARCHERS integers.
FLEXLORA_FORMULA int root_doubles(int l) { return whitening_doubles(l) + 2 * l + SEARCHERS / 2; }

FLEXLORA_FORMULA long long root_shared(int l, bool in_shared) {
    return 8LL * (root_doubles(l) + (in_shared ? packed(l) : 0));
}

// Pivots as they come.
struct Pivoting {
    double* diagonal;  // l: what is left of it
    int* found;  // SEARCHERS: where the largest entry of each is, or −1
    int* order;  // l: how many were eliminated before i; l where it is not yet
    int* pivot_at;  // l: the other way round
    int l;

    FLEXLORA_DEVICE Pivoting(double* memory, int size)
        : diagonal(memory),
          found(reinterpret_cast<int*>(memory + size)),
          order(found + SEARCHERS),
          pivot_at(order + size),
          l(size) {}
    FLEXLORA_DEVICE int when(int i) const { return order[i]; }
};

// The index of the largest diagonal entry not yet eliminated, the first of equals; −1 if none is above DROPPED.
// Before that, takes the square of `column`, times its inverse pivot, from the diagonal, where there is one.
template <typename Block>
FLEXLORA_DEVICE int next_pivot(Block& block, const Pivoting& order, const double* column, const double* inverse) {
    for_each(block, SEARCHERS, [&](int s) {
        double best = DROPPED;
        int index = -1;
        for (int i = s; i < order.l; i += SEARCHERS) {
            if (order.order[i] < order.l) continue;
            const double left = order.diagonal[i] - (column ? column[i] * column[i] * *inverse : 0.0);
            order.diagonal[i] = left;
            if (left > best) best = left, index = i;
        }
        order.found[s] = index;
    });
    block.sync();
    double best = DROPPED;
    int index = -1;
    for (int s = 0; s < SEARCHERS; ++s) {
        const int i = order.found[s];
        if (i < 0) continue;
        const double x = order.diagonal[i];
        if (x > best || (x == best && i < index)) best = x, index = i;
    }
    return index;
}

// Eliminates e.A by the largest pivots, until none is above DROPPED; how many there were. Ends with a sync().
template <typename Block>
FLEXLORA_DEVICE int eliminate_largest(Block& block, const Elimination& e, const Pivoting& order) {
    const int l = e.l;
    for_each(block, l, [&](int i) {
        order.order[i] = l;
        order.diagonal[i] = e.A[slot(i, i)];
    });
    block.sync();
    int done = 0;
    bool more = true;
    while (more && done < l) {
        const int start = done;
        int count = 0;
        for (; count < PANEL && done < l; ++count, ++done) {
            const double* const last = count ? e.columns + (count - 1) * l : nullptr;
            const int p = next_pivot(block, order, last, e.inverse + count - (count > 0));
            more = p >= 0;
            if (!more) break;
            for_each(block, l, [&](int i) {
                const int when = i == p ? l : order.order[i];
                double x = order.diagonal[i];
                if (i != p) x = panel_entry(e, i, p, count, when >= start && when < l ? when - start : -1);
                e.columns[count * l + i] = x;
                if (i != p) return;
                e.pivots[p] = x;
                e.inverse[count] = 1 / x;
                order.order[p] = done;
                order.pivot_at[done] = p;
            });
            block.sync();
        }
        update_outside(block, e, start, count, order);
        write_panel(block, e, start, count, order, [&](int k) { return order.pivot_at[start + k]; });
        // The search did not come to take the last column from the diagonal.
        if (more)
            for_each(block, l, [&](int i) {
                const double x = e.columns[(count - 1) * l + i];
                if (order.order[i] == l) order.diagonal[i] -= x * x * e.inverse[count - 1];
            });
        block.sync();
    }
    return done;
}

// Matrix `layer` of flexlora_root.
template <typename Block>
FLEXLORA_DEVICE void root(Block& block, const double* gram, double* T, int* rank, flag* again, const flag* only,
                          double* workspace, int l, size_t layer, double* shared) {
    if (only && !only[layer]) return;
    const size_t at = layer * l * l;
    double* const matrix = workspace ? workspace + layer * packed(l) : shared + root_doubles(l);
    const Whitening w(matrix, shared, l);
    const Elimination& e = w.elimination;
    const Pivoting order(shared + whitening_doubles(l), l);
    // Squares of float32 numbers are in float64's range: a column is zero, or it counts.
    const bool usable = load_unit(block, gram + at, 0.0, w, 0.0);
    const int kept = usable ? eliminate_largest(block, e, order) : 0;
    // Column p of T: row p of W, which has entries for the pivots before p.
    for_entries(block, l, l, [&](int i, int p) {
        double x = 0;
        if (usable && order.order[p] < l && order.order[i] <= order.order[p])
            x = (i == p ? 1.0 : e.A[slot(i, p)]) / sqrt(e.pivots[p]) * w.norms[i];
        T[at + static_cast<size_t>(i) * l + p] = x;
    });
    if (block.rank() != 0) return;
    rank[layer] = usable ? kept : -1;
    // The last pivot is the smallest.
    if (again) again[layer] = kept > 0 && e.pivots[order.pivot_at[kept - 1]] < SKEWED;
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_root(const double* gram, double* T, int* rank, flexlora::flag* again, const flexlora::flag* only,
                  double* workspace, int l) {
    flexlora::Threads block;
    flexlora::root(block, gram, T, rank, again, only, workspace, l, blockIdx.x, flexlora_shared);
}
#endif
