// Y·T for float32 panels Y (m, l) and float64 T (l, l): products of 8×8×4 blocks on the float64 tensor cores, rounded
// to float32 once, at the end. With T of a Cholesky QR, whose entries are as large as Y is ill-conditioned, float32
// sums would cancel to nothing. The twin: (Y.double() @ T).float() in orthonormalize of
// flexlora_fast/backends/reference.py.
//
// A thread block of 4 warps has 64 rows of Y in shared memory, all columns of them, so that it may write where it read;
// T comes through 32×80 entries at a time.
//
// Kernel:
//   flexlora_apply_right(Y, T, out, only, y_layer, y_row, out_layer, out_row, m, l)
//       Y: layer λ, row r at Y + λ·y_layer + r·y_row (long long, in floats), neighbouring columns side by side; out
//       likewise, and may be Y. T (L, l, l). only: null, or (L,) bool of the layers to compute; nothing is written for
//       others. Grid (⌈m/64⌉, L), block 128, shared bytes 256·s + 21504, where s is the smallest number ≥ l with
//       s mod 8 = 4.

#pragma once

#include "block.cuh"
#include "gram64.cuh"
#include "platform.cuh"

namespace flexlora {

constexpr int PANEL_ROWS = 64;
constexpr int ROW_BLOCKS = PANEL_ROWS / 16;  // 8×8 blocks of a warp, down
// Of a row of T in shared memory: 4 modulo 16, so that 4×4 doubles lie in 16 pairs of banks.
constexpr int T_STRIDE = SIDE + 4;

// Of a row of Y in shared memory: 4 modulo 8, so that 8×4 floats lie in 32 banks, and the last 4 columns are all there.
FLEXLORA_FORMULA int panel_stride(int l) { return (l + 3) / 8 * 8 + 4; }

FLEXLORA_FORMULA long long apply_shared(int l) {
    return 4LL * PANEL_ROWS * panel_stride(l) + 8LL * DEPTH * T_STRIDE;
}

struct Application {
    const float* Y;
    const double* T;
    float* out;
    const flag* only;
    long long y_layer, y_row, out_layer, out_row;
    int m, l;
};

// The sums of one warp: blocks (2a + its row, 2b + its column).
template <typename Block>
struct PanelSums {
    typename Block::Sum sums[ROW_BLOCKS][BLOCKS];
};

// Adds rows `from` … of T, which `right` has 32 of, times the columns of Y that they belong to.
template <typename Block>
FLEXLORA_DEVICE void multiply_panel(Block& block, PanelSums<Block>& mine, const float* left, int stride,
                                    const double* right, int from, int l, int warp) {
    const int row = warp / 2, column = warp % 2;
    for (int k = 0; k < DEPTH && from + k < l; k += 4) {
        typename Block::Operand x[ROW_BLOCKS], y[BLOCKS];
        FLEXLORA_UNROLL
        for (int a = 0; a < ROW_BLOCKS; ++a)
            block.load(x[a], [&](int i, int q) {
                return static_cast<double>(left[(8 * (2 * a + row) + i) * stride + from + k + q]);
            });
        FLEXLORA_UNROLL
        for (int b = 0; b < BLOCKS; ++b)
            block.load(y[b], [&](int i, int q) { return right[(k + q) * T_STRIDE + 8 * (2 * b + column) + i]; });
        FLEXLORA_UNROLL
        for (int a = 0; a < ROW_BLOCKS; a += 2)
            FLEXLORA_UNROLL
            for (int b = 0; b < BLOCKS; ++b)
                block.multiply_two(mine.sums[a][b], mine.sums[a + 1][b], x[a], x[a + 1], y[b]);
    }
}

// Rows 64·part … of layer `layer`.
template <typename Block>
FLEXLORA_DEVICE void apply_right(Block& block, const Application& p, int part, size_t layer, double* shared) {
    if (p.only && !p.only[layer]) return;
    const int l = p.l, stride = panel_stride(l), first = part * PANEL_ROWS;
    double* const right = shared;
    float* const left = reinterpret_cast<float*>(shared + DEPTH * T_STRIDE);
    const double* const T = p.T + layer * l * l;
    for_entries(block, PANEL_ROWS, stride, [&](int i, int j) {
        const bool there = first + i < p.m && j < l;
        left[i * stride + j] = there ? p.Y[layer * p.y_layer + (first + i) * p.y_row + j] : 0.0f;
    });
    for (int column = 0; column < l; column += SIDE) {
        PanelSums<Block> mine[Block::slots(WARPS)];
        for (PanelSums<Block>& sums : mine)
            FLEXLORA_UNROLL
            for (int a = 0; a < ROW_BLOCKS; ++a)
                FLEXLORA_UNROLL
                for (int b = 0; b < BLOCKS; ++b) block.clear(sums.sums[a][b]);
        for (int from = 0; from < l; from += DEPTH) {
            for_entries(block, DEPTH, SIDE, [&](int i, int j) {
                const bool there = from + i < l && column + j < l;
                right[i * T_STRIDE + j] = there ? T[static_cast<size_t>(from + i) * l + column + j] : 0.0;
            });
            block.sync();
            for (int s = 0; s < Block::slots(WARPS); ++s) {
                const int warp = block.warp() + s * block.warps();
                if (warp < WARPS) multiply_panel(block, mine[s], left, stride, right, from, l, warp);
            }
            block.sync();
        }
        for (int s = 0; s < Block::slots(WARPS); ++s) {
            const int warp = block.warp() + s * block.warps();
            if (warp >= WARPS) continue;
            FLEXLORA_UNROLL
            for (int a = 0; a < ROW_BLOCKS; ++a)
                FLEXLORA_UNROLL
                for (int b = 0; b < BLOCKS; ++b)
                    block.store(mine[s].sums[a][b], [&](int i, int j, double sum) {
                        i += first + 8 * (2 * a + warp / 2), j += column + 8 * (2 * b + warp % 2);
                        if (i < p.m && j < l) p.out[layer * p.out_layer + i * p.out_row + j] = static_cast<float>(sum);
                    });
        }
    }
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(128, 2)
    flexlora_apply_right(const float* Y, const double* T, float* out, const flexlora::flag* only, long long y_layer,
                         long long y_row, long long out_layer, long long out_row, int m, int l) {
    flexlora::Threads block;
    const flexlora::Application p{Y, T, out, only, y_layer, y_row, out_layer, out_row, m, l};
    flexlora::apply_right(block, p, blockIdx.x, blockIdx.y, flexlora_shared);
}
#endif
