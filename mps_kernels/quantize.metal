// floats -> codes, scales and zero points or offsets, by the rules of `reference` in
// mergekit_torch/ops/quantize.py, with the same rounding at every step.
// Floor: the weight read once and the codes written once over the memory bandwidth. A simdgroup
// takes a row, 512 elements at a time; a lane has 16 of them, and group_size / 16 lanes share a
// group. A group that is the whole row is read twice.
#include "format.h"

constant constexpr int QUANTIZE_SIMDGROUPS = 4;
constant constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

enum Status : uchar { OK = 0, NON_FINITE = 1, SCALE_OVERFLOW = 2 };

struct Range {
  float low;
  float high;
  float probe;  // 0 for finite weights, NaN otherwise
};

template <typename T>
inline Range block_range(device const T* w, int count, thread float* values) {
  Range range;
  range.low = INFINITY;
  range.high = -INFINITY;
  range.probe = 0.0f;
  UNROLL
  for (int i = 0; i < BLOCK; i++) {
    if (i < count) {
      const float value = float(w[i]);
      values[i] = value;
      range.low = value < range.low ? value : range.low;
      range.high = value > range.high ? value : range.high;
      range.probe += value * 0.0f;
    }
  }
  return range;
}

// Of 2 * reach lanes at a multiple of that; reach 16 is the simdgroup.
inline Range join(Range range, ushort reach) {
  for (ushort step = 1; step <= reach; step *= 2) {
    const float low = simd_shuffle_xor(range.low, step);
    const float high = simd_shuffle_xor(range.high, step);
    const float probe = simd_shuffle_xor(range.probe, step);
    range.low = low < range.low ? low : range.low;
    range.high = high > range.high ? high : range.high;
    range.probe += probe;
  }
  return range;
}

struct Group {
  float scale;
  float inverse;
  float shift;   // subtracted before rounding (affine)
  float center;  // added after rounding (symmetric, asymmetric)
  uchar status;
};

template <typename S, int BITS, int SCHEME>
inline Group group_parameters(Range range) {
  constexpr int levels = (1 << BITS) - 1;
  constexpr float step = 1.0f / float(levels);
  Group g;
  g.scale = 0.0f;
  g.shift = 0.0f;
  g.center = 0.0f;
  const bool constant_group = range.low == range.high;
  if (SCHEME == SYMMETRIC) {
    const float extreme = -range.low >= range.high ? range.low : range.high;
    g.scale = float(S(-extreme / float(1 << (BITS - 1))));
    g.center = float(1 << (BITS - 1));
  } else if (SCHEME == ASYMMETRIC) {
    if (constant_group) {
      g.scale = float(S(range.low));  // code 1, zero_point 0
    } else {
      const float low = min(range.low, 0.0f), high = max(range.high, 0.0f);
      const float to_high = high * step, to_low = low * step;
      g.scale = float(S(to_high - to_low));
    }
  } else {
    g.shift = float(S(range.low));
    if (!constant_group) {
      const float to_high = range.high * step, to_low = g.shift * step;
      g.scale = float(S(to_high - to_low));
    }
  }
  const bool fits = isfinite(g.scale) && isfinite(g.shift);
  g.status = range.probe != 0.0f ? NON_FINITE : (fits ? OK : SCALE_OVERFLOW);
  if (g.status != OK) {
    g.scale = 0.0f;
    g.shift = 0.0f;
  }
  if (fabs(g.scale) < SMALLEST_NORMAL) g.scale = 0.0f;  // its reciprocal could overflow
  g.inverse = g.scale == 0.0f ? 0.0f : 1.0f / g.scale;
  if (SCHEME == ASYMMETRIC && !constant_group) {
    g.center = clamp(rint(-min(range.low, 0.0f) * g.inverse), 0.0f, float(levels));
  }
  return g;
}

template <typename S, int SCHEME>
struct StoreZero {
  static inline void store(device S* zero, ulong index, Group g) {
    if (SCHEME == AFFINE) zero[index] = S(g.shift);
  }
};
template <typename S>
struct StoreZero<S, ASYMMETRIC> {
  static inline void store(device uchar* zero, ulong index, Group g) {
    zero[index] = uchar(g.center);
  }
};

// `count` codes (16, or fewer at the end of the row) to the bytes at `out`; the rest of the last
// byte is 0.
template <int BITS>
inline void store_codes(device uchar* out, Group g, thread const float* values, int count) {
  constexpr int PER_BYTE = 8 / BITS;
  constexpr float top = float((1 << BITS) - 1);
  const int bytes = code_bytes<BITS>(count);
  UNROLL
  for (int b = 0; b < 2 * BITS; b++) {
    if (b >= bytes) break;
    uint byte = 0;
    UNROLL
    for (int j = 0; j < PER_BYTE; j++) {
      const int i = b * PER_BYTE + j;
      if (i < count && g.status == OK) {
        const float rounded = rint((values[i] - g.shift) * g.inverse) + g.center;
        byte |= uint(clamp(rounded, 0.0f, top)) << (j * BITS);
      }
    }
    out[b] = uchar(byte);
  }
}

template <typename T, typename S, int BITS, int SCHEME>
[[kernel, max_total_threads_per_threadgroup(QUANTIZE_SIMDGROUPS* SIMD)]] void quantize(
    device const T* weight [[buffer(0)]], device uchar* codes [[buffer(1)]],
    device S* scale [[buffer(2)]], device typename ZeroType<SCHEME, S>::type* zero [[buffer(3)]],
    device uchar* status [[buffer(4)]],
    constant int2& shape [[buffer(5)]],    // rows, in_features
    constant int2& layout [[buffer(6)]],   // weight_stride, group_size; 0: one group a row
    constant int2& options [[buffer(7)]],  // groups a row, unused
    uint group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int row = int(group) * QUANTIZE_SIMDGROUPS + int(simdgroup);
  if (row >= shape.x) return;  // a whole simdgroup
  const int columns = shape.y;
  device const T* w = weight + ulong(row) * ulong(layout.x);
  device uchar* row_codes = codes + ulong(row) * ulong(code_bytes<BITS>(columns));
  const ulong row_groups = ulong(row) * ulong(options.x);
  float values[BLOCK];
  uchar worst = OK;

  Range whole;
  whole.low = INFINITY;
  whole.high = -INFINITY;
  whole.probe = 0.0f;
  if (layout.y == 0) {
    for (int k = int(lane) * BLOCK; k < columns; k += SIMD * BLOCK) {
      const Range range = block_range(w + k, columns - k, values);
      whole.low = min(range.low, whole.low);
      whole.high = max(range.high, whole.high);
      whole.probe += range.probe;
    }
    whole = join(whole, SIMD / 2);
  }
  // All lanes take every turn: join is a simdgroup operation.
  for (int base = 0; base < columns; base += SIMD * BLOCK) {
    const int k = base + int(lane) * BLOCK;
    const int count = clamp(columns - k, 0, BLOCK);
    const Range range = block_range(w + min(k, columns), count, values);
    Range own = whole;
    if (layout.y != 0) own = join(range, ushort(layout.y / BLOCK / 2));
    const Group g = group_parameters<S, BITS, SCHEME>(own);
    const bool leader = layout.y == 0 ? k == 0 : k % layout.y == 0;
    if (count > 0) {
      worst = max(worst, g.status);
      if (leader) {
        const ulong index = row_groups + ulong(layout.y == 0 ? 0 : k / layout.y);
        scale[index] = S(g.scale);
        StoreZero<S, SCHEME>::store(zero, index, g);
      }
      store_codes<BITS>(row_codes + k / PIECE * BITS, g, values, count);
    }
  }
  const uint row_status = simd_max(uint(worst));
  if (lane == 0) status[row] = uchar(row_status);
}
