// The cases that every operation on lists goes through: sizes around every boundary, alignments,
// lists, values that are not numbers. THE place to add one.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "judge.h"
#include "lists.h"
#include "program.h"

namespace harness {

inline std::string name_of(const Kind& kind) {
  const std::string name = mas_ext::dtype_name(kind.dtype);
  const bool in_numbers = kind.omega_dtype == mas_ext::accumulate_dtype(kind.dtype);
  return in_numbers                            ? name
         : mas_ext::is_codes(kind.omega_dtype) ? name + ", codes"
                                               : name + ", bfloat16";
}

template <class Operation>
void test(Program& program, const std::string& name, const ListCase& c) {
  program.test(std::string(Operation::name) + "/" + name,
               [&](uint64_t seed) { Comparison<Operation>(program, c, seed).run(); });
}

template <class Operation>
void test(Program& program, const Kind& kind, const std::string& name, const ListCase& c) {
  test<Operation>(program, name_of(kind) + "/" + name, c);
}

// ================================================================================================
// One tensor: around every boundary of size, at every alignment
// ================================================================================================
// A vector has 2, 4 or 8 elements; a block's threads take 512, 1024 or 2048 of them at once, and
// twice that many before the next round; a chunk has 8192.
using Sizes = std::vector<int64_t>;
inline const Sizes kSmall{1, 2, 3, 7, 8, 9, 15, 16, 17};
inline const Sizes kRounds{511, 513, 1023, 1025, 2047, 2049, 4095, 4096, 4097};
inline const Sizes kChunks{8191, 8192, 8193, 16385};

inline Ahead all(int64_t elements) {
  Ahead ahead;
  ahead.fill(elements);
  return ahead;
}

inline int64_t vector_of(const Kind& kind) {
  return 16 / static_cast<int64_t>(width(kind, kParam));
}

inline Sizes up_to(int64_t end) {
  Sizes numbers;
  for (int64_t i = 0; i < end; ++i) {
    numbers.push_back(i);
  }
  return numbers;
}

// All as in one flat buffer, some elements behind a boundary: vectors from some element on.
template <class Operation>
void together(Program& program, const Kind& kind, const Sizes& sizes, const Sizes& distances) {
  for (const int64_t ahead : distances) {
    for (const int64_t numel : sizes) {
      test<Operation>(program, kind,
                      std::to_string(numel) + " elements/all " + std::to_string(ahead) + " ahead",
                      {.shapes = {{kind, numel, all(ahead)}}, .finishes = ahead == 0});
    }
  }
}

template <class Operation>
void together(Program& program, const Kind& kind) {
  const int64_t vector = vector_of(kind);
  together<Operation>(program, kind, kSmall, up_to(vector));
  together<Operation>(program, kind, kRounds, {0, vector - 1});
  together<Operation>(program, kind, kChunks, {0, 1, vector - 1});
}

// One argument an element further on: no element is at a boundary of all.
template <class Operation>
void apart(Program& program, const Kind& kind) {
  for (const Role role : Operation::roles) {
    for (const int64_t numel : {1, 9, 17, 2049, 8193}) {
      Ahead ahead = all(2);
      ahead[role] += 1;
      test<Operation>(
          program, kind,
          std::to_string(numel) + " elements/argument " + std::to_string(role) + " apart",
          {.shapes = {{kind, numel, ahead}}, .finishes = false});
    }
  }
}

// ================================================================================================
// Lists
// ================================================================================================
inline std::vector<Shape> with_sizes(const Kind& kind, const Sizes& sizes) {
  std::vector<Shape> shapes;
  for (const int64_t numel : sizes) {
    shapes.push_back({kind, numel, {}});
  }
  return shapes;
}

// More than one table holds, most of them empty; not empty are those around the edges.
template <class Operation>
std::vector<Shape> too_many(const Kind& kind) {
  constexpr size_t streams = Operation::roles.size();
  const int64_t capacity = mas_ext::is_codes(kind.omega_dtype) ? Table<streams, true>::kCapacity
                                                               : Table<streams, false>::kCapacity;
  Sizes sizes(static_cast<size_t>(2 * capacity + 2), 0);
  int64_t numel = 1;
  for (const int64_t i : {int64_t{0}, capacity - 1, capacity, 2 * capacity - 1, 2 * capacity + 1}) {
    sizes[static_cast<size_t>(i)] = ++numel;
  }
  return with_sizes(kind, sizes);
}

inline std::vector<Shape> random_shapes(Random& random, const std::vector<Kind>& kinds) {
  std::vector<Shape> shapes;
  for (int64_t left = 1 + random.below(5); left > 0; --left) {
    const int64_t numel = random.below(4) == 0 ? 8192 - 20 + random.below(40) : random.below(300);
    Ahead ahead = all(random.below(8));
    if (random.below(3) == 0) {
      ahead[static_cast<size_t>(random.below(4))] += random.below(8);
    }
    const int64_t kind = random.below(static_cast<int64_t>(kinds.size()));
    shapes.push_back({kinds[static_cast<size_t>(kind)], numel, ahead});
  }
  return shapes;
}

template <class Operation>
void test_random(Program& program, const std::string& list, int count,
                 const std::vector<Kind>& kinds) {
  for (int i = 0; i < count; ++i) {
    const std::string name = list + "/random " + std::to_string(i);
    Random random(seed_of(name));
    test<Operation>(program, name, {random_shapes(random, kinds)});
  }
}

template <class Operation>
void lists(Program& program, const Kind& kind) {
  test<Operation>(program, kind, "list/several",
                  {with_sizes(kind, {5, 0, 8193, 1, 16384, 0, 17, 8191})});
  test<Operation>(program, kind, "list/only empty", {with_sizes(kind, {0, 0})});
  test<Operation>(program, kind, "list/none", {{}});
  test<Operation>(program, kind, "list/too many for a table", {too_many<Operation>(kind)});
  test_random<Operation>(program, name_of(kind) + "/list", 4, {kind});
}

template <class Operation>
void mixed(Program& program, const std::vector<Kind>& kinds, const std::string& list = "mixed") {
  test_random<Operation>(program, list, 8, kinds);
  std::vector<Shape> shapes;
  for (auto kind = kinds.rbegin(); kind != kinds.rend(); ++kind) {
    shapes.push_back({*kind, 8195, all(1)});
    shapes.push_back({*kind, 3, {}});
  }
  test<Operation>(program, list + "/every dtype", {shapes});
}

// ================================================================================================
// Values
// ================================================================================================
template <class T>
void set(const Parameter& parameter, Role role, int64_t i, double value) {
  if (role == kOmegaRole) {
    parameter.set_omega(i, value);
  } else {
    parameter.of[role].as<T>()[i] = static_cast<T>(value);
  }
}

// NaN and infinities in one argument after the other; and a θ that is no number, of no importance.
inline void not_finite(List& list) {
  constexpr double nan = NAN, inf = HUGE_VAL;
  visit_dtype(list[0].shape.kind.dtype, [&]<class T>() {
    int64_t i = 0;
    for (const Role role : {kOmegaRole, kGrad, kParam, kAnchor}) {
      set<T>(list[0], role, i++, nan);
      set<T>(list[0], role, i++, inf);
      set<T>(list[0], role, i++, role == kOmegaRole ? 0 : -inf);
    }
    set<T>(list[0], kOmegaRole, i, 0);
    set<T>(list[0], kParam, i, nan);
  });
}

// Ω, so that no product of it with the largest number is beyond that.
inline void zero_or_one(List& list) {
  for (int64_t i = 0; i < list[0].shape.numel; ++i) {
    list[0].set_omega(i, i % 3 == 0 ? 0 : 1);
  }
}

// ================================================================================================
// All of them
// ================================================================================================
// Ω as it is accumulated, beside each dtype.
inline const std::vector<Kind> kDtypes{{ScalarType::Float, ScalarType::Float},
                                       {ScalarType::Double, ScalarType::Double},
                                       {ScalarType::BFloat16, ScalarType::Float},
                                       {ScalarType::Half, ScalarType::Float}};

// `own_cases(program, kind)` adds those cases that an operation has of its own.
template <class Operation, class OwnCases>
void test_operation(Program& program, OwnCases own_cases) {
  for (const Kind& kind : kDtypes) {
    together<Operation>(program, kind);
    apart<Operation>(program, kind);
    lists<Operation>(program, kind);
    own_cases(program, kind);
  }
  mixed<Operation>(program, kDtypes);
}

}  // namespace harness
