#include "engine.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

// ---- fibers ------------------------------------------------------------------------------------
// sim_switch(save, to): pushes the callee-saved registers, stores the stack pointer, takes `to`'s.
#if defined(__x86_64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, @function
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, %function
sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the Metal simulator switches fibers on x86-64 and arm64 only"
#endif
extern "C" void sim_switch(void** save, void* to);

namespace sim {
namespace {

using msl::u32;

constexpr size_t kStack = 256 * 1024;
constexpr size_t kRedzone = 64;
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

Machine& machine() {
  static Machine* m = new Machine();
  return *m;
}

void leave() {
  Machine& m = machine();
  sim_switch(&m.current->sp, m.scheduler);
}

[[noreturn]] void fail_at(const std::string& message, const void* pc) {
  Machine& m = machine();
  if (!m.failure.happened) m.failure = {true, message, pc, m.current->thread};
  m.current->state = State::Done;
  leave();
  std::abort();  // a failed fiber is never entered again
}

// ---- memory checks -----------------------------------------------------------------------------

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
          if (m.cache.miss(address)) r.traffic.fetched += Cache::kLine;
          if (address / Cache::kLine != (address + n - 1) / Cache::kLine &&
              m.cache.miss(address + n - 1)) {
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

void start() {
  Machine& m = machine();
  m.kernel->entry(m.arguments, m.current->thread);
  m.current->state = State::Done;
  leave();
  std::abort();
}

void prepare(Fiber& f) {
  if (f.stack == nullptr) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
    mprotect(p, 4096, PROT_NONE);
    f.stack = static_cast<char*>(p);
  }
  void** sp = reinterpret_cast<void**>(f.stack + kStack - 64);
#if defined(__x86_64__)
  *--sp = nullptr;  // keeps the stack 16-byte aligned at entry
  *--sp = reinterpret_cast<void*>(&start);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
#else
  sp -= 20;
  std::memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&start);  // x30
#endif
  f.sp = sp;
  f.state = State::Ready;
}

void enter(Fiber& f) {
  Machine& m = machine();
  m.current = &f;
  sim_switch(&m.scheduler, f.sp);
  m.current = nullptr;
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
  if (!m.arena) m.arena.reset(new char[4 * kMaxThreadgroupMemory]);
  library_range(reinterpret_cast<const void*>(kernel.entry), &m.library_begin, &m.library_end);

  void* arguments[kMaxBuffers] = {};
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

// ---- the callbacks of clang's instrumentation --------------------------------------------------

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
