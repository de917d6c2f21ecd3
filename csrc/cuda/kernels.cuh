// Every kernel: the files they are in, and their names. nvcc compiles them ahead of time and NVRTC at run time.

#pragma once

#include "ritz.cuh"
#include "signs.cuh"
#include "whiten.cuh"

#define FLEXLORA_KERNELS(kernel) \
    kernel(flexlora_condition)   \
    kernel(flexlora_ritz)        \
    kernel(flexlora_rotate)      \
    kernel(flexlora_signs)       \
    kernel(flexlora_whiten)
