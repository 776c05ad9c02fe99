// proximal_step_ on CUDA: θ ← (θ + ηλΩθ*)/(1 + ηλΩ), 16 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include "../formulas.h"
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

// The sum is taken at the parameters as they are stored afterwards.
template <class T>
struct Proximal {
  using A = accumulate_t<T>;
  static constexpr int kStreams = 3, kOmega = 2;
  static constexpr unsigned kReads = 0b111, kWrites = 0b001;
  static constexpr bool kSums = true;

  Scalar lambda, lr;
  A step_times_lambda;

  __device__ void begin() { step_times_lambda = finite<A>(lambda.load() * lr.load()); }
  __device__ A operator()(A (&element)[kStreams]) const {
    const A param = element[0], anchor = element[1], omega = element[2];
    const T moved = static_cast<T>(proximal_point(param, param - anchor, omega, step_times_lambda));
    element[0] = static_cast<A>(moved);
    return penalty_energy(element[0] - anchor, omega);
  }
};

Tensor proximal_step_(const TensorList& params, const TensorList& anchors, const TensorList& omega,
                      const Tensor& lambda_reg, const Tensor& lr) {
  constexpr const char* op = "proximal_step_";
  const Scalar lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const Scalar rate = read_scalar(op, "lr", lr, params);
  check_non_negative(op, "lambda_reg", lambda);
  check_non_negative(op, "lr", rate);
  FlatList<3> list(op, {{.name = "params", .tensors = params, .writable = true},
                        {.name = "anchors", .tensors = anchors},
                        {.name = "omega", .tensors = omega, .is_omega = true}});
  const Tensor value =
      launch_penalty<Proximal>(op, list, home(params, lambda_reg), lambda,
                               [&]<class T>() { return Proximal<T>{lambda, rate, 0}; });
  list.write_back();
  return value;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("proximal_step_", TORCH_BOX(&proximal_step_));
}

}  // namespace mas_ext::cuda
