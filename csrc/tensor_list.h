// From the list arguments of an operator to flat memory that a kernel can walk.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "checks.h"
#include "entry.h"
#include "numbers.h"

namespace mas_ext {

// Checks the arguments of `op` and lists the tensors as entries, in the order they were given.
// Tensors at one position that do not share one dense layout are copied: to contiguous memory, or,
// if Ω consists of codes, to the memory order of the codes, which their blocks follow. `write_back`
// then copies what was written to the original tensors. This is slow, but rare.
template <size_t Streams>
class FlatList {
 public:
  FlatList(const char* op, std::initializer_list<Argument> arguments,
           const Argument& scales = {.name = "omega_scales", .tensors = {}}) {
    check_arguments(op, arguments, scales);
    const Argument &values = values_of(arguments), &omega = find_omega(arguments);
    entries_.reserve(values.tensors.size());
    for (size_t i = 0; i < values.tensors.size(); ++i) {
      const int64_t numel = values.tensors[i].numel;
      const ScalarType dtype = values.tensors[i].dtype, stored = omega.tensors[i].dtype;
      total_ += numel;
      any_double_ |= dtype == ScalarType::Double;
      if (numel > 0) {
        entries_.push_back({.data = pointers(arguments, i, omega.tensors[i]),
                            .numel = numel,
                            .dtype = dtype,
                            .index = static_cast<int64_t>(i),
                            .omega_dtype = stored,
                            .omega_scales = is_codes(stored)
                                                ? static_cast<const float*>(scales.tensors[i].data)
                                                : nullptr});
      }
    }
  }

  const std::vector<Entry<Streams>>& entries() const { return entries_; }
  int64_t total() const { return total_; }

  // The dtype of a sum over the list: float64 if any value is, else float32.
  ScalarType value_dtype() const { return any_double_ ? ScalarType::Double : ScalarType::Float; }

  void write_back() {
    for (auto& [original, copy] : written_copies_) {
      torch::stable::copy_(original, copy);
    }
  }

 private:
  static bool share_dense_layout(std::initializer_list<Argument> arguments, size_t i) {
    if (std::all_of(arguments.begin(), arguments.end(),
                    [i](const Argument& a) { return a.tensors[i].contiguous; })) {
      return true;
    }
    const Operand& first = arguments.begin()->tensors[i];
    return is_dense(first) &&
           std::all_of(arguments.begin(), arguments.end(),
                       [&](const Argument& a) { return a.tensors[i].strides == first.strides; });
  }

  std::array<void*, Streams> pointers(std::initializer_list<Argument> arguments, size_t i,
                                      const Operand& omega) {
    const bool in_place = share_dense_layout(arguments, i);
    std::array<void*, Streams> result;
    size_t stream = 0;
    for (const Argument& argument : arguments) {
      const Operand& tensor = argument.tensors[i];
      result[stream++] = in_place                ? tensor.data
                         : is_codes(omega.dtype) ? ordered_copy(argument, tensor, omega)
                                                 : contiguous_copy(argument, tensor.tensor());
    }
    return result;
  }

  void* contiguous_copy(const Argument& argument, const Tensor& tensor) {
    copies_.push_back(torch::stable::contiguous(tensor));
    if (argument.writable && copies_.back().data_ptr() != tensor.data_ptr()) {
      written_copies_.emplace_back(tensor, copies_.back());
    }
    return copies_.back().data_ptr();
  }

  // To memory with the strides of `order`, which is dense.
  void* ordered_copy(const Argument& argument, const Operand& tensor, const Operand& order) {
    if (tensor.strides == order.strides) {
      return tensor.data;
    }
    copies_.push_back(tensor.place.empty({tensor.numel}, tensor.dtype));
    Tensor copy = torch::stable::from_blob(copies_.back().data_ptr(), order.sizes, order.strides,
                                           tensor.place.device(), tensor.dtype);
    const Tensor original = tensor.tensor();
    torch::stable::copy_(copy, original);
    if (argument.writable) {
      written_copies_.emplace_back(original, copy);
    }
    return copies_.back().data_ptr();
  }

  std::vector<Entry<Streams>> entries_;
  int64_t total_ = 0;
  bool any_double_ = false;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> written_copies_;
};

inline TensorList empty_like_each(const TensorList& tensors) {
  TensorList result;
  result.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    result.push_back(torch::stable::empty_like(tensor));
  }
  return result;
}

}  // namespace mas_ext
