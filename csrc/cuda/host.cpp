// Small square matrices, one thread block each.

#include "cuda/host.h"

#include "cuda/emulate.h"
#include "cuda/host_checks.h"
#include "cuda/jacobi.cuh"
#include "cuda/ritz.cuh"
#include "cuda/root.cuh"
#include "cuda/whiten.cuh"

namespace flexlora::host {

std::tuple<Tensor, Tensor, Tensor> whiten(Execution how, const Tensor& gram) {
    check_execution(how);
    const int l = matrices(gram, "gram");
    const int64_t L = gram.size(0);
    Tensor T = at::empty_like(gram), T32 = like(gram, gram.sizes(), at::kFloat), shifted = like(gram, {L}, at::kBool);
    std::vector<double> space = workspace_of(how, L, packed(l));
    double* const workspace = how.workspace ? space.data() : nullptr;
    for (int64_t layer = 0; layer < L; ++layer)
        emulate("whiten", how.threads, whiten_shared(l, !workspace), [&](auto& block, double* shared) {
            flexlora::whiten(block, gram.data_ptr<double>(), T.data_ptr<double>(), T32.data_ptr<float>(),
                             flags(shifted), workspace, l, layer, shared);
        });
    return {T, T32, shifted};
}

Tensor condition(Execution how, const Tensor& gram) {
    check_execution(how);
    const int l = matrices(gram, "gram");
    Tensor T32 = like(gram, gram.sizes(), at::kFloat);
    std::vector<double> space = workspace_of(how, gram.size(0), packed(l));
    double* const workspace = how.workspace ? space.data() : nullptr;
    for (int64_t layer = 0; layer < gram.size(0); ++layer)
        emulate("condition", how.threads, whiten_shared(l, !workspace), [&](auto& block, double* shared) {
            flexlora::condition(block, gram.data_ptr<double>(), T32.data_ptr<float>(), workspace, l, layer, shared);
        });
    return T32;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ritz(Execution how, const Tensor& G, const Tensor& C) {
    check_execution(how);
    const int l = matrices(G, "G");
    matrices(C, "C");
    require(G.sizes() == C.sizes(), "G and C have shapes ", G.sizes(), " and ", C.sizes(), ": expected the same");
    const int64_t L = G.size(0);
    Tensor T = at::empty_like(G), small = at::empty_like(G);
    Tensor shifted = like(G, {L}, at::kBool), spoiled = like(G, {L}, at::kBool);
    std::vector<double> space = workspace_of(how, L, 2 * packed(l));
    double* const workspace = how.workspace ? space.data() : nullptr;
    for (int64_t layer = 0; layer < L; ++layer)
        emulate("ritz", how.threads, ritz_shared(l, !workspace), [&](auto& block, double* shared) {
            flexlora::ritz(block, G.data_ptr<double>(), C.data_ptr<double>(), T.data_ptr<double>(),
                           small.data_ptr<double>(), flags(shifted), flags(spoiled), workspace, l, layer, shared);
        });
    return {T, small, shifted, spoiled};
}

std::tuple<Tensor, std::optional<Tensor>, Tensor> rotate(Execution how, const Tensor& T, const Tensor& vectors,
                                                         const Tensor& values, const Tensor& spoiled, int64_t k,
                                                         bool last) {
    check_execution(how);
    const int l = matrices(T, "T");
    matrices(vectors, "vectors");
    const int64_t L = T.size(0);
    check(values, "values", at::kDouble, 2);
    check(spoiled, "spoiled", at::kBool, 1);
    require(vectors.sizes() == T.sizes() && values.size(0) == L && values.size(1) == l && spoiled.size(0) == L,
            "T, vectors, values and spoiled have shapes ", T.sizes(), ", ", vectors.sizes(), ", ", values.sizes(),
            " and ", spoiled.sizes(), ": expected (L, l, l) twice, (L, l) and (L,)");
    require(k >= 1 && k <= l, "k is ", k, ": expected 1 to ", l);
    Tensor rotation = like(T, {L, l, k}, at::kFloat), found = like(T, {L, k}, at::kDouble);
    std::optional<Tensor> scaled;
    if (last) scaled = at::empty_like(rotation);
    const Rotation r{T.data_ptr<double>(),       vectors.data_ptr<double>(),
                     values.data_ptr<double>(),  flags(spoiled),
                     rotation.data_ptr<float>(), last ? scaled->data_ptr<float>() : nullptr,
                     found.data_ptr<double>(),   l,
                     static_cast<int>(k)};
    const int squares = (l + SQUARE - 1) / SQUARE * ((r.k + SQUARE - 1) / SQUARE);
    for (int64_t layer = 0; layer < L; ++layer)
        for (int square = 0; square < squares; ++square)
            emulate("rotate", how.threads, rotate_shared(l),
                    [&](auto& block, double* shared) { flexlora::rotate(block, r, layer, square, shared); });
    return {rotation, scaled, found};
}

std::tuple<Tensor, Tensor, Tensor> root(Execution how, const Tensor& gram, const std::optional<Tensor>& only) {
    check_execution(how);
    const int l = matrices(gram, "gram");
    const int64_t L = gram.size(0);
    const flag* const which = chosen(only, L);
    Tensor T = at::zeros_like(gram), rank = at::zeros({L}, gram.options().dtype(at::kInt));
    Tensor again = at::zeros({L}, gram.options().dtype(at::kBool));
    std::vector<double> space = workspace_of(how, L, packed(l));
    double* const workspace = how.workspace ? space.data() : nullptr;
    for (int64_t layer = 0; layer < L; ++layer)
        emulate("root", how.threads, root_shared(l, !workspace), [&](auto& block, double* shared) {
            flexlora::root(block, gram.data_ptr<double>(), T.data_ptr<double>(), rank.data_ptr<int>(), flags(again),
                           which, workspace, l, layer, shared);
        });
    return {T, rank, again};
}

std::tuple<Tensor, Tensor, Tensor> jacobi_eigh(Execution how, const Tensor& C) {
    check_execution(how);
    const int l = matrices(C, "C");
    const int64_t L = C.size(0);
    Tensor values = like(C, {L, l}, at::kDouble), vectors = at::empty_like(C), converged = like(C, {L}, at::kBool);
    std::vector<double> space = workspace_of(how, L, jacobi_matrix(l));
    double* const workspace = how.workspace ? space.data() : nullptr;
    for (int64_t layer = 0; layer < L; ++layer)
        emulate("jacobi_eigh", how.threads, jacobi_shared(l, workspace ? 0 : 1), [&](auto& block, double* shared) {
            flexlora::jacobi_eigh(block, C.data_ptr<double>(), values.data_ptr<double>(), vectors.data_ptr<double>(),
                                  flags(converged), workspace, l, layer, shared);
        });
    return {values, vectors, converged};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> jacobi_svd(Execution how, const Tensor& A) {
    check_execution(how);
    const int l = matrices(A, "A");
    const int64_t L = A.size(0);
    Tensor U = at::empty_like(A), S = like(A, {L, l}, at::kDouble), V = at::empty_like(A);
    Tensor converged = like(A, {L}, at::kBool);
    std::vector<double> space = workspace_of(how, L, 2 * jacobi_matrix(l));
    double* const workspace = how.workspace ? space.data() : nullptr;
    for (int64_t layer = 0; layer < L; ++layer)
        emulate("jacobi_svd", how.threads, jacobi_shared(l, workspace ? 0 : 2), [&](auto& block, double* shared) {
            flexlora::jacobi_svd(block, A.data_ptr<double>(), U.data_ptr<double>(), S.data_ptr<double>(),
                                 V.data_ptr<double>(), flags(converged), workspace, l, layer, shared);
        });
    return {U, S, V, converged};
}

}  // namespace flexlora::host
