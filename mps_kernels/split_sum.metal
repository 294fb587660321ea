// The last step of split-K: partial sums [parts, M, outputs] -> output, in a fixed order.
#include "format.h"

template <typename T>
kernel void split_sum(device const float* partial [[buffer(0)]], device const T* bias [[buffer(1)]],
                      device T* out [[buffer(2)]],
                      constant int2& shape [[buffer(3)]],    // M, outputs
                      constant int2& options [[buffer(4)]],  // parts, has_bias
                      uint2 position [[thread_position_in_grid]]) {
  if (int(position.x) >= shape.y) return;
  const ulong index = ulong(position.y) * ulong(shape.y) + ulong(position.x);
  const ulong size = ulong(shape.x) * ulong(shape.y);
  float sum = 0.0f;
  for (int i = 0; i < options.x; i++) sum += partial[ulong(i) * size + index];
  if (options.y != 0) sum += float(bias[position.x]);
  out[index] = T(sum);
}
