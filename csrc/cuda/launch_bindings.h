// The Python face of launch.h: flexlora_fast._C.cuda.

#pragma once

#include <torch/csrc/utils/pybind.h>

namespace flexlora::cuda {

void bind(pybind11::module_ module);

}  // namespace flexlora::cuda
