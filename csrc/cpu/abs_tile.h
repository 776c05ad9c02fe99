// The innermost part of accumulate_abs_matmul_: a tile of Ω in registers, past which packed
// samples stream. Two sets of accumulators: the product of the sample at hand, and the sum of the
// magnitudes of those before it.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../formulas.h"
#include "multiversion.h"

namespace mas_ext::cpu {

constexpr int kUnit = 4;  // rows of Ω are packed by this many

// How wide a tile is: what fills the registers of an instruction set.
template <class Number, int Bytes, int Vectors, int Units>
struct TileShape {
  using A = Number;
  static constexpr int kBytes = Bytes, kVectors = Vectors;
  static constexpr int kLanes = Bytes / static_cast<int>(sizeof(A));
  static constexpr int kColumns = Vectors * kLanes;
  static constexpr int kUnits = Units;  // of a full tile; what is left goes one unit at a time
};
// float32: 8 × 32 on 32 registers of 64 bytes; 4 × 24 on 16 of 32 bytes (or 32 of 16, as NEON has).
template <class A>
using WideTile = TileShape<A, 64, 2, 2>;
template <class A>
using NarrowTile = TileShape<A, 32, 3, 1>;

// The part of a sample that a call of abs_tile sees, when there are too many positions to pack at
// once: the product so far is carried from one part to the next, and counts when it is whole.
template <class A>
struct SamplePart {
  A* carry;
  bool first, last;
};

// A register's worth of numbers.
template <class A, int Bytes>
struct Lanes {
  using Bits = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A Vector __attribute__((vector_size(Bytes)));
  typedef Bits BitVector __attribute__((vector_size(Bytes)));
  // As it lies in memory: anywhere.
  typedef A Stored __attribute__((vector_size(Bytes), aligned(alignof(A)), may_alias));

  // By reference: a vector that is passed or returned has a calling convention of its own in every
  // instruction set.
  static MAS_ALWAYS_INLINE const Stored& at(const A* place) {
    return *reinterpret_cast<const Stored*>(place);
  }
  static MAS_ALWAYS_INLINE Stored& at(A* place) { return *reinterpret_cast<Stored*>(place); }
  static MAS_ALWAYS_INLINE void take_magnitude(Vector& x) {
    x = (Vector)((BitVector)x & std::numeric_limits<Bits>::max());
  }
};

// The accumulators have to stay in registers, so every loop over them is unrolled and nothing
// takes their address.
#define MAS_FOR_TILE                                            \
  _Pragma("GCC unroll 8") for (int row = 0; row < kRows; ++row) \
      _Pragma("GCC unroll 4") for (int v = 0; v < Shape::kVectors; ++v)

// increment = scale Σ_samples |Σ_positions left·right|, a tile of Units·kUnit rows. `left` holds
// Units panels [sample, position, kUnit] one behind the other, `right` one panel
// [sample, position, kColumns].
template <class Shape, int Units>
MAS_MULTIVERSION_FMA void abs_tile(const typename Shape::A* __restrict__ left,
                                   const typename Shape::A* __restrict__ right, int64_t samples,
                                   int64_t positions, const SamplePart<typename Shape::A>& part,
                                   typename Shape::A scale, typename Shape::A* increment) {
  using A = typename Shape::A;
  using L = Lanes<A, Shape::kBytes>;
  constexpr int kRows = Units * kUnit;
  const int64_t panel = samples * positions * kUnit;
  const auto offset = [](int row, int v) { return row * Shape::kColumns + v * Shape::kLanes; };
  typename L::Vector sums[kRows][Shape::kVectors] = {};
  for (int64_t sample = 0; sample < samples; ++sample) {
    typename L::Vector product[kRows][Shape::kVectors] = {};
    if (!part.first) {
      MAS_FOR_TILE { product[row][v] = L::at(part.carry + offset(row, v)); }
    }
    for (int64_t position = 0; position < positions; ++position) {
      typename L::Vector columns[Shape::kVectors];
      _Pragma("GCC unroll 4") for (int v = 0; v < Shape::kVectors; ++v) {
        columns[v] = L::at(right + v * Shape::kLanes);
      }
      MAS_FOR_TILE { product[row][v] += columns[v] * left[row / kUnit * panel + row % kUnit]; }
      left += kUnit;
      right += Shape::kColumns;
    }
    if (!part.last) {
      MAS_FOR_TILE { L::at(part.carry + offset(row, v)) = product[row][v]; }
      return;
    }
    MAS_FOR_TILE {
      L::take_magnitude(product[row][v]);
      sums[row][v] += product[row][v];
    }
  }
  MAS_FOR_TILE { L::at(increment + offset(row, v)) = sums[row][v]; }
  for (int i = 0; i < kRows * Shape::kColumns; ++i) {
    increment[i] = importance_increment(increment[i], scale);
  }
}

#undef MAS_FOR_TILE

// Ω[rows, columns] += increment, whose rows hold kColumns. On its own, so that the compiler cannot
// fuse it with the product by the scale for some tiles and not for others.
template <int kColumns, class A>
MAS_MULTIVERSION void add_tile(A* __restrict__ omega, int64_t row_stride, int64_t column_stride,
                               const A* __restrict__ increment, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, omega += row_stride, increment += kColumns) {
    if (columns == kColumns && column_stride == 1) {
      for (int column = 0; column < kColumns; ++column) {
        omega[column] += increment[column];
      }
    } else {
      for (int64_t column = 0; column < columns; ++column) {
        omega[column * column_stride] += increment[column];
      }
    }
  }
}

}  // namespace mas_ext::cpu
