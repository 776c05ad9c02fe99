// One parallel region over all tensors of a call, in chunks of a fixed size: sums are formed a
// chunk at a time and added in chunk order, so no result depends on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../numbers.h"
#include "../tensor_list.h"
#include "multiversion.h"

namespace mas_ext::cpu {

constexpr int64_t kChunk = 16384;  // elements; five float32 streams of it fit in L2
// Less than this stays in one thread: about 40 µs of work, in which a second thread saves little
// when its core is idle and costs a time slice when it is not.
constexpr int64_t kSerialBelow = 131072;
constexpr int64_t kSpansPerThread = 4;  // evens out what the threads get
constexpr int kLanes = 16;              // partial sums a chunk keeps: two AVX-512 registers

// Σ term(i) in float64 with a fixed order: element i belongs to lane i mod kLanes, which is what
// lets the compiler keep the lanes in vector registers.
template <class Term>
MAS_ALWAYS_INLINE double sum_in_lanes(int64_t size, Term term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(term(i + lane));
    }
  }
  for (int lane = 0; i + lane < size; ++lane) {
    lanes[lane] += static_cast<double>(term(i + lane));
  }
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

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

// Calls `chunk_kernel.template operator()<T>(chunk)` for every chunk and returns the sum of what
// it gives, in chunk order.
template <size_t Streams, class ChunkKernel>
double sum_over_chunks(const FlatList<Streams>& list, ChunkKernel chunk_kernel) {
  const auto chunks = make_chunks(list);
  std::vector<double> sums(chunks.size());
  for_each_chunk(chunks, list.total(), [&](size_t i) {
    sums[i] = visit_dtype(chunks[i].entry->dtype, [&]<class T>() {
      return chunk_kernel.template operator()<T>(chunks[i]);
    });
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace mas_ext::cpu
