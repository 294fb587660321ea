// A quantized weight as kernel arguments (mps_kernels/format.h).
#pragma once

#include "mps/shader_library.h"

namespace mkrs::mps {

// Do rows of codes start at multiples of `bytes`? torch's MPS buffers are aligned far beyond 16.
inline bool aligned_rows(const WeightArgs& w, int64_t bytes) {
  return w.codes.storage_offset() % bytes == 0 &&
         (w.view.rows <= 1 || w.view.codes_stride % bytes == 0);
}

// Kernels load codes in blocks of 16 or pieces of 8.
inline bool aligned_blocks(const WeightArgs& w) {
  return aligned_rows(w, 2 * w.view.bits);
}
inline bool aligned_pieces(const WeightArgs& w) {
  return aligned_rows(w, w.view.bits);
}

// k >> group_shift is the group of column k.
inline int64_t group_shift(const QuantizedWeight& w) {
  if (w.groups <= 1) return 31;
  int64_t shift = 0;
  while ((int64_t{1} << shift) < w.group_size) ++shift;
  return shift;
}

// Buffers 0..2. Symmetric weights bind scale in place of the component that they do not have.
inline Launch& bind_components(Launch& launch, const WeightArgs& w) {
  return launch.tensor(w.codes).tensor(w.scale).tensor(w.zero.has_value() ? *w.zero : w.scale);
}

// shape, layout, strides: the three pairs that every weight kernel takes.
inline Launch& bind_shape(Launch& launch, const QuantizedWeight& w) {
  return launch.pair(w.rows, w.in_features, "rows and in_features")
      .pair(w.rows > 1 ? w.codes_stride : 0, group_shift(w), "the row stride of codes")
      .pair(w.rows > 1 ? w.scale_stride : 0, w.rows > 1 ? w.zero_stride : 0,
            "the row strides of scale and zero_point or offset");
}

inline uint64_t ceil_div(int64_t a, int64_t b) {
  return static_cast<uint64_t>((a + b - 1) / b);
}

// Sizes that mps_kernels/format.h fixes.
constexpr int64_t kSimd = 32;
constexpr int64_t kPiece = 8;

}  // namespace mkrs::mps
