// Stored Ω, converted to the float32 that kernels compute in.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace mas_ext::cpu {

// Elements converted at a time, which stay in L1 until the kernel has read them: whole blocks.
constexpr int64_t kConvertedAtOnce = 1024;
static_assert(kConvertedAtOnce % kScaleBlock == 0);

// Converts elements first to first + size of `stored`. A block of codes begins at `first`.
void to_float32(float* omega, const void* stored, ScalarType dtype, const float* scales,
                int64_t first, int64_t size);

}  // namespace mas_ext::cpu
