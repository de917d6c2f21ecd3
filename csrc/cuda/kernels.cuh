// Every kernel: the files they are in, and their names. nvcc compiles them ahead of time, NVRTC at run time and g++
// to run on a CPU in tests; none of them includes a header of CUDA's, torch's or the standard library's.

#pragma once

#include "signs.cuh"

#define FLEXLORA_KERNELS(kernel) kernel(signs)
