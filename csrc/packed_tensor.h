// A tensor as mas_ext._C.pack describes it to the kernels.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace mas_ext {

// The addresses hold while the tensor is not changed: during one call.
struct PackedTensor {
  void* data;
  const int64_t *sizes, *strides;
  int32_t dim;
  int32_t device_index;
  bool is_cpu;
  torch::headeronly::ScalarType dtype;
};

}  // namespace mas_ext
