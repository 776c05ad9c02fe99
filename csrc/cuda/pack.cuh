// The widest access of a thread, and values that lie side by side.
#pragma once

#include <cstdint>

namespace mas_ext::cuda {

constexpr int kVectorBytes = 16;

// N neighbours, as one access where they are no wider than that, and as several otherwise.
template <class T, int N>
struct alignas(N * sizeof(T) < kVectorBytes ? N * sizeof(T) : kVectorBytes) Pack {
  T values[N];
};

}  // namespace mas_ext::cuda
