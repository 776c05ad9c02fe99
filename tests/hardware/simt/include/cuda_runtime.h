// What the kernels use of CUDA, on the host. Found before the toolkit's header of this name.
// What is not here does not compile: add it when a kernel needs it, with a test in faults.cpp.
#pragma once

#include <source_location>

#include "../shim/grid.h"

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

inline void __syncthreads(std::source_location line = std::source_location::current()) {
  simt::self.block->meet(simt::self.thread, {"__syncthreads", line}, [] {});
}

// Of whole warps only. A lane beyond the warp's end: the value stays the caller's own.
template <class T>
SIMT_UNSEEN T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                               std::source_location line = std::source_location::current()) {
  if (mask != ~0u || simt::self.block->warp_of(simt::self.thread).members() != simt::kWarpSize) {
    simt::fail("thread %d calls __shfl_down_sync (%s:%u) with mask 0x%x, which is not its warp",
               simt::self.thread, line.file_name(), static_cast<unsigned>(line.line()), mask);
  }
  struct Letter {
    T sent, received;
    unsigned from;  // lane
  };
  const unsigned lane = threadIdx.x % simt::kWarpSize, from = lane + delta;
  Letter letter{value, value, from < simt::kWarpSize ? from : lane};
  simt::meet_lanes({"__shfl_down_sync", line}, &letter, [](void** letters) SIMT_UNSEEN {
    for (int l = 0; l < simt::kWarpSize; ++l) {
      auto* mine = static_cast<Letter*>(letters[l]);
      mine->received = static_cast<Letter*>(letters[mine->from])->sent;
    }
  });
  return letter.received;
}
