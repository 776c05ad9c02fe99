// What the kernels use of CUDA, on the host. Found before the toolkit's header of this name.
// What is not here does not compile: add it when a kernel needs it, with a test in faults.cpp.
#pragma once

#include <atomic>
#include <source_location>

#include "../shim/grid.h"
#include "../shim/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another

#define threadIdx (::simt::thread_index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)

inline void __syncthreads(std::source_location line = std::source_location::current()) {
  simt::self.block->meet(simt::self.thread, {"__syncthreads", line}, [] {});
}

inline void __syncwarp(unsigned mask = ~0u,
                       std::source_location line = std::source_location::current()) {
  simt::self.block->warp_of(simt::self.thread)
      .join<void>(simt::self.thread % simt::kWarpSize, mask, {"__syncwarp", line},
                  simt::Order::kMemory, nullptr, [](void**) {});
}

// A lane beyond the warp's end: the value stays the caller's own.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   std::source_location line = std::source_location::current()) {
  const unsigned lane = threadIdx.x % simt::kWarpSize, from = lane + delta;
  return simt::exchange(mask, value, static_cast<int>(from < simt::kWarpSize ? from : lane),
                        {"__shfl_down_sync", line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes,
                  std::source_location line = std::source_location::current()) {
  const int lane = static_cast<int>(threadIdx.x) % simt::kWarpSize;
  return simt::exchange(mask, value, (lane ^ lanes) % simt::kWarpSize, {"__shfl_xor_sync", line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane,
              std::source_location line = std::source_location::current()) {
  return simt::exchange(mask, value, lane % simt::kWarpSize, {"__shfl_sync", line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location line = std::source_location::current()) {
  return simt::vote(mask, predicate != 0, {"__ballot_sync", line});
}

inline int __any_sync(unsigned mask, int predicate,
                      std::source_location line = std::source_location::current()) {
  return simt::vote(mask, predicate != 0, {"__any_sync", line}) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      std::source_location line = std::source_location::current()) {
  return simt::vote(mask, predicate != 0, {"__all_sync", line}) == mask;
}

// Indivisible, and no more: nothing else is ordered by it.
template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
