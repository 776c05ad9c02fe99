// What each operation should compute: the formulas as the paper has them, in long double. Written
// without a look at csrc/formulas.h, which is what is being tested.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "csrc/cuda/multi_tensor.cuh"
#include "csrc/steps.h"
#include "numbers.h"

namespace harness {

using mas_ext::cuda::Scalar;

enum Role {
  kOmegaRole,
  kGrad,
  kParam,
  kAnchor,
  kFirst,
  kSecond
};  // at last an optimizer's moments
constexpr size_t kRoles = 6;

struct Values {
  long double of[kRoles];  // by role
  size_t place;            // of the tensor, in the lists
  long double delta() const { return of[kParam] - of[kAnchor]; }
  long double energy() const { return of[kOmegaRole] * delta() * delta(); }
};

// Where a kernel finds λ, the learning rate and the gradients' scale.
enum class Where { kHost, kDeviceDouble, kDeviceFloat };

// What the optimizer steps are told besides; each rule takes of it what it knows.
struct StepOptions {
  double momentum = 0.9, dampening = 0.2, weight_decay = 0.03, beta1 = 0.9, beta2 = 0.98,
         eps = 1e-8;
  bool nesterov = false, decoupled = true, maximize = false;
  bool double_counts = false;  // whether steps are counted in float64
};

// Numbers that float32 cannot hold exactly, so that a rounding too many is seen.
struct Strengths {
  double lambda = 0.7, grad_scale = 1.9, lr = 0.3, scale = 0.6;
  Where where = Where::kHost;
  double found_inf = 0;
  StepOptions step = {};
};

// A number, as a kernel is told it and as the oracle takes it.
class Strength {
 public:
  Strength(double value, Where where) : double_(value), float_(static_cast<float>(value)) {
    where_ = where;
  }
  Scalar scalar() const {
    switch (where_) {
      case Where::kHost: return {nullptr, double_, true};
      case Where::kDeviceDouble: return {&double_, NAN, true};
      default: return {&float_, NAN, false};
    }
  }
  double value() const {
    return where_ == Where::kDeviceFloat ? static_cast<double>(float_) : double_;
  }

 private:
  double double_;
  float float_;
  Where where_;
};

struct Told {
  explicit Told(const Strengths& s)
      : lambda(s.lambda, s.where),
        grad_scale(s.grad_scale, s.where),
        lr(s.lr, s.where),
        found_inf(s.found_inf, s.where),
        scale(s.scale),
        step(s.step) {}
  Strength lambda, grad_scale, lr, found_inf;
  double scale;
  StepOptions step;
  mutable std::vector<mas_ext::BiasCorrection> corrections;  // which a kernel makes before the step
};

// A product of strengths that is too large for A counts as A's largest number.
template <class A>
long double limited(double product) {
  return std::min<long double>(product, kLargest<A>);
}

// θ drawn towards θ*, from where it is or where a step has moved it.
template <class A>
Exact proximal(const Exact& moved, const Values& v, const Told& told) {
  const long double omega = v.of[kOmegaRole], anchor = v.of[kAnchor];
  const long double c = limited<A>(told.lambda.value() * told.lr.value()) * omega;
  if (omega == 0) {
    return moved;
  }
  long double value = std::isinf(c) ? anchor : (moved.value + c * anchor) / (1 + c);
  value = std::isfinite(moved.value) ? value : NAN;  // from infinity there is no step
  return {value, moved.magnitude + std::abs(anchor)};
}

inline constexpr Scalar kOne{nullptr, 1.0, true};

// Of each operation: its kernel, the arguments in the order of their streams, how many of them it
// writes, whether it sums, and whether that is over θ as it is stored afterwards. `make` is the
// operator's part on the host; `exact` says what each written argument should be.
struct Defaults {
  static constexpr bool sums = true, sums_stored = false;

  // The kernels that a program is compiled with: those that take Ω as it is accumulated.
  template <class T, class Kept>
  static constexpr bool runs = std::is_same_v<Kept, accumulate_t<T>>;

  // What an operator launches ahead of the kernel that walks its lists.
  static void prepare(const Told&, size_t) {}
  // Whether an element should have the bits it had.
  static bool keeps(const Values&, const Told&) { return false; }
};

struct Importance : Defaults {
  template <class T>
  using Operation = mas_ext::cuda::AccumulateImportance<T>;
  static constexpr const char* name = "accumulate_importance";
  static constexpr std::array roles{kOmegaRole, kGrad};
  static constexpr size_t writes = 1;
  static constexpr bool sums = false;

  template <class T>
  static Operation<T> make(const Told& told) {
    return {static_cast<accumulate_t<T>>(told.scale)};
  }
  template <class A>
  static std::array<Exact, 1> exact(const Values& v, const Told& told) {
    return {term(v.of[kOmegaRole]) + term(told.scale * std::abs(v.of[kGrad]))};
  }
};

struct ImportanceSquare : Importance {
  template <class T>
  using Operation = mas_ext::cuda::AccumulateSquare<T>;
  static constexpr const char* name = "accumulate_square";

  template <class T>
  static Operation<T> make(const Told& told) {
    return {static_cast<accumulate_t<T>>(told.scale)};
  }
  template <class A>
  static std::array<Exact, 1> exact(const Values& v, const Told& told) {
    return {term(v.of[kOmegaRole]) + term(told.scale * v.of[kGrad] * v.of[kGrad])};
  }
};

struct Penalty : Defaults {
  template <class T>
  using Operation = mas_ext::cuda::PenaltyEnergy<T>;
  static constexpr const char* name = "penalty";
  static constexpr std::array roles{kParam, kAnchor, kOmegaRole};
  static constexpr size_t writes = 0;

  template <class T>
  static Operation<T> make(const Told&) {
    return {};
  }
  template <class A>
  static std::array<Exact, 0> exact(const Values&, const Told&) {
    return {};
  }
};

template <bool Add>
struct GradientOf : Defaults {
  static constexpr std::array roles{kGrad, kParam, kAnchor, kOmegaRole};
  static constexpr size_t writes = 1;

  template <class A>
  static std::array<Exact, 1> exact(const Values& v, const Told& told) {
    const double product = told.lambda.value() * (Add ? told.grad_scale.value() : 1.0);
    return {term(Add ? v.of[kGrad] : 0) + term(limited<A>(product) * v.of[kOmegaRole] * v.delta())};
  }
};

struct Gradient : GradientOf<false> {
  template <class T>
  using Operation = mas_ext::cuda::PenaltyGradient<T>;
  static constexpr const char* name = "penalty_gradient";

  template <class T>
  static Operation<T> make(const Told& told) {
    return {told.lambda.scalar(), kOne, NAN};
  }
};

struct AddGradient : GradientOf<true> {
  template <class T>
  using Operation = mas_ext::cuda::AddPenaltyGradient<T>;
  static constexpr const char* name = "add_penalty_gradient";

  template <class T>
  static Operation<T> make(const Told& told) {
    return {told.lambda.scalar(), told.grad_scale.scalar(), NAN};
  }
};

struct Proximal : Defaults {
  template <class T>
  using Operation = mas_ext::cuda::ProximalStep<T>;
  static constexpr const char* name = "proximal_step";
  static constexpr std::array roles{kParam, kAnchor, kOmegaRole};
  static constexpr size_t writes = 1;
  static constexpr bool sums_stored = true;

  template <class T>
  static Operation<T> make(const Told& told) {
    return {told.lambda.scalar(), told.lr.scalar(), NAN};
  }
  template <class A>
  static std::array<Exact, 1> exact(const Values& v, const Told& told) {
    return {proximal<A>(term(v.of[kParam]), v, told)};
  }
  // Where Ω = 0 a parameter keeps its bits, even those of a NaN.
  static bool keeps(const Values& v, const Told&) { return v.of[kOmegaRole] == 0; }
};

}  // namespace harness
