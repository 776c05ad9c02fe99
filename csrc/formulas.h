// The arithmetic of Memory Aware Synapses, one small function per formula, for host and device.
// THE place to change the maths. `mas_ext/reference.py` has the same formulas in PyTorch.
//
// A is the type sums are formed in: double for float64 parameters, float for all others.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define MAS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MAS_HOST_DEVICE inline
#endif

namespace mas_ext {

// How a gradient counts towards Ω. Everything that accumulates has it as a template argument
// (`Magnitude`), so this is THE place to add another. It must be multiplicative, f(xy) = f(x)·f(y):
// accumulate_outer_ applies it to the factors if a sample has one position. `fits_in<T>` says
// whether it may be taken in T; if not, values are converted to the accumulation type first.
// `kIdempotent`: f(f(x)) = f(x).

// |g|. Of a 16-bit number it clears the sign bit, which saves two conversions.
struct MagnitudeAbs {
  static constexpr bool kIdempotent = true;
  template <class T>
  static constexpr bool fits_in = true;

  template <class T>
  MAS_HOST_DEVICE static T of(T value) {
    if constexpr (sizeof(T) == 2) {
      return T(value.x & 0x7fffu, T::from_bits());
    } else {
      return std::fabs(value);
    }
  }
};

// g². In 16 bits it would be rounded, and in float16 it would be infinite from 256 on.
struct MagnitudeSquare {
  static constexpr bool kIdempotent = false;
  template <class T>
  static constexpr bool fits_in = sizeof(T) >= sizeof(float);

  template <class T>
  MAS_HOST_DEVICE static T of(T value) {
    static_assert(fits_in<T>, "convert the value first");
    return value * value;
  }
};

// Of products whose factors were magnitudes already.
struct MagnitudeTaken {
  template <class T>
  MAS_HOST_DEVICE static T of(T value) {
    return value;
  }
};

// Calls `use` with the one that an operator's flag stands for.
template <class Use>
void with_magnitude(bool square, Use use) {
  square ? use(MagnitudeSquare{}) : use(MagnitudeAbs{});
}

// Ω from its code q, which is linear in the square root: s·(q/255)², with s the block's largest Ω.
MAS_HOST_DEVICE float dequantize(uint8_t code, float scale) {
  const auto root = static_cast<float>(code);
  return scale * (root * root * (1.0f / 65025.0f));
}

// Ω_i += scale · f(g_i), where f is the magnitude
template <class Magnitude, class A>
MAS_HOST_DEVICE A importance_increment(A grad, A scale) {
  return scale * Magnitude::of(grad);
}

// Ω_i δ_i², the parameter's share of the penalty. The sum is multiplied by λ/2 once, at the end.
template <class A>
MAS_HOST_DEVICE A penalty_energy(A delta, A omega) {
  return omega * delta * delta;
}

// ∂/∂θ_i of λ/2 Σ Ω δ². `coefficient` is λ, times the gradient scale if there is one.
template <class A>
MAS_HOST_DEVICE A penalty_gradient(A delta, A omega, A coefficient) {
  return coefficient * omega * delta;
}

// A product of scalars in the type the formulas compute in. If it overflows, it becomes the largest
// finite value, so that 0 times it is 0 and not NaN.
template <class A>
MAS_HOST_DEVICE A finite(double scalar) {
  constexpr A largest = std::numeric_limits<A>::max();
  return scalar > static_cast<double>(largest) ? largest : static_cast<A>(scalar);
}

// θ ← (θ + c θ*) / (1 + c) with c = ηλΩ, written as a step from θ. If Ω = 0, the parameter keeps
// its bits. If c overflows, the result is θ*. A NaN in Ω gives NaN.
template <class A>
MAS_HOST_DEVICE A proximal_point(A param, A delta, A omega, A step_times_lambda) {
  constexpr A largest = std::numeric_limits<A>::max();
  const A product = step_times_lambda * omega;
  const A c = product > largest ? largest : product;
  const A moved = param - delta * (c / (A(1) + c));
  return omega == A(0) ? param : moved;
}

// How a call's penalty takes part in an optimizer's step.
template <class A>
struct PenaltyPart {
  A grad_factor;  // ±1/s: the sign of the gradient, and the inverse of the loss scale
  A strength;     // λ for the gradient of the penalty, ηλ for the proximal step
};

// SGD: θ ← θ − η g, with g ← g + wθ for weight decay w.
template <class A>
struct SgdRule {
  static constexpr int kMoments = 0;
  A lr, weight_decay;

  MAS_HOST_DEVICE A point(A param, A grad, A*) const {
    return param - lr * (grad + weight_decay * param);
  }
};

// SGD with momentum: b ← μb + (1−τ)g, θ ← θ − ηb; for Nesterov θ ← θ − η(g + μb). The step is
// along αg + βb: a condition here would prevent vectorised loops over half-precision values.
template <class A>
struct MomentumRule {
  static constexpr int kMoments = 1;
  A lr, weight_decay, momentum, fresh;  // fresh: 1 − τ
  A of_grad, of_buffer;                 // α and β: 0 and 1, for Nesterov 1 and μ

  MAS_HOST_DEVICE A point(A param, A grad, A* moments) const {
    grad += weight_decay * param;
    moments[0] = momentum * moments[0] + fresh * grad;
    return param - lr * (of_grad * grad + of_buffer * moments[0]);
  }
};

// Adam: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², θ ← θ − η m̂/(√v̂ + ε), where m̂ = m/(1−β₁ᵗ) and
// v̂ = v/(1−β₂ᵗ). Weight decay w is g ← g + wθ before, or, decoupled from the gradient (AdamW),
// θ ← (1−ηw)θ.
template <class A>
struct AdamRule {
  static constexpr int kMoments = 2;
  A weight_decay, shrink;  // w and 1 − ηw, of which one is neutral
  A beta1, fresh1, beta2, fresh2, eps;
  A step_size, root_factor;  // η/(1−β₁ᵗ) and 1/√(1−β₂ᵗ)

  MAS_HOST_DEVICE A point(A param, A grad, A* moments) const {
    grad += weight_decay * param;
    moments[0] = beta1 * moments[0] + fresh1 * grad;
    moments[1] = beta2 * moments[1] + fresh2 * grad * grad;
    const A root = std::sqrt(moments[1]) * root_factor;
    return shrink * param - step_size * (moments[0] / (root + eps));
  }
};

// The parameter after a step of the optimizer's rule with the penalty. Moments are updated in
// place. The penalty's gradient is that at θ before the step; a proximal step starts from the
// rule's result.
template <bool Proximal, class Rule, class A>
MAS_HOST_DEVICE A penalised_point(A param, A grad, A anchor, A omega, A* moments,
                                  const PenaltyPart<A>& penalty, const Rule& rule) {
  grad *= penalty.grad_factor;
  if constexpr (Proximal) {
    const A moved = rule.point(param, grad, moments);
    return proximal_point(moved, moved - anchor, omega, penalty.strength);
  } else {
    grad += penalty_gradient(param - anchor, omega, penalty.strength);
    return rule.point(param, grad, moments);
  }
}

}  // namespace mas_ext
