// The arguments of accumulate_outer_ as kernels see them: pointers, sizes, strides.
#pragma once

#include <cstdint>
#include <utility>

#include "numbers.h"

namespace mas_ext {

// left or right: [sample, position, row of Ω (or column)], strides in elements. Where positions or
// rows are several dimensions that lie at no single stride, `offsets` say where each lies.
struct Factor {
  const void* data;
  int64_t sample_stride, position_stride, row_stride;
  const int64_t *position_offsets = nullptr, *row_offsets = nullptr;

  bool has_offsets() const { return position_offsets != nullptr || row_offsets != nullptr; }
  int64_t position_at(int64_t i) const {
    return position_offsets != nullptr ? position_offsets[i] : i * position_stride;
  }
  int64_t row_at(int64_t i) const {
    return row_offsets != nullptr ? row_offsets[i] : i * row_stride;
  }
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
  const int64_t* column_offsets = nullptr;  // of Ω, as those of factors

  bool is_empty() const { return samples == 0 || positions == 0 || rows == 0 || columns == 0; }
  bool has_offsets() const {
    return left.has_offsets() || right.has_offsets() || column_offsets != nullptr;
  }
};

// Transposes the problem if that makes the columns of Ω adjacent in memory.
inline void turn_columns_innermost(Outer& call) {
  if (!call.has_offsets() &&
      rows_are_inner(call.rows, call.columns, call.row_stride, call.column_stride)) {
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
