// Ω as memory keeps it: in numbers, or in codes of 8 bits with a scale for every block of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../formulas.h"
#include "../numbers.h"
#include "pack.cuh"

namespace mas_ext::cuda {

template <class Kept>
constexpr bool in_codes = std::is_same_v<Kept, uint8_t>;

// N neighbours in registers, as they are kept until they are computed with, in A.
template <class A, class Kept, int N>
class Omega {
 public:
  __device__ void load(const void* omega, const float*, int first) {
    kept_ = Pack<Kept, N>::of(static_cast<const Kept*>(omega) + first);
  }
  __device__ void store(void* omega, int first) const {
    Pack<Kept, N>::of(static_cast<Kept*>(omega) + first) = kept_;
  }
  __device__ A get(int i) const { return static_cast<A>(kept_.get(i)); }
  __device__ void set(int i, A value) { kept_.set(i, value); }

 private:
  Pack<Kept, N> kept_;
};

// Blocks are counted from the chunk's first element, vectors from the first boundary behind it: the
// one may end within the other, so a vector has the scales of its first and of its last element.
// Neighbouring threads mostly ask for the same one, which the nearest cache has.
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
    return expanded(codes_.get(i), i < left_ ? of_first_ : of_last_);
  }

 private:
  Pack<uint8_t, N> codes_;
  float of_first_, of_last_;
  int left_;  // elements of the first one's block, from it on
};

}  // namespace mas_ext::cuda
