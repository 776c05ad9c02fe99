// Optimizer steps that take the penalty along: what they are told, the checks, the lists they walk,
// and from numbers to the rules of formulas.h. For CPU and CUDA.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "checks.h"
#include "formulas.h"
#include "tensor_list.h"

namespace mas_ext {

struct SgdOptions {
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

struct AdamOptions {
  double beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

// λ, η, the loss scale s and whether to skip: numbers that may be on a device, once they are read.
struct StepScalars {
  double lambda, lr, grad_scale, found_inf;
};

// 1/(1−β₁ᵗ) and 1/√(1−β₂ᵗ) of one parameter, whose step t is being taken.
struct BiasCorrection {
  double first, second_root;
};

// ------------------------------------------------------------------------------------------------
// From numbers to rules
// ------------------------------------------------------------------------------------------------
template <class A>
MAS_HOST_DEVICE PenaltyPart<A> penalty_part(const StepScalars& s, bool maximize, bool proximal) {
  const double factor = 1.0 / s.grad_scale;
  return {static_cast<A>(maximize ? -factor : factor),
          finite<A>(proximal ? s.lambda * s.lr : s.lambda)};
}

template <class A>
MAS_HOST_DEVICE void make_rule(SgdRule<A>& rule, const SgdOptions& options, double lr) {
  rule = {static_cast<A>(lr), static_cast<A>(options.weight_decay)};
}

template <class A>
MAS_HOST_DEVICE void make_rule(MomentumRule<A>& rule, const SgdOptions& options, double lr) {
  rule = {static_cast<A>(lr),
          static_cast<A>(options.weight_decay),
          static_cast<A>(options.momentum),
          static_cast<A>(1.0 - options.dampening),
          static_cast<A>(options.nesterov ? 1.0 : 0.0),
          static_cast<A>(options.nesterov ? options.momentum : 1.0)};
}

template <class A>
MAS_HOST_DEVICE void make_rule(AdamRule<A>& rule, const AdamOptions& options, double lr,
                               const BiasCorrection& correction) {
  const double decay = options.weight_decay;
  rule = {static_cast<A>(options.decoupled ? 0.0 : decay),
          static_cast<A>(options.decoupled ? 1.0 - lr * decay : 1.0),
          static_cast<A>(options.beta1),
          static_cast<A>(1.0 - options.beta1),
          static_cast<A>(options.beta2),
          static_cast<A>(1.0 - options.beta2),
          static_cast<A>(options.eps),
          static_cast<A>(lr * correction.first),
          static_cast<A>(correction.second_root)};
}

// After `steps` steps, for the one that is being taken.
MAS_HOST_DEVICE BiasCorrection bias_correction(const AdamOptions& options, double steps) {
  return {1.0 / (1.0 - pow(options.beta1, steps + 1.0)),
          1.0 / sqrt(1.0 - pow(options.beta2, steps + 1.0))};
}

// ------------------------------------------------------------------------------------------------
// Checks
// ------------------------------------------------------------------------------------------------
inline void check_positive(const char* op, const char* name, double value) {
  if (!(value > 0) || std::isinf(value)) {
    fail(op, name, " is ", value, "; pass a finite number above zero");
  }
}

inline void check_beta(const char* op, const char* name, double value) {
  if (!(value >= 0) || !(value < 1)) {
    fail(op, name, " is ", value, "; pass a number from 0 up to but not including 1");
  }
}

inline void check_options(const char* op, const SgdOptions& options,
                          const TensorList& momentum_buffers) {
  check_non_negative(op, "momentum", options.momentum);
  check_non_negative(op, "dampening", options.dampening);
  check_non_negative(op, "weight_decay", options.weight_decay);
  if (options.nesterov && (options.momentum == 0 || options.dampening != 0)) {
    fail(op, "nesterov needs a momentum above zero and no dampening");
  }
  if (options.momentum == 0 && !momentum_buffers.empty()) {
    fail(op, "momentum_buffers has ", momentum_buffers.size(),
         " tensors but momentum is 0; leave them out");
  }
}

inline void check_options(const char* op, const AdamOptions& options) {
  check_beta(op, "beta1", options.beta1);
  check_beta(op, "beta2", options.beta2);
  check_non_negative(op, "eps", options.eps);
  check_non_negative(op, "weight_decay", options.weight_decay);
}

inline void check_steps(const char* op, const Tensor& steps, const TensorList& params) {
  if (steps.dim() != 1 || steps.size(0) != static_cast<int64_t>(params.size())) {
    fail(op, "steps has shape ", shape_of(steps), " but there are ", params.size(),
         " params; pass one count for each, as one tensor");
  }
  const ScalarType dtype = dtype_of(steps);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, "steps has dtype ", dtype_name(dtype), "; pass a float32 or float64 tensor");
  }
  if (!params.empty() && Place(steps) != Place(params.front())) {
    fail(op, "steps is on ", device_of(steps), " but the tensors are on ",
         device_of(params.front()), "; move it there");
  }
}

// ------------------------------------------------------------------------------------------------
// The lists, in the order in which kernels see them: what is written, then what is read, Ω last
// ------------------------------------------------------------------------------------------------
inline FlatList<4> sgd_list(const char* op, const TensorList& params, const TensorList& grads,
                            const TensorList& anchors, const TensorList& omega) {
  return FlatList<4>(op, {{.name = "params", .tensors = params, .writable = true},
                          {.name = "grads", .tensors = grads},
                          {.name = "anchors", .tensors = anchors},
                          {.name = "omega", .tensors = omega, .is_omega = true}});
}

inline FlatList<5> momentum_list(const char* op, const TensorList& params,
                                 const TensorList& momentum_buffers, const TensorList& grads,
                                 const TensorList& anchors, const TensorList& omega) {
  return FlatList<5>(op,
                     {{.name = "params", .tensors = params, .writable = true},
                      {.name = "momentum_buffers", .tensors = momentum_buffers, .writable = true},
                      {.name = "grads", .tensors = grads},
                      {.name = "anchors", .tensors = anchors},
                      {.name = "omega", .tensors = omega, .is_omega = true}});
}

inline FlatList<6> adamw_list(const char* op, const TensorList& params, const TensorList& exp_avgs,
                              const TensorList& exp_avg_sqs, const TensorList& grads,
                              const TensorList& anchors, const TensorList& omega) {
  return FlatList<6>(op, {{.name = "params", .tensors = params, .writable = true},
                          {.name = "exp_avgs", .tensors = exp_avgs, .writable = true},
                          {.name = "exp_avg_sqs", .tensors = exp_avg_sqs, .writable = true},
                          {.name = "grads", .tensors = grads},
                          {.name = "anchors", .tensors = anchors},
                          {.name = "omega", .tensors = omega, .is_omega = true}});
}

}  // namespace mas_ext
