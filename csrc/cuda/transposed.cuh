// What the two kernels of dequant_matmul_t share: a lane owns 16 columns and walks down the rows.
#pragma once

#include "common.cuh"

namespace mkrs::cuda {

constexpr int kLaneColumns = 16;    // never more than one group
constexpr int kTransposedRows = 4;  // most input rows of one pass

// Codes become floats by placing them high in the mantissa of a constant: element() is
// (q + kBias) * kFactor exactly, with a bias of the codes' own size so that taking it away again in
// the end costs no accuracy.
template <int BITS>
struct ColumnCodes {
  static constexpr int kWords = BITS / 2;
  static constexpr float kBias = BITS == 8 ? 0.0f : BITS == 4 ? 16.0f : 4.0f;
  static constexpr float kInverseFactor = BITS == 8 ? 1.0f : 2.0f;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const uint8_t* p, bool vector, int bytes) {
    if (vector) {
      if constexpr (BITS == 8) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      } else if constexpr (BITS == 4) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
        words[0] = v.x, words[1] = v.y;
      } else {
        words[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i) {
      if (i < bytes) words[i / 4] |= static_cast<uint32_t>(__ldg(p + i)) << (i % 4 * 8);
    }
  }

  __device__ __forceinline__ void elements(float (&v)[kLaneColumns]) const {
    if constexpr (BITS == 8) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        const uint32_t bits = __byte_perm(words[i / 4], 0x4bu, 0x4550 + i % 4);
        v[i] = __uint_as_float(bits) - 8388608.0f;
      }
    } else if constexpr (BITS == 4) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t even = (words[i] << 3) & 0x78787878u;
        const uint32_t odd = (words[i] >> 1) & 0x78787878u;
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // 8 + q / 2
          v[8 * i + 2 * j] = __uint_as_float(__byte_perm(even, 0x41u, 0x4055 + (j << 8)));
          v[8 * i + 2 * j + 1] = __uint_as_float(__byte_perm(odd, 0x41u, 0x4055 + (j << 8)));
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t shifted = c < 3 ? words[0] << (5 - 2 * c) : words[0] >> 1;
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // 2 + q / 2
          v[4 * j + c] =
              __uint_as_float(__byte_perm(shifted & 0x60606060u, 0x40u, 0x4055 + (j << 8)));
        }
      }
    }
  }
};

// A pass of stream_t.cu over m <= kTransposedRows input rows. False, with nothing launched, when
// the shape, an alignment or the device is not one that it takes.
bool run_stream_t(const char* op, const QuantizedWeight& w, const void* x, int64_t x_stride,
                  Float type, int m, void* out, const Scope& scope, const Tensor& like);

}  // namespace mkrs::cuda
