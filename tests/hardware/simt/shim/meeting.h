// Threads that wait for each other: what barriers, shuffles and matrix operations have in common.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#else
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

// The shim's own traffic is hidden from ThreadSanitizer, which is told instead, by __tsan_acquire
// and __tsan_release, of the orderings that CUDA promises and of no others: a shuffle, for one,
// orders nothing.
#define SIMT_UNSEEN __attribute__((no_sanitize("thread")))

namespace simt {

inline thread_local unsigned current_block = 0;

// A fault of the kernel: says what and where, and ends the program at once.
[[noreturn]] inline void fail(const char* format, ...) {
  char message[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  static int failed = 0;
  while (__atomic_exchange_n(&failed, 1, __ATOMIC_ACQ_REL) != 0) {
    pause();  // another thread is saying it
  }
  std::fprintf(stderr, "simt: in block %u: %s\n", current_block, message);
  std::fflush(nullptr);
  _exit(3);
}

// A line of a kernel at which threads wait.
struct Place {
  const char* operation;
  const char* file;
  unsigned line, column;

  Place() = default;
  Place(const char* name, const std::source_location& at)
      : operation(name), file(at.file_name()), line(at.line()), column(at.column()) {}

  SIMT_UNSEEN bool operator==(const Place& other) const {
    return line == other.line && column == other.column && std::strcmp(file, other.file) == 0 &&
           std::strcmp(operation, other.operation) == 0;
  }
};

enum class Order { kNone, kMemory };  // whether a meeting orders accesses to memory

// Up to 32 members: the lanes of a warp, or the warps of a block. All of them meet every time.
//
// Nothing can hang here, whatever the kernel does wrong: the member that comes last finds all
// others, and those either wait for the same thing, or it reports that they do not.
class Meeting {
 public:
  // `first_thread` and `stride` give a member's first CUDA thread, for messages.
  void be(int members, int first_thread, int stride) {
    members_ = members, first_thread_ = first_thread, stride_ = stride;
  }
  int members() const { return members_; }

  // Waits until all are here. The last one to come checks that all mean the same place, runs
  // act(data), with what each member has brought, and lets all go.
  template <class Data, class Act>
  SIMT_UNSEEN void join(int me, const Place& place, Order order, Data* data, Act act) {
    places_[me] = place, data_[me] = data;
    if (order == Order::kMemory) {
      __tsan_release(&before_);
    }
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&here_, 1, __ATOMIC_ACQ_REL) == members_) {
      check_agreement(me, place);
      finish(order, act);
    } else {
      while (__atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round) {
        syscall(SYS_futex, &round_, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
      }
    }
    if (order == Order::kMemory) {
      __tsan_acquire(&after_);
    }
  }

 private:
  // By the last one, for all: what `act` does comes behind all that they did, and before all that
  // they will do.
  template <class Act>
  SIMT_UNSEEN void finish(Order order, Act act) {
    if (order == Order::kMemory) {
      __tsan_acquire(&before_);
    }
    act(data_);
    if (order == Order::kMemory) {
      __tsan_release(&after_);
    }
    here_ = 0;
    __atomic_add_fetch(&round_, 1, __ATOMIC_ACQ_REL);
    syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  SIMT_UNSEEN void check_agreement(int me, const Place& place) const {
    for (int m = 0; m < members_; ++m) {
      const Place& other = places_[m];
      if (!(other == place)) {
        fail(
            "threads wait for each other at different places: thread %d at %s (%s:%u), thread %d "
            "at %s (%s:%u)",
            thread(me), place.operation, place.file, place.line, thread(m), other.operation,
            other.file, other.line);
      }
    }
  }

  SIMT_UNSEEN int thread(int member) const { return first_thread_ + member * stride_; }

  uint32_t round_ = 0;  // how often all have met
  int here_ = 0;        // members that have come, this time
  int members_ = 0, first_thread_ = 0, stride_ = 1;
  Place places_[32] = {};
  void* data_[32] = {};
  char before_ = 0, after_ = 0;  // names for ThreadSanitizer: what came before, what comes after
};

}  // namespace simt
