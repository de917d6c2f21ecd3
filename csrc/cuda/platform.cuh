// What the device code of this folder needs of its compiler: nvcc, NVRTC (through CuPy) and g++ all compile it.
//
// Algorithms are templates over a Block, the threads that work on one matrix together:
//     rank(), size()        which of them this is, and how many there are
//     sync()                all of them have come here, and see what the others wrote before
//     any(bool)             whether it holds for one of them; a sync() too
//     row(), rows(), column(), columns()   the same threads as a grid, for loops over matrices: neighbours in a row
//                           are neighbours in memory
//     team(), teams(), lane(), lanes(), sum(x)   small groups of threads, and sums over the lanes of one
//     Operand, Sum, warp(), warps(), slots()   products of 8×8×4 blocks, see mma.cuh
// block.cuh has the Block of a GPU, host_block.h those that emulate it: one thread, and several that meet at a barrier.
// Every result is the same for any number of emulating threads, since each entry is computed by one thread in one
// order, or summed in an order that does not depend on their number.

#pragma once

#ifdef __CUDACC__
#define FLEXLORA_DEVICE __device__ inline
#define FLEXLORA_FORMULA __host__ __device__ constexpr
#define FLEXLORA_UNROLL _Pragma("unroll")
#else
#include <math.h>
#include <stddef.h>
#define FLEXLORA_DEVICE inline
#define FLEXLORA_FORMULA constexpr
#define FLEXLORA_UNROLL
#endif

namespace flexlora {

typedef unsigned char flag;  // 0 or 1: torch.bool and torch.uint8 both fit

FLEXLORA_DEVICE bool finite(double x) { return x - x == 0; }

// Entries of a packed symmetric or triangular n×n matrix.
FLEXLORA_FORMULA int packed(int n) { return n * (n + 1) / 2; }

// Where entry {i, j} of a packed matrix is: rows of the lower triangle one after the other. Triangular numbers modulo
// 16 are all different for 16 neighbouring rows, so that a column is read without bank conflicts, and without padding.
FLEXLORA_DEVICE int slot(int i, int j) { return i >= j ? packed(i) + j : packed(j) + i; }

// f(i, j) for all entries of an m×n matrix, one thread each.
template <typename Block, typename F>
FLEXLORA_DEVICE void for_entries(Block& block, int m, int n, F f) {
    for (int i = block.row(); i < m; i += block.rows())
        for (int j = block.column(); j < n; j += block.columns()) f(i, j);
}

// f(i) for all i < n, one thread each.
template <typename Block, typename F>
FLEXLORA_DEVICE void for_each(Block& block, int n, F f) {
    for (int i = block.rank(); i < n; i += block.size()) f(i);
}

}  // namespace flexlora
