// How kernels go through the elements of a chunk and sum their results.
//
// A kernel is written once, as a function of an access `at`: `at.load(stream, i)` gives one
// element, or for bfloat16 two at a time. The formulas work on either.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "../numbers.h"
#include "multiversion.h"

namespace mas_ext::cpu {

constexpr int kLanes = 16;  // partial sums per chunk: two AVX-512 registers

// ------------------------------------------------------------------------------------------------
// One element at a time
// ------------------------------------------------------------------------------------------------
template <class A>
struct Singly {
  static constexpr int kElements = 1;

  template <class T>
  static MAS_ALWAYS_INLINE A load(const T* stream, int64_t i) {
    return static_cast<A>(stream[i]);
  }
  template <class T>
  static MAS_ALWAYS_INLINE void store(T* stream, int64_t i, A value) {
    stream[i] = static_cast<T>(value);
  }
  // What a load gives after `value` was stored. (Rounded again rather than loaded, which would
  // prevent vectorised loops over half-precision types.)
  template <class T>
  static MAS_ALWAYS_INLINE A stored(A value) {
    return static_cast<A>(static_cast<T>(value));
  }
  static MAS_ALWAYS_INLINE A all(A value) { return value; }

  // Calls `body(of)`, where of(value) is the number that a loaded value is.
  template <class Body>
  static MAS_ALWAYS_INLINE void for_each(Body body) {
    body([](auto& value) -> auto& { return value; });
  }
};

// ------------------------------------------------------------------------------------------------
// Two bfloat16 at a time, in one word: a shift converts one to float, a mask the other. Singly, the
// compiler would widen, split and pack vectors, which takes longer than the formulas.
// ------------------------------------------------------------------------------------------------
static_assert(std::endian::native == std::endian::little);

struct Pair {
  float low, high;
};

MAS_ALWAYS_INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
MAS_ALWAYS_INLINE Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
MAS_ALWAYS_INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }

struct InPairs {
  static constexpr int kElements = 2;

  static MAS_ALWAYS_INLINE Pair load(const float* stream, int64_t i) {
    return {stream[i], stream[i + 1]};
  }
  static MAS_ALWAYS_INLINE Pair load(const BFloat16* stream, int64_t i) {
    uint32_t word;
    std::memcpy(&word, stream + i, sizeof word);
    return {std::bit_cast<float>(word << 16), std::bit_cast<float>(word & kHigh)};
  }
  static MAS_ALWAYS_INLINE void store(BFloat16* stream, int64_t i, Pair value) {
    const uint32_t word = (rounded(value.low) >> 16) | (rounded(value.high) & kHigh);
    std::memcpy(stream + i, &word, sizeof word);
  }
  template <class T>
  static MAS_ALWAYS_INLINE Pair stored(Pair value) {
    return {std::bit_cast<float>(rounded(value.low) & kHigh),
            std::bit_cast<float>(rounded(value.high) & kHigh)};
  }
  static MAS_ALWAYS_INLINE Pair all(float value) { return {value, value}; }

  template <class Body>
  static MAS_ALWAYS_INLINE void for_each(Body body) {
    body([](auto& pair) -> auto& { return pair.low; });
    body([](auto& pair) -> auto& { return pair.high; });
  }

 private:
  static constexpr uint32_t kHigh = 0xffff0000u;

  // The upper half is the nearest bfloat16; ties go to the even one.
  static MAS_ALWAYS_INLINE uint32_t rounded(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    return value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  }
};

template <class T>
using walk_t = std::conditional_t<std::is_same_v<T, BFloat16>, InPairs, Singly<accumulate_t<T>>>;

// ------------------------------------------------------------------------------------------------
// Sums
// ------------------------------------------------------------------------------------------------
MAS_ALWAYS_INLINE double sum_of(const double (&lanes)[kLanes]) {
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

// Σ term(at, i) in float64 in a fixed order. Every element has its lane, so the compiler can keep
// the lanes in vector registers. Values of T are read one or two at a time.
template <class T, class Term>
MAS_ALWAYS_INLINE double sum_in_lanes(int64_t size, Term term) {
  constexpr int kRow = kLanes * walk_t<T>::kElements;
  double lanes[kLanes] = {}, others[kLanes] = {};
  int64_t i = 0;
  for (; i + kRow <= size; i += kRow) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto terms = term(walk_t<T>{}, i + lane * walk_t<T>::kElements);
      if constexpr (walk_t<T>::kElements == 2) {
        lanes[lane] += static_cast<double>(terms.low);
        others[lane] += static_cast<double>(terms.high);
      } else {
        lanes[lane] += static_cast<double>(terms);
      }
    }
  }
  for (int k = 0; i + k < size; ++k) {
    lanes[k % kLanes] += static_cast<double>(term(Singly<accumulate_t<T>>{}, i + k));
  }
  return sum_of(lanes) + sum_of(others);
}

}  // namespace mas_ext::cpu
