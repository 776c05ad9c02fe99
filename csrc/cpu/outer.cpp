// accumulate_outer_ on the CPU: Ω[p,d] += scale·Σ_b f(Σ_t left[b,t,p]·right[b,t,d]), where f(x) is
// |x| or x².
//
// A matrix product whose inner dimension is (sample, position), with the magnitude taken at the end
// of each sample. It is blocked and packed like an ordinary product, by groups of samples. Every
// element of Ω is summed in the same order for any blocks, so the number of threads does not change
// a bit.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"
#include "multiversion.h"
#include "outer_tile.h"
#include "panels.h"
#include "scratch.h"

namespace mas_ext::cpu {
namespace {

// (sample, position) pairs packed at a time, and the rows and columns of Ω they are packed for. In
// float32 the panels take 768 KB, which fits in an L2 cache.
constexpr int64_t kDepth = 256, kBlockRows = 256, kBlockColumns = 512;
// Smaller blocks would give work to more threads, but packing would take longer than multiplying.
constexpr int64_t kLeastRows = 64, kLeastColumns = 128;
constexpr int64_t kTasksPerThread = 2;        // balances the load
constexpr double kSerialBelow = 2'000'000.0;  // multiplications: about 40 µs of one thread

// The size of about equal blocks of whole tiles, at most `most`.
int64_t even_size(int64_t n, int64_t most, int64_t tile) {
  return divide_up(divide_up(n, divide_up(n, most)), tile) * tile;
}

// How Ω is divided into blocks, one per task, and the samples into groups.
struct Blocking {
  int64_t rows, columns, row_blocks, column_blocks;
  int64_t group, part;  // samples and positions packed at a time

  Blocking(const Outer& call, int64_t tile_columns, int64_t least_tasks)
      : group(std::min(call.samples, std::max<int64_t>(1, kDepth / call.positions))),
        part(even_size(call.positions, kDepth, 1)) {
    int64_t most_rows = kBlockRows, most_columns = kBlockColumns;
    cut(call, most_rows, most_columns, tile_columns);
    while (tasks() < least_tasks && (most_rows > kLeastRows || most_columns > kLeastColumns)) {
      const bool cut_columns =
          most_rows <= kLeastRows || (columns >= rows && most_columns > kLeastColumns);
      (cut_columns ? most_columns : most_rows) /= 2;
      cut(call, most_rows, most_columns, tile_columns);
    }
  }

  int64_t tasks() const { return row_blocks * column_blocks; }

 private:
  void cut(const Outer& call, int64_t most_rows, int64_t most_columns, int64_t tile_columns) {
    rows = even_size(call.rows, most_rows, kTileRows);
    columns = even_size(call.columns, most_columns, tile_columns);
    row_blocks = divide_up(call.rows, rows);
    column_blocks = divide_up(call.columns, columns);
  }
};

// Panels of Width rows, each with the positions of all samples.
template <class Magnitude, int Width, class A, class T>
void pack(A* panels, const T* data, const Factor& factor, int64_t n, int64_t samples,
          int64_t positions, bool magnitudes) {
  for (int64_t row = 0; row < n; row += Width) {
    for (int64_t sample = 0; sample < samples; ++sample, panels += Width * positions) {
      pack_panel<Magnitude, Width>(
          panels, data + row * factor.row_stride + sample * factor.sample_stride, factor.row_stride,
          factor.position_stride, n - row, positions, magnitudes);
    }
  }
}

// One thread's share: blocks of Ω, with buffers for all of them.
template <class Magnitude, class Shape, class T>
class Worker {
  using A = typename Shape::A;
  static constexpr int kColumns = Shape::kColumns;

 public:
  Worker(const Outer& call, const Blocking& blocking)
      : call_(call),
        blocking_(blocking),
        left_(blocking.group * blocking.part * blocking.rows),
        right_(blocking.group * blocking.part * blocking.columns),
        carry_(blocking.part < call.positions ? blocking.rows * blocking.columns : 0) {}

  void run(int64_t task) {
    row_ = task / blocking_.column_blocks * blocking_.rows;
    column_ = task % blocking_.column_blocks * blocking_.columns;
    rows_ = std::min(blocking_.rows, call_.rows - row_);
    columns_ = std::min(blocking_.columns, call_.columns - column_);
    for (int64_t sample = 0; sample < call_.samples; sample += blocking_.group) {
      const int64_t samples = std::min(blocking_.group, call_.samples - sample);
      for (int64_t position = 0; position < call_.positions; position += blocking_.part) {
        const int64_t positions = std::min(blocking_.part, call_.positions - position);
        pack<Magnitude, kTileRows>(left_.get(), start(call_.left, row_, sample, position),
                                   call_.left, rows_, samples, positions, call_.magnitudes);
        pack<Magnitude, kColumns>(right_.get(), start(call_.right, column_, sample, position),
                                  call_.right, columns_, samples, positions, call_.magnitudes);
        // If all factors are magnitudes, a part of a sample counts as a sample.
        multiply(samples, positions, call_.magnitudes || position == 0,
                 call_.magnitudes || position + positions == call_.positions);
      }
    }
  }

 private:
  static const T* start(const Factor& factor, int64_t row, int64_t sample, int64_t position) {
    return static_cast<const T*>(factor.data) + row * factor.row_stride +
           sample * factor.sample_stride + position * factor.position_stride;
  }

  // Multiplies what is packed, for every tile of the block. A panel of the left stays in the L1
  // cache while the panels of the right pass.
  void multiply(int64_t samples, int64_t positions, bool first, bool last) {
    SamplePart<A> part{carry_.get(), first, last};
    const auto multiply_tile =
        call_.magnitudes ? outer_tile<MagnitudeTaken, Shape> : outer_tile<Magnitude, Shape>;
    for (int64_t row = 0; row < rows_; row += kTileRows) {
      for (int64_t column = 0; column < columns_; column += kColumns) {
        alignas(64) A increment[kTileRows * kColumns];
        multiply_tile(left_.get() + row * samples * positions,
                      right_.get() + column * samples * positions, samples, positions, part,
                      finite<A>(call_.scale), increment);
        if (last) {
          add_to_omega(row, column, increment);
        }
        part.carry += kTileRows * kColumns;
      }
    }
  }

  void add_to_omega(int64_t row, int64_t column, const A* increment) const {
    A* omega = static_cast<A*>(call_.omega) + (row_ + row) * call_.row_stride +
               (column_ + column) * call_.column_stride;
    add_tile<kColumns>(omega, call_.row_stride, call_.column_stride, increment,
                       std::min<int64_t>(kTileRows, rows_ - row),
                       std::min<int64_t>(kColumns, columns_ - column));
  }

  const Outer& call_;
  const Blocking& blocking_;
  Scratch<A> left_, right_, carry_;
  int64_t row_ = 0, column_ = 0, rows_ = 0, columns_ = 0;  // of the current block
};

template <class Magnitude, class Shape, class T>
void run(const Outer& call) {
  const double work = static_cast<double>(call.samples) * static_cast<double>(call.positions) *
                      static_cast<double>(call.rows) * static_cast<double>(call.columns);
  const int64_t threads = work < kSerialBelow ? 1 : torch::stable::get_num_threads();
  const Blocking blocking(call, Shape::kColumns, threads == 1 ? 1 : kTasksPerThread * threads);
  const auto run_tasks = [&](int64_t first, int64_t last) {
    Worker<Magnitude, Shape, T> worker(call, blocking);
    for (int64_t task = first; task < last; ++task) {
      worker.run(task);
    }
  };
  if (threads == 1) {
    run_tasks(0, blocking.tasks());
  } else {
    torch::stable::parallel_for(0, blocking.tasks(), 1, run_tasks);
  }
}

struct Kernels : CpuKernels {
  template <class Magnitude>
  static void accumulate_outer(Magnitude, const Call&, Outer problem) {
    turn_samples_into_positions(problem);  // they are packed in the accumulation type
    visit_dtype(problem.dtype, [&]<class T>() {
      using A = accumulate_t<T>;
      switch (register_bytes()) {
        case 64: return run<Magnitude, TileShape<A, 64>, T>(problem);
        case 32: return run<Magnitude, TileShape<A, 32>, T>(problem);
        default: return run<Magnitude, TileShape<A, 16>, T>(problem);
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  m.impl("accumulate_outer_", TORCH_BOX(&accumulate_outer_<Kernels>));
}

}  // namespace mas_ext::cpu
