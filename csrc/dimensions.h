// Several dimensions of a tensor, walked as one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "arguments.h"

namespace mas_ext {

// Dimensions [first, last) of a tensor, the last of them fastest: either all their elements are one
// stride apart, or there is an offset for each.
class Joined {
 public:
  Joined(const Operand& tensor, size_t first, size_t last) : stride_(tensor.strides[last - 1]) {
    bool at_one_stride = true;
    for (size_t d = last; d-- > first;) {
      if (tensor.sizes[d] != 1) {
        at_one_stride &= size_ == 1 || tensor.strides[d] == size_ * stride_;
        stride_ = size_ == 1 ? tensor.strides[d] : stride_;
      }
      size_ *= tensor.sizes[d];
    }
    if (!at_one_stride && size_ > 0) {
      offsets_.push_back(0);
      for (size_t d = first; d < last; ++d) {
        append(tensor.sizes[d], tensor.strides[d]);
      }
    }
  }

  int64_t size() const { return size_; }
  int64_t stride() const { return stride_; }
  const int64_t* offsets() const { return offsets_.empty() ? nullptr : offsets_.data(); }

 private:
  void append(int64_t size, int64_t stride) {
    std::vector<int64_t> longer;
    longer.reserve(offsets_.size() * static_cast<size_t>(size));
    for (const int64_t offset : offsets_) {
      for (int64_t k = 0; k < size; ++k) {
        longer.push_back(offset + k * stride);
      }
    }
    offsets_ = std::move(longer);
  }

  int64_t size_ = 1, stride_;
  std::vector<int64_t> offsets_;
};

}  // namespace mas_ext
