// Number types: what kernels read and write, and what they compute in.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "formulas.h"

namespace mas_ext {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// float64 is computed in float64. All other types are computed, and their Ω accumulated, in
// float32.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An Ω that is only read may be stored in less than float32: rounded to bfloat16, or in codes
// (`dequantize`). Blocks of codes, in the order of memory, share a scale.
constexpr int64_t kScaleBlock = 256;

constexpr int64_t num_scales(int64_t numel) { return (numel + kScaleBlock - 1) / kScaleBlock; }

inline bool is_codes(ScalarType dtype) { return dtype == ScalarType::Byte; }

inline bool is_stored_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || is_codes(dtype);
}

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Double: return 8;
    default: return 4;
  }
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    default: return torch::headeronly::toString(dtype);
  }
}

MAS_HOST_DEVICE int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Of a matrix: whether a step along a column is shorter in memory than one along a row.
inline bool rows_are_inner(int64_t rows, int64_t columns, int64_t row_stride,
                           int64_t column_stride) {
  return columns == 1 || (rows > 1 && row_stride < column_stride);
}

// Calls `function.template operator()<T>()` with the C++ type of a supported dtype.
template <class F>
decltype(auto) visit_dtype(ScalarType dtype, F&& function) {
  switch (dtype) {
    case ScalarType::Float: return function.template operator()<float>();
    case ScalarType::Double: return function.template operator()<double>();
    case ScalarType::BFloat16: return function.template operator()<BFloat16>();
    case ScalarType::Half: return function.template operator()<Half>();
    default: throw std::logic_error("mas_ext: dtype passed the checks but has no kernel");
  }
}

}  // namespace mas_ext
