// Splitting work over torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace mkrs::cpu {

// Below this many weight elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 32768;

// Set in threads that work beside others on pieces of their own: a team of threads for each piece
// would be more threads than cores, and they spin when they have nothing to do.
inline thread_local bool serial_thread = false;

// Calls fn(begin, end) over [0, items) in parallel, on at least `grain` items at a time.
template <typename F>
void parallel_grains(int64_t items, int64_t grain, const F& fn) {
  if (items <= 0) return;
  if (items <= grain || serial_thread) {
    fn(int64_t{0}, items);
    return;
  }
  torch::stable::parallel_for(0, items, grain, fn);
}

// The same with a grain for items that are `elements` weight elements of work each.
template <typename F>
void parallel_items(int64_t items, int64_t elements, const F& fn) {
  const int64_t grain = kElementsPerThread / std::max<int64_t>(1, elements);
  parallel_grains(items, std::max<int64_t>(1, grain), fn);
}

}  // namespace mkrs::cpu
