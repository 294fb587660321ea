// Rows gathered by index and dequantized.
// Floor: the gathered rows' codes and scales read once and the output written once.
#include "format.h"
#include "store.h"

// A GPU cannot raise: an index outside [0, rows) gives a row of NaN and reads nothing.
template <typename T, typename S, int BITS, int SCHEME, bool ALIGNED, typename I>
kernel void dequant_embedding(device const uchar* codes [[buffer(0)]],
                              device const S* scale [[buffer(1)]],
                              device const typename ZeroType<SCHEME, S>::type* zero [[buffer(2)]],
                              device const I* indices [[buffer(3)]], device T* out [[buffer(4)]],
                              constant int2& shape [[buffer(5)]],    // rows, in_features
                              constant int2& layout [[buffer(6)]],   // codes_stride, group_shift
                              constant int2& strides [[buffer(7)]],  // scale_stride, zero_stride
                              uint2 position [[thread_position_in_grid]]) {
  const int k = int(position.x) * PIECE;
  if (k >= shape.y) return;
  const long row = long(indices[position.y]);
  float weights[PIECE];
  if (row < 0 || row >= long(shape.x)) {
    UNROLL
    for (int i = 0; i < PIECE; i++) weights[i] = NAN;
  } else {
    dequantize_piece<S, BITS, SCHEME, ALIGNED>(
        codes + ulong(row) * ulong(layout.x), scale + ulong(row) * ulong(strides.x),
        zero + ulong(row) * ulong(strides.y), k, shape.y, layout.y, weights);
  }
  store_piece(out + ulong(position.y) * ulong(shape.y), k, shape.y, weights);
}
