// Packing for accumulate_outer_: from tensors of any strides and dtype to panels [sample, position,
// Width] in the accumulation dtype, which a tile reads from front to back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../outer.h"
#include "multiversion.h"
#include "outer_tile.h"

namespace mas_ext::cpu {

constexpr int kStep = 16;  // positions transposed at a time: a cache line of float32

template <class Magnitude, class A, class T>
MAS_ALWAYS_INLINE A read_as(T value, bool magnitudes) {
  const A number = static_cast<A>(value);
  return magnitudes ? Magnitude::of(number) : number;
}

// Numbers at a stride. The first loop is a special case of the second that can be vectorised.
template <class Magnitude, class A, class T>
MAS_ALWAYS_INLINE void read_run(A* __restrict__ to, const T* __restrict__ from, int64_t stride,
                                int64_t count, bool magnitudes) {
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) {
      to[k] = read_as<Magnitude, A>(from[k], magnitudes);
    }
  } else {
    for (int64_t k = 0; k < count; ++k) {
      to[k] = read_as<Magnitude, A>(from[k * stride], magnitudes);
    }
  }
}

// Four rows of four positions, into positions that lie Width apart.
template <int Width, class A, class Vector>
MAS_ALWAYS_INLINE void store_transposed(A* to, const Vector (&rows)[kTileRows]) {
  static_assert(kTileRows == 4);
  using L = Lanes<A, 4 * sizeof(A)>;
  const auto ab_low = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const auto ab_high = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const auto cd_low = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const auto cd_high = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  L::at(to) = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  L::at(to + Width) = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  L::at(to + 2 * Width) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  L::at(to + 3 * Width) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
}

// A square of kTileRows rows that lie `row_stride` apart, into as many that lie Width apart.
template <int Width, class A>
MAS_ALWAYS_INLINE void transpose_square(A* to, const A* from, int64_t row_stride) {
  using L = Lanes<A, 4 * sizeof(A)>;
  const typename L::Vector rows[] = {L::at(from), L::at(from + row_stride),
                                     L::at(from + 2 * row_stride), L::at(from + 3 * row_stride)};
  store_transposed<Width>(to, rows);
}

// `count` positions of Width rows, which hold their positions side by side.
template <int Width, class A>
MAS_ALWAYS_INLINE void transpose_rows(A* to, const A* from, int64_t row_stride, int64_t count) {
  for (int row = 0; row < Width;
       row += kTileRows, to += kTileRows, from += kTileRows * row_stride) {
    int64_t k = 0;
    for (; k + kTileRows <= count; k += kTileRows) {
      transpose_square<Width>(to + k * Width, from + k, row_stride);
    }
    for (; k < count; ++k) {
      for (int i = 0; i < kTileRows; ++i) {
        to[k * Width + i] = from[i * row_stride + k];
      }
    }
  }
}

// The same for rows of any dtype and stride, of which only `n` may be there.
template <class Magnitude, int Width, class A, class T>
MAS_ALWAYS_INLINE void convert_rows(A* to, const T* from, int64_t row_stride, int64_t stride,
                                    int64_t n, int64_t count, bool magnitudes) {
  A block[Width * kStep];
  if (stride == 1 && row_stride == count && n >= Width) {  // short rows, one after the other
    read_run<Magnitude>(block, from, 1, Width * count, magnitudes);
    return transpose_rows<Width>(to, block, count, count);
  }
  for (int64_t row = 0; row < Width; ++row) {
    if (row < n) {
      read_run<Magnitude>(block + row * kStep, from + row * row_stride, stride, count, magnitudes);
    } else {
      std::fill_n(block + row * kStep, count, A(0));
    }
  }
  transpose_rows<Width>(to, block, kStep, count);
}

// Four positions of a row, at any offsets.
template <class Magnitude, class A, class T>
MAS_ALWAYS_INLINE void read_four(typename Lanes<A, 4 * sizeof(A)>::Vector& to, const T* row,
                                 const int64_t* offsets, bool adjacent, bool magnitudes) {
  if constexpr (std::is_same_v<A, T>) {
    if (adjacent && !magnitudes) {
      to = Lanes<A, 4 * sizeof(A)>::at(row + offsets[0]);
      return;
    }
  }
  const auto read = [&](int i) { return read_as<Magnitude, A>(row[offsets[i]], magnitudes); };
  to = typename Lanes<A, 4 * sizeof(A)>::Vector{read(0), read(1), read(2), read(3)};
}

// One sample's panel of Width rows of a factor with offsets. Where there are only `n`, the last one
// stands for the others, whose products are not added to Ω.
template <class Magnitude, int Width, class A, class T>
MAS_MULTIVERSION void gather_panel(A* __restrict__ panel, const T* __restrict__ data,
                                   const Factor& factor, int64_t first_row, int64_t n,
                                   int64_t first_position, int64_t positions, bool magnitudes) {
  const T* rows[Width];
  for (int64_t row = 0; row < Width; ++row) {
    rows[row] = data + factor.row_at(first_row + std::min(row, n - 1));
  }
  for (int64_t k = 0; k < positions; k += kTileRows, panel += kTileRows * Width) {
    int64_t offsets[kTileRows];
    for (int64_t i = 0; i < kTileRows; ++i) {
      offsets[i] = factor.position_at(first_position + std::min(k + i, positions - 1));
    }
    const bool adjacent = offsets[1] == offsets[0] + 1 && offsets[2] == offsets[0] + 2 &&
                          offsets[3] == offsets[0] + 3;
    if (k + kTileRows <= positions) {
      for (int row = 0; row < Width; row += kTileRows) {
        typename Lanes<A, 4 * sizeof(A)>::Vector square[kTileRows] = {};
        for (int i = 0; i < kTileRows; ++i) {
          read_four<Magnitude, A>(square[i], rows[row + i], offsets, adjacent, magnitudes);
        }
        store_transposed<Width>(panel + row, square);
      }
    } else {
      for (int64_t i = 0; k + i < positions; ++i) {
        for (int row = 0; row < Width; ++row) {
          panel[i * Width + row] = read_as<Magnitude, A>(rows[row][offsets[i]], magnitudes);
        }
      }
    }
  }
}

// One sample's panel of Width rows; where there are only `n`, zeros stand for the others.
template <class Magnitude, int Width, class A, class T>
MAS_MULTIVERSION void pack_panel(A* __restrict__ panel, const T* __restrict__ rows,
                                 int64_t row_stride, int64_t stride, int64_t n, int64_t positions,
                                 bool magnitudes) {
  if (row_stride == 1 && n >= Width) {
    for (int64_t k = 0; k < positions; ++k) {
      for (int row = 0; row < Width; ++row) {
        panel[k * Width + row] = read_as<Magnitude, A>(rows[k * stride + row], magnitudes);
      }
    }
    return;
  }
  // A cache line's positions of all rows before the next line's: if row strides are powers of two,
  // the lines of all rows compete for the same set of the cache.
  for (int64_t k = 0; k < positions; k += kStep, panel += kStep * Width, rows += kStep * stride) {
    const int64_t count = std::min<int64_t>(kStep, positions - k);
    if constexpr (std::is_same_v<A, T>) {
      if (stride == 1 && n >= Width && !magnitudes) {
        transpose_rows<Width>(panel, rows, row_stride, count);
        continue;
      }
    }
    convert_rows<Magnitude, Width>(panel, rows, row_stride, stride, n, count, magnitudes);
  }
}

}  // namespace mas_ext::cpu
