// What clang's instrumentation calls on every access to memory, and what is checked there: bounds,
// races, bytes that nothing has written; counted, when that is asked for.
#include <cstring>
#include <sstream>

#include "machine.h"

namespace sim {
namespace {

bool ordered(const Stamp& before, const Stamp& now) {
  if (before.group != now.group) return false;
  if (before.thread == now.thread || before.epoch != now.epoch) return true;
  return before.thread / kLanes == now.thread / kLanes && before.simd_epoch != now.simd_epoch;
}

void race(const Region& r, size_t offset, const Stamp& before, const Stamp& now, const char* did,
          const char* does, const void* pc) {
  std::ostringstream out;
  out << "race on " << r.what << " at byte " << offset << ": thread " << before.thread << " ";
  if (before.group != now.group) {
    out << "of another threadgroup " << did << " it, this thread " << does
        << " it; nothing orders threadgroups";
  } else {
    out << did << " it, this thread " << does << " it without a "
        << (r.threadgroup ? "mem_threadgroup" : "mem_device") << " barrier between";
  }
  fail_at(out.str(), pc);
}

void touch(Region& r, size_t offset, unsigned n, bool write, const void* pc) {
  Machine& m = machine();
  const msl::Thread& t = m.current->thread;
  const unsigned simd = t.simdgroup_index_in_threadgroup;
  const Stamp now{m.group, r.threadgroup ? m.epoch_threadgroup : m.epoch_device,
                  r.threadgroup ? m.simd_threadgroup[simd] : m.simd_device[simd],
                  static_cast<uint16_t>(t.thread_index_in_threadgroup)};
  for (size_t i = offset; i < offset + n; ++i) {
    Cell& c = r.cells[i];
    if (c.write.group != 0 && !ordered(c.write, now)) {
      race(r, i, c.write, now, "wrote", write ? "writes" : "reads", pc);
    }
    if (!write) {
      if (r.threadgroup && c.write.group == 0) {
        fail_at("read of " + r.what + " at byte " + std::to_string(i) +
                    ", which no thread of the threadgroup has written",
                pc);
      }
      Stamp& old = c.read;
      if (old.group == now.group && old.epoch == now.epoch) {
        if (old.thread != now.thread) c.many_readers = true;
        if (old.thread / kLanes != now.thread / kLanes) c.many_simds = true;
      } else {
        if (old.group != 0 && old.group != now.group) c.read_elsewhere = true;
        c.many_readers = c.many_simds = false;
      }
      old = now;
      continue;
    }
    if (c.read.group != 0) {
      const bool same_epoch = c.read.group == now.group && c.read.epoch == now.epoch;
      const bool same_simd = c.read.thread / kLanes == now.thread / kLanes && !c.many_simds;
      const bool fine = same_epoch ? ((c.read.thread == now.thread && !c.many_readers) ||
                                      (same_simd && c.read.simd_epoch != now.simd_epoch))
                                   : c.read.group == now.group;
      if (!fine || c.read_elsewhere) race(r, i, c.read, now, "read", "writes", pc);
    }
    c.write = now;
  }
}

const char* kind_of(bool write) {
  return write ? "write" : "read";
}

void access(uintptr_t address, unsigned n, bool write, const void* pc) {
  Machine& m = machine();
  Fiber* f = m.current;
  if (f == nullptr || address - reinterpret_cast<uintptr_t>(f->stack) < kStack) return;
  for (std::vector<Region>* list : {&m.slots, &m.regions}) {
    for (Region& r : *list) {
      const size_t offset = address - r.begin;
      if (offset >= r.size) continue;
      if (offset + n > r.size) {
        fail_at(std::string(kind_of(write)) + " of " + std::to_string(n) + " bytes at byte " +
                    std::to_string(offset) + " runs past the end of " + r.what + " of " +
                    std::to_string(r.size) + " bytes",
                pc);
      }
      if (write && !r.writable) {
        fail_at("write to " + r.what + ", which the kernel declares const", pc);
      }
      if (!write && r.written != nullptr) {
        for (size_t i = offset; i < offset + n; ++i) {
          if (!r.written[i]) {
            fail_at("read of " + r.what + " at byte " + std::to_string(i) +
                        ", which nothing has written",
                    pc);
          }
        }
      }
      if (r.cells) touch(r, offset, n, write, pc);
      if (write && r.written != nullptr) std::memset(r.written + offset, 1, n);
      if (m.count && !r.threadgroup) {
        (write ? r.traffic.written : r.traffic.read) += n;
        if (!write) {
          for (size_t i = offset; i < offset + n; ++i) {
            r.traffic.read_once += !r.seen[i];
            r.seen[i] = 1;
          }
          const uintptr_t first = r.place + offset, last = first + n - 1;
          if (m.cache.miss(first)) r.traffic.fetched += Cache::kLine;
          if (first / Cache::kLine != last / Cache::kLine && m.cache.miss(last)) {
            r.traffic.fetched += Cache::kLine;
          }
        }
      }
      return;
    }
  }
  if (!write && address >= m.library_begin && address + n <= m.library_end) return;  // constants
  const Region* nearest = nullptr;
  int64_t best = 0;
  for (std::vector<Region>* list : {&m.slots, &m.regions}) {
    for (const Region& r : *list) {
      const int64_t from = static_cast<int64_t>(address - r.begin);
      const int64_t distance = from < 0 ? -from : from - static_cast<int64_t>(r.size);
      if (nearest == nullptr || distance < best) nearest = &r, best = distance;
    }
  }
  std::ostringstream out;
  out << "out of bounds: " << kind_of(write) << " of " << n << " bytes";
  if (nearest != nullptr && best < (1 << 20)) {
    out << " at byte " << static_cast<int64_t>(address - nearest->begin) << " of " << nearest->what
        << ", which has " << nearest->size;
  } else {
    out << " far from everything that is bound";
  }
  fail_at(out.str(), pc);
}

}  // namespace
}  // namespace sim

extern "C" {

void __tsan_init() {}
#define MKRS_ACCESS(SIZE)                                                                  \
  void __tsan_read##SIZE(void* p) {                                                        \
    sim::access(reinterpret_cast<uintptr_t>(p), SIZE, false, __builtin_return_address(0)); \
  }                                                                                        \
  void __tsan_write##SIZE(void* p) {                                                       \
    sim::access(reinterpret_cast<uintptr_t>(p), SIZE, true, __builtin_return_address(0));  \
  }                                                                                        \
  void __tsan_unaligned_read##SIZE(void* p) {                                              \
    sim::access(reinterpret_cast<uintptr_t>(p), SIZE, false, __builtin_return_address(0)); \
  }                                                                                        \
  void __tsan_unaligned_write##SIZE(void* p) {                                             \
    sim::access(reinterpret_cast<uintptr_t>(p), SIZE, true, __builtin_return_address(0));  \
  }
MKRS_ACCESS(1)
MKRS_ACCESS(2)
MKRS_ACCESS(4)
MKRS_ACCESS(8)
MKRS_ACCESS(16)
#undef MKRS_ACCESS

void* __tsan_memcpy(void* to, const void* from, size_t n) {
  if (n > 0) {
    const void* pc = __builtin_return_address(0);
    sim::access(reinterpret_cast<uintptr_t>(from), static_cast<unsigned>(n), false, pc);
    sim::access(reinterpret_cast<uintptr_t>(to), static_cast<unsigned>(n), true, pc);
  }
  return std::memcpy(to, from, n);
}

void* __tsan_memmove(void* to, const void* from, size_t n) {
  if (n > 0) {
    const void* pc = __builtin_return_address(0);
    sim::access(reinterpret_cast<uintptr_t>(from), static_cast<unsigned>(n), false, pc);
    sim::access(reinterpret_cast<uintptr_t>(to), static_cast<unsigned>(n), true, pc);
  }
  return std::memmove(to, from, n);
}

void* __tsan_memset(void* to, int value, size_t n) {
  if (n > 0) {
    sim::access(reinterpret_cast<uintptr_t>(to), static_cast<unsigned>(n), true,
                __builtin_return_address(0));
  }
  return std::memset(to, value, n);
}

#define MKRS_UB(NAME, MESSAGE)                          \
  void __ubsan_handle_##NAME##_minimal() {              \
    sim::fail_at(MESSAGE, __builtin_return_address(0)); \
  }
MKRS_UB(type_mismatch, "misaligned access: the address is no multiple of the type's alignment")
MKRS_UB(out_of_bounds, "out of bounds: an index past the end of an array")
MKRS_UB(divrem_overflow, "an integer division by zero, or one that overflows")
MKRS_UB(shift_out_of_bounds, "a shift by more than the width, or of a negative number")
#undef MKRS_UB
}
