// The arguments of accumulate_outer_ as kernels see them: pointers, sizes, strides.
#pragma once

#include <cstdint>
#include <utility>

#include "numbers.h"

namespace mas_ext {

// left or right: [sample, position, row of Ω (or column)], strides in elements.
struct Factor {
  const void* data;
  int64_t sample_stride, position_stride, row_stride;
};

struct Outer {
  void* omega;
  int64_t row_stride, column_stride;
  Factor left, right;
  int64_t samples, positions, rows, columns;
  ScalarType dtype;
  double scale;
  // Whether the factors are replaced by their magnitudes f. If samples have one position each, then
  // f(Σ_t l·r) = f(l)·f(r), and samples can be summed like positions.
  bool magnitudes;

  bool is_empty() const { return samples == 0 || positions == 0 || rows == 0 || columns == 0; }
};

// Transposes the problem if that makes the columns of Ω adjacent in memory.
inline void turn_columns_innermost(Outer& call) {
  if (rows_are_inner(call.rows, call.columns, call.row_stride, call.column_stride)) {
    std::swap(call.left, call.right);
    std::swap(call.rows, call.columns);
    std::swap(call.row_stride, call.column_stride);
  }
}

inline void turn_samples_into_positions(Outer& call) {
  if (call.positions == 1) {
    call.left.position_stride = call.left.sample_stride;
    call.right.position_stride = call.right.sample_stride;
    call.positions = std::exchange(call.samples, 1);
    call.magnitudes = true;
  }
}

}  // namespace mas_ext
