// device="mps" in host memory, on a stock Linux build of torch.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace sim {

// The allocation that holds `p`: a byte for each of its bytes, "was it ever written", at p's place;
// null when the memory was not allocated here.
uint8_t* written_at(const void* p);

// First byte and length of what a tensor can touch.
struct Extent {
  char* begin;
  size_t size;
};
Extent extent_of(const at::Tensor& t);

// What costs time on a Mac beside kernels.
struct Activity {
  std::atomic<uint64_t> allocations{0};
  std::atomic<uint64_t> waits{0};  // copies to the CPU, values read there, synchronization, commits
};
Activity& activity();

}  // namespace sim
