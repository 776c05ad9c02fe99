// Sums with the same bits on every run: a fixed order at every stage, no atomics. Each thread sums
// its elements, each block its threads (block_sum), and one block all blocks (finish_penalty).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "scalar.cuh"

namespace mas_ext::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Sum over the block; thread 0 has the result.
__device__ inline double block_sum(double value) {
  __shared__ double warp_sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (lane == 0) {
    warp_sums[warp] = value;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) {
      sum += warp_sums[w];
    }
  }
  return sum;
}

// value = λ/2 Σ partial sums, by one block.
template <class Value>
__global__ void __launch_bounds__(kThreads)
    finish_penalty(const double* partial_sums, int64_t count, Scalar lambda, Value* value) {
  double sum = 0;
#pragma unroll 8  // loads in flight: this block has the device to itself
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += partial_sums[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *value = static_cast<Value>(0.5 * lambda.load() * sum);
  }
}

}  // namespace mas_ext::cuda
