// codes -> floats, bit for bit what the CPU writes.
// Floor: codes, scales and the output each moved once over the memory bandwidth. A thread takes 8
// codes, so that a simdgroup's loads and stores are one contiguous run.
#include "format.h"
#include "store.h"

template <typename T, typename S, int BITS, int SCHEME, bool ALIGNED>
kernel void dequantize(device const uchar* codes [[buffer(0)]], device const S* scale [[buffer(1)]],
                       device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
                       device T* out [[buffer(3)]],
                       constant int2& shape [[buffer(4)]],    // rows, in_features
                       constant int2& layout [[buffer(5)]],   // codes_stride, group_shift
                       constant int2& strides [[buffer(6)]],  // scale_stride, zero_stride
                       uint2 position [[thread_position_in_grid]]) {
  const int k = int(position.x) * PIECE;
  const ulong row = position.y;
  if (k >= shape.y) return;
  float weights[PIECE];
  dequantize_piece<S, BITS, SCHEME, ALIGNED>(
      codes + row * ulong(layout.x), scale + row * ulong(strides.x), zero + row * ulong(strides.y),
      k, shape.y, layout.y, weights);
  store_piece(out + row * ulong(shape.y), k, shape.y, weights);
}
