// The orders in which a test runs the blocks of a grid.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "numbers.h"

namespace harness {

enum class Blocks { kAscending, kDescending, kShuffled };

inline std::vector<unsigned> order_of(Blocks blocks, unsigned count) {
  if (blocks == Blocks::kShuffled) {
    return Random(count).shuffled(count);
  }
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (blocks == Blocks::kDescending) {
    std::reverse(order.begin(), order.end());
  }
  return order;
}

}  // namespace harness
