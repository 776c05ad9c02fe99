// Random numbers, and how near a result must be. The bounds are those of the
// operators' tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "csrc/numbers.h"

namespace harness {

using mas_ext::accumulate_t;
using mas_ext::BFloat16;
using mas_ext::Half;

template <class T>
constexpr mas_ext::ScalarType kDtype = torch::headeronly::CppTypeToScalarType<T>::value;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {  // xorshift64*, after a seed that is not 0
    state_ = state_ ? state_ : 1;
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 2685821657736338717u;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double normal() {  // near enough: the sum of 12 uniform numbers, less 6
    double sum = -6;
    for (int i = 0; i < 12; ++i) {
      sum += uniform();
    }
    return sum;
  }
  std::vector<unsigned> shuffled(unsigned n) {
    std::vector<unsigned> order(n);
    for (unsigned i = 0; i < n; ++i) {
      const auto j = static_cast<unsigned>(below(i + 1));
      order[i] = order[j];
      order[j] = i;
    }
    return order;
  }

 private:
  uint64_t state_;
};

// What a result should be; rounding errors are relative to the magnitude of the terms it is made
// of.
struct Exact {
  long double value = 0, magnitude = 0;
};

inline Exact term(long double value) { return {value, std::abs(value)}; }
inline Exact operator+(const Exact& a, const Exact& b) {
  return {a.value + b.value, a.magnitude + b.magnitude};
}
inline Exact operator*(long double factor, const Exact& a) {
  return {factor * a.value, std::abs(factor) * a.magnitude};
}

template <class T>
constexpr long double kArithmetic = std::is_same_v<accumulate_t<T>, double> ? 4e-15L : 1.3e-6L;
template <class T>
constexpr long double kSum = std::is_same_v<accumulate_t<T>, double> ? 1e-13L : 1e-6L;

// Half a unit in the last place where T is narrower than what is computed in, and T's range.
template <class T>
constexpr long double kRounding = 0;
template <>
inline constexpr long double kRounding<BFloat16> = 0x1p-8L;
template <>
inline constexpr long double kRounding<Half> = 0x1p-11L;

template <class T>
constexpr long double kSmallest = std::numeric_limits<T>::denorm_min();
template <>
inline constexpr long double kSmallest<BFloat16> = 0x1p-133L;
template <>
inline constexpr long double kSmallest<Half> = 0x1p-24L;

template <class T>
constexpr long double kLargest = std::numeric_limits<T>::max();
template <>
inline constexpr long double kLargest<BFloat16> = 0x1.fep127L;
template <>
inline constexpr long double kLargest<Half> = 65504;

inline bool within(long double actual, long double exact, long double bound, long double largest) {
  if (std::isnan(exact)) {
    return std::isnan(actual);
  }
  if (std::isinf(exact)) {
    return actual == exact;
  }
  if (std::abs(exact) + bound > largest && std::isinf(actual)) {  // beyond the type's range
    return std::signbit(actual) == std::signbit(exact);
  }
  return std::isfinite(actual) && std::abs(actual - exact) <= bound;
}

template <class T>
bool near(T actual, const Exact& exact, long double arithmetic = kArithmetic<T>) {
  const long double bound =
      arithmetic * exact.magnitude + kRounding<T> * std::abs(exact.value) + kSmallest<T>;
  return within(static_cast<long double>(static_cast<double>(actual)), exact.value, bound,
                kLargest<T>);
}

}  // namespace harness
