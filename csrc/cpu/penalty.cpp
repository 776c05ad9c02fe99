// The penalty λ/2 Σ Ω(θ−θ*)² on the CPU: its value alone, with its gradient, and with the gradient
// added to what is there. Each is one pass: 12, 16 and 20 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../formulas.h"
#include "../penalty_arguments.h"
#include "chunks.h"
#include "lanes.h"
#include "multiversion.h"
#include "scalars.h"

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

// Writes or adds the gradient on the way.
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

template <bool Add>
double gradient_pass(const FlatList<4>& list, double coefficient) {
  return sum_over_chunks(list, [&]<class T>(const Chunk<4>& chunk, const accumulate_t<T>* omega) {
    return energy_and_gradient<Add>(chunk.stream<T>(0), chunk.stream<const T>(1),
                                    chunk.stream<const T>(2), omega, chunk.size,
                                    finite<accumulate_t<T>>(coefficient));
  });
}

Tensor penalty(const TensorList& params, const TensorList& anchors, const TensorList& omega,
               const TensorList& omega_scales, const Tensor& lambda_reg) {
  constexpr const char* op = "penalty";
  const double lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const FlatList<3> list = state_list(op, params, anchors, omega, omega_scales, false);
  const double sum =
      sum_over_chunks(list, [&]<class T>(const Chunk<3>& chunk, const accumulate_t<T>* omega) {
        return energy(chunk.stream<const T>(0), chunk.stream<const T>(1), omega, chunk.size);
      });
  return make_scalar(0.5 * lambda * sum, list.value_dtype());
}

std::tuple<Tensor, TensorList> penalty_and_grad(const TensorList& params, const TensorList& anchors,
                                                const TensorList& omega,
                                                const TensorList& omega_scales,
                                                const Tensor& lambda_reg) {
  constexpr const char* op = "penalty_and_grad";
  const double lambda = read_scalar(op, "lambda_reg", lambda_reg, params);
  const TensorList grads = new_gradients(op, params, anchors, omega, omega_scales);
  FlatList<4> list = gradient_list(op, grads, params, anchors, omega, omega_scales);
  const double sum = gradient_pass<false>(list, lambda);
  list.write_back();
  return {make_scalar(0.5 * lambda * sum, list.value_dtype()), grads};
}

Tensor add_penalty_grad_(const TensorList& grads, const TensorList& params,
                         const TensorList& anchors, const TensorList& omega,
                         const TensorList& omega_scales, const Tensor& lambda_reg,
                         const std::optional<Tensor>& grad_scale) {
  constexpr const char* op = "add_penalty_grad_";
  const double lambda = read_scalar(op, "lambda_reg", lambda_reg, grads);
  const double scale = grad_scale ? read_scalar(op, "grad_scale", *grad_scale, grads) : 1.0;
  check_non_negative(op, "lambda_reg", lambda);
  check_non_negative(op, "grad_scale", scale);
  FlatList<4> list = gradient_list(op, grads, params, anchors, omega, omega_scales);
  const double sum = gradient_pass<true>(list, lambda * scale);
  list.write_back();
  return make_scalar(0.5 * lambda * sum, list.value_dtype());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CPU, m) {
  m.impl("penalty", TORCH_BOX(&penalty));
  m.impl("penalty_and_grad", TORCH_BOX(&penalty_and_grad));
  m.impl("add_penalty_grad_", TORCH_BOX(&add_penalty_grad_));
}

}  // namespace mas_ext::cpu
