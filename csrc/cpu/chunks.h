// One parallel region over all tensors of a call, in chunks of a fixed size. Sums are formed per
// chunk and added in chunk order, so no result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../numbers.h"
#include "../tensor_list.h"
#include "stored_omega.h"

namespace mas_ext::cpu {

constexpr int64_t kChunk = 16384;  // elements; five float32 streams of it fit in L2
// Less than this stays in one thread. It is about 40 µs of work, where a second thread saves little
// if its core is idle and costs a time slice if it is not.
constexpr int64_t kSerialBelow = 131072;
constexpr int64_t kSpansPerThread = 4;  // balances the load

template <size_t Streams>
struct Chunk {
  const Entry<Streams>* entry;
  int64_t begin, size;

  template <class T>
  T* stream(size_t which) const {
    return static_cast<T*>(entry->data[which]) + begin;
  }
};

template <size_t Streams>
std::vector<Chunk<Streams>> make_chunks(const FlatList<Streams>& list) {
  std::vector<Chunk<Streams>> chunks;
  chunks.reserve(list.entries().size() + static_cast<size_t>(list.total() / kChunk));
  for (const auto& entry : list.entries()) {
    for (int64_t begin = 0; begin < entry.numel; begin += kChunk) {
      chunks.push_back({&entry, begin, std::min(kChunk, entry.numel - begin)});
    }
  }
  return chunks;
}

// Runs `run(i)` for every chunk, on spans of chunks with about equally many elements.
template <size_t Streams, class Run>
void for_each_chunk(const std::vector<Chunk<Streams>>& chunks, int64_t elements, Run run) {
  if (elements < kSerialBelow) {
    for (size_t i = 0; i < chunks.size(); ++i) {
      run(i);
    }
    return;
  }
  const int64_t spans = kSpansPerThread * torch::stable::get_num_threads();
  std::vector<size_t> bounds{0};
  int64_t seen = 0;
  for (size_t i = 0; i < chunks.size(); ++i) {
    seen += chunks[i].size;
    while (seen * spans >= elements * static_cast<int64_t>(bounds.size())) {
      bounds.push_back(i + 1);
    }
  }
  torch::stable::parallel_for(0, spans, 1, [&](int64_t first, int64_t last) {
    const auto begin = bounds[static_cast<size_t>(first)], end = bounds[static_cast<size_t>(last)];
    for (size_t i = begin; i < end; ++i) {
      run(i);
    }
  });
}

// Runs a kernel over a chunk whose Ω, the last stream, is stored in less than float32.
template <class T, size_t Streams, class ChunkKernel>
double run_converted(const Chunk<Streams>& chunk, const ChunkKernel& kernel) {
  alignas(64) float omega[kConvertedAtOnce];
  double total = 0;
  for (int64_t begin = 0; begin < chunk.size; begin += kConvertedAtOnce) {
    const Chunk<Streams> part{chunk.entry, chunk.begin + begin,
                              std::min(kConvertedAtOnce, chunk.size - begin)};
    to_float32(omega, chunk.entry->data[Streams - 1], chunk.entry->omega_dtype,
               chunk.entry->omega_scales, part.begin, part.size);
    total += kernel.template operator()<T>(part, omega);
  }
  return total;
}

template <class T, size_t Streams, class ChunkKernel>
double run_chunk(const Chunk<Streams>& chunk, const ChunkKernel& kernel) {
  using A = accumulate_t<T>;
  if constexpr (std::is_same_v<A, float>) {
    if (chunk.entry->omega_dtype != ScalarType::Float) {
      return run_converted<T>(chunk, kernel);
    }
  }
  return kernel.template operator()<T>(chunk, chunk.template stream<const A>(Streams - 1));
}

// Calls `kernel.template operator()<T>(chunk, omega)` for every chunk or part of a chunk, with its
// Ω in the accumulation dtype, and returns the sum of the results, in order.
template <size_t Streams, class ChunkKernel>
double sum_over_chunks(const FlatList<Streams>& list, const ChunkKernel& kernel) {
  const auto chunks = make_chunks(list);
  std::vector<double> sums(chunks.size());
  for_each_chunk(chunks, list.total(), [&](size_t i) {
    sums[i] = visit_dtype(chunks[i].entry->dtype,
                          [&]<class T>() { return run_chunk<T>(chunks[i], kernel); });
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace mas_ext::cpu
