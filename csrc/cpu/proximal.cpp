// proximal_step_ on the CPU: θ ← (θ + ηλΩθ*)/(1 + ηλΩ), 16 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include "../formulas.h"
#include "chunks.h"
#include "multiversion.h"
#include "scalars.h"

namespace mas_ext::cpu {
namespace {

// Returns Σ Ω δ² at the parameters as they are stored afterwards.
template <class T, class A>
MAS_MULTIVERSION double step(T* __restrict__ params, const T* __restrict__ anchors,
                             const A* __restrict__ omega, int64_t size, A step_times_lambda) {
  return sum_in_lanes(size, [&](int64_t i) {
    const A param = static_cast<A>(params[i]), anchor = static_cast<A>(anchors[i]);
    const A moved = proximal_point(param, param - anchor, omega[i], step_times_lambda);
    // Rounded twice, not copied: a struct copy of a half-precision type would stop the vectoriser.
    params[i] = static_cast<T>(moved);
    return penalty_energy(static_cast<A>(static_cast<T>(moved)) - anchor, omega[i]);
  });
}

Tensor proximal_step_(const TensorList& params, const TensorList& anchors, const TensorList& omega,
                      const Tensor& lambda_reg, const Tensor& lr) {
  constexpr const char* op = "proximal_step_";
  const double lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const double rate = read_scalar(op, "lr", lr, params);
  check_non_negative(op, "lambda_reg", lambda);
  check_non_negative(op, "lr", rate);
  FlatList<3> list(op, {{.name = "params", .tensors = params, .writable = true},
                        {.name = "anchors", .tensors = anchors},
                        {.name = "omega", .tensors = omega, .is_omega = true}});
  const double sum = sum_over_chunks(list, [&]<class T>(const Chunk<3>& chunk) {
    using A = accumulate_t<T>;
    return step(chunk.stream<T>(0), chunk.stream<const T>(1), chunk.stream<const A>(2), chunk.size,
                finite<A>(rate * lambda));
  });
  list.write_back();
  return make_scalar(0.5 * lambda * sum, list.value_dtype());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) { m.impl("proximal_step_", TORCH_BOX(&proximal_step_)); }

}  // namespace mas_ext::cpu
