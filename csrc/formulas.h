// The arithmetic of Memory Aware Synapses, one small function a formula, for host and device.
// THE place to change the maths: `mas_ext/reference.py` holds the same formulas in PyTorch, and
// `tests/test_functional.py` tells when the two differ.
//
// A is the type sums are formed in: double for float64 parameters, float for all others.
#pragma once

#include <cmath>
#include <limits>

#if defined(__CUDACC__)
#define MAS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MAS_HOST_DEVICE inline
#endif

namespace mas_ext {

template <class A>
MAS_HOST_DEVICE A magnitude(A value) {
  return std::fabs(value);
}

// Ω_i += scale · |g_i|
template <class A>
MAS_HOST_DEVICE A importance_increment(A grad, A scale) {
  return scale * magnitude(grad);
}

// Ω_i δ_i², the parameter's share of the penalty; the sum is multiplied by λ/2 once, at the end.
template <class A>
MAS_HOST_DEVICE A penalty_energy(A delta, A omega) {
  return omega * delta * delta;
}

// ∂/∂θ_i of λ/2 Σ Ω δ²; `coefficient` is λ, times the gradient scale where one is in use.
template <class A>
MAS_HOST_DEVICE A penalty_gradient(A delta, A omega, A coefficient) {
  return coefficient * omega * delta;
}

// A product of scalars in the type the formulas compute in. One that overflows there becomes its
// largest finite value, so that 0 times it is 0 and not NaN.
template <class A>
MAS_HOST_DEVICE A finite(double scalar) {
  constexpr A largest = std::numeric_limits<A>::max();
  return scalar > static_cast<double>(largest) ? largest : static_cast<A>(scalar);
}

// θ ← (θ + c θ*) / (1 + c) with c = ηλΩ, written as a step from θ. Where Ω = 0 the parameter keeps
// its bits, whatever they are; a c that overflows lands on θ*; a NaN in Ω comes through.
template <class A>
MAS_HOST_DEVICE A proximal_point(A param, A delta, A omega, A step_times_lambda) {
  constexpr A largest = std::numeric_limits<A>::max();
  const A product = step_times_lambda * omega;
  const A c = product > largest ? largest : product;
  const A moved = param - delta * (c / (A(1) + c));
  return omega == A(0) ? param : moved;
}

}  // namespace mas_ext
