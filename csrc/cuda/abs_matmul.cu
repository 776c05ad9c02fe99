// accumulate_abs_matmul_ on CUDA: Ω[p,d] += scale·Σ_b |Σ_t left[b,t,p]·right[b,t,d]|.
#include <torch/csrc/stable/library.h>

#include "../abs_matmul_arguments.h"
#include "abs_matmul.cuh"
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

template <class T>
void launch(const AbsMatmul& call, const Tensor& omega, cudaStream_t stream) {
  const int64_t size = call.rows * call.columns;
  const int count = parts_of(call);
  const auto blocks = static_cast<unsigned>(tiles_of(call) * count);
  if (count == 1) {
    abs_matmul_kernel<T><<<blocks, TileFor<T>::kThreads, 0, stream>>>(call, {1, nullptr});
    return;
  }
  const Tensor sums = torch::stable::new_empty(omega, {count * size});
  const Parts parts{count, sums.mutable_data_ptr()};
  abs_matmul_kernel<T><<<blocks, TileFor<T>::kThreads, 0, stream>>>(call, parts);
  const auto rest = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  add_parts<accumulate_t<T>><<<rest, kThreads, 0, stream>>>(call, parts);
}

void accumulate_abs_matmul_(const Tensor& omega, const Tensor& left, const Tensor& right,
                            double scale) {
  constexpr const char* op = "accumulate_abs_matmul_";
  const AbsMatmul call = prepare_abs_matmul(op, omega, left, right, scale);
  if (call.is_empty()) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(omega.get_device_index());
  visit_dtype(call.dtype, [&]<class T>() { launch<T>(call, omega, current_stream(omega)); });
  check_launch(op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("accumulate_abs_matmul_", TORCH_BOX(&accumulate_abs_matmul_));
}

}  // namespace mas_ext::cuda
