// Runs recorded kernel calls under a sanitizer: a second, independent SIMT engine without checks of
// its own. clang's runtime is the judge: AddressSanitizer of bounds (every buffer and threadgroup
// variable is an allocation of its own), ThreadSanitizer of races (every Metal thread is a fiber of
// its own; only barriers order them). Not instrumented itself.
//   replay CALLS SEED [KERNEL-PREFIX]
// Exits 1 if an output differs from the record, with the sanitizer's code if that complains.
#include "replay.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "msl_runtime.h"

#if defined(MSL_ASAN)
#include <sanitizer/common_interface_defs.h>
#elif defined(MSL_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

// The kernels that were built in; sanitize.py writes this table.
struct Table {
  const msl::Kernel* kernels;
  int count;
};
extern const Table kTables[];
extern const int kTableCount;

namespace {

using msl::u32;

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kLanes = 32;
constexpr size_t kArena = size_t{1} << 28;

enum class State { Ready, Barrier, Exchange, Done };

struct Fiber {
  ucontext_t context{};
  char* stack = nullptr;
  State state = State::Done;
  const void* site = nullptr;
  msl::Thread thread{};
  void* sanitizer = nullptr;  // TSan's fiber; ASan's fake stack
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<char*> stacks;
  Fiber* current = nullptr;
  ucontext_t scheduler{};
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  const msl::Kernel* kernel = nullptr;
  void* arguments[32] = {};
  // Threadgroup variables of the threadgroup that runs. Fibers fill this, so it allocates nothing.
  const msl::Slot* slot_of[16] = {};
  char* slots[16] = {};
  int slot_count = 0;
  std::vector<char*> spent;  // allocations of threadgroup memory, freed after the call
  char* arena = nullptr;     // or memory for all threadgroups of a call, for TSan
  size_t arena_used = 0;
  msl::Lanes lanes[32][2];
  unsigned parity[32] = {};
  // What TSan's releases and acquires are tied to. Barriers take turns between two tokens, so that
  // a thread that leaves one late does not see what others did on their way to the next.
  char barrier[2] = {}, simd_barrier[32][2] = {}, start = 0, end = 0;
  unsigned barrier_parity = 0;
  uint64_t random = 1;
};
Machine m;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "replay: %s: %s\n", m.kernel ? m.kernel->name : "", message.c_str());
  std::exit(2);
}

void release(char* token) {
#if defined(MSL_TSAN)
  __tsan_release(token);
#else
  (void)token;
#endif
}
void acquire(char* token) {
#if defined(MSL_TSAN)
  __tsan_acquire(token);
#else
  (void)token;
#endif
}

void leave(bool last) {
  Fiber* f = m.current;
#if defined(MSL_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &f->sanitizer, m.scheduler_stack,
                                 m.scheduler_stack_size);
#elif defined(MSL_TSAN)
  __tsan_switch_to_fiber(m.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  (void)last;
  swapcontext(&f->context, &m.scheduler);
#if defined(MSL_ASAN)
  __sanitizer_finish_switch_fiber(f->sanitizer, nullptr, nullptr);
#endif
}

void body() {
#if defined(MSL_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
  acquire(&m.start);
  m.kernel->entry(m.arguments, m.current->thread);
  release(&m.end);
  m.current->state = State::Done;
  leave(true);
}

void enter(Fiber& f) {
  m.current = &f;
#if defined(MSL_ASAN)
  void* save = nullptr;
  __sanitizer_start_switch_fiber(&save, f.stack, kStack);
#elif defined(MSL_TSAN)
  __tsan_switch_to_fiber(f.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&m.scheduler, &f.context);
#if defined(MSL_ASAN)
  __sanitizer_finish_switch_fiber(save, nullptr, nullptr);
#endif
  m.current = nullptr;
}

// `number` tells the threads of a call apart. For TSan each has a stack of its own, because two
// threadgroups that shared one would race for it; between calls everything is ordered.
void prepare(Fiber& f, size_t number) {
  if (m.stacks.size() <= number) m.stacks.resize(number + 1);
  if (m.stacks[number] == nullptr) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("no memory for a stack");
    m.stacks[number] = static_cast<char*>(p);
  }
  f.stack = m.stacks[number];
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, body, 0);
  f.state = State::Ready;
#if defined(MSL_TSAN)
  f.sanitizer = __tsan_create_fiber(0);
#endif
}

uint64_t next_random() {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 7;
  m.random ^= m.random << 17;
  return m.random >> 16;
}

void run_group(unsigned threads) {
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  for (;;) {
    for (size_t i = threads; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
    for (unsigned i : order) {
      if (m.fibers[i].state == State::Ready) enter(m.fibers[i]);
    }
    bool progress = false;
    for (unsigned s = 0; s * kLanes < threads; ++s) {
      unsigned waiting = 0;
      for (unsigned i = s * kLanes; i < std::min(threads, (s + 1) * kLanes); ++i) {
        waiting += m.fibers[i].state == State::Exchange;
      }
      if (waiting == 0) continue;
      if (waiting != kLanes) fail("a divergent simdgroup operation");
      m.parity[s] ^= 1;
      for (unsigned i = s * kLanes; i < (s + 1) * kLanes; ++i) m.fibers[i].state = State::Ready;
      progress = true;
    }
    if (progress) continue;
    unsigned waiting = 0;
    for (unsigned i = 0; i < threads; ++i) waiting += m.fibers[i].state == State::Barrier;
    if (waiting == 0) return;
    if (waiting != threads) fail("a divergent threadgroup_barrier");
    m.barrier_parity ^= 1;
    for (unsigned i = 0; i < threads; ++i) m.fibers[i].state = State::Ready;
  }
}

void run(const replay::Call& call) {
  u32 group[3], groups[3], grid[3];
  for (int i = 0; i < 3; ++i) {
    grid[i] = static_cast<u32>(call.grid[i]);
    group[i] = static_cast<u32>(call.group[i]);
    groups[i] = (grid[i] + group[i] - 1) / group[i];
    if (groups[i] * group[i] != grid[i]) fail("a grid that is no whole number of threadgroups");
  }
  const unsigned threads = group[0] * group[1] * group[2];
  if (m.fibers.size() < threads) m.fibers.resize(threads);
  std::vector<void*> fibers;
  release(&m.start);
  const u32 total = groups[0] * groups[1] * groups[2];
  const u32 first = static_cast<u32>(next_random() % total);
  for (u32 turn = 0; turn < total; ++turn) {
    const u32 g = (turn + first) % total;
    const msl::Size3 at{g % groups[0], g / groups[0] % groups[1], g / groups[0] / groups[1]};
    m.slot_count = 0;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& f = m.fibers[i];
#if defined(MSL_TSAN)
      prepare(f, size_t{turn} * threads + i);
#else
      prepare(f, i);
#endif
      fibers.push_back(f.sanitizer);
      msl::Thread& t = f.thread;
      t.thread_position_in_threadgroup = {i % group[0], i / group[0] % group[1],
                                          i / group[0] / group[1]};
      t.threadgroup_position_in_grid = at;
      t.thread_position_in_grid = {at.x * group[0] + t.thread_position_in_threadgroup.x,
                                   at.y * group[1] + t.thread_position_in_threadgroup.y,
                                   at.z * group[2] + t.thread_position_in_threadgroup.z};
      t.threads_per_threadgroup = {group[0], group[1], group[2]};
      t.threadgroups_per_grid = {groups[0], groups[1], groups[2]};
      t.threads_per_grid = {grid[0], grid[1], grid[2]};
      t.thread_index_in_threadgroup = i;
      t.thread_index_in_simdgroup = i % kLanes;
      t.simdgroup_index_in_threadgroup = i / kLanes;
      t.simdgroups_per_threadgroup = (threads + kLanes - 1) / kLanes;
    }
    run_group(threads);
  }
  // Only here: what one threadgroup did must not be ordered before another.
  acquire(&m.end);
#if defined(MSL_TSAN)
  for (void* fiber : fibers) __tsan_destroy_fiber(fiber);
#endif
  for (char* p : m.spent) std::free(p);
  m.spent.clear();
  m.arena_used = 0;
}

}  // namespace

extern "C" {

void* msl_threadgroup_slot(const msl::Slot* slot) {
  for (int i = 0; i < m.slot_count; ++i) {
    if (m.slot_of[i] == slot) return m.slots[i];
  }
  if (m.slot_count == 16) fail("more than 16 threadgroup variables");
#if defined(MSL_TSAN)
  char* memory = m.arena + m.arena_used;
  m.arena_used += (slot->size + 63) / 64 * 64;
  if (m.arena_used > kArena) fail("no threadgroup memory left");
#else
  char* memory = static_cast<char*>(std::malloc(slot->size));
  m.spent.push_back(memory);
#endif
  m.slot_of[m.slot_count] = slot;
  m.slots[m.slot_count++] = memory;
  return memory;
}

void msl_threadgroup_barrier(const void*, int flags) {
  char* token = &m.barrier[m.barrier_parity];
  if (flags != 0) release(token);
  m.current->state = State::Barrier;
  leave(false);
  if (flags != 0) acquire(token);
}

void msl_simdgroup_barrier(const void*, int flags) {
  const unsigned s = m.current->thread.simdgroup_index_in_threadgroup;
  char* token = &m.simd_barrier[s][m.parity[s]];
  if (flags != 0) release(token);
  m.current->state = State::Exchange;
  leave(false);
  if (flags != 0) acquire(token);
}

// Orders no memory.
const msl::Lanes* msl_simdgroup_exchange(const void* value, u32 size, const void*) {
  const msl::Thread& t = m.current->thread;
  msl::Lanes* lanes =
      &m.lanes[t.simdgroup_index_in_threadgroup][m.parity[t.simdgroup_index_in_threadgroup]];
  for (u32 i = 0; i < size; ++i) {  // not memcpy, which sanitizers watch
    lanes->value[t.thread_index_in_simdgroup][i] = static_cast<const unsigned char*>(value)[i];
  }
  m.current->state = State::Exchange;
  leave(false);
  return lanes;
}

u32 msl_lane() {
  return m.current->thread.thread_index_in_simdgroup;
}

void msl_fail(const char* message) {
  fail(message);
}
}

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: replay CALLS SEED [KERNEL-PREFIX]\n");
    return 2;
  }
  m.random =
      88172645463325252ull ^ (std::strtoull(arguments[2], nullptr, 10) * 0x9E3779B97F4A7C15ull);
  const std::string prefix = count > 3 ? arguments[3] : "";
#if defined(MSL_TSAN)
  m.scheduler_sanitizer = __tsan_get_current_fiber();
  m.arena = static_cast<char*>(mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (m.arena == MAP_FAILED) fail("no memory for threadgroups");
#endif
  std::unordered_map<std::string, const msl::Kernel*> kernels;
  for (int t = 0; t < kTableCount; ++t) {
    for (int i = 0; i < kTables[t].count; ++i) {
      kernels[kTables[t].kernels[i].name] = &kTables[t].kernels[i];
    }
  }
  replay::Reader reader(arguments[1]);
  replay::Call call;
  int calls = 0, wrong = 0;
  while (reader.next(call)) {
    if (call.kernel.compare(0, prefix.size(), prefix) != 0) continue;
    const auto found = kernels.find(call.kernel);
    if (found == kernels.end()) continue;  // this build has a part of the kernels only
    m.kernel = found->second;
    std::vector<char*> memory(call.arguments.size());
    for (size_t i = 0; i < memory.size(); ++i) {
      const replay::Argument& a = call.arguments[i];
      if (a.same == i) {
        memory[i] = static_cast<char*>(std::malloc(a.before.size()));
        std::memcpy(memory[i], a.before.data(), a.before.size());
      } else {
        memory[i] = memory[a.same];
      }
      m.arguments[a.index] = memory[i];
    }
    run(call);
    ++calls;
    for (size_t i = 0; i < memory.size(); ++i) {
      const replay::Argument& a = call.arguments[i];
      if (a.same != i) continue;
      if (a.writable) {
        const std::vector<char> got(memory[i], memory[i] + a.before.size());
        const size_t different = replay::differing(a, got);
        if (different != 0) {
          ++wrong;
          std::fprintf(stderr, "replay: %s: %zu of %zu bytes of buffer %d differ\n",
                       call.kernel.c_str(), different, got.size(), static_cast<int>(a.index));
        }
      }
      std::free(memory[i]);
    }
  }
  std::printf("%d calls, %d wrong\n", calls, wrong);
  return wrong == 0 && calls > 0 ? 0 : 1;
}
