// The arithmetic of signs.cuh on the CPU: what its test holds against lowrank/random.py.

#pragma once

#include <ATen/core/Tensor.h>

namespace flexlora::host {

// As the kernel flexlora_signs, for addresses (count, 2) int64 -> (count, rows, cols) float32. Throws
// std::invalid_argument where `addresses` is anything else.
at::Tensor signs(const at::Tensor& addresses, int rows, int cols);

}  // namespace flexlora::host
