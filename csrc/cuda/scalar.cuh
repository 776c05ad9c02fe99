// λ, learning rate, gradient scale: scalar arguments of kernels.
#pragma once

#include <cuda_runtime.h>

namespace mas_ext::cuda {

// On the host or on the device. On the device a captured graph sees new values, and nothing waits.
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
