// Scalars in and out of a CPU operator.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "../checks.h"

namespace mas_ext::cpu {

inline double read_scalar(const char* op, const char* name, const Tensor& scalar,
                          const TensorList& tensors) {
  check_scalar(op, name, scalar, tensors);
  if (!scalar.is_cpu()) {
    fail(op, name, " is on ", device_of(scalar), " but the tensors are on cpu; move it there");
  }
  return dtype_of(scalar) == ScalarType::Double
             ? *static_cast<const double*>(scalar.const_data_ptr())
             : static_cast<double>(*static_cast<const float*>(scalar.const_data_ptr()));
}

inline Tensor make_scalar(double value, ScalarType dtype) {
  Tensor result = torch::stable::empty({}, dtype);
  if (dtype == ScalarType::Double) {
    *static_cast<double*>(result.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  }
  return result;
}

}  // namespace mas_ext::cpu
