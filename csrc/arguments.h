// The arguments of an operator as checks and kernels see them, and how errors name them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "numbers.h"
#include "packed_tensor.h"

namespace mas_ext {

using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// The same as tensor.scalar_type(), which asks torch for the codes of all dtypes each time. Here
// the codes of the dtypes that kernels take are asked for once.
inline ScalarType dtype_of(const Tensor& tensor) {
  static const std::array<std::pair<int32_t, ScalarType>, 5> supported{{
      {aoti_torch_dtype_float32(), ScalarType::Float},
      {aoti_torch_dtype_bfloat16(), ScalarType::BFloat16},
      {aoti_torch_dtype_float16(), ScalarType::Half},
      {aoti_torch_dtype_uint8(), ScalarType::Byte},
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
  explicit Place(const Tensor& tensor) : Place(tensor.is_cpu(), tensor.get_device_index()) {}
  Place(bool is_cpu, int32_t device_index)
      : is_cpu(is_cpu), device_index(is_cpu ? 0 : device_index) {}
  bool operator==(const Place&) const = default;

  torch::stable::Device device() const {
    return is_cpu ? torch::stable::Device(torch::headeronly::DeviceType::CPU)
                  : torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_index);
  }
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return torch::stable::empty(sizes, dtype, std::nullopt, device());
  }

  bool is_cpu;
  int32_t device_index;
};

// What checks and kernels need to know of a tensor, read once: each question to torch's stable ABI
// is at least one function call, and an operator may be called with many small tensors.
struct Operand {
  explicit Operand(const Tensor& tensor)
      : dtype(dtype_of(tensor)),
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

  explicit Operand(const PackedTensor& tensor)
      : dtype(tensor.dtype),
        place(tensor.is_cpu, tensor.device_index),
        strided(true),
        contiguous(true),
        numel(1),
        sizes(tensor.sizes, static_cast<size_t>(tensor.dim)),
        strides(tensor.strides, static_cast<size_t>(tensor.dim)),
        data(tensor.data) {
    for (size_t d = dim(); d-- > 0;) {
      contiguous &= sizes[d] == 1 || strides[d] == numel;
      numel *= sizes[d];
    }
    contiguous |= numel == 0;
  }

  size_t dim() const { return sizes.size(); }
  size_t element_size() const { return bytes_of(dtype); }

  // A tensor in the same memory, for what is rare.
  Tensor tensor() const {
    return torch::stable::from_blob(data, sizes, strides, place.device(), dtype);
  }

  ScalarType dtype;
  Place place;
  bool strided, contiguous = false;
  int64_t numel;
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  void* data = nullptr;
};

// The operands of one argument. The tensors must outlive them.
struct Operands : std::vector<Operand> {
  using vector::vector;
  Operands() = default;
  Operands(const TensorList& tensors) : vector(tensors.begin(), tensors.end()) {}
  Operands(const Tensor& tensor) : vector{Operand(tensor)} {}
};

// One argument of an operator: a list, or a single tensor as a list of one.
struct Argument {
  const char* name;
  Operands tensors;
  bool is_omega = false;  // has a dtype of its own; all others share one
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

inline std::string shape_of(const torch::headeronly::IntHeaderOnlyArrayRef& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t d = 0; d < sizes.size(); ++d) {
    text << (d ? ", " : "") << sizes[d];
  }
  text << "]";
  return text.str();
}
inline std::string shape_of(const Tensor& tensor) { return shape_of(tensor.sizes()); }
inline std::string shape_of(const Operand& operand) { return shape_of(operand.sizes); }

inline std::string device_of(const Place& place) {
  return place.is_cpu ? "cpu" : "device " + std::to_string(place.device_index);
}
inline std::string device_of(const Tensor& tensor) { return device_of(Place(tensor)); }
inline std::string device_of(const Operand& operand) { return device_of(operand.place); }

}  // namespace mas_ext
