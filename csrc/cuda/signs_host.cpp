#include "cuda/signs_host.h"

#include <ATen/ops/empty.h>

#include "cpu/require.h"
#include "cuda/signs.cuh"

namespace flexlora::host {

at::Tensor signs(const at::Tensor& addresses, int rows, int cols) {
    require(addresses.is_cpu() && addresses.scalar_type() == at::kLong && addresses.dim() == 2 &&
                addresses.size(1) == 2 && addresses.is_contiguous(),
            "addresses is ", addresses.scalar_type(), " of shape ", addresses.sizes(), " on ", addresses.device(),
            ": expected contiguous int64 (count, 2) on the CPU");
    require(rows >= 0 && cols >= 0, "rows is ", rows, " and cols is ", cols, ": expected no negative number");
    const at::Tensor out = at::empty({addresses.size(0), rows, cols}, at::kFloat);
    const int64_t* const address = addresses.const_data_ptr<int64_t>();
    for (int64_t a = 0; a < addresses.size(0); ++a) {
        float* const matrix = out.mutable_data_ptr<float>() + a * rows * cols;
        for (int quad = 0; quad < rows * sign_quads(cols); ++quad) {
            write_four_signs(address[2 * a], address[2 * a + 1], quad, cols, matrix);
        }
    }
    return out;
}

}  // namespace flexlora::host
