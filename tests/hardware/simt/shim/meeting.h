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

// Up to 32 members: the lanes of a warp, or the warps of a block. Groups that share no member may
// meet at the same time.
//
// Nothing can hang here, whatever the kernel does wrong: the member that comes last finds everyone
// it waits for, and those either wait for the same thing, or it reports that they do not.
class Meeting {
 public:
  // `first_thread` and `stride` give a member's first CUDA thread, for messages.
  void be(int members, int first_thread, int stride) {
    everyone_ = members == 32 ? ~0u : (1u << members) - 1;
    first_thread_ = first_thread, stride_ = stride;
  }

  uint32_t everyone() const { return everyone_; }

  // Waits until all of `mask` are here. The last one to come checks that all mean the same place
  // and mask, runs act(data), with what each member has brought, and lets all go.
  template <class Data, class Act>
  SIMT_UNSEEN void join(int me, uint32_t mask, const Place& place, Order order, Data* data,
                        Act act) {
    check_mask(me, mask, place);
    slots_[me] = {place, mask, data};
    if (order == Order::kMemory) {
      __tsan_release(&before_);
    }
    __atomic_or_fetch(&inside_, 1u << me, __ATOMIC_ACQ_REL);
    if (completes(me, mask)) {
      check_agreement(me, mask, place);
      finish(mask, order, act);
    } else {
      wait(me);
    }
    if (order == Order::kMemory) {
      __tsan_acquire(&after_);
    }
  }

 private:
  struct Slot {
    Place place;
    uint32_t mask;
    void* data;
  };

  // Comes in. Whoever finds all others of its mask there takes them with it in the same instant: a
  // group that has met waits for nobody any more, and no one may find it waiting.
  SIMT_UNSEEN bool completes(int me, uint32_t mask) {
    uint32_t waiting = __atomic_load_n(&waiting_, __ATOMIC_ACQUIRE), with_me;
    do {
      with_me = waiting | 1u << me;
      if ((with_me & mask) == mask) {
        with_me &= ~mask;
      }
    } while (!__atomic_compare_exchange_n(&waiting_, &waiting, with_me, true, __ATOMIC_ACQ_REL,
                                          __ATOMIC_ACQUIRE));
    return (with_me >> me & 1u) == 0;
  }

  // By the last one, for all: what `act` does comes behind all that they did, and before all that
  // they will do.
  template <class Act>
  SIMT_UNSEEN void finish(uint32_t mask, Order order, Act act) {
    if (order == Order::kMemory) {
      __tsan_acquire(&before_);
    }
    void* data[32] = {};
    for (int m = 0; m < 32; ++m) {
      data[m] = mask >> m & 1u ? slots_[m].data : nullptr;
    }
    act(data);
    if (order == Order::kMemory) {
      __tsan_release(&after_);
    }
    __atomic_and_fetch(&inside_, ~mask, __ATOMIC_ACQ_REL);
    syscall(SYS_futex, &inside_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  SIMT_UNSEEN void wait(int me) {
    uint32_t inside;
    while ((inside = __atomic_load_n(&inside_, __ATOMIC_ACQUIRE)) >> me & 1u) {
      syscall(SYS_futex, &inside_, FUTEX_WAIT_PRIVATE, inside, nullptr, nullptr, 0);
    }
  }

  SIMT_UNSEEN void check_mask(int me, uint32_t mask, const Place& place) const {
    if ((mask >> me & 1u) == 0) {
      fail("thread %d calls %s (%s:%u) with mask 0x%x, which leaves it out", thread(me),
           place.operation, place.file, place.line, mask);
    }
    if ((mask & ~everyone_) != 0) {
      fail("thread %d calls %s (%s:%u) with mask 0x%x, which names lanes that are not there",
           thread(me), place.operation, place.file, place.line, mask);
    }
  }

  SIMT_UNSEEN void check_agreement(int me, uint32_t mask, const Place& place) const {
    for (int m = 0; m < 32; ++m) {
      const Slot& other = slots_[m];
      if ((mask >> m & 1u) && !(other.place == place && other.mask == mask)) {
        fail(
            "threads wait for each other at different places: thread %d at %s (%s:%u, mask 0x%x), "
            "thread %d at %s (%s:%u, mask 0x%x)",
            thread(me), place.operation, place.file, place.line, mask, thread(m),
            other.place.operation, other.place.file, other.place.line, other.mask);
      }
    }
  }

  SIMT_UNSEEN int thread(int member) const { return first_thread_ + member * stride_; }

  uint32_t waiting_ = 0;  // members whose group has not met yet
  uint32_t inside_ = 0;   // those, and members of a group that has met and was not let go yet
  uint32_t everyone_ = 0;
  int first_thread_ = 0, stride_ = 1;
  Slot slots_[32] = {};
  char before_ = 0, after_ = 0;  // names for ThreadSanitizer: what came before, what comes after
};

}  // namespace simt
