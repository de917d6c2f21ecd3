// The Python face of host.h: flexlora_fast._C.emulated.

#include "cuda/host.h"

#include <map>
#include <stdexcept>
#include <string>

#include "cuda/apply_right.cuh"
#include "cuda/gram64.cuh"
#include "cuda/jacobi.cuh"
#include "cuda/ritz.cuh"
#include "cuda/root.cuh"
#include "cuda/scale_grams.cuh"
#include "cuda/whiten.cuh"

namespace py = pybind11;

namespace flexlora::host {
namespace {

// Adds `function` under `name`; its Execution is given as `threads` and `workspace`.
template <typename Result, typename... Arguments, typename... Names>
void add(py::module_& module, const char* name, const char* doc, Result (*function)(Execution, Arguments...),
         const Names&... names) {
    module.def(
        name,
        [function](Arguments... arguments, int threads, bool workspace) {
            const py::gil_scoped_release release;
            return function(Execution{threads, workspace}, arguments...);
        },
        names..., py::arg("threads") = 1, py::arg("workspace") = false, doc);
}

// Dynamic shared memory (bytes) of each kernel that has some, for l columns.
std::map<std::string, long long> shared_bytes(int l, bool workspace) {
    const bool inside = !workspace;
    return {{"flexlora_whiten", whiten_shared(l, inside)},
            {"flexlora_condition", whiten_shared(l, inside)},
            {"flexlora_ritz", ritz_shared(l, inside)},
            {"flexlora_rotate", rotate_shared(l)},
            {"flexlora_root", root_shared(l, inside)},
            {"flexlora_gram64", gram64_shared()},
            {"flexlora_apply_right", apply_shared(l)},
            {"flexlora_scale", total_shared()},
            {"flexlora_energy", total_shared()},
            {"flexlora_jacobi_eigh", jacobi_shared(l, inside ? 1 : 0)},
            {"flexlora_jacobi_svd", jacobi_shared(l, inside ? 2 : 0)}};
}

}  // namespace

void bind(py::module_ module) {
    using py::arg;
    module.doc() = "The device code of csrc/cuda on CPU tensors, for tests; see csrc/cuda/host.h.";
    module.def("shared_bytes", &shared_bytes, arg("l"), arg("workspace"),
               "Dynamic shared memory (bytes) of each kernel that has some: what a launch has to ask for.");
    add(module, "whiten", "gram (L, l, l) float64 -> T float64, T float32, shifted (L,) bool.", &whiten, arg("gram"));
    add(module, "condition", "gram (L, l, l) float64 -> T float32.", &condition, arg("gram"));
    add(module, "ritz", "G, C (L, l, l) float64 -> T, small, shifted (L,) bool, spoiled (L,) bool.", &ritz, arg("G"),
        arg("C"));
    add(module, "rotate",
        "T, vectors (L, l, l) and values (L, l) float64, spoiled (L,) -> rotation (L, l, k) float32, scaled or None, "
        "found (L, k) float64.",
        &rotate, arg("T"), arg("vectors"), arg("values"), arg("spoiled"), arg("k"), arg("last"));
    add(module, "gram64", "XᵀY of X (L, m, w), Y (L, m, v) float32 -> (L, w, v) float64, in slices of so many rows.",
        &gram64, arg("X"), arg("Y"), arg("symmetric") = false, arg("rows") = 1 << 30, arg("only") = py::none());
    add(module, "root", "gram (L, l, l) float64 -> T float64, rank (L,) int32, again (L,) bool.", &root, arg("gram"),
        arg("only") = py::none());
    add(module, "apply_right", "Y (L, m, l) float32, T (L, l, l) float64 -> out (L, m, l) = Y·T; out may be Y.",
        &apply_right, arg("Y"), arg("T"), arg("out"), arg("only") = py::none());
    add(module, "scale_grams", "G, M (L, W, W) float32 in place, d (L, W) float64 -> p, r, bad, energy.", &scale_grams,
        arg("G"), arg("M"), arg("d"));
    add(module, "chebyshev", "a·product + b·now + c·before for (L, W, w) float32, coefficients (L, w).", &chebyshev,
        arg("product"), arg("now"), arg("before"), arg("a"), arg("b"), arg("c"));
    add(module, "jacobi_eigh", "C (L, l, l) float64 -> values ascending, vectors in rows, converged (L,) bool.",
        &jacobi_eigh, arg("C"));
    add(module, "jacobi_svd", "A (L, l, l) float64 -> U, S descending, V, converged (L,) bool.", &jacobi_svd, arg("A"));
}

}  // namespace flexlora::host
