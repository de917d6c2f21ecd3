// The Python face of flexlora_fast._C: argument conversion and the GIL, nothing else.

#include <pybind11/numpy.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/gather.h"
#include "cpu/matmul.h"
#include "cpu/require.h"
#include "cuda/host.h"
#include "cuda/launch_bindings.h"
#include "cuda/signs_host.h"

namespace py = pybind11;
using flexlora::cpu::Precision;

namespace {

Precision precision_of(const std::string& name) {
    if (name == "float32") return Precision::f32;
    if (name == "bfloat16") return Precision::bf16;
    throw std::invalid_argument("precision is '" + name + "': expected 'float32' or 'bfloat16'");
}

using Int64 = py::array_t<int64_t, py::array::c_style>;

flexlora::cpu::Ranges ranges_of(const Int64& descriptor, const Int64& start, const Int64& nbytes,
                                const Int64& target) {
    for (const Int64* array : {&descriptor, &start, &nbytes, &target}) {
        flexlora::require(array->ndim() == 1 && array->size() == descriptor.size(), "arrays of ", array->size(), " and ",
                          descriptor.size(), " numbers in ", array->ndim(), " dimensions: expected (N,) for all four");
    }
    return {descriptor.size(), descriptor.data(), start.data(), nbytes.data(), target.data()};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "Native operations of flexlora_fast; flexlora_fast.backends holds their readable twins.";
    m.def(
        "obstacle",
        [](const std::string& precision) -> std::optional<std::string> {
            const std::string found = flexlora::cpu::obstacle(precision_of(precision));
            return found.empty() ? std::nullopt : std::optional<std::string>(found);
        },
        py::arg("precision"), "Why there are no products in 'float32' or 'bfloat16' here; None if there are.");
    m.def(
        "can_multiply",
        [](const std::string& precision) { return flexlora::cpu::obstacle(precision_of(precision)).empty(); },
        py::arg("precision"), "Whether this machine and this torch have block kernels for 'float32' or 'bfloat16'.");
    m.def(
        "matmul",
        [](const std::vector<at::Tensor>& A, int64_t a_axis, const std::vector<at::Tensor>& B, int64_t b_axis,
           const std::string& precision, bool symmetric, const std::optional<at::Tensor>& scale,
           const std::optional<at::Tensor>& out) {
            const Precision chosen = precision_of(precision);
            // Every argument is converted; from here on no Python object is touched.
            const py::gil_scoped_release release;
            return flexlora::cpu::matmul(A, a_axis, B, b_axis, chosen, symmetric, scale, out);
        },
        py::arg("A"), py::arg("a_axis"), py::arg("B"), py::arg("b_axis"), py::arg("precision") = "float32",
        py::arg("symmetric") = false, py::arg("scale") = py::none(), py::arg("out") = py::none(),
        R"doc(C = A · diag(scale) · B in float32, or out += A · diag(scale) · B.

A (M, K), B (K, N): tables of 2-D tensors, joined along axis a_axis and b_axis (0: rows, 1: columns), each float16,
bfloat16 or float32, on the CPU, of any strides. scale: (K,) float64.
precision: 'float32', or 'bfloat16' where operands are rounded to it, unless scale changes too often for that to pay;
sums are float32, and scale multiplies float32 values either way.
symmetric: the product is, and one triangle is computed.
The order of summation depends on K and scale alone. Inputs are never modified; out must not overlap them.
Raises ValueError, quoting the value, where shapes, types or devices do not fit.)doc");
    m.def(
        "gather",
        [](const Int64& descriptor, const Int64& start, const Int64& nbytes, const Int64& target, at::Tensor out,
           int64_t threads) -> std::optional<std::pair<int64_t, int>> {
            const auto ranges = ranges_of(descriptor, start, nbytes, target);
            flexlora::require(out.device().is_cpu() && out.scalar_type() == at::kByte && out.is_contiguous(),
                              "out is ", out.scalar_type(), " on ", out.device(), ": expected contiguous bytes on the CPU");
            char* const buffer = static_cast<char*>(out.mutable_data_ptr());
            const py::gil_scoped_release release;
            const auto failure = flexlora::cpu::gather(ranges, buffer, out.numel(), threads);
            return failure ? std::optional(std::pair(failure->range, failure->error)) : std::nullopt;
        },
        py::arg("descriptor"), py::arg("start"), py::arg("nbytes"), py::arg("target"), py::arg("out"),
        py::arg("threads"),
        R"doc(Copy N ranges of bytes from files and memory into a buffer; flexlora_fast.gather holds the twin.

descriptor, start, nbytes, target: (N,) int64. A range comes from byte start of the file of a descriptor, or from the
address start where descriptor is -1, and goes to byte target of out (contiguous uint8 on the CPU).
Returns None, or the first range that could not be read and its errno (0: its file ends too early).
Raises ValueError before anything is read where a range does not fit out.)doc");
    py::module_ emulated = m.def_submodule("emulated");
    flexlora::host::bind(emulated);
    emulated.def("signs", &flexlora::host::signs, py::arg("addresses"), py::arg("rows"), py::arg("cols"),
                 "addresses (count, 2) int64 -> (count, rows, cols) float32.");
    flexlora::cuda::bind_checks(emulated);
#ifdef FLEXLORA_WITH_CUDA
    flexlora::cuda::bind(m.def_submodule("cuda"));
#endif
}
