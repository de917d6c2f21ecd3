// The Python face of flexlora_fast._C: argument conversion and the GIL, nothing else.

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/matmul.h"
#include "cpu/require.h"
#include "cuda/kernel.h"
#include "cuda/signs_host.h"
#ifdef FLEXLORA_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;
using flexlora::cpu::Precision;

namespace {

Precision precision_of(const std::string& name) {
    if (name == "float32") return Precision::f32;
    if (name == "bfloat16") return Precision::bf16;
    throw std::invalid_argument("precision is '" + name + "': expected 'float32' or 'bfloat16'");
}

at::Tensor emulated_signs(const at::Tensor& addresses, int rows, int cols) {
    flexlora::require(addresses.dim() == 2 && addresses.size(1) == 2 && addresses.scalar_type() == at::kLong &&
                          addresses.is_contiguous() && addresses.is_cpu(),
                      "addresses must be a contiguous int64 tensor (count, 2) on the CPU");
    const at::Tensor out = at::empty({addresses.size(0), rows, cols}, at::kFloat);
    flexlora::emulated::signs(addresses.const_data_ptr<int64_t>(), addresses.size(0), rows, cols,
                              out.mutable_data_ptr<float>());
    return out;
}

#ifdef FLEXLORA_WITH_CUDA

using flexlora::cuda::Argument;

// torch.float64 -> "float64"
std::string dtype_name(const py::handle& tensor) {
    const std::string name = py::str(tensor.attr("dtype"));
    return name.substr(name.find('.') + 1);
}

// A tensor on `device`, an int or a float; anything else is described, for the message that refuses it.
Argument argument_of(const py::handle& object, int device) {
    if (THPVariable_Check(object.ptr())) {
        const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
        const std::string type = dtype_name(object);
        if (tensor.is_cuda() && tensor.get_device() == device) {
            return flexlora::cuda::Address{reinterpret_cast<std::uintptr_t>(tensor.data_ptr()), type};
        }
        return flexlora::cuda::Other{"a " + type + " tensor on " + tensor.device().str()};
    }
    if (PyFloat_Check(object.ptr())) return PyFloat_AS_DOUBLE(object.ptr());
    if (PyLong_Check(object.ptr()) && !PyBool_Check(object.ptr())) {
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
        if (overflow == 0) return static_cast<std::int64_t>(value);
        return flexlora::cuda::Other{"the int " + std::string(py::str(object))};
    }
    return flexlora::cuda::Other{std::string("a ") + Py_TYPE(object.ptr())->tp_name};
}

void bind_cuda(py::module_& m) {
    m.def(
        "kernels",
        [] {
            std::map<std::string, std::vector<std::string>> found;
            for (const auto& [name, kernel] : flexlora::cuda::kernels()) found[name] = kernel.parameters;
            return found;
        },
        "The kernels' parameters, by name: 'float64', or 'float64*' for a tensor.");
    m.def(
        "obstacle",
        [](int device) -> std::optional<std::string> {
            const std::string found = flexlora::cuda::obstacle(device);
            return found.empty() ? std::nullopt : std::optional<std::string>(found);
        },
        py::arg("device"), "Why kernels cannot be launched on the GPU of that index; None if they can.");
    m.def(
        "launch",
        [](const std::string& name, const flexlora::cuda::Extent& grid, const flexlora::cuda::Extent& block,
           std::size_t shared_bytes, int device, std::uintptr_t stream, const py::sequence& arguments) {
            std::vector<Argument> converted;
            for (const py::handle argument : arguments) converted.push_back(argument_of(argument, device));
            const py::gil_scoped_release release;
            flexlora::cuda::launch(name, grid, block, shared_bytes, device, reinterpret_cast<void*>(stream), converted);
        },
        py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("shared_bytes"), py::arg("device"),
        py::arg("stream"), py::arg("arguments"),
        R"doc(Launch a kernel on a GPU and one of its streams, and do not wait for it.

grid, block: three extents each. arguments: tensors of that GPU, ints and floats, as the kernel takes them.
Raises ValueError, quoting kernel, position, what was expected and what came, where an argument does not fit, and
RuntimeError, quoting the geometry and CUDA's own words, where CUDA refuses.)doc");
}

#endif

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
    py::module_ emulated = m.def_submodule("emulated", "The arithmetic of csrc/cuda on the CPU, for tests.");
    emulated.def("signs", emulated_signs, py::arg("addresses"), py::arg("rows"), py::arg("cols"),
                 "Random signs (count, rows, cols) of addresses (count, 2): lowrank.random.signs_of.");
#ifdef FLEXLORA_WITH_CUDA
    py::module_ cuda = m.def_submodule("cuda", "CUDA kernels, launched by name; flexlora_fast.backends.cuda calls them.");
    bind_cuda(cuda);
#endif
}
