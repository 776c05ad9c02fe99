// One block a tile of Ω: it alone writes the tile, and reads all samples in order, so nothing
// depends on the grid and no atomics are needed.
//
// What is summed over are (sample, position) pairs, one behind the other. They are staged in shared
// memory, a few at a time, wherever samples end; every thread keeps two sets of accumulators, the
// product of the sample at hand and the sum of the magnitudes of those before it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../abs_matmul.h"
#include "../formulas.h"
#include "../numbers.h"

namespace mas_ext::cuda {

constexpr int kTile = 64;                               // rows and columns of Ω a block
constexpr int kThreadRows = 8, kThreadColumns = 4;      // of them, a thread
constexpr int kThreadsAcross = kTile / kThreadColumns;  // threads that share rows
constexpr int kTileThreads = kTile / kThreadRows * kThreadsAcross;
constexpr int kPairs = 16;   // staged at a time
constexpr int kPadding = 4;  // keeps rows 16-byte aligned, and the banks of a column apart

template <class A>
struct Stage {
  alignas(16) A left[kPairs][kTile + kPadding];
  alignas(16) A right[kPairs][kTile + kPadding];
  int64_t left_offset[kPairs], right_offset[kPairs];  // where the pairs begin in memory
};

// One thread a pair, so that the division is done once.
template <class A>
__device__ void find_pairs(Stage<A>& stage, const AbsMatmul& call, int64_t first, int count) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < count) {
    const int64_t sample = (first + k) / call.positions, position = (first + k) % call.positions;
    stage.left_offset[k] = sample * call.left.sample_stride + position * call.left.position_stride;
    stage.right_offset[k] =
        sample * call.right.sample_stride + position * call.right.position_stride;
  }
}

// Neighbouring threads read along the rows of Ω where those lie side by side, else along the pairs.
// Beyond the matrix the tile is zero.
template <class T, class A>
__device__ void stage_factor(A (&tile)[kPairs][kTile + kPadding], const Factor& factor,
                             const int64_t* offsets, int64_t first_row, int64_t rows, int count,
                             bool absolute) {
  const bool along_rows = factor.row_stride == 1;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kPairs; i += kTileThreads) {
    const int row = along_rows ? i % kTile : i / kPairs;
    const int k = along_rows ? i / kTile : i % kPairs;
    A value = 0;
    if (k < count && first_row + row < rows) {
      value = static_cast<A>(
          static_cast<const T*>(factor.data)[offsets[k] + (first_row + row) * factor.row_stride]);
    }
    tile[k][row] = absolute && value < A(0) ? -value : value;
  }
}

// The accumulators of one thread.
template <class A>
struct ThreadTile {
  A product[kThreadRows][kThreadColumns] = {};
  A sums[kThreadRows][kThreadColumns] = {};

  __device__ void multiply(const A* left, const A* right) {
    A rows[kThreadRows], columns[kThreadColumns];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      rows[r] = left[r];
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      columns[c] = right[c];
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        product[r][c] += rows[r] * columns[c];
      }
    }
  }

  __device__ void end_sample() {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        sums[r][c] += product[r][c] < A(0) ? -product[r][c] : product[r][c];
        product[r][c] = A(0);
      }
    }
  }

  __device__ void add_to_omega(const AbsMatmul& call, int64_t row, int64_t column) const {
    auto* omega = static_cast<A*>(call.omega);
    const A scale = finite<A>(call.scale);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        if (row + r < call.rows && column + c < call.columns) {
          omega[(row + r) * call.row_stride + (column + c) * call.column_stride] +=
              importance_increment(sums[r][c], scale);
        }
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads) abs_matmul_kernel(AbsMatmul call) {
  using A = accumulate_t<T>;
  __shared__ Stage<A> stage;
  const int64_t column_tiles = (call.columns + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / column_tiles * kTile;
  const int64_t first_column = blockIdx.x % column_tiles * kTile;
  const int row = static_cast<int>(threadIdx.x) / kThreadsAcross * kThreadRows;
  const int column = static_cast<int>(threadIdx.x) % kThreadsAcross * kThreadColumns;
  const int64_t pairs = call.samples * call.positions;

  ThreadTile<A> tile;
  int64_t position = 0;
  for (int64_t first = 0; first < pairs; first += kPairs) {
    const int count = static_cast<int>(pairs - first < kPairs ? pairs - first : kPairs);
    find_pairs(stage, call, first, count);
    __syncthreads();  // also: every thread is done with the pairs before
    stage_factor<T>(stage.left, call.left, stage.left_offset, first_row, call.rows, count,
                    call.absolute);
    stage_factor<T>(stage.right, call.right, stage.right_offset, first_column, call.columns, count,
                    call.absolute);
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      tile.multiply(&stage.left[k][row], &stage.right[k][column]);
      if (++position == call.positions) {
        tile.end_sample();
        position = 0;
      }
    }
  }
  tile.add_to_omega(call, first_row + row, first_column + column);
}

}  // namespace mas_ext::cuda
