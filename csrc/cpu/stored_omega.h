// Ω as it is kept, to float32 as kernels compute with it.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace mas_ext::cpu {

// What is expanded at a time: it stays in L1 until the kernel has read it. Whole blocks of codes.
constexpr int64_t kExpandedAtOnce = 1024;
static_assert(kExpandedAtOnce % kScaleBlock == 0);

// Elements first to first + size of what `kept` points to; `first` is where a block of codes
// begins.
void expand(float* omega, const void* kept, ScalarType dtype, const float* scales, int64_t first,
            int64_t size);

}  // namespace mas_ext::cpu
