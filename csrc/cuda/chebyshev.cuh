// A step of the Chebyshev recurrence, entry by entry: out = a·product + b·now + c·before for (L, W, w) float32, with
// coefficients (L, w) float32 of each layer and column. What _filtered of flexlora_fast/lowrank/filtered.py does in
// eight passes over memory: its first step is a = ratio/half, b = −ratio, and a further one a = 2σ'/half, b = −2σ',
// c = −σ·σ' for σ' = 1/(2/ratio − σ).
//
// Kernel:
//   flexlora_chebyshev(product, now, before, out, a, b, c, W, w)    before = null: without the last term, and c
//       All contiguous; out may be one of the others. W·w, rounded up to a multiple of 1024, must be below 2³¹. Grid
//       (⌈W·w/1024⌉, L), block 256, no shared memory.

#pragma once

#include "block.cuh"
#include "platform.cuh"

namespace flexlora {

constexpr int CHUNK = 1024;  // entries of a thread block

struct Recurrence {
    const float *product, *now, *before;
    float* out;
    const float *a, *b, *c;
    int W, w;
};

// Entries CHUNK·chunk … of layer `layer`.
template <typename Block>
FLEXLORA_DEVICE void chebyshev(Block& block, const Recurrence& r, int chunk, size_t layer) {
    const int entries = r.W * r.w;
    const size_t start = layer * entries;
    for_each(block, CHUNK, [&](int i) {
        const int entry = chunk * CHUNK + i;
        if (entry >= entries) return;
        const size_t at = start + entry, column = layer * r.w + entry % r.w;
        float x = r.a[column] * r.product[at] + r.b[column] * r.now[at];
        if (r.before) x += r.c[column] * r.before[at];
        r.out[at] = x;
    });
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_chebyshev(const float* product, const float* now, const float* before, float* out, const float* a,
                       const float* b, const float* c, int W, int w) {
    flexlora::Threads block;
    const flexlora::Recurrence r{product, now, before, out, a, b, c, W, w};
    flexlora::chebyshev(block, r, blockIdx.x, blockIdx.y);
}
#endif
