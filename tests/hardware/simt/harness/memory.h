// Memory in which a step too far is seen.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
inline void __asan_poison_memory_region(const volatile void*, size_t) {}
inline void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif

namespace harness {

constexpr unsigned char kGap = 0xff;  // a NaN in every type

// `size` bytes that begin `phase` bytes behind a 64-byte boundary and end where the allocation
// does. AddressSanitizer reports what touches memory on either side; as its unit is 8 bytes, the
// last phase % 8 bytes in front are NaN instead, and looked at afterwards.
class Buffer {
 public:
  Buffer(size_t size, size_t phase) : size_(size), phase_(phase) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, phase + size + (phase + size == 0)) != 0) {
      throw std::bad_alloc();
    }
    base_ = static_cast<unsigned char*>(memory);
    std::memset(base_, kGap, phase + size);
    __asan_poison_memory_region(base_, phase);
  }
  Buffer(Buffer&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), size_(other.size_), phase_(other.phase_) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    if (base_ != nullptr) {
      __asan_unpoison_memory_region(base_, phase_ + size_);
      std::free(base_);
    }
  }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(base_ + phase_);
  }
  size_t size() const { return size_; }

  // What may be touched from here on: nothing, all, or also [begin, begin + size), in bytes.
  void close() const { __asan_poison_memory_region(base_ + phase_, size_); }
  void open() const { open(0, size_); }
  void open(size_t begin, size_t size) const {
    __asan_unpoison_memory_region(base_ + phase_ + begin, size);
  }

  __attribute__((no_sanitize("address"))) bool gap_is_untouched() const {
    for (size_t i = 0; i < phase_; ++i) {
      if (base_[i] != kGap) {
        return false;
      }
    }
    return true;
  }

 private:
  unsigned char* base_;
  size_t size_, phase_;
};

inline bool same_bytes(const Buffer& a, const Buffer& b) {
  return a.size() == 0 || std::memcmp(a.as<void>(), b.as<void>(), a.size()) == 0;
}

// Far more memory than there is: what is never touched is zero and costs nothing.
class VastBuffer {
 public:
  VastBuffer(size_t size, size_t) : size_(size) {
    base_ = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                 -1, 0);
    if (base_ == MAP_FAILED) {
      throw std::bad_alloc();
    }
  }
  VastBuffer(VastBuffer&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), size_(other.size_) {}
  VastBuffer& operator=(VastBuffer&&) = delete;
  ~VastBuffer() {
    if (base_ != nullptr) {
      munmap(base_, size_);
    }
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(base_);
  }
  size_t size() const { return size_; }
  void close() const {}
  void open() const {}
  void open(size_t, size_t) const {}

 private:
  void* base_;
  size_t size_;
};

}  // namespace harness
