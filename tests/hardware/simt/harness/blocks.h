// The orders in which a test runs the blocks of a grid.
#pragma once

#include <algorithm>
#include <vector>

#include "numbers.h"
#include "shim/grid.h"

namespace harness {

enum class Blocks { kAscending, kDescending, kShuffled };

inline std::vector<unsigned> order_of(Blocks blocks, unsigned count) {
  if (blocks == Blocks::kShuffled) {
    return Random(count).shuffled(count);
  }
  auto order = simt::ascending(count);
  if (blocks == Blocks::kDescending) {
    std::reverse(order.begin(), order.end());
  }
  return order;
}

}  // namespace harness
