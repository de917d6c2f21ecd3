// The Python face of kernel.h and launch.h.

#pragma once

#include <torch/csrc/utils/pybind.h>

namespace flexlora::cuda {

// What the host functions have to agree with, for tests on the CPU: _C.emulated.slots and .shared_bytes.
void bind_checks(pybind11::module_& module);

#ifdef FLEXLORA_WITH_CUDA
// flexlora_fast._C.cuda.
void bind(pybind11::module_ module);
#endif

}  // namespace flexlora::cuda
