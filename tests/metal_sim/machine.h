// The state of the dispatch that runs, shared by the parts of the engine: engine.cpp schedules,
// fibers.cpp switches stacks, memory.cpp checks every access.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"

namespace sim {

using msl::u32;

constexpr size_t kStack = 256 * 1024;
constexpr size_t kScrubbed = 4 * 1024;  // of a stack: about what kernels use
constexpr size_t kRedzone = 64;  // around threadgroup variables, which take at least 16 bytes
constexpr size_t kArena = kMaxThreadgroupMemory / 16 * (16 + 2 * kRedzone);
constexpr unsigned kLanes = 32;

enum class State { Ready, Barrier, Exchange, Done };

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  State state = State::Done;
  const void* site = nullptr;
  int flags = 0;            // of a barrier
  bool is_barrier = false;  // an exchange that is a simdgroup_barrier
  msl::Thread thread{};
};

// Who touched a byte last. Group 0 is nobody; groups count from 1.
struct Stamp {
  u32 group = 0;
  u32 epoch = 0;       // barriers of the group that order this kind of memory
  u32 simd_epoch = 0;  // the same of the simdgroup
  uint16_t thread = 0;
};

struct Cell {
  Stamp write;
  Stamp read;
  bool many_readers = false;    // of one epoch: several threads
  bool many_simds = false;      // ... of several simdgroups
  bool read_elsewhere = false;  // by another threadgroup than read.group
};

struct Region {
  uintptr_t begin = 0;
  uintptr_t place = 0;  // for the modelled cache: an address that is the same in every process
  size_t size = 0;
  bool writable = false;
  bool threadgroup = false;
  uint8_t* written = nullptr;
  std::unique_ptr<Cell[]> cells;  // of memory that can be written
  std::vector<uint8_t> seen;      // when counting: was this byte read
  Traffic traffic;
  std::string what;
  void clear_cells() { std::fill(cells.get(), cells.get() + size, Cell()); }
};

// A cache of 512 KiB in 64-byte lines and 16 ways, least recently used out first: about a GPU's
// second level. Decides which reads are memory traffic and which are reuse.
class Cache {
 public:
  bool miss(uintptr_t address) {
    const uintptr_t line = address / kLine;
    uintptr_t* ways = lines_ + line % kSets * kWays;
    unsigned i = 0;
    while (i < kWays && ways[i] != line) ++i;
    const bool missed = i == kWays;
    if (missed) i = kWays - 1;
    for (; i > 0; --i) ways[i] = ways[i - 1];
    ways[0] = line;
    return missed;
  }
  void clear() { std::fill(std::begin(lines_), std::end(lines_), 0); }
  static constexpr unsigned kLine = 64;

 private:
  static constexpr unsigned kWays = 16, kSets = 512;
  uintptr_t lines_[kWays * kSets] = {};
};

struct Failure {
  bool happened = false;
  std::string message;
  const void* pc = nullptr;
  msl::Thread thread{};
};

// Everything of the dispatch that runs. The simulator has one GPU: `mutex` serializes dispatches.
struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  const msl::Kernel* kernel = nullptr;
  void* const* arguments = nullptr;
  std::vector<Region> regions;  // device memory, what can be written first
  std::vector<Region> slots;    // threadgroup memory
  std::unordered_map<const msl::Slot*, size_t> slot_of;
  std::unique_ptr<char[]> arena;
  size_t arena_used = 0, slot_bytes = 0;
  uintptr_t library_begin = 0, library_end = 0;
  u32 group = 0;
  u32 epoch_threadgroup = 0, epoch_device = 0;
  u32 simd_threadgroup[kMaxThreads / kLanes], simd_device[kMaxThreads / kLanes];
  msl::Lanes lanes[kMaxThreads / kLanes][2];
  unsigned parity[kMaxThreads / kLanes];
  Cache cache;
  Failure failure;
  uint64_t random = 1;
  bool count = false;
};

inline Machine& machine() {
  static Machine* m = new Machine();
  return *m;
}

// ---- fibers.cpp --------------------------------------------------------------------------------

// Gives a fiber its stack and fills it, so that unwritten private variables differ between orders.
void scrub(Fiber& f, uint8_t byte);
// The fiber at the kernel's entry.
void prepare(Fiber& f);
// Runs a fiber until it leaves; `leave` goes back to the scheduler.
void enter(Fiber& f);
void leave();
// Ends the fiber that runs, and with it the dispatch; `pc` is the place in the kernel.
[[noreturn]] void fail_at(const std::string& message, const void* pc);

}  // namespace sim
