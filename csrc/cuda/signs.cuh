// Random signs addressed by (key, b, row, column): flexlora_fast/lowrank/random.py on a GPU, bit for bit.
//
// Kernels:
//   flexlora_signs(addresses, rows, cols, out)
//       addresses (count, 2) int64: pairs (key, b) -> out (count, rows, cols) float32, ±1. Grid (count, blocks),
//       block 256; the blocks of one address share out its rows · ⌈cols/4⌉ quads. That number, and the threads that take
//       them, must be below 2³⁰.

#pragma once

#include "platform.cuh"

namespace flexlora {

// The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
FLEXLORA_DEVICE unsigned long long splitmix64(unsigned long long x) {
    x *= 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// 64 signs of one row: bit j is that of column 64·word + j.
FLEXLORA_DEVICE unsigned long long sign_bits(long long key, long long b, long long row, long long word) {
    const unsigned long long start = ((static_cast<unsigned long long>(b) << 32) + row) ^ key;
    return splitmix64(splitmix64(start) + word + 1);
}

// Quads of a row: four neighbouring columns, of which the last may have fewer.
FLEXLORA_FORMULA int sign_quads(int cols) { return (cols + 3) / 4; }

// Four entries, written at once where all rows begin at a multiple of 16 bytes.
struct alignas(16) FourSigns {
    float value[4];
};

// Writes one quad of a (rows, cols) matrix `out`; quads are counted row by row.
FLEXLORA_DEVICE void write_four_signs(long long key, long long b, int quad, int cols, float* out) {
    const int row = quad / sign_quads(cols), in_row = quad % sign_quads(cols);
    const unsigned long long bits = sign_bits(key, b, row, in_row / 16) >> (in_row % 16 * 4);
    FourSigns four;
    FLEXLORA_UNROLL
    for (int i = 0; i < 4; ++i) four.value[i] = (bits >> i & 1) != 0 ? 1.0f : -1.0f;
    float* const start = out + static_cast<long long>(row) * cols + in_row * 4;
    if (cols % 4 == 0) {
        *reinterpret_cast<FourSigns*>(start) = four;
    } else {
        for (int i = 0; i < 4 && in_row * 4 + i < cols; ++i) start[i] = four.value[i];
    }
}

}  // namespace flexlora

#ifdef __CUDACC__
extern "C" __global__ void __launch_bounds__(256)
    flexlora_signs(const long long* addresses, int rows, int cols, float* out) {
    const long long* const address = addresses + 2 * static_cast<long long>(blockIdx.x);
    float* const matrix = out + static_cast<long long>(blockIdx.x) * rows * cols;
    const int quads = rows * flexlora::sign_quads(cols);
    for (int quad = blockIdx.y * blockDim.x + threadIdx.x; quad < quads; quad += gridDim.y * blockDim.x) {
        flexlora::write_four_signs(address[0], address[1], quad, cols, matrix);
    }
}
#endif
