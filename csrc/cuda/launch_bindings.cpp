#include "cuda/launch_bindings.h"

#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "cuda/kernel.h"
#ifdef FLEXLORA_WITH_CUDA
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace flexlora::cuda {
namespace {

// torch.float64 -> "float64"
std::string dtype_name(const py::handle& object, const at::Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kDouble: return "float64";
        case at::kFloat: return "float32";
        case at::kLong: return "int64";
        case at::kInt: return "int32";
        case at::kByte: return "uint8";
        case at::kBool: return "bool";
        default: break;  // for a message alone, so it may be slow
    }
    const std::string name = py::str(object.attr("dtype"));
    return name.substr(name.find('.') + 1);
}

// A tensor on that GPU (−1: on the CPU), None, an int or a float; anything else is described, for the message that refuses it.
Argument argument_of(const py::handle& object, int device) {
    PyObject* const pointer = object.ptr();
    if (THPVariable_Check(pointer)) {
        const at::Tensor& tensor = THPVariable_Unpack(pointer);
        const std::string type = dtype_name(object, tensor);
        const bool here = device < 0 ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device() == device;
        if (!here) return Other{"a tensor of " + type + " on " + tensor.device().str()};
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

std::vector<Argument> arguments_of(const py::sequence& objects, int device) {
    std::vector<Argument> arguments;
    for (const py::handle object : objects) arguments.push_back(argument_of(object, device));
    return arguments;
}

}  // namespace

void bind_slots(py::module_& module) {
    module.def(
        "slots",
        [](const std::string& name, const std::vector<std::string>& parameters, const py::sequence& arguments) {
            py::list found;
            for (const Slot& slot : slots(name, Kernel{nullptr, parameters}, arguments_of(arguments, -1))) {
                found.append(py::bytes(reinterpret_cast<const char*>(&slot), sizeof slot));
            }
            return found;
        },
        py::arg("name"), py::arg("parameters"), py::arg("arguments"),
        "The eight bytes that each argument of a launch becomes, for tensors on the CPU.");
}

#ifdef FLEXLORA_WITH_CUDA

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
        "obstacle",
        [](int device) -> std::optional<std::string> {
            const std::string found = obstacle(device);
            return found.empty() ? std::nullopt : std::optional<std::string>(found);
        },
        arg("device"),
        "Why kernels cannot be launched on the GPU of that index; None if they can.");
    module.def(
        "launch",
        [](const std::string& name, const Extent& grid, const Extent& block, std::size_t shared_bytes, int device,
           std::uintptr_t stream, const py::sequence& arguments) {
            const std::vector<Argument> converted = arguments_of(arguments, device);
            const py::gil_scoped_release release;
            launch(name, grid, block, shared_bytes, device, reinterpret_cast<void*>(stream), converted);
        },
        arg("name"), arg("grid"), arg("block"), arg("shared_bytes"), arg("device"), arg("stream"), arg("arguments"),
        R"doc(Launch a kernel on a GPU and one of its streams, and do not wait for it.

grid, block: three extents each. arguments: as the kernel takes them, tensors of that GPU (None: no address), ints and
floats. Raises ValueError, quoting kernel, position, what was expected and what came, where one does not fit, and
RuntimeError, quoting the geometry and CUDA's own words, where CUDA refuses.)doc");
}

#endif

}  // namespace flexlora::cuda
