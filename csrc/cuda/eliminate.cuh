// Symmetric elimination in place: from a positive definite A (l×l, packed) the triangular W with W·A·Wᵀ diagonal.
//
// With pivots p₁, p₂ … and x the packed entries, pivot p of value d turns every other entry {i, j} with i or j not yet
// eliminated into x{i,j} − x{i,p}·x{j,p}/d, and then x{i,p} into −x{i,p}/d where i is not yet eliminated: what is left
// of A and what is there of W never need the same place, since W has an entry {i, p} only where A no longer does. In
// the end the entry {r, p} is W[r][p] for the later r (unit diagonal), and W·A·Wᵀ = diag(d).
// Source: the L·D·Lᵀ form of Cholesky's factorisation with L inverted on the way (Golub and Van Loan, Matrix
// Computations, 4th edition, sections 4.1.2 and 3.1; the in-place bookkeeping is that of the sweep operator, Goodnight,
// The American Statistician 33, 1979). Rounding is that of Cholesky and of substitution column by column.
//
// Blocked: 8 pivots at a time are eliminated from their own columns only, which takes one sync() each, and then from
// everything in one go. A thread has 4×4 entries, so that each of 8 columns read serves 4 times.

#pragma once

#include "platform.cuh"

namespace flexlora {

constexpr int PANEL = 8;
constexpr int TILE = 4;
constexpr int SEARCHERS = 16;

// Doubles beside the packed matrix: 8 columns, their inverse pivots, and one double for each pivot.
FLEXLORA_FORMULA int elimination_doubles(int l) { return (PANEL + 1) * l + PANEL; }

struct Elimination {
    int l;
    double* A;  // packed
    double* columns;  // PANEL × l: columns[k * l + i] is x{i, p_k} when p_k was eliminated
    double* inverse;  // PANEL: 1 / d_k
    double* pivots;  // l: d of each index

    FLEXLORA_DEVICE Elimination(double* packed_matrix, double* more, int size)
        : l(size), A(packed_matrix), columns(more), inverse(more + PANEL * size), pivots(inverse + PANEL) {}
};

// Pivots in their own order. At the first for which `good(d)` does not hold the elimination is given up.
struct InOrder {
    FLEXLORA_DEVICE int when(int i) const { return i; }
};

// Entry i of the column of the k-th pivot p of a panel, by the pivots p_0 … p_{k−1} before it; `place` is i's own place
// in the panel if it is one of those, and otherwise −1. Not for i = p where `A` has no diagonal any more.
FLEXLORA_DEVICE double panel_entry(const Elimination& e, int i, int p, int k, int place) {
    const int l = e.l;
    double x = place < 0 ? e.A[slot(i, p)] : -e.columns[place * l + p] * e.inverse[place];
    for (int before = place + 1; before < k; ++before)
        x -= e.columns[before * l + i] * (e.columns[before * l + p] * e.inverse[before]);
    return x;
}

// Takes the `count` pivots of a panel, which began when `start` were eliminated, out of everything else.
// order.when(i): how many were eliminated before i; at least start + count where it is not yet.
template <typename Block, typename Order>
FLEXLORA_DEVICE void update_outside(Block& block, const Elimination& e, int start, int count, const Order& order) {
    const int l = e.l, end = start + count, part = (l + TILE - 1) / TILE, tiles = packed(part);
    for (int t = block.rank(); t < tiles; t += block.size()) {
        // Rows a, a + part, … and columns b, b + part, …, so that neighbouring threads read neighbouring entries.
        int a = static_cast<int>((sqrt(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) / 2.0f);
        while (packed(a + 1) <= t) ++a;
        while (packed(a) > t) --a;
        const int b = t - packed(a);
        double sums[TILE][TILE] = {};
        for (int k = 0; k < count; ++k) {
            double left[TILE], right[TILE];
            FLEXLORA_UNROLL
            for (int x = 0; x < TILE; ++x) {
                const int i = a + part * x, j = b + part * x;
                left[x] = i < l ? e.columns[k * l + i] : 0.0;
                right[x] = j < l ? e.columns[k * l + j] * e.inverse[k] : 0.0;
            }
            FLEXLORA_UNROLL
            for (int x = 0; x < TILE; ++x)
                FLEXLORA_UNROLL
                for (int y = 0; y < TILE; ++y) sums[x][y] += left[x] * right[y];
        }
        FLEXLORA_UNROLL
        for (int x = 0; x < TILE; ++x) {
            const int i = a + part * x;
            FLEXLORA_UNROLL
            for (int y = 0; y < TILE; ++y) {
                const int j = b + part * y;
                if (i >= l || j >= l || (a == b && x < y)) continue;
                const int first = order.when(i), second = order.when(j);
                const bool both_done = first < start && second < start;
                const bool in_panel = (first >= start && first < end) || (second >= start && second < end);
                if (!both_done && !in_panel) e.A[slot(i, j)] -= sums[x][y];
            }
        }
    }
}

// Writes the entries {i, p} of a panel's pivots; `pivot_at(k)` is the k-th, the rest as in update_outside.
template <typename Block, typename Order, typename PivotAt>
FLEXLORA_DEVICE void write_panel(Block& block, const Elimination& e, int start, int count, const Order& order,
                                 PivotAt pivot_at) {
    const int l = e.l;
    for_entries(block, count, l, [&](int k, int i) {
        const int p = pivot_at(k), when = order.when(i);
        if (when < start) {
            e.A[slot(i, p)] = e.columns[k * l + i];
        } else if (when >= start + count) {
            e.A[slot(i, p)] = panel_entry(e, p, i, count, k);
        } else if (when < start + k) {
            e.A[slot(i, p)] = e.columns[k * l + i];
        }
    });
}

// Eliminates all of e.A, pivots in order. False, for all threads alike and with A destroyed, at the first pivot d for
// which good(d) is false. Ends with a sync().
template <typename Block, typename Good>
FLEXLORA_DEVICE bool eliminate(Block& block, const Elimination& e, Good good) {
    const int l = e.l;
    const InOrder order;
    for (int start = 0; start < l; start += PANEL) {
        const int count = l - start < PANEL ? l - start : PANEL;
        for (int k = 0; k < count; ++k) {
            const int p = start + k;
            for_each(block, l, [&](int i) {
                const bool earlier = i >= start && i < p;
                const double x = panel_entry(e, i, p, k, earlier ? i - start : -1);
                e.columns[k * l + i] = x;
                if (i == p) {
                    e.pivots[p] = x;
                    e.inverse[k] = 1 / x;
                }
            });
            block.sync();
            if (!good(e.pivots[p])) return false;
        }
        update_outside(block, e, start, count, order);
        write_panel(block, e, start, count, order, [&](int k) { return start + k; });
        block.sync();
    }
    return true;
}

}  // namespace flexlora
