// Optimizer steps that include the penalty, as kernels on CPU and CUDA see them: their options, and
// how the rules of formulas.h are made from them.
#pragma once

#include <cmath>
#include <cstdint>

#include "formulas.h"

namespace mas_ext {

struct SgdOptions {
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

struct AdamOptions {
  double beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

// λ, η, the loss scale s, and found_inf, which skips the step if it is not 0. Once they are read.
struct StepScalars {
  double lambda, lr, grad_scale, found_inf;
};

// 1/(1−β₁ᵗ) and 1/√(1−β₂ᵗ) for a parameter in its step t.
struct BiasCorrection {
  double first, second_root;
};

template <class A>
MAS_HOST_DEVICE PenaltyPart<A> penalty_part(const StepScalars& s, bool maximize, bool proximal) {
  const double factor = 1.0 / s.grad_scale;
  return {static_cast<A>(maximize ? -factor : factor),
          finite<A>(proximal ? s.lambda * s.lr : s.lambda)};
}

// A rule without its learning rate, which may be on a device. What is known on the host is computed
// here, so that a kernel's loop need not compute it in float64.
template <class A>
void make_rule(SgdRule<A>& rule, const SgdOptions& options) {
  rule = {};
  rule.weight_decay = static_cast<A>(options.weight_decay);
}

template <class A>
void make_rule(MomentumRule<A>& rule, const SgdOptions& options) {
  rule = {};
  rule.weight_decay = static_cast<A>(options.weight_decay);
  rule.momentum = static_cast<A>(options.momentum);
  rule.fresh = static_cast<A>(1.0 - options.dampening);
  rule.of_grad = static_cast<A>(options.nesterov ? 1.0 : 0.0);
  rule.of_buffer = static_cast<A>(options.nesterov ? options.momentum : 1.0);
}

template <class A>
void make_rule(AdamRule<A>& rule, const AdamOptions& options) {
  rule = {};
  rule.weight_decay = static_cast<A>(options.decoupled ? 0.0 : options.weight_decay);
  rule.beta1 = static_cast<A>(options.beta1);
  rule.fresh1 = static_cast<A>(1.0 - options.beta1);
  rule.beta2 = static_cast<A>(options.beta2);
  rule.fresh2 = static_cast<A>(1.0 - options.beta2);
  rule.eps = static_cast<A>(options.eps);
}

// The rest of a rule, for the parameter at `place` in the lists.
template <template <class> class Rule, class A>
MAS_HOST_DEVICE void set_rate(Rule<A>& rule, double lr, const SgdOptions&, const BiasCorrection*,
                              int64_t) {
  rule.lr = static_cast<A>(lr);
}

template <class A>
MAS_HOST_DEVICE void set_rate(AdamRule<A>& rule, double lr, const AdamOptions& options,
                              const BiasCorrection* corrections, int64_t place) {
  const BiasCorrection& correction = corrections[place];
  rule.shrink = static_cast<A>(options.decoupled ? 1.0 - lr * options.weight_decay : 1.0);
  rule.step_size = static_cast<A>(lr * correction.first);
  rule.root_factor = static_cast<A>(correction.second_root);
}

// For the step after the first `steps`.
MAS_HOST_DEVICE BiasCorrection bias_correction(const AdamOptions& options, double steps) {
  return {1.0 / (1.0 - pow(options.beta1, steps + 1.0)),
          1.0 / sqrt(1.0 - pow(options.beta2, steps + 1.0))};
}

}  // namespace mas_ext
