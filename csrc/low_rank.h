// The arguments of low_rank_penalty as kernels see them: pointers, sizes, strides.
#pragma once

#include <cstdint>
#include <utility>

#include "numbers.h"

namespace mas_ext {

// B, or A transposed: [row of Ω (or column), rank], with the gradient that is added to; strides in
// elements. Without a gradient, only the penalty is asked for.
struct LowRankFactor {
  const void* data;
  int64_t stride, rank_stride;
  void* grad;
  int64_t grad_stride, grad_rank_stride;
};

struct LowRank {
  const void* omega;
  const float* omega_scales;
  int64_t row_stride, column_stride;
  LowRankFactor left, right;
  int64_t rows, columns, rank;
  ScalarType dtype, omega_dtype, grad_dtype;
  double scale;

  MAS_HOST_DEVICE bool has_grads() const { return left.grad != nullptr; }
  bool is_empty() const { return rows == 0 || columns == 0 || rank == 0; }
};

inline void transpose(LowRank& call) {
  std::swap(call.left, call.right);
  std::swap(call.rows, call.columns);
  std::swap(call.row_stride, call.column_stride);
}

inline void turn_columns_innermost(LowRank& call) {
  if (rows_are_inner(call.rows, call.columns, call.row_stride, call.column_stride)) {
    transpose(call);
  }
}

}  // namespace mas_ext
