// input [m, N] @ W -> [m, K] on tensor cores: see transposed_kernel.cuh.
#pragma once

#include "common.cuh"

namespace mkrs::cuda {

constexpr int kTransposedSpan = 64;  // columns of a warp: never more than one group
constexpr int kTransposedWarps = 8;  // side by side
constexpr int kTransposedStep = 32;  // weight rows of a step
constexpr int kTransposedExact = 8;  // input rows that keep f32's exactness
constexpr int kTransposedMost = 64;  // input rows of one pass

struct TransposedParams {
  QuantizedWeight w;
  const void* x;  // [m, N]
  int64_t x_stride;
  float* partial;  // [splits, m, K]
  int shift;       // of group sizes
  int m;
  int split_rows;
};

struct TransposedPlan {
  TransposedParams params;
  int tiles;        // of K
  int splits;       // of N
  bool overlapped;  // the launch, with the kernel before
};

// How a pass of at most kTransposedMost input rows runs. False when the shape, an alignment or the
// input's type is not one that the kernels take.
bool plan_transposed(const QuantizedWeight& w, const void* x, int64_t x_stride, Float type,
                     int64_t m, const DeviceInfo& info, TransposedPlan* plan);

void launch_transposed(const char* op, const TransposedPlan& plan, Float type, cudaStream_t stream);

}  // namespace mkrs::cuda
