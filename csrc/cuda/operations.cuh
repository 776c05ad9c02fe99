// What each operation reads, computes and writes for one element (optimizer steps are in
// steps.cuh). multi_tensor.cuh walks memory. An operation has:
//
//   Value, A                what the streams hold; what Ω holds and the formulas compute in
//   kStreams, kOmega        pointers per tensor, and which of them is Ω
//   kReads, kWrites         bit s: stream s is read, is written
//   kSums                   whether operator() returns a term of a sum
//   begin()                 reads device scalars, once per thread
//   begin_tensor(place)     the same for values of a single tensor; optional
//   skipped, Skipped        after begin(), whether another operation on the same streams replaces
//                           this one in the whole call; optional
//   operator()(element)     one element of every stream, in place
#pragma once

#include "../formulas.h"
#include "../numbers.h"
#include "scalar.cuh"

namespace mas_ext::cuda {

// Ω += scale·f(g), where f is the magnitude
template <class T, class Magnitude>
struct AccumulateMagnitude {
  using Value = T;
  using A = accumulate_t<T>;
  static constexpr int kStreams = 2, kOmega = 0;
  static constexpr unsigned kReads = 0b11, kWrites = 0b01;
  static constexpr bool kSums = false;

  A scale;

  __device__ void begin() {}
  __device__ A operator()(A (&element)[kStreams]) const {
    element[0] += importance_increment<Magnitude>(element[1], scale);
    return A(0);
  }
};
template <class T>
using AccumulateImportance = AccumulateMagnitude<T, MagnitudeAbs>;
template <class T>
using AccumulateSquare = AccumulateMagnitude<T, MagnitudeSquare>;

// Σ Ω(θ−θ*)²
template <class T>
struct PenaltyEnergy {
  using Value = T;
  using A = accumulate_t<T>;
  static constexpr int kStreams = 3, kOmega = 2;
  static constexpr unsigned kReads = 0b111, kWrites = 0;
  static constexpr bool kSums = true;

  __device__ void begin() {}
  __device__ A operator()(A (&element)[kStreams]) const {
    return penalty_energy(element[0] - element[1], element[2]);
  }
};

// g ← λΩ(θ−θ*), or g += sλΩ(θ−θ*); and Σ Ω(θ−θ*)²
template <class T, bool Add>
struct PenaltyGradientOf {
  using Value = T;
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
using PenaltyGradient = PenaltyGradientOf<T, false>;
template <class T>
using AddPenaltyGradient = PenaltyGradientOf<T, true>;

// θ ← (θ + ηλΩθ*)/(1 + ηλΩ); and Σ Ω(θ−θ*)² of the θ that is stored
template <class T>
struct ProximalStep {
  using Value = T;
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

}  // namespace mas_ext::cuda
