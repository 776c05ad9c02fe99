// The arithmetic of Memory Aware Synapses, one small function a formula, for host and device.
// THE place to change the maths: `mas_ext/reference.py` holds the same formulas in PyTorch, and
// `tests/test_functional.py` tells when the two differ.
//
// A is the type sums are formed in: double for float64 parameters, float for all others.
#pragma once

#if defined(__CUDACC__)
#define MAS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MAS_HOST_DEVICE inline
#endif

namespace mas_ext {

// Ω_i += scale · |g_i|
template <class A>
MAS_HOST_DEVICE A importance_increment(A grad, A scale) {
  return scale * (grad < A(0) ? -grad : grad);
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

// θ ← (θ + c θ*) / (1 + c) with c = ηλΩ, written as a step from θ: with c = 0 the parameter keeps
// its bits, and a huge c lands on θ*. `largest` is A's largest finite value: it keeps an
// overflowing c from becoming ∞/∞ (a NaN in Ω still comes through).
template <class A>
MAS_HOST_DEVICE A proximal_point(A param, A delta, A omega, A step_times_lambda, A largest) {
  A c = step_times_lambda * omega;
  c = c > largest ? largest : c;
  return param - delta * (c / (A(1) + c));
}

}  // namespace mas_ext
