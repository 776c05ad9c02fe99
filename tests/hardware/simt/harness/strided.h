// Tensors that lie in memory in any order, with gaps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace harness {

// How the dimensions of a tensor lie: which is innermost, and what is left free.
struct Layout {
  const char* name;
  std::vector<int> inner_first;    // dimensions
  int64_t step = 1;                // places between neighbours of the innermost
  std::vector<int64_t> gaps = {};  // places behind all of the first, the second dimension…
  int64_t ahead = 0;               // elements the first lies behind a 64-byte boundary
  int expanded = -1;               // a dimension all of whose places are one
};

inline std::vector<int64_t> strides_of(const Layout& layout, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = layout.step;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto dim = static_cast<size_t>(layout.inner_first[i]);
    const bool expanded = layout.inner_first[i] == layout.expanded;
    strides[dim] = expanded ? 0 : stride;
    stride *= expanded ? 1 : std::max<int64_t>(sizes[dim], 1);
    stride += i < layout.gaps.size() ? layout.gaps[i] : 0;
  }
  return strides;
}

template <class T, class Memory = Buffer>
class Strided {
 public:
  Strided(const Layout& layout, std::vector<int64_t> sizes)
      : sizes_(std::move(sizes)),
        strides_(strides_of(layout, sizes_)),
        memory_(sizeof(T) * static_cast<size_t>(extent()),
                sizeof(T) * static_cast<size_t>(layout.ahead)) {}

  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  const Memory& memory() const { return memory_; }
  T* data() const { return memory_.template as<T>(); }

  T& at(int64_t i, int64_t j, int64_t k = 0) const {
    return data()[i * strides_[0] + j * strides_[1] + (strides_.size() > 2 ? k * strides_[2] : 0)];
  }

  template <class Visit>  // visit(i, j, k), k outermost in no tensor of two dimensions
  void each(Visit visit) const {
    for (int64_t i = 0; i < sizes_[0]; ++i) {
      for (int64_t j = 0; j < sizes_[1]; ++j) {
        for (int64_t k = 0; k < (sizes_.size() > 2 ? sizes_[2] : 1); ++k) {
          visit(i, j, k);
        }
      }
    }
  }

  // Places that belong to no element still hold what they did.
  bool gaps_are_untouched() const {
    std::vector<bool> is_element(memory_.size() / sizeof(T));
    each([&](int64_t i, int64_t j, int64_t k) {
      is_element[static_cast<size_t>(&at(i, j, k) - data())] = true;
    });
    unsigned char gap[sizeof(T)];
    std::memset(gap, kGap, sizeof gap);
    for (size_t i = 0; i < is_element.size(); ++i) {
      if (!is_element[i] && std::memcmp(data() + i, gap, sizeof gap) != 0) {
        return false;
      }
    }
    return memory_.gap_is_untouched();
  }

 private:
  int64_t extent() const {
    int64_t last = 0;
    for (size_t d = 0; d < sizes_.size(); ++d) {
      if (sizes_[d] == 0) {
        return 0;
      }
      last += (sizes_[d] - 1) * strides_[d];
    }
    return last + 1;
  }

  std::vector<int64_t> sizes_, strides_;
  Memory memory_;
};

}  // namespace harness
