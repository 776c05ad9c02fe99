// Ω[p,d] += scale·Σ_b f(Σ_t left[b,t,p]·right[b,t,d]), where f(x) is |x| or x²: making a problem,
// running the kernel on it, and what should come out.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <functional>
#include <utility>

#include "blocks.h"
#include "csrc/cuda/outer.cuh"
#include "program.h"
#include "shim/grid.h"
#include "strided.h"

namespace harness {

using mas_ext::Factor;
using mas_ext::Outer;
using mas_ext::ScalarType;
using mas_ext::cuda::kThreads;
using mas_ext::cuda::kTile;
using mas_ext::cuda::tiles_of;

struct Size {
  int64_t samples, positions, rows, columns;
};

// Ω is [row, column]; a factor [sample, position, row or column].
struct Layouts {
  const char* name;
  Layout omega, left, right;
};

struct OuterCase {
  Size size;
  Layouts layouts;
  double scale = 0.6;
  float spoilt = 0;          // a value that two elements of the factors get; if not 0
  bool tensor_cores = true;  // for types that have them
  bool square = false;
};

// ================================================================================================
// Tensors, and the call that csrc/operators.h makes of them
// ================================================================================================
template <class T, class Memory = Buffer>
struct Problem {
  using A = accumulate_t<T>;
  Strided<A, Memory> omega;
  Strided<T, Memory> left, right;

  explicit Problem(const OuterCase& c)
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

  Outer call(const OuterCase& c) const {
    const auto factor = [](const Strided<T, Memory>& f) {
      return Factor{f.data(), f.strides()[0], f.strides()[1], f.strides()[2]};
    };
    Outer call{omega.data(),
               omega.strides()[0],
               omega.strides()[1],
               factor(left),
               factor(right),
               left.sizes()[0],
               left.sizes()[1],
               omega.sizes()[0],
               omega.sizes()[1],
               ScalarType::Undefined,
               c.scale,
               false};
    mas_ext::turn_columns_innermost(call);
    mas_ext::with_magnitude(c.square, [&]<class Magnitude>(Magnitude) {
      mas_ext::cuda::turn_samples_where_exact<T, Magnitude>(call);
    });
    return call;
  }
};

// ================================================================================================
// Running it
// ================================================================================================
// What the kernel is on devices that have no tensor cores for T.
template <class T, class Magnitude>
void without_tensor_cores(Outer call, mas_ext::cuda::Parts parts) {
  __shared__ mas_ext::cuda::Shared<T> shared;
  mas_ext::cuda::outer_tile<T, Magnitude, mas_ext::cuda::FmaTile<T>>(call, parts, shared);
}

// The operator as csrc/cuda/outer.cu launches it. A block may touch the elements it owns of
// what is written, and no other.
template <class T, class Memory>
class Launches {
  using A = accumulate_t<T>;

 public:
  Launches(const Problem<T, Memory>& problem, const OuterCase& c, Blocks order = Blocks::kAscending)
      : omega_(problem.omega.memory()),
        call_(problem.call(c)),
        order_(order),
        tensor_cores_(c.tensor_cores),
        square_(c.square) {}

  int64_t blocks() const {
    return call_.is_empty() ? 0 : tiles_of(call_) * mas_ext::cuda::parts_of(call_);
  }

  void run() const {
    if (call_.is_empty()) {
      return;
    }
    const int count = mas_ext::cuda::parts_of(call_);
    if (count == 1) {
      run_tiles({1, nullptr}, [&](unsigned b) { open_tile(omega_, b); });
    } else {
      const Buffer sums(sizeof(A) * static_cast<size_t>(count * elements()), 0);
      const mas_ext::cuda::Parts parts{count, sums.as<void>()};
      omega_.close();
      run_tiles(parts, [&](unsigned b) { open_tile(sums, b); });
      sums.open();
      add(parts);
    }
    omega_.open();
  }

 private:
  using Open = std::function<void(unsigned block)>;

  void run_tiles(const mas_ext::cuda::Parts& parts, const Open& open) const {
    simt::run(grid(blocks(), open), mas_ext::cuda::TileFor<T>::kThreads, [&] {
      mas_ext::with_magnitude(square_, [&]<class Magnitude>(Magnitude) {
        tensor_cores_ ? mas_ext::cuda::outer_kernel<T, Magnitude>(call_, parts)
                      : without_tensor_cores<T, Magnitude>(call_, parts);
      });
    });
  }

  void add(const mas_ext::cuda::Parts& parts) const {
    const auto open = [&](unsigned b) {
      omega_.close();
      const int64_t first = int64_t{b} * kThreads;
      for (int64_t i = first; i < std::min(first + kThreads, elements()); ++i) {
        open_element(omega_, i / call_.columns, i % call_.columns);
      }
    };
    simt::run(grid((elements() + kThreads - 1) / kThreads, open), kThreads,
              [&] { mas_ext::cuda::add_parts<A>(call_, parts); });
  }

  simt::Launch grid(int64_t blocks, const Open& open) const {
    return {order_of(order_, static_cast<unsigned>(blocks)), open};
  }

  // Of Ω, or of the sums of the block's part.
  template <class Written>
  void open_tile(const Written& written, unsigned block) const {
    const int64_t part = block / tiles_of(call_), tile = block % tiles_of(call_);
    const int64_t first_row = tile / tiles_of(call_.columns) * kTile;
    const int64_t first_column = tile % tiles_of(call_.columns) * kTile;
    written.close();
    for (int64_t r = first_row; r < std::min(first_row + kTile, call_.rows); ++r) {
      for (int64_t c = first_column; c < std::min(first_column + kTile, call_.columns); ++c) {
        if (&written == static_cast<const void*>(&omega_)) {
          open_element(omega_, r, c);
        } else {
          open_place(written, part * elements() + r * call_.columns + c);
        }
      }
    }
  }

  void open_element(const Memory& omega, int64_t row, int64_t column) const {
    open_place(omega, row * call_.row_stride + column * call_.column_stride);
  }
  template <class Written>
  static void open_place(const Written& written, int64_t place) {
    written.open(sizeof(A) * static_cast<size_t>(place), sizeof(A));
  }

  int64_t elements() const { return call_.rows * call_.columns; }

  const Memory& omega_;
  const Outer call_;
  const Blocks order_;
  const bool tensor_cores_, square_;
};

inline const Layout kRowMajor{"row major", {1, 0}}, kContiguous{"contiguous", {2, 1, 0}};

// On a device nothing is known of shared memory when a block begins. Here it is NaN.
template <class T>
void soil_shared_memory(bool tensor_cores, bool square) {
  const OuterCase c{.size = {1, mas_ext::cuda::kSlots, kTile, kTile},
                    .layouts = {"", kRowMajor, kContiguous, kContiguous},
                    .tensor_cores = tensor_cores,
                    .square = square};
  Problem<T> problem(c);
  problem.left.each([&](auto... i) { problem.left.at(i...) = static_cast<T>(NAN); });
  problem.right.each([&](auto... i) { problem.right.at(i...) = static_cast<T>(NAN); });
  Launches(problem, c).run();
}

// ================================================================================================
// Judging it
// ================================================================================================
template <class T, class Memory>
Exact exact(const Problem<T, Memory>& before, const OuterCase& c, int64_t row, int64_t column) {
  const auto wide = [](auto x) { return static_cast<long double>(static_cast<double>(x)); };
  long double sum = 0, magnitude = 0;
  for (int64_t b = 0; b < before.left.sizes()[0]; ++b) {
    long double product = 0, terms = 0;
    for (int64_t t = 0; t < before.left.sizes()[1]; ++t) {
      const long double term =
          wide(before.left.at(b, t, row)) * wide(before.right.at(b, t, column));
      product += term;
      terms += std::abs(term);
    }
    sum += c.square ? product * product : std::abs(product);
    magnitude += c.square ? 2 * terms * terms : terms;  // an error in x is doubled in x²
  }
  const long double omega = wide(before.omega.at(row, column));
  return {omega + c.scale * sum, omega + c.scale * magnitude};
}

template <class T, class Memory>
void check_omega(Program& program, const Problem<T, Memory>& before,
                 const Problem<T, Memory>& after, const OuterCase& c) {
  constexpr long double kTolerance = std::is_same_v<T, double> ? 1e-14L : 3e-6L;
  before.omega.each([&](int64_t row, int64_t column, int64_t) {
    const Exact wanted = exact(before, c, row, column);
    const auto actual = after.omega.at(row, column);
    program.expect(near(actual, wanted, kTolerance),
                   "row %" PRId64 ", column %" PRId64 ": %.9g is not %.9Lg", row, column,
                   static_cast<double>(actual), wanted.value);
  });
}

}  // namespace harness
