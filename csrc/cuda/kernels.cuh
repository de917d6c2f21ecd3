// Every kernel: the files they are in, and their names. nvcc compiles them ahead of time and NVRTC at run time.

#pragma once

#include "apply_right.cuh"
#include "chebyshev.cuh"
#include "gram64.cuh"
#include "jacobi.cuh"
#include "ritz.cuh"
#include "root.cuh"
#include "scale_grams.cuh"
#include "signs.cuh"
#include "whiten.cuh"

#define FLEXLORA_KERNELS(kernel) \
    kernel(flexlora_apply_right) \
    kernel(flexlora_chebyshev)   \
    kernel(flexlora_condition)   \
    kernel(flexlora_energy)      \
    kernel(flexlora_gram64)      \
    kernel(flexlora_gram64_sum)  \
    kernel(flexlora_jacobi_eigh) \
    kernel(flexlora_jacobi_svd)  \
    kernel(flexlora_norms)       \
    kernel(flexlora_ritz)        \
    kernel(flexlora_root)        \
    kernel(flexlora_rotate)      \
    kernel(flexlora_scale)       \
    kernel(flexlora_signs)       \
    kernel(flexlora_whiten)
