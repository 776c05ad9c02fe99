// Whether a run on a list did what its operation should do, and nothing else.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstring>

#include "lists.h"
#include "program.h"

namespace harness {

// What a penalty should be, and how far from it it may be.
struct PenaltyValue {
  long double exact = 0, bound = 0;
};

template <class Operation>
class Judge {
 public:
  Judge(Program& program, const Told& told, const List& before, const List& after)
      : program_(program), told_(told), before_(before), after_(after) {}

  void lists() const {
    for (size_t p = 0; p < before_.size(); ++p) {
      untouched(p);
      visit_dtype(before_[p].shape.kind.dtype, [&]<class T>() { written<T>(p); });
    }
  }

  // The partial sums; λ/2 of their sum, and how far from it the penalty may be.
  PenaltyValue sums(const Buffer& partial) const {
    const auto pieces = pieces_of(before_);
    const long double half = static_cast<long double>(told_.lambda.value()) / 2;
    PenaltyValue penalty;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Parameter& parameter = before_[pieces[i].parameter];
      const double actual = partial.as<double>()[i];
      visit_dtype(parameter.shape.kind.dtype, [&]<class T>() {
        const long double sum = check_sum<T>(pieces[i], actual);
        penalty.exact += half * sum;
        penalty.bound += half * sum * kSum<T>;
      });
    }
    return penalty;
  }

 private:
  static bool is_written(size_t role) {
    const auto end = Operation::roles.begin() + Operation::writes;
    return std::find(Operation::roles.begin(), end, role) != end;
  }

  // What is only read keeps its bits, and so does what lies in front of a tensor.
  void untouched(size_t p) const {
    for (size_t role = 0; role < after_[p].of.size(); ++role) {
      program_.expect(is_written(role) || same_bytes(after_[p].of[role], before_[p].of[role]),
                      "tensor %zu: argument %zu was written", p, role);
      program_.expect(after_[p].of[role].gap_is_untouched(),
                      "tensor %zu: memory in front of argument %zu was written", p, role);
    }
    program_.expect(
        same_bytes(after_[p].scales, before_[p].scales) && after_[p].scales.gap_is_untouched(),
        "tensor %zu: scales, or memory in front of them, were written", p);
  }

  template <class T>
  void written(size_t p) const {
    for (int64_t i = 0; i < before_[p].shape.numel; ++i) {
      const Values values = before_[p].values<T>(i);
      const auto exact = Operation::template exact<accumulate_t<T>>(values, told_);
      const bool keeps = Operation::keeps(values, told_);
      for (size_t w = 0; w < Operation::writes; ++w) {
        const Role role = Operation::roles[w];
        const bool right = role == kOmegaRole
                               ? is_right<accumulate_t<T>>(p, role, i, exact[w], keeps)
                               : is_right<T>(p, role, i, exact[w], keeps);
        if (!right) {
          return;
        }
      }
    }
  }

  // `keeps`: whether an element should have the bits it had.
  template <class Stored>
  bool is_right(size_t p, Role role, int64_t i, const Exact& exact, bool keeps) const {
    const Stored& stored = after_[p].of[role].template as<Stored>()[i];
    const Stored& original = before_[p].of[role].template as<Stored>()[i];
    const bool right =
        keeps ? std::memcmp(&stored, &original, sizeof(Stored)) == 0 : near(stored, exact);
    return program_.expect(right, "tensor %zu, argument %d, element %" PRId64 ": %.9g is not %.9Lg",
                           p, role, i, static_cast<double>(stored), exact.value);
  }

  template <class T>
  long double check_sum(const Piece& piece, double actual) const {
    const Parameter& before = before_[piece.parameter];
    const Parameter& after = after_[piece.parameter];
    long double sum = 0;
    for (int64_t i = piece.begin; i < piece.end; ++i) {
      Values values = before.values<T>(i);
      if (Operation::sums_stored) {
        values.of[kParam] = after.values<T>(i).of[kParam];
      }
      sum += values.energy();
    }
    const bool right = within(actual, sum, kSum<T> * sum, kLargest<double>);
    program_.expect(right,
                    "tensor %zu, elements %" PRId64 " to %" PRId64 ": sum %.17g is not %.17Lg",
                    piece.parameter, piece.begin, piece.end, actual, sum);
    return sum;
  }

  Program& program_;
  const Told& told_;
  const List& before_;
  const List& after_;
};

// An operation on a list of tensors.
struct ListCase {
  std::vector<Shape> shapes;
  Strengths strengths = {};
  void (*spoil)(List& list) = nullptr;  // sets values of its own
  bool finishes = true;                 // also runs finish_penalty
};

// λ/2 of the sum, by the kernel that ends every penalty.
template <class Value>
Value finish(const Buffer& partial, const Strength& lambda) {
  const Buffer value(sizeof(Value), 0);
  const auto count = static_cast<int64_t>(partial.size() / sizeof(double));
  simt::run({{0}}, kThreads, [&] {
    mas_ext::cuda::finish_penalty<Value>(partial.as<double>(), count, lambda.scalar(),
                                         value.as<Value>());
  });
  return *value.as<Value>();
}

template <class Value>
void check_value(Program& program, Value actual, const PenaltyValue& penalty) {
  const long double rounding = kArithmetic<Value> * penalty.exact + kSmallest<Value>;
  program.expect(within(actual, penalty.exact, penalty.bound + rounding, kLargest<Value>),
                 "value %.17g is not %.17Lg", static_cast<double>(actual), penalty.exact);
}

// Runs a case, judges what came of it, and runs it again with the blocks in another order.
template <class Operation>
class Comparison {
 public:
  Comparison(Program& program, const ListCase& c, uint64_t seed)
      : program_(program), case_(c), seed_(seed), told_(c.strengths) {}

  void run() {
    const List before = make(), after = make();
    const size_t blocks = pieces_of(before).size();
    const Buffer partial(8 * blocks, 0);
    harness::run<Operation>(after, told_, partial, Blocks::kAscending);
    check(before, after, partial);
    if (blocks > 1) {
      check_order(after, partial);
    }
  }

 private:
  List make() const {
    List list = make_list(case_.shapes, seed_, kMoments<Operation>);
    if (case_.spoil != nullptr) {
      case_.spoil(list);
    }
    return list;
  }

  void check(const List& before, const List& after, const Buffer& partial) {
    const Judge<Operation> judge(program_, told_, before, after);
    judge.lists();
    if constexpr (Operation::sums) {
      const PenaltyValue value = judge.sums(partial);
      if (case_.finishes) {
        is_double() ? check_value(program_, finish<double>(partial, told_.lambda), value)
                    : check_value(program_, finish<float>(partial, told_.lambda), value);
      }
    }
  }

  // The penalty of a list has the widest dtype that its sums are formed in.
  bool is_double() const {
    return std::any_of(case_.shapes.begin(), case_.shapes.end(),
                       [](const Shape& s) { return s.kind.dtype == ScalarType::Double; });
  }

  // Nothing depends on the order in which blocks run.
  void check_order(const List& after, const Buffer& partial) {
    const List again = make();
    const Buffer sums(partial.size(), 0);
    harness::run<Operation>(again, told_, sums,
                            seed_ % 2 ? Blocks::kDescending : Blocks::kShuffled);
    bool same = same_bytes(sums, partial);
    for (size_t p = 0; p < again.size(); ++p) {
      for (const Role role : Operation::roles) {
        same &= same_bytes(again[p].of[role], after[p].of[role]);
      }
    }
    program_.expect(same, "other bits where blocks run in another order");
  }

  Program& program_;
  const ListCase& case_;
  uint64_t seed_;
  Told told_;
};

}  // namespace harness
