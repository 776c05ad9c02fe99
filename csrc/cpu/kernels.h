// What all CPU kernels give to the operators of ../operators.h: scalars in and out.
#pragma once

#include "../operators.h"

namespace mas_ext::cpu {

struct CpuKernels {
  using Number = double;
  using StepNumbers = StepScalars;

  static double constant(double value) { return value; }
  static const double* known(const double& number) { return &number; }

  static double read(const char* op, const char* name, const Tensor& scalar) {
    if (!scalar.is_cpu()) {
      fail(op, name, " is on ", device_of(scalar), " but the tensors are on cpu; move it there");
    }
    return dtype_of(scalar) == ScalarType::Double
               ? *static_cast<const double*>(scalar.const_data_ptr())
               : static_cast<double>(*static_cast<const float*>(scalar.const_data_ptr()));
  }
};

// λ/2 times the sum, as a 0-dim tensor.
inline Tensor penalty_of(double lambda, double sum, ScalarType dtype) {
  const double value = 0.5 * lambda * sum;
  Tensor result = torch::stable::empty({}, dtype);
  if (dtype == ScalarType::Double) {
    *static_cast<double*>(result.mutable_data_ptr()) = value;
  } else {
    *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  }
  return result;
}

}  // namespace mas_ext::cpu
