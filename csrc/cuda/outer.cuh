// Ω[p,d] += scale·Σ_b f(Σ_t left[b,t,p]·right[b,t,d]), where f is the magnitude, with one block per
// tile of Ω, or per tile and part of the samples. Sums have a fixed order and no atomics, so every
// run gives the same bits.
//
// A block stages a few slots of both factors in shared memory (stage.cuh) and multiplies them into
// accumulators in registers (fma_tile.cuh, tensor_core_tile.cuh); at the end of a sample the
// magnitude of the products is added to a second set.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../formulas.h"
#include "../numbers.h"
#include "../outer.h"
#include "fma_tile.cuh"
#include "reduce.cuh"
#include "stage.cuh"
#include "tensor_core_tile.cuh"

namespace mas_ext::cuda {

// The tile that the host launches for. Devices below compute capability 8.0 lack bfloat16 tensor
// cores.
template <class T>
using TileFor = std::conditional_t<sizeof(T) == 2, TensorCoreTile<T>, FmaTile<T>>;

// Factors are staged in their own type, and only where it holds their magnitudes can samples of one
// position be summed like positions. Otherwise each stays a sample, whose product is formed first;
// on tensor cores it is padded to 16 slots.
template <class T, class Magnitude>
void turn_samples_where_exact(Outer& call) {
  if constexpr (Magnitude::template fits_in<T>) {
    turn_samples_into_positions(call);
  }
}

// A block's shared memory: first the stage, then the sums.
template <class T>
union Shared {
  using A = accumulate_t<T>;
  static constexpr int kPitch = kTile + kVectorBytes / static_cast<int>(sizeof(A));

  Stage<T> stage;
  alignas(32) A sums[kTile][kPitch];
};

// If Ω has too few tiles to fill a device, the samples are divided into parts, with one block per
// tile and part. Each part writes its sums after those of the previous one, and add_parts adds them
// in that order. The number of parts depends only on the problem, so that the result does not
// depend on the device.
struct Parts {
  int count;
  void* sums;  // [count, rows, columns] if there are several
};

constexpr int64_t kBlocks = 512;      // keep the largest of today's devices busy
constexpr int64_t kLeastPairs = 128;  // (sample, position) pairs per part at least

MAS_HOST_DEVICE int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }
MAS_HOST_DEVICE int64_t tiles_of(const Outer& call) {
  return tiles_of(call.rows) * tiles_of(call.columns);
}

inline int parts_of(const Outer& call) {
  const int64_t pairs = call.samples * call.positions;
  const int64_t divisible = call.magnitudes ? pairs : call.samples;
  const int64_t parts = std::min({kBlocks / tiles_of(call), pairs / kLeastPairs, divisible});
  return static_cast<int>(std::max<int64_t>(parts, 1));
}

// The slots of one part. Magnitudes may be divided anywhere, other products only between samples.
struct Slots {
  int64_t first, last;

  __device__ Slots(const Outer& call, int64_t per_sample, int step, int parts, int part) {
    const int64_t all = call.samples * per_sample;
    const int64_t unit = call.magnitudes ? step : per_sample;
    const int64_t size = (all / unit + parts - 1) / parts * unit;
    first = part * size;
    last = first + size < all ? first + size : all;
  }
};

template <class A>
__device__ A& omega_at(const Outer& call, int64_t row, int64_t column) {
  return static_cast<A*>(call.omega)[row * call.row_stride + column * call.column_stride];
}

// Adds the sums of the tile to Ω, or writes them where those of its part go.
template <class T, int Threads>
__device__ void put(const Outer& call, const Shared<T>& shared, const Parts& parts, int part,
                    int64_t first_row, int64_t first_column) {
  using A = accumulate_t<T>;
  const A scale = finite<A>(call.scale);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kTile; i += Threads) {
    const int64_t row = first_row + i / kTile, column = first_column + i % kTile;
    if (row < call.rows && column < call.columns) {
      const A sum = shared.sums[i / kTile][i % kTile];
      if (parts.count == 1) {
        omega_at<A>(call, row, column) += scale * sum;
      } else {
        static_cast<A*>(parts.sums)[(part * call.rows + row) * call.columns + column] = sum;
      }
    }
  }
}

// Of factors that were replaced by their magnitudes, the products are magnitudes.
template <class Magnitude, class Tile>
__device__ void end_sample(Tile& tile, bool magnitudes) {
  if (Magnitude::kIdempotent || !magnitudes) {
    tile.template end_sample<Magnitude>();
  } else {
    tile.template end_sample<MagnitudeTaken>();
  }
}

template <class T, class Magnitude, class Tile>
__device__ void outer_tile(const Outer& call, const Parts& parts, Shared<T>& shared) {
  constexpr int kThreads = Tile::kThreads, kStep = Tile::kStep;
  const int part = static_cast<int>(blockIdx.x / tiles_of(call));
  const int64_t at = blockIdx.x % tiles_of(call);
  const int64_t first_row = at / tiles_of(call.columns) * kTile;
  const int64_t first_column = at % tiles_of(call.columns) * kTile;
  const int64_t slots_per_sample = (call.positions + kStep - 1) / kStep * kStep;
  const Slots slots(call, slots_per_sample, kStep, parts.count, part);
  Stage<T>& stage = shared.stage;

  Tile tile;
  int64_t multiplied = 0;  // slots of the current sample
  for (int64_t first = slots.first; first < slots.last; first += kSlots) {
    find_slots(stage, call, first, slots_per_sample);
    __syncthreads();  // also: every thread is done with the slots before
    stage_factor<T, Magnitude, kThreads>(stage.left, call.left, stage.left_offset, first_row,
                                         call.rows, call.magnitudes);
    stage_factor<T, Magnitude, kThreads>(stage.right, call.right, stage.right_offset, first_column,
                                         call.columns, call.magnitudes);
    __syncthreads();
#pragma unroll 1  // the body is long enough
    for (int slot = 0; slot < kSlots && first + slot < slots.last; slot += kStep) {
      tile.multiply(stage, slot);
      multiplied += kStep;
      if (multiplied == slots_per_sample) {
        end_sample<Magnitude>(tile, call.magnitudes);
        multiplied = 0;
      }
    }
  }
  if (multiplied > 0) {
    end_sample<Magnitude>(tile, call.magnitudes);  // of magnitudes, divided within the sample
  }
  __syncthreads();  // the sums take the stage's place
  tile.store(shared.sums);
  __syncthreads();
  put<T, kThreads>(call, shared, parts, part, first_row, first_column);
}

template <class T, class Magnitude>
__global__ void __launch_bounds__(TileFor<T>::kThreads, TileFor<T>::kResident)
    outer_kernel(const __grid_constant__ Outer call, Parts parts) {
  __shared__ Shared<T> shared;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static_assert(FmaTile<T>::kThreads == TileFor<T>::kThreads);
  outer_tile<T, Magnitude, FmaTile<T>>(call, parts, shared);
#else
  outer_tile<T, Magnitude, TileFor<T>>(call, parts, shared);
#endif
}

// Ω += scale·Σ parts, with one thread per element.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_parts(const __grid_constant__ Outer call, Parts parts) {
  const int64_t size = call.rows * call.columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) {
    A sum = 0;
    for (int part = 0; part < parts.count; ++part) {
      sum += static_cast<const A*>(parts.sums)[part * size + i];
    }
    omega_at<A>(call, i / call.columns, i % call.columns) += finite<A>(call.scale) * sum;
  }
}

}  // namespace mas_ext::cuda
