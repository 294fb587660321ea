// As much of CUDA as a kernel without warp operations needs, on the CPU: the threads of a block are
// fibers that take turns at barriers. Loads check their alignment, as the GPU does.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // blocks run one after the other

using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, gridDim;

template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) {
    std::fprintf(stderr, "a load of %zu bytes at %p is not aligned\n", sizeof(T),
                 static_cast<const void*>(p));
    std::abort();
  }
  return *p;
}

// Bytes of y:x; each digit of `selector` names one.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  }
  return result;
}

namespace host {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool ended = false;
};

inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* kernel = nullptr;

inline void enter() {
  (*kernel)();
  current->ended = true;
}

// Runs the blocks of a grid. The threads of a block take turns in ascending or descending order,
// and all of them must come to as many barriers.
inline void launch(dim3 grid, int threads, bool descending, const std::function<void()>& work) {
  kernel = &work;
  gridDim = grid;
  std::vector<Fiber> fibers(threads);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        fiber.ended = false;
        makecontext(&fiber.context, enter, 0);
      }
      for (int ended = 0; ended == 0;) {
        for (int i = 0; i < threads; ++i) {
          threadIdx.x = descending ? threads - 1 - i : i;
          current = &fibers[threadIdx.x];
          swapcontext(&scheduler, &current->context);
          ended += current->ended;
        }
        if (ended != 0 && ended != threads) {
          std::fprintf(stderr, "%d of %d threads ended while others wait\n", ended, threads);
          std::abort();
        }
      }
    }
  }
}

}  // namespace host

inline void __syncthreads() {
  swapcontext(&host::current->context, &host::scheduler);
}
