// What all CUDA kernels give to the operators of ../operators.h: scalars and launches. Nothing here
// waits for the device or copies to it, so every operator can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "../operators.h"
#include "multi_tensor.cuh"
#include "steps.cuh"

namespace mas_ext::cuda {

inline cudaStream_t current_stream(const Place& place) {
  return static_cast<cudaStream_t>(
      torch::stable::accelerator::getCurrentStream(place.device_index).nativeHandle());
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    fail(op, "CUDA launch failed: ", cudaGetErrorString(error));
  }
}

struct CudaKernels {
  using Number = Scalar;
  using StepNumbers = DeviceScalars;

  static Scalar constant(double value) { return {nullptr, value, true}; }
  static const double* known(const Scalar& scalar) {
    return scalar.device == nullptr ? &scalar.host : nullptr;
  }

  static Scalar read(const char*, const char*, const Tensor& scalar) {
    const bool is_double = dtype_of(scalar) == ScalarType::Double;
    const void* data = scalar.const_data_ptr();
    if (!scalar.is_cpu()) {
      return {data, 0.0, is_double};
    }
    const double value = is_double ? *static_cast<const double*>(data)
                                   : static_cast<double>(*static_cast<const float*>(data));
    return {nullptr, value, is_double};
  }
};

// Runs an operation on a list: one launch for all tensors of one kind that a table holds.
// `make.template operator()<T>()` gives the operation for a dtype.
template <template <class> class Operation, size_t Streams, class Make>
void launch(const Call& call, const FlatList<Streams>& list, double* partial_sums,
            cudaStream_t stream, Make make) {
  for_each_table(list.entries(), [&]<class T, class Stored>(const auto& table) {
    if constexpr (takes<Operation<T>, Stored>) {
      chunk_kernel<Operation, T, Stored><<<table.chunks(), kThreads, 0, stream>>>(
          table, make.template operator()<T>(), partial_sums);
      check_launch(call.op);
      if (partial_sums != nullptr) {
        partial_sums += table.chunks();
      }
    }
  });
}

// The same for an operation that sums: returns λ/2 of the sum as a 0-dim tensor on the device.
template <template <class> class Operation, size_t Streams, class Make>
Tensor launch_penalty(const Call& call, const FlatList<Streams>& list, const Scalar& lambda,
                      Make make) {
  const torch::stable::accelerator::DeviceGuard guard(call.place.device_index);
  const cudaStream_t stream = current_stream(call.place);
  const int64_t chunks = chunks_in(list.entries());
  const Tensor partial = call.place.empty({chunks}, ScalarType::Double);
  const Tensor value = call.place.empty({}, list.value_dtype());
  auto* sums = static_cast<double*>(partial.mutable_data_ptr());
  launch<Operation>(call, list, sums, stream, make);
  visit_dtype(dtype_of(value), [&]<class T>() {
    if constexpr (sizeof(T) >= sizeof(float)) {
      finish_penalty<T><<<1, kThreads, 0, stream>>>(sums, chunks, lambda,
                                                    static_cast<T*>(value.mutable_data_ptr()));
    }
  });
  check_launch(call.op);
  return value;
}

}  // namespace mas_ext::cuda
