// The roofline: the reads and writes of one fused pass, with arithmetic that costs nothing.
// One parallel region over all tensors; every thread has an equal share of the elements. Each pass
// adds `factor` times the sum of the streams that are only read to the streams that are written. A
// factor of zero, which the compiler can't know, keeps the values, so that every call does the same
// work.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace {

using Streams = float* const* const*;

// Elements [first, last) of tensor i.
template <int kWritten, int... kRead>
void add_sum(Streams streams, int64_t i, int64_t first, int64_t last, float factor,
             std::integer_sequence<int, kRead...>) {
  const float* const __restrict__ read[] = {streams[kWritten + kRead][i]...};
  float* __restrict__ written[kWritten];
  for (int k = 0; k < kWritten; ++k) {
    written[k] = streams[k][i];
  }
#pragma omp simd
  for (int64_t j = first; j < last; ++j) {
    const float sum = factor * (read[kRead][j] + ...);
    for (int k = 0; k < kWritten; ++k) {
      written[k][j] += sum;
    }
  }
}

template <int kWritten, int kRead>
void stream(Streams streams, const int64_t* sizes, int64_t count, float factor, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += sizes[i];
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = total * thread / team, end = total * (thread + 1) / team;
    int64_t offset = 0;
    for (int64_t i = 0; i < count && offset < end; offset += sizes[i++]) {
      const int64_t first = std::max<int64_t>(begin - offset, 0);
      const int64_t last = std::min(end - offset, sizes[i]);
      if (first < last) {
        add_sum<kWritten>(streams, i, first, last, factor,
                          std::make_integer_sequence<int, kRead>());
      }
    }
  }
}

}  // namespace

// Named by the number of streams: all are read, and the first ones are written, too.
#define ROOFLINE(streams, written)                                                      \
  extern "C" void stream##streams(Streams tensors, const int64_t* sizes, int64_t count, \
                                  float factor, int threads) {                          \
    stream<written, streams - written>(tensors, sizes, count, factor, threads);         \
  }
ROOFLINE(2, 1)
ROOFLINE(3, 1)
ROOFLINE(4, 1)
ROOFLINE(5, 2)
ROOFLINE(6, 3)
