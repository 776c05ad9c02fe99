// Σ Ω∘P² with P = left·rightᵀ, and its gradient to the right factor, (Ω∘P)ᵀ·left, with one block
// per tile of columns and part of the rows. Sums have a fixed order and no atomics, so every run
// gives the same bits. The gradient to the left factor is that of the transposed problem, which
// forms P again: adding both up at once would need sums for every tile.
//
// A block goes down its rows, 64 at a time. It forms a tile of P in registers, weighs it, and
// multiplies it, from shared memory, into sums of 16 ranks × 64 columns at a time. For these a
// quarter of its threads is enough, so each quarter takes a quarter of the rows.
//
// Factors and Ω are converted where they are read, so that kernels are compiled for the type they
// compute in, and not for each way to store numbers.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../formulas.h"
#include "../low_rank.h"
#include "../numbers.h"
#include "fma_tile.cuh"
#include "pack.cuh"
#include "reduce.cuh"
#include "scalar.cuh"

namespace mas_ext::cuda {

constexpr int kRanks = 16;     // of the gradient, multiplied at a time
constexpr int kRankTiles = 2;  // of that many, whose sums a block has
constexpr int kBlockRanks = kRanks * kRankTiles;
constexpr int kQuarter = kThreads / 4;
constexpr int kSide = 4;                            // a thread's sums are kSide × kSide
constexpr int kWeights = kTile * kTile / kThreads;  // of a tile of Ω, per thread
static_assert(kRanks / kSide * (kTile / kSide) == kQuarter);

// Calls `function.template operator()<T>()` with the type of factors and gradients.
template <class A, class F>
__device__ void visit_values(ScalarType dtype, F&& function) {
  if constexpr (std::is_same_v<A, double>) {
    function.template operator()<double>();
  } else if (dtype == ScalarType::Float) {
    function.template operator()<float>();
  } else if (dtype == ScalarType::BFloat16) {
    function.template operator()<BFloat16>();
  } else {
    function.template operator()<Half>();
  }
}

// The same with the type that Ω is stored in.
template <class A, class F>
__device__ void visit_stored(ScalarType dtype, F&& function) {
  if constexpr (std::is_same_v<A, double>) {
    function.template operator()<double>();
  } else if (dtype == ScalarType::Float) {
    function.template operator()<float>();
  } else if (dtype == ScalarType::BFloat16) {
    function.template operator()<BFloat16>();
  } else {
    function.template operator()<uint8_t>();
  }
}

template <class A>
struct LowRankShared {
  static constexpr int kPad = kVectorBytes / static_cast<int>(sizeof(A));
  static constexpr int kSlots = 64 / static_cast<int>(sizeof(A));  // ranks of P staged at a time

  struct Product {
    alignas(32) A left[kSlots][kTile + kPad];
    alignas(32) A right[kSlots][kTile + kPad];
  };
  union {
    Product product;                               // [rank][row], [rank][column]
    alignas(32) A gradient[kTile][kRanks + kPad];  // the left factor, [row][rank]
  };
  alignas(32) A weighted[kTile][kTile + kPad];  // Ω∘P, and at last the quarters' sums
};

// The rows are divided into parts, with one block per tile of columns and part, so that there are
// enough blocks. Each writes its sums after those of the previous part, and add_low_rank adds them
// in that order. The sums of all parts take up to a sixteenth of Ω.
struct LowRankParts {
  int count;
  void* sums;  // [count, rank, columns]
};

constexpr int64_t kLowRankBlocks = 512;
constexpr int64_t kRowsOfSums = 16;  // of Ω, for a row of sums

MAS_HOST_DEVICE int64_t column_tiles(const LowRank& call) { return divide_up(call.columns, kTile); }
MAS_HOST_DEVICE int64_t row_tiles(const LowRank& call) { return divide_up(call.rows, kTile); }
inline int64_t rank_tiles(const LowRank& call) {
  return call.has_grads() ? divide_up(call.rank, kBlockRanks) : 1;
}

inline int parts_of(const LowRank& call) {
  const int64_t few = call.rows / (kRowsOfSums * call.rank);
  const int64_t parts = std::min({kLowRankBlocks / (column_tiles(call) * rank_tiles(call)),
                                  call.has_grads() ? few : kLowRankBlocks, row_tiles(call)});
  return static_cast<int>(std::max<int64_t>(parts, 1));
}

// Which tiles a block owns.
struct LowRankBlock {
  int64_t column, rank, part;  // the first column and rank

  __device__ explicit LowRankBlock(const LowRank& call, int parts) {
    const int64_t across = column_tiles(call);
    column = blockIdx.x % across * kTile;
    part = blockIdx.x / across % parts;
    rank = blockIdx.x / across / parts * kBlockRanks;
  }
};

__device__ inline int up_to(int most, int64_t left) {
  return static_cast<int>(left < most ? left : most);
}

// Reads kTile places of a factor and `Ranks` ranks to wherever `put(place, rank)` is; what is
// beyond the factor is zero. Neighbouring threads read neighbours in memory.
template <class A, int Ranks, class Put>
__device__ void stage_ranks(const LowRankFactor& factor, ScalarType dtype, int64_t first,
                            int64_t size, int64_t first_rank, int64_t rank, Put put) {
  constexpr int kEach = kTile * Ranks / kThreads;
  static_assert(kEach * kThreads == kTile * Ranks);
  const bool along_places = factor.stride <= factor.rank_stride;
  const auto place_of = [&](int v) {
    const int i = static_cast<int>(threadIdx.x) + v * kThreads;
    return along_places ? i % kTile : i / Ranks;
  };
  const auto rank_of = [&](int v) {
    const int i = static_cast<int>(threadIdx.x) + v * kThreads;
    return along_places ? i / kTile : i % Ranks;
  };
  const int places = up_to(kTile, size - first), ranks = up_to(Ranks, rank - first_rank);
  const int64_t origin = first * factor.stride + first_rank * factor.rank_stride;
  A values[kEach] = {};
  visit_values<A>(dtype, [&]<class T>() {
#pragma unroll
    for (int v = 0; v < kEach; ++v) {  // all are in flight before the first is stored
      const int place = place_of(v), k = rank_of(v);
      if (place < places && k < ranks) {
        values[v] = static_cast<A>(static_cast<const T*>(
            factor.data)[origin + place * factor.stride + k * factor.rank_stride]);
      }
    }
  });
#pragma unroll
  for (int v = 0; v < kEach; ++v) {
    put(place_of(v), rank_of(v)) = values[v];
  }
}

template <class A, class Stored>
__device__ A omega_at(const LowRank& call, int64_t place) {
  const Stored stored = static_cast<const Stored*>(call.omega)[place];
  if constexpr (std::is_same_v<Stored, uint8_t>) {
    return dequantize(stored, call.omega_scales[place / kScaleBlock]);
  } else {
    return static_cast<A>(stored);
  }
}

// A tile of Ω in registers, which is fetched while P is formed.
template <class A>
class Weights {
 public:
  __device__ Weights(const LowRank& call, int64_t row, int64_t column)
      : along_columns_(call.column_stride <= call.row_stride),
        rows_(up_to(kTile, call.rows - row)),
        columns_(up_to(kTile, call.columns - column)) {
    visit_stored<A>(call.omega_dtype, [&]<class Stored>() {
#pragma unroll
      for (int v = 0; v < kWeights; ++v) {
        if (is_inside(v)) {
          omega_[v] = omega_at<A, Stored>(call, (row + row_of(v)) * call.row_stride +
                                                    (column + column_of(v)) * call.column_stride);
        }
      }
    });
  }

  // P ← Ω∘P, or 0 beyond Ω; returns the thread's share of Σ Ω∘P².
  template <int Pitch>
  __device__ A weigh(A (&products)[kTile][Pitch]) const {
    A energy = A(0);
#pragma unroll
    for (int v = 0; v < kWeights; ++v) {
      A& product = products[row_of(v)][column_of(v)];
      const A delta = is_inside(v) ? product : A(0);
      product = omega_[v] * delta;
      energy += product * delta;
    }
    return energy;
  }

 private:
  __device__ static int place(int v) { return static_cast<int>(threadIdx.x) + v * kThreads; }
  __device__ int row_of(int v) const {
    return along_columns_ ? place(v) / kTile : place(v) % kTile;
  }
  __device__ int column_of(int v) const {
    return along_columns_ ? place(v) % kTile : place(v) / kTile;
  }
  __device__ bool is_inside(int v) const { return row_of(v) < rows_ && column_of(v) < columns_; }

  const bool along_columns_;
  const int rows_, columns_;  // of the tile
  A omega_[kWeights] = {};
};

// P = left·rightᵀ of a tile, to shared memory.
template <class A>
__device__ void form_product(const LowRank& call, int64_t row, int64_t column,
                             LowRankShared<A>& shared) {
  constexpr int kSlots = LowRankShared<A>::kSlots;
  auto& staged = shared.product;
  FmaTile<A, kSide, kSide> tile;
  for (int64_t first = 0; first < call.rank; first += kSlots) {
    __syncthreads();  // every thread is done with what was staged before
    stage_ranks<A, kSlots>(call.left, call.dtype, row, call.rows, first, call.rank,
                           [&](int place, int k) -> A& { return staged.left[k][place]; });
    stage_ranks<A, kSlots>(call.right, call.dtype, column, call.columns, first, call.rank,
                           [&](int place, int k) -> A& { return staged.right[k][place]; });
    __syncthreads();
#pragma unroll 1  // the body is long enough
    for (int slot = 0; slot < kSlots && first + slot < call.rank; ++slot) {
      tile.multiply(staged.left[slot], staged.right[slot]);
    }
  }
  tile.template end_sample<MagnitudeTaken>();
  tile.store(shared.weighted);
}

// Sums of kRanks ranks × kTile columns, over the rows of the thread's quarter.
template <class A>
class RankTile {
 public:
  __device__ void multiply(const LowRankShared<A>& shared) {
#pragma unroll 4
    for (int i = 0; i < kTile / 4; ++i) {
      const int row = quarter() * (kTile / 4) + i;
      const auto left = Pack<A, kSide>::of(&shared.gradient[row][rank()]);
      const auto right = Pack<A, kSide>::of(&shared.weighted[row][column()]);
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
#pragma unroll
        for (int c = 0; c < kSide; ++c) {
          sums_[r][c] += left.get(r) * right.get(c);
        }
      }
    }
  }

  // To rows of shared memory: all ranks of one quarter after those of another.
  template <int Pitch>
  __device__ void store(A (&rows)[kTile][Pitch]) const {
#pragma unroll
    for (int r = 0; r < kSide; ++r) {
#pragma unroll
      for (int c = 0; c < kSide; ++c) {
        rows[quarter() * kRanks + rank() + r][column() + c] = sums_[r][c];
      }
    }
  }

 private:
  __device__ static int in_quarter() { return static_cast<int>(threadIdx.x) % kQuarter; }
  __device__ static int quarter() { return static_cast<int>(threadIdx.x) / kQuarter; }
  __device__ static int rank() { return in_quarter() / (kTile / kSide) * kSide; }
  __device__ static int column() { return in_quarter() % (kTile / kSide) * kSide; }

  A sums_[kSide][kSide] = {};
};

// Writes kRanks ranks of the block's sums, of all four quarters, to those of its part.
template <class A>
__device__ void put_sums(const LowRank& call, const LowRankParts& parts, int64_t part,
                         int64_t first_rank, int64_t first_column, const LowRankShared<A>& shared) {
  auto* sums = static_cast<A*>(parts.sums) + part * call.rank * call.columns;
  for (int i = static_cast<int>(threadIdx.x); i < kRanks * kTile; i += kThreads) {
    const int64_t k = first_rank + i / kTile, column = first_column + i % kTile;
    if (k < call.rank && column < call.columns) {
      A sum = A(0);
      for (int quarter = 0; quarter < 4; ++quarter) {
        sum += shared.weighted[quarter * kRanks + i / kTile][i % kTile];
      }
      sums[k * call.columns + column] = sum;
    }
  }
}

// `energies`: a sum for every tile of columns and part, or nullptr.
template <class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == sizeof(float) ? 2 : 1)
    low_rank_kernel(const __grid_constant__ LowRank call, LowRankParts parts, double* energies) {
  __shared__ LowRankShared<A> shared;
  const LowRankBlock block(call, parts.count);
  const int64_t rows = divide_up(row_tiles(call), parts.count) * kTile;
  const int64_t end = (block.part + 1) * rows < call.rows ? (block.part + 1) * rows : call.rows;
  RankTile<A> sums[kRankTiles];
  double energy = 0;
#pragma unroll 1  // the body is long enough
  for (int64_t row = block.part * rows; row < end; row += kTile) {
    const Weights<A> weights(call, row, block.column);
    form_product(call, row, block.column, shared);
    __syncthreads();
    energy += static_cast<double>(weights.weigh(shared.weighted));
#pragma unroll
    for (int t = 0; t < kRankTiles; ++t) {
      const int64_t rank = block.rank + t * kRanks;
      if (call.has_grads() && rank < call.rank) {
        __syncthreads();  // P is weighed, and nobody reads what was staged before
        stage_ranks<A, kRanks>(call.left, call.dtype, row, call.rows, rank, call.rank,
                               [&](int place, int k) -> A& { return shared.gradient[place][k]; });
        __syncthreads();
        sums[t].multiply(shared);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kRankTiles; ++t) {
    const int64_t rank = block.rank + t * kRanks;
    if (call.has_grads() && rank < call.rank) {
      __syncthreads();  // the sums take the place of P, and of the sums before
      sums[t].store(shared.weighted);
      __syncthreads();
      put_sums(call, parts, block.part, rank, block.column, shared);
    }
  }
  const double total = block_sum(energy);
  if (energies != nullptr && block.rank == 0 && threadIdx.x == 0) {
    energies[block.part * column_tiles(call) + block.column / kTile] =
        call.scale * call.scale * total;
  }
}

// gradient += λ·scale²·Σ parts, with one thread per element.
template <class A>
__global__ void __launch_bounds__(kThreads)
    add_low_rank(const __grid_constant__ LowRank call, LowRankParts parts, Scalar lambda) {
  const int64_t size = call.rank * call.columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) {
    return;
  }
  A sum = A(0);
  for (int part = 0; part < parts.count; ++part) {
    sum += static_cast<const A*>(parts.sums)[part * size + i];
  }
  const A coefficient = finite<A>(lambda.load() * call.scale * call.scale);
  visit_values<A>(call.grad_dtype, [&]<class T>() {
    T& grad = static_cast<T*>(call.right.grad)[i % call.columns * call.right.grad_stride +
                                               i / call.columns * call.right.grad_rank_stride];
    grad = static_cast<T>(static_cast<A>(grad) + coefficient * sum);
  });
}

}  // namespace mas_ext::cuda
