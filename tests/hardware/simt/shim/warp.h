// Shuffles and votes: what the lanes of a warp tell each other.
#pragma once

#include <cstdint>
#include <cstring>

#include "grid.h"

namespace simt {

struct Letter {
  uint64_t sent, received;
  int from;  // lane
};

// Every lane of the mask sends a value and receives that of lane `from`.
template <class T>
SIMT_UNSEEN T exchange(uint32_t mask, T value, int from, const Place& place) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int lane = self.thread % kWarpSize;
  Letter letter{0, 0, from};
  std::memcpy(&letter.sent, &value, sizeof(T));
  const auto deliver = [&](void** letters) SIMT_UNSEEN {
    for (int l = 0; l < kWarpSize; ++l) {
      auto* mine = static_cast<Letter*>(letters[l]);
      if (mine != nullptr && letters[mine->from] == nullptr) {
        fail("lane %d reads by %s (%s:%u) from lane %d, which mask 0x%x leaves out", l,
             place.operation, place.file, place.line, mine->from, mask);
      }
      if (mine != nullptr) {
        mine->received = static_cast<Letter*>(letters[mine->from])->sent;
      }
    }
  };
  self.block->warp_of(self.thread).join(lane, mask, place, Order::kNone, &letter, deliver);
  std::memcpy(&value, &letter.received, sizeof(T));
  return value;
}

// The lanes of the mask whose predicate holds.
SIMT_UNSEEN inline uint32_t vote(uint32_t mask, bool predicate, const Place& place) {
  Letter letter{predicate, 0, 0};
  const auto count = [](void** letters) SIMT_UNSEEN {
    uint32_t votes = 0;
    for (int l = 0; l < kWarpSize; ++l) {
      votes |= letters[l] && static_cast<Letter*>(letters[l])->sent ? 1u << l : 0u;
    }
    for (int l = 0; l < kWarpSize; ++l) {
      if (letters[l]) {
        static_cast<Letter*>(letters[l])->received = votes;
      }
    }
  };
  self.block->warp_of(self.thread)
      .join(self.thread % kWarpSize, mask, place, Order::kNone, &letter, count);
  return static_cast<uint32_t>(letter.received);
}

}  // namespace simt
