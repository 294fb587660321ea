#pragma once

#include "format.h"

// Up to 8 values to columns k.. of a row of `columns` elements that starts at a multiple of
// `columns` elements in a fresh tensor: in vectors of 4 where every row is aligned to one.
template <typename T>
inline void store_piece(device T* row, int k, int columns, thread const float* values) {
  if (columns % 4 == 0 && k + PIECE <= columns) {
    typedef vec<T, 4> T4;
    device T4* out = reinterpret_cast<device T4*>(row + k);
    out[0] = T4(T(values[0]), T(values[1]), T(values[2]), T(values[3]));
    out[1] = T4(T(values[4]), T(values[5]), T(values[6]), T(values[7]));
    return;
  }
  UNROLL
  for (int i = 0; i < PIECE; i++) {
    if (k + i < columns) row[k + i] = T(values[i]);
  }
}
