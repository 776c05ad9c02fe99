// The factors of accumulate_outer_ in shared memory, a few positions of a few samples at a time,
// for the tile of Ω that a block owns.
//
// Sums run over slots: the positions of all samples in order, where each sample is padded to a
// multiple of the slots that a tile multiplies in one step. Padding is zero, and so is everything
// outside of the matrix.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../formulas.h"
#include "../outer.h"
#include "pack.cuh"

namespace mas_ext::cuda {

constexpr int kTile = 64;   // rows and columns of Ω per block
constexpr int kSlots = 32;  // staged at a time

template <class T>
struct Stage {
  // Keeps rows aligned: to 16 bytes for vectors, and every 16 rows to 32 bytes for tensor cores. It
  // also shifts neighbouring slots to different banks.
  static constexpr int kPitch = kTile + kVectorBytes / static_cast<int>(sizeof(T));
  using Rows = T[kSlots][kPitch];

  alignas(32) Rows left;
  alignas(32) Rows right;
  int64_t left_offset[kSlots], right_offset[kSlots];  // where slots begin, or kNone
};

constexpr int64_t kNone = INT64_MIN;

// One thread per slot, so that the division is done once.
template <class T>
__device__ void find_slots(Stage<T>& stage, const Outer& call, int64_t first,
                           int64_t slots_per_sample) {
  const int k = static_cast<int>(threadIdx.x);
  if (k < kSlots) {
    const int64_t sample = (first + k) / slots_per_sample;
    const int64_t position = (first + k) % slots_per_sample;
    const bool is_position = sample < call.samples && position < call.positions;
    const auto offset = [&](const Factor& factor) {
      return is_position ? sample * factor.sample_stride + position * factor.position_stride
                         : kNone;
    };
    stage.left_offset[k] = offset(call.left);
    stage.right_offset[k] = offset(call.right);
  }
}

// Whether rows are adjacent in memory and form whole, aligned vectors.
template <class T>
__device__ bool in_vectors(const Factor& factor, int64_t rows) {
  constexpr int kVector = kVectorBytes / sizeof(T);
  return factor.row_stride == 1 && reinterpret_cast<uintptr_t>(factor.data) % kVectorBytes == 0 &&
         (factor.sample_stride | factor.position_stride | rows) % kVector == 0;
}

template <class T, class Magnitude, int Threads>
__device__ void stage_vectors(typename Stage<T>::Rows& tile, const Factor& factor,
                              const int64_t* offsets, int64_t first_row, int64_t rows,
                              bool magnitudes) {
  constexpr int kVector = kVectorBytes / sizeof(T), kAcross = kTile / kVector;
#pragma unroll 4  // loads in flight
  for (int i = static_cast<int>(threadIdx.x); i < kAcross * kSlots; i += Threads) {
    const int slot = i / kAcross, row = i % kAcross * kVector;
    Pack<T, kVector> pack;
    if (offsets[slot] != kNone && first_row + row < rows) {
      const T* data = static_cast<const T*>(factor.data) + offsets[slot] + first_row + row;
      pack = Pack<T, kVector>::of(data);
    }
    if constexpr (Magnitude::template fits_in<T>) {
      if (magnitudes) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          pack.set(v, Magnitude::of(pack.get(v)));
        }
      }
    }
    Pack<T, kVector>::of(&tile[slot][row]) = pack;
  }
}

// Neighbouring threads read along the rows if these are adjacent in memory, else along the slots.
template <class T, class Magnitude, int Threads>
__device__ void stage_elements(typename Stage<T>::Rows& tile, const Factor& factor,
                               const int64_t* offsets, int64_t first_row, int64_t rows,
                               bool magnitudes) {
  const bool along_rows = factor.row_stride == 1;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kSlots; i += Threads) {
    const int slot = along_rows ? i / kTile : i % kSlots;
    const int row = along_rows ? i % kTile : i / kSlots;
    T value = T(0);
    if (offsets[slot] != kNone && first_row + row < rows) {
      value =
          static_cast<const T*>(factor.data)[offsets[slot] + (first_row + row) * factor.row_stride];
    }
    if constexpr (Magnitude::template fits_in<T>) {
      value = magnitudes ? Magnitude::of(value) : value;
    }
    tile[slot][row] = value;
  }
}

template <class T, class Magnitude, int Threads>
__device__ void stage_factor(typename Stage<T>::Rows& tile, const Factor& factor,
                             const int64_t* offsets, int64_t first_row, int64_t rows,
                             bool magnitudes) {
  if (in_vectors<T>(factor, rows)) {
    stage_vectors<T, Magnitude, Threads>(tile, factor, offsets, first_row, rows, magnitudes);
  } else {
    stage_elements<T, Magnitude, Threads>(tile, factor, offsets, first_row, rows, magnitudes);
  }
}

}  // namespace mas_ext::cuda
