// Products of matrices given as tables of pieces, blocked here and multiplied by oneDNN's block kernels.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace flexlora::cpu {

enum class Precision {
    f32,  // float32 products, float32 sums
    bf16,  // operands rounded to bfloat16 (16-bit inputs of that type stay as they are), float32 sums
};

// Why this machine or this torch has no block kernels for a precision; empty if they have.
std::string obstacle(Precision precision);

// C = A · diag(scale) · B, float32, or out += … where `out` is given.
//
//   A  pieces joined along axis a_axis: (M, K)    float16 | bfloat16 | float32, any strides
//   B  pieces joined along axis b_axis: (K, N)    same
//   scale  (K,) float64 or nothing. In float32 it is folded into A's panels; in bf16 it multiplies float32 sums over
//          runs of equal coefficients, so that nothing is rounded twice, and where runs are short the products are
//          float32.
//   symmetric  promises that the product is: one triangle is computed and mirrored.
//   out    float32 rows, which must not overlap A, B or each other
//
// Entry (i, j) is summed in an order that depends on K and `scale` alone: not on the number of threads, on where it
// stands, or on how the tables are cut and laid out. So in a Gram without `scale`, clients may change places and nothing
// else does.
// Throws std::invalid_argument, quoting the value, where shapes or types do not fit.
at::Tensor matmul(const std::vector<at::Tensor>& A, int64_t a_axis, const std::vector<at::Tensor>& B, int64_t b_axis,
                  Precision precision, bool symmetric, const std::optional<at::Tensor>& scale,
                  const std::optional<at::Tensor>& out);

}  // namespace flexlora::cpu
