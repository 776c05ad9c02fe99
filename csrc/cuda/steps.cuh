// Optimizer steps that include the penalty, as operations for multi_tensor.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../formulas.h"
#include "../numbers.h"
#include "../steps.h"
#include "scalar.cuh"

namespace mas_ext::cuda {

struct DeviceScalars {
  Scalar lambda, lr, grad_scale, found_inf;

  __device__ StepScalars load() const {
    return {lambda.load(), lr.load(), grad_scale.load(), found_inf.load()};
  }
};

// What a skipped step still computes, on the same streams: Σ Ω(θ−θ*)². A step is skipped if some
// gradient is not finite.
template <class T, int Streams>
struct SkippedStep {
  using Value = T;
  using A = accumulate_t<T>;
  static constexpr int kStreams = Streams, kOmega = kStreams - 1, kAnchor = kOmega - 1;
  static constexpr unsigned kReads = 1u | 1u << kAnchor | 1u << kOmega, kWrites = 0;
  static constexpr bool kSums = true;

  __device__ A operator()(A (&element)[kStreams]) const {
    return penalty_energy(element[0] - element[kAnchor], element[kOmega]);
  }
};

// Updates θ and the rule's moments in place and sums Ω(θ−θ*)²: at θ before the step, or for a
// proximal step at the θ it stores. Streams: θ, moments, g, θ*, Ω.
template <class T, template <class> class RuleOf, class Options, bool Proximal>
struct PenalisedStep {
  using Value = T;
  using A = accumulate_t<T>;
  using Rule = RuleOf<A>;
  static constexpr int kMoments = Rule::kMoments;
  static constexpr int kStreams = kMoments + 4, kOmega = kStreams - 1;
  using Skipped = SkippedStep<T, kStreams>;
  static constexpr unsigned kReads = (1u << kStreams) - 1, kWrites = (1u << (kMoments + 1)) - 1;
  static constexpr bool kSums = true;

  DeviceScalars scalars;
  Options options;
  const BiasCorrection* corrections;  // one per parameter, for Adam
  double rate;
  bool skipped;
  PenaltyPart<A> penalty;
  Rule rule;

  PenalisedStep(const DeviceScalars& scalars, const Options& options,
                const BiasCorrection* corrections)
      : scalars(scalars), options(options), corrections(corrections) {
    make_rule(rule, options);
  }

  __device__ void begin() {
    const StepScalars read = scalars.load();
    rate = read.lr;
    skipped = read.found_inf != 0.0;
    penalty = penalty_part<A>(read, options.maximize, Proximal);
  }
  __device__ void begin_tensor(int place) { set_rate(rule, rate, options, corrections, place); }
  __device__ A operator()(A (&element)[kStreams]) const {
    const A param = element[0], anchor = element[kMoments + 2], omega = element[kOmega];
    const T moved = static_cast<T>(penalised_point<Proximal>(param, element[kMoments + 1], anchor,
                                                             omega, element + 1, penalty, rule));
    element[0] = static_cast<A>(moved);
    return penalty_energy((Proximal ? element[0] : param) - anchor, omega);
  }
};

// As launch_penalty needs it: a template with the type of the values as its only parameter.
template <template <class> class Rule, class Options, bool Proximal>
struct StepBy {
  template <class T>
  using Operation = PenalisedStep<T, Rule, Options, Proximal>;
};

// Once per parameter, not once per block: many GPUs compute powers in float64 slowly.
template <class Count>
__global__ void __launch_bounds__(kThreads)
    bias_corrections(const Count* steps, int64_t count, AdamOptions options,
                     BiasCorrection* corrections) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) {
    corrections[i] = bias_correction(options, static_cast<double>(steps[i]));
  }
}

}  // namespace mas_ext::cuda
