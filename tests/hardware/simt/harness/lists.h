// Lists of tensors as the operators get them, and running an operation on one.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "blocks.h"
#include "csrc/cuda/multi_tensor.cuh"
#include "memory.h"
#include "numbers.h"
#include "operations.h"
#include "shim/grid.h"

namespace harness {

using mas_ext::Entry;
using mas_ext::kScaleBlock;
using mas_ext::ScalarType;
using mas_ext::visit_dtype;
using mas_ext::cuda::kChunk;
using mas_ext::cuda::Kind;
using mas_ext::cuda::kKinds;
using mas_ext::cuda::kThreads;
using mas_ext::cuda::Table;

// The elements that lie in front of each role's tensor, beyond a 64-byte boundary.
using Ahead = std::array<int64_t, kRoles>;

struct Shape {
  Kind kind;
  int64_t numel;
  Ahead ahead = {};

  bool in_codes() const { return mas_ext::is_codes(kind.omega_dtype); }
};

inline size_t width(const Kind& kind, Role role) {
  if (role == kOmegaRole && mas_ext::is_codes(kind.omega_dtype)) {
    return 1;
  }
  const ScalarType held = role == kOmegaRole ? kind.omega_dtype : kind.dtype;
  return visit_dtype(held, []<class T>() { return sizeof(T); });
}

inline size_t scales_of(int64_t elements) {
  return static_cast<size_t>(elements / kScaleBlock + (elements % kScaleBlock != 0));
}

template <class T>
long double wide(T value) {
  return static_cast<long double>(static_cast<double>(value));
}

// One tensor of every role, of moments as many as there are.
struct Parameter {
  Shape shape;
  size_t place;
  std::vector<Buffer> of;  // by role
  Buffer scales;           // of an Ω in codes, a float for every block

  Parameter(const Shape& s, size_t at, size_t moments)
      : shape(s),
        place(at),
        scales(s.in_codes() ? 4 * scales_of(s.numel) : 0,
               static_cast<size_t>(s.ahead[kOmegaRole]) * 4) {
    for (size_t role = 0; role < kFirst + moments; ++role) {
      const size_t bytes = width(s.kind, static_cast<Role>(role));
      of.emplace_back(static_cast<size_t>(s.numel) * bytes,
                      static_cast<size_t>(s.ahead[role]) * bytes);
    }
  }

  float& scale(int64_t i) const { return scales.as<float>()[i / kScaleBlock]; }

  long double omega(int64_t i) const {
    const Buffer& held = of[kOmegaRole];
    if (shape.in_codes()) {
      const long double root = held.as<uint8_t>()[i] / 255.0L;
      return scale(i) * root * root;
    }
    return visit_dtype(shape.kind.omega_dtype,
                       [&]<class Kept>() { return wide(held.as<Kept>()[i]); });
  }

  // Of codes the largest, with that scale for all of its block; or none.
  void set_omega(int64_t i, double value) const {
    const Buffer& held = of[kOmegaRole];
    if (shape.in_codes()) {
      held.as<uint8_t>()[i] = value == 0 ? 0 : 255;
      scale(i) = value == 0 ? scale(i) : static_cast<float>(value);
    } else {
      visit_dtype(shape.kind.omega_dtype,
                  [&]<class Kept>() { held.as<Kept>()[i] = static_cast<Kept>(value); });
    }
  }

  template <class T>
  Values values(int64_t i) const {
    Values values{{omega(i)}, place};
    for (size_t role = kGrad; role < of.size(); ++role) {
      values.of[role] = wide(of[role].as<T>()[i]);
    }
    return values;
  }
};

using List = std::vector<Parameter>;

// Scales of neighbouring blocks are far apart, and codes are any.
inline void fill_codes(const Parameter& parameter, Random& random) {
  for (int64_t i = 0; i < parameter.shape.numel; ++i) {
    if (i % kScaleBlock == 0) {
      parameter.scale(i) = static_cast<float>(0.1 + 2 * random.uniform());
    }
    const int64_t code = random.below(4) == 0 ? 0 : random.below(256);
    parameter.of[kOmegaRole].as<uint8_t>()[i] = static_cast<uint8_t>(code);
  }
}

// Ω ≥ 0, with a quarter of exact zeros, as a network with dead units has; second moments are
// positive.
template <class T>
void fill(const Parameter& parameter, Random& random) {
  if (parameter.shape.in_codes()) {
    fill_codes(parameter, random);
  }
  for (int64_t i = 0; i < parameter.shape.numel; ++i) {
    if (!parameter.shape.in_codes()) {
      parameter.set_omega(i, random.below(4) == 0 ? 0 : 2 * random.uniform());
    }
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
    visit_dtype(shape.kind.dtype, [&]<class T>() { fill<T>(list.back(), random); });
  }
  return list;
}

// A chunk of one tensor, in the order of partial sums: kind after kind, tensor after tensor.
struct Piece {
  size_t parameter;
  int64_t begin, end;
};

inline std::vector<Piece> pieces_of(const List& list) {
  std::vector<Piece> pieces;
  for (const Kind& kind : kKinds) {
    for (size_t p = 0; p < list.size(); ++p) {
      const int64_t numel = list[p].shape.kind == kind ? list[p].shape.numel : 0;
      for (int64_t begin = 0; begin < numel; begin += kChunk) {
        pieces.push_back({p, begin, std::min(begin + kChunk, numel)});
      }
    }
  }
  return pieces;
}

template <class Visit>
void each_buffer(const List& list, Visit visit) {
  for (const Parameter& parameter : list) {
    for (const Buffer& buffer : parameter.of) {
      visit(buffer);
    }
    visit(parameter.scales);
  }
}

// All that the block of a piece may touch.
inline void open_piece(const List& list, const std::vector<Piece>& pieces, size_t index,
                       const Buffer& partial) {
  each_buffer(list, [](const Buffer& buffer) { buffer.close(); });
  const Piece& piece = pieces[index];
  const Parameter& parameter = list[piece.parameter];
  for (size_t role = 0; role < parameter.of.size(); ++role) {
    const size_t bytes = width(parameter.shape.kind, static_cast<Role>(role));
    parameter.of[role].open(static_cast<size_t>(piece.begin) * bytes,
                            static_cast<size_t>(piece.end - piece.begin) * bytes);
  }
  if (parameter.shape.in_codes()) {
    parameter.scales.open(4 * scales_of(piece.begin), 4 * scales_of(piece.end - piece.begin));
  }
  partial.close();
  partial.open(8 * index, 8);
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
    entry.numel = parameter.shape.numel, entry.dtype = parameter.shape.kind.dtype;
    entry.omega_dtype = parameter.shape.kind.omega_dtype;
    entry.omega_scales = parameter.shape.in_codes() ? parameter.scales.as<float>() : nullptr;
    entry.index = static_cast<int64_t>(parameter.place);
    for (size_t s = 0; s < Operation::roles.size(); ++s) {
      entry.data[s] = parameter.of[Operation::roles[s]].template as<void>();
    }
  }
  return entries;
}

// As csrc/cuda/launch.cuh: a launch a table, the partial sums of one behind those of the other. A
// block may touch its own piece of every tensor and its own partial sum, and nothing else.
template <class Operation>
void run(const List& list, const Told& told, const Buffer& partial, Blocks blocks) {
  const auto pieces = pieces_of(list);
  double* sums = Operation::sums ? partial.as<double>() : nullptr;
  size_t first = 0;
  Operation::prepare(told, list.size());
  const auto entries = entries_of<Operation>(list);
  mas_ext::cuda::for_each_table(entries, [&]<class T, class Kept>(const auto& table) {
    if constexpr (Operation::template runs<T, Kept>) {
      const auto count = static_cast<unsigned>(table.chunks());
      const auto open = [&](unsigned b) { open_piece(list, pieces, first + b, partial); };
      const auto operation = Operation::template make<T>(told);
      simt::run({order_of(blocks, count), open}, kThreads, [&] {
        mas_ext::cuda::chunk_kernel<Operation::template Operation, T, Kept>(table, operation, sums);
      });
      first += count;
      sums += Operation::sums ? count : 0;
      each_buffer(list, [](const Buffer& buffer) { buffer.open(); });
      partial.open();
    } else {
      std::abort();  // a case of what the program is not compiled for
    }
  });
}

}  // namespace harness
