// Optimizer steps with the penalty in them, on CUDA: sgd_step_ and adamw_step_. One pass: 20 bytes
// a float32 parameter for SGD, 28 with momentum, 36 for AdamW.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>

#include "../steps_arguments.h"
#include "launch.cuh"
#include "steps.cuh"

namespace mas_ext::cuda {
namespace {

DeviceScalars read_scalars(const char* op, const TensorList& params, const Tensor& lambda_reg,
                           const Tensor& lr, const std::optional<Tensor>& grad_scale,
                           const std::optional<Tensor>& found_inf) {
  const auto read = [&](const char* name, const std::optional<Tensor>& scalar, double otherwise) {
    return scalar ? read_scalar(op, name, *scalar, params) : Scalar{nullptr, otherwise, true};
  };
  const DeviceScalars scalars{read("lambda_reg", lambda_reg, 0.0), read("lr", lr, 0.0),
                              read("grad_scale", grad_scale, 1.0),
                              read("found_inf", found_inf, 0.0)};
  check_non_negative(op, "lambda_reg", scalars.lambda);
  check_non_negative(op, "lr", scalars.lr);
  if (scalars.grad_scale.device == nullptr) {
    check_positive(op, "grad_scale", scalars.grad_scale.host);
  }
  return scalars;
}

template <template <class> class Rule, size_t Streams, class Options>
Tensor penalised_step(const char* op, FlatList<Streams> list, const Tensor& home,
                      const DeviceScalars& scalars, const Options& options, bool proximal,
                      const BiasCorrection* corrections = nullptr) {
  const auto run = [&]<bool Proximal>() {
    using By = StepBy<Rule, Options, Proximal>;
    return launch_penalty<By::template Operation>(op, list, home, scalars.lambda, [&]<class T>() {
      return typename By::template Operation<T>(scalars, options, corrections);
    });
  };
  const Tensor value =
      proximal ? run.template operator()<true>() : run.template operator()<false>();
  list.write_back();
  return value;
}

Tensor sgd_step_(const TensorList& params, const TensorList& grads,
                 const TensorList& momentum_buffers, const TensorList& anchors,
                 const TensorList& omega, const TensorList& omega_scales, const Tensor& lambda_reg,
                 const Tensor& lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, bool proximal,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  constexpr const char* op = "sgd_step_";
  const SgdOptions options{momentum, dampening, weight_decay, nesterov, maximize};
  const DeviceScalars scalars = read_scalars(op, params, lambda_reg, lr, grad_scale, found_inf);
  check_options(op, options, momentum_buffers);
  const Tensor& where = home(params, lambda_reg);
  if (momentum == 0) {
    return penalised_step<SgdRule>(op, sgd_list(op, params, grads, anchors, omega, omega_scales),
                                   where, scalars, options, proximal);
  }
  return penalised_step<MomentumRule>(
      op, momentum_list(op, params, momentum_buffers, grads, anchors, omega, omega_scales), where,
      scalars, options, proximal);
}

// One a parameter, on the device: nothing waits for the counts.
Tensor make_corrections(const char* op, const Tensor& steps, const AdamOptions& options) {
  const int64_t count = steps.numel();
  const Tensor corrections = torch::stable::new_empty(steps, {count, 2}, ScalarType::Double);
  if (count == 0) {
    return corrections;
  }
  const torch::stable::accelerator::DeviceGuard guard(steps.get_device_index());
  const Tensor counts = torch::stable::contiguous(steps);
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  const auto run = [&]<class Count>() {
    bias_corrections<<<blocks, kThreads, 0, current_stream(steps)>>>(
        static_cast<const Count*>(counts.const_data_ptr()), count, options,
        static_cast<BiasCorrection*>(corrections.mutable_data_ptr()));
  };
  dtype_of(counts) == ScalarType::Double ? run.template operator()<double>()
                                         : run.template operator()<float>();
  check_launch(op);
  return corrections;
}

Tensor adamw_step_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const Tensor& steps, const TensorList& anchors,
                   const TensorList& omega, const TensorList& omega_scales,
                   const Tensor& lambda_reg, const Tensor& lr, double beta1, double beta2,
                   double eps, double weight_decay, bool decoupled, bool maximize, bool proximal,
                   const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  static_assert(sizeof(BiasCorrection) == 2 * sizeof(double));
  constexpr const char* op = "adamw_step_";
  const AdamOptions options{beta1, beta2, eps, weight_decay, decoupled, maximize};
  const DeviceScalars scalars = read_scalars(op, params, lambda_reg, lr, grad_scale, found_inf);
  check_options(op, options);
  check_steps(op, steps, params);
  FlatList<6> list =
      adamw_list(op, params, exp_avgs, exp_avg_sqs, grads, anchors, omega, omega_scales);
  const Tensor corrections = make_corrections(op, steps, options);
  return penalised_step<AdamRule>(op, std::move(list), home(params, lambda_reg), scalars, options,
                                  proximal,
                                  static_cast<const BiasCorrection*>(corrections.const_data_ptr()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step_));
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
}

}  // namespace mas_ext::cuda
