// The host side of a CUDA operator: launches and scalars. Nothing here waits for
// the device or copies to it, so every operator can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "../checks.h"
#include "../tensor_list.h"
#include "multi_tensor.cuh"

namespace mas_ext::cuda {

inline cudaStream_t current_stream(const Tensor& tensor) {
  return static_cast<cudaStream_t>(
      torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle());
}

// A tensor on the device a call runs on: an empty list is where its λ is.
inline const Tensor& home(const TensorList& params, const Tensor& lambda_reg) {
  return params.empty() ? lambda_reg : params.front();
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    fail(op, "CUDA launch failed: ", cudaGetErrorString(error));
  }
}

inline Scalar read_scalar(const char* op, const char* name, const Tensor& scalar,
                          const TensorList& tensors) {
  check_scalar(op, name, scalar, tensors);
  const bool is_double = dtype_of(scalar) == ScalarType::Double;
  const void* data = scalar.const_data_ptr();
  if (!scalar.is_cpu()) {
    return {data, 0.0, is_double};
  }
  const double value = is_double ? *static_cast<const double*>(data)
                                 : static_cast<double>(*static_cast<const float*>(data));
  return {nullptr, value, is_double};
}

inline void check_non_negative(const char* op, const char* name, const Scalar& scalar) {
  if (scalar.device == nullptr) {
    mas_ext::check_non_negative(op, name, scalar.host);
  }
}

// Runs an operation on a list: one launch for all tensors of one kind that a table holds.
// `make.template operator()<T>()` gives the operation for a dtype.
template <template <class> class Operation, size_t Streams, class Make>
void launch(const char* op, const FlatList<Streams>& list, double* partial_sums,
            cudaStream_t stream, Make make) {
  for_each_table(list.entries(), [&]<class T, class Kept>(const auto& table) {
    if constexpr (takes<Operation<T>, Kept>) {
      chunk_kernel<Operation, T, Kept><<<table.chunks(), kThreads, 0, stream>>>(
          table, make.template operator()<T>(), partial_sums);
      check_launch(op);
      if (partial_sums != nullptr) {
        partial_sums += table.chunks();
      }
    }
  });
}

// The same for an operation that sums: returns λ/2 of the sum as a 0-dim tensor on the device.
template <template <class> class Operation, size_t Streams, class Make>
Tensor launch_penalty(const char* op, const FlatList<Streams>& list, const Tensor& home,
                      const Scalar& lambda, Make make) {
  const torch::stable::accelerator::DeviceGuard guard(home.get_device_index());
  const cudaStream_t stream = current_stream(home);
  const int64_t chunks = chunks_in(list.entries());
  const Tensor partial = torch::stable::new_empty(home, {chunks}, ScalarType::Double);
  const Tensor value = torch::stable::new_empty(home, {}, list.value_dtype());
  auto* sums = static_cast<double*>(partial.mutable_data_ptr());
  launch<Operation>(op, list, sums, stream, make);
  visit_dtype(dtype_of(value), [&]<class T>() {
    if constexpr (sizeof(T) >= sizeof(float)) {
      finish_penalty<T><<<1, kThreads, 0, stream>>>(sums, chunks, lambda,
                                                    static_cast<T*>(value.mutable_data_ptr()));
    }
  });
  check_launch(op);
  return value;
}

}  // namespace mas_ext::cuda
