// The device code of this folder on CPU tensors, thread block after thread block: what tests hold against its twins.
//
// Each function is the kernel of its name (the .cuh files say what it computes), with outputs allocated here where they
// are not given, and outputs of layers that `only` leaves out zero. Tensors are contiguous, but for those of panels
// (L, m, l), whose rows are. `threads` emulate one block, and `workspace` has matrices go through global memory, as
// those do that are too large for shared memory. Throws std::invalid_argument, quoting the value, where shapes or types
// do not fit, and std::logic_error where an algorithm wrote behind the shared memory that its formula gives it.

#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

namespace flexlora::host {

using at::Tensor;

struct Execution {
    int threads;
    bool workspace;
};

std::tuple<Tensor, Tensor, Tensor> whiten(Execution how, const Tensor& gram);
Tensor condition(Execution how, const Tensor& gram);
std::tuple<Tensor, Tensor, Tensor, Tensor> ritz(Execution how, const Tensor& G, const Tensor& C);
std::tuple<Tensor, std::optional<Tensor>, Tensor> rotate(Execution how, const Tensor& T, const Tensor& vectors,
                                                         const Tensor& values, const Tensor& spoiled, int64_t k,
                                                         bool last);
Tensor gram64(Execution how, const Tensor& X, const Tensor& Y, bool symmetric, int64_t rows,
              const std::optional<Tensor>& only);
std::tuple<Tensor, Tensor, Tensor> root(Execution how, const Tensor& gram, const std::optional<Tensor>& only);
void apply_right(Execution how, const Tensor& Y, const Tensor& T, const Tensor& out, const std::optional<Tensor>& only);
std::tuple<Tensor, Tensor, Tensor, Tensor> scale_grams(Execution how, const Tensor& G, const Tensor& M,
                                                       const Tensor& d);
Tensor chebyshev(Execution how, const Tensor& product, const Tensor& now, const std::optional<Tensor>& before,
                 const Tensor& a, const Tensor& b, const std::optional<Tensor>& c);
std::tuple<Tensor, Tensor, Tensor> jacobi_eigh(Execution how, const Tensor& C);
std::tuple<Tensor, Tensor, Tensor, Tensor> jacobi_svd(Execution how, const Tensor& A);

// Adds them to a Python module.
void bind(pybind11::module_ module);

}  // namespace flexlora::host
