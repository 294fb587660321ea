// The operands of stream_kernel.cuh: codes as numbers, and activations in shared memory in the
// order in which codes unpack, with the sums of their runs.
#pragma once

#include "mma.cuh"
#include "stream_variants.cuh"

namespace mkrs::cuda {

// What is taken away from codes before they are multiplied. bf16 has few bits of mantissa: there
// 4-bit codes become q + 16, without an instruction that subtracts; the sums make up for it.
template <typename T, int BITS>
constexpr float kStreamCenter =
    BITS == 4 && std::is_same_v<T, __nv_bfloat16> ? -16.0f : float(1 << (BITS - 1));

template <typename T, int BITS, int RUN>
__device__ __forceinline__ void stream_codes(const uint32_t (&w)[(RUN * BITS + 7) / 8],
                                             uint32_t (&a)[RUN][2]) {
  if constexpr (kStreamCenter<T, BITS> > 0.0f) {
    unpack_codes<T, BITS, RUN>(w, a);
  } else {
    const auto pair = [](uint32_t v) { return masked_or(v, 0x00780078u, 0x41804180u); };
#pragma unroll
    for (int i = 0; i < (RUN + 1) / 2; ++i) {
      const uint32_t v = RUN == 1 ? w[i] | w[i] << 12 : w[i];  // a run of one holds 16 bits
      a[2 * i][0] = pair(v << 3);
      if constexpr (RUN == 1) {
        a[0][1] = pair(v >> 5);
      } else {
        a[2 * i][1] = pair(v >> 1);
        a[2 * i + 1][0] = pair(v >> 5);
        a[2 * i + 1][1] = pair(v >> 9);
      }
    }
  }
}

// Stages the activations of `count` units from first_k on, zeros where there are none. after_loads
// is called when the first of them are on their way: what it asks for would keep them waiting.
template <typename T, int BITS, int RUN, int COLS, int WARPS, typename F>
__device__ __forceinline__ void stage_inputs(const StreamParams& p, const StreamLayout& at,
                                             unsigned char* shared, int count, int first_k,
                                             const F& after_loads) {
  constexpr int kThreads = WARPS * 32;
  constexpr int kRuns = kStreamRuns<RUN>;  // of a unit
  float* run_sums = reinterpret_cast<float*>(shared + at.sums);
  constexpr int kBatch = COLS == 1 ? 3 : 4;       // loads in flight
  const int blocks = count * (kStreamUnit / 16);  // of 16 activations, per row
  const int all = blocks * p.m;
  const int end = static_cast<int>(p.w.in_features);
  for (int base = 0; base < all; base += kBatch * kThreads) {
    uint32_t words[kBatch][8];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kThreads >= all) break;
      const int i = base + b * kThreads + threadIdx.x;
      const int row = COLS == 1 ? 0 : i / blocks;
      const int k = first_k + (i - row * blocks) * 16;
      const unsigned short* x = static_cast<const unsigned short*>(p.x) + row * p.x_stride;
      if (i < all && p.x_aligned && k + 16 <= end) {
        const uint4 low = *reinterpret_cast<const uint4*>(x + k);
        const uint4 high = *reinterpret_cast<const uint4*>(x + k + 8);
        words[b][0] = low.x, words[b][1] = low.y, words[b][2] = low.z, words[b][3] = low.w;
        words[b][4] = high.x, words[b][5] = high.y, words[b][6] = high.z, words[b][7] = high.w;
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t even = i < all && k + 2 * j < end ? x[k + 2 * j] : 0;
          const uint32_t odd = i < all && k + 2 * j + 1 < end ? x[k + 2 * j + 1] : 0;
          words[b][j] = even | odd << 16;
        }
      }
    }
    if (base == 0) {  // not earlier: these keep later loads waiting
      after_loads();
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kThreads >= all) break;
      const int i = base + b * kThreads + threadIdx.x;
      const int row = COLS == 1 ? 0 : i / blocks;
      const int block = i - row * blocks;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += sum_of_pair<T>(words[b][j]);
#pragma unroll
      for (int offset = RUN / 2; offset > 0; offset /= 2) {  // RUN neighbours hold one run
        sum += __shfl_xor_sync(~0u, sum, offset);
      }
      interleave<kInterleave<T, BITS, RUN>>(words[b]);
      if (i < all) {
        uint4* to = reinterpret_cast<uint4*>(shared + at.x + (row * p.x_row + block * 16) * 2);
        to[0] = make_uint4(words[b][0], words[b][1], words[b][2], words[b][3]);
        to[1] = make_uint4(words[b][4], words[b][5], words[b][6], words[b][7]);
        if (block % RUN == 0) run_sums[block / RUN * COLS + row] = sum;
      }
    }
  }
  for (int i = threadIdx.x; i < kStreamZeroBytes / 4; i += kThreads) {
    reinterpret_cast<uint32_t*>(shared + at.zeros)[i] = 0;
  }
  if (p.m < COLS) {
    for (int i = threadIdx.x; i < count * kRuns * COLS; i += kThreads) {
      if (i % COLS >= p.m) run_sums[i] = 0.0f;
    }
  }
}

}  // namespace mkrs::cuda
