// The Block of a GPU on the CPU, a thread for each of its threads: which lane has which entry, which 8 are a team, and
// when copies have arrived. The machine below does what the documentation says of the instructions that block.cuh
// uses. Results have to be those of one thread: bit by bit, but for Jacobi, whose sums over 8 lanes round differently.

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "cuda/apply_right.cuh"
#include "cuda/chebyshev.cuh"
#include "cuda/emulate.h"
#include "cuda/gram64.cuh"
#include "cuda/jacobi.cuh"
#include "cuda/ritz.cuh"
#include "cuda/root.cuh"
#include "cuda/scale_grams.cuh"
#include "cuda/tests/values.h"
#include "cuda/thread_block.cuh"
#include "cuda/whiten.cuh"

using namespace flexlora;

namespace {

struct Warp {
    std::barrier<> barrier{32};
    double a[32], b[32], c[32];
};

struct Eight {
    std::barrier<> barrier{8};
    double x[8];
};

struct Chip {
    explicit Chip(int threads)
        : size(threads), barrier(threads), said(threads), warps(threads / 32), teams(threads / 8) {}
    int size;
    std::barrier<> barrier;
    std::vector<char> said;
    std::vector<Warp> warps;
    std::vector<Eight> teams;
};

class Thread {
public:
    Thread(Chip& chip, int rank) : chip_(chip), rank_(rank) {}
    int rank() const { return rank_; }
    int size() const { return chip_.size; }
    void sync() { chip_.barrier.arrive_and_wait(); }
    bool any(bool x) {
        chip_.said[rank_] = x;
        sync();
        bool found = false;
        for (const char said : chip_.said) found |= said != 0;
        sync();
        return found;
    }
    double exchanged(double x, int apart) const {
        Eight& team = chip_.teams[rank_ / 8];
        team.x[rank_ % 8] = x;
        team.barrier.arrive_and_wait();
        const double other = team.x[rank_ % 8 ^ apart];
        team.barrier.arrive_and_wait();
        return other;
    }

    // mma.m8n8k4: of A row `lane / 4`, column `lane % 4`; of B row `lane % 4`, column `lane / 4`; of the sums row
    // `lane / 4`, columns 2·(lane % 4) and the next.
    void product(double (&sum)[2], double a, double b) const {
        double none[2] = {};
        product_of_two(sum, none, a, 0, b);
    }
    // mma.m16n8k4: the second registers of A, and the second pair of the sums, are 8 rows further down.
    void product_of_two(double (&upper)[2], double (&lower)[2], double a, double c, double b) const {
        Warp& warp = chip_.warps[rank_ / 32];
        const int lane = rank_ % 32;
        warp.a[lane] = a, warp.b[lane] = b, warp.c[lane] = c;
        warp.barrier.arrive_and_wait();
        for (int k = 0; k < 4; ++k)
            for (int x = 0; x < 2; ++x) {
                const int row = lane / 4, column = 2 * (lane % 4) + x;
                upper[x] += warp.a[4 * row + k] * warp.b[4 * column + k];
                lower[x] += warp.c[4 * row + k] * warp.b[4 * column + k];
            }
        warp.barrier.arrive_and_wait();
    }

    // Copies happen as late as they may.
    void copy4(float* to, const float* from, int count) { copy(to, from, count, 4); }
    void copy1(float* to, const float* from, int count) { copy(to, from, count, 1); }
    void commit() {
        groups_.push_back(std::move(open_));
        open_.clear();
    }
    template <int pending>
    void wait() {
        for (; groups_.size() > pending; groups_.pop_front())
            for (const auto& copy : groups_.front()) copy();
    }

private:
    void copy(float* to, const float* from, int count, int size) {
        if (reinterpret_cast<uintptr_t>(to) % (4 * size) || reinterpret_cast<uintptr_t>(from) % (4 * size))
            std::abort();
        open_.push_back([=] {
            for (int i = 0; i < size; ++i) to[i] = i < count ? from[i] : 0.0f;
        });
    }

    Chip& chip_;
    int rank_;
    std::vector<std::function<void()>> open_;
    std::deque<std::vector<std::function<void()>>> groups_;
};

// work(block, shared, outputs) by one thread and by so many of a GPU's; results may differ by `tolerance`.
template <typename Work>
void check(const char* name, int threads, int l, long long shared_bytes, std::vector<double> outputs, double tolerance,
           const Work& work) {
    std::vector<double> others = outputs;
    host::emulate(name, 1, shared_bytes, [&](auto& block, double* shared) { work(block, shared, outputs.data()); });
    std::vector<double> memory(shared_bytes / 8 + 3, NAN);
    double* const shared = memory.data() + (reinterpret_cast<uintptr_t>(memory.data()) % 16 ? 1 : 0);
    Chip chip(threads);
    std::vector<std::thread> all;
    for (int rank = 0; rank < threads; ++rank)
        all.emplace_back([&, rank] {
            ThreadBlock<Thread> block(chip, rank);
            work(block, shared, others.data());
        });
    for (std::thread& thread : all) thread.join();
    bool same = std::memcmp(outputs.data(), others.data(), outputs.size() * sizeof(double)) == 0;
    if (tolerance > 0) {
        same = true;
        for (size_t i = 0; i < outputs.size(); ++i) same &= std::fabs(outputs[i] - others[i]) <= tolerance;
    }
    if (same) return;
    std::printf("%s, l = %d: %d threads of a GPU give other numbers than one\n", name, l, threads);
    std::exit(1);
}

void small_matrices(int l) {
    const size_t square = static_cast<size_t>(l) * l;
    const std::vector<double> G = gram_of(l), C = random_values(square, 1);
    check("whiten", 256, l, whiten_shared(l, true), std::vector<double>(square + 1), 0,
          [&](auto& block, double* shared, double* out) {
              flag* const shifted = reinterpret_cast<flag*>(out + square);
              whiten(block, G.data(), out, static_cast<float*>(nullptr), shifted, nullptr, l, 0, shared);
          });
    check("ritz", 64, l, ritz_shared(l, true), std::vector<double>(2 * square + 1), 0,
          [&](auto& block, double* shared, double* out) {
              flag* const flags = reinterpret_cast<flag*>(out + 2 * square);
              ritz(block, G.data(), C.data(), out, out + square, flags, flags + 1, nullptr, l, 0, shared);
          });
    check("root", 64, l, root_shared(l, true), std::vector<double>(square + 2), 0,
          [&](auto& block, double* shared, double* out) {
              int* const rank = reinterpret_cast<int*>(out + square);
              root(block, G.data(), out, rank, reinterpret_cast<flag*>(rank + 1), nullptr, nullptr, l, 0, shared);
          });
    const int teams = (8 * ((l + 1) / 2) + 31) / 32 * 32;
    check("jacobi_eigh", teams, l, jacobi_shared(l, 1), std::vector<double>(square + l + 1), 1e-10,
          [&](auto& block, double* shared, double* out) {
              flag* const converged = reinterpret_cast<flag*>(out + square + l);
              jacobi_eigh(block, C.data(), out + square, out, converged, nullptr, l, 0, shared);
          });
}

void tall_panels(int l, int v) {
    const int m = 75;
    const size_t square = static_cast<size_t>(l) * l;
    const std::vector<float> X = random_values<float>(static_cast<size_t>(m) * l + 4, 2);
    const std::vector<float> Y = random_values<float>(static_cast<size_t>(m) * v + 4, 3);
    const std::vector<double> T = random_values(square, 4);
    const float* const aligned = X.data() + (16 - reinterpret_cast<uintptr_t>(X.data()) % 16) % 16 / 4;
    for (const bool symmetric : {false, true})
        check("gram64", 128, l, gram64_shared(), std::vector<double>(square), 0,
              [&](auto& block, double* shared, double* out) {
                  const Panels p{aligned,
                                 symmetric ? aligned : Y.data(),
                                 out,
                                 nullptr,
                                 0,
                                 l,
                                 0,
                                 symmetric ? l : v,
                                 m,
                                 l,
                                 symmetric ? l : v,
                                 m,
                                 1,
                                 symmetric};
                  gram64(block, p, 0, 0, 0, reinterpret_cast<float*>(shared));
              });
    std::vector<double> panel(static_cast<size_t>(m) * l / 2 + 1);
    check("apply_right", 128, l, apply_shared(l), panel, 0, [&](auto& block, double* shared, double* out) {
        const Application p{X.data(), T.data(), reinterpret_cast<float*>(out), nullptr, 0, l, 0, l, m, l};
        apply_right(block, p, 0, 0, shared);
    });
}

}  // namespace

int main() {
    for (const int l : {1, 9, 18}) small_matrices(l);
    tall_panels(20, 9);
    tall_panels(33, 17);
    std::printf("lanes agree\n");
}
