// The shim itself: everything it offers does what CUDA says. That it finds what is wrong,
// faults.cpp shows.
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>

#include "harness/program.h"
#include "shim/grid.h"

namespace {

namespace wmma = nvcuda::wmma;
using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::col_major>;
using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::row_major>;

constexpr int kThreads = 96, kWarp = 32;

void run(const std::function<void()>& kernel, unsigned blocks = 1, int threads = kThreads) {
  simt::run({blocks, simt::ascending(blocks)}, threads, kernel);
}

int thread() { return static_cast<int>(threadIdx.x); }
int lane() { return thread() % kWarp; }

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

}  // namespace

int main(int argc, char** argv) {
  harness::Program program(argc, argv);
  program.test("works/warps", [](uint64_t) { warps_work(); });
  program.test("works/blocks", [](uint64_t) { blocks_work(); });
  program.test("works/fragments", [](uint64_t) { fragments_work(); });
  return program.finish();
}
