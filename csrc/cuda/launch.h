// Launches kernels by name. Only csrc/cuda/*.cu need CUDA's headers; who includes this does not.

#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "cuda/kernel.h"

namespace flexlora::cuda {

using Extent = std::array<unsigned, 3>;

// Every kernel, as nvcc compiled it.
const Kernels& kernels();

// Launches a kernel on a device and one of its streams (a cudaStream_t; the type is CUDA's) and does not wait for it.
// Raises std::invalid_argument as `find` and `slots` do, and std::runtime_error, quoting kernel, geometry, device and
// CUDA's own words, where CUDA refuses.
void launch(const std::string& name, const Extent& grid, const Extent& block, std::size_t shared_bytes, int device,
            void* stream, const std::vector<Argument>& arguments);

// Why kernels cannot be launched on that device; empty if they can.
std::string obstacle(int device);

}  // namespace flexlora::cuda
