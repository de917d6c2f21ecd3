// What the functions of host.h ask of their arguments, and the tensors they make.

#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "cpu/require.h"
#include "cuda/host.h"
#include "cuda/platform.cuh"

namespace flexlora::host {

constexpr int64_t LARGEST = 256;

inline void check(const Tensor& x, const char* name, at::ScalarType type, int64_t dimensions) {
    require(x.device().is_cpu() && x.scalar_type() == type && x.dim() == dimensions && x.is_contiguous(), name, " is ",
            x.scalar_type(), " of shape ", x.sizes(), " on ", x.device(), ": expected a contiguous ", type,
            " CPU tensor of ", dimensions, " dimensions");
}

inline void check_execution(Execution how) {
    require(how.threads >= 1 && how.threads <= 64, "threads is ", how.threads, ": expected 1 to 64");
}

// The size l of square float64 matrices (L, l, l).
inline int matrices(const Tensor& x, const char* name) {
    check(x, name, at::kDouble, 3);
    const int64_t l = x.size(1);
    require(x.size(2) == l && l >= 1 && l <= LARGEST, name, " has shape ", x.sizes(),
            ": expected (L, l, l), l from 1 to ", LARGEST);
    return static_cast<int>(l);
}

// Panels (L, m, l) float32 with contiguous rows, l up to LARGEST.
inline void check_panels(const Tensor& x, const char* name) {
    require(
        x.device().is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1),
        name, " is ", x.scalar_type(), " of shape ", x.sizes(), " and strides ", x.strides(), " on ", x.device(),
        ": expected a Float CPU tensor (L, m, l) with contiguous rows");
    require(x.size(2) >= 1 && x.size(2) <= LARGEST, name, " has shape ", x.sizes(), ": expected 1 to ", LARGEST,
            " columns");
}

// The flags of the layers to compute, or null.
inline const flag* chosen(const std::optional<Tensor>& only, int64_t layers) {
    if (!only) return nullptr;
    check(*only, "only", at::kBool, 1);
    require(only->size(0) == layers, "only has ", only->size(0), " entries for ", layers, " layers");
    return reinterpret_cast<const flag*>(only->data_ptr<bool>());
}

inline Tensor like(const Tensor& x, at::IntArrayRef shape, at::ScalarType type) {
    return at::empty(shape, x.options().dtype(type));
}

inline flag* flags(const Tensor& x) { return reinterpret_cast<flag*>(x.data_ptr<bool>()); }

// `count` doubles a layer in place of shared memory, if asked for.
inline std::vector<double> workspace_of(Execution how, int64_t layers, int64_t count) {
    return std::vector<double>(how.workspace ? layers * count : 0);
}

}  // namespace flexlora::host
