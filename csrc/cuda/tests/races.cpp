// Every block algorithm of csrc/cuda by 6 threads: built with -fsanitize=thread, any two accesses to shared or global
// memory that no sync() separates end this program with a report. Results have to be those of one thread, bit by bit.

#include <cstdio>
#include <cstdlib>
#include <cstring>
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
#include "cuda/whiten.cuh"

using namespace flexlora;

namespace {

// Not a divisor of what loops are cut into: who writes and who reads are different threads, as on a GPU.
constexpr int THREADS = 6;

// work(block, shared, outputs) by one thread and by several, which start from the same `outputs`.
template <typename Work>
void check(const char* name, int l, long long shared_bytes, std::vector<double> outputs, const Work& work) {
    std::vector<double> others = outputs;
    host::emulate(name, 1, shared_bytes, [&](auto& block, double* shared) { work(block, shared, outputs.data()); });
    host::emulate(name, THREADS, shared_bytes,
                  [&](auto& block, double* shared) { work(block, shared, others.data()); });
    if (std::memcmp(outputs.data(), others.data(), outputs.size() * sizeof(double)) != 0) {
        std::printf("%s, l = %d: %d threads give other bits than one\n", name, l, THREADS);
        std::exit(1);
    }
}

void small_matrices(int l, const std::vector<double>& G) {
    const size_t square = static_cast<size_t>(l) * l;
    const std::vector<double> C = random_values(square, 1);
    check("whiten", l, whiten_shared(l, true), std::vector<double>(2 * square + 1),
          [&](auto& block, double* shared, double* out) {
              whiten(block, G.data(), out, reinterpret_cast<float*>(out + square),
                     reinterpret_cast<flag*>(out + 2 * square), nullptr, l, 0, shared);
          });
    check("root", l, root_shared(l, true), std::vector<double>(square + 2),
          [&](auto& block, double* shared, double* out) {
              int* const rank = reinterpret_cast<int*>(out + square);
              root(block, G.data(), out, rank, reinterpret_cast<flag*>(rank + 1), nullptr, nullptr, l, 0, shared);
          });
    check("condition", l, whiten_shared(l, true), std::vector<double>(square),
          [&](auto& block, double* shared, double* out) {
              condition(block, G.data(), reinterpret_cast<float*>(out), nullptr, l, 0, shared);
          });
    check("ritz", l, ritz_shared(l, false), std::vector<double>(4 * square + l + 1),
          [&](auto& block, double* shared, double* out) {
              flag* const flags = reinterpret_cast<flag*>(out + 2 * square);
              ritz(block, G.data(), C.data(), out, out + square, flags, flags + 1, out + 2 * square + 1, l, 0, shared);
          });
    check("jacobi_eigh", l, jacobi_shared(l, 1), std::vector<double>(square + l + 1),
          [&](auto& block, double* shared, double* out) {
              jacobi_eigh(block, C.data(), out + square, out, reinterpret_cast<flag*>(out + square + l), nullptr, l, 0,
                          shared);
          });
    check("jacobi_svd", l, jacobi_shared(l, 2), std::vector<double>(2 * square + l + 1),
          [&](auto& block, double* shared, double* out) {
              double* const S = out + 2 * square;
              jacobi_svd(block, C.data(), out, S, out + square, reinterpret_cast<flag*>(S + l), nullptr, l, 0, shared);
          });
    const flag spoiled = 0;
    check("rotate", l, rotate_shared(l), std::vector<double>(square + l),
          [&](auto& block, double* shared, double* out) {
              float* const rotation = reinterpret_cast<float*>(out);
              const Rotation r{G.data(), C.data(), C.data(), &spoiled, rotation, rotation + square, out + square, l, l};
              rotate(block, r, 0, 0, shared);
          });
}

void tall_panels(int l) {
    const int m = 150, v = l / 2 + 1;
    const size_t square = static_cast<size_t>(l) * l;
    const std::vector<float> X = random_values<float>(static_cast<size_t>(m) * l, 2);
    const std::vector<float> Y = random_values<float>(static_cast<size_t>(m) * v, 3);
    const std::vector<double> T = random_values(square, 4);
    for (const bool symmetric : {false, true}) {
        const int columns = symmetric ? l : v;
        const Panels p{
            X.data(), symmetric ? X.data() : Y.data(), nullptr, nullptr, 0, l, 0, columns, m, l, columns, m, 1,
            symmetric};
        const int tiles =
            symmetric ? packed((l + SIDE - 1) / SIDE) : (l + SIDE - 1) / SIDE * ((columns + SIDE - 1) / SIDE);
        for (int tile = 0; tile < tiles; ++tile)
            check("gram64", l, gram64_shared(), std::vector<double>(square),
                  [&](auto& block, double* shared, double* out) {
                      Panels mine = p;
                      mine.out = out;
                      gram64(block, mine, tile, 0, 0, reinterpret_cast<float*>(shared));
                  });
    }
    check("gram64_sum", l, 0, std::vector<double>(square),
          [&](auto& block, double*, double* out) { gram64_sum(block, T.data(), out, nullptr, l, 1, l, false, 0, 0); });
    // In place, as the third pass of a Cholesky QR does it.
    std::vector<double> panel(static_cast<size_t>(m) * l / 2);
    std::memcpy(panel.data(), X.data(), panel.size() * sizeof(double));
    check("apply_right", l, apply_shared(l), panel, [&](auto& block, double* shared, double* out) {
        float* const Y_and_out = reinterpret_cast<float*>(out);
        const Application p{Y_and_out, T.data(), Y_and_out, nullptr, 0, l, 0, l, m, l};
        apply_right(block, p, 1, 0, shared);
    });
    check("chebyshev", l, 0, panel, [&](auto& block, double*, double* out) {
        float* const all = reinterpret_cast<float*>(out);
        const Recurrence r{X.data(), all, X.data(), all, X.data(), X.data(), X.data(), m, l};
        chebyshev(block, r, 0, 0);
    });
}

void large_grams(int W) {
    const size_t square = static_cast<size_t>(W) * W;
    const std::vector<float> G = random_values<float>(square, 5);
    const std::vector<double> d = random_values(W, 6);
    check("norms", W, 0, std::vector<double>(W + 1), [&](auto& block, double*, double* out) {
        float* const p = reinterpret_cast<float*>(out);
        norms(block, G.data(), G.data(), d.data(), p, p + W, reinterpret_cast<flag*>(out + W), 0, W, 0);
    });
    check("scale", W, total_shared(), std::vector<double>(square + 1, 1.5),
          [&](auto& block, double* shared, double* out) {
              float* const left = reinterpret_cast<float*>(out);
              scale(block, left, left + square, G.data(), G.data(), out + square, W, 0, 1, 0, shared);
          });
    check("energy", W, total_shared(), std::vector<double>(1),
          [&](auto& block, double* shared, double* out) { energy(block, d.data(), out, W, 0, shared); });
}

// What the detector is there for: neighbours read what nobody waited for.
void race() {
    double out[THREADS] = {};
    host::emulate("race", THREADS, 8 * THREADS, [&](auto& block, double* shared) {
        shared[block.rank()] = block.rank();
        out[block.rank()] = shared[(block.rank() + 1) % block.size()];
    });
}

}  // namespace

// With an argument: whether a race is found at all.
int main(int count, char**) {
    if (count > 1) race();
    for (const int l : {1, 7, 20, 41}) {
        small_matrices(l, gram_of(l));
        small_matrices(l, gram_of(l, l - 1));  // which has to be shifted
        std::vector<double> broken = gram_of(l);
        broken[l * l / 2] = NAN;
        small_matrices(l, broken);
        std::vector<double> indefinite = gram_of(l);  // which has no factor even then
        if (l > 1) indefinite[(l - 1) * l] = indefinite[l - 1] = 2 * indefinite[0] + 2 * indefinite[l * l - 1];
        small_matrices(l, indefinite);
    }
    for (const int l : {1, 30, 97}) tall_panels(l);
    for (const int W : {1, 300}) large_grams(W);
    std::printf("no races\n");
}
