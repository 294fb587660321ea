// Random allocate/free cycles on the arena from several threads, without torch.
//
//   arena_stress check <threads> <cycles> <seed>   every byte line belongs to one block, no leak
//   arena_stress time                              nanoseconds per allocate/free pair
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "memory/arena.h"

using mkrs::memory::Arena;
using mkrs::memory::Block;
using mkrs::memory::Strategy;

namespace {

std::atomic<int> failures{0};

void expect(bool ok, const char* what) {
  if (!ok && failures++ < 10) std::fprintf(stderr, "FAILED: %s\n", what);
}

// A tag on every 64 bytes, so that two blocks that share a line are noticed.
void fill(Block* block, uint64_t tag) {
  for (int64_t i = 0; i + 8 <= block->size; i += 64) {
    const uint64_t value = tag + i;
    std::memcpy(block->data + i, &value, 8);
  }
}
bool intact(Block* block, uint64_t tag) {
  for (int64_t i = 0; i + 8 <= block->size; i += 64) {
    uint64_t value;
    std::memcpy(&value, block->data + i, 8);
    if (value != tag + i) return false;
  }
  return true;
}

void worker(std::shared_ptr<Arena> arena, int64_t cycles, uint64_t seed) {
  struct Live {
    Block* block;
    uint64_t tag;
  };
  std::mt19937_64 random(seed);
  std::vector<Live> live;
  const auto drop = [&](size_t i) {
    expect(intact(live[i].block, live[i].tag), "a block kept its bytes until it was released");
    release(live[i].block);
    live[i] = live.back();
    live.pop_back();
  };
  for (int64_t cycle = 0; cycle < cycles; ++cycle) {
    if (live.size() >= 24) drop(random() % live.size());
    // Log-uniform sizes from 1 byte to 128 KiB, rarely some MiB (mappings of their own).
    int64_t bytes = 1 + random() % (int64_t{1} << (1 + random() % 17));
    if (random() % 4096 == 0) bytes = 1 + random() % (6 << 20);
    Block* block = arena->acquire(bytes);
    expect(reinterpret_cast<uintptr_t>(block->data) % 64 == 0, "blocks are 64-byte aligned");
    expect(block->size >= bytes && block->size < 2 * std::max<int64_t>(bytes, 64),
           "a block is less than twice the request");
    live.push_back({block, random()});
    fill(block, live.back().tag);
  }
  while (!live.empty()) drop(live.size() - 1);
}

int check(int threads, int64_t cycles, uint64_t seed) {
  const auto arena = std::make_shared<Arena>(256 << 20, Strategy::Pooled, -1);
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(worker, arena, cycles / threads, seed + i);
  for (std::thread& thread : workers) thread.join();
  const auto stats = arena->stats();
  expect(stats.active == 0 && stats.requested == 0 && stats.live == 0, "everything came back");
  expect(stats.reserved_peak <= 2 * stats.peak, "the pool holds less than twice the peak");
  expect(stats.reserved_peak <= 256 << 20, "the budget holds");
  expect(stats.allocations == cycles / threads * threads, "every allocation is counted");
  std::printf("allocations %lld hits %lld peak %lld reserved_peak %lld\n",
              static_cast<long long>(stats.allocations), static_cast<long long>(stats.hits),
              static_cast<long long>(stats.peak), static_cast<long long>(stats.reserved_peak));
  arena->trim(0);
  expect(arena->stats().cached == 0, "trim returns everything");
  return failures ? 1 : 0;
}

template <typename F>
double nanoseconds(int cycles, const F& fn) {
  double best = 1e18;
  for (int repeat = 0; repeat < 7; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < cycles; ++i) fn();
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / cycles);
  }
  return best;
}

// One line per size: bytes, arena and posix_memalign alone, arena and posix_memalign with a write
// to every page, all in nanoseconds.
int time_sizes() {
  const auto arena = std::make_shared<Arena>(-1, Strategy::Pooled, -1);
  for (const int64_t bytes : {4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20}) {
    const auto touch = [&](char* data) {
      for (int64_t i = 0; i < bytes; i += 4096) static_cast<volatile char*>(data)[i] = 1;
    };
    const auto from_arena = [&](bool use) {
      Block* block = arena->acquire(bytes);
      if (use) touch(block->data);
      release(block);
    };
    const auto from_system = [&](bool use) {
      void* data = nullptr;
      if (posix_memalign(&data, 64, bytes) != 0) abort();
      // torch's allocator writes nothing; the pointer must only not be optimized away.
      static_cast<volatile char*>(data)[0] = 1;
      if (use) touch(static_cast<char*>(data));
      free(data);
    };
    const int cycles = bytes <= (1 << 20) ? 20000 : 20;
    std::printf("%lld %.0f %.0f %.0f %.0f\n", static_cast<long long>(bytes),
                nanoseconds(20000, [&] { from_arena(false); }),
                nanoseconds(cycles, [&] { from_system(false); }),
                nanoseconds(cycles, [&] { from_arena(true); }),
                nanoseconds(cycles, [&] { from_system(true); }));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 5 && std::strcmp(argv[1], "check") == 0) {
    return check(std::atoi(argv[2]), std::atoll(argv[3]), std::strtoull(argv[4], nullptr, 10));
  }
  if (argc == 2 && std::strcmp(argv[1], "time") == 0) return time_sizes();
  std::fprintf(stderr, "usage: arena_stress check <threads> <cycles> <seed> | time\n");
  return 2;
}
