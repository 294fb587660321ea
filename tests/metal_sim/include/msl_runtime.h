// What a kernel compiled for the host needs from the engine (engine.cpp), and how the engine finds
// the kernels in a compiled library. Plain C++14 without a standard library, shared by both sides.
#pragma once

namespace msl {

typedef unsigned int u32;
typedef unsigned long u64;

struct Size3 {
  u32 x, y, z;
};

// One Metal thread's place in the grid.
struct Thread {
  Size3 thread_position_in_grid, threadgroup_position_in_grid, thread_position_in_threadgroup;
  Size3 threads_per_threadgroup, threadgroups_per_grid, threads_per_grid;
  u32 thread_index_in_threadgroup, thread_index_in_simdgroup;
  u32 simdgroup_index_in_threadgroup, simdgroups_per_threadgroup;
};

enum Element : int { OTHER, U8, I8, U16, I16, U32, I32, U64, I64, F16, BF16, F32, BOOL };

// One [[buffer(n)]] parameter as the kernel declares it.
struct Param {
  int index;
  Element element;
  u32 size;         // bytes of an element; of the whole value for a reference
  bool pointer;     // false: `constant T&`
  bool read_only;   // device const / constant
};

using Entry = void (*)(void* const* arguments, const Thread& thread);

struct Kernel {
  const char* name;
  Entry entry;
  const Param* params;
  int param_count;
  u32 max_threads;  // [[max_total_threads_per_threadgroup]], 1024 when absent
};

// One threadgroup variable; the engine gives every threadgroup its own.
struct Slot {
  const char* name;
  u64 size;
};

struct Lanes {
  alignas(16) unsigned char value[32][64];
};

}  // namespace msl

extern "C" {
void* msl_threadgroup_slot(const msl::Slot* slot);
void msl_threadgroup_barrier(const void* site, int flags);
void msl_simdgroup_barrier(const void* site, int flags);
// Returns when all 32 lanes are at the same call; `Lanes` then holds what each of them gave.
const msl::Lanes* msl_simdgroup_exchange(const void* value, msl::u32 size, const void* site);
msl::u32 msl_lane();
[[noreturn]] void msl_fail(const char* message);
}
