// The machine below the Block of a GPU (thread_block.cuh): a thread block of a multiple of 32 threads.

#pragma once

#include "thread_block.cuh"

#ifdef __CUDACC__

// Dynamic shared memory; its size is the launcher's, by the formula at the top of each kernel's file.
extern __shared__ __align__(16) double flexlora_shared[];

namespace flexlora {

struct Hardware {
    FLEXLORA_DEVICE int rank() const { return static_cast<int>(threadIdx.x); }
    FLEXLORA_DEVICE int size() const { return static_cast<int>(blockDim.x); }
    FLEXLORA_DEVICE void sync() { __syncthreads(); }
    FLEXLORA_DEVICE bool any(bool x) { return __syncthreads_or(x) != 0; }

    // What the thread of this team of 8 has whose rank differs in the bit `apart`.
    FLEXLORA_DEVICE double exchanged(double x, int apart) const {
        const unsigned team_mask = 0xffu << (threadIdx.x & 24);
        return __shfl_xor_sync(team_mask, x, apart);
    }

    FLEXLORA_DEVICE void product(double (&sum)[2], double a, double b) const {
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+d"(sum[0]), "+d"(sum[1])
                     : "d"(a), "d"(b));
    }
    // On Hopper and later one instruction, whose fragments are those of two smaller ones. It runs at the full rate where
    // those of 8 rows have about half: on an H100 53 and 31 TFLOP/s, https://github.com/triton-lang/triton/pull/10313.
    FLEXLORA_DEVICE void product_of_two(double (&upper)[2], double (&lower)[2], double a, double c, double b) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile(
            "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+d"(upper[0]), "+d"(upper[1]), "+d"(lower[0]), "+d"(lower[1])
            : "d"(a), "d"(c), "d"(b));
#else
        product(upper, a, b);
        product(lower, c, b);
#endif
    }

    // to[0 … 3] = from[0 … count − 1] and zeros, from global to shared memory, done when waited for. Both addresses are
    // multiples of 16.
    FLEXLORA_DEVICE void copy4(float* to, const float* from, int count) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(4 * count)
                     : "memory");
    }
    FLEXLORA_DEVICE void copy1(float* to, const float* from, int count) const {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(4 * count)
                     : "memory");
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

using Threads = ThreadBlock<Hardware>;

}  // namespace flexlora

#endif
