// Σ Ω∘P² with P = left·rightᵀ, and its gradients: making a problem, running the kernels on it, and
// what should come out.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <string>
#include <vector>

#include "blocks.h"
#include "csrc/cuda/low_rank.cuh"
#include "judge.h"
#include "program.h"
#include "shim/grid.h"
#include "strided.h"

namespace harness {

using mas_ext::LowRank;
using mas_ext::LowRankFactor;
using mas_ext::cuda::kTile;

struct LowRankSize {
  int64_t rows, columns, rank;
};

// Ω is [row, column]; a factor, as its gradient, [row or column, rank].
struct LowRankLayouts {
  const char* name;
  Layout omega, left, right;
};

enum class Spoilt { kLeft, kRight, kOmega };

struct LowRankCase {
  LowRankSize size;
  LowRankLayouts layouts;
  bool has_grads = true;
  bool wide_grads = false;  // in the type that is computed in
  double lambda = 0.7, scale = 0.6;
  Where where = Where::kHost;
  float spoilt = 0;  // a value that an element of `where_spoilt` gets; if not 0
  Spoilt where_spoilt = Spoilt::kLeft;
};

// ================================================================================================
// Tensors, and the call that csrc/operators.h makes of them
// ================================================================================================
template <class T, class Kept, class Memory = Buffer>
struct LowRankProblem {
  using A = accumulate_t<T>;
  Strided<Kept, Memory> omega;
  Buffer scales;  // a float for every block of codes
  Strided<T, Memory> left, right, grad_left, grad_right;
  Strided<A, Memory> wide_left, wide_right;  // gradients in the type that is computed in

  explicit LowRankProblem(const LowRankCase& c)
      : omega(c.layouts.omega, {c.size.rows, c.size.columns}),
        scales(4 * scales_of(std::is_same_v<Kept, uint8_t> ? c.size.rows * c.size.columns : 0), 0),
        left(c.layouts.left, {c.size.rows, c.size.rank}),
        right(c.layouts.right, {c.size.columns, c.size.rank}),
        grad_left(c.layouts.left, {c.size.rows, c.size.rank}),
        grad_right(c.layouts.right, {c.size.columns, c.size.rank}),
        wide_left(c.layouts.left, {c.size.rows, c.size.rank}),
        wide_right(c.layouts.right, {c.size.columns, c.size.rank}) {}

  void fill(const LowRankCase& c, uint64_t seed) {
    Random random(seed);
    for (size_t i = 0; i < scales.size() / 4; ++i) {
      scales.as<float>()[i] = static_cast<float>(0.1 + 2 * random.uniform());
    }
    omega.each([&](int64_t i, int64_t j, int64_t) {
      const bool is_zero = random.below(4) == 0;
      if constexpr (std::is_same_v<Kept, uint8_t>) {
        omega.at(i, j) = static_cast<uint8_t>(is_zero ? 0 : random.below(256));
      } else {
        omega.at(i, j) = static_cast<Kept>(is_zero ? 0 : 2 * random.uniform());
      }
    });
    for (auto* values : {&left, &right, &grad_left, &grad_right}) {
      values->each([&](int64_t i, int64_t k, int64_t) {
        values->at(i, k) = static_cast<T>(random.normal());
      });
    }
    for (auto* values : {&wide_left, &wide_right}) {
      values->each([&](int64_t i, int64_t k, int64_t) {
        values->at(i, k) = static_cast<A>(random.normal());
      });
    }
    spoil(c);
  }

  LowRank call(const LowRankCase& c) const {
    LowRank call{omega.data(),
                 scales.as<float>(),
                 omega.strides()[0],
                 omega.strides()[1],
                 factor(left, c, grad_left, wide_left),
                 factor(right, c, grad_right, wide_right),
                 c.size.rows,
                 c.size.columns,
                 c.size.rank,
                 kDtype<T>,
                 kDtype<Kept>,
                 c.wide_grads ? kDtype<A> : kDtype<T>,
                 c.scale};
    mas_ext::turn_columns_innermost(call);
    return call;
  }

  long double omega_at(int64_t row, int64_t column) const {
    if constexpr (std::is_same_v<Kept, uint8_t>) {
      const auto place = &omega.at(row, column) - omega.data();
      const long double root = omega.at(row, column) / 255.0L;
      return scales.as<float>()[place / kScaleBlock] * root * root;
    } else {
      return wide(omega.at(row, column));
    }
  }

 private:
  // What is infinite in a factor has importance all over its row of Ω, or its column: otherwise it
  // would be NaN whatever the kernel does.
  void spoil(const LowRankCase& c) {
    const auto [rows, columns, rank] = c.size;
    const int64_t row = rows / 2, column = columns - 1;
    if (c.spoilt == 0) {
      return;
    }
    omega.each([&](int64_t i, int64_t j, int64_t) {
      if (c.where_spoilt == Spoilt::kLeft ? i == row : j == column) {
        omega.at(i, j) = static_cast<Kept>(1);
      }
    });
    if (c.where_spoilt == Spoilt::kLeft) {
      left.at(row, rank - 1) = static_cast<T>(c.spoilt);
    } else if (c.where_spoilt == Spoilt::kRight) {
      right.at(column, 0) = static_cast<T>(c.spoilt);
    } else {
      omega.at(row, column) = static_cast<Kept>(c.spoilt);
    }
  }

  static LowRankFactor factor(const Strided<T, Memory>& values, const LowRankCase& c,
                              const Strided<T, Memory>& grad, const Strided<A, Memory>& wide_grad) {
    const auto& strides = c.wide_grads ? wide_grad.strides() : grad.strides();
    void* data = c.wide_grads ? static_cast<void*>(wide_grad.data()) : grad.data();
    return {values.data(), values.strides()[0], values.strides()[1], c.has_grads ? data : nullptr,
            strides[0],    strides[1]};
  }
};

// ================================================================================================
// Running it
// ================================================================================================
// The operator as csrc/cuda/low_rank.cu launches it. A block may touch the elements it owns of what
// is written, and no other.
template <class T, class Kept, class Memory>
class LowRankLaunches {
  using A = accumulate_t<T>;

 public:
  LowRankLaunches(const LowRankProblem<T, Kept, Memory>& problem, const LowRankCase& c,
                  Blocks order = Blocks::kAscending)
      : problem_(problem),
        case_(c),
        call_(problem.call(c)),
        order_(order),
        lambda_(c.lambda, c.where),
        energies_(8 * static_cast<size_t>(call_.is_empty() ? 0 : sums_of_energy(call_)), 0) {}

  bool has_several_blocks() const {
    return !call_.is_empty() && sums_of_energy(call_) * mas_ext::cuda::rank_tiles(call_) *
                                        mas_ext::cuda::row_tiles(call_) >
                                    1;
  }

  A run() const {
    if (!call_.is_empty()) {
      run_tiles(call_, energies_.as<double>());
      if (call_.has_grads()) {
        LowRank transposed = call_;
        mas_ext::transpose(transposed);
        run_tiles(transposed, nullptr);
      }
    }
    return finish<A>(energies_, lambda_);
  }

 private:
  static int64_t sums_of_energy(const LowRank& call) {
    return mas_ext::cuda::column_tiles(call) * mas_ext::cuda::parts_of(call);
  }

  void run_tiles(const LowRank& call, double* energies) const {
    const int count = mas_ext::cuda::parts_of(call);
    const int64_t size = call.has_grads() ? call.rank * call.columns : 0;
    const Buffer sums(sizeof(A) * static_cast<size_t>(count * size), 0);
    const mas_ext::cuda::LowRankParts parts{count, sums.as<void>()};
    const auto blocks = static_cast<unsigned>(mas_ext::cuda::column_tiles(call) * count *
                                              mas_ext::cuda::rank_tiles(call));
    close_grads();
    simt::run(
        {order_of(order_, blocks), [&](unsigned b) { open_tile(call, sums, energies, count, b); }},
        kThreads, [&] { mas_ext::cuda::low_rank_kernel<A>(call, parts, energies); });
    sums.open();
    energies_.open();
    if (size > 0) {
      add(call, parts, size);
    }
    for_each_grad([](const auto& memory) { memory.open(); });
  }

  void add(const LowRank& call, const mas_ext::cuda::LowRankParts& parts, int64_t size) const {
    const auto open = [&](unsigned b) {
      close_grads();
      const int64_t first = int64_t{b} * kThreads;
      for (int64_t i = first; i < std::min(first + kThreads, size); ++i) {
        open_grad(call, i % call.columns * call.right.grad_stride +
                            i / call.columns * call.right.grad_rank_stride);
      }
    };
    const auto blocks = static_cast<unsigned>((size + kThreads - 1) / kThreads);
    simt::run({order_of(order_, blocks), open}, kThreads,
              [&] { mas_ext::cuda::add_low_rank<A>(call, parts, lambda_.scalar()); });
  }

  // The block's ranks and columns of the sums of its part, and its sum of the energy.
  void open_tile(const LowRank& call, const Buffer& sums, const double* energies, int count,
                 unsigned block) const {
    const int64_t across = mas_ext::cuda::column_tiles(call), tile = block % across;
    const int64_t part = block / across % count, ranks = block / across / count;
    sums.close();
    energies_.close();
    if (energies != nullptr && ranks == 0) {
      energies_.open(8 * static_cast<size_t>(part * across + tile), 8);
    }
    constexpr int64_t kRanks = mas_ext::cuda::kBlockRanks;
    for (int64_t k = ranks * kRanks; k < std::min((ranks + 1) * kRanks, call.rank); ++k) {
      const int64_t column = tile * kTile, end = std::min(column + kTile, call.columns);
      if (call.has_grads()) {
        sums.open(sizeof(A) * static_cast<size_t>((part * call.rank + k) * call.columns + column),
                  sizeof(A) * static_cast<size_t>(end - column));
      }
    }
  }

  void open_grad(const LowRank& call, int64_t place) const {
    const size_t bytes = case_.wide_grads ? sizeof(A) : sizeof(T);
    for_each_grad([&](const auto& memory) {
      if (memory.template as<void>() == call.right.grad) {
        memory.open(bytes * static_cast<size_t>(place), bytes);
      }
    });
  }

  void close_grads() const {
    for_each_grad([](const auto& memory) { memory.close(); });
  }

  template <class Visit>
  void for_each_grad(Visit visit) const {
    visit(problem_.grad_left.memory());
    visit(problem_.grad_right.memory());
    visit(problem_.wide_left.memory());
    visit(problem_.wide_right.memory());
  }

  const LowRankProblem<T, Kept, Memory>& problem_;
  const LowRankCase& case_;
  const LowRank call_;
  const Blocks order_;
  const Strength lambda_;
  const Buffer energies_;
};

// On a device nothing is known of shared memory when a block begins. Here it is NaN.
template <class T>
void soil_low_rank_memory() {
  using A = accumulate_t<T>;
  const Layout row_major{"", {1, 0}};
  const LowRankCase c{.size = {kTile, kTile, mas_ext::cuda::kRanks},
                      .layouts = {"", row_major, row_major, row_major}};
  LowRankProblem<T, A> problem(c);
  for (auto* values : {&problem.left, &problem.right}) {
    values->each([&](int64_t i, int64_t k, int64_t) { values->at(i, k) = static_cast<T>(NAN); });
  }
  LowRankLaunches<T, A, Buffer>(problem, c).run();
}

// ================================================================================================
// Judging it
// ================================================================================================
template <class T, class Kept, class Memory>
class LowRankOracle {
 public:
  LowRankOracle(Program& program, const LowRankProblem<T, Kept, Memory>& before,
                const LowRankCase& c)
      : program_(program), before_(before), case_(c) {
    for (int64_t i = 0; i < c.size.rows; ++i) {
      for (int64_t j = 0; j < c.size.columns; ++j) {
        const Exact delta = product(i, j);
        const long double weight = before.omega_at(i, j);
        weighted_.push_back(weight * delta);
        energy_ += weight * delta.value * delta.value;
        energy_bound_ += 2 * std::abs(weight * delta.value) * delta.magnitude;
      }
    }
  }

  template <class A>
  void check_value(A value) const {
    const long double half = strength() / 2;
    const long double bound = (kSum<A> * std::abs(energy_) + kTolerance * energy_bound_) * half;
    program_.expect(within(value, half * energy_, bound + kSmallest<A>, kLargest<A>),
                    "value %.9g is not %.9Lg", static_cast<double>(value), half * energy_);
  }

  // `grads` of the left factor, or of the right one, from what they were.
  template <class G>
  void check_grads(const G& grads, const G& originals, bool of_left) const {
    const auto& other = of_left ? before_.right : before_.left;
    originals.each([&](int64_t i, int64_t k, int64_t) {
      Exact sum = {};
      for (int64_t j = 0; j < other.sizes()[0]; ++j) {
        const Exact& weighted = of_left ? at(i, j) : at(j, i);
        const long double factor = wide(other.at(j, k));
        sum = sum + factor * weighted;
      }
      const Exact wanted = term(wide(originals.at(i, k))) + strength() * sum;
      program_.expect(near(grads.at(i, k), wanted, kTolerance),
                      "gradient of the %s factor, %" PRId64 ", rank %" PRId64 ": %.9g is not %.9Lg",
                      of_left ? "left" : "right", i, k, static_cast<double>(grads.at(i, k)),
                      wanted.value);
    });
  }

 private:
  static constexpr long double kTolerance = std::is_same_v<T, double> ? 1e-14L : 3e-6L;

  long double strength() const {
    const long double lambda = Strength(case_.lambda, case_.where).value();
    return lambda * case_.scale * case_.scale;
  }

  Exact product(int64_t i, int64_t j) const {
    Exact sum = {};
    for (int64_t k = 0; k < case_.size.rank; ++k) {
      sum = sum + term(wide(before_.left.at(i, k)) * wide(before_.right.at(j, k)));
    }
    return sum;
  }
  const Exact& at(int64_t row, int64_t column) const {
    return weighted_[static_cast<size_t>(row * case_.size.columns + column)];
  }

  Program& program_;
  const LowRankProblem<T, Kept, Memory>& before_;
  const LowRankCase& case_;
  std::vector<Exact> weighted_;
  long double energy_ = 0, energy_bound_ = 0;
};

}  // namespace harness
