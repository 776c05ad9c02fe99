// Argument checks shared by CPU and CUDA. They run inside the registered operators, so no entry
// point skips them, and before anything is written, so a refused call leaves every tensor as it
// was. `mas_ext/_checks.py` makes the same checks, in the same words, for the reference kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"

namespace mas_ext {

using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// What tensor.scalar_type() gives. That asks torch for the code of one dtype after another, for
// every tensor anew; here the codes of those that kernels take are asked for once.
inline ScalarType dtype_of(const Tensor& tensor) {
  static const std::array<std::pair<int32_t, ScalarType>, 4> supported{{
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_float64(), ScalarType::Double},
  }};
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  for (const auto& [supported_code, dtype] : supported) {
    if (code == supported_code) {
      return dtype;
    }
  }
  return tensor.scalar_type();
}

inline bool is_strided(const Tensor& tensor) {
  static const int32_t strided = aoti_torch_layout_strided();
  int32_t layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  return layout == strided;
}

struct Place {
  explicit Place(const Tensor& tensor)
      : is_cpu(tensor.is_cpu()), device_index(tensor.get_device_index()) {}
  bool operator==(const Place&) const = default;

  bool is_cpu;
  int32_t device_index;
};

// What checks and kernels want to know of a tensor, read once: torch's stable ABI answers every
// question by a function call or several, and a call has many small tensors.
struct Operand {
  explicit Operand(const Tensor& tensor)
      : tensor(&tensor),
        dtype(dtype_of(tensor)),
        place(tensor),
        strided(is_strided(tensor)),
        numel(tensor.numel()),
        sizes(tensor.sizes()) {
    if (strided) {  // a sparse tensor has none of these
      strides = tensor.strides();
      contiguous = tensor.is_contiguous();
      data = tensor.data_ptr();
    }
  }

  size_t dim() const { return sizes.size(); }
  size_t element_size() const { return tensor->element_size(); }

  const Tensor* tensor;
  ScalarType dtype;
  Place place;
  bool strided, contiguous = false;
  int64_t numel;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  void* data = nullptr;
};

// Of the tensors of one argument, which have to outlive them.
struct Operands : std::vector<Operand> {
  Operands(const TensorList& tensors) : vector(tensors.begin(), tensors.end()) {}
  Operands(const Tensor& tensor) : vector{Operand(tensor)} {}
};

// One argument of an operator: a list, or a single tensor as a list of one.
struct Argument {
  const char* name;
  Operands tensors;
  bool is_omega = false;  // held in the accumulation dtype; all others share one dtype
  bool writable = false;
  bool is_list = true;
};

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "mas_ext::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string at(const Argument& argument, size_t i) {
  const std::string name(argument.name);
  return argument.is_list ? name + "[" + std::to_string(i) + "]" : name;
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text << (d ? ", " : "") << tensor.size(d);
  }
  text << "]";
  return text.str();
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "device " + std::to_string(tensor.get_device_index());
}

inline void check_dtype(const char* op, const Argument& argument, size_t i, ScalarType shared) {
  const ScalarType dtype = argument.tensors[i].dtype;
  if (!is_supported(dtype)) {
    fail(op, at(argument, i), " has dtype ", dtype_name(dtype),
         ", which is not supported; pass float32, float64, bfloat16 or float16");
  }
  const ScalarType expected = argument.is_omega ? accumulate_dtype(shared) : shared;
  if (dtype != expected) {
    fail(op, at(argument, i), " has dtype ", dtype_name(dtype), " where ", dtype_name(expected),
         " is expected beside ", dtype_name(shared),
         " values; convert it (omega is float64 beside float64 values and float32 beside others)");
  }
}

inline void check_layout(const char* op, const Argument& argument, size_t i) {
  if (!argument.tensors[i].strided) {
    fail(op, at(argument, i), " is not a dense (strided) tensor; convert it with to_dense()");
  }
}

inline void check_shape(const char* op, const Argument& argument, const Argument& first, size_t i) {
  const Operand &tensor = argument.tensors[i], &expected = first.tensors[i];
  if (tensor.sizes != expected.sizes) {
    fail(op, at(argument, i), " has shape ", shape_of(*tensor.tensor), " but ", at(first, i),
         " has shape ", shape_of(*expected.tensor),
         "; tensors at one position must have one shape");
  }
}

inline void check_device(const char* op, const Argument& argument, const Argument& first,
                         size_t i) {
  const Operand &tensor = argument.tensors[i], &home = first.tensors.front();
  if (tensor.place != home.place) {
    fail(op, at(argument, i), " is on ", device_of(*tensor.tensor), " but ", at(first, 0),
         " is on ", device_of(*home.tensor), "; all tensors of one call must be on one device");
  }
}

// The dimensions that have steps, as (stride, size), the smallest step first.
inline std::vector<std::pair<int64_t, int64_t>> sorted_dims(const Operand& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (size_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.sizes[d] != 1) {
      dims.emplace_back(tensor.strides[d], tensor.sizes[d]);
    }
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Dense: its elements fill one range of memory, each place once, in whatever order.
inline bool is_dense(const Operand& tensor) {
  if (tensor.contiguous) {
    return true;
  }
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride != expected) {
      return false;
    }
    expected *= size;
  }
  return true;
}

// Every step goes beyond all that smaller steps reach, as in any slice of a dense tensor: no place
// comes twice. The reverse need not hold.
inline bool is_nested(const Operand& tensor) {
  if (tensor.contiguous) {
    return true;
  }
  int64_t reach = 0;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride <= reach) {
      return false;
    }
    reach += (size - 1) * stride;
  }
  return true;
}

// The memory a tensor touches: [begin, end) in bytes.
struct Span {
  uintptr_t begin, end;
  const Argument* argument;
  size_t index;

  const Operand& tensor() const { return argument->tensors[index]; }
  bool is_written() const { return argument->writable; }
  std::string name() const { return at(*argument, index); }
};

inline Span span_of(const Argument& argument, size_t i) {
  const Operand& tensor = argument.tensors[i];
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data);
  int64_t elements = tensor.numel;
  if (!tensor.contiguous) {
    elements = 1;
    for (size_t d = 0; d < tensor.dim(); ++d) {
      elements += (tensor.sizes[d] - 1) * tensor.strides[d];
    }
  }
  return {begin, begin + static_cast<uintptr_t>(elements) * tensor.element_size(), &argument, i};
}

// The address of every element, sorted. Only for the rare tensor that is not dense.
inline std::vector<uintptr_t> addresses(const Operand& tensor) {
  std::vector<uintptr_t> result{reinterpret_cast<uintptr_t>(tensor.data)};
  for (size_t d = 0; d < tensor.dim(); ++d) {
    const size_t count = result.size();
    const auto step = static_cast<uintptr_t>(tensor.strides[d]) * tensor.element_size();
    for (int64_t k = 1; k < tensor.sizes[d]; ++k) {
      for (size_t j = 0; j < count; ++j) {
        result.push_back(result[j] + static_cast<uintptr_t>(k) * step);
      }
    }
  }
  std::sort(result.begin(), result.end());
  return result;
}

// Whether two tensors whose spans meet really share memory (two column slices do not).
inline bool share_memory(const Span& a, const Span& b) {
  const Operand &first = a.tensor(), &second = b.tensor();
  if (is_dense(first) && is_dense(second)) {
    return true;
  }
  const auto left = addresses(first), right = addresses(second);
  const auto left_size = first.element_size(), right_size = second.element_size();
  for (size_t i = 0, j = 0; i < left.size() && j < right.size();) {
    if (left[i] + left_size <= right[j]) {
      ++i;
    } else if (right[j] + right_size <= left[i]) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

inline void check_no_self_overlap(const char* op, const Span& span) {
  if (is_nested(span.tensor())) {
    return;
  }
  const auto places = addresses(span.tensor());
  if (std::adjacent_find(places.begin(), places.end()) != places.end()) {
    fail(op, span.name(),
         " is written but overlaps itself in memory (an expanded tensor?); pass a clone()");
  }
}

inline void check_apart(const char* op, const Span& a, const Span& b) {
  if ((a.is_written() || b.is_written()) && share_memory(a, b)) {
    const Span &written = a.is_written() ? a : b, &aliased = a.is_written() ? b : a;
    fail(op, written.name(), " is written but shares memory with ", aliased.name(),
         "; pass a clone() of one of them");
  }
}

// Nothing that is written may share memory with anything else: two threads would race for it.
inline void check_no_overlap(const char* op, std::initializer_list<Argument> arguments) {
  if (std::none_of(arguments.begin(), arguments.end(),
                   [](const Argument& argument) { return argument.writable; })) {
    return;
  }
  std::vector<Span> spans;
  spans.reserve(arguments.size() * arguments.begin()->tensors.size());
  for (const Argument& argument : arguments) {
    for (size_t i = 0; i < argument.tensors.size(); ++i) {
      if (argument.tensors[i].numel > 0) {
        spans.push_back(span_of(argument, i));
        if (argument.writable) {
          check_no_self_overlap(op, spans.back());
        }
      }
    }
  }
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::vector<const Span*> open;  // spans that reach beyond the one at hand
  for (const Span& span : spans) {
    std::erase_if(open, [&](const Span* other) { return other->end <= span.begin; });
    for (const Span* other : open) {
      check_apart(op, span, *other);
    }
    open.push_back(&span);
  }
}

// Every check on the lists; the first argument is the one the others are held against.
inline void check_arguments(const char* op, std::initializer_list<Argument> arguments) {
  const Argument& first = *arguments.begin();
  const Argument& values = first.is_omega ? *(arguments.begin() + 1) : first;
  for (const Argument& argument : arguments) {
    if (argument.tensors.size() != first.tensors.size()) {
      fail(op, argument.name, " has ", argument.tensors.size(), " tensors but ", first.name,
           " has ", first.tensors.size(), "; pass one of each per parameter");
    }
  }
  if (first.tensors.empty()) {
    return;
  }
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    for (const Argument& argument : arguments) {
      check_layout(op, argument, i);
      check_shape(op, argument, first, i);
      check_device(op, argument, first, i);
      check_dtype(op, argument, i, values.tensors[i].dtype);
    }
  }
  check_no_overlap(op, arguments);
}

inline void check_dimensions(const char* op, const char* name, const Tensor& tensor, int64_t dims,
                             const char* expected) {
  if (tensor.dim() != dims) {
    fail(op, name, " has shape ", shape_of(tensor), "; pass ", expected);
  }
}

inline void check_same_size(const char* op, const char* name, const Tensor& tensor, int64_t d,
                            const char* other_name, const Tensor& other, int64_t other_d,
                            const char* meaning) {
  if (tensor.size(d) != other.size(other_d)) {
    fail(op, name, " has shape ", shape_of(tensor), " but ", other_name, " has shape ",
         shape_of(other), "; size ", d, " of ", name, " and size ", other_d, " of ", other_name,
         " are both ", meaning);
  }
}

inline void check_scalar(const char* op, const char* name, const Tensor& scalar,
                         const TensorList& tensors) {
  if (scalar.dim() != 0) {
    fail(op, name, " has shape ", shape_of(scalar), "; pass a number or a 0-dim tensor");
  }
  const ScalarType dtype = dtype_of(scalar);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) {
    fail(op, name, " has dtype ", dtype_name(dtype), "; pass a float32 or float64 tensor");
  }
  if (!scalar.is_cpu() && !tensors.empty() &&
      scalar.get_device_index() != tensors.front().get_device_index()) {
    fail(op, name, " is on ", device_of(scalar), " but the tensors are on ",
         device_of(tensors.front()), "; keep it on the CPU or on their device");
  }
}

// A strength on the CPU is looked at before anything is written; one on a device is not, since
// looking would wait for it.
inline void check_non_negative(const char* op, const char* name, double value) {
  if (!(value >= 0) || std::isinf(value)) {
    fail(op, name, " is ", value, "; pass a finite number that is not negative");
  }
}

// Ω[p, d], left[b, t, p] and right[b, t, d].
inline void check_abs_matmul(const char* op, const Tensor& omega, const Tensor& left,
                             const Tensor& right, double scale) {
  check_non_negative(op, "scale", scale);
  const std::initializer_list<Argument> arguments{
      {.name = "omega", .tensors = omega, .is_omega = true, .writable = true, .is_list = false},
      {.name = "left", .tensors = left, .is_list = false},
      {.name = "right", .tensors = right, .is_list = false}};
  for (const Argument& argument : arguments) {
    check_layout(op, argument, 0);
    check_device(op, argument, *arguments.begin(), 0);
    check_dtype(op, argument, 0, dtype_of(left));
  }
  check_dimensions(op, "omega", omega, 2, "a matrix [p, d]");
  check_dimensions(op, "left", left, 3, "[samples, positions, p]");
  check_dimensions(op, "right", right, 3, "[samples, positions, d]");
  check_same_size(op, "right", right, 0, "left", left, 0, "the samples");
  check_same_size(op, "right", right, 1, "left", left, 1, "the positions");
  check_same_size(op, "left", left, 2, "omega", omega, 0, "p");
  check_same_size(op, "right", right, 2, "omega", omega, 1, "d");
  check_no_overlap(op, arguments);
}

}  // namespace mas_ext
