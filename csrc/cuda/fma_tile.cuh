// A tile of sums of magnitudes without tensor cores: for float32 and float64, and for 16-bit types
// on devices whose tensor cores lack the type.
#pragma once

#include <cuda_runtime.h>

#include "../formulas.h"
#include "../numbers.h"
#include "stage.cuh"

namespace mas_ext::cuda {

// A thread owns kRows × kColumns elements of the tile and has two accumulators for each: the
// product of the current sample, and the sum of the magnitudes of earlier samples. Its rows (and
// columns) come in runs of kRun, which is one access to shared memory, kTile / (kRows / kRun)
// apart, so that the threads of a warp read neighbouring runs.
template <class T, int kRows = 8, int kColumns = sizeof(T) == sizeof(float) ? 8 : 4>
class FmaTile {
  using A = accumulate_t<T>;
  static constexpr int kRun = kVectorBytes / sizeof(A);
  static constexpr int kAcross = kTile / kColumns;  // threads that share rows

 public:
  static constexpr int kThreads = kTile / kRows * kAcross;
  static constexpr int kResident =
      0;                           // blocks that must fit on a multiprocessor; 0: no requirement
  static constexpr int kStep = 1;  // slots per multiplication

  __device__ void multiply(const Stage<T>& stage, int slot) {
    multiply(stage.left[slot], stage.right[slot]);
  }

  // A slot of each factor.
  __device__ void multiply(const T* left_slot, const T* right_slot) {
    A left[kRows], right[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      left[r] = static_cast<A>(left_slot[row(r)]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      right[c] = static_cast<A>(right_slot[column(c)]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        product_[r][c] += left[r] * right[c];
      }
    }
  }

  template <class Magnitude>
  __device__ void end_sample() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        sums_[r][c] += Magnitude::of(product_[r][c]);
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
