// The operations on lists of tensors (csrc/cuda/multi_tensor.cuh and what it includes), against the
// formulas in long double.
#include <string>
#include <vector>

#include "harness/list_cases.h"

namespace {

using namespace harness;

template <class Operation>
void strengths(Program& program, const Kind& kind) {
  const std::vector<Shape> shapes = with_sizes(kind, {37});
  const auto add = [&](const char* name, const Strengths& strengths,
                       void (*spoil)(List&) = nullptr) {
    test<Operation>(program, kind, name, {shapes, strengths, spoil});
  };
  add("strengths on the device, float64", {.where = Where::kDeviceDouble});
  add("strengths on the device, float32", {.where = Where::kDeviceFloat});
  add("strengths of 0", {.lambda = 0, .grad_scale = 0, .lr = 0, .scale = 0});
  add("small strengths", {.lambda = 1e-3, .grad_scale = 1e-2, .lr = 1e-2, .scale = 1e-4});
  add("product beyond float32", {.lambda = 1e30, .grad_scale = 1e20, .lr = 1e20}, zero_or_one);
  add("not finite", {}, not_finite);
}

template <class Operation>
void test_one(Program& program) {
  test_operation<Operation>(program, strengths<Operation>);
}

}  // namespace

int main(int argc, char** argv) {
  Program program(argc, argv);
#ifdef SIMT_ONLY  // one of them, compiled in a fifth of the time: for mutate.py
  test_one<SIMT_ONLY>(program);
#else
  test_one<Importance>(program);
  test_one<ImportanceSquare>(program);
  test_one<Penalty>(program);
  test_one<Gradient>(program);
  test_one<AddGradient>(program);
  test_one<Proximal>(program);
#endif
  return program.finish();
}
