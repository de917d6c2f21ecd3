#ifdef FLEXLORA_WITH_CUDA

#include "cuda/launch_bindings.h"

#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "cuda/launch.h"

namespace py = pybind11;

namespace flexlora::cuda {
namespace {

// torch.float64 -> "float64"
std::string dtype_name(const py::handle& tensor) {
    const std::string name = py::str(tensor.attr("dtype"));
    return name.substr(name.find('.') + 1);
}

// A tensor on that GPU, None, an int or a float; anything else is described, for the message that refuses it.
Argument argument_of(const py::handle& object, int device) {
    PyObject* const pointer = object.ptr();
    if (THPVariable_Check(pointer)) {
        const at::Tensor& tensor = THPVariable_Unpack(pointer);
        const std::string type = dtype_name(object);
        if (!tensor.is_cuda() || tensor.get_device() != device) {
            return Other{"a tensor of " + type + " on " + tensor.device().str()};
        }
        return Address{reinterpret_cast<std::uintptr_t>(tensor.data_ptr()), type};
    }
    if (object.is_none()) return Address{0, ""};
    if (PyFloat_Check(pointer)) return PyFloat_AS_DOUBLE(pointer);
    if (PyLong_Check(pointer) && !PyBool_Check(pointer)) {
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(pointer, &overflow);
        if (overflow == 0) return static_cast<std::int64_t>(value);
        return Other{"the int " + std::string(py::str(object))};
    }
    return Other{std::string("a ") + Py_TYPE(pointer)->tp_name};
}

std::optional<std::string> unless_empty(std::string text) {
    if (text.empty()) return std::nullopt;
    return text;
}

}  // namespace

void bind(py::module_ module) {
    using py::arg;
    module.doc() = "The kernels of csrc/cuda, launched by name; flexlora_fast.backends.launcher is their Python face.";
    module.def(
        "kernels",
        [] {
            std::map<std::string, std::vector<std::string>> found;
            for (const auto& [name, kernel] : kernels()) found[name] = kernel.parameters;
            return found;
        },
        "The kernels' parameters, by name: 'float64', or 'float64*' for a tensor.");
    module.def(
        "obstacle", [](int device) { return unless_empty(obstacle(device)); }, arg("device"),
        "Why kernels cannot be launched on the GPU of that index; None if they can.");
    module.def(
        "launch",
        [](const std::string& name, const Extent& grid, const Extent& block, std::size_t shared_bytes, int device,
           std::uintptr_t stream, const py::sequence& arguments) {
            std::vector<Argument> converted;
            for (const py::handle argument : arguments) converted.push_back(argument_of(argument, device));
            const py::gil_scoped_release release;
            launch(name, grid, block, shared_bytes, device, reinterpret_cast<void*>(stream), converted);
        },
        arg("name"), arg("grid"), arg("block"), arg("shared_bytes"), arg("device"), arg("stream"), arg("arguments"),
        R"doc(Launch a kernel on a GPU and one of its streams, and do not wait for it.

grid, block: three extents each. arguments: as the kernel takes them, tensors of that GPU (None: no address), ints and
floats. Raises ValueError, quoting kernel, position, what was expected and what came, where one does not fit, and
RuntimeError, quoting the geometry and CUDA's own words, where CUDA refuses.)doc");
}

}  // namespace flexlora::cuda

#endif
