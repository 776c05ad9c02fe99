// The tensors of a call as tables of pointers. They are kernel parameters, so a captured CUDA graph
// holds them and nothing is copied to the device.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../entry.h"
#include "../numbers.h"
#include "omega.cuh"

namespace mas_ext::cuda {

constexpr int64_t kChunk =
    8192;  // elements per block; fixed, so that sums do not depend on the grid
constexpr int kTableBytes = 28672;  // kernel parameters hold 32,764 bytes from CUDA 12.1 on

// Only codes have scales; a table without them holds more tensors.
template <int Capacity, bool Scaled>
struct Scales {};
template <int Capacity>
struct Scales<Capacity, true> {
  const float* scales[Capacity];
};

template <size_t Streams, bool Scaled>
constexpr int kCapacityOf = kTableBytes / (8 * (static_cast<int>(Streams) + Scaled) + 16);

// Tensors of one dtype, whose Ω is stored alike. Chunks are numbered through all of them; no chunk
// spans two tensors.
template <size_t Streams, bool Scaled>
struct Table : Scales<kCapacityOf<Streams, Scaled>, Scaled> {
  static constexpr int kCapacity = kCapacityOf<Streams, Scaled>;
  void* data[Streams][kCapacity];
  int64_t numel[kCapacity];
  int place[kCapacity];            // in the call's lists
  int first_chunk[kCapacity + 1];  // of each tensor; after the last, the number of chunks
  int tensors;

  __host__ __device__ int chunks() const { return first_chunk[tensors]; }
};

inline int64_t chunks_in(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

template <size_t Streams>
int64_t chunks_in(const std::vector<Entry<Streams>>& entries) {
  int64_t chunks = 0;
  for (const auto& entry : entries) {
    chunks += chunks_in(entry.numel);
  }
  return chunks;
}

// What a table's tensors have in common.
struct Kind {
  ScalarType dtype, omega_dtype;
  bool operator==(const Kind&) const = default;
};
inline constexpr Kind kKinds[] = {
    {ScalarType::Float, ScalarType::Float},    {ScalarType::Float, ScalarType::BFloat16},
    {ScalarType::Float, ScalarType::Byte},     {ScalarType::Double, ScalarType::Double},
    {ScalarType::BFloat16, ScalarType::Float}, {ScalarType::BFloat16, ScalarType::BFloat16},
    {ScalarType::BFloat16, ScalarType::Byte},  {ScalarType::Half, ScalarType::Float},
    {ScalarType::Half, ScalarType::BFloat16},  {ScalarType::Half, ScalarType::Byte}};

// Calls `function.template operator()<T, Stored>()` with the types of a kind.
template <class F>
void visit_kind(const Kind& kind, F&& function) {
  visit_dtype(kind.dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) {
      function.template operator()<T, double>();
    } else if (kind.omega_dtype == ScalarType::Float) {
      function.template operator()<T, float>();
    } else if (kind.omega_dtype == ScalarType::BFloat16) {
      function.template operator()<T, BFloat16>();
    } else {
      function.template operator()<T, uint8_t>();
    }
  });
}

// Fills a table with the entries of one kind, from `next` on, until it or the grid is full.
template <size_t Streams, bool Scaled>
void fill(Table<Streams, Scaled>& table, const std::vector<Entry<Streams>>& entries,
          const Kind& kind, size_t& next) {
  int64_t chunks = 0;
  table.tensors = 0;
  for (; next < entries.size() && table.tensors < table.kCapacity; ++next) {
    const Entry<Streams>& entry = entries[next];
    if (entry.dtype != kind.dtype || entry.omega_dtype != kind.omega_dtype) {
      continue;
    }
    if (chunks + chunks_in(entry.numel) > INT_MAX) {
      break;
    }
    for (size_t s = 0; s < Streams; ++s) {
      table.data[s][table.tensors] = entry.data[s];
    }
    if constexpr (Scaled) {
      table.scales[table.tensors] = entry.omega_scales;
    }
    table.numel[table.tensors] = entry.numel;
    table.place[table.tensors] = static_cast<int>(entry.index);
    table.first_chunk[table.tensors++] = static_cast<int>(chunks);
    chunks += chunks_in(entry.numel);
  }
  table.first_chunk[table.tensors] = static_cast<int>(chunks);
}

// Calls `use.template operator()<T, Stored>(table)` with one table after another. T is the type of
// the values and Stored that of Ω. A table holds as many tensors of one kind as fit; none is empty.
template <size_t Streams, class Use>
void for_each_table(const std::vector<Entry<Streams>>& entries, Use&& use) {
  for (const Kind& kind : kKinds) {
    visit_kind(kind, [&]<class T, class Stored>() {
      for (size_t next = 0; next < entries.size();) {
        Table<Streams, in_codes<Stored>> table;
        fill(table, entries, kind, next);
        if (table.chunks() > 0) {
          use.template operator()<T, Stored>(table);
        }
      }
    });
  }
}

// The tensor that a chunk belongs to: the last one whose first chunk is not after it.
template <size_t Streams, bool Scaled>
__device__ int tensor_of_chunk(const Table<Streams, Scaled>& table, int chunk) {
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

}  // namespace mas_ext::cuda
