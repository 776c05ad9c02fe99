// What the shim finds: kernels with one fault each. `faults NAME` must end in the message that
// test_simt.py expects. That the shim does what CUDA does is seen in the kernels' results.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cstdio>
#include <functional>
#include <map>
#include <string>

#include "csrc/cuda/pack.cuh"
#include "harness/memory.h"
#include "harness/program.h"

namespace {

namespace wmma = nvcuda::wmma;
using harness::Buffer;
using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::col_major>;
using Kernel = std::function<void()>;

constexpr int kThreads = 96, kWarp = 32;

void run(const Kernel& kernel, int threads = kThreads) { simt::run({{0}}, threads, kernel); }

int thread() { return static_cast<int>(threadIdx.x); }
int lane() { return thread() % kWarp; }
template <class T>
void use(T value) {
  [[maybe_unused]] volatile T used = value;
}

alignas(32) __half matrix[512];
volatile int everyones;

void load(int first) {
  Left fragment;
  wmma::load_matrix_sync(fragment, matrix + first, 16);
}

template <int Ahead>
void read_pack() {
  using Pack = mas_ext::cuda::Pack<float, 4>;
  const Buffer buffer(64, Ahead);
  run([&] { use(Pack::of(buffer.as<float>()).get(0)); });
}

template <int Step>
void beyond_memory() {
  const Buffer buffer(sizeof(float) * kThreads, 8);
  run([&] { buffer.as<float>()[thread() + Step] = 1; });
}

void memory_of_another_block() {
  const Buffer buffer(8 * 4, 0);
  const auto open = [&](unsigned b) {
    buffer.close();
    buffer.open(8 * b, 8);
  };
  simt::run({{2}, open}, 1, [&] { buffer.as<double>()[blockIdx.x + 1] = 1; });
}

void never_ends() {
  const harness::TimeLimit limit(1);
  volatile bool forever = true;
  run([&] {
    while (forever) {
    }
  });
}

const std::map<std::string, void (*)()> kPrograms{
    {"never_ends", never_ends},
    {"aligned_pack", read_pack<16>},
    {"misaligned_pack", read_pack<4>},
    {"behind_memory", beyond_memory<1>},
    {"in_front_of_memory", beyond_memory<-1>},
    {"memory_of_another_block", memory_of_another_block},
    {"part_of_a_warp", [] { run([] { __shfl_down_sync(~0u, 1, 1); }, 40); }},
};

const std::map<std::string, Kernel> kKernels{
    {"different_barriers",
     [] {
       if (thread() < 7) {
         __syncthreads();
       } else {
         __syncthreads();
       }
     }},
    {"early_exit",
     [] {
       if (thread() != 70) {
         __syncthreads();
       }
     }},
    {"another_round",
     [] {
       for (int i = 0; i < 2 + thread() / kWarp; ++i) {
         __syncthreads();
       }
     }},
    {"lane_stays_away",
     [] { thread() == 40 ? __syncthreads() : void(__shfl_down_sync(~0u, 1, 1)); }},
    {"part_of_a_mask", [] { __shfl_down_sync(0xffff, 1, 1); }},
    {"misaligned_fragment", [] { load(8); }},
    {"lanes_disagree_on_matrix", [] { load(16 * (lane() == 9)); }},
    {"fragments_diverge",
     [] {
       Left fragment;
       if (lane() < 20) {
         wmma::load_matrix_sync(fragment, matrix, 16);
       } else {
         wmma::load_matrix_sync(fragment, matrix, 16);
       }
     }},
    {"beyond_shared_memory",
     [] {
       __shared__ float values[kThreads];
       float* volatile mine = values + thread() + 1;
       *mine = 1;
     }},
    // Races.
    {"no_barrier",
     [] {
       __shared__ int values[kThreads];
       values[thread()] = thread();
       use(values[(thread() + 1) % kThreads]);
     }},
    {"two_write_one", [] { everyones = 1; }},
    {"shuffle_is_no_barrier",
     [] {
       __shared__ int values[kThreads];
       values[thread()] = thread();
       __shfl_down_sync(~0u, 1, 1);
       use(values[thread() ^ 1]);
     }},
    {"fragment_before_barrier",
     [] {
       for (int i = lane(); i < 256; i += kWarp) {
         matrix[i].bits = static_cast<uint16_t>(thread() / kWarp);
       }
       load(0);
     }},
};

}  // namespace

int main(int, char** argv) {
  const std::string name = argv[1];
  kPrograms.contains(name) ? kPrograms.at(name)() : run(kKernels.at(name));
  std::printf("nothing was found\n");
  return 0;
}
