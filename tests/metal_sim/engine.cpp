// Schedules a kernel's threads and simdgroups, checks its arguments and reports what went wrong.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>
#include <stdexcept>

#include "machine.h"

namespace sim {
namespace {

// ---- scheduling --------------------------------------------------------------------------------

uint64_t next_random() {
  uint64_t& x = machine().random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x >> 16;
}

template <typename T>
void shuffle(std::vector<T>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

void scheduler_failure(const std::string& message, const Fiber& f) {
  Machine& m = machine();
  if (!m.failure.happened) m.failure = {true, message, f.site, f.thread};
}

// Lanes of simdgroup s that wait at a simdgroup operation either all go on or never meet.
bool resolve_simdgroup(unsigned s, unsigned threads) {
  Machine& m = machine();
  const unsigned begin = s * kLanes, end = std::min(begin + kLanes, threads);
  u32 waiting = 0, at_barrier = 0, done = 0;
  const Fiber* first = nullptr;
  bool same = true;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& f = m.fibers[i];
    const u32 bit = 1u << (i - begin);
    if (f.state == State::Done) done |= bit;
    if (f.state == State::Barrier) at_barrier |= bit;
    if (f.state != State::Exchange) continue;
    waiting |= bit;
    if (first == nullptr) first = &f;
    same = same && f.site == first->site;
  }
  if (waiting == 0) return false;
  if (waiting != 0xffffffffu || !same) {
    char text[200];
    std::snprintf(text, sizeof text,
                  "divergent simdgroup operation: lanes %08x wait%s, %08x are at a "
                  "threadgroup_barrier, %08x have returned, %08x do not exist",
                  waiting, same ? "" : " at different operations", at_barrier, done,
                  end - begin == 32 ? 0 : ~((1u << (end - begin)) - 1));
    scheduler_failure(text, *first);
    return false;
  }
  if (first->is_barrier) {
    if (first->flags & 2) ++m.simd_threadgroup[s];
    if (first->flags & 1) ++m.simd_device[s];
  }
  m.parity[s] ^= 1;
  for (unsigned i = begin; i < end; ++i) m.fibers[i].state = State::Ready;
  return true;
}

void run_group(unsigned threads, bool shuffled) {
  Machine& m = machine();
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  const unsigned simds = (threads + kLanes - 1) / kLanes;
  while (true) {
    if (shuffled) shuffle(order);
    for (unsigned i : order) {
      if (m.fibers[i].state == State::Ready) enter(m.fibers[i]);
      if (m.failure.happened) return;
    }
    bool progress = false;
    for (unsigned s = 0; s < simds; ++s) progress |= resolve_simdgroup(s, threads);
    if (m.failure.happened) return;
    if (progress) continue;
    unsigned waiting = 0;
    const Fiber* first = nullptr;
    for (unsigned i = 0; i < threads; ++i) {
      if (m.fibers[i].state != State::Barrier) continue;
      ++waiting;
      if (first == nullptr) first = &m.fibers[i];
    }
    if (waiting == 0) return;
    if (waiting < threads) {
      scheduler_failure("divergent threadgroup_barrier: " + std::to_string(waiting) +
                            " threads wait, " + std::to_string(threads - waiting) +
                            " have returned",
                        *first);
      return;
    }
    for (unsigned i = 0; i < threads; ++i) {
      if (m.fibers[i].site != first->site) {
        scheduler_failure("divergent threadgroup_barrier: threads wait at different barriers",
                          m.fibers[i]);
        return;
      }
      m.fibers[i].state = State::Ready;
    }
    if (first->flags & 2) ++m.epoch_threadgroup;
    if (first->flags & 1) ++m.epoch_device;
  }
}

// "file:line" of a code address, when binutils is there.
std::string source_line(const void* pc) {
  Dl_info info;
  if (pc == nullptr || dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "";
  char command[1200];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%lx 2>/dev/null", info.dli_fname,
                static_cast<unsigned long>(reinterpret_cast<uintptr_t>(pc) -
                                           reinterpret_cast<uintptr_t>(info.dli_fbase) - 1));
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "";
  std::string lines;
  char line[512];
  for (int i = 0; i < 3 && std::fgets(line, sizeof line, pipe) != nullptr; ++i) {
    if (std::strstr(line, "?") == line || std::strstr(line, "metal_stdlib") != nullptr) continue;
    line[std::strcspn(line, "\n")] = 0;
    const char* slash = std::strrchr(line, '/');
    lines += std::string(lines.empty() ? "" : ", in ") + (slash ? slash + 1 : line);
  }
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
  }
  pclose(pipe);
  return lines;
}

std::string describe(const Failure& f, const std::string& kernel) {
  std::ostringstream out;
  const msl::Size3 g = f.thread.threadgroup_position_in_grid;
  out << "kernel " << kernel << ": " << f.message << " (threadgroup " << g.x << "," << g.y << ","
      << g.z << " thread " << f.thread.thread_index_in_threadgroup << ")";
  const std::string line = source_line(f.pc);
  if (!line.empty()) out << " at " << line;
  return out.str();
}

const char* element_name(msl::Element e) {
  static const char* const names[] = {"struct",   "uint8",   "int8",   "uint16", "int16",
                                      "uint32",   "int32",   "uint64", "int64",  "float16",
                                      "bfloat16", "float32", "bool"};
  return names[e];
}

void check_bindings(const msl::Kernel& kernel, const std::vector<Binding>& bindings) {
  const std::string name = std::string("kernel ") + kernel.name + ": ";
  std::set<int> declared;
  for (int i = 0; i < kernel.param_count; ++i) {
    const msl::Param& p = kernel.params[i];
    declared.insert(p.index);
    const std::string buffer = "buffer " + std::to_string(p.index);
    const Binding& b = bindings[static_cast<size_t>(p.index)];
    if (!b.bound) throw std::runtime_error(name + buffer + " is never set by the host");
    if (p.pointer != b.is_tensor) {
      throw std::runtime_error(
          name + buffer + " is " +
          (p.pointer ? "a pointer, the host sets a value" : "a value, the host sets a tensor"));
    }
    if (p.pointer && p.element != b.element) {
      throw std::runtime_error(name + buffer + " points to " + element_name(p.element) +
                               ", the host sets a " + b.what);
    }
    if (!p.pointer && p.size != 8) {
      throw std::runtime_error(name + buffer + " is a value of " + std::to_string(p.size) +
                               " bytes, the host sets 8");
    }
  }
  for (size_t i = 0; i < bindings.size(); ++i) {
    if (bindings[i].bound && declared.count(static_cast<int>(i)) == 0) {
      throw std::runtime_error(name + "the host sets buffer " + std::to_string(i) +
                               ", which the kernel does not have");
    }
  }
}

// The address range of the shared library that holds `address`.
void library_range(const void* address, uintptr_t* begin, uintptr_t* end) {
  struct Find {
    uintptr_t address, begin, end;
  } find{reinterpret_cast<uintptr_t>(address), 0, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Find* f = static_cast<Find*>(data);
        uintptr_t low = UINTPTR_MAX, high = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const uintptr_t at = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          low = std::min<uintptr_t>(low, at);
          high = std::max<uintptr_t>(high, at + info->dlpi_phdr[i].p_memsz);
        }
        if (f->address < low || f->address >= high) return 0;
        f->begin = low;
        f->end = high;
        return 1;
      },
      &find);
  *begin = find.begin;
  *end = find.end;
}

}  // namespace

Options& options() {
  static Options* o = new Options();
  return *o;
}

std::vector<Dispatch>& dispatches() {
  static auto* list = new std::vector<Dispatch>();
  return *list;
}

std::vector<std::string>& kernels_run() {
  static auto* list = new std::vector<std::string>();
  return *list;
}

namespace {

// Bytes of a buffer that a kernel may write, and which of them were written before.
struct Contents {
  std::vector<char> data;
  std::vector<uint8_t> written;
  explicit Contents(const Binding& b)
      : data(b.data, b.data + b.size), written(b.written == nullptr ? b.size : 0, 1) {
    if (b.written != nullptr) written.assign(b.written, b.written + b.size);
  }
  void restore(const Binding& b) const {
    if (b.size == 0) return;
    std::memcpy(b.data, data.data(), b.size);
    if (b.written != nullptr) std::memcpy(b.written, written.data(), b.size);
  }
};

constexpr uintptr_t kAlignment = 256;  // of allocations (device.cpp)

void run_once(const msl::Kernel& kernel, const std::vector<Binding>& bindings, msl::Size3 grid,
              msl::Size3 group, uint64_t seed) {
  Machine& m = machine();
  const std::string name = std::string("kernel ") + kernel.name + ": ";
  const uint64_t threads = uint64_t{group.x} * group.y * group.z;
  if (threads == 0 || threads > kMaxThreads || threads > kernel.max_threads) {
    throw std::runtime_error(name + "a threadgroup of 1 to " +
                             std::to_string(std::min(kMaxThreads, kernel.max_threads)) +
                             " threads is allowed, got " + std::to_string(threads));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw std::runtime_error(name + "an empty grid");
  check_bindings(kernel, bindings);

  m.kernel = &kernel;
  m.failure = Failure();
  m.count = options().count;
  m.random = 88172645463325252ull ^ (seed * 0x9E3779B97F4A7C15ull);
  m.cache.clear();
  m.regions.clear();
  m.slots.clear();
  m.slot_of.clear();
  m.arena_used = m.slot_bytes = 0;
  if (!m.arena) m.arena.reset(new char[kArena]);
  library_range(reinterpret_cast<const void*>(kernel.entry), &m.library_begin, &m.library_end);

  void* arguments[kMaxBuffers] = {};
  uintptr_t place = kAlignment;
  for (const bool writable : {true, false}) {  // memory that can be written is found first
    for (int i = 0; i < kernel.param_count; ++i) {
      const msl::Param& p = kernel.params[i];
      const Binding& b = bindings[static_cast<size_t>(p.index)];
      arguments[p.index] = b.data;
      if (p.read_only == writable) continue;
      Region r;
      r.begin = reinterpret_cast<uintptr_t>(b.data);
      r.size = b.size;
      r.writable = writable;
      r.written = b.written;
      r.what = "buffer " + std::to_string(p.index) + " (" + b.what + ")";
      r.traffic.index = p.index;
      // Side by side in the order of binding, each as far into a line as it is; memory that is
      // bound twice is one.
      const auto same = std::find_if(m.regions.begin(), m.regions.end(),
                                     [&r](const Region& o) { return o.begin == r.begin; });
      r.place = same == m.regions.end() ? place + r.begin % kAlignment : same->place;
      if (same == m.regions.end()) {
        place += (r.begin % kAlignment + r.size + kAlignment - 1) / kAlignment * kAlignment;
      }
      if (writable) r.cells.reset(new Cell[b.size + 1]());
      if (m.count) r.seen.assign(b.size, 0);
      m.regions.push_back(std::move(r));
    }
  }
  m.arguments = arguments;

  const u32 groups[3] = {(grid.x + group.x - 1) / group.x, (grid.y + group.y - 1) / group.y,
                         (grid.z + group.z - 1) / group.z};
  const uint64_t total = uint64_t{groups[0]} * groups[1] * groups[2];
  std::vector<u32> order(total);
  for (u32 i = 0; i < total; ++i) order[i] = i;
  if (seed != 0) shuffle(order);
  if (m.fibers.size() < threads) m.fibers.resize(threads);
  for (uint64_t i = 0; i < threads; ++i) scrub(m.fibers[i], static_cast<uint8_t>(seed * 37 + 85));

  for (u32 turn = 0; turn < total; ++turn) {
    const u32 g = order[turn];
    const msl::Size3 at{g % groups[0], g / groups[0] % groups[1], g / groups[0] / groups[1]};
    const msl::Size3 size{std::min(group.x, grid.x - at.x * group.x),
                          std::min(group.y, grid.y - at.y * group.y),
                          std::min(group.z, grid.z - at.z * group.z)};
    const unsigned count = size.x * size.y * size.z;
    m.group = g + 1;
    m.epoch_threadgroup = m.epoch_device = 0;
    std::memset(m.simd_threadgroup, 0, sizeof m.simd_threadgroup);
    std::memset(m.simd_device, 0, sizeof m.simd_device);
    std::memset(m.arena.get(), 0xff, m.arena_used);
    for (Region& slot : m.slots) slot.clear_cells();
    for (unsigned i = 0; i < count; ++i) {
      Fiber& f = m.fibers[i];
      prepare(f);
      msl::Thread& t = f.thread;
      t.thread_position_in_threadgroup = {i % size.x, i / size.x % size.y, i / size.x / size.y};
      t.threadgroup_position_in_grid = at;
      t.thread_position_in_grid = {at.x * group.x + t.thread_position_in_threadgroup.x,
                                   at.y * group.y + t.thread_position_in_threadgroup.y,
                                   at.z * group.z + t.thread_position_in_threadgroup.z};
      t.threads_per_threadgroup = size;
      t.threadgroups_per_grid = {groups[0], groups[1], groups[2]};
      t.threads_per_grid = grid;
      t.thread_index_in_threadgroup = i;
      t.thread_index_in_simdgroup = i % kLanes;
      t.simdgroup_index_in_threadgroup = i / kLanes;
      t.simdgroups_per_threadgroup = (count + kLanes - 1) / kLanes;
    }
    run_group(count, seed != 0);
    if (m.failure.happened) break;
  }
  m.current = nullptr;
  if (std::find(kernels_run().begin(), kernels_run().end(), kernel.name) == kernels_run().end()) {
    kernels_run().push_back(kernel.name);
  }
  if (m.failure.happened) throw std::runtime_error(describe(m.failure, kernel.name));
  if (m.count) {
    Dispatch d;
    d.kernel = kernel.name;
    d.threads = total * threads;
    d.threadgroup_memory = m.slot_bytes;
    for (const Region& r : m.regions) d.traffic.push_back(r.traffic);
    dispatches().push_back(std::move(d));
  }
}

}  // namespace

void dispatch(const msl::Kernel& kernel, const std::vector<Binding>& bindings, msl::Size3 grid,
              msl::Size3 group) {
  const std::lock_guard<std::mutex> lock(machine().mutex);
  const std::vector<uint64_t>& seeds = options().seeds;
  if (seeds.size() == 1) {
    run_once(kernel, bindings, grid, group, seeds[0]);
    return;
  }
  std::vector<const Binding*> outputs;
  for (int i = 0; i < kernel.param_count; ++i) {
    const Binding& b = bindings[static_cast<size_t>(kernel.params[i].index)];
    if (!kernel.params[i].read_only && b.bound && b.is_tensor) outputs.push_back(&b);
  }
  std::vector<Contents> before, first;
  for (const Binding* b : outputs) before.emplace_back(*b);
  for (size_t turn = 0; turn < seeds.size(); ++turn) {
    if (turn > 0) {
      for (size_t i = 0; i < outputs.size(); ++i) before[i].restore(*outputs[i]);
    }
    run_once(kernel, bindings, grid, group, seeds[turn]);
    if (turn == 0) {
      for (const Binding* b : outputs) first.emplace_back(*b);
      continue;
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      const Contents now(*outputs[i]);
      for (size_t j = 0; j < now.data.size(); ++j) {
        if (now.written[j] == first[i].written[j] && now.data[j] == first[i].data[j]) continue;
        throw std::runtime_error(
            std::string("kernel ") + kernel.name + ": byte " + std::to_string(j) + " of its " +
            outputs[i]->what + " depends on the order of threads: seeds " +
            std::to_string(seeds[0]) + " and " + std::to_string(seeds[turn]) + " differ");
      }
    }
  }
}

}  // namespace sim

// ---- what kernels call -------------------------------------------------------------------------

using sim::machine;
using sim::State;

extern "C" {

void* msl_threadgroup_slot(const msl::Slot* slot) {
  sim::Machine& m = machine();
  const auto found = m.slot_of.find(slot);
  if (found != m.slot_of.end()) {
    return reinterpret_cast<void*>(m.slots[found->second].begin);
  }
  m.slot_bytes += (slot->size + 15) / 16 * 16;
  if (m.slot_bytes > sim::kMaxThreadgroupMemory) {
    sim::fail_at("more than 32768 bytes of threadgroup memory: " + std::to_string(m.slot_bytes) +
                     " with " + slot->name,
                 __builtin_return_address(0));
  }
  m.arena_used += sim::kRedzone;
  sim::Region r;
  r.begin = reinterpret_cast<uintptr_t>(m.arena.get()) + m.arena_used;
  r.size = slot->size;
  r.writable = r.threadgroup = true;
  r.what = std::string("threadgroup memory '") + slot->name + "'";
  r.cells.reset(new sim::Cell[slot->size]());
  std::memset(m.arena.get() + m.arena_used, 0xff, slot->size);
  m.arena_used += (slot->size + 15) / 16 * 16 + sim::kRedzone;
  m.slot_of[slot] = m.slots.size();
  m.slots.push_back(std::move(r));
  return reinterpret_cast<void*>(m.slots.back().begin);
}

void msl_threadgroup_barrier(const void* site, int flags) {
  sim::Fiber* f = machine().current;
  f->state = State::Barrier;
  f->site = site;
  f->flags = flags;
  sim::leave();
}

static void exchange(const void* site, bool is_barrier, int flags) {
  sim::Fiber* f = machine().current;
  f->state = State::Exchange;
  f->site = site;
  f->is_barrier = is_barrier;
  f->flags = flags;
  sim::leave();
}

void msl_simdgroup_barrier(const void* site, int flags) {
  exchange(site, true, flags);
}

const msl::Lanes* msl_simdgroup_exchange(const void* value, msl::u32 size, const void* site) {
  sim::Machine& m = machine();
  const msl::Thread& t = m.current->thread;
  const unsigned s = t.simdgroup_index_in_threadgroup;
  msl::Lanes* lanes = &m.lanes[s][m.parity[s]];
  std::memcpy(lanes->value[t.thread_index_in_simdgroup], value, size);
  exchange(site, false, 0);
  return lanes;
}

msl::u32 msl_lane() {
  return machine().current->thread.thread_index_in_simdgroup;
}

void msl_fail(const char* message) {
  sim::fail_at(message, __builtin_return_address(0));
}
}
