// Weights rounded to the input's type, as a dense layer of that type has them: f32 arithmetic and
// one rounding. Codes become floats by placing them high in the mantissa of a constant.
#pragma once

#include "common.cuh"

namespace mkrs::cuda {

// What code elements are: (q + kElementBias) / kElementFactor, exactly.
template <int BITS>
constexpr float kElementBias = BITS == 8   ? 0.0f
                               : BITS == 4 ? 16.0f
                                           : 4.0f;
template <int BITS>
constexpr float kElementFactor = BITS == 8 ? 1.0f : 2.0f;

// COUNT consecutive codes as elements, a byte permute each.
template <int BITS, int COUNT>
__device__ __forceinline__ void code_elements(const uint32_t* words, float (&v)[COUNT]) {
  if constexpr (BITS == 8) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const uint32_t bits = __byte_perm(words[i / 4], 0x4bu, 0x4550 + i % 4);
      v[i] = __uint_as_float(bits) - 8388608.0f;
    }
  } else if constexpr (BITS == 4) {
#pragma unroll
    for (int i = 0; i < COUNT / 8; ++i) {
      const uint32_t even = (words[i] << 3) & 0x78787878u;
      const uint32_t odd = (words[i] >> 1) & 0x78787878u;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 8 + q / 2
        v[8 * i + 2 * j] = __uint_as_float(__byte_perm(even, 0x41u, 0x4055 + (j << 8)));
        v[8 * i + 2 * j + 1] = __uint_as_float(__byte_perm(odd, 0x41u, 0x4055 + (j << 8)));
      }
    }
  } else {
    static_assert(COUNT <= 16, "one word of codes");
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t shifted = c < 3 ? words[0] << (5 - 2 * c) : words[0] >> 1;
#pragma unroll
      for (int j = 0; j < COUNT / 4; ++j) {  // 2 + q / 2
        v[4 * j + c] =
            __uint_as_float(__byte_perm(shifted & 0x60606060u, 0x40u, 0x4055 + (j << 8)));
      }
    }
  }
}

// (factor, shift) with w = element * factor + shift.
template <int BITS>
__device__ __forceinline__ float2 element_scale(const QuantizedWeight& w, const RawGroup& raw) {
  const Group g = finish_group(w, raw);
  return make_float2(g.scale * kElementFactor<BITS>,
                     fmaf(g.scale, -(kElementBias<BITS> + g.zero), g.offset));
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Eight consecutive codes of a row.
template <int BITS>
struct EightCodes {
  static constexpr int kWords = BITS == 8 ? 2 : 1;
  uint32_t words[kWords];

  __device__ __forceinline__ void read(const unsigned char* p) {
    if constexpr (BITS == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(p);
      words[0] = v.x, words[1] = v.y;
    } else if constexpr (BITS == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(p);
    } else {
      words[0] = *reinterpret_cast<const unsigned short*>(p);
    }
  }

  __device__ __forceinline__ void elements(float (&v)[8]) const { code_elements<BITS>(words, v); }
};

}  // namespace mkrs::cuda
