// The penalty λ/2 Σ Ω(θ−θ*)² on CUDA: its value alone, with its gradient, and with the gradient
// added to what is there. Each is one pass: 12, 16 and 20 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../penalty_arguments.h"
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

constexpr Scalar kOne{nullptr, 1.0, true};

Tensor penalty(const TensorList& params, const TensorList& anchors, const TensorList& omega,
               const TensorList& omega_scales, const Tensor& lambda_reg) {
  constexpr const char* op = "penalty";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const FlatList<3> list = state_list(op, params, anchors, omega, omega_scales, false);
  return launch_penalty<PenaltyEnergy>(op, list, home(params, lambda_reg), lambda,
                                       [&]<class T>() { return PenaltyEnergy<T>{}; });
}

std::tuple<Tensor, TensorList> penalty_and_grad(const TensorList& params, const TensorList& anchors,
                                                const TensorList& omega,
                                                const TensorList& omega_scales,
                                                const Tensor& lambda_reg) {
  constexpr const char* op = "penalty_and_grad";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const TensorList grads = new_gradients(op, params, anchors, omega, omega_scales);
  FlatList<4> list = gradient_list(op, grads, params, anchors, omega, omega_scales);
  const Tensor value = launch_penalty<PenaltyGradient>(
      op, list, home(params, lambda_reg), lambda,
      [&]<class T>() { return PenaltyGradient<T>{lambda, kOne, 0}; });
  list.write_back();
  return {value, grads};
}

Tensor add_penalty_grad_(const TensorList& grads, const TensorList& params,
                         const TensorList& anchors, const TensorList& omega,
                         const TensorList& omega_scales, const Tensor& lambda_reg,
                         const std::optional<Tensor>& grad_scale) {
  constexpr const char* op = "add_penalty_grad_";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, grads);
  const Scalar scale = grad_scale ? read_scalar(op, "grad_scale", *grad_scale, grads) : kOne;
  check_non_negative(op, "lambda_reg", lambda);
  check_non_negative(op, "grad_scale", scale);
  FlatList<4> list = gradient_list(op, grads, params, anchors, omega, omega_scales);
  const Tensor value = launch_penalty<AddPenaltyGradient>(
      op, list, home(params, lambda_reg), lambda,
      [&]<class T>() { return AddPenaltyGradient<T>{lambda, scale, 0}; });
  list.write_back();
  return value;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("penalty", TORCH_BOX(&penalty));
  m.impl("penalty_and_grad", TORCH_BOX(&penalty_and_grad));
  m.impl("add_penalty_grad_", TORCH_BOX(&add_penalty_grad_));
}

}  // namespace mas_ext::cuda
