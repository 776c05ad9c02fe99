// Memory that a thread works in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace mas_ext::cpu {

// Uninitialized memory, aligned to a cache line.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), kLine))) {}
  A* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(A* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<A, Free> data_;
};

}  // namespace mas_ext::cpu
