// Matrices for the programs of this folder.

#pragma once

#include <random>
#include <vector>

namespace {

template <typename T = double>
std::vector<T> random_values(size_t count, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    std::vector<T> values(count);
    for (T& x : values) x = static_cast<T>(normal(engine));
    return values;
}

// Xᵀ·X of a random X (m, l); column `dependent`, if not negative, is another's copy.
std::vector<double> gram_of(int l, int dependent = -1) {
    const int m = 2 * l + 3;
    std::vector<double> X = random_values(static_cast<size_t>(m) * l, l), G(static_cast<size_t>(l) * l);
    if (dependent >= 0)
        for (int i = 0; i < m; ++i) X[i * l + dependent] = X[i * l];
    for (int i = 0; i < l; ++i)
        for (int j = 0; j < l; ++j)
            for (int k = 0; k < m; ++k) G[i * l + j] += X[k * l + i] * X[k * l + j];
    return G;
}

}  // namespace
