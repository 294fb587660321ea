// Pages of a file's map: whether they are in memory, and letting go of them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mkrs::memory {

// Takes the pages that lie wholly in these bytes out of the process; they stay in the page cache.
inline void drop_pages(char* data, int64_t bytes) {
#ifdef MADV_DONTNEED
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t begin = reinterpret_cast<int64_t>(data);
  const int64_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (last > first) madvise(data + (first - begin), last - first, MADV_DONTNEED);
#endif
}

// Whether all of these bytes are in the page cache; if so they are mapped in, so that whoever reads
// them takes no faults. False where the system does not tell.
inline bool map_resident(char* data, int64_t bytes) {
#ifdef __linux__
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t begin = reinterpret_cast<int64_t>(data);
  char* first = data - begin % page;
  const int64_t length = data + bytes - first;
  std::vector<unsigned char> pages((length + page - 1) / page);
  if (mincore(first, length, pages.data()) != 0) return false;
  if (!std::all_of(pages.begin(), pages.end(), [](unsigned char p) { return p & 1; })) return false;
  // A fault maps the 64 KiB around it; MADV_POPULATE_READ takes several times as long, for it looks
  // at every page once more.
  constexpr int64_t kAround = 64 << 10;
  volatile char sink = 0;
  for (int64_t i = 0; i < length; i += kAround) sink = first[i];
  (void)sink;
  return true;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

}  // namespace mkrs::memory
