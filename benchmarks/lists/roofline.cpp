// What memory allows: the reads and writes of one fused pass, with arithmetic that costs nothing.
// One parallel region over all tensors, every thread with an equal share of the elements. Each loop
// adds `factor` times what it reads; a factor of zero, which the compiler cannot know, leaves the
// values as they are, so that any number of rounds does the same work.
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

// Calls pass(tensor, first, last) for this thread's share of the elements.
template <class Pass>
void for_each_range(const int64_t* sizes, int64_t count, int threads, Pass pass) {
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
        pass(i, first, last);
      }
    }
  }
}

void pass2(float* __restrict__ out, const float* __restrict__ a, int64_t size, float factor) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] += factor * a[i];
  }
}

void pass3(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b,
           int64_t size, float factor) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] += factor * (a[i] + b[i]);
  }
}

void pass4(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b,
           const float* __restrict__ c, int64_t size, float factor) {
  for (int64_t i = 0; i < size; ++i) {
    out[i] += factor * (a[i] + b[i] + c[i]);
  }
}

void pass5(float* __restrict__ out, float* __restrict__ second, const float* __restrict__ a,
           const float* __restrict__ b, const float* __restrict__ c, int64_t size, float factor) {
  for (int64_t i = 0; i < size; ++i) {
    const float sum = factor * (a[i] + b[i] + c[i]);
    out[i] += sum;
    second[i] += sum;
  }
}

void pass6(float* __restrict__ out, float* __restrict__ second, float* __restrict__ third,
           const float* __restrict__ a, const float* __restrict__ b, const float* __restrict__ c,
           int64_t size, float factor) {
  for (int64_t i = 0; i < size; ++i) {
    const float sum = factor * (a[i] + b[i] + c[i]);
    out[i] += sum;
    second[i] += sum;
    third[i] += sum;
  }
}

}  // namespace

// 12 bytes an element: two streams read, the first written.
extern "C" void stream2(float* const* const* streams, const int64_t* sizes, int64_t count,
                        float factor, int threads) {
  for_each_range(sizes, count, threads, [=](int64_t i, int64_t first, int64_t last) {
    pass2(streams[0][i] + first, streams[1][i] + first, last - first, factor);
  });
}

// 16 bytes an element: three streams read, the first written.
extern "C" void stream3(float* const* const* streams, const int64_t* sizes, int64_t count,
                        float factor, int threads) {
  for_each_range(sizes, count, threads, [=](int64_t i, int64_t first, int64_t last) {
    pass3(streams[0][i] + first, streams[1][i] + first, streams[2][i] + first, last - first,
          factor);
  });
}

// 20 bytes an element: four streams read, the first written.
extern "C" void stream4(float* const* const* streams, const int64_t* sizes, int64_t count,
                        float factor, int threads) {
  for_each_range(sizes, count, threads, [=](int64_t i, int64_t first, int64_t last) {
    pass4(streams[0][i] + first, streams[1][i] + first, streams[2][i] + first,
          streams[3][i] + first, last - first, factor);
  });
}

// 28 bytes an element: five streams read, the first two written.
extern "C" void stream5(float* const* const* streams, const int64_t* sizes, int64_t count,
                        float factor, int threads) {
  for_each_range(sizes, count, threads, [=](int64_t i, int64_t first, int64_t last) {
    pass5(streams[0][i] + first, streams[1][i] + first, streams[2][i] + first,
          streams[3][i] + first, streams[4][i] + first, last - first, factor);
  });
}

// 36 bytes an element: six streams read, the first three written.
extern "C" void stream6(float* const* const* streams, const int64_t* sizes, int64_t count,
                        float factor, int threads) {
  for_each_range(sizes, count, threads, [=](int64_t i, int64_t first, int64_t last) {
    pass6(streams[0][i] + first, streams[1][i] + first, streams[2][i] + first,
          streams[3][i] + first, streams[4][i] + first, streams[5][i] + first, last - first,
          factor);
  });
}
