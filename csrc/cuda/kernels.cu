#include "cuda/kernels.cuh"

#include "cuda/launch.h"

namespace flexlora::cuda {

const Kernels& kernels() {
#define FLEXLORA_ENTRY(name) {#name, kernel_of(&::name)},
    static const Kernels all{FLEXLORA_KERNELS(FLEXLORA_ENTRY)};
#undef FLEXLORA_ENTRY
    return all;
}

}  // namespace flexlora::cuda
