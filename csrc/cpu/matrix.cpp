#include "cpu/matrix.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/require.h"

namespace flexlora::cpu {
namespace {

Dtype dtype_of(const at::Tensor& tensor, const std::string& name, size_t i) {
    switch (tensor.scalar_type()) {
        case at::kFloat: return Dtype::f32;
        case at::kHalf: return Dtype::f16;
        case at::kBFloat16: return Dtype::bf16;
        default:
            require(false, name, "[", i, "] is ", tensor.scalar_type(), ": expected Half, BFloat16 or Float");
            return Dtype::f32;
    }
}

}  // namespace

Matrix::Matrix(const std::vector<at::Tensor>& tensors, int64_t axis, const std::string& name)
    : axis_(static_cast<int>(axis)) {
    require(axis == 0 || axis == 1, name, " is joined along axis ", axis, ": expected 0 or 1");
    require(!tensors.empty(), name, " is empty: without a piece it has no shape");
    const int64_t other = 1 - axis;
    int64_t joined = 0;
    std::vector<Piece> pieces;
    for (size_t i = 0; i < tensors.size(); ++i) {
        const at::Tensor& t = tensors[i];
        require(t.defined(), name, "[", i, "] is None");
        require(t.device().is_cpu() && t.layout() == at::kStrided, name, "[", i, "] is a ", t.layout(), " tensor on ",
                t.device(), ": pass dense CPU tensors");
        require(t.dim() == 2, name, "[", i, "] has shape ", t.sizes(), ": expected two dimensions");
        require(t.size(other) == tensors[0].size(other), name, "[", i, "] has shape ", t.sizes(), ", ", name,
                "[0] has ", tensors[0].sizes(), ": they cannot be joined along axis ", axis);
        const Dtype dtype = dtype_of(t, name, i);
        if (t.numel() > 0) {
            pieces.push_back({static_cast<const char*>(t.const_data_ptr()), dtype,
                               static_cast<int64_t>(t.element_size()), joined, t.size(axis),
                               {t.stride(0), t.stride(1)}});
            // The first piece stands for all: it decides about speed only.
            if (pieces.size() == 1) column_major_ = t.stride(1) != 1 && t.stride(0) == 1;
        }
        joined += t.size(axis);
    }
    pieces_ = std::make_shared<const std::vector<Piece>>(std::move(pieces));
    rows_ = axis == 0 ? joined : tensors[0].size(0);
    cols_ = axis == 1 ? joined : tensors[0].size(1);
}

Matrix Matrix::transposed() const {
    Matrix result = *this;
    std::swap(result.rows_, result.cols_);
    result.axis_ = 1 - axis_;
    result.turned_ = !turned_;
    result.column_major_ = !column_major_;
    return result;
}

// The last piece that begins at or before `position`.
std::vector<Matrix::Piece>::const_iterator Matrix::piece_at(int64_t position) const {
    return std::upper_bound(pieces_->begin(), pieces_->end(), position,
                            [](int64_t wanted, const Piece& p) { return wanted < p.begin; }) -
           1;
}

template <typename T>
void Matrix::copy(int64_t i0, int64_t count_i, int64_t j0, int64_t count_j, T* dst, int64_t ld) const {
    const int64_t from = axis_ == 0 ? i0 : j0, end = from + (axis_ == 0 ? count_i : count_j);
    for (auto piece = piece_at(from); piece != pieces_->end() && piece->begin < end; ++piece) {
        const int64_t lo = std::max(from, piece->begin), hi = std::min(end, piece->begin + piece->count);
        const int64_t skipped = lo - piece->begin;
        const int64_t i = axis_ == 0 ? skipped : i0, j = axis_ == 1 ? skipped : j0;
        const char* src = piece->data + piece->size * (i * row_stride(*piece) + j * col_stride(*piece));
        T* to = dst + (axis_ == 0 ? (lo - from) * ld : lo - from);
        copy_block(src, piece->dtype, row_stride(*piece), col_stride(*piece), axis_ == 0 ? hi - lo : count_i,
                   axis_ == 1 ? hi - lo : count_j, to, ld);
    }
}

template <typename T>
const T* Matrix::rows_at(int64_t i0, int64_t* count_i, int64_t j0, int64_t count_j, int64_t* ld) const {
    const int64_t from = axis_ == 0 ? i0 : j0;
    const Piece& piece = *piece_at(from);
    const int64_t left = piece.begin + piece.count - from, stride = row_stride(piece);
    const bool same = piece.dtype == (std::is_same_v<T, float> ? Dtype::f32 : Dtype::bf16);
    // Rows that overlap, those of an expanded tensor, are none that the kernels may be asked to read.
    if (!same || col_stride(piece) != 1 || stride < count_j || (axis_ == 1 && left < count_j)) return nullptr;
    if (axis_ == 0) *count_i = std::min(*count_i, left);
    *ld = stride;
    const int64_t i = axis_ == 0 ? from - piece.begin : i0, j = axis_ == 1 ? from - piece.begin : j0;
    return reinterpret_cast<const T*>(piece.data) + i * stride + j;
}

template void Matrix::copy(int64_t, int64_t, int64_t, int64_t, float*, int64_t) const;
template void Matrix::copy(int64_t, int64_t, int64_t, int64_t, uint16_t*, int64_t) const;
template const float* Matrix::rows_at(int64_t, int64_t*, int64_t, int64_t, int64_t*) const;
template const uint16_t* Matrix::rows_at(int64_t, int64_t*, int64_t, int64_t, int64_t*) const;

}  // namespace flexlora::cpu
