// Lists of tensors as the operators get them, and running an operation on one.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "blocks.h"
#include "csrc/cuda/multi_tensor.cuh"
#include "memory.h"
#include "numbers.h"
#include "operations.h"
#include "shim/grid.h"

namespace harness {

using mas_ext::Entry;
using mas_ext::ScalarType;
using mas_ext::visit_dtype;
using mas_ext::cuda::kChunk;
using mas_ext::cuda::kThreads;
using mas_ext::cuda::Table;

// The elements that lie in front of each role's tensor, beyond a 64-byte boundary.
using Ahead = std::array<int64_t, kRoles>;

struct Shape {
  ScalarType dtype;
  int64_t numel;
  Ahead ahead = {};
};

inline size_t width(ScalarType dtype, Role role) {
  const ScalarType held = role == kOmegaRole ? mas_ext::accumulate_dtype(dtype) : dtype;
  return visit_dtype(held, []<class T>() { return sizeof(T); });
}

// One tensor of every role, of moments as many as there are.
struct Parameter {
  Shape shape;
  size_t place;
  std::vector<Buffer> of;  // by role

  Parameter(const Shape& s, size_t at, size_t moments) : shape(s), place(at) {
    for (size_t role = 0; role < kFirst + moments; ++role) {
      const size_t bytes = width(s.dtype, static_cast<Role>(role));
      of.emplace_back(static_cast<size_t>(s.numel) * bytes,
                      static_cast<size_t>(s.ahead[role]) * bytes);
    }
  }

  template <class T>
  Values values(int64_t i) const {
    const auto wide = [](auto x) { return static_cast<long double>(static_cast<double>(x)); };
    Values values{{wide(of[kOmegaRole].as<accumulate_t<T>>()[i])}, place};
    for (size_t role = kGrad; role < of.size(); ++role) {
      values.of[role] = wide(of[role].as<T>()[i]);
    }
    return values;
  }
};

using List = std::vector<Parameter>;

// Ω ≥ 0, with a quarter of exact zeros, as a network with dead units has; second moments are
// positive.
template <class T>
void fill(const Parameter& parameter, Random& random) {
  for (int64_t i = 0; i < parameter.shape.numel; ++i) {
    const double omega = random.below(4) == 0 ? 0 : 2 * random.uniform();
    parameter.of[kOmegaRole].as<accumulate_t<T>>()[i] = static_cast<accumulate_t<T>>(omega);
    for (const Role role : {kGrad, kParam, kAnchor}) {
      parameter.of[role].as<T>()[i] = static_cast<T>(4 * random.uniform() - 2);
    }
    for (size_t role = kFirst; role < parameter.of.size(); ++role) {
      const double value = 4 * random.uniform() - 2;
      parameter.of[role].as<T>()[i] = static_cast<T>(role == kSecond ? value * value + 0.1 : value);
    }
  }
}

inline List make_list(const std::vector<Shape>& shapes, uint64_t seed, size_t moments) {
  Random random(seed);
  List list;
  for (const Shape& shape : shapes) {
    list.emplace_back(shape, list.size(), moments);
    visit_dtype(shape.dtype, [&]<class T>() { fill<T>(list.back(), random); });
  }
  return list;
}

// A chunk of one tensor, in the order of partial sums: dtype after dtype, tensor after tensor.
struct Piece {
  size_t parameter;
  int64_t begin, end;
};

inline std::vector<Piece> pieces_of(const List& list) {
  std::vector<Piece> pieces;
  for (const ScalarType dtype :
       {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    for (size_t p = 0; p < list.size(); ++p) {
      const int64_t numel = list[p].shape.dtype == dtype ? list[p].shape.numel : 0;
      for (int64_t begin = 0; begin < numel; begin += kChunk) {
        pieces.push_back({p, begin, std::min(begin + kChunk, numel)});
      }
    }
  }
  return pieces;
}

// All that the block of a piece may touch.
inline void open_piece(const List& list, const std::vector<Piece>& pieces, size_t index,
                       const Buffer& partial) {
  for (const Parameter& parameter : list) {
    for (const Buffer& buffer : parameter.of) {
      buffer.close();
    }
  }
  const Piece& piece = pieces[index];
  const Parameter& parameter = list[piece.parameter];
  for (size_t role = 0; role < parameter.of.size(); ++role) {
    const size_t bytes = width(parameter.shape.dtype, static_cast<Role>(role));
    parameter.of[role].open(static_cast<size_t>(piece.begin) * bytes,
                            static_cast<size_t>(piece.end - piece.begin) * bytes);
  }
  partial.close();
  partial.open(8 * index, 8);
}

inline void open_all(const List& list, const Buffer& partial) {
  for (const Parameter& parameter : list) {
    for (const Buffer& buffer : parameter.of) {
      buffer.open();
    }
  }
  partial.open();
}

// Moments that an operation has, of its arguments.
template <class Operation>
constexpr size_t kMoments = static_cast<size_t>(
    std::ranges::count_if(Operation::roles, [](Role r) { return r >= kFirst; }));

template <class Operation>
auto entries_of(const List& list) {
  std::vector<Entry<Operation::roles.size()>> entries;
  for (const Parameter& parameter : list) {
    auto& entry = entries.emplace_back();
    entry.numel = parameter.shape.numel, entry.dtype = parameter.shape.dtype;
    entry.index = static_cast<int64_t>(parameter.place);
    for (size_t s = 0; s < Operation::roles.size(); ++s) {
      entry.data[s] = parameter.of[Operation::roles[s]].template as<void>();
    }
  }
  return entries;
}

// What an operator launches ahead of the kernel that walks its lists.
template <class Operation>
void prepare(const Told& told, size_t tensors) {
  if constexpr (requires { Operation::prepare(told, tensors); }) {
    Operation::prepare(told, tensors);
  }
}

// As csrc/cuda/launch.cuh: a launch a table, the partial sums of one behind those of the other. A
// block may touch its own piece of every tensor and its own partial sum, and nothing else.
template <class Operation>
void run(const List& list, const Told& told, const Buffer& partial, Blocks blocks) {
  const auto pieces = pieces_of(list);
  double* sums = Operation::sums ? partial.as<double>() : nullptr;
  size_t first = 0;
  prepare<Operation>(told, list.size());
  mas_ext::cuda::for_each_table(entries_of<Operation>(list), [&]<class T>(const auto& table) {
    const auto count = static_cast<unsigned>(table.chunks());
    const auto open = [&](unsigned b) { open_piece(list, pieces, first + b, partial); };
    const auto operation = Operation::template make<T>(told);
    simt::run({count, order_of(blocks, count), open}, kThreads, [&] {
      mas_ext::cuda::chunk_kernel<Operation::template Operation, T>(table, operation, sums);
    });
    first += count;
    sums += Operation::sums ? count : 0;
    open_all(list, partial);
  });
}

}  // namespace harness
