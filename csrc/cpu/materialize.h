// Dense update of one layer from a table of client factors, without packing all clients into one stack.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace flexlora::cpu {

// Returns ΔW = Σ_i (B_i · diag(d_i)) · A_i as an (m, n) float32 tensor.
//
//   B  K tensors (m, r_i)   float16 | bfloat16 | float32, any strides; r_i may be 0
//   A  K tensors (r_i, n)   same; B_i and A_i may differ in dtype
//   d  (R,) float64         R = Σ r_i; d_i are its entries for client i, in the order of the lists
//
// Throws std::invalid_argument, quoting the position and the value, on anything else.
at::Tensor materialize(const std::vector<at::Tensor>& B, const std::vector<at::Tensor>& A, const at::Tensor& d);

}  // namespace flexlora::cpu
