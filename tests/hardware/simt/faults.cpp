// Kernels with one fault each: `faults NAME` must end in a message, which tests/test_simt.py knows.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "csrc/cuda/pack.cuh"
#include "harness/memory.h"
#include "harness/program.h"

namespace {

namespace wmma = nvcuda::wmma;
using harness::Buffer;
using Fragment = wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::col_major>;

constexpr int kThreads = 96, kWarp = 32;

void run(const std::function<void()>& kernel, unsigned blocks = 1, int threads = kThreads) {
  simt::run({blocks, simt::ascending(blocks)}, threads, kernel);
}

int thread() { return static_cast<int>(threadIdx.x); }
template <class T>
void use(T value) {
  [[maybe_unused]] volatile T used = value;
}

int lane() { return thread() % kWarp; }

// ================================================================================================
// What is wrong
// ================================================================================================
void different_barriers() {
  run([] {
    if (thread() < 7) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
}

void early_exit() {
  run([] {
    if (thread() != 70) {
      __syncthreads();
    }
  });
}

void another_round() {
  run([] {
    for (int i = 0; i < 2 + thread() / kWarp; ++i) {
      __syncthreads();
    }
  });
}

void lane_stays_away() {
  run([] { thread() == 40 ? __syncthreads() : void(__shfl_down_sync(~0u, 1, 1)); });
}

void left_out_of_mask() {
  run([] { __shfl_down_sync(0xffff, 1, 1); });
}

void reads_from_outside() {
  run([] {
    if (lane() < 16) {
      __shfl_down_sync(0xffff, 1, 8);
    }
  });
}

// No fault, however the halves of a warp overtake each other.
void halves_part() {
  for (int i = 0; i < 2000; ++i) {
    run([] {
      if (lane() < 16) {
        __ballot_sync(0xffff, 1);
      }
    });
  }
}

void masks_differ() {
  run([] { __syncwarp(lane() == 0 ? 1 : ~0u); });
}

void lanes_wait_in_a_ring() {
  run([] { __syncwarp(1u << lane() | 1u << (lane() + 1) % kWarp); });
}

void lanes_not_there() {
  run([] { __ballot_sync(~0u, 1); }, 1, 40);
}

void never_ends() {
  const harness::TimeLimit limit(1);
  volatile bool forever = true;
  run([&] {
    while (forever) {
    }
  });
}

template <int Ahead>
void read_pack() {
  using Pack = mas_ext::cuda::Pack<float, 4>;
  const Buffer buffer(64, Ahead);
  run([&] { use(Pack::of(buffer.as<float>()).get(0)); });
}

void misaligned_fragment() {
  alignas(32) static __half values[512];
  run([] {
    Fragment fragment;
    wmma::load_matrix_sync(fragment, values + 8, 16);
  });
}

void lanes_disagree_on_matrix() {
  alignas(32) static __half values[512];
  run([] {
    Fragment fragment;
    wmma::load_matrix_sync(fragment, values + 16 * (lane() == 9), 16);
  });
}

void fragments_diverge() {
  alignas(32) static __half values[256];
  run([] {
    Fragment fragment;
    if (lane() < 20) {
      wmma::load_matrix_sync(fragment, values, 16);
    } else {
      wmma::load_matrix_sync(fragment, values, 16);
    }
  });
}

void beyond_shared_memory() {
  run([] {
    __shared__ float values[kThreads];
    float* volatile mine = values + thread() + 1;
    *mine = 1;
  });
}

template <int Step>
void beyond_memory() {
  const Buffer buffer(sizeof(float) * kThreads, 8);
  run([&] { buffer.as<float>()[thread() + Step] = 1; });
}

void memory_of_another_block() {
  const Buffer buffer(8 * 4, 0);
  const simt::Launch launch{4, {2}, [&](unsigned b) {
                              buffer.close();
                              buffer.open(8 * b, 8);
                            }};
  simt::run(launch, 1, [&] { buffer.as<double>()[blockIdx.x + 1] = 1; });
}

// ================================================================================================
// Races
// ================================================================================================
void no_barrier() {
  run([] {
    __shared__ int values[kThreads];
    values[thread()] = thread();
    use(values[(thread() + 1) % kThreads]);
  });
}

void two_write_one() {
  static int value;
  run([] { value = 1; });
  use(value);
}

void shuffle_is_no_barrier() {
  run([] {
    __shared__ int values[kThreads];
    values[thread()] = thread();
    __shfl_down_sync(~0u, 1, 1);
    use(values[thread() ^ 1]);
  });
}

void atomic_is_no_barrier() {
  run([] {
    __shared__ int values[kThreads], count;
    values[thread()] = thread();
    atomicAdd(&count, 1);
    use(values[(thread() + 1) % kThreads]);
  });
}

void warp_is_not_block() {
  run([] {
    __shared__ int values[kThreads];
    values[thread()] = thread();
    __syncwarp();
    use(values[(thread() + kWarp) % kThreads]);
  });
}

void fragment_before_barrier() {
  alignas(32) static __half values[256];
  run(
      [] {
        for (int i = lane(); i < 256; i += kWarp) {
          values[i].bits = 0;
        }
        Fragment fragment;
        wmma::load_matrix_sync(fragment, values, 16);
      },
      1, kWarp);
}

const std::map<std::string, void (*)()> kFaults{
    {"different_barriers", different_barriers},
    {"early_exit", early_exit},
    {"another_round", another_round},
    {"lane_stays_away", lane_stays_away},
    {"left_out_of_mask", left_out_of_mask},
    {"reads_from_outside", reads_from_outside},
    {"halves_part", halves_part},
    {"masks_differ", masks_differ},
    {"lanes_wait_in_a_ring", lanes_wait_in_a_ring},
    {"lanes_not_there", lanes_not_there},
    {"never_ends", never_ends},
    {"aligned_pack", read_pack<16>},
    {"misaligned_pack", read_pack<4>},
    {"misaligned_fragment", misaligned_fragment},
    {"lanes_disagree_on_matrix", lanes_disagree_on_matrix},
    {"fragments_diverge", fragments_diverge},
    {"beyond_shared_memory", beyond_shared_memory},
    {"behind_memory", beyond_memory<1>},
    {"in_front_of_memory", beyond_memory<-1>},
    {"memory_of_another_block", memory_of_another_block},
    {"no_barrier", no_barrier},
    {"two_write_one", two_write_one},
    {"shuffle_is_no_barrier", shuffle_is_no_barrier},
    {"atomic_is_no_barrier", atomic_is_no_barrier},
    {"warp_is_not_block", warp_is_not_block},
    {"fragment_before_barrier", fragment_before_barrier},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  kFaults.at(name)();
  std::printf("nothing was found\n");
  return 0;
}
