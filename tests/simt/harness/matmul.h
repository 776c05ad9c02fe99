// Ω[p,d] += scale·Σ_b |Σ_t left[b,t,p]·right[b,t,d]|: making a problem, running the kernel on it,
// and what should come out.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "csrc/cuda/abs_matmul.cuh"
#include "program.h"
#include "shim/grid.h"
#include "strided.h"

namespace harness {

using mas_ext::AbsMatmul;
using mas_ext::Factor;
using mas_ext::ScalarType;
using mas_ext::cuda::kTile;

struct Size {
  int64_t samples, positions, rows, columns;
};

// Ω is [row, column]; a factor [sample, position, row or column].
struct Layouts {
  const char* name;
  Layout omega, left, right;
};

struct MatmulCase {
  Size size;
  Layouts layouts;
  double scale = 0.6;
  float spoilt = 0;  // a value that two elements of the factors get; if not 0
};

// ================================================================================================
// Tensors, and the call that csrc/abs_matmul_arguments.h makes of them
// ================================================================================================
template <class T, class Memory = Buffer>
struct Problem {
  using A = accumulate_t<T>;
  Strided<A, Memory> omega;
  Strided<T, Memory> left, right;

  explicit Problem(const MatmulCase& c)
      : omega(c.layouts.omega, {c.size.rows, c.size.columns}),
        left(c.layouts.left, {c.size.samples, c.size.positions, c.size.rows}),
        right(c.layouts.right, {c.size.samples, c.size.positions, c.size.columns}) {}

  void fill(uint64_t seed, float spoilt) {
    Random random(seed);
    omega.each([&](auto... i) { omega.at(i...) = static_cast<A>(random.uniform()); });
    left.each([&](auto... i) { left.at(i...) = static_cast<T>(random.normal()); });
    right.each([&](auto... i) { right.at(i...) = static_cast<T>(random.normal()); });
    if (spoilt != 0) {
      left.at(left.sizes()[0] / 2, left.sizes()[1] / 2, left.sizes()[2] / 2) = spoilt;
      right.at(right.sizes()[0] - 1, 0, right.sizes()[2] - 1) = spoilt;
    }
  }

  AbsMatmul call(double scale) const {
    const auto factor = [](const Strided<T, Memory>& f) {
      return Factor{f.data(), f.strides()[0], f.strides()[1], f.strides()[2]};
    };
    AbsMatmul call{omega.data(),
                   omega.strides()[0],
                   omega.strides()[1],
                   factor(left),
                   factor(right),
                   left.sizes()[0],
                   left.sizes()[1],
                   omega.sizes()[0],
                   omega.sizes()[1],
                   ScalarType::Undefined,
                   scale,
                   false};
    mas_ext::turn_columns_innermost(call);
    mas_ext::turn_samples_into_positions(call);
    return call;
  }
};

// ================================================================================================
// Running it
// ================================================================================================
inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

// What the block of a tile may write: its tile.
template <class A, class Memory>
void open_tile(const Strided<A, Memory>& omega, const AbsMatmul& call, unsigned block) {
  const int64_t first_row = block / tiles(call.columns) * kTile;
  const int64_t first_column = block % tiles(call.columns) * kTile;
  omega.memory().close();
  for (int64_t r = first_row; r < std::min(first_row + kTile, call.rows); ++r) {
    for (int64_t c = first_column; c < std::min(first_column + kTile, call.columns); ++c) {
      omega.memory().open(
          sizeof(A) * static_cast<size_t>(r * call.row_stride + c * call.column_stride), sizeof(A));
    }
  }
}

// As csrc/cuda/abs_matmul.cu.
template <class T, class Memory>
void launch(const Problem<T, Memory>& problem, double scale, bool descending) {
  const AbsMatmul call = problem.call(scale);
  if (call.is_empty()) {
    return;
  }
  const auto blocks = static_cast<unsigned>(tiles(call.rows) * tiles(call.columns));
  simt::Launch grid{blocks, {}, [&](unsigned b) { open_tile(problem.omega, call, b); }};
  for (unsigned b = 0; b < blocks; ++b) {
    grid.blocks.push_back(descending ? blocks - 1 - b : b);
  }
  simt::run(grid, mas_ext::cuda::TileFor<T>::kThreads,
            [&] { mas_ext::cuda::abs_matmul_kernel<T>(call); });
  problem.omega.memory().open();
}

inline const Layout kRowMajor{"row major", {1, 0}}, kContiguous{"contiguous", {2, 1, 0}};

// On a device nothing is known of shared memory when a block begins. Here it is NaN.
template <class T>
void soil_shared_memory() {
  const MatmulCase c{{2, mas_ext::cuda::kSlots, kTile, kTile},
                     {"", kRowMajor, kContiguous, kContiguous}};
  Problem<T> problem(c);
  problem.left.each([&](auto... i) { problem.left.at(i...) = static_cast<T>(NAN); });
  problem.right.each([&](auto... i) { problem.right.at(i...) = static_cast<T>(NAN); });
  launch(problem, 1.0, false);
}

// ================================================================================================
// Judging it
// ================================================================================================
template <class T, class Memory>
Exact exact(const Problem<T, Memory>& before, double scale, int64_t row, int64_t column) {
  const auto wide = [](auto x) { return static_cast<long double>(static_cast<double>(x)); };
  long double sum = 0, magnitude = 0;
  for (int64_t b = 0; b < before.left.sizes()[0]; ++b) {
    long double product = 0;
    for (int64_t t = 0; t < before.left.sizes()[1]; ++t) {
      const long double term =
          wide(before.left.at(b, t, row)) * wide(before.right.at(b, t, column));
      product += term;
      magnitude += std::abs(term);
    }
    sum += std::abs(product);
  }
  const long double omega = wide(before.omega.at(row, column));
  return {omega + scale * sum, omega + scale * magnitude};
}

template <class T, class Memory>
void check_omega(Program& program, const Problem<T, Memory>& before,
                 const Problem<T, Memory>& after, double scale) {
  constexpr long double kTolerance = std::is_same_v<T, double> ? 1e-14L : 3e-6L;
  before.omega.each([&](int64_t row, int64_t column, int64_t) {
    const Exact wanted = exact(before, scale, row, column);
    const auto actual = after.omega.at(row, column);
    program.expect(near(actual, wanted, kTolerance),
                   "row %" PRId64 ", column %" PRId64 ": %.9g is not %.9Lg", row, column,
                   static_cast<double>(actual), wanted.value);
  });
}

}  // namespace harness
