// The Block of a GPU: the threads of a thread block, a multiple of 32 of them. See platform.cuh.

#pragma once

#include "platform.cuh"

#ifdef __CUDACC__

// Dynamic shared memory; its size is the launcher's, by the formula at the top of each kernel's file.
extern __shared__ __align__(16) double flexlora_shared[];

namespace flexlora {

struct Threads {
    FLEXLORA_DEVICE int rank() const { return static_cast<int>(threadIdx.x); }
    FLEXLORA_DEVICE int size() const { return static_cast<int>(blockDim.x); }
    FLEXLORA_DEVICE void sync() { __syncthreads(); }
    FLEXLORA_DEVICE bool any(bool x) { return __syncthreads_or(x) != 0; }

    FLEXLORA_DEVICE int row() const { return rank() / 32; }
    FLEXLORA_DEVICE int rows() const { return size() / 32; }
    FLEXLORA_DEVICE int column() const { return rank() % 32; }
    FLEXLORA_DEVICE int columns() const { return 32; }

    // Teams of 8 lanes: 40 pairs of 80 columns keep 320 threads busy at once.
    FLEXLORA_DEVICE int team() const { return rank() / 8; }
    FLEXLORA_DEVICE int teams() const { return size() / 8; }
    FLEXLORA_DEVICE int lane() const { return rank() % 8; }
    FLEXLORA_DEVICE int lanes() const { return 8; }
    // All lanes of the team come here together and get the same bits: the butterfly adds in the same order for each.
    FLEXLORA_DEVICE double sum(double x) const {
        const unsigned team_mask = 0xffu << (threadIdx.x & 24);
        for (int apart = 4; apart; apart /= 2) x += __shfl_xor_sync(team_mask, x, apart);
        return x;
    }

    FLEXLORA_DEVICE int warp() const { return rank() / 32; }
    FLEXLORA_DEVICE int warps() const { return size() / 32; }
    static FLEXLORA_FORMULA int slots(int) { return 1; }

    // Of an 8×4 block of A, entry (lane / 4, lane % 4) in each lane, and of the 4×8 block of B, entry (lane % 4,
    // lane / 4); of the 8×8 sums, (lane / 4, 2·(lane % 4)) and its neighbour: the layout of mma.m8n8k4 for .f64,
    // https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-884-for-f64.
    struct Operand {
        double x;
    };
    struct Sum {
        double x[2];
    };
    FLEXLORA_DEVICE void clear(Sum& sum) const { sum.x[0] = sum.x[1] = 0; }
    // f(i, k) is entry i of step k, i < 8, k < 4.
    template <typename F>
    FLEXLORA_DEVICE void load(Operand& operand, F f) const {
        operand.x = f((threadIdx.x % 32) / 4, threadIdx.x % 4);
    }
    FLEXLORA_DEVICE void multiply(Sum& sum, const Operand& a, const Operand& b) const {
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+d"(sum.x[0]), "+d"(sum.x[1])
                     : "d"(a.x), "d"(b.x));
    }
    // Two blocks of rows that share their columns: on Hopper and later one instruction, which runs at the full rate where
    // those of 8 rows have about half (on an H100 53 and 31 TFLOP/s, https://github.com/triton-lang/triton/pull/10313).
    // Its fragments are those of two smaller ones,
    // https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-1684.
    FLEXLORA_DEVICE void multiply_two(Sum& upper, Sum& lower, const Operand& a, const Operand& c,
                                      const Operand& b) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile(
            "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+d"(upper.x[0]), "+d"(upper.x[1]), "+d"(lower.x[0]), "+d"(lower.x[1])
            : "d"(a.x), "d"(c.x), "d"(b.x));
#else
        multiply(upper, a, b);
        multiply(lower, c, b);
#endif
    }
    template <typename F>
    FLEXLORA_DEVICE void store(const Sum& sum, F f) const {
        const int i = (threadIdx.x % 32) / 4, j = 2 * (threadIdx.x % 4);
        f(i, j, sum.x[0]);
        f(i, j + 1, sum.x[1]);
    }

    // to[0 … 3] = from[0 … count − 1] and zeros, from global to shared memory, done when waited for. Both addresses are
    // multiples of 16.
    FLEXLORA_DEVICE void copy4(float* to, const float* from, int count) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(4 * count));
    }
    FLEXLORA_DEVICE void copy1(float* to, const float* from, int count) const {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(4 * count));
    }
    FLEXLORA_DEVICE void commit() const { asm volatile("cp.async.commit_group;"); }
    // All copies are done but those of the latest `pending` commits.
    template <int pending>
    FLEXLORA_DEVICE void wait() const {
        asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
    }

private:
    static FLEXLORA_DEVICE unsigned shared_address(const void* at) {
        return static_cast<unsigned>(__cvta_generic_to_shared(at));
    }
};

}  // namespace flexlora

#endif
