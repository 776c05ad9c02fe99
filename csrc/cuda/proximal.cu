// proximal_step_ on CUDA: θ ← (θ + ηλΩθ*)/(1 + ηλΩ), 16 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include "../penalty_arguments.h"
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

Tensor proximal_step_(const TensorList& params, const TensorList& anchors, const TensorList& omega,
                      const TensorList& omega_scales, const Tensor& lambda_reg, const Tensor& lr) {
  constexpr const char* op = "proximal_step_";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const Scalar rate = read_scalar(op, "lr", lr, params);
  check_non_negative(op, "lambda_reg", lambda);
  check_non_negative(op, "lr", rate);
  FlatList<3> list = state_list(op, params, anchors, omega, omega_scales, true);
  const Tensor value =
      launch_penalty<ProximalStep>(op, list, home(params, lambda_reg), lambda,
                                   [&]<class T>() { return ProximalStep<T>{lambda, rate, 0}; });
  list.write_back();
  return value;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("proximal_step_", TORCH_BOX(&proximal_step_));
}

}  // namespace mas_ext::cuda
