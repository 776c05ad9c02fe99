// accumulate_abs_matmul_ on CUDA: Ω[p,d] += scale·Σ_b |Σ_t left[b,t,p]·right[b,t,d]|.
#include <torch/csrc/stable/library.h>

#include "../abs_matmul_arguments.h"
#include "abs_matmul.cuh"
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

void accumulate_abs_matmul_(const Tensor& omega, const Tensor& left, const Tensor& right,
                            double scale) {
  constexpr const char* op = "accumulate_abs_matmul_";
  const AbsMatmul call = prepare_abs_matmul(op, omega, left, right, scale);
  if (call.is_empty()) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(omega.get_device_index());
  const auto blocks = static_cast<unsigned>(tiles_of(call.rows) * tiles_of(call.columns));
  visit_dtype(call.dtype, [&]<class T>() {
    abs_matmul_kernel<T><<<blocks, TileFor<T>::kThreads, 0, current_stream(omega)>>>(call);
  });
  check_launch(op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("accumulate_abs_matmul_", TORCH_BOX(&accumulate_abs_matmul_));
}

}  // namespace mas_ext::cuda
