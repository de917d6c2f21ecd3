// XᵀY in float64 for float32 panels X (m, w) and Y (m, v), which are never copied in float64: tiles of them go through
// shared memory, and products of 8×8×4 blocks, widened as they are read, to the float64 tensor cores (sm_80 and later).
// A product of two float32 numbers is exact in float64, so only the sums round. The twin: gram64 of
// flexlora_fast/backends/small.py.
//
// A thread block of 4 warps has 80×80 entries of the result: 2×2 warps, each every second 8×8 block of every second
// row of blocks, so that narrower panels and triangles keep all of them busy. 32 rows of the panels are computed with
// while the next 32 are on their way (cp.async).
//
// Kernels:
//   flexlora_gram64(X, Y, out, only, x_layer, x_row, y_layer, y_row, m, w, v, rows, symmetric)
//       X: layer λ, row r at X + λ·x_layer + r·x_row (long long, in floats), neighbouring columns side by side; Y
//       likewise. out (L, slices, w, v) float64, slice s the sum over the rows s·rows … min(m, (s + 1)·rows) − 1, for
//       slices = ⌈m / rows⌉ (1 for m = 0); with one slice that is the result. symmetric: X and Y are the same panel, or
//       the result is symmetric for other reasons: one triangle is computed, and mirrored if there is one slice.
//       only: null, or (L,) bool of the layers to compute; nothing is written for others.
//       Grid (tiles, slices, L) with tiles = ⌈w/80⌉·⌈v/80⌉, or n(n+1)/2 for n = ⌈w/80⌉ if symmetric; block 128; shared
//       bytes 45056.
//   flexlora_gram64_sum(parts, out, only, w, v, slices, symmetric)
//       parts (L, slices, w, v) as above -> out (L, w, v), summed slice after slice. Grid (⌈w/8⌉, L), block 256.

#pragma once

#include "block.cuh"
#include "platform.cuh"

namespace flexlora {

constexpr int SIDE = 80;  // of a tile
constexpr int BLOCKS = SIDE / 16;  // 8×8 blocks of a warp, in each direction
constexpr int WARPS = 4;
constexpr int DEPTH = 32;  // rows of the panels at a time
// Of a row of a tile in shared memory: 24 modulo 32, so that the 4×8 entries of a block lie in 32 banks.
constexpr int STRIDE = 88;
constexpr int STAGE = 2 * DEPTH * STRIDE;  // floats of two tiles

FLEXLORA_FORMULA long long gram64_shared() { return 2LL * STAGE * 4; }

struct Panels {
    const float *X, *Y;
    double* out;
    const flag* only;
    long long x_layer, x_row, y_layer, y_row;
    int m, w, v, rows, slices;
    bool symmetric;
};

// Starts copying rows `row` … `row + DEPTH − 1` (zeros from `end` on) and SIDE columns from `column` (zeros from
// `width` on) of a panel to `to`.
template <typename Block>
FLEXLORA_DEVICE void fetch(Block& block, float* to, const float* panel, long long stride, int row, int end, int column,
                           int width) {
    const bool aligned = stride % 4 == 0 && reinterpret_cast<size_t>(panel) % 16 == 0;
    for_each(block, DEPTH * (SIDE / 4), [&](int piece) {
        const int i = piece / (SIDE / 4), j = piece % (SIDE / 4) * 4;
        int count = row + i < end ? width - column - j : 0;
        count = count < 0 ? 0 : count > 4 ? 4 : count;
        // Of nothing, nothing is read; the address still has to be one.
        const float* const from = count ? panel + (row + i) * stride + column + j : panel;
        float* const there = to + i * STRIDE + j;
        if (aligned) {
            block.copy4(there, from, count);
        } else {
            for (int x = 0; x < 4; ++x) block.copy1(there + x, x < count ? from + x : panel, x < count);
        }
    });
}

// The sums of one warp: blocks (2a + its row, 2b + its column) of the tile.
template <typename Block>
struct WarpSums {
    typename Block::Sum sums[BLOCKS][BLOCKS];
};

// Which of its blocks a warp has to compute: those inside the result and, if symmetric, not above the diagonal.
struct Wanted {
    int rows, columns, row, column;  // 8×8 blocks of the result from the tile's corner on; the warp's place
    bool lower;  // the tile is on the diagonal of a symmetric result
    FLEXLORA_DEVICE bool operator()(int a, int b) const {
        const int i = 2 * a + row, j = 2 * b + column;
        return i < rows && j < columns && (!lower || i >= j);
    }
};

template <typename Block>
FLEXLORA_DEVICE void multiply_tile(Block& block, WarpSums<Block>& mine, const float* left, const float* right,
                                   const Wanted& wanted) {
    FLEXLORA_UNROLL
    for (int k = 0; k < DEPTH; k += 4) {
        typename Block::Operand x[BLOCKS], y[BLOCKS];
        FLEXLORA_UNROLL
        for (int a = 0; a < BLOCKS; ++a) {
            block.load(x[a], [&](int i, int q) {
                return static_cast<double>(left[(k + q) * STRIDE + 8 * (2 * a + wanted.row) + i]);
            });
            block.load(y[a], [&](int i, int q) {
                return static_cast<double>(right[(k + q) * STRIDE + 8 * (2 * a + wanted.column) + i]);
            });
        }
        FLEXLORA_UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            FLEXLORA_UNROLL
            for (int a = 0; a + 1 < BLOCKS; a += 2)
                if (wanted(a, b) || wanted(a + 1, b))
                    block.multiply_two(mine.sums[a][b], mine.sums[a + 1][b], x[a], x[a + 1], y[b]);
            if (BLOCKS % 2 && wanted(BLOCKS - 1, b))
                block.multiply(mine.sums[BLOCKS - 1][b], x[BLOCKS - 1], y[b]);
        }
    }
}

// Block (tile, slice, layer) of flexlora_gram64.
template <typename Block>
FLEXLORA_DEVICE void gram64(Block& block, const Panels& p, int tile, int slice, size_t layer, float* shared) {
    if (p.only && !p.only[layer]) return;
    const int across = (p.v + SIDE - 1) / SIDE;
    int tile_row = tile / across, tile_column = tile % across;
    if (p.symmetric) {
        for (tile_row = 0; packed(tile_row + 1) <= tile;) ++tile_row;
        tile_column = tile - packed(tile_row);
    }
    const int row = tile_row * SIDE, column = tile_column * SIDE;
    const float *const X = p.X + layer * p.x_layer, *const Y = p.Y + layer * p.y_layer;
    const bool shares = X == Y && p.x_row == p.y_row && row == column;  // one tile serves as both
    const int begin = slice * p.rows, end = p.m < begin + p.rows ? p.m : begin + p.rows;

    WarpSums<Block> mine[Block::slots(WARPS)];
    for (WarpSums<Block>& sums : mine)
        FLEXLORA_UNROLL
        for (int a = 0; a < BLOCKS; ++a)
            FLEXLORA_UNROLL
            for (int b = 0; b < BLOCKS; ++b) block.clear(sums.sums[a][b]);
    const auto wanted = [&](int warp) {
        const int rows = (p.w - row + 7) / 8, columns = (p.v - column + 7) / 8;
        return Wanted{rows, columns, warp / 2, warp % 2, p.symmetric && row == column};
    };
    const auto fetch_both = [&](float* to, int k) {
        fetch(block, to, X, p.x_row, k, end, row, p.w);
        if (!shares) fetch(block, to + DEPTH * STRIDE, Y, p.y_row, k, end, column, p.v);
        block.commit();
    };
    if (begin < end) fetch_both(shared, begin);
    for (int k = begin, now = 0; k < end; k += DEPTH, now ^= 1) {
        float *const here = shared + now * STAGE, *const next = shared + (now ^ 1) * STAGE;
        if (k + DEPTH < end) {
            fetch_both(next, k + DEPTH);
            block.template wait<1>();
        } else {
            block.template wait<0>();
        }
        block.sync();
        const float* const right = shares ? here : here + DEPTH * STRIDE;
        for (int s = 0; s < Block::slots(WARPS); ++s) {
            const int warp = block.warp() + s * block.warps();
            if (warp < WARPS) multiply_tile(block, mine[s], here, right, wanted(warp));
        }
        block.sync();
    }
    double* const out = p.out + (layer * p.slices + slice) * p.w * p.v;
    for (int s = 0; s < Block::slots(WARPS); ++s) {
        const int warp = block.warp() + s * block.warps();
        if (warp >= WARPS) continue;
        const Wanted want = wanted(warp);
        FLEXLORA_UNROLL
        for (int a = 0; a < BLOCKS; ++a)
            FLEXLORA_UNROLL
            for (int b = 0; b < BLOCKS; ++b) {
                if (!want(a, b)) continue;
                block.store(mine[s].sums[a][b], [&](int i, int j, double sum) {
                    i += row + 8 * (2 * a + want.row), j += column + 8 * (2 * b + want.column);
                    if (i >= p.w || j >= p.v || (p.symmetric && i < j)) return;
                    out[static_cast<size_t>(i) * p.v + j] = sum;
                    if (p.symmetric && p.slices == 1) out[static_cast<size_t>(j) * p.v + i] = sum;
                });
            }
    }
}

constexpr int SUM_ROWS = 8;

// Rows 8·part … of layer `layer` of flexlora_gram64_sum.
template <typename Block>
FLEXLORA_DEVICE void gram64_sum(Block& block, const double* parts, double* out, const flag* only, int w, int v,
                                int slices, bool symmetric, int part, size_t layer) {
    if (only && !only[layer]) return;
    for_entries(block, SUM_ROWS, v, [&](int row, int j) {
        const int i = part * SUM_ROWS + row;
        if (i >= w) return;
        const size_t at = symmetric && i < j ? static_cast<size_t>(j) * v + i : static_cast<size_t>(i) * v + j;
        double sum = 0;
        for (int s = 0; s < slices; ++s) sum += parts[(layer * slices + s) * w * v + at];
        out[(layer * w + i) * v + j] = sum;
    });
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(128, 2)
    flexlora_gram64(const float* X, const float* Y, double* out, const flexlora::flag* only, long long x_layer,
                    long long x_row, long long y_layer, long long y_row, int m, int w, int v, int rows, int symmetric) {
    flexlora::Threads block;
    const int slices = static_cast<int>(gridDim.y);
    const flexlora::Panels p{X, Y, out, only, x_layer, x_row, y_layer, y_row, m, w, v, rows, slices, symmetric != 0};
    flexlora::gram64(block, p, blockIdx.x, blockIdx.y, blockIdx.z, reinterpret_cast<float*>(flexlora_shared));
}

extern "C" __global__ void __launch_bounds__(256, 2)
    flexlora_gram64_sum(const double* parts, double* out, const flexlora::flag* only, int w, int v, int slices,
                        int symmetric) {
    flexlora::Threads block;
    flexlora::gram64_sum(block, parts, out, only, w, v, slices, symmetric != 0, blockIdx.x, blockIdx.y);
}
#endif
