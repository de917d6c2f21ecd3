#include "cpu/materialize.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace flexlora::cpu {
namespace {

// Ranks are gathered into a float32 panel of at most this many columns, and each panel is one GEMM: a GEMM per
// client would read and write all of ΔW for as few as four ranks. On an AVX-512 CPU with 2 threads 128 to 1024 are
// within 3 % of each other and of one packed GEMM (4096 x 4096, 100 clients of rank 16: 0.28 to 0.30 s; a GEMM per
// client: 0.37 s); 64 loses up to 10 %.
constexpr int64_t kPanel = 256;

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
    if (holds) return;
    std::ostringstream message;
    message << "materialize: ";
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

void check_factor(const at::Tensor& factor, const char* name, size_t i) {
    require(factor.defined(), name, "[", i, "] is None");
    require(factor.device().is_cpu() && factor.layout() == at::kStrided, name, "[", i, "] is a ", factor.layout(),
            " tensor on ", factor.device(), ": pass dense CPU tensors");
    require(factor.dim() == 2, name, "[", i, "] has shape ", factor.sizes(), ": expected two dimensions");
    const auto dtype = factor.scalar_type();
    require(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, name, "[", i, "] is ", dtype,
            ": expected Half, BFloat16 or Float");
}

void check(const std::vector<at::Tensor>& B, const std::vector<at::Tensor>& A, const at::Tensor& d) {
    require(!B.empty(), "B is empty: without a client the layer has no shape");
    require(B.size() == A.size(), "B holds ", B.size(), " clients and A holds ", A.size());
    int64_t total_rank = 0;
    for (size_t i = 0; i < B.size(); ++i) {
        check_factor(B[i], "B", i);
        check_factor(A[i], "A", i);
        require(B[i].size(1) == A[i].size(0), "client ", i, ": B is ", B[i].sizes(), " and A is ", A[i].sizes(),
                ": their ranks differ");
        require(B[i].size(0) == B[0].size(0), "client ", i, ": B has ", B[i].size(0), " rows, client 0 has ",
                B[0].size(0));
        require(A[i].size(1) == A[0].size(1), "client ", i, ": A has ", A[i].size(1), " columns, client 0 has ",
                A[0].size(1));
        total_rank += B[i].size(1);
    }
    require(d.defined() && d.device().is_cpu() && d.layout() == at::kStrided, "d must be a dense CPU tensor");
    require(d.scalar_type() == at::kDouble, "d is ", d.scalar_type(), ": expected Double (float64)");
    require(d.dim() == 1 && d.size(0) == total_rank, "d has shape ", d.sizes(), " for a total rank of ", total_rank,
            ": expected [", total_rank, "]");
}

}  // namespace

at::Tensor materialize(const std::vector<at::Tensor>& B, const std::vector<at::Tensor>& A, const at::Tensor& d) {
    check(B, A, d);
    const c10::NoGradGuard no_grad;
    const int64_t m = B[0].size(0), n = A[0].size(1), total_rank = d.size(0);
    at::Tensor out = at::empty({m, n}, at::kFloat);
    if (total_rank == 0) return out.zero_();

    const int64_t width = std::min(kPanel, total_rank);
    const at::Tensor P = at::empty({m, width}, at::kFloat);
    const at::Tensor Q = at::empty({width, n}, at::kFloat);
    const at::Tensor coefficients = d.to(at::kFloat);

    int64_t filled = 0, done = 0;  // ranks in the panel; ranks already added to out
    const auto flush = [&] {
        if (filled == 0) return;
        const at::Tensor p = P.narrow(1, 0, filled), q = Q.narrow(0, 0, filled);
        const at::Tensor panel_d = coefficients.narrow(0, done, filled);
        // The coefficients go to the smaller factor, which is float32 by now: nothing is rounded to 16 bits.
        if (m <= n) {
            p.mul_(panel_d);
        } else {
            q.mul_(panel_d.unsqueeze(1));
        }
        if (done == 0) {
            at::mm_out(out, p, q);
        } else {
            out.addmm_(p, q);
        }
        done += filled;
        filled = 0;
    };

    for (size_t i = 0; i < B.size(); ++i) {
        const int64_t rank = B[i].size(1);
        for (int64_t start = 0; start < rank;) {
            const int64_t count = std::min(rank - start, width - filled);
            P.narrow(1, filled, count).copy_(B[i].narrow(1, start, count));
            Q.narrow(0, filled, count).copy_(A[i].narrow(0, start, count));
            filled += count;
            start += count;
            if (filled == width) flush();
        }
    }
    flush();
    return out;
}

}  // namespace flexlora::cpu
