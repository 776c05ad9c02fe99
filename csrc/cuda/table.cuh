// Where the tensors of a call lie: tables of pointers, passed by value, so that a captured CUDA
// graph holds them and no copy is ever in flight.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../entry.h"
#include "../numbers.h"

namespace mas_ext::cuda {

constexpr int64_t kChunk = 8192;    // elements a block; fixed, so sums do not depend on the grid
constexpr int kTableBytes = 28672;  // kernel parameters hold 32,764 bytes from CUDA 12.1 on

// Tensors of one dtype. Chunks are numbered through all of them; no chunk spans two tensors.
template <size_t Streams>
struct Table {
  static constexpr int kCapacity = kTableBytes / (8 * static_cast<int>(Streams) + 16);
  void* data[Streams][kCapacity];
  int64_t numel[kCapacity];
  int place[kCapacity];            // in the call's lists
  int first_chunk[kCapacity + 1];  // of each tensor; behind the last, the number of chunks
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

// Fills a table with the entries of one dtype, from `next` on, until it or the grid is full.
template <size_t Streams>
void fill(Table<Streams>& table, const std::vector<Entry<Streams>>& entries, ScalarType dtype,
          size_t& next) {
  int64_t chunks = 0;
  table.tensors = 0;
  for (; next < entries.size() && table.tensors < Table<Streams>::kCapacity; ++next) {
    const Entry<Streams>& entry = entries[next];
    if (entry.dtype != dtype) {
      continue;
    }
    if (chunks + chunks_in(entry.numel) > INT_MAX) {
      break;
    }
    for (size_t s = 0; s < Streams; ++s) {
      table.data[s][table.tensors] = entry.data[s];
    }
    table.numel[table.tensors] = entry.numel;
    table.place[table.tensors] = static_cast<int>(entry.index);
    table.first_chunk[table.tensors++] = static_cast<int>(chunks);
    chunks += chunks_in(entry.numel);
  }
  table.first_chunk[table.tensors] = static_cast<int>(chunks);
}

// Calls `use.template operator()<T>(table)` with one table after another: each holds as many
// tensors of one dtype as fit, and none is empty.
template <size_t Streams, class Use>
void for_each_table(const std::vector<Entry<Streams>>& entries, Use&& use) {
  for (ScalarType dtype :
       {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    for (size_t next = 0; next < entries.size();) {
      Table<Streams> table;
      fill(table, entries, dtype, next);
      if (table.chunks() > 0) {
        visit_dtype(dtype, [&]<class T>() { use.template operator()<T>(table); });
      }
    }
  }
}

// The tensor that a chunk belongs to: the last one whose first chunk is not beyond it.
template <size_t Streams>
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

}  // namespace mas_ext::cuda
