// A tile of sums of magnitudes on tensor cores, for bfloat16 and float16 factors. The factors'
// products are exact in float32, in which they are summed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <type_traits>

#include "../formulas.h"
#include "../numbers.h"
#include "stage.cuh"

namespace mas_ext::cuda {

namespace wmma = nvcuda::wmma;

// Four warps own a quarter of the tile each, in fragments of 16 × 16. The hardware decides which
// thread has which element of a fragment; magnitudes and sums are elementwise and do not depend on
// it. Positions of two samples never share a multiplication: samples are padded with zeros to a
// multiple of 16 slots.
template <class T>
class TensorCoreTile {
  using Element = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat16, __half>;
  static constexpr int kSide = 16;      // of a fragment
  static constexpr int kFragments = 2;  // per warp, in rows and in columns
  static constexpr int kWarpTile = kSide * kFragments;
  static constexpr int kAcross = kTile / kWarpTile;  // warps that share rows

  using Left = wmma::fragment<wmma::matrix_a, kSide, kSide, kSide, Element, wmma::col_major>;
  using Right = wmma::fragment<wmma::matrix_b, kSide, kSide, kSide, Element, wmma::row_major>;
  using Sum = wmma::fragment<wmma::accumulator, kSide, kSide, kSide, float>;

 public:
  static constexpr int kThreads = 32 * kAcross * kAcross;
  static constexpr int kResident = 4;  // blocks that must fit on a multiprocessor
  static constexpr int kStep = kSide;  // slots per multiplication

  __device__ TensorCoreTile() {
#pragma unroll
    for (int r = 0; r < kFragments; ++r) {
#pragma unroll
      for (int c = 0; c < kFragments; ++c) {
        wmma::fill_fragment(product_[r][c], 0.0f);
        wmma::fill_fragment(sums_[r][c], 0.0f);
      }
    }
  }

  __device__ void multiply(const Stage<T>& stage, int slot) {
    Left left[kFragments];
    Right right[kFragments];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      load_staged(left[i], &stage.left[slot][row(i)]);
      load_staged(right[i], &stage.right[slot][column(i)]);
    }
#pragma unroll
    for (int r = 0; r < kFragments; ++r) {
#pragma unroll
      for (int c = 0; c < kFragments; ++c) {
        wmma::mma_sync(product_[r][c], left[r], right[c], product_[r][c]);
      }
    }
  }

  template <class Magnitude>
  __device__ void end_sample() {
#pragma unroll
    for (int r = 0; r < kFragments; ++r) {
#pragma unroll
      for (int c = 0; c < kFragments; ++c) {
#pragma unroll
        for (int i = 0; i < Sum::num_elements; ++i) {
          sums_[r][c].x[i] += Magnitude::of(product_[r][c].x[i]);
        }
        wmma::fill_fragment(product_[r][c], 0.0f);
      }
    }
  }

  template <int Pitch>
  __device__ void store(float (&tile)[kTile][Pitch]) const {
#pragma unroll
    for (int r = 0; r < kFragments; ++r) {
#pragma unroll
      for (int c = 0; c < kFragments; ++c) {
        wmma::store_matrix_sync(&tile[row(r)][column(c)], sums_[r][c], Pitch, wmma::mem_row_major);
      }
    }
  }

 private:
  // Where the warp's i-th fragment begins.
  __device__ static int row(int i) {
    return static_cast<int>(threadIdx.x) / 32 / kAcross * kWarpTile + i * kSide;
  }
  __device__ static int column(int i) {
    return static_cast<int>(threadIdx.x) / 32 % kAcross * kWarpTile + i * kSide;
  }

  template <class Fragment>
  __device__ static void load_staged(Fragment& fragment, const T* staged) {
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, BFloat16>) {
      load_shared_bfloat16(fragment, staged);
      return;
    }
#endif
    wmma::load_matrix_sync(fragment, reinterpret_cast<const Element*>(staged), Stage<T>::kPitch);
  }

#if defined(__CUDA_ARCH__)
  // As load_matrix_sync, but the instruction says that the memory is shared. For bfloat16 the
  // compiler does not see it otherwise and reads 4 bytes at a time.
  __device__ static void load_shared_bfloat16(Left& fragment, const T* staged) {
    auto* to = reinterpret_cast<unsigned*>(fragment.x);
    asm volatile("wmma.load.a.sync.aligned.col.m16n16k16.shared.bf16 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(staged)), "r"(Stage<T>::kPitch)
                 : "memory");
  }
  __device__ static void load_shared_bfloat16(Right& fragment, const T* staged) {
    auto* to = reinterpret_cast<unsigned*>(fragment.x);
    asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.bf16 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(staged)), "r"(Stage<T>::kPitch)
                 : "memory");
  }
  __device__ static unsigned shared_address(const T* staged) {
    return static_cast<unsigned>(__cvta_generic_to_shared(staged));
  }
#endif

  Sum product_[kFragments][kFragments], sums_[kFragments][kFragments];
};

}  // namespace mas_ext::cuda
