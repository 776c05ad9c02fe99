// The lists that the penalty's operators and the proximal step walk, in the order in which kernels
// see them: what is written, then what is read, Ω last. For CPU and CUDA.
#pragma once

#include "checks.h"
#include "tensor_list.h"

namespace mas_ext {

// θ, θ* and Ω, of which only θ may be written.
inline FlatList<3> state_list(const char* op, const TensorList& params, const TensorList& anchors,
                              const TensorList& omega, const TensorList& omega_scales,
                              bool writes_params) {
  return FlatList<3>(op,
                     {{.name = "params", .tensors = params, .writable = writes_params},
                      {.name = "anchors", .tensors = anchors},
                      {.name = "omega", .tensors = omega, .is_omega = true}},
                     omega_scales);
}

// The same behind the gradients that are written.
inline FlatList<4> gradient_list(const char* op, const TensorList& grads, const TensorList& params,
                                 const TensorList& anchors, const TensorList& omega,
                                 const TensorList& omega_scales) {
  return FlatList<4>(op,
                     {{.name = "grads", .tensors = grads, .writable = true},
                      {.name = "params", .tensors = params},
                      {.name = "anchors", .tensors = anchors},
                      {.name = "omega", .tensors = omega, .is_omega = true}},
                     omega_scales);
}

// New gradients, once it is known that they can be had.
inline TensorList new_gradients(const char* op, const TensorList& params, const TensorList& anchors,
                                const TensorList& omega, const TensorList& omega_scales) {
  check_arguments(op,
                  {{.name = "params", .tensors = params},
                   {.name = "anchors", .tensors = anchors},
                   {.name = "omega", .tensors = omega, .is_omega = true}},
                  omega_scales);
  return empty_like_each(params);
}

}  // namespace mas_ext
