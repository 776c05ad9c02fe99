// Optimizer steps with the penalty in them, on the CPU: sgd_step_ and adamw_step_. One pass: 20
// bytes a float32 parameter for SGD, 28 with momentum, 36 for AdamW.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../formulas.h"
#include "../steps_arguments.h"
#include "chunks.h"
#include "lanes.h"
#include "multiversion.h"
#include "scalars.h"

namespace mas_ext::cpu {
namespace {

// Elements between two looks ahead: a page of float32 values. Where kAhead elements further on
// lies in memory the processor is told in time; it follows a stream by itself, but only to the end
// of its page.
constexpr int64_t kBlock = 1024;
constexpr int64_t kAhead = 8192;

// Element i, or two from i on; returns its energy Ω δ², that of θ before the step, for a proximal
// one of θ as it is stored afterwards. `first` and `second` are the rule's moments, where it has
// them.
template <bool Proximal, class At, class Rule, class T, class A>
MAS_ALWAYS_INLINE auto advance(At at, T* params, T* first, T* second, const T* grads,
                               const T* anchors, const A* omega, int64_t i,
                               const PenaltyPart<A>& penalty, const Rule& rule) {
  auto param = at.load(params, i), grad = at.load(grads, i), anchor = at.load(anchors, i),
       weight = at.load(omega, i), moved = param, m = param, v = param;
  if constexpr (Rule::kMoments > 0) {
    m = at.load(first, i);
  }
  if constexpr (Rule::kMoments > 1) {
    v = at.load(second, i);
  }
  at.for_each([&](auto of) {
    A moments[2] = {of(m), of(v)};
    of(moved) = penalised_point<Proximal>(of(param), of(grad), of(anchor), of(weight), moments,
                                          penalty, rule);
    of(m) = moments[0];
    of(v) = moments[1];
  });
  at.store(params, i, moved);
  if constexpr (Rule::kMoments > 0) {
    at.store(first, i, m);
  }
  if constexpr (Rule::kMoments > 1) {
    at.store(second, i, v);
  }
  if constexpr (Proximal) {
    return penalty_energy(at.template stored<T>(moved) - anchor, weight);
  } else {
    return penalty_energy(param - anchor, weight);
  }
}

// How many energies are formed before they are summed: with the sum among them the compiler would
// not vectorise the rule. A vector's worth stays in a register; narrow values it only vectorises
// in longer loops.
template <class T, class A>
constexpr int64_t kRow = sizeof(T) < sizeof(A) ? 8 * kLanes : kLanes;

template <bool Proximal, class Rule, class T, class A>
MAS_MULTIVERSION double advance_all(T* __restrict__ params, T* __restrict__ first,
                                    T* __restrict__ second, const T* __restrict__ grads,
                                    const T* __restrict__ anchors, const A* __restrict__ omega,
                                    int64_t size, PenaltyPart<A> penalty, Rule rule) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kRow<T, A> <= size; i += kRow<T, A>) {
    alignas(64) A energies[kRow<T, A>];
    if constexpr (walk_t<T>::kElements == 2) {
      constexpr int64_t kHalf = kRow<T, A> / 2;
      for (int64_t k = 0; k < kHalf; ++k) {
        const auto [low, high] = advance<Proximal>(InPairs{}, params, first, second, grads, anchors,
                                                   omega, i + 2 * k, penalty, rule);
        energies[k] = low;
        energies[kHalf + k] = high;
      }
    } else {
      for (int64_t k = 0; k < kRow<T, A>; ++k) {
        energies[k] = advance<Proximal>(Singly<A>{}, params, first, second, grads, anchors, omega,
                                        i + k, penalty, rule);
      }
    }
    for (int64_t k = 0; k < kRow<T, A>; k += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += static_cast<double>(energies[k + lane]);
      }
    }
  }
  for (int64_t k = 0; i + k < size; ++k) {
    lanes[k % kLanes] += static_cast<double>(advance<Proximal>(
        Singly<A>{}, params, first, second, grads, anchors, omega, i + k, penalty, rule));
  }
  return sum_of(lanes);
}

template <class T, size_t Streams>
MAS_ALWAYS_INLINE void fetch_ahead(const Chunk<Streams>& chunk, int64_t begin) {
  const Entry<Streams>& entry = *chunk.entry;
  const int64_t ahead = chunk.begin + begin + kAhead;
  if (ahead < entry.numel) {
    for (size_t s = 0; s + 1 < Streams; ++s) {
      prefetch(static_cast<const T*>(entry.data[s]) + ahead);
    }
    prefetch(static_cast<const char*>(entry.data[Streams - 1]) +
             ahead * bytes_of_kept(entry.omega_dtype));
  }
}

template <bool Proximal, class T, size_t Streams, class A, class Rule>
double step(const Chunk<Streams>& chunk, const A* omega, const PenaltyPart<A>& penalty,
            const Rule& rule) {
  constexpr size_t kMoments = Streams - 4;
  double total = 0;
  for (int64_t begin = 0; begin < chunk.size; begin += kBlock) {
    const int64_t size = std::min(kBlock, chunk.size - begin);
    const auto values = [&](size_t s) { return chunk.template stream<T>(s) + begin; };
    fetch_ahead<T>(chunk, begin);
    total += advance_all<Proximal>(values(0), values(kMoments > 0 ? 1 : 0),
                                   values(kMoments > 1 ? 2 : 0), values(kMoments + 1),
                                   values(kMoments + 2), omega + begin, size, penalty, rule);
  }
  return total;
}

StepScalars read_scalars(const char* op, const TensorList& params, const Tensor& lambda_reg,
                         const Tensor& lr, const std::optional<Tensor>& grad_scale,
                         const std::optional<Tensor>& found_inf) {
  const StepScalars scalars{read_scalar(op, "lambda_reg", lambda_reg, params),
                            read_scalar(op, "lr", lr, params),
                            grad_scale ? read_scalar(op, "grad_scale", *grad_scale, params) : 1.0,
                            found_inf ? read_scalar(op, "found_inf", *found_inf, params) : 0.0};
  check_non_negative(op, "lambda_reg", scalars.lambda);
  check_non_negative(op, "lr", scalars.lr);
  check_positive(op, "grad_scale", scalars.grad_scale);
  return scalars;
}

// Where some gradient is not finite: everything stays as it is.
template <class A>
struct NoRule {
  static constexpr int kMoments = 0;
  MAS_HOST_DEVICE A point(A param, A, A*) const { return param; }
};

// Runs a rule over the list; `make(rule, entry)` sets it for a tensor.
template <template <class> class Rule, bool Proximal, size_t Streams, class Make>
double sum_of_steps(const FlatList<Streams>& list, const StepScalars& scalars, bool maximize,
                    Make make) {
  return sum_over_chunks(
      list, [&]<class T>(const Chunk<Streams>& chunk, const accumulate_t<T>* omega) {
        using A = accumulate_t<T>;
        Rule<A> rule;
        make(rule, *chunk.entry);
        return step<Proximal, T>(chunk, omega, penalty_part<A>(scalars, maximize, Proximal), rule);
      });
}

template <template <class> class Rule, size_t Streams, class Make>
Tensor penalised_step(FlatList<Streams> list, const StepScalars& scalars, bool maximize,
                      bool proximal, Make make) {
  double sum;
  if (scalars.found_inf != 0) {
    sum = sum_of_steps<NoRule, false>(list, scalars, maximize, [](auto&, const auto&) {});
  } else if (proximal) {
    sum = sum_of_steps<Rule, true>(list, scalars, maximize, make);
  } else {
    sum = sum_of_steps<Rule, false>(list, scalars, maximize, make);
  }
  list.write_back();
  return make_scalar(0.5 * scalars.lambda * sum, list.value_dtype());
}

Tensor sgd_step_(const TensorList& params, const TensorList& grads,
                 const TensorList& momentum_buffers, const TensorList& anchors,
                 const TensorList& omega, const TensorList& omega_scales, const Tensor& lambda_reg,
                 const Tensor& lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, bool proximal,
                 const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  constexpr const char* op = "sgd_step_";
  const SgdOptions options{momentum, dampening, weight_decay, nesterov, maximize};
  const StepScalars scalars = read_scalars(op, params, lambda_reg, lr, grad_scale, found_inf);
  check_options(op, options, momentum_buffers);
  const auto make = [&](auto& rule, const auto&) {
    make_rule(rule, options);
    set_rate(rule, scalars.lr);
  };
  if (momentum == 0) {
    return penalised_step<SgdRule>(sgd_list(op, params, grads, anchors, omega, omega_scales),
                                   scalars, maximize, proximal, make);
  }
  return penalised_step<MomentumRule>(
      momentum_list(op, params, momentum_buffers, grads, anchors, omega, omega_scales), scalars,
      maximize, proximal, make);
}

// The corrections of every parameter, from how many steps it has taken.
template <class Count>
std::vector<BiasCorrection> bias_corrections(const char* op, const AdamOptions& options,
                                             const Count* counts, int64_t size) {
  std::vector<BiasCorrection> corrections;
  corrections.reserve(static_cast<size_t>(size));
  for (int64_t i = 0; i < size; ++i) {
    const auto count = static_cast<double>(counts[i]);
    check_non_negative(op, ("steps[" + std::to_string(i) + "]").c_str(), count);
    corrections.push_back(bias_correction(options, count));
  }
  return corrections;
}

std::vector<BiasCorrection> bias_corrections(const char* op, const AdamOptions& options,
                                             const Tensor& steps) {
  const Tensor counts = torch::stable::contiguous(steps);
  const void* data = counts.const_data_ptr();
  return dtype_of(counts) == ScalarType::Double
             ? bias_corrections(op, options, static_cast<const double*>(data), counts.numel())
             : bias_corrections(op, options, static_cast<const float*>(data), counts.numel());
}

Tensor adamw_step_(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const Tensor& steps, const TensorList& anchors,
                   const TensorList& omega, const TensorList& omega_scales,
                   const Tensor& lambda_reg, const Tensor& lr, double beta1, double beta2,
                   double eps, double weight_decay, bool decoupled, bool maximize, bool proximal,
                   const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf) {
  constexpr const char* op = "adamw_step_";
  const AdamOptions options{beta1, beta2, eps, weight_decay, decoupled, maximize};
  const StepScalars scalars = read_scalars(op, params, lambda_reg, lr, grad_scale, found_inf);
  check_options(op, options);
  check_steps(op, steps, params);
  const auto corrections = bias_corrections(op, options, steps);
  return penalised_step<AdamRule>(
      adamw_list(op, params, exp_avgs, exp_avg_sqs, grads, anchors, omega, omega_scales), scalars,
      maximize, proximal, [&](auto& rule, const auto& entry) {
        make_rule(rule, options);
        set_rate(rule, scalars.lr, options, corrections[static_cast<size_t>(entry.index)]);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  m.impl("sgd_step_", TORCH_BOX(&sgd_step_));
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
}

}  // namespace mas_ext::cpu
