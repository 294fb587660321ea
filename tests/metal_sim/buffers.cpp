// What csrc/mps/share_mapped.cpp asks of Metal: in the simulator a buffer over pages is their
// address. As strict as Metal: whole pages, and none longer than the limit.
#include <unistd.h>

#include "mps/share_mapped.h"

namespace {

int64_t longest = int64_t{1} << 40;
int64_t live = 0;

}  // namespace

namespace mkrs::mps {

int64_t longest_buffer() {
  return longest;
}

void* buffer_over(void* pages, size_t length) {
  const size_t page = static_cast<size_t>(getpagesize());
  const bool whole = reinterpret_cast<uintptr_t>(pages) % page == 0 && length % page == 0;
  if (!whole || length > static_cast<size_t>(longest)) return nullptr;
  ++live;
  return pages;
}

void release_buffer(void*) {
  --live;
}

}  // namespace mkrs::mps

extern "C" {

__attribute__((visibility("default"))) void sim_set_longest_buffer(int64_t bytes) {
  longest = bytes;
}
__attribute__((visibility("default"))) int64_t sim_live_buffers() {
  return live;
}
}
