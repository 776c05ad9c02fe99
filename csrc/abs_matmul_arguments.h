// From the tensors of accumulate_abs_matmul_ to what its kernels see.
#pragma once

#include "abs_matmul.h"
#include "checks.h"

namespace mas_ext {

inline Factor factor_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Checks the arguments of `op`; nothing is written if they are refused.
inline AbsMatmul prepare_abs_matmul(const char* op, const Tensor& omega, const Tensor& left,
                                    const Tensor& right, double scale) {
  check_abs_matmul(op, omega, left, right, scale);
  AbsMatmul call{omega.data_ptr(), omega.stride(0), omega.stride(1), factor_of(left),
                 factor_of(right), left.size(0),    left.size(1),    omega.size(0),
                 omega.size(1),    dtype_of(left),  scale,           false};
  turn_columns_innermost(call);
  turn_samples_into_positions(call);
  return call;
}

}  // namespace mas_ext
