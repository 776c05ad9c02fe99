// λ, learning rate, gradient scale: numbers that kernels are told.
#pragma once

#include <cuda_runtime.h>

namespace mas_ext::cuda {

// On the host; or on the device, where a captured graph sees it change and nothing waits for it.
struct Scalar {
  const void* device;
  double host;
  bool is_double;

  __device__ double load() const {
    if (device == nullptr) {
      return host;
    }
    return is_double ? *static_cast<const double*>(device)
                     : static_cast<double>(*static_cast<const float*>(device));
  }
};

}  // namespace mas_ext::cuda
