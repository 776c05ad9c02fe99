// The shim itself: it does what CUDA does (`faults works/`), and finds what is wrong. Of the
// kernels with one fault each, `faults NAME` must end in the message that test_simt.py expects.
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
// What is right
// ================================================================================================
using Left = Fragment;
using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major>;

void check(bool right, const char* what) {
  if (!right) {
    std::printf("the shim is wrong: %s\n", what);
    std::fflush(stdout);
    _exit(1);
  }
}

void warps_work() {
  run([] {
    const int down = __shfl_down_sync(~0u, thread(), 3);
    check(down == (lane() < 29 ? thread() + 3 : thread()), "__shfl_down_sync");
    check(__shfl_xor_sync(~0u, thread(), 5) == (thread() ^ 5), "__shfl_xor_sync");
    check(__shfl_sync(~0u, 0.5 * lane(), 7) == 3.5, "__shfl_sync");
    check(__ballot_sync(~0u, lane() % 2) == 0xaaaaaaaa, "__ballot_sync");
    check(__any_sync(~0u, lane() == 3) && !__any_sync(~0u, lane() == 32), "__any_sync");
    check(__all_sync(~0u, lane() < 32) && !__all_sync(~0u, lane() != 3), "__all_sync");
    if (lane() < 8) {  // two groups at once, at places of their own
      check(__shfl_xor_sync(0xff, lane(), 1) == (lane() ^ 1), "the first lanes alone");
    } else {
      check(__ballot_sync(0xffffff00, 1) == 0xffffff00, "the other lanes alone");
    }
  });
}

void blocks_work() {
  static int order[4][kThreads], count = 0;
  run(
      [] {
        __shared__ int values[kThreads];
        for (int round = 0; round < 3; ++round) {
          values[thread()] = 100 * round + thread();
          __syncthreads();
          const int other = (thread() + 50) % kThreads;
          check(values[other] == 100 * round + other, "__syncthreads");
          __syncthreads();
        }
        check(gridDim.x == 4 && blockDim.x == kThreads, "sizes");
        order[blockIdx.x][thread()] = atomicAdd(&count, 1);
      },
      4);
  for (int b = 0; b < 4; ++b) {
    for (const int place : order[b]) {
      check(place / kThreads == b, "blocks run one after another, in the order asked for");
    }
  }
}

// to = left · right, of numbers for which that is exact.
void fragments_work() {
  alignas(32) static __half left[16 * 24], right[16 * 16];
  alignas(32) static float product[16 * 20];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 16; ++i) {
      left[k * 24 + i].bits = torch::headeronly::Half(static_cast<float>(i - 2 * k)).x;
      right[k * 16 + i].bits = torch::headeronly::Half(static_cast<float>(k + 3 * i)).x;
    }
  }
  run(
      [] {
        Left a;
        Right b;
        wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
        wmma::fill_fragment(sum, 1.0f);
        wmma::load_matrix_sync(a, left, 24);
        wmma::load_matrix_sync(b, right, 16);
        wmma::mma_sync(sum, a, b, sum);
        for (float& x : sum.x) {
          x *= 2;
        }
        wmma::store_matrix_sync(product, sum, 20, wmma::mem_row_major);
      },
      1, kWarp);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      int wanted = 1;
      for (int k = 0; k < 16; ++k) {
        wanted += (i - 2 * k) * (k + 3 * j);
      }
      check(product[i * 20 + j] == static_cast<float>(2 * wanted), "mma_sync");
    }
  }
}

// ================================================================================================
// What is wrong
// ================================================================================================
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

const std::map<std::string, void (*)()> kFaults{
    {"different_barriers",
     [] {
       run([] {
         if (thread() < 7) {
           __syncthreads();
         } else {
           __syncthreads();
         }
       });
     }},
    {"early_exit",
     [] {
       run([] {
         if (thread() != 70) {
           __syncthreads();
         }
       });
     }},
    {"another_round",
     [] {
       run([] {
         for (int i = 0; i < 2 + thread() / kWarp; ++i) {
           __syncthreads();
         }
       });
     }},
    {"lane_stays_away",
     [] { run([] { thread() == 40 ? __syncthreads() : void(__shfl_down_sync(~0u, 1, 1)); }); }},
    {"left_out_of_mask", [] { run([] { __shfl_down_sync(0xffff, 1, 1); }); }},
    {"reads_from_outside",
     [] {
       run([] {
         if (lane() < 16) {
           __shfl_down_sync(0xffff, 1, 8);
         }
       });
     }},
    // No fault, however the halves of a warp overtake each other.
    {"halves_part",
     [] {
       for (int i = 0; i < 2000; ++i) {
         run([] {
           if (lane() < 16) {
             __ballot_sync(0xffff, 1);
           }
         });
       }
     }},
    {"masks_differ", [] { run([] { __syncwarp(lane() == 0 ? 1 : ~0u); }); }},
    {"lanes_wait_in_a_ring",
     [] { run([] { __syncwarp(1u << lane() | 1u << (lane() + 1) % kWarp); }); }},
    {"lanes_not_there", [] { run([] { __ballot_sync(~0u, 1); }, 1, 40); }},
    {"never_ends",
     [] {
       const harness::TimeLimit limit(1);
       volatile bool forever = true;
       run([&] {
         while (forever) {
         }
       });
     }},
    {"aligned_pack", read_pack<16>},
    {"misaligned_pack", read_pack<4>},
    {"misaligned_fragment",
     [] {
       alignas(32) static __half values[512];
       run([] {
         Fragment fragment;
         wmma::load_matrix_sync(fragment, values + 8, 16);
       });
     }},
    {"lanes_disagree_on_matrix",
     [] {
       alignas(32) static __half values[512];
       run([] {
         Fragment fragment;
         wmma::load_matrix_sync(fragment, values + 16 * (lane() == 9), 16);
       });
     }},
    {"fragments_diverge",
     [] {
       alignas(32) static __half values[256];
       run([] {
         Fragment fragment;
         if (lane() < 20) {
           wmma::load_matrix_sync(fragment, values, 16);
         } else {
           wmma::load_matrix_sync(fragment, values, 16);
         }
       });
     }},
    {"beyond_shared_memory",
     [] {
       run([] {
         __shared__ float values[kThreads];
         float* volatile mine = values + thread() + 1;
         *mine = 1;
       });
     }},
    {"behind_memory", beyond_memory<1>},
    {"in_front_of_memory", beyond_memory<-1>},
    {"memory_of_another_block",
     [] {
       const Buffer buffer(8 * 4, 0);
       const simt::Launch launch{4, {2}, [&](unsigned b) {
                                   buffer.close();
                                   buffer.open(8 * b, 8);
                                 }};
       simt::run(launch, 1, [&] { buffer.as<double>()[blockIdx.x + 1] = 1; });
     }},
    // Races.
    {"no_barrier",
     [] {
       run([] {
         __shared__ int values[kThreads];
         values[thread()] = thread();
         use(values[(thread() + 1) % kThreads]);
       });
     }},
    {"two_write_one",
     [] {
       static int value;
       run([] { value = 1; });
       use(value);
     }},
    {"shuffle_is_no_barrier",
     [] {
       run([] {
         __shared__ int values[kThreads];
         values[thread()] = thread();
         __shfl_down_sync(~0u, 1, 1);
         use(values[thread() ^ 1]);
       });
     }},
    {"atomic_is_no_barrier",
     [] {
       run([] {
         __shared__ int values[kThreads], count;
         values[thread()] = thread();
         atomicAdd(&count, 1);
         use(values[(thread() + 1) % kThreads]);
       });
     }},
    {"warp_is_not_block",
     [] {
       run([] {
         __shared__ int values[kThreads];
         values[thread()] = thread();
         __syncwarp();
         use(values[(thread() + kWarp) % kThreads]);
       });
     }},
    {"fragment_before_barrier",
     [] {
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
     }},
};

}  // namespace

int main(int argc, char** argv) {
  if (const auto fault = kFaults.find(argc > 1 ? argv[1] : ""); fault != kFaults.end()) {
    fault->second();
    std::printf("nothing was found\n");
    return 0;
  }
  harness::Program program(argc, argv);
  program.test("works/warps", [](uint64_t) { warps_work(); });
  program.test("works/blocks", [](uint64_t) { blocks_work(); });
  program.test("works/fragments", [](uint64_t) { fragments_work(); });
  return program.finish();
}
