// out[M, K] = x[M, N] @ W[N, K]: the backward of dequant_matmul.
#include "format.h"
#include "gemm.h"

constant constexpr int COLUMN_SIMDGROUPS = 8;
constant constexpr int COLUMN_SPAN = SIMD * PIECE;  // columns of a threadgroup

// M = 1..8. Floor: codes + scales over the memory bandwidth. A lane keeps 8 columns; the 8
// simdgroups take every 8th row each, so that a row's codes are read as one run, and are added up
// through threadgroup memory. O is float and `out` [parts, M, K] when rows are split over parts.
template <typename T, typename O, typename S, int BITS, int SCHEME, bool ALIGNED, int M>
[[kernel, max_total_threads_per_threadgroup(COLUMN_SIMDGROUPS* SIMD)]] void dequant_matmul_t_small(
    device const uchar* codes [[buffer(0)]], device const S* scale [[buffer(1)]],
    device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
    device const T* x [[buffer(3)]], device O* out [[buffer(4)]],
    constant int2& shape [[buffer(5)]],    // rows N, in_features K
    constant int2& layout [[buffer(6)]],   // codes_stride, group_shift
    constant int2& strides [[buffer(7)]],  // scale_stride, zero_stride
    constant int2& options [[buffer(8)]],  // input_stride, parts
    uint2 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float memory[COLUMN_SIMDGROUPS * COLUMN_SPAN];
  const int rows = shape.x, columns = shape.y;
  const int k = int(group.x) * COLUMN_SPAN + int(lane) * PIECE;
  const int2 part = depth_part(rows, int(group.y), options.y);

  float sums[M][PIECE];
  UNROLL
  for (int m = 0; m < M; m++) {
    UNROLL
    for (int i = 0; i < PIECE; i++) sums[m][i] = 0.0f;
  }
  for (int row = part.x + int(simdgroup); row < part.y; row += COLUMN_SIMDGROUPS) {
    float weights[PIECE];
    dequantize_piece<S, BITS, SCHEME, ALIGNED>(
        codes + ulong(row) * ulong(layout.x), scale + ulong(row) * ulong(strides.x),
        zero + ulong(row) * ulong(strides.y), k, columns, layout.y, weights);
    UNROLL
    for (int m = 0; m < M; m++) {
      const float value = float(x[ulong(m) * ulong(options.x) + ulong(row)]);
      UNROLL
      for (int i = 0; i < PIECE; i++) sums[m][i] = fma(value, weights[i], sums[m][i]);
    }
  }

  device O* target = out + ulong(group.y) * ulong(M) * ulong(columns);
  const int column = int(group.x) * COLUMN_SPAN + int(thread_index);
  UNROLL
  for (int m = 0; m < M; m++) {
    // Element i of all lanes side by side: neighbours in memory, no bank conflicts.
    UNROLL
    for (int i = 0; i < PIECE; i++) {
      memory[(int(simdgroup) * PIECE + i) * SIMD + int(lane)] = sums[m][i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int i = int(thread_index) % PIECE, from = int(thread_index) / PIECE;
    float total = 0.0f;
    UNROLL
    for (int s = 0; s < COLUMN_SIMDGROUPS; s++) total += memory[(s * PIECE + i) * SIMD + from];
    if (column < columns) target[ulong(m) * ulong(columns) + ulong(column)] = O(total);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// M > 8: tiles (gemm.h).
template <typename T, typename O, typename S, int BITS, int SCHEME, bool ALIGNED, int BM>
[[kernel, max_total_threads_per_threadgroup(GEMM_THREADS)]] void dequant_matmul_t_tile(
    device const uchar* codes [[buffer(0)]], device const S* scale [[buffer(1)]],
    device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
    device const T* x [[buffer(3)]], device O* out [[buffer(4)]],
    constant int2& shape [[buffer(5)]],    // rows N, in_features K
    constant int2& layout [[buffer(6)]],   // codes_stride, group_shift
    constant int2& strides [[buffer(7)]],  // scale_stride, zero_stride
    constant int2& input [[buffer(8)]],    // M, input_stride
    constant int2& options [[buffer(9)]],  // parts, unused
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float memory[(BM + TILE) * LINE];
  const int2 part = depth_part(shape.x, int(group.z), options.x);
  device O* target = out + ulong(group.z) * ulong(input.x) * ulong(shape.y);
  gemm_tile<T, O, S, BITS, SCHEME, ALIGNED, BM, true>(codes, scale, zero, x, x, target, shape,
                                                      layout, strides, input, false, part.x, part.y,
                                                      group.xy, thread_index, simdgroup, memory);
}
