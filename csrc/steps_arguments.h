// Checks of the optimizer steps' arguments, and the lists that they walk.
#pragma once

#include <cmath>
#include <cstdint>

#include "checks.h"
#include "steps.h"
#include "tensor_list.h"

namespace mas_ext {

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
                            const TensorList& anchors, const TensorList& omega,
                            const TensorList& omega_scales) {
  return FlatList<4>(op,
                     {{.name = "params", .tensors = params, .writable = true},
                      {.name = "grads", .tensors = grads},
                      {.name = "anchors", .tensors = anchors},
                      {.name = "omega", .tensors = omega, .is_omega = true}},
                     omega_scales);
}

inline FlatList<5> momentum_list(const char* op, const TensorList& params,
                                 const TensorList& momentum_buffers, const TensorList& grads,
                                 const TensorList& anchors, const TensorList& omega,
                                 const TensorList& omega_scales) {
  return FlatList<5>(op,
                     {{.name = "params", .tensors = params, .writable = true},
                      {.name = "momentum_buffers", .tensors = momentum_buffers, .writable = true},
                      {.name = "grads", .tensors = grads},
                      {.name = "anchors", .tensors = anchors},
                      {.name = "omega", .tensors = omega, .is_omega = true}},
                     omega_scales);
}

inline FlatList<6> adamw_list(const char* op, const TensorList& params, const TensorList& exp_avgs,
                              const TensorList& exp_avg_sqs, const TensorList& grads,
                              const TensorList& anchors, const TensorList& omega,
                              const TensorList& omega_scales) {
  return FlatList<6>(op,
                     {{.name = "params", .tensors = params, .writable = true},
                      {.name = "exp_avgs", .tensors = exp_avgs, .writable = true},
                      {.name = "exp_avg_sqs", .tensors = exp_avg_sqs, .writable = true},
                      {.name = "grads", .tensors = grads},
                      {.name = "anchors", .tensors = anchors},
                      {.name = "omega", .tensors = omega, .is_omega = true}},
                     omega_scales);
}

}  // namespace mas_ext
