// The Python face of flexlora_fast._C: argument conversion and the GIL, nothing else.

#include <pybind11/numpy.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

// What lies at an address that Python knows.
template <typename T>
T at_address(uintptr_t address) {
    return reinterpret_cast<T>(address);
}

std::vector<void*> handles(const std::vector<uintptr_t>& numbers) {
    std::vector<void*> result;
    for (const uintptr_t number : numbers) result.push_back(at_address<void*>(number));
    return result;
}

char* bytes_of(const at::Tensor& buffer) {
    flexlora::require(buffer.device().is_cpu() && buffer.scalar_type() == at::kByte && buffer.is_contiguous(),
                      "a buffer is ", buffer.scalar_type(), " on ", buffer.device(),
                      ": expected contiguous bytes on the CPU");
    return static_cast<char*>(buffer.mutable_data_ptr());
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
            char* const buffer = bytes_of(out);
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
    m.def(
        "stage",
        [](const Int64& descriptor, const Int64& start, const Int64& nbytes, const Int64& target, uint64_t to,
           int64_t size, const std::vector<at::Tensor>& slots, size_t first,
           const std::tuple<uintptr_t, uintptr_t, uintptr_t>& functions, const std::vector<uintptr_t>& streams,
           const std::vector<uintptr_t>& done, int64_t threads) -> std::optional<std::tuple<int64_t, int, int>> {
            using flexlora::cpu::Device;
            const auto ranges = ranges_of(descriptor, start, nbytes, target);
            flexlora::cpu::Slots memory{{}, handles(done), slots.empty() ? 0 : slots[0].numel(), first};
            for (const at::Tensor& slot : slots) memory.memory.push_back(bytes_of(slot));
            flexlora::require(memory.bytes > 0 && slots.size() == done.size() && !streams.empty(), slots.size(),
                              " slots of ", memory.bytes, " bytes, ", done.size(), " events and ", streams.size(),
                              " streams: expected at least one of each, and an event for each slot");
            for (const at::Tensor& slot : slots) {
                flexlora::require(slot.numel() == memory.bytes, "slots of ", slot.numel(), " and ", memory.bytes, " bytes");
            }
            const Device device{at_address<decltype(Device::copy)>(std::get<0>(functions)),
                                at_address<decltype(Device::record)>(std::get<1>(functions)),
                                at_address<decltype(Device::wait)>(std::get<2>(functions)), handles(streams)};
            const py::gil_scoped_release release;
            const auto refusal = flexlora::cpu::stage(ranges, to, size, memory, device, threads);
            if (!refusal) return std::nullopt;
            return std::tuple(refusal->failure.range, refusal->failure.error, refusal->device);
        },
        py::arg("descriptor"), py::arg("start"), py::arg("nbytes"), py::arg("target"), py::arg("to"), py::arg("size"),
        py::arg("slots"), py::arg("first"), py::arg("functions"), py::arg("streams"), py::arg("done"),
        py::arg("threads"),
        R"doc(Copy N ranges of bytes through slots to a device; flexlora_fast.staging holds the twin.

descriptor, start, nbytes, target: as for gather, of a buffer of `size` bytes at the device's address `to`.
slots: contiguous uint8 on the CPU, of one size. They are filled in turn, from `first` on, by `threads` threads, each
once the event done[i] has come that tells of the last copy from it.
functions: addresses of copy(target, source, nbytes, stream), record(event, stream) and wait(event), as CUDA's driver
has them; streams, done: handles for them. Only the calling thread calls them, without the GIL.
Returns None when all copies have begun, or (range, errno, device): the first range that could not be read and its
errno, or, where it is not 0, what the device answered.)doc");
    py::module_ emulated = m.def_submodule("emulated");
    flexlora::host::bind(emulated);
    emulated.def("signs", &flexlora::host::signs, py::arg("addresses"), py::arg("rows"), py::arg("cols"),
                 "addresses (count, 2) int64 -> (count, rows, cols) float32.");
    flexlora::cuda::bind_slots(emulated);
#ifdef FLEXLORA_WITH_CUDA
    flexlora::cuda::bind(m.def_submodule("cuda"));
#endif
}
