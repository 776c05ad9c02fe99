// The operators, written once for CPU and CUDA: the checks of their arguments, the lists that
// kernels walk, and what is returned. A device's kernels are a class (`Kernels` below) with
//
//   Number                       a 0-dim tensor's value, or on CUDA where to read it
//   StepNumbers                  { Number lambda, lr, grad_scale, found_inf; }
//   read(op, name, scalar)       the number in a tensor that passed check_scalar
//   constant(value)              a number that is known here
//   known(number)                a pointer to its value, or nullptr if it is on the device
//
// and the functions that the operators below call. A kernel returns the penalty as a 0-dim tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"
#include "dimensions.h"
#include "formulas.h"
#include "low_rank.h"
#include "outer.h"
#include "packed.h"
#include "steps.h"
#include "tensor_list.h"

namespace mas_ext {

// What a kernel knows of the call it serves: its operator, for errors, and its device.
struct Call {
  const char* op;
  Place place;
};

// A list without tensors is where its λ is.
inline Place place_of(const Operands& params, const Tensor& lambda_reg) {
  return params.empty() ? Place(lambda_reg) : params.front().place;
}

// ------------------------------------------------------------------------------------------------
// Arguments
// ------------------------------------------------------------------------------------------------
inline Argument read(const char* name, Operands tensors) {
  return {.name = name, .tensors = std::move(tensors)};
}
inline Argument written(const char* name, Operands tensors) {
  return {.name = name, .tensors = std::move(tensors), .writable = true};
}
inline Argument omega_of(Operands omega) {
  return {.name = "omega", .tensors = std::move(omega), .is_omega = true};
}
inline Argument scales_of(Operands omega_scales) {
  return {.name = "omega_scales", .tensors = std::move(omega_scales)};
}

inline Argument single(const char* name, const Tensor& tensor) {
  return {.name = name, .tensors = tensor, .is_list = false};
}
inline Argument single_written(const char* name, const Tensor& tensor) {
  return {.name = name, .tensors = tensor, .writable = true, .is_list = false};
}
inline Argument single_omega(const Tensor& omega, bool writable = false) {
  return {
      .name = "omega", .tensors = omega, .is_omega = true, .writable = writable, .is_list = false};
}

using NumberCheck = void (*)(const char* op, const char* name, double value);

inline void allow_any(const char*, const char*, double) {}

// A scalar argument, or `otherwise` where it is left out. Its value is checked if that does not
// mean to wait for a device.
template <class Kernels>
auto read_scalar(const char* op, const char* name, const std::optional<Tensor>& scalar,
                 const Operands& tensors, NumberCheck check, double otherwise = 1.0) {
  if (!scalar) {
    return Kernels::constant(otherwise);
  }
  check_scalar(op, name, *scalar, tensors);
  const auto number = Kernels::read(op, name, *scalar);
  if (const double* value = Kernels::known(number)) {
    check(op, name, *value);
  }
  return number;
}

// ------------------------------------------------------------------------------------------------
// Importance. The magnitude that a gradient counts with is an argument of every kernel.
// ------------------------------------------------------------------------------------------------
template <class Kernels>
void accumulate_importance_(Operands omega, Operands grads, double scale, bool square) {
  constexpr const char* op = "accumulate_importance_";
  check_non_negative(op, "scale", scale);
  const Call call{op, omega.empty() ? Place(true, 0) : omega.front().place};
  FlatList<2> list(
      op, {{.name = "omega", .tensors = std::move(omega), .is_omega = true, .writable = true},
           read("grads", std::move(grads))});
  if (list.total() > 0) {
    with_magnitude(square,
                   [&](auto magnitude) { Kernels::accumulate(magnitude, call, list, scale); });
    list.write_back();
  }
}

inline Factor factor_of(const Operand& tensor, const Joined& positions, const Joined& rows) {
  return {tensor.data,   tensor.strides[0],   positions.stride(),
          rows.stride(), positions.offsets(), rows.offsets()};
}

template <class Kernels>
void accumulate_outer_(const Tensor& omega, const Tensor& left, const Tensor& right, double scale,
                       bool square) {
  constexpr const char* op = "accumulate_outer_";
  check_non_negative(op, "scale", scale);
  const Argument sums = single_omega(omega, true), lefts = single("left", left),
                 rights = single("right", right);
  check_outer(op, {sums, lefts, rights});
  const Operand &o = sums.tensors[0], &l = lefts.tensors[0], &r = rights.tensors[0];
  const size_t rows_at = l.dim() - 1;  // after the samples and the positions
  const Joined columns(o, 1, o.dim()), rows(l, rows_at, l.dim()), left_positions(l, 1, rows_at),
      right_positions(r, 1, rows_at), right_columns(r, rows_at, r.dim());
  Outer problem{o.data,
                o.strides[0],
                columns.stride(),
                factor_of(l, left_positions, rows),
                factor_of(r, right_positions, right_columns),
                l.sizes[0],
                left_positions.size(),
                rows.size(),
                columns.size(),
                l.dtype,
                scale,
                false,
                columns.offsets()};
  turn_columns_innermost(problem);
  if (!problem.is_empty()) {
    with_magnitude(square, [&](auto magnitude) {
      Kernels::accumulate_outer(magnitude, {op, Place(omega)}, problem);
    });
  }
}

// ------------------------------------------------------------------------------------------------
// The penalty
// ------------------------------------------------------------------------------------------------
template <class Kernels>
Tensor penalty(Operands params, Operands anchors, Operands omega, Operands omega_scales,
               const Tensor& lambda_reg) {
  const Call call{"penalty", place_of(params, lambda_reg)};
  const auto lambda = read_scalar<Kernels>(call.op, "lambda_reg", lambda_reg, params, allow_any);
  const FlatList<3> list(call.op,
                         {read("params", std::move(params)), read("anchors", std::move(anchors)),
                          omega_of(std::move(omega))},
                         scales_of(std::move(omega_scales)));
  return Kernels::penalty(call, list, lambda);
}

// g ← sλΩ(θ−θ*), or g += sλΩ(θ−θ*).
template <class Kernels, bool Add>
Tensor penalty_gradient(const Call& call, Operands grads, Operands params, Operands anchors,
                        Operands omega, Operands omega_scales, typename Kernels::Number lambda,
                        typename Kernels::Number grad_scale) {
  FlatList<4> list(call.op,
                   {written("grads", std::move(grads)), read("params", std::move(params)),
                    read("anchors", std::move(anchors)), omega_of(std::move(omega))},
                   scales_of(std::move(omega_scales)));
  const Tensor value = Kernels::template penalty_gradient<Add>(call, list, lambda, grad_scale);
  list.write_back();
  return value;
}

template <class Kernels>
std::tuple<Tensor, TensorList> penalty_and_grad(const TensorList& params, Operands anchors,
                                                Operands omega, Operands omega_scales,
                                                const Tensor& lambda_reg) {
  const Operands values(params);
  const Call call{"penalty_and_grad", place_of(values, lambda_reg)};
  const auto lambda = read_scalar<Kernels>(call.op, "lambda_reg", lambda_reg, values, allow_any);
  // New gradients can be made only of parameters that passed the checks.
  check_arguments(call.op, {read("params", values), read("anchors", anchors), omega_of(omega)},
                  scales_of(omega_scales));
  const TensorList grads = empty_like_each(params);
  const Tensor value =
      penalty_gradient<Kernels, false>(call, grads, values, std::move(anchors), std::move(omega),
                                       std::move(omega_scales), lambda, Kernels::constant(1.0));
  return {value, grads};
}

template <class Kernels>
Tensor add_penalty_grad_(Operands grads, Operands params, Operands anchors, Operands omega,
                         Operands omega_scales, const Tensor& lambda_reg,
                         const std::optional<Tensor>& grad_scale) {
  const Call call{"add_penalty_grad_", place_of(params, lambda_reg)};
  const auto lambda =
      read_scalar<Kernels>(call.op, "lambda_reg", lambda_reg, grads, check_non_negative);
  const auto scale =
      read_scalar<Kernels>(call.op, "grad_scale", grad_scale, grads, check_non_negative);
  return penalty_gradient<Kernels, true>(call, std::move(grads), std::move(params),
                                         std::move(anchors), std::move(omega),
                                         std::move(omega_scales), lambda, scale);
}

template <class Kernels>
Tensor proximal_step_(Operands params, Operands anchors, Operands omega, Operands omega_scales,
                      const Tensor& lambda_reg, const Tensor& lr) {
  const Call call{"proximal_step_", place_of(params, lambda_reg)};
  const auto lambda =
      read_scalar<Kernels>(call.op, "lambda_reg", lambda_reg, params, check_non_negative);
  const auto rate = read_scalar<Kernels>(call.op, "lr", lr, params, check_non_negative);
  FlatList<3> list(call.op,
                   {written("params", std::move(params)), read("anchors", std::move(anchors)),
                    omega_of(std::move(omega))},
                   scales_of(std::move(omega_scales)));
  const Tensor value = Kernels::proximal_step(call, list, lambda, rate);
  list.write_back();
  return value;
}

// ------------------------------------------------------------------------------------------------
// The penalty of a low-rank update
// ------------------------------------------------------------------------------------------------
inline LowRankFactor factor_of(const Tensor& tensor, int64_t dim) {
  return {tensor.const_data_ptr(), tensor.stride(dim), tensor.stride(1 - dim), nullptr, 0, 0};
}

inline void add_to(LowRankFactor& factor, const Tensor& grad, int64_t dim) {
  factor.grad = grad.data_ptr();
  factor.grad_stride = grad.stride(dim);
  factor.grad_rank_stride = grad.stride(1 - dim);
}

// Of tensors that passed the checks.
inline LowRank low_rank_of(const Tensor& a, const Tensor& b, const Tensor& omega,
                           const std::optional<Tensor>& omega_scales, double scale) {
  const ScalarType stored = dtype_of(omega);
  return {omega.const_data_ptr(),
          is_codes(stored) ? static_cast<const float*>(omega_scales->const_data_ptr()) : nullptr,
          omega.stride(0),
          omega.stride(1),
          factor_of(b, 0),
          factor_of(a, 1),
          omega.size(0),
          omega.size(1),
          a.size(0),
          dtype_of(a),
          stored,
          dtype_of(a),
          scale};
}

template <class Kernels>
Tensor low_rank_penalty_with_grads(const Call& call, LowRank problem, const Tensor& grad_a,
                                   const Tensor& grad_b, typename Kernels::Number lambda) {
  add_to(problem.left, grad_b, 0);
  add_to(problem.right, grad_a, 1);
  problem.grad_dtype = dtype_of(grad_a);
  turn_columns_innermost(problem);
  return Kernels::low_rank_penalty(call, problem, lambda);
}

// With the gradients if they are asked for, in the accumulation dtype; else with empty tensors.
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor> low_rank_penalty(const Tensor& a, const Tensor& b,
                                                    const Tensor& omega,
                                                    const std::optional<Tensor>& omega_scales,
                                                    const Tensor& lambda_reg, double scale,
                                                    bool with_grads) {
  constexpr const char* op = "low_rank_penalty";
  const auto lambda = read_scalar<Kernels>(op, "lambda_reg", lambda_reg, a, allow_any);
  check_non_negative(op, "scale", scale);
  check_low_rank(op, {single("a", a), single("b", b), single_omega(omega)}, omega_scales);
  LowRank problem = low_rank_of(a, b, omega, omega_scales, scale);
  const auto zeros = [&](const Tensor& factor) {
    Tensor result = with_grads
                        ? torch::stable::new_empty(factor, {factor.size(0), factor.size(1)},
                                                   accumulate_dtype(problem.dtype))
                        : torch::stable::new_empty(factor, {0}, accumulate_dtype(problem.dtype));
    return torch::stable::zero_(result);
  };
  const Tensor grad_a = zeros(a), grad_b = zeros(b);
  if (with_grads) {
    return {low_rank_penalty_with_grads<Kernels>({op, Place(a)}, problem, grad_a, grad_b, lambda),
            grad_a, grad_b};
  }
  turn_columns_innermost(problem);
  return {Kernels::low_rank_penalty({op, Place(a)}, problem, lambda), grad_a, grad_b};
}

template <class Kernels>
Tensor low_rank_penalty_grad_(const Tensor& grad_a, const Tensor& grad_b, const Tensor& a,
                              const Tensor& b, const Tensor& omega,
                              const std::optional<Tensor>& omega_scales, const Tensor& lambda_reg,
                              double scale) {
  constexpr const char* op = "low_rank_penalty_grad_";
  const auto lambda =
      read_scalar<Kernels>(op, "lambda_reg", lambda_reg, grad_a, check_non_negative);
  check_non_negative(op, "scale", scale);
  check_low_rank(op,
                 {single_written("grad_a", grad_a), single_written("grad_b", grad_b),
                  single("a", a), single("b", b), single_omega(omega)},
                 omega_scales);
  return low_rank_penalty_with_grads<Kernels>(
      {op, Place(a)}, low_rank_of(a, b, omega, omega_scales, scale), grad_a, grad_b, lambda);
}

// ------------------------------------------------------------------------------------------------
// Optimizer steps. Their lists are θ, moments, g, θ*, Ω.
// ------------------------------------------------------------------------------------------------
template <class Kernels>
typename Kernels::StepNumbers read_step_numbers(const char* op, const Operands& params,
                                                const Tensor& lambda_reg, const Tensor& lr,
                                                const std::optional<Tensor>& grad_scale,
                                                const std::optional<Tensor>& found_inf) {
  return {read_scalar<Kernels>(op, "lambda_reg", lambda_reg, params, check_non_negative),
          read_scalar<Kernels>(op, "lr", lr, params, check_non_negative),
          read_scalar<Kernels>(op, "grad_scale", grad_scale, params, check_positive),
          read_scalar<Kernels>(op, "found_inf", found_inf, params, allow_any, 0.0)};
}

template <class Kernels, template <class> class Rule, size_t Streams, class Options>
Tensor penalised_step(const Call& call, FlatList<Streams> list,
                      const typename Kernels::StepNumbers& numbers, const Options& options,
                      bool proximal, const BiasCorrection* corrections = nullptr) {
  const Tensor value =
      proximal ? Kernels::template step<Rule, true>(call, list, numbers, options, corrections)
               : Kernels::template step<Rule, false>(call, list, numbers, options, corrections);
  list.write_back();
  return value;
}

template <class Kernels>
Tensor sgd_step_(Operands params, Operands grads, Operands momentum_buffers, Operands anchors,
                 Operands omega, Operands omega_scales, const Tensor& lambda_reg, const Tensor& lr,
                 double momentum, double dampening, double weight_decay, bool nesterov,
                 bool maximize, bool proximal, const std::optional<Tensor>& grad_scale,
                 const std::optional<Tensor>& found_inf) {
  const Call call{"sgd_step_", place_of(params, lambda_reg)};
  const SgdOptions options{momentum, dampening, weight_decay, nesterov, maximize};
  const auto numbers =
      read_step_numbers<Kernels>(call.op, params, lambda_reg, lr, grad_scale, found_inf);
  check_options(call.op, options, momentum_buffers);
  if (momentum == 0) {
    return penalised_step<Kernels, SgdRule>(
        call,
        FlatList<4>(call.op,
                    {written("params", std::move(params)), read("grads", std::move(grads)),
                     read("anchors", std::move(anchors)), omega_of(std::move(omega))},
                    scales_of(std::move(omega_scales))),
        numbers, options, proximal);
  }
  return penalised_step<Kernels, MomentumRule>(
      call,
      FlatList<5>(call.op,
                  {written("params", std::move(params)),
                   written("momentum_buffers", std::move(momentum_buffers)),
                   read("grads", std::move(grads)), read("anchors", std::move(anchors)),
                   omega_of(std::move(omega))},
                  scales_of(std::move(omega_scales))),
      numbers, options, proximal);
}

template <class Kernels>
Tensor adamw_step_(Operands params, Operands grads, Operands exp_avgs, Operands exp_avg_sqs,
                   const Tensor& steps, Operands anchors, Operands omega, Operands omega_scales,
                   const Tensor& lambda_reg, const Tensor& lr, double beta1, double beta2,
                   double eps, double weight_decay, bool decoupled, bool maximize, bool proximal,
                   const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  const Call call{"adamw_step_", place_of(params, lambda_reg)};
  const AdamOptions options{beta1, beta2, eps, weight_decay, decoupled, maximize};
  const auto numbers =
      read_step_numbers<Kernels>(call.op, params, lambda_reg, lr, grad_scale, found_inf);
  check_options(call.op, options);
  check_steps(call.op, steps, params);
  FlatList<6> list(call.op,
                   {written("params", std::move(params)), written("exp_avgs", std::move(exp_avgs)),
                    written("exp_avg_sqs", std::move(exp_avg_sqs)), read("grads", std::move(grads)),
                    read("anchors", std::move(anchors)), omega_of(std::move(omega))},
                   scales_of(std::move(omega_scales)));
  const auto corrections = Kernels::bias_corrections(call.op, steps, options);
  return penalised_step<Kernels, AdamRule>(call, std::move(list), numbers, options, proximal,
                                           corrections.data());
}

}  // namespace mas_ext
