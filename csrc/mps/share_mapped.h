// Mapped files as MPS tensors without a copy.
#pragma once

#include <string>
#include <vector>

#include "checks.h"

namespace mkrs::mps {

struct Shared {
  std::vector<Tensor> pieces;  // consecutive parts of the first dimension
  std::string copied;          // why the memory had to be copied; empty when it is shared
};

// `host`, a contiguous CPU tensor in whole mapped pages (a file mapping), as MPS tensors over the
// same memory. One piece, unless the tensor is larger than Metal's longest buffer. The pieces keep
// `host`, and so its mapping, alive.
Shared share_mapped(const Tensor& host);

// What that asks of Metal (zero_copy.mm; the tests have their own).
int64_t longest_buffer();                       // bytes; 0 without a Metal device
void* buffer_over(void* pages, size_t length);  // a retained MTLBuffer; null if Metal refuses
void release_buffer(void* buffer);

}  // namespace mkrs::mps
