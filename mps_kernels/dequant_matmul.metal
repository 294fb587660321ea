// out[M, N] = x[M, K] @ W[N, K].T (+ bias); f32 accumulation.
#include "decode.h"
#include "format.h"
#include "gemm.h"

constant constexpr int VECTOR_SIMDGROUPS = 2;
constant constexpr int DECODE_ROWS = 4;  // weight rows of a simdgroup

// M = 1. Floor: codes + scales over the memory bandwidth; x stays in cache, y is small.
// A simdgroup takes 4 rows and 512 codes of each at a time, 16 a lane. Activations are divided by
// the powers of two of their places and summed once for the 4 rows; then a group's part of a dot
// product is scale * sum(code * x) + shift * sum(x).
template <typename T, typename S, int BITS, int SCHEME, bool ALIGNED>
[[kernel, max_total_threads_per_threadgroup(VECTOR_SIMDGROUPS* SIMD)]] void dequant_matmul_decode(
    device const uchar* codes [[buffer(0)]], device const S* scale [[buffer(1)]],
    device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
    device const T* x [[buffer(3)]], device const T* bias [[buffer(4)]],
    device T* out [[buffer(5)]],
    constant int2& shape [[buffer(6)]],    // rows N, in_features K
    constant int2& layout [[buffer(7)]],   // codes_stride, group_shift
    constant int2& strides [[buffer(8)]],  // scale_stride, zero_stride
    constant int2& options [[buffer(9)]],  // has_bias, unused
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int rows = shape.x, columns = shape.y;
  const int row_bytes = code_bytes<BITS>(columns);
  const int first = (int(group) * VECTOR_SIMDGROUPS + int(simdgroup)) * DECODE_ROWS;
  if (first >= rows) return;  // a whole simdgroup

  ulong row[DECODE_ROWS];
  float sums[DECODE_ROWS];
  UNROLL
  for (int r = 0; r < DECODE_ROWS; r++) {
    row[r] = ulong(min(first + r, rows - 1));  // rows past the end repeat the last one
    sums[r] = 0.0f;
  }
  for (int k = int(lane) * BLOCK; k < columns; k += SIMD * BLOCK) {
    float values[BLOCK];
    load_activations(x + k, columns - k, values);
    float total = 0.0f;
    UNROLL
    for (int i = 0; i < BLOCK; i++) total += values[i];
    if (isfinite(total)) {
      UNROLL
      for (int i = 0; i < BLOCK; i++) values[i] *= Masked<BITS>::unit(i);
    }
    const int group_index = group_of(k, layout.y);
    const int start = k / PIECE * BITS;
    UNROLL
    for (int r = 0; r < DECODE_ROWS; r++) {
      ushort words[BITS];
      LoadBlock<BITS, ALIGNED>::load(codes + row[r] * ulong(layout.x) + ulong(start),
                                     row_bytes - start, words);
      const float s = float(scale[row[r] * ulong(strides.x) + ulong(group_index)]);
      const float shift =
          Shift<BITS, SCHEME>::factor(s, zero + row[r] * ulong(strides.y), group_index);
      float dot = 0.0f;
      if (isfinite(total)) {
        UNROLL
        for (int i = 0; i < BLOCK; i++) dot = fma(Masked<BITS>::value(words, i), values[i], dot);
        sums[r] = fma(s, dot, fma(shift, total, sums[r]));
      } else {
        // Code by code, or an infinite activation would meet itself with the other sign.
        UNROLL
        for (int i = 0; i < BLOCK; i++) {
          const float q = Masked<BITS>::value(words, i) * Masked<BITS>::unit(i);
          if (k + i < columns) dot = fma(fma(s, q, shift), values[i], dot);
        }
        sums[r] += dot;
      }
    }
  }
  UNROLL
  for (int r = 0; r < DECODE_ROWS; r++) {
    float sum = simd_sum(sums[r]);
    if (lane == 0 && first + r < rows) {
      if (options.x != 0) sum += float(bias[first + r]);
      out[first + r] = T(sum);
    }
  }
}

// M = 2..8. Floor: as for M = 1, codes are read once. 16 weights of each row are decoded once and
// used by M vectors, whose 16 activations are loaded once for all rows of the simdgroup.
template <typename T, typename S, int BITS, int SCHEME, bool ALIGNED, int M>
[[kernel, max_total_threads_per_threadgroup(VECTOR_SIMDGROUPS* SIMD)]] void dequant_matmul_small(
    device const uchar* codes [[buffer(0)]], device const S* scale [[buffer(1)]],
    device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
    device const T* x [[buffer(3)]], device const T* bias [[buffer(4)]],
    device T* out [[buffer(5)]],
    constant int2& shape [[buffer(6)]],    // rows N, in_features K
    constant int2& layout [[buffer(7)]],   // codes_stride, group_shift
    constant int2& strides [[buffer(8)]],  // scale_stride, zero_stride
    constant int2& options [[buffer(9)]],  // has_bias, input_stride
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  constexpr int R = M <= 4 ? 4 : 2;  // rows of a simdgroup: 16 * R weights + R * M sums a lane
  const int rows = shape.x, columns = shape.y;
  const int row_bytes = code_bytes<BITS>(columns);
  const int first = (int(group) * VECTOR_SIMDGROUPS + int(simdgroup)) * R;
  if (first >= rows) return;  // a whole simdgroup

  float sums[R][M];
  UNROLL
  for (int r = 0; r < R; r++) {
    UNROLL
    for (int m = 0; m < M; m++) sums[r][m] = 0.0f;
  }
  for (int k = int(lane) * BLOCK; k < columns; k += SIMD * BLOCK) {
    const int group_index = group_of(k, layout.y);
    const int start = k / PIECE * BITS;
    float weights[R][BLOCK];
    UNROLL
    for (int r = 0; r < R; r++) {
      const ulong row = ulong(min(first + r, rows - 1));
      ushort words[BITS];
      LoadBlock<BITS, ALIGNED>::load(codes + row * ulong(layout.x) + ulong(start),
                                     row_bytes - start, words);
      const float s = float(scale[row * ulong(strides.x) + ulong(group_index)]);
      const float shift =
          Shift<BITS, SCHEME>::factor(s, zero + row * ulong(strides.y), group_index);
      UNROLL
      for (int i = 0; i < BLOCK; i++) {
        weights[r][i] = fma(s * Masked<BITS>::unit(i), Masked<BITS>::value(words, i), shift);
      }
    }
    UNROLL
    for (int m = 0; m < M; m++) {
      float values[BLOCK];
      load_activations(x + ulong(m) * ulong(options.y) + ulong(k), columns - k, values);
      UNROLL
      for (int r = 0; r < R; r++) {
        UNROLL
        for (int i = 0; i < BLOCK; i++) sums[r][m] = fma(weights[r][i], values[i], sums[r][m]);
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; r++) {
    UNROLL
    for (int m = 0; m < M; m++) {
      float sum = simd_sum(sums[r][m]);
      if (lane == 0 && first + r < rows) {
        if (options.x != 0) sum += float(bias[first + r]);
        out[ulong(m) * ulong(rows) + ulong(first + r)] = T(sum);
      }
    }
  }
}

// M > 8: tiles (gemm.h). O is float and `out` a workspace [parts, M, N] when the sum is split.
template <typename T, typename O, typename S, int BITS, int SCHEME, bool ALIGNED, int BM>
[[kernel, max_total_threads_per_threadgroup(GEMM_THREADS)]] void dequant_matmul_tile(
    device const uchar* codes [[buffer(0)]], device const S* scale [[buffer(1)]],
    device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
    device const T* x [[buffer(3)]], device const T* bias [[buffer(4)]],
    device O* out [[buffer(5)]],
    constant int2& shape [[buffer(6)]],     // rows N, in_features K
    constant int2& layout [[buffer(7)]],    // codes_stride, group_shift
    constant int2& strides [[buffer(8)]],   // scale_stride, zero_stride
    constant int2& input [[buffer(9)]],     // M, input_stride
    constant int2& options [[buffer(10)]],  // has_bias, parts
    uint3 group [[threadgroup_position_in_grid]], uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float memory[(BM + TILE) * LINE];
  const int2 part = depth_part(shape.y, int(group.z), options.y);
  device O* target = out + ulong(group.z) * ulong(input.x) * ulong(shape.x);
  gemm_tile<T, O, S, BITS, SCHEME, ALIGNED, BM, false>(
      codes, scale, zero, x, bias, target, shape, layout, strides, input, options.x != 0, part.x,
      part.y, group.xy, thread_index, simdgroup, memory);
}
