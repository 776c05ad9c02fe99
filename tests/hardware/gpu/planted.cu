// One bug for each tool of compute-sanitizer to find: a tool that finds nothing here would find
// nothing in the kernels either. `planted memcheck`, and so on.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

constexpr int kThreads = 64;

__global__ void writes_behind_the_end(int* data) { data[threadIdx.x + 1] = 1; }

__global__ void reads_what_was_never_written(const int* data, int* result) {
  result[threadIdx.x] = data[threadIdx.x] + 1;
}

__global__ void reads_what_another_warp_writes(int* result) {
  __shared__ int places[kThreads];
  places[threadIdx.x] = static_cast<int>(threadIdx.x);
  result[threadIdx.x] = places[kThreads - 1 - threadIdx.x];  // a barrier is missing before this
}

__global__ void waits_in_a_mask_without_itself(int* result) {
  const unsigned first_half = 0x0000ffffu;
  if (threadIdx.x <= 16) {  // thread 16 is not in the mask
    __syncwarp(first_half);
    result[threadIdx.x] = 1;
  }
}

int main(int count, char** words) {
  const char* bug = count > 1 ? words[1] : "";
  int *data = nullptr, *result = nullptr;
  cudaMalloc(&data, kThreads * sizeof(int));
  cudaMalloc(&result, kThreads * sizeof(int));
  if (std::strcmp(bug, "memcheck") == 0) {
    writes_behind_the_end<<<1, kThreads>>>(data);
  } else if (std::strcmp(bug, "initcheck") == 0) {
    reads_what_was_never_written<<<1, kThreads>>>(data, result);
  } else if (std::strcmp(bug, "racecheck") == 0) {
    reads_what_another_warp_writes<<<1, kThreads>>>(result);
  } else if (std::strcmp(bug, "synccheck") == 0) {
    waits_in_a_mask_without_itself<<<1, 32>>>(result);
  } else {
    std::fprintf(stderr, "no such bug: '%s'\n", bug);
    return 2;
  }
  std::printf("%s\n", cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
