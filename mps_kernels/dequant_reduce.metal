// One number a row: sum, sum of squares, largest, smallest, largest magnitude.
// Floor: codes and scales read once over the memory bandwidth. A simdgroup takes a row.
#include "format.h"

enum Reduction : int { SUM = 0, SUM_SQUARES = 1, AMAX = 2, AMIN = 3, ABS_MAX = 4 };

constant constexpr int REDUCE_SIMDGROUPS = 4;

// A float sum with the error of its additions, which keeps long rows as exact as a double would.
struct LongSum {
  float high;
  float low;
};

inline LongSum add(LongSum sum, float value) {
  const float high = sum.high + value;
  const float back = high - sum.high;
  const float error = (sum.high - (high - back)) + (value - back);
  LongSum result;
  result.high = high;
  // An infinity makes the error NaN; the sum itself is right.
  result.low = isfinite(high) ? sum.low + error : 0.0f;
  return result;
}

template <typename S, int BITS, int SCHEME, bool ALIGNED, int REDUCTION>
[[kernel, max_total_threads_per_threadgroup(REDUCE_SIMDGROUPS* SIMD)]] void dequant_reduce(
    device const uchar* codes [[buffer(0)]], device const S* scale [[buffer(1)]],
    device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
    device float* out [[buffer(3)]],
    constant int2& shape [[buffer(4)]],    // rows, in_features
    constant int2& layout [[buffer(5)]],   // codes_stride, group_shift
    constant int2& strides [[buffer(6)]],  // scale_stride, zero_stride
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int row = int(group) * REDUCE_SIMDGROUPS + int(simdgroup);
  if (row >= shape.x) return;  // a whole simdgroup
  const int columns = shape.y;
  LongSum sum;
  sum.high = 0.0f;
  sum.low = 0.0f;
  float extreme = REDUCTION == AMAX ? -INFINITY : REDUCTION == AMIN ? INFINITY : 0.0f;
  bool invalid = false;
  for (int k = int(lane) * PIECE; k < columns; k += SIMD * PIECE) {
    float weights[PIECE];
    dequantize_piece<S, BITS, SCHEME, ALIGNED>(
        codes + ulong(row) * ulong(layout.x), scale + ulong(row) * ulong(strides.x),
        zero + ulong(row) * ulong(strides.y), k, columns, layout.y, weights);
    UNROLL
    for (int i = 0; i < PIECE; i++) {
      const float w = weights[i];
      if (k + i >= columns) break;
      if (REDUCTION == SUM) sum = add(sum, w);
      if (REDUCTION == SUM_SQUARES) {
        const float square = w * w;
        sum = add(sum, square);
        if (isfinite(square)) sum.low += fma(w, w, -square);
      }
      if (REDUCTION == AMAX) extreme = w > extreme ? w : extreme;
      if (REDUCTION == AMIN) extreme = w < extreme ? w : extreme;
      if (REDUCTION == ABS_MAX) extreme = fabs(w) > extreme ? fabs(w) : extreme;
      invalid = invalid || isnan(w);
    }
  }
  float result;
  if (REDUCTION == SUM || REDUCTION == SUM_SQUARES) {
    for (ushort step = SIMD / 2; step > 0; step /= 2) {
      LongSum other;
      other.high = simd_shuffle_xor(sum.high, step);
      other.low = simd_shuffle_xor(sum.low, step);
      sum = add(sum, other.high);
      sum.low += other.low;
    }
    result = isfinite(sum.high) ? sum.high + sum.low : sum.high;
  } else {
    const bool any_invalid = simd_any(invalid);
    const float best = REDUCTION == AMIN ? simd_min(extreme) : simd_max(extreme);
    result = any_invalid ? NAN : best;
  }
  if (lane == 0) out[row] = result;
}
