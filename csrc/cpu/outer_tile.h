// The innermost part of accumulate_outer_: packed samples stream past a tile of Ω in registers.
// There are two sets of accumulators: the product of the current sample, and the sum of the
// magnitudes of earlier samples.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../formulas.h"
#include "multiversion.h"

namespace mas_ext::cpu {

constexpr int kTileRows = 4;

// A tile is two registers wide, so both sets of accumulators fill 16 registers. AVX-512 and NEON
// have enough of them; otherwise the sums, which are touched once per sample, stay in the cache.
template <class Number, int Bytes>
struct TileShape {
  using A = Number;
  static constexpr int kBytes = Bytes;
  static constexpr int kLanes = Bytes / static_cast<int>(sizeof(A));
  static constexpr int kVectors = 2;
  static constexpr int kColumns = kVectors * kLanes;
};

// The part of a sample that a call of outer_tile sees if there are too many positions to pack at
// once. The product so far is carried from part to part, and its magnitude is taken after the last.
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
  // In memory, at any address.
  typedef A Unaligned __attribute__((vector_size(Bytes), aligned(alignof(A)), may_alias));

  // By reference, since the calling convention for vectors differs between instruction sets.
  static MAS_ALWAYS_INLINE const Unaligned& at(const A* place) {
    return *reinterpret_cast<const Unaligned*>(place);
  }
  static MAS_ALWAYS_INLINE Unaligned& at(A* place) { return *reinterpret_cast<Unaligned*>(place); }
  static MAS_ALWAYS_INLINE void replace(Vector& x, MagnitudeAbs) {
    x = (Vector)((BitVector)x & std::numeric_limits<Bits>::max());
  }
  static MAS_ALWAYS_INLINE void replace(Vector& x, MagnitudeSquare) { x *= x; }
  static MAS_ALWAYS_INLINE void replace(Vector&, MagnitudeTaken) {}
};

// The accumulators must stay in registers, so every loop over them is unrolled and nothing takes
// their address.
#define MAS_FOR_TILE                                                \
  _Pragma("GCC unroll 4") for (int row = 0; row < kTileRows; ++row) \
      _Pragma("GCC unroll 2") for (int v = 0; v < Shape::kVectors; ++v)

// increment[kTileRows, kColumns] = scale Σ_samples f(Σ_positions left·right), of the panels
// left[sample, position, kTileRows] and right[sample, position, kColumns].
template <class Magnitude, class Shape>
MAS_MULTIVERSION_FMA void outer_tile(const typename Shape::A* __restrict__ left,
                                     const typename Shape::A* __restrict__ right, int64_t samples,
                                     int64_t positions, const SamplePart<typename Shape::A>& part,
                                     typename Shape::A scale, typename Shape::A* increment) {
  using L = Lanes<typename Shape::A, Shape::kBytes>;
  const auto offset = [](int row, int v) { return row * Shape::kColumns + v * Shape::kLanes; };
  typename L::Vector sums[kTileRows][Shape::kVectors] = {};
  for (int64_t sample = 0; sample < samples; ++sample) {
    typename L::Vector product[kTileRows][Shape::kVectors] = {};
    if (!part.first) {
      MAS_FOR_TILE { product[row][v] = L::at(part.carry + offset(row, v)); }
    }
    for (int64_t position = 0; position < positions; ++position) {
      const typename L::Vector columns[] = {L::at(right), L::at(right + Shape::kLanes)};
      MAS_FOR_TILE { product[row][v] += columns[v] * left[row]; }
      left += kTileRows;
      right += Shape::kColumns;
    }
    if (!part.last) {
      MAS_FOR_TILE { L::at(part.carry + offset(row, v)) = product[row][v]; }
      return;
    }
    MAS_FOR_TILE {
      L::replace(product[row][v], Magnitude{});
      sums[row][v] += product[row][v];
    }
  }
  MAS_FOR_TILE { L::at(increment + offset(row, v)) = sums[row][v]; }
  for (int i = 0; i < kTileRows * Shape::kColumns; ++i) {
    increment[i] = scale * increment[i];
  }
}

#undef MAS_FOR_TILE

// Ω[rows, columns] += increment, whose rows have kColumns elements. A function of its own, so that
// the compiler cannot fuse it with the multiplication by the scale for some tiles only.
template <int kColumns, class A>
MAS_MULTIVERSION void add_tile(A* __restrict__ omega, int64_t row_stride, int64_t column_stride,
                               const A* __restrict__ increment, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, omega += row_stride, increment += kColumns) {
    if (columns == kColumns && column_stride == 1) {
      for (int column = 0; column < kColumns; ++column) {
        omega[column] += increment[column];
      }
    } else if (column_stride == 1) {
      for (int64_t column = 0; column < columns; ++column) {
        omega[column] += increment[column];
      }
    } else {
      for (int64_t column = 0; column < columns; ++column) {
        omega[column * column_stride] += increment[column];
      }
    }
  }
}

// The same where the columns of Ω lie at offsets.
template <int kColumns, class A>
MAS_MULTIVERSION void add_tile_at(A* __restrict__ omega, int64_t row_stride,
                                  const int64_t* __restrict__ offsets,
                                  const A* __restrict__ increment, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row, omega += row_stride, increment += kColumns) {
    for (int64_t column = 0; column < columns; ++column) {
      omega[offsets[column]] += increment[column];
    }
  }
}

}  // namespace mas_ext::cpu
