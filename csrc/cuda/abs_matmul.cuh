// Ω[p,d] += scale·Σ_b |Σ_t left[b,t,p]·right[b,t,d]|: one block a tile of Ω. It alone writes the
// tile, and sums all samples in order, so nothing depends on the grid and no atomics are needed.
//
// A block stages a few slots of both factors in shared memory (stage.cuh) and multiplies them into
// accumulators in registers (fma_tile.cuh, tensor_core_tile.cuh); at the end of a sample the
// magnitude of the products is added to a second set.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../abs_matmul.h"
#include "../formulas.h"
#include "../numbers.h"
#include "fma_tile.cuh"
#include "stage.cuh"
#include "tensor_core_tile.cuh"

namespace mas_ext::cuda {

// What the host asks for. Devices before compute capability 8.0 have no bfloat16 tensor cores.
template <class T>
using TileFor = std::conditional_t<sizeof(T) == 2, TensorCoreTile<T>, FmaTile<T>>;

// A block's shared memory: the stage, and at the end the sums.
template <class T>
union Shared {
  using A = accumulate_t<T>;
  static constexpr int kPitch = kTile + kVectorBytes / static_cast<int>(sizeof(A));

  Stage<T> stage;
  alignas(32) A sums[kTile][kPitch];
};

template <class T, int Threads>
__device__ void add_to_omega(const AbsMatmul& call, const Shared<T>& shared, int64_t first_row,
                             int64_t first_column) {
  using A = accumulate_t<T>;
  const A scale = finite<A>(call.scale);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += Threads) {
    const int64_t row = first_row + i / kTile, column = first_column + i % kTile;
    if (row < call.rows && column < call.columns) {
      static_cast<A*>(call.omega)[row * call.row_stride + column * call.column_stride] +=
          importance_increment(shared.sums[i / kTile][i % kTile], scale);
    }
  }
}

template <class T, class Tile>
__device__ void abs_matmul_tile(const AbsMatmul& call, Shared<T>& shared) {
  constexpr int kThreads = Tile::kThreads, kStep = Tile::kStep;
  const int64_t column_tiles = (call.columns + kTile - 1) / kTile;
  const int64_t first_row = blockIdx.x / column_tiles * kTile;
  const int64_t first_column = blockIdx.x % column_tiles * kTile;
  const int64_t slots_per_sample = (call.positions + kStep - 1) / kStep * kStep;
  const int64_t slots = call.samples * slots_per_sample;
  Stage<T>& stage = shared.stage;

  Tile tile;
  int64_t multiplied = 0;  // slots of the sample at hand
  for (int64_t first = 0; first < slots; first += kSlots) {
    find_slots(stage, call, first, slots_per_sample);
    __syncthreads();  // also: every thread is done with the slots before
    stage_factor<T, kThreads>(stage.left, call.left, stage.left_offset, first_row, call.rows,
                              call.absolute);
    stage_factor<T, kThreads>(stage.right, call.right, stage.right_offset, first_column,
                              call.columns, call.absolute);
    __syncthreads();
    for (int slot = 0; slot < kSlots && first + slot < slots; slot += kStep) {
      tile.multiply(stage, slot);
      multiplied += kStep;
      if (multiplied == slots_per_sample) {
        tile.end_sample();
        multiplied = 0;
      }
    }
  }
  __syncthreads();  // the sums take the stage's place
  tile.store(shared.sums);
  __syncthreads();
  add_to_omega<T, kThreads>(call, shared, first_row, first_column);
}

template <class T>
__global__ void __launch_bounds__(TileFor<T>::kThreads)
    abs_matmul_kernel(const __grid_constant__ AbsMatmul call) {
  __shared__ Shared<T> shared;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static_assert(FmaTile<T>::kThreads == TileFor<T>::kThreads);
  abs_matmul_tile<T, FmaTile<T>>(call, shared);
#else
  abs_matmul_tile<T, TileFor<T>>(call, shared);
#endif
}

}  // namespace mas_ext::cuda
