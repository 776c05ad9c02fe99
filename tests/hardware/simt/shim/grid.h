// A grid on the host: its blocks run one after another, in any order; every CUDA thread of a block
// is a host thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "meeting.h"

namespace simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kWarpSize = 32;

// The meetings of one block.
class Block {
 public:
  explicit Block(int threads) {
    const int warps = (threads + kWarpSize - 1) / kWarpSize;
    for (int w = 0; w < warps; ++w) {
      const int first = w * kWarpSize;
      warps_[w].be(threads - first < kWarpSize ? threads - first : kWarpSize, first, 1);
    }
    block_.be(warps, 0, kWarpSize);
  }

  Meeting& warp_of(int thread) { return warps_[thread / kWarpSize]; }

  // All threads: the lanes of every warp meet, and the last of each warp meets the other warps'.
  // The last of all runs `act`.
  template <class Act>
  SIMT_UNSEEN void meet(int thread, const Place& place, Act act) {
    const auto meet_warps = [&](void**) SIMT_UNSEEN {
      block_.join<void>(thread / kWarpSize, place, Order::kMemory, nullptr,
                        [&](void**) SIMT_UNSEEN { act(); });
    };
    warp_of(thread).join<void>(thread % kWarpSize, place, Order::kMemory, nullptr, meet_warps);
  }

 private:
  Meeting warps_[kWarpSize], block_;
};

// What a host thread knows of the CUDA thread it is.
struct Self {
  Block* block = nullptr;
  int thread = 0;
};

inline thread_local Self self;
inline thread_local Index thread_index, block_index, block_size;

// The lanes of the caller's warp meet. Orders nothing.
template <class Data, class Act>
SIMT_UNSEEN void meet_lanes(const Place& place, Data* data, Act act) {
  self.block->warp_of(self.thread).join(self.thread % kWarpSize, place, Order::kNone, data, act);
}

// What a grid runs: these blocks, in this order; before(b) before each of them.
struct Launch {
  std::vector<unsigned> blocks;
  std::function<void(unsigned)> before = [](unsigned) {};
};

// The host threads of blocks of one size. They stay, as making them costs more than a launch.
class Team {
 public:
  explicit Team(int size) : size_(size), block_(size) {
    for (int t = 0; t < size; ++t) {
      threads_.emplace_back([this, t] { live(t); });
    }
  }

  ~Team() { begin(nullptr, {}); }

  void run(const Launch& launch, const std::function<void()>& kernel) {
    if (launch.blocks.empty()) {
      return;
    }
    launch.before(launch.blocks.front());
    at_work_ = size_;
    begin(&launch, kernel);
    for (int left; (left = at_work_.load()) != 0;) {
      at_work_.wait(left);
    }
  }

 private:
  void begin(const Launch* launch, const std::function<void()>& kernel) {
    launch_ = launch, kernel_ = kernel;
    ++launches_;
    launches_.notify_all();
  }

  void live(int thread) {
    self = {&block_, thread};
    thread_index.x = static_cast<unsigned>(thread);
    block_size = {static_cast<unsigned>(size_), 1, 1};
    for (unsigned seen = 0;; ++seen) {
      launches_.wait(seen);
      if (launch_ == nullptr) {
        return;
      }
      run_blocks(*launch_, thread);
      if (--at_work_ == 0) {
        at_work_.notify_one();
      }
    }
  }

  // The end of the kernel is a place where threads meet like any other: one that leaves while
  // others wait at a barrier is found out.
  void run_blocks(const Launch& launch, int thread) {
    for (size_t i = 0; i < launch.blocks.size(); ++i) {
      current_block = block_index.x = launch.blocks[i];
      kernel_();
      static const Place end{"the end of the kernel", std::source_location::current()};
      block_.meet(thread, end, [&] {
        if (i + 1 < launch.blocks.size()) {
          launch.before(launch.blocks[i + 1]);
        }
      });
    }
  }

  const int size_;
  Block block_;
  const Launch* launch_ = nullptr;
  std::function<void()> kernel_;
  std::atomic<unsigned> launches_ = 0;
  std::atomic<int> at_work_ = 0;
  std::vector<std::jthread> threads_;
};

// Runs a kernel: kernel<<<grid, threads>>>(…), given as a function that calls it.
inline void run(const Launch& launch, int threads, const std::function<void()>& kernel) {
  static std::map<int, std::unique_ptr<Team>> teams;
  auto& team = teams[threads];
  if (!team) {
    team = std::make_unique<Team>(threads);
  }
  team->run(launch, kernel);
}

}  // namespace simt
