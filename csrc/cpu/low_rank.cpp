// low_rank_penalty on the CPU: λ/2 Σ Ω∘Δ² with Δ = scale·B·A, and its gradients to A and B.
//
// Blocks of P = B·A are formed in the cache, weighted by Ω and used at once: for the sum, for the
// gradient of the right factor (P∘Ω)ᵀ·left, and for that of the left factor (P∘Ω)·right. Ω is read
// once and nothing of its size is allocated.
//
// Ω is cut into groups × groups parts. Threads share those that add to different elements of the
// gradients, and the order in which an element is added to does not depend on their number.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "multiversion.h"
#include "panels.h"
#include "product_tile.h"
#include "scratch.h"

namespace mas_ext::cpu {
namespace {

constexpr int64_t kBlockRows = 32;
constexpr int64_t kConvertedRows = 8;  // of Ω at a time, if it is not read where it lies
constexpr int64_t kMostColumns = 256, kLeastColumns = 64;  // of a block
constexpr int64_t kPackedElements = 4096;  // of the right factor, where columns allow
constexpr int64_t kLeastGroup = 64;        // rows or columns of a part
constexpr int64_t kFewGroups = 8, kMostGroups = 32, kManyInGroup = 256;
constexpr double kSerialBelow = 2'000'000.0;  // multiplications: about 40 µs of one thread

int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

// The largest up to n.
int64_t power_of_two(int64_t n) {
  return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n)));
}

// How Ω is cut. It depends on the problem alone, so that the number of threads does not change a
// bit.
struct Blocking {
  int64_t groups, group_rows, group_columns, block_columns;

  explicit Blocking(const LowRank& call) {
    const int64_t least = std::min(call.rows, call.columns);
    groups = std::clamp(least / kManyInGroup, kFewGroups, kMostGroups);
    groups = power_of_two(std::max<int64_t>(1, std::min(groups, least / kLeastGroup)));
    block_columns = std::clamp(kPackedElements / call.rank / kLeastColumns * kLeastColumns,
                               kLeastColumns, kMostColumns);
    group_rows = round_up(divide_up(call.rows, groups), kBlockRows);
    group_columns = round_up(divide_up(call.columns, groups), kLeastColumns);
  }
};

// ------------------------------------------------------------------------------------------------
// Ω, and what is done with it
// ------------------------------------------------------------------------------------------------
// A block of Ω, however it is stored, as rows of `width` numbers.
template <class A, class Stored>
MAS_MULTIVERSION void read_numbers(A* __restrict__ block, const Stored* __restrict__ omega,
                                   int64_t row_stride, int64_t stride, int64_t rows,
                                   int64_t columns, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    read_run<MagnitudeTaken>(block + row * width, omega + row * row_stride, stride, columns, false);
  }
}

MAS_MULTIVERSION void read_codes(float* __restrict__ block, const LowRank& call, int64_t first,
                                 int64_t rows, int64_t columns, int64_t width) {
  const auto* codes = static_cast<const uint8_t*>(call.omega);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t place = first + row * call.row_stride + column * call.column_stride;
      block[row * width + column] =
          dequantize(codes[place], call.omega_scales[place / kScaleBlock]);
    }
  }
}

template <class A>
void read_omega(A* block, const LowRank& call, int64_t first, int64_t rows, int64_t columns,
                int64_t width) {
  const auto read = [&]<class Stored>(const Stored*) {
    read_numbers(block, static_cast<const Stored*>(call.omega) + first, call.row_stride,
                 call.column_stride, rows, columns, width);
  };
  if constexpr (std::is_same_v<A, float>) {
    switch (call.omega_dtype) {
      case ScalarType::Byte: return read_codes(block, call, first, rows, columns, width);
      case ScalarType::BFloat16: return read(static_cast<const BFloat16*>(nullptr));
      default: break;
    }
  }
  read(static_cast<const A*>(nullptr));
}

// P ← Ω∘P, which is the gradient to P but for λ; returns Σ Ω∘P². Rows are whole lanes wide.
template <class A>
MAS_MULTIVERSION double weigh(A* __restrict__ products, const A* __restrict__ omega,
                              int64_t omega_stride, int64_t rows, int64_t width) {
  double lanes[kLanes] = {};
  for (int64_t row = 0; row < rows; ++row, products += width, omega += omega_stride) {
    for (int64_t i = 0; i < width; i += kLanes) {
      A energies[kLanes];  // apart from the sum, or the compiler would not vectorise either
      for (int lane = 0; lane < kLanes; ++lane) {
        const A delta = products[i + lane];
        products[i + lane] = omega[i + lane] * delta;
        energies[lane] = products[i + lane] * delta;
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(energies[lane]);
      }
    }
  }
  return sum_of(lanes);
}

// ------------------------------------------------------------------------------------------------
// One thread's share
// ------------------------------------------------------------------------------------------------
template <class Shape, class T>
class Worker {
  using A = typename Shape::A;
  static constexpr int kRows = Shape::kBytes == 64 ? 8 : 4;  // of a tile of two registers' width
  static constexpr int kNarrowRows = 8;                      // of one
  static constexpr int kWidth = Shape::kColumns, kNarrow = Shape::kLanes;
  static_assert(kBlockRows % kNarrowRows == 0 && kLeastColumns % kWidth == 0);

 public:
  Worker(const LowRank& call, const Blocking& blocking, double lambda)
      : call_(call),
        blocking_(blocking),
        coefficient_(finite<A>(lambda * call.scale * call.scale)),
        padded_(round_up(call.rank, kNarrowRows)),
        narrow_(kNarrow >= kTileRows && call.rank <= kNarrow),
        left_(kBlockRows * padded_),
        right_(blocking.block_columns * call.rank),
        turned_(call.has_grads() ? blocking.block_columns * round_up(call.rank, rank_width()) : 0),
        omega_(kConvertedRows * blocking.block_columns),
        products_(kBlockRows * blocking.block_columns) {}

  // Adds a part's share to the gradients, and returns its Σ Ω∘P².
  double run(int64_t row_group, int64_t column_group) {
    const int64_t row = row_group * blocking_.group_rows;
    const int64_t column = column_group * blocking_.group_columns;
    const int64_t row_end = std::min(row + blocking_.group_rows, call_.rows);
    const int64_t column_end = std::min(column + blocking_.group_columns, call_.columns);
    double energy = 0;
    for (column_ = column; column_ < column_end; column_ += blocking_.block_columns) {
      columns_ = std::min(blocking_.block_columns, column_end - column_);
      pack_right();
      for (row_ = row; row_ < row_end; row_ += kBlockRows) {
        rows_ = std::min(kBlockRows, row_end - row_);
        energy += run_block();
      }
    }
    return energy;
  }

 private:
  int rank_width() const { return narrow_ ? kNarrow : kWidth; }

  // Panels [rank, kWidth] of columns, and turned around [column, rank_width] of ranks.
  void pack_right() {
    const LowRankFactor& factor = call_.right;
    const T* data = static_cast<const T*>(factor.data) + column_ * factor.stride;
    for (int64_t column = 0; column < columns_; column += kWidth) {
      pack_panel<MagnitudeTaken, kWidth>(right_.get() + column * call_.rank,
                                         data + column * factor.stride, factor.stride,
                                         factor.rank_stride, columns_ - column, call_.rank, false);
    }
    if (call_.has_grads()) {
      narrow_ ? turn<kNarrow>(data) : turn<kWidth>(data);
    }
  }

  template <int Width>
  void turn(const T* data) {
    if constexpr (Width >= kTileRows) {
      for (int64_t k = 0; k < call_.rank; k += Width) {
        pack_panel<MagnitudeTaken, Width>(
            turned_.get() + k * columns_, data + k * call_.right.rank_stride,
            call_.right.rank_stride, call_.right.stride, call_.rank - k, columns_, false);
      }
    }
  }

  // Rows of `padded_` elements.
  void pack_left() {
    const LowRankFactor& factor = call_.left;
    const T* data = static_cast<const T*>(factor.data) + row_ * factor.stride;
    for (int64_t row = 0; row < kBlockRows; ++row) {
      A* to = left_.get() + row * padded_;
      const int64_t count = row < rows_ ? call_.rank : 0;
      read_run<MagnitudeTaken>(to, data + row * factor.stride, factor.rank_stride, count, false);
      std::fill(to + count, to + padded_, A(0));
    }
  }

  double run_block() {
    width_ = round_up(columns_, std::max<int64_t>(kWidth, kLanes));
    pack_left();
    multiply();
    const double energy = weigh_block();
    if (call_.has_grads()) {
      add_to_right();
      narrow_ ? add_to_left<kNarrowRows, 1>() : add_to_left<kRows, 2>();
    }
    return energy;
  }

  // The rows of Ω below the block are fetched tile by tile, since their runs are too short for the
  // processor to foresee.
  void fetch_below(int64_t row, int64_t column) const {
    constexpr int64_t kLine = 64;
    const int64_t bytes = bytes_of(call_.omega_dtype);
    const int64_t first = row_ + kBlockRows + row, end = std::min(first + kRows, call_.rows);
    for (int64_t below = first; call_.column_stride == 1 && below < end; ++below) {
      const auto* run = static_cast<const char*>(call_.omega) +
                        (below * call_.row_stride + column_ + column) * bytes;
      for (int64_t at = 0; at < kWidth * bytes; at += kLine) {
        prefetch(run + at);
      }
    }
  }

  // P = left·rightᵀ.
  void multiply() {
    for (int64_t column = 0; column < columns_; column += kWidth) {
      for (int64_t row = 0; row < rows_; row += kRows) {
        product_tile<Shape, kRows, 2>({left_.get() + row * padded_, padded_, 1},
                                      right_.get() + column * call_.rank, kWidth, call_.rank, A(1),
                                      products_.get() + row * width_ + column, width_);
        fetch_below(row, column);
      }
    }
  }

  double weigh_block() {
    double energy = 0;
    for (int64_t row = 0; row < rows_; row += kConvertedRows) {
      energy += weigh_rows(row, std::min(kConvertedRows, rows_ - row));
    }
    return energy;
  }

  double weigh_rows(int64_t row, int64_t rows) {
    A* products = products_.get() + row * width_;
    const int64_t first = (row_ + row) * call_.row_stride + column_ * call_.column_stride;
    if (call_.omega_dtype == accumulate_dtype(call_.dtype) && call_.column_stride == 1 &&
        columns_ == width_) {
      const A* omega = static_cast<const A*>(call_.omega) + first;
      return weigh(products, omega, call_.row_stride, rows, width_);
    }
    read_omega(omega_.get(), call_, first, rows, columns_, width_);
    clear_padding(omega_.get(), rows);
    clear_padding(products, rows);
    return weigh(products, omega_.get(), width_, rows, width_);
  }

  // What is beyond the last column has no Ω, and would be NaN beside an infinite factor.
  void clear_padding(A* block, int64_t rows) const {
    for (int64_t row = 0; row < rows; ++row) {
      std::fill(block + row * width_ + columns_, block + (row + 1) * width_, A(0));
    }
  }

  // [rank, column] += coefficient·leftᵀ·(Ω∘P)
  void add_to_right() {
    const LowRankFactor& factor = call_.right;
    for (int64_t column = 0; column < columns_; column += kWidth) {
      for (int64_t k = 0; k < call_.rank; k += kRows) {
        alignas(64) A increment[kRows * kWidth];
        product_tile<Shape, kRows, 2>({left_.get() + k, 1, padded_}, products_.get() + column,
                                      width_, rows_, coefficient_, increment, kWidth);
        add_tile<kWidth>(static_cast<A*>(factor.grad) + (column_ + column) * factor.grad_stride +
                             k * factor.grad_rank_stride,
                         factor.grad_rank_stride, factor.grad_stride, increment,
                         std::min<int64_t>(kRows, call_.rank - k),
                         std::min<int64_t>(kWidth, columns_ - column));
      }
    }
  }

  // [row, rank] += coefficient·(Ω∘P)·right
  template <int Rows, int Vectors>
  void add_to_left() {
    constexpr int kRanks = Vectors * Shape::kLanes;
    const LowRankFactor& factor = call_.left;
    for (int64_t k = 0; k < call_.rank; k += kRanks) {
      for (int64_t row = 0; row < rows_; row += Rows) {
        alignas(64) A increment[Rows * kRanks];
        product_tile<Shape, Rows, Vectors>({products_.get() + row * width_, width_, 1},
                                           turned_.get() + k * columns_, kRanks, columns_,
                                           coefficient_, increment, kRanks);
        add_tile<kRanks>(static_cast<A*>(factor.grad) + (row_ + row) * factor.grad_stride +
                             k * factor.grad_rank_stride,
                         factor.grad_stride, factor.grad_rank_stride, increment,
                         std::min<int64_t>(Rows, rows_ - row),
                         std::min<int64_t>(kRanks, call_.rank - k));
      }
    }
  }

  const LowRank& call_;
  const Blocking& blocking_;
  const A coefficient_;
  const int64_t padded_;
  const bool narrow_;  // whether one register holds all ranks
  Scratch<A> left_, right_, turned_, omega_, products_;
  int64_t row_ = 0, column_ = 0, rows_ = 0, columns_ = 0, width_ = 0;  // of the current block
};

// ------------------------------------------------------------------------------------------------
// All of it
// ------------------------------------------------------------------------------------------------
// Into a power of two, as the order of parts in `run` wants it.
int64_t threads_for(const LowRank& call, const Blocking& blocking) {
  const double work = static_cast<double>(call.rows) * static_cast<double>(call.columns) *
                      static_cast<double>(call.rank);
  const int64_t threads = work < kSerialBelow ? 1 : torch::stable::get_num_threads();
  return power_of_two(std::min(threads, blocking.groups));
}

// The part of row group g and column group g^t comes t-th, for its rows as for its columns. With as
// many threads, each of `threads` steps is a range of t, and each thread's share a range of g.
template <class Shape, class T>
double run(const LowRank& call, double lambda) {
  const Blocking blocking(call);
  const int64_t groups = blocking.groups, threads = threads_for(call, blocking);
  const int64_t each = groups / threads;
  std::vector<double> energies(static_cast<size_t>(groups * groups));
  for (int64_t step = 0; step < groups; step += each) {
    const auto run_parts = [&](int64_t first, int64_t last) {
      Worker<Shape, T> worker(call, blocking, lambda);
      for (int64_t share = first * each; share < last * each; share += each) {
        for (int64_t t = step; t < step + each; ++t) {
          for (int64_t row = share; row < share + each; ++row) {
            energies[static_cast<size_t>(row * groups + (row ^ t))] = worker.run(row, row ^ t);
          }
        }
      }
    };
    if (threads == 1) {
      run_parts(0, 1);
    } else {
      torch::stable::parallel_for(0, threads, 1, run_parts);
    }
  }
  return std::accumulate(energies.begin(), energies.end(), 0.0);
}

// A gradient in 16 bits is summed in float32 and rounded once.
template <class T, class A>
class Sums {
 public:
  Sums(LowRankFactor& factor, int64_t size, int64_t rank)
      : factor_(factor), original_(factor), size_(size), rank_(rank), sums_(size * rank) {
    std::fill_n(sums_.get(), size * rank, A(0));
    factor.grad = sums_.get();
    factor.grad_stride = rank;
    factor.grad_rank_stride = 1;
  }

  void add_to_original() {
    for (int64_t i = 0; i < size_; ++i) {
      for (int64_t k = 0; k < rank_; ++k) {
        T& grad = static_cast<T*>(
            original_.grad)[i * original_.grad_stride + k * original_.grad_rank_stride];
        grad = static_cast<T>(static_cast<A>(grad) + sums_.get()[i * rank_ + k]);
      }
    }
    factor_ = original_;
  }

 private:
  LowRankFactor& factor_;
  const LowRankFactor original_;
  const int64_t size_, rank_;
  Scratch<A> sums_;
};

template <class Shape, class T>
double run_and_round(LowRank call, double lambda) {
  using A = typename Shape::A;
  if constexpr (!std::is_same_v<T, A>) {
    if (call.has_grads() && call.grad_dtype == call.dtype) {
      Sums<T, A> left(call.left, call.rows, call.rank), right(call.right, call.columns, call.rank);
      const double energy = run<Shape, T>(call, lambda);
      left.add_to_original();
      right.add_to_original();
      return energy;
    }
  }
  return run<Shape, T>(call, lambda);
}

struct Kernels : CpuKernels {
  static Tensor low_rank_penalty(const Call&, const LowRank& problem, double lambda) {
    const double energy = problem.is_empty() ? 0.0 : visit_dtype(problem.dtype, [&]<class T>() {
      using A = accumulate_t<T>;
      switch (register_bytes()) {
        case 64: return run_and_round<TileShape<A, 64>, T>(problem, lambda);
        case 32: return run_and_round<TileShape<A, 32>, T>(problem, lambda);
        default: return run_and_round<TileShape<A, 16>, T>(problem, lambda);
      }
    });
    return penalty_of(lambda, problem.scale * problem.scale * energy,
                      accumulate_dtype(problem.dtype));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  m.impl("low_rank_penalty", TORCH_BOX(&low_rank_penalty<Kernels>));
  m.impl("low_rank_penalty_grad_", TORCH_BOX(&low_rank_penalty_grad_<Kernels>));
}

}  // namespace mas_ext::cpu
