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

// One argument of an operator: a list, or a single tensor as a list of one.
struct Argument {
  const char* name;
  const TensorList& tensors;
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
  const ScalarType dtype = argument.tensors[i].scalar_type();
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

struct Place {
  explicit Place(const Tensor& tensor)
      : is_cpu(tensor.is_cpu()), device_index(tensor.get_device_index()) {}
  bool operator==(const Place&) const = default;

  bool is_cpu;
  int32_t device_index;
};

inline void check_layout(const char* op, const Argument& argument, size_t i) {
  if (argument.tensors[i].layout() != torch::headeronly::Layout::Strided) {
    fail(op, at(argument, i), " is not a dense (strided) tensor; convert it with to_dense()");
  }
}

inline void check_shape(const char* op, const Argument& argument, const Argument& first, size_t i) {
  const Tensor &tensor = argument.tensors[i], &expected = first.tensors[i];
  const auto sizes = tensor.sizes(), expected_sizes = expected.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected_sizes.begin(), expected_sizes.end())) {
    fail(op, at(argument, i), " has shape ", shape_of(tensor), " but ", at(first, i), " has shape ",
         shape_of(expected), "; tensors at one position must have one shape");
  }
}

inline void check_device(const char* op, const Argument& argument, const Argument& first,
                         const Place& home, size_t i) {
  if (Place(argument.tensors[i]) != home) {
    fail(op, at(argument, i), " is on ", device_of(argument.tensors[i]), " but ", at(first, 0),
         " is on ", device_of(first.tensors.front()),
         "; all tensors of one call must be on one device");
  }
}

// The dimensions that have steps, as (stride, size), the smallest step first.
inline std::vector<std::pair<int64_t, int64_t>> sorted_dims(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) {
      dims.emplace_back(tensor.stride(d), tensor.size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Dense: its elements fill one range of memory, each place once, in whatever order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) {
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
inline bool is_nested(const Tensor& tensor) {
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
  const Tensor* tensor;
  const Argument* argument;
  size_t index;
};

inline Span span_of(const Argument& argument, size_t i) {
  const Tensor& tensor = argument.tensors[i];
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return {begin, begin + static_cast<uintptr_t>(last + 1) * tensor.element_size(), &tensor,
          &argument, i};
}

// The address of every element, sorted. Only for the rare tensor that is not dense.
inline std::vector<uintptr_t> addresses(const Tensor& tensor) {
  std::vector<uintptr_t> result{reinterpret_cast<uintptr_t>(tensor.data_ptr())};
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const size_t count = result.size();
    const auto step = static_cast<uintptr_t>(tensor.stride(d)) * tensor.element_size();
    for (int64_t k = 1; k < tensor.size(d); ++k) {
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
  if (is_dense(*a.tensor) && is_dense(*b.tensor)) {
    return true;
  }
  const auto left = addresses(*a.tensor), right = addresses(*b.tensor);
  const auto left_size = a.tensor->element_size(), right_size = b.tensor->element_size();
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
  if (is_nested(*span.tensor)) {
    return;
  }
  const auto places = addresses(*span.tensor);
  if (std::adjacent_find(places.begin(), places.end()) != places.end()) {
    fail(op, at(*span.argument, span.index),
         " is written but overlaps itself in memory (an expanded tensor?); pass a clone()");
  }
}

// Nothing that is written may share memory with anything else: two threads would race for it.
inline void check_no_overlap(const char* op, std::initializer_list<Argument> arguments) {
  if (std::none_of(arguments.begin(), arguments.end(),
                   [](const Argument& argument) { return argument.writable; })) {
    return;
  }
  std::vector<Span> spans;
  for (const Argument& argument : arguments) {
    for (size_t i = 0; i < argument.tensors.size(); ++i) {
      if (argument.tensors[i].numel() > 0) {
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
      if ((span.argument->writable || other->argument->writable) && share_memory(span, *other)) {
        const bool first = span.argument->writable;
        const Span &written = first ? span : *other, &aliased = first ? *other : span;
        fail(op, at(*written.argument, written.index), " is written but shares memory with ",
             at(*aliased.argument, aliased.index), "; pass a clone() of one of them");
      }
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
  const Place home(first.tensors.front());
  for (size_t i = 0; i < first.tensors.size(); ++i) {
    for (const Argument& argument : arguments) {
      check_layout(op, argument, i);
      check_shape(op, argument, first, i);
      check_device(op, argument, first, home, i);
      check_dtype(op, argument, i, values.tensors[i].scalar_type());
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
  const ScalarType dtype = scalar.scalar_type();
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
  const TensorList omegas{omega}, lefts{left}, rights{right};
  const std::array<Argument, 3> arguments{
      Argument{
          .name = "omega", .tensors = omegas, .is_omega = true, .writable = true, .is_list = false},
      Argument{.name = "left", .tensors = lefts, .is_list = false},
      Argument{.name = "right", .tensors = rights, .is_list = false}};
  for (const Argument& argument : arguments) {
    check_layout(op, argument, 0);
    check_device(op, argument, arguments[0], Place(omega), 0);
    check_dtype(op, argument, 0, left.scalar_type());
  }
  check_dimensions(op, "omega", omega, 2, "a matrix [p, d]");
  check_dimensions(op, "left", left, 3, "[samples, positions, p]");
  check_dimensions(op, "right", right, 3, "[samples, positions, d]");
  check_same_size(op, "right", right, 0, "left", left, 0, "the samples");
  check_same_size(op, "right", right, 1, "left", left, 1, "the positions");
  check_same_size(op, "left", left, 2, "omega", omega, 0, "p");
  check_same_size(op, "right", right, 2, "omega", omega, 1, "d");
  check_no_overlap(op, {arguments[0], arguments[1], arguments[2]});
}

}  // namespace mas_ext
