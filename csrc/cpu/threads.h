// Splitting work over torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace mkrs::cpu {

// Below this many weight elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 32768;

// Calls fn(begin, end) over [0, items) in parallel; an item is `elements` weight elements of work.
template <typename F>
void parallel_items(int64_t items, int64_t elements, const F& fn) {
  if (items <= 0) return;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements));
  if (items <= grain) {
    fn(int64_t{0}, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, fn);
}

}  // namespace mkrs::cpu
