// The penalty λ/2 Σ Ω(θ−θ*)² on the CPU: its value alone, with its gradient, and with the gradient
// added to what is there. Each is one pass: 12, 16 and 20 bytes per float32 parameter.
#include "../formulas.h"
#include "chunks.h"
#include "kernels.h"
#include "lanes.h"
#include "multiversion.h"

namespace mas_ext::cpu {
namespace {

template <class T, class A>
MAS_MULTIVERSION double energy(const T* __restrict__ params, const T* __restrict__ anchors,
                               const A* __restrict__ omega, int64_t size) {
  return sum_in_lanes<T>(size, [&](auto at, int64_t i) {
    const auto delta = at.load(params, i) - at.load(anchors, i);
    return penalty_energy(delta, at.load(omega, i));
  });
}

// Also writes the gradient, or adds it.
template <bool Add, class T, class A>
MAS_MULTIVERSION double energy_and_gradient(T* __restrict__ grads, const T* __restrict__ params,
                                            const T* __restrict__ anchors,
                                            const A* __restrict__ omega, int64_t size,
                                            A coefficient) {
  return sum_in_lanes<T>(size, [&](auto at, int64_t i) {
    const auto delta = at.load(params, i) - at.load(anchors, i), weight = at.load(omega, i);
    const auto gradient = penalty_gradient(delta, weight, at.all(coefficient));
    if constexpr (Add) {
      at.store(grads, i, at.load(grads, i) + gradient);
    } else {
      at.store(grads, i, gradient);
    }
    return penalty_energy(delta, weight);
  });
}

struct Kernels : CpuKernels {
  static Tensor penalty(const Call&, const FlatList<3>& list, double lambda) {
    const double sum =
        sum_over_chunks(list, []<class T>(const Chunk<3>& chunk, const accumulate_t<T>* omega) {
          return energy(chunk.stream<const T>(0), chunk.stream<const T>(1), omega, chunk.size);
        });
    return penalty_of(lambda, sum, list.value_dtype());
  }

  template <bool Add>
  static Tensor penalty_gradient(const Call&, const FlatList<4>& list, double lambda,
                                 double grad_scale) {
    const double sum =
        sum_over_chunks(list, [&]<class T>(const Chunk<4>& chunk, const accumulate_t<T>* omega) {
          return energy_and_gradient<Add>(chunk.stream<T>(0), chunk.stream<const T>(1),
                                          chunk.stream<const T>(2), omega, chunk.size,
                                          finite<accumulate_t<T>>(lambda * grad_scale));
        });
    return penalty_of(lambda, sum, list.value_dtype());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  m.impl("penalty", TORCH_BOX(&FromLists<&penalty<Kernels>>::call));
  m.impl("penalty_and_grad", TORCH_BOX(&FromLists<&penalty_and_grad<Kernels>>::call));
  implement_with_packed_lists<&add_penalty_grad_<Kernels>>(m, "add_penalty_grad_");
}

}  // namespace mas_ext::cpu
