// What the optimizer steps should compute: the rules as torch's documentation has them, in long
// double. Written without a look at csrc/formulas.h.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "blocks.h"
#include "csrc/cuda/steps.cuh"
#include "operations.h"
#include "shim/grid.h"

namespace harness {

using mas_ext::AdamOptions;
using mas_ext::BiasCorrection;
using mas_ext::SgdOptions;

// ================================================================================================
// Bias corrections
// ================================================================================================
// Every tensor has taken another number of steps; the first one none, and some very many.
inline double steps_taken(size_t place) {
  return static_cast<double>(place % 7 == 5 ? 1000 * place : place);
}

// As Kernels::bias_corrections in csrc/cuda/steps.cu, of counts that are known.
template <class Count>
std::vector<BiasCorrection> correct(const AdamOptions& options, size_t tensors) {
  constexpr int threads = mas_ext::cuda::kThreads;
  std::vector<BiasCorrection> corrections(tensors, {NAN, NAN});
  std::vector<Count> counts;
  for (size_t i = 0; i < tensors; ++i) {
    counts.push_back(static_cast<Count>(steps_taken(i)));
  }
  const auto blocks = static_cast<unsigned>((tensors + threads - 1) / threads);
  simt::run({order_of(Blocks::kShuffled, blocks)}, threads, [&] {
    mas_ext::cuda::bias_corrections<Count>(counts.data(), static_cast<int64_t>(tensors), options,
                                           corrections.data());
  });
  return corrections;
}

// ================================================================================================
// The rules: where θ lands, and the moments
// ================================================================================================
struct Sgd {
  template <bool Proximal>
  using By = mas_ext::cuda::StepBy<mas_ext::SgdRule, SgdOptions, Proximal>;
  static constexpr const char* name = "sgd";
  static constexpr std::array roles{kParam, kGrad, kAnchor, kOmegaRole};
  static constexpr size_t moments = 0;

  static SgdOptions options(const StepOptions& o) {
    return {0, 0, o.weight_decay, false, o.maximize};
  }
  static std::array<Exact, 1> move(const Values& v, const Exact& grad, double lr,
                                   const StepOptions& o) {
    const Exact param = term(v.of[kParam]);
    return {param + -lr * (grad + o.weight_decay * param)};
  }
};

// What is walked is αg + βb, as in the kernel: 0 times an infinite g is NaN.
struct Momentum {
  template <bool Proximal>
  using By = mas_ext::cuda::StepBy<mas_ext::MomentumRule, SgdOptions, Proximal>;
  static constexpr const char* name = "momentum";
  static constexpr std::array roles{kParam, kFirst, kGrad, kAnchor, kOmegaRole};
  static constexpr size_t moments = 1;

  static SgdOptions options(const StepOptions& o) {
    return {o.momentum, o.dampening, o.weight_decay, o.nesterov, o.maximize};
  }
  static std::array<Exact, 2> move(const Values& v, const Exact& grad, double lr,
                                   const StepOptions& o) {
    const Exact param = term(v.of[kParam]);
    const Exact decayed = grad + o.weight_decay * param;
    const Exact buffer = o.momentum * term(v.of[kFirst]) + (1 - o.dampening) * decayed;
    const Exact walked =
        o.nesterov ? decayed + o.momentum * buffer : 0.0L * decayed + 1.0L * buffer;
    return {param + -lr * walked, buffer};
  }
};

// Decay that is decoupled joins the gradient with a factor of 0, as in the kernel.
struct Adam {
  template <bool Proximal>
  using By = mas_ext::cuda::StepBy<mas_ext::AdamRule, AdamOptions, Proximal>;
  static constexpr const char* name = "adam";
  static constexpr std::array roles{kParam, kFirst, kSecond, kGrad, kAnchor, kOmegaRole};
  static constexpr size_t moments = 2;

  static AdamOptions options(const StepOptions& o) {
    return {o.beta1, o.beta2, o.eps, o.weight_decay, o.decoupled, o.maximize};
  }
  static std::array<Exact, 3> move(const Values& v, const Exact& grad, double lr,
                                   const StepOptions& o) {
    const Exact param = term(v.of[kParam]);
    const Exact decayed = grad + (o.decoupled ? 0.0 : o.weight_decay) * param;
    const Exact first = o.beta1 * term(v.of[kFirst]) + (1 - o.beta1) * decayed;
    // An error in g is doubled in g², whose own size is that of what cancelled in g.
    const Exact square{decayed.value * decayed.value, 2 * decayed.magnitude * decayed.magnitude};
    const Exact second = o.beta2 * term(v.of[kSecond]) + (1 - o.beta2) * square;
    const long double t = steps_taken(v.place) + 1;
    const long double root = std::sqrt(second.value / (1 - std::pow<long double>(o.beta2, t)));
    Exact step = lr / (1 - std::pow<long double>(o.beta1, t)) / (root + o.eps) * first;
    step.magnitude += std::abs(step.value) * second.magnitude / second.value;
    const long double shrink = o.decoupled ? 1 - static_cast<long double>(lr) * o.weight_decay : 1;
    return {shrink * param + -1.0L * step, first, second};
  }
};

// ================================================================================================
// A rule with the penalty in it
// ================================================================================================
template <class Rule, bool Proximal>
struct Step : Defaults {
  template <class T>
  using Operation = typename Rule::template By<Proximal>::template Operation<T>;
  static constexpr std::array roles = Rule::roles;
  static constexpr size_t writes = 1 + Rule::moments;
  static constexpr bool sums_stored = Proximal;
  static constexpr const char* mode = Proximal ? "proximal" : "gradient";
  static inline const std::string name = std::string(Rule::name) + "_step/" + mode;

  static void prepare(const Told& told, size_t tensors) {
    if constexpr (Rule::moments == 2) {
      const AdamOptions options = Rule::options(told.step);
      told.corrections = told.step.double_counts ? correct<double>(options, tensors)
                                                 : correct<float>(options, tensors);
    }
  }
  template <class T>
  static Operation<T> make(const Told& told) {
    return {
        {told.lambda.scalar(), told.lr.scalar(), told.grad_scale.scalar(), told.found_inf.scalar()},
        Rule::options(told.step),
        told.corrections.data()};
  }
  template <class A>
  static std::array<Exact, writes> exact(const Values& v, const Told& told) {
    const long double sign = told.step.maximize ? -1 : 1;
    Exact grad = sign / told.grad_scale.value() * term(v.of[kGrad]);
    if (!Proximal) {
      grad = grad + term(limited<A>(told.lambda.value()) * v.of[kOmegaRole] * v.delta());
    }
    auto moved = Rule::move(v, grad, told.lr.value(), told.step);
    if (Proximal) {
      moved[0] = proximal<A>(moved[0], v, told);
    }
    for (Exact& one : moved) {  // twenty operations in a row, where the bounds are of a few
      one.magnitude *= 2;
    }
    return moved;
  }
  // A step that is skipped changes nothing, whatever the gradients.
  static bool keeps(const Values&, const Told& told) { return told.found_inf.value() != 0; }
};

}  // namespace harness
