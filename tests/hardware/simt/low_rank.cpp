// λ/2 Σ Ω∘(s·left·rightᵀ)² and its gradients (csrc/cuda/low_rank.cuh), against long double.
#include "harness/low_rank.h"

#include <string>
#include <vector>

namespace {

using namespace harness;

template <class T, class Kept>
LowRankProblem<T, Kept> make(const LowRankCase& c, uint64_t seed) {
  LowRankProblem<T, Kept> problem(c);
  problem.fill(c, seed);
  return problem;
}

template <class Problem>
bool same_grads(const Problem& a, const Problem& b) {
  return same_bytes(a.grad_left.memory(), b.grad_left.memory()) &&
         same_bytes(a.grad_right.memory(), b.grad_right.memory()) &&
         same_bytes(a.wide_left.memory(), b.wide_left.memory()) &&
         same_bytes(a.wide_right.memory(), b.wide_right.memory());
}

template <class T, class Kept>
void compare(Program& program, const LowRankCase& c, uint64_t seed) {
  soil_low_rank_memory<T>();
  const auto before = make<T, Kept>(c, seed), after = make<T, Kept>(c, seed);
  const LowRankLaunches<T, Kept, Buffer> launches(after, c);
  const auto value = launches.run();
  const LowRankOracle<T, Kept, Buffer> oracle(program, before, c);
  oracle.check_value(value);
  if (!c.has_grads) {
    program.expect(same_grads(before, after), "a gradient was written that nobody asked for");
  } else if (c.wide_grads) {
    oracle.check_grads(after.wide_left, before.wide_left, true);
    oracle.check_grads(after.wide_right, before.wide_right, false);
  } else {
    oracle.check_grads(after.grad_left, before.grad_left, true);
    oracle.check_grads(after.grad_right, before.grad_right, false);
  }
  program.expect(same_bytes(after.left.memory(), before.left.memory()) &&
                     same_bytes(after.right.memory(), before.right.memory()) &&
                     same_bytes(after.omega.memory(), before.omega.memory()) &&
                     same_bytes(after.scales, before.scales),
                 "what is only read was written");
  program.expect(after.grad_left.gaps_are_untouched() && after.grad_right.gaps_are_untouched(),
                 "memory between elements of a gradient was written");
  if (launches.has_several_blocks()) {
    const auto again = make<T, Kept>(c, seed);
    const auto value_again = LowRankLaunches<T, Kept, Buffer>(again, c, Blocks::kDescending).run();
    const bool same = std::memcmp(&value_again, &value, sizeof value) == 0;
    program.expect(same && same_grads(again, after),
                   "other bits where blocks run in another order");
  }
}

// ================================================================================================
// The cases
// ================================================================================================
// 64 × 64 places a tile; 16 ranks (8 of float64) of its product at a time, 16 of a gradient, 32 a
// block.
const std::vector<LowRankSize> kSizes{
    {0, 3, 2},    {3, 0, 2},    {3, 4, 0},    {1, 1, 1},    {1, 7, 2},    {7, 1, 3},
    {5, 9, 8},    {16, 63, 15}, {63, 64, 16}, {64, 65, 17}, {65, 64, 31}, {66, 20, 32},
    {20, 66, 33}, {9, 33, 48},  {31, 5, 65},  {64, 64, 7},  {70, 130, 9}, {130, 70, 4},
};
// Enough rows for their ranks that they are divided into parts, one way or both.
const std::vector<LowRankSize> kInParts{{130, 9, 2}, {200, 140, 3}, {321, 65, 5}, {9, 260, 1}};

const Layout kRowMajor{"row major", {1, 0}}, kColumnMajor{"column major", {0, 1}};

const std::vector<LowRankLayouts> kLayouts{
    {"contiguous", kRowMajor, kRowMajor, kColumnMajor},
    {"omega transposed", kColumnMajor, kRowMajor, kColumnMajor},
    {"ranks of left outside", kRowMajor, kColumnMajor, kRowMajor},
    {"windows", {"", {1, 0}, 1, {3}, 5}, {"", {1, 0}, 1, {2}}, {"", {0, 1}, 1, {4}, 1}},
    {"every second place", {"", {0, 1}, 2}, {"", {1, 0}, 2}, {"", {1, 0}, 2}},
};

template <class T, class Kept>
void test(Program& program, const std::string& name, const LowRankCase& c) {
  const std::string size = std::to_string(c.size.rows) + "x" + std::to_string(c.size.columns) +
                           "x" + std::to_string(c.size.rank);
  program.test("low_rank/" + name + "/" + size,
               [&](uint64_t seed) { compare<T, Kept>(program, c, seed); });
}

template <class T>
void test_dtype(Program& program) {
  using A = accumulate_t<T>;
  const std::string dtype = mas_ext::dtype_name(kDtype<T>);
  for (const LowRankLayouts& layouts : kLayouts) {
    for (const LowRankSize& size : kSizes) {
      test<T, A>(program, dtype + "/" + layouts.name, {.size = size, .layouts = layouts});
    }
  }
  for (const LowRankSize& size : kInParts) {
    test<T, A>(program, dtype + "/in parts", {.size = size, .layouts = kLayouts[0]});
    test<T, A>(program, dtype + "/in parts, transposed", {.size = size, .layouts = kLayouts[1]});
  }
  for (const LowRankSize& size : {kSizes[0], kSizes[13], kSizes[16], kInParts[1]}) {
    test<T, A>(program, dtype + "/value alone",
               {.size = size, .layouts = kLayouts[0], .has_grads = false});
    test<T, A>(program, dtype + "/gradients as computed",
               {.size = size, .layouts = kLayouts[3], .wide_grads = true});
  }
  for (const double scale : {0.0, 1.0, 1e-8, 1e8}) {
    test<T, A>(program, dtype + "/scale " + std::to_string(scale),
               {.size = {13, 29, 5}, .layouts = kLayouts[0], .wide_grads = true, .scale = scale});
  }
  for (const Where where : {Where::kDeviceDouble, Where::kDeviceFloat}) {
    test<T, A>(program, dtype + "/strength " + std::to_string(static_cast<int>(where)),
               {.size = {13, 29, 5}, .layouts = kLayouts[0], .where = where});
  }
  for (const float value : {NAN, HUGE_VALF, -HUGE_VALF}) {
    for (const Spoilt where : {Spoilt::kLeft, Spoilt::kRight, Spoilt::kOmega}) {
      const std::string name =
          dtype + "/" + std::to_string(value) + " in " + std::to_string(static_cast<int>(where));
      test<T, A>(
          program, name,
          {.size = {9, 70, 5}, .layouts = kLayouts[0], .spoilt = value, .where_spoilt = where});
    }
  }
}

// Ω in less: what differs is where it is read.
template <class T, class Kept>
void test_kept(Program& program) {
  const std::string name = std::string(mas_ext::dtype_name(kDtype<T>)) + "/omega in " +
                           mas_ext::dtype_name(kDtype<Kept>);
  for (const LowRankSize& size : kSizes) {
    test<T, Kept>(program, name, {.size = size, .layouts = kLayouts[0]});
    test<T, Kept>(program, name + ", transposed", {.size = size, .layouts = kLayouts[1]});
  }
  test<T, Kept>(program, name + ", in parts", {.size = kInParts[1], .layouts = kLayouts[0]});
}

// What the program is compiled for where it is not for all: a dtype, or one beside a kind of Ω.
template <class T, class... Kept>
void test_only(Program& program) {
  if constexpr (sizeof...(Kept) == 0) {
    test_dtype<T>(program);
  } else {
    test_kept<T, Kept...>(program);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Program program(argc, argv);
#ifdef SIMT_ONLY  // for mutate.py
  test_only<SIMT_ONLY>(program);
#else
  test_dtype<float>(program);
  test_dtype<double>(program);
  test_dtype<BFloat16>(program);
  test_dtype<Half>(program);
  test_kept<float, BFloat16>(program);
  test_kept<float, uint8_t>(program);
  test_kept<BFloat16, uint8_t>(program);
#endif
  return program.finish();
}
