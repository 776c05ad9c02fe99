// proximal_step_ on the CPU: θ ← (θ + ηλΩθ*)/(1 + ηλΩ), 16 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include "../formulas.h"
#include "../penalty_arguments.h"
#include "chunks.h"
#include "lanes.h"
#include "multiversion.h"
#include "scalars.h"

namespace mas_ext::cpu {
namespace {

// Returns Σ Ω δ² at the parameters as they are stored afterwards.
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

Tensor proximal_step_(const TensorList& params, const TensorList& anchors, const TensorList& omega,
                      const TensorList& omega_scales, const Tensor& lambda_reg, const Tensor& lr) {
  constexpr const char* op = "proximal_step_";
  const double lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const double rate = read_scalar(op, "lr", lr, params);
  check_non_negative(op, "lambda_reg", lambda);
  check_non_negative(op, "lr", rate);
  FlatList<3> list = state_list(op, params, anchors, omega, omega_scales, true);
  const double sum =
      sum_over_chunks(list, [&]<class T>(const Chunk<3>& chunk, const accumulate_t<T>* omega) {
        return step(chunk.stream<T>(0), chunk.stream<const T>(1), omega, chunk.size,
                    finite<accumulate_t<T>>(rate * lambda));
      });
  list.write_back();
  return make_scalar(0.5 * lambda * sum, list.value_dtype());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) { m.impl("proximal_step_", TORCH_BOX(&proximal_step_)); }

}  // namespace mas_ext::cpu
