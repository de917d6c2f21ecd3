// The Python face of flexlora_fast._C: argument conversion and the GIL, nothing else.

#include <torch/csrc/utils/pybind.h>

#include "cpu/materialize.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "Native operations of flexlora_fast; flexlora_fast.backends holds their readable twins.";
    m.def("materialize", &flexlora::cpu::materialize, py::arg("B"), py::arg("A"), py::arg("d"),
          // The lists are converted before the guard is taken; from there on no Python object is touched.
          py::call_guard<py::gil_scoped_release>(),
          R"doc(ΔW = Σ_i (B_i · diag(d_i)) · A_i, dense and in float32.

B: K matrices (m, r_i), A: K matrices (r_i, n), each float16, bfloat16 or float32, on the CPU, of any strides.
d: (R,) float64, R = Σ r_i, the coefficients of the clients one after the other.
Products are accumulated in float32 and d is applied to float32 values. Inputs are never modified.
Raises ValueError, quoting the client's position and the value, where shapes, types or devices do not fit.)doc");
}
