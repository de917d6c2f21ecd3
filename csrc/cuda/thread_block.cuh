// The Block of a GPU, see platform.cuh: what each of its threads has of a matrix. A Machine gives what only hardware
// can do (rank, size, sync, any, exchanged, products of a warp, asynchronous copies): block.cuh has the GPU's, and
// tests/lanes.cpp one that follows the same documentation on the CPU, thread by thread.

#pragma once

#include "platform.cuh"

namespace flexlora {

template <typename Machine>
struct ThreadBlock : Machine {
    using Machine::Machine;
    using Machine::rank;
    using Machine::size;

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
        for (int apart = 4; apart; apart /= 2) x += this->exchanged(x, apart);
        return x;
    }

    FLEXLORA_DEVICE int warp() const { return rank() / 32; }
    FLEXLORA_DEVICE int warps() const { return size() / 32; }
    static FLEXLORA_FORMULA int slots(int) { return 1; }

    // Of an 8×4 block of A, entry (lane / 4, lane % 4) in each lane of a warp, and of the 4×8 block of B, entry
    // (lane % 4, lane / 4); of the 8×8 sums, (lane / 4, 2·(lane % 4)) and its neighbour: the layout of mma.m8n8k4,
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
        operand.x = f(rank() % 32 / 4, rank() % 4);
    }
    FLEXLORA_DEVICE void multiply(Sum& sum, const Operand& a, const Operand& b) const {
        this->product(sum.x, a.x, b.x);
    }
    // Two blocks of rows, a and c, that share their columns b.
    FLEXLORA_DEVICE void multiply_two(Sum& upper, Sum& lower, const Operand& a, const Operand& c,
                                      const Operand& b) const {
        this->product_of_two(upper.x, lower.x, a.x, c.x, b.x);
    }
    template <typename F>
    FLEXLORA_DEVICE void store(const Sum& sum, F f) const {
        const int i = rank() % 32 / 4, j = 2 * (rank() % 4);
        f(i, j, sum.x[0]);
        f(i, j + 1, sum.x[1]);
    }
};

}  // namespace flexlora
