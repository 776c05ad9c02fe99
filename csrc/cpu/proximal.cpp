// proximal_step_ on the CPU: θ ← (θ + ηλΩθ*)/(1 + ηλΩ), 16 bytes per float32 parameter.
#include "../formulas.h"
#include "chunks.h"
#include "kernels.h"
#include "lanes.h"
#include "multiversion.h"

namespace mas_ext::cpu {
namespace {

// Returns Σ Ω δ² at the stored parameters.
template <class T, class A>
MAS_MULTIVERSION double step(T* __restrict__ params, const T* __restrict__ anchors,
                             const A* __restrict__ omega, int64_t size, A step_times_lambda) {
  return sum_in_lanes<T>(size, [&](auto at, int64_t i) {
    auto param = at.load(params, i), anchor = at.load(anchors, i), weight = at.load(omega, i);
    at.for_each([&](auto of) {
      of(param) = proximal_point(of(param), of(param) - of(anchor), of(weight), step_times_lambda);
    });
    at.store(params, i, param);
    return penalty_energy(at.template stored<T>(param) - anchor, weight);
  });
}

struct Kernels : CpuKernels {
  static Tensor proximal_step(const Call&, const FlatList<3>& list, double lambda, double lr) {
    const double sum =
        sum_over_chunks(list, [&]<class T>(const Chunk<3>& chunk, const accumulate_t<T>* omega) {
          return step(chunk.stream<T>(0), chunk.stream<const T>(1), omega, chunk.size,
                      finite<accumulate_t<T>>(lr * lambda));
        });
    return penalty_of(lambda, sum, list.value_dtype());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  implement_with_packed_lists<&proximal_step_<Kernels>>(m, "proximal_step_");
}

}  // namespace mas_ext::cpu
