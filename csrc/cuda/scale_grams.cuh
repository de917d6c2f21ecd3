// G = PᵀP and M = QQᵀ (W×W float32) scaled in place, so that G has unit diagonal: with p, q the roots of the diagonals
// and c = d·p·q, G_ij becomes G_ij/p_i/p_j and M_ij becomes M_ij·r_i·r_j for r = c/q, where columns of zeros have a
// norm of 1; and the energy ⟨M, G⟩ of what comes out, summed in float64 from exact products. The twin: scale_grams
// of flexlora_fast/backends/small.py, whose roundings of G and M are kept bit for bit.
//
// Three kernels, in this order, each of blocks of 256:
//   flexlora_norms(G, M, d, p, r, bad, d_layer, W)    G, M (L, W, W), d float64 at layer·d_layer (0: the same for all)
//       -> p, r (L, W) float32, bad (L,) bool: norms or c outside 1e-12 … 1e12 and not 0, as not finite ones are.
//       Grid L, no shared memory.
//   flexlora_scale(G, M, p, r, parts, W)              G and M in place, parts (L, ⌈W/8⌉) float64.
//       Grid (⌈W/8⌉, L), shared bytes 2304.
//   flexlora_energy(parts, energy, count)             energy (L,) float64 for count = ⌈W/8⌉. Grid L, shared bytes 2304.
// W is limited by the memory of G and M alone. Sums have one order: 256 sums of every 256th column (or part), of which
// 32 sums of every 32nd, and these one after the other.

#pragma once

#include "block.cuh"
#include "platform.cuh"

namespace flexlora {

constexpr int LANES = 256;
constexpr int ROWS = 8;
constexpr int FINAL = 32;

FLEXLORA_FORMULA long long total_shared() { return 8LL * (LANES + FINAL); }

// The sum of f(lane) over LANES lanes, for the thread of rank 0; the others get nothing of use.
template <typename Block, typename F>
FLEXLORA_DEVICE double total(Block& block, double* shared, F f) {
    for_each(block, LANES, [&](int lane) { shared[lane] = f(lane); });
    block.sync();
    double* const sums = shared + LANES;
    for_each(block, FINAL, [&](int i) {
        double sum = 0;
        for (int x = i; x < LANES; x += FINAL) sum += shared[x];
        sums[i] = sum;
    });
    block.sync();
    double sum = 0;
    if (block.rank() == 0)
        for (int i = 0; i < FINAL; ++i) sum += sums[i];
    return sum;
}

FLEXLORA_DEVICE bool in_range(double x) { return x == 0 || (x > 1e-12 && x < 1e12); }

// Layer `layer` of flexlora_norms.
template <typename Block>
FLEXLORA_DEVICE void norms(Block& block, const float* G, const float* M, const double* d, float* p, float* r, flag* bad,
                           long long d_layer, int W, size_t layer) {
    bool out = false;
    for_each(block, W, [&](int i) {
        const size_t at = (layer * W + i) * W + i;
        const double left = sqrt(static_cast<double>(G[at])), right = sqrt(static_cast<double>(M[at]));
        const double c = d[layer * d_layer + i] * left * right;
        out |= !in_range(left) || !in_range(right) || !in_range(fabs(c));
        p[layer * W + i] = left > 0 ? static_cast<float>(left) : 1.0f;
        const float q = right > 0 ? static_cast<float>(right) : 1.0f;
        r[layer * W + i] = static_cast<float>(c / static_cast<double>(q));
    });
    out = block.any(out);
    if (block.rank() == 0) bad[layer] = out;
}

// Rows 8·part … of layer `layer` of flexlora_scale.
template <typename Block>
FLEXLORA_DEVICE void scale(Block& block, float* G, float* M, const float* p, const float* r, double* parts, int W,
                           int part, int count, size_t layer, double* shared) {
    const float *const norms = p + layer * W, *const factors = r + layer * W;
    const int first = part * ROWS;
    const double sum = total(block, shared, [&](int lane) {
        double mine = 0;
        for (int j = lane; j < W; j += LANES) {
            const float column = norms[j], factor = factors[j];
            FLEXLORA_UNROLL
            for (int x = 0; x < ROWS; ++x) {
                const int i = first + x;
                if (i >= W) continue;
                const size_t at = (layer * W + i) * W + j;
                const float g = G[at] / norms[i] / column, m = M[at] * factors[i] * factor;
                G[at] = g;
                M[at] = m;
                mine += static_cast<double>(g) * static_cast<double>(m);
            }
        }
        return mine;
    });
    if (block.rank() == 0) parts[layer * count + part] = sum;
}

// Layer `layer` of flexlora_energy.
template <typename Block>
FLEXLORA_DEVICE void energy(Block& block, const double* parts, double* out, int count, size_t layer, double* shared) {
    const double sum = total(block, shared, [&](int lane) {
        double mine = 0;
        for (int i = lane; i < count; i += LANES) mine += parts[layer * count + i];
        return mine;
    });
    if (block.rank() == 0) out[layer] = sum;
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_norms(const float* G, const float* M, const double* d, float* p, float* r, flexlora::flag* bad,
                   long long d_layer, int W) {
    flexlora::Threads block;
    flexlora::norms(block, G, M, d, p, r, bad, d_layer, W, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_scale(float* G, float* M, const float* p, const float* r, double* parts, int W) {
    flexlora::Threads block;
    const int count = static_cast<int>(gridDim.x);
    flexlora::scale(block, G, M, p, r, parts, W, blockIdx.x, count, blockIdx.y, flexlora_shared);
}

extern "C" __global__ void __launch_bounds__(256, 2) flexlora_energy(const double* parts, double* energy, int count) {
    flexlora::Threads block;
    flexlora::energy(block, parts, energy, count, blockIdx.x, flexlora_shared);
}
#endif
