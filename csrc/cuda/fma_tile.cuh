// A tile of |products| on the ordinary arithmetic units: float32 and float64, and what a device
// without tensor cores for its type computes.
#pragma once

#include <cuda_runtime.h>

#include "../formulas.h"
#include "../numbers.h"
#include "stage.cuh"

namespace mas_ext::cuda {

// A thread has kRows × kColumns places of the tile and two accumulators for each: the product of
// the sample at hand, and the sum of the magnitudes of those before it. Its rows (and columns) come
// in runs of kRun, one access to shared memory, kTile / (kRows / kRun) apart, so that the threads
// of a warp read neighbouring runs.
template <class T>
class FmaTile {
  using A = accumulate_t<T>;
  static constexpr int kRows = 8, kColumns = sizeof(T) == sizeof(float) ? 8 : 4;
  static constexpr int kRun = kVectorBytes / sizeof(A);
  static constexpr int kAcross = kTile / kColumns;  // threads that share rows

 public:
  static constexpr int kThreads = kTile / kRows * kAcross;
  static constexpr int kResident =
      0;                           // blocks a multiprocessor must have room for; 0: whatever comes
  static constexpr int kStep = 1;  // slots a multiplication

  __device__ void multiply(const Stage<T>& stage, int slot) {
    A left[kRows], right[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      left[r] = static_cast<A>(stage.left[slot][row(r)]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      right[c] = static_cast<A>(stage.right[slot][column(c)]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        product_[r][c] += left[r] * right[c];
      }
    }
  }

  __device__ void end_sample() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sums_[r][c] += magnitude(product_[r][c]);
        product_[r][c] = A(0);
      }
    }
  }

  template <int Pitch>
  __device__ void store(A (&tile)[kTile][Pitch]) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        tile[row(r)][column(c)] = sums_[r][c];
      }
    }
  }

 private:
  template <int Count>
  __device__ static int place(int thread, int i) {
    constexpr int kApart = kTile / (Count / kRun);
    return i / kRun * kApart + thread * kRun + i % kRun;
  }
  __device__ static int row(int r) {
    return place<kRows>(static_cast<int>(threadIdx.x) / kAcross, r);
  }
  __device__ static int column(int c) {
    return place<kColumns>(static_cast<int>(threadIdx.x) % kAcross, c);
  }

  A product_[kRows][kColumns] = {};
  A sums_[kRows][kColumns] = {};
};

}  // namespace mas_ext::cuda
