// A matrix given as a table of pieces: the factors of all clients side by side, without a packed copy.

#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "cpu/convert.h"

namespace flexlora::cpu {

class Matrix {
public:
    // Joins 2-D tensors (float32, float16 or bfloat16, CPU, any strides) along `axis`: 0 stacks rows, 1 puts columns
    // side by side. `name` is quoted in errors. The tensors must outlive the matrix.
    // Throws std::invalid_argument where types, devices or shapes do not fit.
    Matrix(const std::vector<at::Tensor>& tensors, int64_t axis, const std::string& name);

    int64_t rows() const { return rows_; }
    int64_t cols() const { return cols_; }

    // Whether neighbours in a column, not in a row, are neighbours in memory.
    bool column_major() const { return column_major_; }

    // Columns of the first piece, which stands for all where only speed is at stake.
    int64_t row_length() const { return axis_ == 1 && !pieces_->empty() ? pieces_->front().count : cols_; }

    // The same pieces, with rows and columns exchanged.
    Matrix transposed() const;

    // dst[i * ld + j] = T((*this)(i0 + i, j0 + j)) for i < count_i, j < count_j; T is float or uint16_t (bfloat16).
    template <typename T>
    void copy(int64_t i0, int64_t count_i, int64_t j0, int64_t count_j, T* dst, int64_t ld) const;

    // The same block where it lies, rows *ld apart; *count_i shrinks to the rows of its first piece. nullptr where it
    // is of another type, strided within rows, or cut within them.
    template <typename T>
    const T* rows_at(int64_t i0, int64_t* count_i, int64_t j0, int64_t count_j, int64_t* ld) const;

private:
    struct Piece {
        const char* data;
        Dtype dtype;
        int64_t size;  // bytes of an element
        int64_t begin;  // where it starts along the axis
        int64_t count;
        int64_t strides[2];  // in elements, of the rows and columns of the tensor
    };

    Matrix() = default;
    std::vector<Piece>::const_iterator piece_at(int64_t position) const;
    int64_t row_stride(const Piece& piece) const { return piece.strides[turned_]; }
    int64_t col_stride(const Piece& piece) const { return piece.strides[!turned_]; }

    std::shared_ptr<const std::vector<Piece>> pieces_;
    int axis_ = 0;
    bool turned_ = false;
    int64_t rows_ = 0, cols_ = 0;
    bool column_major_ = false;
};

}  // namespace flexlora::cpu
