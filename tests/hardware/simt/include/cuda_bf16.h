// What the kernels use of CUDA's bfloat16: elements of a fragment.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;

  explicit operator float() const {
    using torch::headeronly::BFloat16;
    return static_cast<float>(BFloat16(bits, BFloat16::from_bits()));
  }
};
