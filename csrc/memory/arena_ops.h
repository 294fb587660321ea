// What the arena's ops and its Python function share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/arena.h"

namespace mkrs::memory {

// A block with one reference for a tensor of these sizes, from the arena with this handle. Throws
// with messages that begin with "mkrs::arena_empty: ".
Block* acquire_for(int64_t arena, const int64_t* size, size_t dims, int64_t item_bytes);

// Row-major strides, in elements.
void contiguous_strides(const int64_t* size, size_t dims, int64_t* strides);

}  // namespace mkrs::memory
