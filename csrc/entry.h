// What kernels see of one parameter.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "numbers.h"

namespace mas_ext {

// A pointer for each argument of the operator, all to `numel` elements in the same order.
template <size_t Streams>
struct Entry {
  std::array<void*, Streams> data;
  int64_t numel;
  ScalarType dtype;  // of the values
  int64_t index;     // its position in the lists, counting empty tensors
  ScalarType omega_dtype;
  const float* omega_scales;  // one per block; nullptr unless Ω is stored in codes
};

}  // namespace mas_ext
