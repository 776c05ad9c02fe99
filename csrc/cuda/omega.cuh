// Ω as it is stored: as numbers, or as 8-bit codes with a scale for each block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../formulas.h"
#include "../numbers.h"
#include "pack.cuh"

namespace mas_ext::cuda {

template <class Stored>
constexpr bool in_codes = std::is_same_v<Stored, uint8_t>;

// N neighbours in registers, as they are stored, until they are computed with in A.
template <class A, class Stored, int N>
class Omega {
 public:
  __device__ void load(const void* omega, const float*, int first) {
    stored_ = Pack<Stored, N>::of(static_cast<const Stored*>(omega) + first);
  }
  __device__ void store(void* omega, int first) const {
    Pack<Stored, N>::of(static_cast<Stored*>(omega) + first) = stored_;
  }
  __device__ A get(int i) const { return static_cast<A>(stored_.get(i)); }
  __device__ void set(int i, A value) { stored_.set(i, value); }

 private:
  Pack<Stored, N> stored_;
};

// Blocks begin at the chunk's first element, vectors at the first 16-byte boundary after it. A
// block may therefore end within a vector, so a vector needs the scales of its first and of its
// last element. Neighbouring threads mostly read the same one, which is in the L1 cache.
template <class A, int N>
class Omega<A, uint8_t, N> {
  static constexpr int kBlock = kScaleBlock;
  static_assert(N <= kBlock, "a vector has elements of two blocks at most");

 public:
  __device__ void load(const void* codes, const float* scales, int first) {
    codes_ = Pack<uint8_t, N>::of(static_cast<const uint8_t*>(codes) + first);
    of_first_ = scales[first / kBlock];
    of_last_ = scales[(first + N - 1) / kBlock];
    left_ = kBlock - first % kBlock;
  }
  __device__ A get(int i) const {
    return dequantize(codes_.get(i), i < left_ ? of_first_ : of_last_);
  }

 private:
  Pack<uint8_t, N> codes_;
  float of_first_, of_last_;
  int left_;  // elements from the first to the end of its block
};

}  // namespace mas_ext::cuda
