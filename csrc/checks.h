// Argument checks shared by CPU and CUDA. They run inside the registered operators, so that every
// call passes them, and before anything is written, so that a refused call changes nothing.
// `mas_ext/_operators/checks.py` makes the same checks, in the same words, for the default kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "arguments.h"
#include "numbers.h"
#include "overlap.h"
#include "steps.h"

namespace mas_ext {

inline void check_dtype(const char* op, const Argument& argument, size_t i, ScalarType shared) {
  const ScalarType dtype = argument.tensors[i].dtype;
  const ScalarType expected = argument.is_omega ? accumulate_dtype(shared) : shared;
  const bool may_be_stored =
      argument.is_omega && !argument.writable && expected == ScalarType::Float;
  if (may_be_stored ? is_stored_dtype(dtype) : is_supported(dtype) && dtype == expected) {
    return;
  }
  if (!is_supported(dtype)) {
    fail(op, at(argument, i), " has dtype ", dtype_name(dtype),
         ", which is not supported; pass float32, float64, bfloat16 or float16");
  }
  fail(op, at(argument, i), " has dtype ", dtype_name(dtype), " where ",
       may_be_stored ? "float32, bfloat16 or uint8" : dtype_name(expected), " is expected beside ",
       dtype_name(shared),
       " values; convert it (omega is float64 beside float64 values and float32 beside others, or, "
       "where it is only read, bfloat16 or uint8)");
}

inline void check_layout(const char* op, const Argument& argument, size_t i) {
  if (!argument.tensors[i].strided) {
    fail(op, at(argument, i), " is not a dense (strided) tensor; convert it with to_dense()");
  }
}

inline void check_shape(const char* op, const Argument& argument, const Argument& first, size_t i) {
  const Operand &tensor = argument.tensors[i], &expected = first.tensors[i];
  if (tensor.sizes != expected.sizes) {
    fail(op, at(argument, i), " has shape ", shape_of(tensor), " but ", at(first, i), " has shape ",
         shape_of(expected), "; tensors at one position must have one shape");
  }
}

inline void check_device(const char* op, const Argument& argument, const Argument& first,
                         size_t i) {
  const Operand &tensor = argument.tensors[i], &home = first.tensors.front();
  if (tensor.place != home.place) {
    fail(op, at(argument, i), " is on ", device_of(tensor), " but ", at(first, 0), " is on ",
         device_of(home), "; all tensors of one call must be on one device");
  }
}

// The i-th Ω, which is in codes, must have the scales of its blocks.
inline void check_codes(const char* op, const Argument& omega, size_t i, const Argument& scales) {
  const Operand &codes = omega.tensors[i], &given = scales.tensors[i];
  check_layout(op, scales, i);
  if (given.place != codes.place) {
    fail(op, at(scales, i), " is on ", device_of(given), " but ", at(omega, i), " is on ",
         device_of(codes), "; move it there");
  }
  if (given.dtype != ScalarType::Float) {
    fail(op, at(scales, i), " has dtype ", dtype_name(given.dtype), "; pass float32");
  }
  const int64_t blocks = num_scales(codes.numel);
  if (given.dim() != 1 || given.numel != blocks) {
    fail(op, at(scales, i), " has shape ", shape_of(given), " where [", blocks,
         "] is expected, a scale for every ", kScaleBlock, " codes of ", at(omega, i),
         "; pass those it was compressed with");
  }
  if (!given.contiguous) {
    fail(op, at(scales, i), " is not contiguous; pass contiguous()");
  }
  if (!is_dense(codes)) {
    fail(op, at(omega, i),
         " has uint8 codes that do not fill their memory, along which blocks run; pass a dense "
         "tensor and the scales it was compressed with");
  }
}

// Scales for every Ω that is in codes, and for no other.
inline void check_scales(const char* op, const Argument& omega, const Argument& scales) {
  const Operands& given = scales.tensors;
  if (!given.empty() && given.size() != omega.tensors.size()) {
    fail(op, "omega_scales has ", given.size(), " tensors but omega has ", omega.tensors.size(),
         "; pass one for each, without elements where there are no codes");
  }
  for (size_t i = 0; i < omega.tensors.size(); ++i) {
    const ScalarType dtype = omega.tensors[i].dtype;
    if (is_codes(dtype)) {
      if (given.empty()) {
        fail(op, at(omega, i),
             " has uint8 codes but omega_scales is empty; pass the scales it was compressed with");
      }
      check_codes(op, omega, i, scales);
    } else if (!given.empty() && given[i].numel != 0) {
      fail(op, at(scales, i), " has shape ", shape_of(given[i]), " but ", at(omega, i), " is ",
           dtype_name(dtype), ", which has no scales; pass a tensor without elements");
    }
  }
}

inline const Argument& find_omega(std::initializer_list<Argument> arguments) {
  return *std::find_if(arguments.begin(), arguments.end(),
                       [](const Argument& argument) { return argument.is_omega; });
}

// An argument whose dtype is that of the parameters, as for all arguments but Ω.
inline const Argument& values_of(std::initializer_list<Argument> arguments) {
  return arguments.begin()->is_omega ? *(arguments.begin() + 1) : *arguments.begin();
}

// Every check on the lists; the first argument is what the others are compared with.
inline void check_arguments(const char* op, std::initializer_list<Argument> arguments,
                            const Argument& scales) {
  const Argument& first = *arguments.begin();
  const Argument &values = values_of(arguments), &omega = find_omega(arguments);
  for (const Argument& argument : arguments) {
    if (argument.tensors.size() != first.tensors.size()) {
      fail(op, argument.name, " has ", argument.tensors.size(), " tensors but ", first.name,
           " has ", first.tensors.size(), "; pass one of each per parameter");
    }
  }
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    for (const Argument& argument : arguments) {
      check_layout(op, argument, i);
      check_shape(op, argument, first, i);
      check_device(op, argument, first, i);
      check_dtype(op, argument, i, values.tensors[i].dtype);
    }
  }
  check_scales(op, omega, scales);
  check_no_overlap(op, arguments, scales);
}

inline void check_dimensions(const char* op, const char* name, const Operand& tensor, size_t dims,
                             const char* expected) {
  if (tensor.dim() != dims) {
    fail(op, name, " has shape ", shape_of(tensor), "; pass ", expected);
  }
}

inline void check_least_dimensions(const char* op, const char* name, const Operand& tensor,
                                   size_t least, const char* expected) {
  if (tensor.dim() < least) {
    fail(op, name, " has shape ", shape_of(tensor), "; pass ", expected);
  }
}

inline void check_same_size(const char* op, const char* name, const Operand& tensor, size_t d,
                            const char* other_name, const Operand& other, size_t other_d,
                            const char* meaning) {
  if (tensor.sizes[d] != other.sizes[other_d]) {
    fail(op, name, " has shape ", shape_of(tensor), " but ", other_name, " has shape ",
         shape_of(other), "; size ", d, " of ", name, " and size ", other_d, " of ", other_name,
         " are both ", meaning);
  }
}

inline void check_scalar(const char* op, const char* name, const Tensor& scalar,
                         const Operands& tensors) {
  if (scalar.dim() != 0) {
    fail(op, name, " has shape ", shape_of(scalar), "; pass a number or a 0-dim tensor");
  }
  const ScalarType dtype = dtype_of(scalar);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, name, " has dtype ", dtype_name(dtype), "; pass a float32 or float64 tensor");
  }
  if (!scalar.is_cpu() && !tensors.empty() &&
      scalar.get_device_index() != tensors.front().place.device_index) {
    fail(op, name, " is on ", device_of(scalar), " but the tensors are on ",
         device_of(tensors.front()), "; keep it on the CPU or on their device");
  }
}

inline void check_non_negative(const char* op, const char* name, double value) {
  if (!(value >= 0) || std::isinf(value)) {
    fail(op, name, " is ", value, "; pass a finite number that is not negative");
  }
}

// Of single tensors, whose shapes differ.
inline void check_each(const char* op, std::initializer_list<Argument> arguments,
                       ScalarType shared) {
  for (const Argument& argument : arguments) {
    check_layout(op, argument, 0);
    check_device(op, argument, *arguments.begin(), 0);
    check_dtype(op, argument, 0, shared);
  }
}

// Ω[p, *d], left[b, *t, p] and right[b, *t, *d], where *t and *d are one dimension or several.
inline void check_outer(const char* op, std::initializer_list<Argument> arguments) {
  const Argument* first = arguments.begin();
  const Operand &omega = first[0].tensors[0], &left = first[1].tensors[0],
                &right = first[2].tensors[0];
  check_each(op, arguments, left.dtype);
  check_least_dimensions(op, "omega", omega, 2, "a matrix [p, d]");
  check_least_dimensions(op, "left", left, 3, "[samples, positions, p]");
  const size_t positions = left.dim() - 2, columns = omega.dim() - 1;
  check_dimensions(op, "right", right, 1 + positions + columns, "[samples, positions, d]");
  check_same_size(op, "right", right, 0, "left", left, 0, "the samples");
  for (size_t d = 1; d <= positions; ++d) {
    check_same_size(op, "right", right, d, "left", left, d, "the positions");
  }
  check_same_size(op, "left", left, 1 + positions, "omega", omega, 0, "p");
  for (size_t d = 1; d <= columns; ++d) {
    check_same_size(op, "right", right, positions + d, "omega", omega, d, "d");
  }
  check_no_overlap(op, arguments, {.name = "", .tensors = {}});
}

// A[rank, in], B[out, rank], Ω[out, in], and gradients in the shapes of A and B. The arguments are
// the gradients, where there are any, then A, B and Ω.
inline void check_low_rank(const char* op, std::initializer_list<Argument> arguments,
                           const std::optional<Tensor>& omega_scales) {
  const Argument* factors = arguments.end() - 3;
  const Operand &a = factors[0].tensors[0], &b = factors[1].tensors[0],
                &omega = factors[2].tensors[0];
  check_each(op, arguments, a.dtype);
  check_dimensions(op, "a", a, 2, "[rank, in]");
  check_dimensions(op, "b", b, 2, "[out, rank]");
  check_dimensions(op, "omega", omega, 2, "a matrix [out, in]");
  check_same_size(op, "b", b, 1, "a", a, 0, "the rank");
  check_same_size(op, "omega", omega, 0, "b", b, 0, "out");
  check_same_size(op, "omega", omega, 1, "a", a, 1, "in");
  for (const Argument *grad = arguments.begin(), *of = factors; grad < factors; ++grad, ++of) {
    if (grad->tensors[0].sizes != of->tensors[0].sizes) {
      fail(op, grad->name, " has shape ", shape_of(grad->tensors[0]), " but ", of->name,
           " has shape ", shape_of(of->tensors[0]), "; pass a gradient in its shape");
    }
  }
  const Argument scales{.name = "omega_scales",
                        .tensors = omega_scales ? Operands(*omega_scales) : Operands(),
                        .is_list = false};
  check_scales(op, factors[2], scales);
  check_no_overlap(op, arguments, scales);
}

// ------------------------------------------------------------------------------------------------
// Optimizer steps
// ------------------------------------------------------------------------------------------------
inline void check_positive(const char* op, const char* name, double value) {
  if (!(value > 0) || std::isinf(value)) {
    fail(op, name, " is ", value, "; pass a finite number above zero");
  }
}

inline void check_beta(const char* op, const char* name, double value) {
  if (!(value >= 0) || !(value < 1)) {
    fail(op, name, " is ", value, "; pass a number from 0 up to but not including 1");
  }
}

inline void check_options(const char* op, const SgdOptions& options,
                          const Operands& momentum_buffers) {
  check_non_negative(op, "momentum", options.momentum);
  check_non_negative(op, "dampening", options.dampening);
  check_non_negative(op, "weight_decay", options.weight_decay);
  if (options.nesterov && (options.momentum == 0 || options.dampening != 0)) {
    fail(op, "nesterov needs a momentum above zero and no dampening");
  }
  if (options.momentum == 0 && !momentum_buffers.empty()) {
    fail(op, "momentum_buffers has ", momentum_buffers.size(),
         " tensors but momentum is 0; leave them out");
  }
}

inline void check_options(const char* op, const AdamOptions& options) {
  check_beta(op, "beta1", options.beta1);
  check_beta(op, "beta2", options.beta2);
  check_non_negative(op, "eps", options.eps);
  check_non_negative(op, "weight_decay", options.weight_decay);
}

inline void check_steps(const char* op, const Tensor& steps, const Operands& params) {
  if (steps.dim() != 1 || steps.size(0) != static_cast<int64_t>(params.size())) {
    fail(op, "steps has shape ", shape_of(steps), " but there are ", params.size(),
         " params; pass one count for each, as one tensor");
  }
  const ScalarType dtype = dtype_of(steps);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, "steps has dtype ", dtype_name(dtype), "; pass a float32 or float64 tensor");
  }
  if (!params.empty() && Place(steps) != params.front().place) {
    fail(op, "steps is on ", device_of(steps), " but the tensors are on ",
         device_of(params.front()), "; move it there");
  }
}

}  // namespace mas_ext
