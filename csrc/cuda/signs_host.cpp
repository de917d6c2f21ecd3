#include "cuda/signs_host.h"

#include "cuda/signs.cuh"

namespace flexlora::emulated {

void signs(const std::int64_t* addresses, std::int64_t count, int rows, int cols, float* out) {
    const int quads = (cols + 3) / 4;
    for (std::int64_t a = 0; a < count; ++a) {
        float* const matrix = out + a * rows * cols;
        for (int i = 0; i < rows * quads; ++i) {
            write_four_signs(addresses[2 * a], addresses[2 * a + 1], i / quads, i % quads, cols, matrix);
        }
    }
}

}  // namespace flexlora::emulated
