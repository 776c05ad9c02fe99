// The optimizer steps with the penalty in them (csrc/cuda/steps.cuh), against the rules in long
// double.
#include "harness/steps.h"

#include <cinttypes>
#include <string>
#include <utility>
#include <vector>

#include "harness/list_cases.h"

namespace {

using namespace harness;

// ================================================================================================
// Options, strengths, skipped steps
// ================================================================================================
const std::vector<std::pair<const char*, StepOptions>> kOptions{
    {"ascending", {.maximize = true}},
    {"no decay", {.weight_decay = 0}},
    {"nesterov", {.dampening = 0, .nesterov = true}},
    {"nesterov, ascending", {.dampening = 0, .nesterov = true, .maximize = true}},
    {"no dampening", {.dampening = 0}},
    {"decay of the gradient", {.decoupled = false}},
    {"decay of the gradient, ascending", {.decoupled = false, .maximize = true}},
    {"beta1 of 0, large epsilon", {.beta1 = 0, .eps = 0.5}},
    {"counts in float64", {.double_counts = true}},
};

// λ beyond float32 times Ω of 0 or 1, and in a gradient step a θ that is at θ*, so that what is
// finite stays finite.
void zero_or_at_anchor(List& list) {
  zero_or_one(list);
  visit_dtype(list[0].shape.kind.dtype, [&]<class T>() {
    for (int64_t i = 0; i < list[0].shape.numel; ++i) {
      list[0].of[kParam].as<T>()[i] = list[0].of[kAnchor].as<T>()[i];
    }
  });
}

// What a scaled loss that overflowed leaves in gradients.
void spoil_gradients(List& list) {
  for (const Parameter& parameter : list) {
    visit_dtype(parameter.shape.kind.dtype, [&]<class T>() {
      for (int64_t i = 0; i < parameter.shape.numel; ++i) {
        set<T>(parameter, kGrad, i, i % 3 == 0 ? NAN : HUGE_VAL);
      }
    });
  }
}

template <class Operation>
void own_cases(Program& program, const Kind& kind) {
  const auto add = [&](const std::string& name, const Sizes& sizes, const Strengths& strengths,
                       void (*spoil)(List&) = nullptr) {
    test<Operation>(program, kind, name, {with_sizes(kind, sizes), strengths, spoil});
  };
  const Sizes some{37, 0, 5}, one{37};
  for (const auto& [name, options] : kOptions) {
    add(name, some, {.step = options});
  }
  add("strengths on the device, float64", some, {.where = Where::kDeviceDouble});
  add("strengths on the device, float32", some, {.where = Where::kDeviceFloat});
  add("lambda and rate of 0", some, {.lambda = 0, .lr = 0});
  add("small strengths", some, {.lambda = 1e-3, .grad_scale = 1e-2, .lr = 1e-2});
  add("lambda beyond float32", one, {.lambda = 1e60}, zero_or_at_anchor);
  add("not finite", one, {}, not_finite);
  for (const Where where : {Where::kHost, Where::kDeviceDouble, Where::kDeviceFloat}) {
    add("skipped, strengths " + std::to_string(static_cast<int>(where)), {17, 0, 8193, 2048},
        {.where = where, .found_inf = 1}, spoil_gradients);
  }
}

template <class Operation>
void test_step(Program& program) {
  test_operation<Operation>(program, own_cases<Operation>);
}

// ================================================================================================
// Bias corrections
// ================================================================================================
template <class Count>
void check_corrections(Program& program, const StepOptions& step, size_t tensors) {
  const AdamOptions options = Adam::options(step);
  const auto corrections = correct<Count>(options, tensors);
  for (size_t i = 0; i < tensors; ++i) {
    const long double t = steps_taken(i) + 1;
    const long double first = 1 - std::pow<long double>(options.beta1, t);
    const long double second = 1 - std::pow<long double>(options.beta2, t);
    const auto is_near = [](double actual, long double exact, long double left) {
      return std::abs(actual - exact) <= exact * 1e-15L * (1 + 1 / left);  // 1−βᵗ cancels
    };
    program.expect(is_near(corrections[i].first, 1 / first, first) &&
                       is_near(corrections[i].second_root, 1 / std::sqrt(second), second),
                   "tensor %zu: %.17g and %.17g", i, corrections[i].first,
                   corrections[i].second_root);
  }
}

template <class Count>
void test_corrections(Program& program, const std::string& counts) {
  const std::pair<const char*, StepOptions> betas[] = {
      {"0.9 and 0.98", {}}, {"0 and 0.9999", {.beta1 = 0, .beta2 = 0.9999}}};
  for (const size_t tensors : {0, 1, 31, 255, 256, 257, 1000}) {
    for (const auto& [name, options] : betas) {
      program.test(
          "bias_corrections/" + counts + "/" + std::to_string(tensors) + " tensors/" + name,
          [&](uint64_t) { check_corrections<Count>(program, options, tensors); });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Program program(argc, argv);
#ifdef SIMT_ONLY  // one of them: for mutate.py
  test_step<SIMT_ONLY>(program);
#elif defined(__SANITIZE_THREAD__)  // a race would be the same whatever the rule
  test_step<Step<Adam, false>>(program);
  test_corrections<float>(program, "float32");
#else
  test_step<Step<Sgd, false>>(program);
  test_step<Step<Sgd, true>>(program);
  test_step<Step<Momentum, false>>(program);
  test_step<Step<Momentum, true>>(program);
  test_step<Step<Adam, false>>(program);
  test_step<Step<Adam, true>>(program);
  test_corrections<float>(program, "float32");
  test_corrections<double>(program, "float64");
#endif
  return program.finish();
}
