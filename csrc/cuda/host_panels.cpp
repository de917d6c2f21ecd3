// Tall panels and large Grams, many thread blocks each.

#include "cuda/host.h"

#include <algorithm>

#include "cuda/apply_right.cuh"
#include "cuda/chebyshev.cuh"
#include "cuda/emulate.h"
#include "cuda/gram64.cuh"
#include "cuda/host_checks.h"
#include "cuda/scale_grams.cuh"

namespace flexlora::host {

Tensor gram64(Execution how, const Tensor& X, const Tensor& Y, bool symmetric, int64_t rows,
              const std::optional<Tensor>& only) {
    check_execution(how);
    check_panels(X, "X");
    check_panels(Y, "Y");
    const int64_t L = X.size(0), m = X.size(1), w = X.size(2), v = Y.size(2);
    require(Y.size(0) == L && Y.size(1) == m && (!symmetric || v == w), "X and Y have shapes ", X.sizes(), " and ",
            Y.sizes(), ": expected (L, m, w) and (L, m, v), v = w for a symmetric product");
    require(rows >= 1, "rows is ", rows, ": expected 1 or more");
    const int slices = static_cast<int>(std::max<int64_t>(1, (m + rows - 1) / rows));
    Tensor out = at::zeros({L, w, v}, X.options().dtype(at::kDouble));
    Tensor parts = slices == 1 ? out : like(X, {L, slices, w, v}, at::kDouble);
    const flag* const which = chosen(only, L);
    const Panels p{X.data_ptr<float>(),
                   Y.data_ptr<float>(),
                   parts.data_ptr<double>(),
                   which,
                   X.stride(0),
                   X.stride(1),
                   Y.stride(0),
                   Y.stride(1),
                   static_cast<int>(m),
                   static_cast<int>(w),
                   static_cast<int>(v),
                   static_cast<int>(std::min<int64_t>(rows, std::max<int64_t>(m, 1))),
                   slices,
                   symmetric};
    const int down = (p.w + SIDE - 1) / SIDE, across = (p.v + SIDE - 1) / SIDE;
    const int tiles = symmetric ? packed(down) : down * across;
    for (int64_t layer = 0; layer < L; ++layer)
        for (int slice = 0; slice < slices; ++slice)
            for (int tile = 0; tile < tiles; ++tile)
                emulate("gram64", how.threads, gram64_shared(), [&](auto& block, double* shared) {
                    flexlora::gram64(block, p, tile, slice, layer, reinterpret_cast<float*>(shared));
                });
    for (int64_t layer = 0; layer < L && slices > 1; ++layer)
        for (int part = 0; part < (p.w + SUM_ROWS - 1) / SUM_ROWS; ++part)
            emulate("gram64_sum", how.threads, 0, [&](auto& block, double*) {
                gram64_sum(block, parts.data_ptr<double>(), out.data_ptr<double>(), which, p.w, p.v, slices, symmetric,
                           part, layer);
            });
    return out;
}

void apply_right(Execution how, const Tensor& Y, const Tensor& T, const Tensor& out,
                 const std::optional<Tensor>& only) {
    check_execution(how);
    check_panels(Y, "Y");
    check_panels(out, "out");
    const int l = matrices(T, "T");
    const int64_t L = T.size(0), m = Y.size(1);
    require(Y.size(0) == L && Y.size(2) == l && out.sizes() == Y.sizes(), "Y, T and out have shapes ", Y.sizes(), ", ",
            T.sizes(), " and ", out.sizes(), ": expected (L, m, l), (L, l, l) and (L, m, l)");
    const Application p{
        Y.data_ptr<float>(), T.data_ptr<double>(), out.data_ptr<float>(), chosen(only, L),     Y.stride(0),
        Y.stride(1),         out.stride(0),        out.stride(1),         static_cast<int>(m), l};
    for (int64_t layer = 0; layer < L; ++layer)
        for (int part = 0; part < (p.m + PANEL_ROWS - 1) / PANEL_ROWS; ++part)
            emulate("apply_right", how.threads, apply_shared(l),
                    [&](auto& block, double* shared) { flexlora::apply_right(block, p, part, layer, shared); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scale_grams(Execution how, const Tensor& G, const Tensor& M,
                                                       const Tensor& d) {
    check_execution(how);
    check(G, "G", at::kFloat, 3);
    check(M, "M", at::kFloat, 3);
    check(d, "d", at::kDouble, 2);
    const int64_t L = G.size(0), W = G.size(1);
    require(G.size(2) == W && M.sizes() == G.sizes() && (d.size(0) == L || d.size(0) == 1) && d.size(1) == W,
            "G, M and d have shapes ", G.sizes(), ", ", M.sizes(), " and ", d.sizes(),
            ": expected (L, W, W) twice and (L, W) or (1, W)");
    const int count = static_cast<int>((W + ROWS - 1) / ROWS);
    Tensor p = like(G, {L, W}, at::kFloat), r = at::empty_like(p), bad = like(G, {L}, at::kBool);
    Tensor parts = like(G, {L, count}, at::kDouble), energy = like(G, {L}, at::kDouble);
    for (int64_t layer = 0; layer < L; ++layer) {
        emulate("norms", how.threads, 0, [&](auto& block, double*) {
            norms(block, G.data_ptr<float>(), M.data_ptr<float>(), d.data_ptr<double>(), p.data_ptr<float>(),
                  r.data_ptr<float>(), flags(bad), d.size(0) == 1 ? 0 : W, static_cast<int>(W), layer);
        });
        for (int part = 0; part < count; ++part)
            emulate("scale", how.threads, total_shared(), [&](auto& block, double* shared) {
                scale(block, G.data_ptr<float>(), M.data_ptr<float>(), p.data_ptr<float>(), r.data_ptr<float>(),
                      parts.data_ptr<double>(), static_cast<int>(W), part, count, layer, shared);
            });
        emulate("energy", how.threads, total_shared(), [&](auto& block, double* shared) {
            flexlora::energy(block, parts.data_ptr<double>(), energy.data_ptr<double>(), count, layer, shared);
        });
    }
    return {p, r, bad, energy};
}

Tensor chebyshev(Execution how, const Tensor& product, const Tensor& now, const std::optional<Tensor>& before,
                 const Tensor& a, const Tensor& b, const std::optional<Tensor>& c) {
    check_execution(how);
    check(product, "product", at::kFloat, 3);
    check(now, "now", at::kFloat, 3);
    check(a, "a", at::kFloat, 2);
    check(b, "b", at::kFloat, 2);
    const int64_t L = product.size(0), W = product.size(1), w = product.size(2);
    require(now.sizes() == product.sizes() && a.size(0) == L && a.size(1) == w && b.sizes() == a.sizes(),
            "product, now, a and b have shapes ", product.sizes(), ", ", now.sizes(), ", ", a.sizes(), " and ",
            b.sizes(), ": expected (L, W, w) twice and (L, w) twice");
    require(before.has_value() == c.has_value(), "before and c: expected both or neither");
    if (before) {
        check(*before, "before", at::kFloat, 3);
        check(*c, "c", at::kFloat, 2);
        require(before->sizes() == product.sizes() && c->sizes() == a.sizes(), "before and c have shapes ",
                before->sizes(), " and ", c->sizes(), ": expected those of product and a");
    }
    Tensor out = at::empty_like(product);
    const Recurrence r{product.data_ptr<float>(),
                       now.data_ptr<float>(),
                       before ? before->data_ptr<float>() : nullptr,
                       out.data_ptr<float>(),
                       a.data_ptr<float>(),
                       b.data_ptr<float>(),
                       c ? c->data_ptr<float>() : nullptr,
                       static_cast<int>(W),
                       static_cast<int>(w)};
    const int chunks = static_cast<int>((W * w + CHUNK - 1) / CHUNK);
    for (int64_t layer = 0; layer < L; ++layer)
        for (int chunk = 0; chunk < chunks; ++chunk)
            emulate("chebyshev", how.threads, 0,
                    [&](auto& block, double*) { flexlora::chebyshev(block, r, chunk, layer); });
    return out;
}

}  // namespace flexlora::host
