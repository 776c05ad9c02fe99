// The penalty λ/2 Σ Ω(θ−θ*)² on CUDA: its value alone, with its gradient, and with the gradient
// added to what is there. Each is one pass: 12, 16 and 20 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../formulas.h"
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

template <class T>
struct Energy {
  using A = accumulate_t<T>;
  static constexpr int kStreams = 3, kOmega = 2;
  static constexpr unsigned kReads = 0b111, kWrites = 0;
  static constexpr bool kSums = true;

  __device__ void begin() {}
  __device__ A operator()(A (&element)[kStreams]) const {
    return penalty_energy(element[0] - element[1], element[2]);
  }
};

template <class T, bool Add>
struct GradientBase {
  using A = accumulate_t<T>;
  static constexpr int kStreams = 4, kOmega = 3;
  static constexpr unsigned kReads = Add ? 0b1111 : 0b1110, kWrites = 0b0001;
  static constexpr bool kSums = true;

  Scalar lambda, grad_scale;
  A coefficient;

  __device__ void begin() { coefficient = finite<A>(lambda.load() * grad_scale.load()); }
  __device__ A operator()(A (&element)[kStreams]) const {
    const A delta = element[1] - element[2], omega = element[3];
    const A gradient = penalty_gradient(delta, omega, coefficient);
    element[0] = Add ? element[0] + gradient : gradient;
    return penalty_energy(delta, omega);
  }
};
template <class T>
using Gradient = GradientBase<T, false>;
template <class T>
using AddGradient = GradientBase<T, true>;

constexpr Scalar kOne{nullptr, 1.0, true};

Tensor penalty(const TensorList& params, const TensorList& anchors, const TensorList& omega,
               const Tensor& lambda_reg) {
  constexpr const char* op = "penalty";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  FlatList<3> list(op, {{.name = "params", .tensors = params},
                        {.name = "anchors", .tensors = anchors},
                        {.name = "omega", .tensors = omega, .is_omega = true}});
  return launch_penalty<Energy>(op, list, home(params, lambda_reg), lambda,
                                [&]<class T>() { return Energy<T>{}; });
}

std::tuple<Tensor, TensorList> penalty_and_grad(const TensorList& params, const TensorList& anchors,
                                                const TensorList& omega, const Tensor& lambda_reg) {
  constexpr const char* op = "penalty_and_grad";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  check_arguments(op, {{.name = "params", .tensors = params},
                       {.name = "anchors", .tensors = anchors},
                       {.name = "omega", .tensors = omega, .is_omega = true}});
  const TensorList grads = empty_like_each(params);
  FlatList<4> list(op, {{.name = "grads", .tensors = grads, .writable = true},
                        {.name = "params", .tensors = params},
                        {.name = "anchors", .tensors = anchors},
                        {.name = "omega", .tensors = omega, .is_omega = true}});
  const Tensor value =
      launch_penalty<Gradient>(op, list, home(params, lambda_reg), lambda,
                               [&]<class T>() { return Gradient<T>{lambda, kOne, 0}; });
  list.write_back();
  return {value, grads};
}

Tensor add_penalty_grad_(const TensorList& grads, const TensorList& params,
                         const TensorList& anchors, const TensorList& omega,
                         const Tensor& lambda_reg, const std::optional<Tensor>& grad_scale) {
  constexpr const char* op = "add_penalty_grad_";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, grads);
  const Scalar scale = grad_scale ? read_scalar(op, "grad_scale", *grad_scale, grads) : kOne;
  check_non_negative(op, "lambda_reg", lambda);
  check_non_negative(op, "grad_scale", scale);
  FlatList<4> list(op, {{.name = "grads", .tensors = grads, .writable = true},
                        {.name = "params", .tensors = params},
                        {.name = "anchors", .tensors = anchors},
                        {.name = "omega", .tensors = omega, .is_omega = true}});
  const Tensor value =
      launch_penalty<AddGradient>(op, list, home(params, lambda_reg), lambda,
                                  [&]<class T>() { return AddGradient<T>{lambda, scale, 0}; });
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
