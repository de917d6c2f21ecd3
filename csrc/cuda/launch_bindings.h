// The Python face of kernel.h and launch.h.

#pragma once

#include <torch/csrc/utils/pybind.h>

namespace flexlora::cuda {

// How arguments are converted, for tests on the CPU: flexlora_fast._C.emulated.slots.
void bind_slots(pybind11::module_& module);

#ifdef FLEXLORA_WITH_CUDA
// flexlora_fast._C.cuda.
void bind(pybind11::module_ module);
#endif

}  // namespace flexlora::cuda
