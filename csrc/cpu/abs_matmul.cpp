// accumulate_abs_matmul_ on the CPU: Ω[p,d] += scale·Σ_b |Σ_t left[b,t,p]·right[b,t,d]|.
//
// A matrix product whose inner dimension is (sample, position), with the magnitude taken wherever
// a sample ends: blocked and packed as one, a group of samples at a time. Every element of Ω is
// formed in one order whatever the blocks, so the number of threads does not change a bit.
#include "../abs_matmul.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>

#include "abs_tile.h"
#include "multiversion.h"
#include "panels.h"

namespace mas_ext::cpu {
namespace {

constexpr int64_t kDepth = 256;  // (sample, position) pairs packed at a time
// Up to this many positions the sums of magnitudes are worth registers of their own: a tile of
// one unit. Beyond, they are touched seldom enough to be spilled.
constexpr int64_t kFewPositions = 8;
constexpr int64_t kBlockRows = 256, kBlockColumns = 512;  // of Ω: with kDepth, panels that fit L2
constexpr int64_t kLeastRows = 64, kLeastColumns = 128;   // less would repack more than it shares
constexpr int64_t kTasksPerThread = 4;                    // evens out what the threads get
constexpr int64_t kSerialBelow = 1 << 21;                 // multiplications: about 40 µs

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Blocks of about equal size, whole tiles.
int64_t even_size(int64_t n, int64_t most, int64_t tile) {
  return divide_up(divide_up(n, divide_up(n, most)), tile) * tile;
}

struct Blocking {
  int64_t rows, columns;  // of Ω in a block
  int64_t group, part;    // samples, and positions of each, packed at a time
  int64_t row_blocks, column_blocks;

  Blocking(const AbsMatmul& call, int64_t row_tile, int64_t column_tile, int64_t least_tasks) {
    part = even_size(call.positions, kDepth, 1);
    group = std::min(call.samples, std::max<int64_t>(1, kDepth / call.positions));
    int64_t most_rows = kBlockRows, most_columns = kBlockColumns;
    for (;;) {
      rows = even_size(call.rows, most_rows, row_tile);
      columns = even_size(call.columns, most_columns, column_tile);
      row_blocks = divide_up(call.rows, rows);
      column_blocks = divide_up(call.columns, columns);
      if (row_blocks * column_blocks >= least_tasks) {
        return;
      }
      if (columns >= rows && most_columns > kLeastColumns) {
        most_columns /= 2;
      } else if (most_rows > kLeastRows) {
        most_rows /= 2;
      } else if (most_columns > kLeastColumns) {
        most_columns /= 2;
      } else {
        return;
      }
    }
  }

  int64_t tasks() const { return row_blocks * column_blocks; }
};

template <class A>
struct Scratch {
  explicit Scratch(int64_t size)
      : data(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), kAlignment))) {}
  ~Scratch() { ::operator delete(data, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  static constexpr std::align_val_t kAlignment{64};
  A* data;
};

// Panels of Width rows, each with the positions of all samples.
template <int Width, class A, class T>
void pack(A* panels, const T* data, const Factor& factor, int64_t n, int64_t samples,
          int64_t positions, bool absolute) {
  for (int64_t row = 0; row < n; row += Width) {
    for (int64_t sample = 0; sample < samples; ++sample, panels += Width * positions) {
      pack_panel<Width>(panels, data + row * factor.row_stride + sample * factor.sample_stride,
                        factor.row_stride, factor.position_stride, n - row, positions, absolute);
    }
  }
}

// One thread's share: blocks of Ω, with buffers that serve them all.
template <class Shape, class T>
class Worker {
  using A = typename Shape::A;
  static constexpr int kColumns = Shape::kColumns;

 public:
  Worker(const AbsMatmul& call, const Blocking& blocking)
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
      for (int64_t position = 0; position < call_.positions; position += blocking_.part) {
        run_panels(sample, position);
      }
    }
  }

 private:
  void run_panels(int64_t sample, int64_t position) {
    const int64_t samples = std::min(blocking_.group, call_.samples - sample);
    const int64_t positions = std::min(blocking_.part, call_.positions - position);
    pack<kUnit>(left_.data, start(call_.left, row_, sample, position), call_.left, rows_, samples,
                positions, call_.absolute);
    pack<kColumns>(right_.data, start(call_.right, column_, sample, position), call_.right,
                   columns_, samples, positions, call_.absolute);
    // Where all terms are magnitudes, a part of a sample counts as a sample.
    SamplePart<A> part{carry_.data, call_.absolute || position == 0,
                       call_.absolute || position + positions == call_.positions};
    for (int64_t row = 0; row < rows_;) {
      const bool full = call_.positions > kFewPositions && rows_ - row > kUnit;
      const int64_t height = full ? Shape::kUnits * kUnit : kUnit;
      const auto tile = full ? abs_tile<Shape, Shape::kUnits> : abs_tile<Shape, 1>;
      for (int64_t column = 0; column < columns_; column += kColumns) {
        alignas(64) A increment[Shape::kUnits * kUnit * kColumns];
        tile(left_.data + row * samples * positions, right_.data + column * samples * positions,
             samples, positions, part, finite<A>(call_.scale), increment);
        if (part.last) {
          add_to_omega(row, column, std::min(height, rows_ - row), increment);
        }
        part.carry += height * kColumns;
      }
      row += height;
    }
  }

  static const T* start(const Factor& factor, int64_t row, int64_t sample, int64_t position) {
    return static_cast<const T*>(factor.data) + row * factor.row_stride +
           sample * factor.sample_stride + position * factor.position_stride;
  }

  void add_to_omega(int64_t row, int64_t column, int64_t rows, const A* increment) const {
    A* omega = static_cast<A*>(call_.omega) + (row_ + row) * call_.row_stride +
               (column_ + column) * call_.column_stride;
    add_tile<kColumns>(omega, call_.row_stride, call_.column_stride, increment, rows,
                       std::min<int64_t>(kColumns, columns_ - column));
  }

  const AbsMatmul& call_;
  const Blocking& blocking_;
  Scratch<A> left_, right_, carry_;
  int64_t row_ = 0, column_ = 0, rows_ = 0, columns_ = 0;  // of the block at hand
};

template <class Shape, class T>
void run(const AbsMatmul& call) {
  const double work = static_cast<double>(call.samples) * static_cast<double>(call.positions) *
                      static_cast<double>(call.rows) * static_cast<double>(call.columns);
  const int64_t threads = work < kSerialBelow ? 1 : torch::stable::get_num_threads();
  const int64_t least_tasks = threads == 1 ? 1 : kTasksPerThread * threads;
  const Blocking blocking(call, Shape::kUnits * kUnit, Shape::kColumns, least_tasks);
  const auto run_tasks = [&](int64_t first, int64_t last) {
    Worker<Shape, T> worker(call, blocking);
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

void accumulate_abs_matmul_(const Tensor& omega, const Tensor& left, const Tensor& right,
                            double scale) {
  const AbsMatmul call = prepare_abs_matmul("accumulate_abs_matmul_", omega, left, right, scale);
  if (call.is_empty()) {
    return;
  }
  visit_dtype(call.dtype, [&]<class T>() {
    using A = accumulate_t<T>;
    has_wide_registers() ? run<WideTile<A>, T>(call) : run<NarrowTile<A>, T>(call);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  m.impl("accumulate_abs_matmul_", TORCH_BOX(&accumulate_abs_matmul_));
}

}  // namespace mas_ext::cpu
