// Ω[p,d] += scale·Σ_b f(Σ_t left[b,t,p]·right[b,t,d]), where f(x) is |x| or x² (csrc/cuda/outer.cuh
// and what it includes), against long double.
#include "harness/outer.h"

#include <string>
#include <vector>

#include "harness/program.h"

namespace {

using namespace harness;

template <class T>
Problem<T> make(const OuterCase& c, uint64_t seed) {
  Problem<T> problem(c);
  problem.fill(seed, c.spoilt);
  return problem;
}

template <class T>
void compare(Program& program, const OuterCase& c, uint64_t seed) {
  soil_shared_memory<T>(c.tensor_cores, c.square);
  const auto before = make<T>(c, seed), after = make<T>(c, seed);
  const Launches launches(after, c);
  launches.run();
  check_omega(program, before, after, c);
  program.expect(same_bytes(after.left.memory(), before.left.memory()) &&
                     same_bytes(after.right.memory(), before.right.memory()),
                 "a factor was written");
  program.expect(after.omega.gaps_are_untouched(), "memory between elements of omega was written");
  if (launches.blocks() > 1) {
    const auto again = make<T>(c, seed);
    Launches(again, c, Blocks::kDescending).run();
    program.expect(same_bytes(after.omega.memory(), again.omega.memory()),
                   "other bits where blocks run in another order");
  }
}

// ================================================================================================
// The cases
// ================================================================================================
// 64 × 64 places a block, 32 slots at a time, 16 of them a multiplication on tensor cores, vectors
// of 2, 4 or 8 elements.
const std::vector<Size> kSizes{
    {0, 3, 4, 5},    {3, 0, 4, 5},    {3, 4, 0, 5},    {3, 4, 5, 0},    {1, 1, 1, 1},
    {2, 3, 1, 7},    {2, 3, 7, 1},    {5, 1, 9, 33},   {70, 1, 8, 40},  {4, 8, 3, 11},
    {3, 15, 8, 16},  {3, 16, 16, 24}, {3, 17, 7, 23},  {2, 31, 12, 8},  {2, 32, 63, 64},
    {1, 33, 64, 65}, {3, 5, 65, 63},  {2, 9, 64, 64},  {2, 40, 129, 8}, {1, 64, 16, 128},
    {33, 2, 24, 40}, {2, 65, 17, 31}, {5, 13, 72, 80},
};

// From 256 (sample, position) pairs on, samples are dealt out in parts.
const std::vector<Size> kInParts{{255, 1, 9, 12}, {256, 1, 5, 72}, {395, 1, 17, 8},
                                 {2, 128, 12, 9}, {3, 128, 7, 66}, {1, 400, 6, 8},
                                 {7, 64, 65, 9},  {6, 110, 8, 30}};

const Layout kColumnMajor{"column major", {0, 1}};
const Layout kPositionsLast{"positions last", {1, 2, 0}};
const Layout kSamplesLast{"samples last", {0, 2, 1}};
const Layout kPositionsFirst{"positions first", {2, 0, 1}};

const std::vector<Layouts> kLayouts{
    {"contiguous", kRowMajor, kContiguous, kContiguous},
    {"omega transposed, positions last", kColumnMajor, kContiguous, kPositionsLast},
    {"omega a window, positions first and last",
     {"", {1, 0}, 1, {3}, 5},
     kPositionsFirst,
     kPositionsLast},
    {"every second place", {"", {1, 0}, 2}, {"", {2, 1, 0}, 2}, kSamplesLast},
    {"a vector free behind rows", kRowMajor, {"", {2, 1, 0}, 1, {8, 16}}, {"", {2, 1, 0}, 1, {8}}},
    {"an element ahead", {"", {0, 1}, 1, {}, 1}, {"", {2, 1, 0}, 1, {}, 1}, kContiguous},
    {"an element free behind rows", kRowMajor, {"", {2, 1, 0}, 1, {1}}, kContiguous},
    {"an element free behind positions", kRowMajor, kContiguous, {"", {2, 1, 0}, 1, {0, 1}}},
};

const std::vector<Layouts> kExpanded{
    {"one left for all samples", kRowMajor, {"", {2, 1, 0}, 1, {}, 0, 0}, kContiguous},
    {"one left for all positions", kRowMajor, {"", {2, 1, 0}, 1, {}, 0, 1}, kContiguous},
    {"one right for all columns", kRowMajor, kContiguous, {"", {2, 1, 0}, 1, {}, 0, 2}},
};

Layout random_layout(Random& random, int dims) {
  Layout layout{"", {}, 1 + random.below(3)};
  for (const unsigned dim : random.shuffled(static_cast<unsigned>(dims))) {
    layout.inner_first.push_back(static_cast<int>(dim));
    layout.gaps.push_back(random.below(3) == 0 ? random.below(10) : 0);
  }
  layout.ahead = random.below(9);
  return layout;
}

template <class T>
void test(Program& program, const std::string& name, const OuterCase& c) {
  const Size& s = c.size;
  const std::string size = std::to_string(s.samples) + "x" + std::to_string(s.positions) + "x" +
                           std::to_string(s.rows) + "x" + std::to_string(s.columns);
  program.test("outer/" + name + "/" + size, [&](uint64_t seed) { compare<T>(program, c, seed); });
}

// Squares differ from magnitudes in what is done with a number, and not in where it lies.
template <class T>
void test_square(Program& program, const std::string& name) {
  const auto add = [&](const std::string& more, OuterCase c) {
    c.square = true;
    test<T>(program, name + more, c);
  };
  for (const Size& size : kSizes) {
    add("", {size, kLayouts[0]});
    if (sizeof(T) == 2) {
      add("/without tensor cores", {.size = size, .layouts = kLayouts[0], .tensor_cores = false});
    }
  }
  for (const Size& size : kInParts) {
    add("/in parts", {size, kLayouts[0]});
  }
  for (const float value : {NAN, HUGE_VALF, -HUGE_VALF}) {
    add("/" + std::to_string(value), {{3, 5, 16, 72}, kLayouts[0], 0.6, value});
    add("/" + std::to_string(value), {{7, 1, 9, 67}, kLayouts[1], 0.6, value});
  }
}

// Of the two 16-bit types, which differ in a name only, one meets every layout.
template <class T>
void test_dtype(Program& program) {
  const std::string dtype = mas_ext::dtype_name(kDtype<T>);
  const size_t layouts = std::is_same_v<T, Half> ? 2 : kLayouts.size();
  for (size_t i = 0; i < layouts; ++i) {
    for (const Size& size : kSizes) {
      test<T>(program, dtype + "/" + kLayouts[i].name, {size, kLayouts[i]});
    }
  }
  for (const Size& size : sizeof(T) == 2 ? kSizes : std::vector<Size>{}) {
    test<T>(program, dtype + "/without tensor cores",
            {.size = size, .layouts = kLayouts[0], .tensor_cores = false});
  }
  for (const Size& size : kInParts) {
    test<T>(program, dtype + "/in parts", {size, kLayouts[0]});
    test<T>(program, dtype + "/in parts, other layouts", {size, kLayouts[2]});
  }
  for (const Layouts& layouts : kExpanded) {
    test<T>(program, dtype + "/" + layouts.name, {{5, 6, 21, 72}, layouts});
    test<T>(program, dtype + "/" + layouts.name, {{5, 1, 21, 72}, layouts});
  }
  for (const double scale : {0.0, 1.0, 1e-8, 1e8}) {
    test<T>(program, dtype + "/scale " + std::to_string(scale),
            {{7, 5, 13, 29}, kLayouts[0], scale});
  }
  for (const float value : {NAN, HUGE_VALF, -HUGE_VALF}) {
    const std::string name = dtype + "/" + std::to_string(value);
    test<T>(program, name, {{3, 5, 16, 72}, kLayouts[0], 0.6, value});
    test<T>(program, name, {{7, 1, 9, 67}, kLayouts[1], 0.6, value});
  }
  for (int i = 0; i < 16; ++i) {
    const std::string name = dtype + "/random " + std::to_string(i);
    Random random(seed_of(name));
    const Size size{1 + random.below(6), 1 + random.below(40), 1 + random.below(90),
                    1 + random.below(140)};
    const Layouts layouts{"", random_layout(random, 2), random_layout(random, 3),
                          random_layout(random, 3)};
    test<T>(program, name, {size, layouts});
  }
  test_square<T>(program, dtype + "/square");
}

}  // namespace

int main(int argc, char** argv) {
  Program program(argc, argv);
#ifdef SIMT_ONLY  // one of them, compiled in a third of the time: for mutate.py
  test_dtype<SIMT_ONLY>(program);
#else
  test_dtype<float>(program);
  test_dtype<double>(program);
  test_dtype<BFloat16>(program);
  test_dtype<Half>(program);
#endif
  return program.finish();
}
