// Ω as it is kept, to float32. Between memory and a kernel lies no more than what fits in L1, so
// the kernels need not be compiled once more for every way to keep Ω.
#include "omega.h"

#include <algorithm>

#include "../formulas.h"
#include "multiversion.h"

namespace mas_ext::cpu {
namespace {

MAS_MULTIVERSION void expand_codes(float* __restrict__ omega, const uint8_t* __restrict__ codes,
                                   const float* __restrict__ scales, int64_t size) {
  for (int64_t begin = 0; begin < size; begin += kScaleBlock) {
    const int64_t end = std::min(begin + kScaleBlock, size);
    const float scale = *scales++;
    for (int64_t i = begin; i < end; ++i) {
      omega[i] = expanded(codes[i], scale);
    }
  }
}

MAS_MULTIVERSION void widen(float* __restrict__ omega, const BFloat16* __restrict__ rounded,
                            int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    omega[i] = static_cast<float>(rounded[i]);
  }
}

}  // namespace

void expand(float* omega, const void* kept, ScalarType dtype, const float* scales, int64_t first,
            int64_t size) {
  if (is_codes(dtype)) {
    expand_codes(omega, static_cast<const uint8_t*>(kept) + first, scales + first / kScaleBlock,
                 size);
  } else {
    widen(omega, static_cast<const BFloat16*>(kept) + first, size);
  }
}

}  // namespace mas_ext::cpu
