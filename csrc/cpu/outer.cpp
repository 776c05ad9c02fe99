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

// (sample, position) pairs packed at a time, and the most rows and columns of Ω they are packed
// for. In float32 the panels take 768 KB, which fits in an L2 cache.
constexpr int64_t kDepth = 256, kMostRows = 256, kMostColumns = 512;
constexpr int64_t kLeastRows = 16, kLeastColumns = 64;  // of a block, where there are as many
constexpr int64_t kPacking = 20;              // multiplications in the time of packing a number
constexpr double kSerialBelow = 2'000'000.0;  // multiplications: about 40 µs of one thread

// Rows or columns in blocks of whole tiles, whose sizes differ by at most a tile.
struct Division {
  int64_t size, tile, blocks;

  int64_t tiles() const { return divide_up(size, tile); }
  int64_t most() const { return divide_up(tiles(), blocks) * tile; }
  int64_t most_blocks(int64_t least) const { return std::max(blocks, size / least); }
  int64_t begin(int64_t block) const { return block * tiles() / blocks * tile; }
  int64_t length(int64_t block) const { return std::min(size, begin(block + 1)) - begin(block); }
};

// How Ω is divided into blocks, one per task, and the samples into groups.
struct Blocking {
  Division rows, columns;
  int64_t group, part;  // samples and positions packed at a time

  Blocking(const Outer& call, int64_t tile_columns, int64_t threads)
      : rows{call.rows, kTileRows, divide_up(call.rows, kMostRows)},
        columns{call.columns, tile_columns, divide_up(call.columns, kMostColumns)},
        group(std::min(call.samples, std::max<int64_t>(1, kDepth / call.positions))),
        part(divide_up(call.positions, divide_up(call.positions, kDepth))) {
    if (threads > 1) {
      divide_among(threads);
    }
  }

  int64_t tasks() const { return rows.blocks * columns.blocks; }

 private:
  // Finds the division that is done first. Smaller blocks balance the load, but take more packing.
  void divide_among(int64_t threads) {
    const Blocking fewest = *this;
    const int64_t most_rows = std::min(rows.most_blocks(kLeastRows), rows.blocks + threads);
    const int64_t most_columns = columns.most_blocks(kLeastColumns);
    Blocking trial = *this;
    for (trial.rows.blocks = fewest.rows.blocks; trial.rows.blocks <= most_rows;
         ++trial.rows.blocks) {
      // As many blocks as all threads do in the fewest rounds, or in one more.
      const int64_t rounds = divide_up(trial.rows.blocks * fewest.columns.blocks, threads);
      for (const int64_t in : {rounds, rounds + 1}) {
        trial.columns.blocks = std::min(in * threads / trial.rows.blocks, most_columns);
        if (trial.time(threads) < time(threads)) {
          *this = trial;
        }
      }
    }
  }

  // Of the thread with the most tasks, in multiplications per position.
  int64_t time(int64_t threads) const {
    const int64_t height = rows.most(), width = columns.most();
    return divide_up(tasks(), threads) * (height * width + kPacking * (height + width));
  }
};

// Rows (or columns), samples and positions that are packed at a time.
struct Part {
  int64_t first_row, rows, first_sample, samples, first_position, positions;
};

// Panels of Width rows, each with the positions of all samples.
template <class Magnitude, class T, int Width, class A>
void pack(A* panels, const Factor& factor, const Part& part, bool magnitudes) {
  const T* data = static_cast<const T*>(factor.data);
  for (int64_t row = 0; row < part.rows; row += Width) {
    for (int64_t sample = 0; sample < part.samples; ++sample, panels += Width * part.positions) {
      const T* from = data + (part.first_sample + sample) * factor.sample_stride;
      if (factor.has_offsets()) {
        gather_panel<Magnitude, Width>(panels, from, factor, part.first_row + row, part.rows - row,
                                       part.first_position, part.positions, magnitudes);
      } else {
        pack_panel<Magnitude, Width>(panels,
                                     from + (part.first_row + row) * factor.row_stride +
                                         part.first_position * factor.position_stride,
                                     factor.row_stride, factor.position_stride, part.rows - row,
                                     part.positions, magnitudes);
      }
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
        left_(blocking.group * blocking.part * blocking.rows.most()),
        right_(blocking.group * blocking.part * blocking.columns.most()),
        carry_(blocking.part < call.positions ? blocking.rows.most() * blocking.columns.most()
                                              : 0) {}

  void run(int64_t task) {
    const int64_t row_block = task / blocking_.columns.blocks;
    const int64_t column_block = task % blocking_.columns.blocks;
    row_ = blocking_.rows.begin(row_block);
    rows_ = blocking_.rows.length(row_block);
    column_ = blocking_.columns.begin(column_block);
    columns_ = blocking_.columns.length(column_block);
    for (int64_t sample = 0; sample < call_.samples; sample += blocking_.group) {
      const int64_t samples = std::min(blocking_.group, call_.samples - sample);
      for (int64_t position = 0; position < call_.positions; position += blocking_.part) {
        const int64_t positions = std::min(blocking_.part, call_.positions - position);
        pack<Magnitude, T, kTileRows>(left_.get(), call_.left,
                                      {row_, rows_, sample, samples, position, positions},
                                      call_.magnitudes);
        pack<Magnitude, T, kColumns>(right_.get(), call_.right,
                                     {column_, columns_, sample, samples, position, positions},
                                     call_.magnitudes);
        // If all factors are magnitudes, a part of a sample counts as a sample.
        multiply(samples, positions, call_.magnitudes || position == 0,
                 call_.magnitudes || position + positions == call_.positions);
      }
    }
  }

 private:
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
    const int64_t rows = std::min<int64_t>(kTileRows, rows_ - row);
    const int64_t columns = std::min<int64_t>(kColumns, columns_ - column);
    A* omega = static_cast<A*>(call_.omega) + (row_ + row) * call_.row_stride;
    if (call_.column_offsets != nullptr) {
      add_tile_at<kColumns>(omega, call_.row_stride, call_.column_offsets + column_ + column,
                            increment, rows, columns);
    } else {
      add_tile<kColumns>(omega + (column_ + column) * call_.column_stride, call_.row_stride,
                         call_.column_stride, increment, rows, columns);
    }
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
  const Blocking blocking(call, Shape::kColumns, threads);
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
