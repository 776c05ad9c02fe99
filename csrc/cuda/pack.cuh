// The widest access of a thread, and neighbouring values.
#pragma once

#include <cstdint>
#include <type_traits>

namespace mas_ext::cuda {

constexpr int kVectorBytes = 16;

// N neighbours: one access if they fit, else several. Values of 16 and 8 bits stay in words of 32
// bits until they are computed with. If they were an array, the compiler would unpack them where
// they are loaded, wait for them there, and need more registers.
template <class T, int N>
class alignas(N * sizeof(T) < kVectorBytes ? N * sizeof(T) : kVectorBytes) Pack {
  static constexpr bool kPairs = sizeof(T) == 2 && N % 2 == 0;
  static constexpr bool kFours = sizeof(T) == 1 && N % 4 == 0;
  using Word = std::conditional_t<kPairs || kFours, uint32_t, T>;

 public:
  __device__ T get(int i) const {
    if constexpr (kPairs) {
      return T(static_cast<uint16_t>(words_[i / 2] >> (16 * (i % 2))), T::from_bits());
    } else if constexpr (kFours) {
      return static_cast<T>(words_[i / 4] >> (8 * (i % 4)));
    } else {
      return words_[i];
    }
  }

  // Keeps the other value of a pair, which is read later.
  __device__ void set(int i, T value) {
    static_assert(!kFours, "codes are read only");
    if constexpr (kPairs) {
      const uint32_t bits = value.x, word = words_[i / 2];
      words_[i / 2] = i % 2 == 0 ? (word & 0xffff0000u) | bits : (word & 0xffffu) | bits << 16;
    } else {
      words_[i] = value;
    }
  }

  // The N values from `at` on, in memory.
  __device__ static Pack& of(T* at) { return *reinterpret_cast<Pack*>(at); }
  __device__ static const Pack& of(const T* at) { return *reinterpret_cast<const Pack*>(at); }

 private:
  Word words_[sizeof(T) * N / sizeof(Word)] = {};
};

}  // namespace mas_ext::cuda
