// Optimizer steps that include the penalty, on the CPU: sgd_step_ and adamw_step_. One pass: 20
// bytes per float32 parameter for SGD, 28 with momentum, 36 for AdamW.
#include <algorithm>
#include <string>
#include <vector>

#include "../formulas.h"
#include "chunks.h"
#include "kernels.h"
#include "lanes.h"
#include "multiversion.h"

namespace mas_ext::cpu {
namespace {

// Elements between two prefetches: a page of float32 values. The processor prefetches along a
// stream by itself, but only to the end of a page, so the kernel prefetches kAhead elements further
// on.
constexpr int64_t kBlock = 1024;
constexpr int64_t kAhead = 8192;

// Updates element i (or elements i and i + 1) and returns its energy Ω δ²: at θ before the step, or
// for a proximal step at the θ it stores. `first` and `second` are the moments, if the rule has
// any.
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

// The number of energies computed before they are summed. If the sum were in the same loop, the
// compiler would not vectorise the rule. One vector's worth stays in a register; for 16-bit values
// the compiler needs longer loops.
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
             ahead * bytes_of(entry.omega_dtype));
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

// If some gradient is not finite, nothing changes.
template <class A>
struct NoRule {
  static constexpr int kMoments = 0;
  MAS_HOST_DEVICE A point(A param, A, A*) const { return param; }
};

// Runs a rule over the list; `make(rule, place)` sets it for the tensor at a place in the lists.
template <template <class> class Rule, bool Proximal, size_t Streams, class Options, class Make>
double sum_of_steps(const FlatList<Streams>& list, const StepScalars& scalars,
                    const Options& options, Make make) {
  return sum_over_chunks(
      list, [&]<class T>(const Chunk<Streams>& chunk, const accumulate_t<T>* omega) {
        using A = accumulate_t<T>;
        Rule<A> rule;
        make(rule, chunk.entry->index);
        return step<Proximal, T>(chunk, omega, penalty_part<A>(scalars, options.maximize, Proximal),
                                 rule);
      });
}

// The corrections of every parameter, from the number of steps it has taken.
template <class Count>
std::vector<BiasCorrection> corrections_of(const char* op, const AdamOptions& options,
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

struct Kernels : CpuKernels {
  static std::vector<BiasCorrection> bias_corrections(const char* op, const Tensor& steps,
                                                      const AdamOptions& options) {
    const Tensor counts = torch::stable::contiguous(steps);
    const void* data = counts.const_data_ptr();
    return dtype_of(counts) == ScalarType::Double
               ? corrections_of(op, options, static_cast<const double*>(data), counts.numel())
               : corrections_of(op, options, static_cast<const float*>(data), counts.numel());
  }

  template <template <class> class Rule, bool Proximal, size_t Streams, class Options>
  static Tensor step(const Call&, const FlatList<Streams>& list, const StepScalars& scalars,
                     const Options& options, const BiasCorrection* corrections) {
    const double sum =
        scalars.found_inf != 0
            ? sum_of_steps<NoRule, false>(list, scalars, options, [](auto&, int64_t) {})
            : sum_of_steps<Rule, Proximal>(list, scalars, options, [&](auto& rule, int64_t place) {
                make_rule(rule, options);
                set_rate(rule, scalars.lr, options, corrections, place);
              });
    return penalty_of(scalars.lambda, sum, list.value_dtype());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  implement_with_packed_lists<&sgd_step_<Kernels>>(m, "sgd_step_");
  implement_with_packed_lists<&adamw_step_<Kernels>>(m, "adamw_step_");
}

}  // namespace mas_ext::cpu
