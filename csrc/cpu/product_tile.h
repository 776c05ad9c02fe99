// A tile of a matrix product in registers, of what lies in the cache.
#pragma once

#include <cstdint>

#include "multiversion.h"
#include "outer_tile.h"

namespace mas_ext::cpu {

// The left factor [row, i] of a product over i. Its elements are read one by one, so any strides
// cost the same.
template <class A>
struct LeftFactor {
  const A* data;
  int64_t row_stride, stride;
};

// The accumulators must stay in registers, so every loop over them is unrolled and nothing takes
// their address.
#define MAS_FOR_TILE                                            \
  _Pragma("GCC unroll 8") for (int row = 0; row < kRows; ++row) \
      _Pragma("GCC unroll 2") for (int v = 0; v < kVectors; ++v)

// product[kRows, kVectors · kLanes] = scale Σ_i left[row, i]·right[i, column], with `stride`
// elements from one row of the product to the next. The rows of the right factor follow each other.
template <class Shape, int kRows, int kVectors>
MAS_MULTIVERSION_FMA void product_tile(LeftFactor<typename Shape::A> left,
                                       const typename Shape::A* __restrict__ right,
                                       int64_t right_stride, int64_t depth, typename Shape::A scale,
                                       typename Shape::A* __restrict__ product, int64_t stride) {
  using L = Lanes<typename Shape::A, Shape::kBytes>;
  typename L::Vector sums[kRows][kVectors] = {};
  for (int64_t i = 0; i < depth; ++i) {
    typename L::Vector columns[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = L::at(right + v * Shape::kLanes);
    }
    MAS_FOR_TILE { sums[row][v] += columns[v] * left.data[row * left.row_stride]; }
    left.data += left.stride;
    right += right_stride;
  }
  MAS_FOR_TILE { L::at(product + row * stride + v * Shape::kLanes) = scale * sums[row][v]; }
}

#undef MAS_FOR_TILE

}  // namespace mas_ext::cpu
