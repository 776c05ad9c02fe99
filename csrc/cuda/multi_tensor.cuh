// One kernel for any number of tensors, with one block per chunk of a tensor. Operations
// (operations.cuh) say what is done with an element; everything about memory is here.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../numbers.h"
#include "omega.cuh"
#include "operations.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "table.cuh"

namespace mas_ext::cuda {

constexpr int kUnroll = 2;  // vectors that a thread has in flight on each stream

template <class Op, class Stored>
using TableOf = Table<Op::kStreams, in_codes<Stored>>;

// An Ω that is written is stored in the type it is computed in; one that is only read, in any.
template <class Op, class Stored>
constexpr bool takes = std::is_same_v<Stored, typename Op::A> || !(Op::kWrites >> Op::kOmega & 1u);

// N neighbouring elements of every stream, in registers.
template <class Op, class Stored, int N>
class Elements {
  using T = typename Op::Value;
  using A = typename Op::A;
  using Streams = void* const (&)[Op::kStreams];
  static constexpr bool kWritesOmega = Op::kWrites >> Op::kOmega & 1u;

 public:
  __device__ void load(Streams streams, const float* scales, int first) {
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      if (Op::kReads >> s & 1u) {
        if (s == Op::kOmega) {
          omega_.load(streams[s], scales, first);
        } else {
          values_[s] = at(streams[s], first);
        }
      }
    }
  }

  __device__ A compute(const Op& op) {
    A sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A element[Op::kStreams];
#pragma unroll
      for (int s = 0; s < Op::kStreams; ++s) {
        if (Op::kReads >> s & 1u) {
          element[s] = s == Op::kOmega ? omega_.get(i) : static_cast<A>(values_[s].get(i));
        }
      }
      sum += op(element);
#pragma unroll
      for (int s = 0; s < Op::kStreams; ++s) {
        if (writes_values(s)) {
          values_[s].set(i, static_cast<T>(element[s]));
        }
      }
      if constexpr (kWritesOmega) {
        omega_.set(i, element[Op::kOmega]);
      }
    }
    return sum;
  }

  __device__ void store(Streams streams, int first) const {
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      if (writes_values(s)) {
        at(streams[s], first) = values_[s];
      }
    }
    if constexpr (kWritesOmega) {
      omega_.store(streams[Op::kOmega], first);
    }
  }

 private:
  __device__ static constexpr bool writes_values(int stream) {
    return stream != Op::kOmega && (Op::kWrites >> stream & 1u);
  }
  __device__ static Pack<T, N>& at(void* stream, int first) {
    return Pack<T, N>::of(static_cast<T*>(stream) + first);
  }

  Pack<T, N> values_[Op::kStreams];  // without Ω, whose place is not used
  Omega<A, Stored, N> omega_;
};

// One chunk of one tensor. A thread accesses vectors of 16 bytes of the values and the same number
// of elements of Ω, which may be more or fewer bytes (4 bytes of codes for float32 values). A warp
// still reads one contiguous range, and every fetched byte is used.
template <class Op, class Stored>
class Chunk {
  using T = typename Op::Value;
  using A = typename Op::A;
  static constexpr int kVector = kVectorBytes / sizeof(T);

 public:
  __device__ Chunk(const TableOf<Op, Stored>& table, int tensor, int chunk) {
    const int64_t begin = static_cast<int64_t>(chunk - table.first_chunk[tensor]) * kChunk;
    const int64_t left = table.numel[tensor] - begin;
    size_ = static_cast<int>(left < kChunk ? left : kChunk);
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      streams_[s] = static_cast<char*>(table.data[s][tensor]) + begin * width(s);
    }
    if constexpr (in_codes<Stored>) {
      static_assert(kChunk % kScaleBlock == 0, "a chunk begins where a block does");
      scales_ = table.scales[tensor] + begin / kScaleBlock;
    }
  }

  // Single elements up to the first 16-byte boundary, then vectors, then single elements.
  __device__ A run(const Op& op) const {
    const int head = head_size();
    const int tail = head + (size_ - head) / kVector * kVector;
    return walk<1>(op, 0, head) + walk<kVector>(op, head, tail) + walk<1>(op, tail, size_);
  }

 private:
  __device__ static constexpr int width(int stream) {
    return static_cast<int>(stream == Op::kOmega ? sizeof(Stored) : sizeof(T));
  }
  // What a vector's address must be a multiple of.
  __device__ static constexpr int alignment(int stream) {
    return stream == Op::kOmega ? alignof(Pack<Stored, kVector>) : kVectorBytes;
  }

  // The number of elements before all streams are aligned, or all elements if the streams are never
  // aligned at the same one.
  __device__ int head_size() const {
    const auto phase = reinterpret_cast<uintptr_t>(streams_[Op::kOmega == 0]) % kVectorBytes;
    const int head = static_cast<int>((kVectorBytes - phase) % kVectorBytes / sizeof(T));
    bool aligned = head <= size_;
#pragma unroll
    for (int s = 0; s < Op::kStreams; ++s) {
      aligned &= (reinterpret_cast<uintptr_t>(streams_[s]) + head * width(s)) % alignment(s) == 0;
    }
    return aligned ? head : size_;
  }

  // The elements of [begin, end), N at a time; kUnroll loads precede each computation.
  template <int N>
  __device__ A walk(const Op& op, int begin, int end) const {
    constexpr int kStride = kThreads * N;
    A sum = 0;
    for (int first = begin + static_cast<int>(threadIdx.x) * N; first < end;
         first += kUnroll * kStride) {
      Elements<Op, Stored, N> elements[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kStride < end) {
          elements[u].load(streams_, scales_, first + u * kStride);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (first + u * kStride < end) {
          sum += elements[u].compute(op);
          elements[u].store(streams_, first + u * kStride);
        }
      }
    }
    return sum;
  }

  void* streams_[Op::kStreams];    // to the chunk's first element
  const float* scales_ = nullptr;  // of the chunk's first block, if Ω consists of codes
  int size_;
};

// Tests here, once, whether the call is skipped, so that no loop contains the branch.
template <class Stored, class Op>
__device__ typename Op::A run_chunk(const Op& op, const TableOf<Op, Stored>& table, int tensor,
                                    int chunk) {
  if constexpr (requires { op.skipped; }) {
    if (op.skipped) {
      return Chunk<typename Op::Skipped, Stored>(table, tensor, chunk).run({});
    }
  }
  return Chunk<Op, Stored>(table, tensor, chunk).run(op);
}

// T is the type of the values and Stored that of Ω.
template <template <class> class Operation, class T, class Stored>
__global__ void __launch_bounds__(kThreads)
    chunk_kernel(const __grid_constant__ TableOf<Operation<T>, Stored> table, Operation<T> op,
                 double* partial_sums) {
  const int chunk = static_cast<int>(blockIdx.x), tensor = tensor_of_chunk(table, chunk);
  op.begin();
  if constexpr (requires { op.begin_tensor(0); }) {
    op.begin_tensor(table.place[tensor]);
  }
  const auto sum = run_chunk<Stored>(op, table, tensor, chunk);
  if constexpr (Operation<T>::kSums) {
    const double total = block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) {
      partial_sums[blockIdx.x] = total;
    }
  }
}

}  // namespace mas_ext::cuda
