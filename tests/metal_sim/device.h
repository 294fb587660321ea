// device="mps" in host memory, on a stock Linux build of torch.
#pragma once

#include <ATen/ATen.h>

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

}  // namespace sim
