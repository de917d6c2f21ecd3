// Random signs addressed by (key, b, row, column): flexlora_fast/lowrank/random.py on a GPU, bit for bit.

#pragma once

#ifdef __CUDACC__
#define FLEXLORA_SIGNS_FUNCTION __host__ __device__ inline
#else
#define FLEXLORA_SIGNS_FUNCTION inline
#endif

namespace flexlora {

// The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
FLEXLORA_SIGNS_FUNCTION unsigned long long splitmix64(unsigned long long x) {
    x *= 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// 64 signs of one row: bit j is that of column 64·word + j.
FLEXLORA_SIGNS_FUNCTION unsigned long long sign_bits(long long key, long long b, long long row, long long word) {
    const unsigned long long start = ((static_cast<unsigned long long>(b) << 32) + row) ^ key;
    return splitmix64(splitmix64(start) + word + 1);
}

// Four neighbours in a row, written at once where the row allows it.
struct alignas(16) FourSigns {
    float value[4];
};

// The signs of columns 4·quad … 4·quad + 3 of one row, of which `cols` has `out`.
FLEXLORA_SIGNS_FUNCTION void write_four_signs(long long key, long long b, int row, int quad, int cols, float* out) {
    const unsigned long long bits = sign_bits(key, b, row, quad / 16) >> (quad % 16 * 4);
    FourSigns four;
    for (int i = 0; i < 4; ++i) four.value[i] = (bits >> i & 1) != 0 ? 1.0f : -1.0f;
    float* const start = out + static_cast<long long>(row) * cols + quad * 4;
    if (cols % 4 == 0) {
        *reinterpret_cast<FourSigns*>(start) = four;
    } else {
        for (int i = 0; i < 4 && quad * 4 + i < cols; ++i) start[i] = four.value[i];
    }
}

}  // namespace flexlora

#ifdef __CUDACC__

// out[a, i, j] = ±1, the sign at address (addresses[a], i, j).
//
//   addresses (count, 2): pairs (key, b)    out (count, rows, cols), 16-byte aligned
//
// Grid: (count, blocks). The blocks of one address share out its rows · ⌈cols/4⌉ groups of four columns; that number
// and the threads that take them must be below 2³⁰.
extern "C" __global__ void signs(const long long* __restrict__ addresses, int rows, int cols, float* __restrict__ out) {
    const int quads = (cols + 3) / 4;
    const long long* const address = addresses + 2 * static_cast<long long>(blockIdx.x);
    float* const matrix = out + static_cast<long long>(blockIdx.x) * rows * cols;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < rows * quads; i += gridDim.y * blockDim.x) {
        flexlora::write_four_signs(address[0], address[1], i / quads, i % quads, cols, matrix);
    }
}

#endif
