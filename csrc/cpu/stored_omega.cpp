// Converts stored Ω to float32, as much at a time as fits in L1, so that kernels need not be
// compiled for each way to store it.
#include "stored_omega.h"

#include <algorithm>

#include "../formulas.h"
#include "multiversion.h"

namespace mas_ext::cpu {
namespace {

MAS_MULTIVERSION void dequantize_blocks(float* __restrict__ omega,
                                        const uint8_t* __restrict__ codes,
                                        const float* __restrict__ scales, int64_t size) {
  for (int64_t begin = 0; begin < size; begin += kScaleBlock) {
    const int64_t end = std::min(begin + kScaleBlock, size);
    const float scale = *scales++;
    for (int64_t i = begin; i < end; ++i) {
      omega[i] = dequantize(codes[i], scale);
    }
  }
}

MAS_MULTIVERSION void convert(float* __restrict__ omega, const BFloat16* __restrict__ rounded,
                              int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    omega[i] = static_cast<float>(rounded[i]);
  }
}

}  // namespace

void to_float32(float* omega, const void* stored, ScalarType dtype, const float* scales,
                int64_t first, int64_t size) {
  if (is_codes(dtype)) {
    dequantize_blocks(omega, static_cast<const uint8_t*>(stored) + first,
                      scales + first / kScaleBlock, size);
  } else {
    convert(omega, static_cast<const BFloat16*>(stored) + first, size);
  }
}

}  // namespace mas_ext::cpu
