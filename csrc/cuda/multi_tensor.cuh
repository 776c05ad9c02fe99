// One kernel that walks any number of tensors, a block for each chunk of one of them.
//
// An operation names its streams (one pointer a tensor each) and says what to do with one element
// of all of them; everything about memory is here. All streams hold T, but Ω, which holds
// accumulate_t<T>. Operations are small structs:
//
//   template <class T> struct Operation {
//     static constexpr int kStreams, kOmega;      // how many, and which one is Ω
//     static constexpr unsigned kReads, kWrites;  // bit s: stream s is read, is written
//     static constexpr bool kSums;                // whether operator() returns a term of a sum
//     __device__ void begin();                    // reads device scalars, once a thread
//     __device__ A operator()(A (&element)[kStreams]) const;
//   };
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../numbers.h"

namespace mas_ext::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kChunk = 16384;  // elements a block; fixed, so sums do not depend on the grid
constexpr int kUnroll = 2;         // vectors a thread has in flight on every stream
constexpr int kVectorBytes = 16;
constexpr int kTableBytes = 28672;  // kernel parameters hold 32,764 bytes from CUDA 12.1 on

// Passed by value, so that a captured CUDA graph holds it and no copy is ever in flight.
template <int Streams>
struct Table {
  static constexpr int kCapacity = kTableBytes / (8 * Streams + 12);
  void* data[Streams][kCapacity];
  int64_t numel[kCapacity];
  int first_chunk[kCapacity + 1];
  int tensors;
};

// A scalar on the host, or on the device where a captured graph sees it change.
struct Scalar {
  const void* device;
  double host;
  bool is_double;

  __device__ double load() const {
    if (device == nullptr) {
      return host;
    }
    return is_double ? *static_cast<const double*>(device)
                     : static_cast<double>(*static_cast<const float*>(device));
  }
};

template <class T, int Size>
struct alignas(kVectorBytes) Pack {
  T values[Size];
};

// The tensor that a chunk belongs to: the last one whose first chunk is not beyond it.
template <int Streams>
__device__ int tensor_of_chunk(const Table<Streams>& table, int chunk) {
  int low = 0, high = table.tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Sum over the block, in a fixed order; thread 0 has the result.
__device__ inline double block_sum(double value) {
  __shared__ double warp_sums[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % kWarp == 0) {
    warp_sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      sum += warp_sums[warp];
    }
  }
  return sum;
}

// One chunk of one tensor: pointers to its first element on every stream.
template <template <class> class Operation, class T>
class ChunkWalk {
  using Op = Operation<T>;
  using A = accumulate_t<T>;
  static constexpr int kVector = kVectorBytes / sizeof(T);

 public:
  __device__ ChunkWalk(const Table<Op::kStreams>& table, int chunk) {
    const int tensor = tensor_of_chunk(table, chunk);
    const int64_t begin = static_cast<int64_t>(chunk - table.first_chunk[tensor]) * kChunk;
    const int64_t left = table.numel[tensor] - begin;
    size_ = static_cast<int>(left < kChunk ? left : kChunk);
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      const auto width = static_cast<int64_t>(s == Op::kOmega ? sizeof(A) : sizeof(T));
      data_[s] = static_cast<char*>(table.data[s][tensor]) + begin * width;
    }
  }

  // Scalar up to the first 16-byte boundary, vectors, scalar for the rest. Streams whose
  // boundaries do not fall on one element are walked by scalars throughout.
  __device__ A run(const Op& op) {
    const int head = head_size();
    const int vectors = (size_ - head) / kVector;
    const int tail = head + vectors * kVector;
    A sum = 0;
    for (int i = threadIdx.x; i < head; i += kThreads) {
      sum += one(op, i);
    }
    for (int v = threadIdx.x; v < vectors; v += kThreads * kUnroll) {
      sum += unrolled(op, head, v, vectors);
    }
    for (int i = tail + threadIdx.x; i < size_; i += kThreads) {
      sum += one(op, i);
    }
    return sum;
  }

 private:
  // Elements before every stream is aligned; all of them where that never happens.
  __device__ int head_size() const {
    const auto phase = reinterpret_cast<uintptr_t>(data_[Op::kOmega == 0 ? 1 : 0]) % kVectorBytes;
    const auto bytes = (kVectorBytes - phase) % kVectorBytes;
    const int head = static_cast<int>(bytes / sizeof(T));
    bool aligned = bytes % sizeof(T) == 0 && head <= size_;
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      const auto width = s == Op::kOmega ? sizeof(A) : sizeof(T);
      aligned &= (reinterpret_cast<uintptr_t>(data_[s]) + head * width) % kVectorBytes == 0;
    }
    return aligned ? head : size_;
  }

  __device__ A one(const Op& op, int i) {
    A element[Op::kStreams];
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      if (Op::kReads >> s & 1u) {
        element[s] = s == Op::kOmega ? static_cast<const A*>(data_[s])[i]
                                     : static_cast<A>(static_cast<const T*>(data_[s])[i]);
      }
    }
    const A term = op(element);
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      if (Op::kWrites >> s & 1u) {
        if (s == Op::kOmega) {
          static_cast<A*>(data_[s])[i] = element[s];
        } else {
          static_cast<T*>(data_[s])[i] = static_cast<T>(element[s]);
        }
      }
    }
    return term;
  }

  // Loads kUnroll vectors of every stream before it computes any of them.
  __device__ A unrolled(const Op& op, int head, int first, int vectors) {
    Pack<T, kVector> values[kUnroll][Op::kStreams];
    Pack<A, kVector> omega[kUnroll];
    A sum = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = first + u * kThreads;
      if (v < vectors) {
        load(values[u], omega[u], head, v);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = first + u * kThreads;
      if (v < vectors) {
        sum += compute(op, values[u], omega[u]);
        store(values[u], omega[u], head, v);
      }
    }
    return sum;
  }

  __device__ void load(Pack<T, kVector> (&values)[Op::kStreams], Pack<A, kVector>& omega, int head,
                       int v) const {
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      if (Op::kReads >> s & 1u) {
        if (s == Op::kOmega) {
          omega = reinterpret_cast<const Pack<A, kVector>*>(static_cast<A*>(data_[s]) + head)[v];
        } else {
          values[s] =
              reinterpret_cast<const Pack<T, kVector>*>(static_cast<T*>(data_[s]) + head)[v];
        }
      }
    }
  }

  __device__ static A compute(const Op& op, Pack<T, kVector> (&values)[Op::kStreams],
                              Pack<A, kVector>& omega) {
    A sum = 0;
#pragma unroll
    for (int lane = 0; lane < kVector; ++lane) {
      A element[Op::kStreams];
#pragma unroll
      for (int s = 0; s < Op::kStreams; ++s) {
        element[s] = s == Op::kOmega ? omega.values[lane] : static_cast<A>(values[s].values[lane]);
      }
      sum += op(element);
#pragma unroll
      for (int s = 0; s < Op::kStreams; ++s) {
        if (s == Op::kOmega) {
          omega.values[lane] = element[s];
        } else {
          values[s].values[lane] = static_cast<T>(element[s]);
        }
      }
    }
    return sum;
  }

  __device__ void store(const Pack<T, kVector> (&values)[Op::kStreams],
                        const Pack<A, kVector>& omega, int head, int v) {
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      if (Op::kWrites >> s & 1u) {
        if (s == Op::kOmega) {
          reinterpret_cast<Pack<A, kVector>*>(static_cast<A*>(data_[s]) + head)[v] = omega;
        } else {
          reinterpret_cast<Pack<T, kVector>*>(static_cast<T*>(data_[s]) + head)[v] = values[s];
        }
      }
    }
  }

  void* data_[Op::kStreams];
  int size_;
};

template <template <class> class Operation, class T>
__global__ void __launch_bounds__(kThreads)
    chunk_kernel(const __grid_constant__ Table<Operation<T>::kStreams> table, Operation<T> op,
                 double* partial_sums) {
  op.begin();
  const auto sum = ChunkWalk<Operation, T>(table, static_cast<int>(blockIdx.x)).run(op);
  if constexpr (Operation<T>::kSums) {
    const double block = block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) {
      partial_sums[blockIdx.x] = block;
    }
  }
}

// value = λ/2 Σ partial sums, by one block in a fixed order.
template <class Value>
__global__ void __launch_bounds__(kThreads)
    finish_penalty(const double* partial_sums, int64_t count, Scalar lambda, Value* value) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += partial_sums[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) {
    *value = static_cast<Value>(0.5 * lambda.load() * sum);
  }
}

}  // namespace mas_ext::cuda
