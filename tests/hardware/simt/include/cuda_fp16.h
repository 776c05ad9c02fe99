// What the kernels use of CUDA's float16: elements of a fragment.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

struct __half {
  uint16_t bits;

  explicit operator float() const {
    using torch::headeronly::Half;
    return static_cast<float>(Half(bits, Half::from_bits()));
  }
};
