// Tensor-core building blocks: asynchronous copies, m16n8k16 products with f32 accumulation, and
// codes turned into exact small integers in f16 or bf16, two at a time.
#pragma once

#include "common.cuh"

namespace mkrs::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(shared), "l"(global)
               : "memory");
}

// `bytes` (4, 8 or a multiple of 16) to shared memory, of which the first `valid` come from memory.
__device__ __forceinline__ void copy_async(uint32_t shared, const char* from, int bytes,
                                           int valid) {
  if (bytes == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared), "l"(from),
                 "r"(valid)
                 : "memory");
  } else if (bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared), "l"(from),
                 "r"(valid)
                 : "memory");
  } else {
    for (int i = 0; i < bytes; i += 16) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared + i),
                   "l"(from + i), "r"(max(0, min(16, valid - i)))
                   : "memory");
    }
  }
}

__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::);
}

template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// c[16x8] += a[16x16] * b[16x8]. With g = lane / 4 and t = lane % 4: a[0], a[2] are row g, a[1],
// a[3] row g + 8; b is column g; c[0], c[1] are row g and c[2], c[3] row g + 8 of columns 2t, 2t
// + 1.
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- codes to integers
// ----------------------------------------------------------------------------
//
// OR-ing a code into the low mantissa bits of a power of two gives that power plus the code; taking
// the power away again, and with it the middle code c = 2**(bits-1), is exact. All results are q -
// c. Which two codes of a word end up in one register is free, as long as the activations are laid
// out in the same order (kInterleave below).

__device__ __forceinline__ uint32_t masked_or(uint32_t w, uint32_t mask, uint32_t bias) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;\n" : "=r"(d) : "r"(w), "r"(mask), "r"(bias));
  return d;
}

__device__ __forceinline__ uint32_t masked_or_not(uint32_t w, uint32_t mask, uint32_t bias) {
  uint32_t d;  // (~w & mask) | bias
  asm("lop3.b32 %0, %1, %2, %3, 0xae;\n" : "=r"(d) : "r"(w), "r"(mask), "r"(bias));
  return d;
}

template <typename T>
__device__ __forceinline__ uint32_t sub2(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t sub2<__half>(uint32_t a, uint32_t b) {
  const __half2 d = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}
template <>
__device__ __forceinline__ uint32_t sub2<__nv_bfloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 d =
      __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&d);
}

template <typename T>
__device__ __forceinline__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma2<__half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
__device__ __forceinline__ uint32_t fma2<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Codes that lie at bit SHIFT of both halves of w, as integers in T. For f16, SHIFT + BITS <= 8;
// for bf16, whose mantissa has 7 bits, <= 7 except for 8-bit codes.
template <typename T, int BITS, int SHIFT>
__device__ __forceinline__ uint32_t centered_pair(uint32_t w) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  constexpr uint32_t kMask = ((1u << BITS) - 1) << SHIFT;
  constexpr uint32_t kPair = kMask | kMask << 16;
  if constexpr (!kHalf && BITS == 8) {
    // 128 + the low seven bits, minus 128 or 256 as the top bit is set or not.
    return sub2<T>(masked_or(w, 0x007f007fu, 0x43004300u),
                   masked_or_not(w, 0x00800080u, 0x43004300u));
  } else if constexpr (SHIFT == 0) {
    constexpr uint32_t kBias = kHalf ? 0x64006400u : 0x43004300u;  // 1024, 128
    constexpr uint32_t kCenter = 0x00010001u << (BITS - 1);        // one unit is one mantissa step
    return sub2<T>(masked_or(w, kPair, kBias), kBias | kCenter);
  } else if constexpr (kHalf) {
    static_assert(SHIFT + BITS <= 8);
    constexpr uint32_t kFactor = SHIFT == 2 ? 0x3400u : SHIFT == 4 ? 0x2c00u : 0x2400u;
    // -(1024 / 2**SHIFT + c)
    constexpr uint32_t kOffset = BITS == 4    ? 0xd480u   // -72
                                 : SHIFT == 2 ? 0xdc08u   // -258
                                 : SHIFT == 4 ? 0xd420u   // -66
                                              : 0xcc80u;  // -18
    return fma2<T>(masked_or(w, kPair, 0x64006400u), kFactor * 0x10001u, kOffset * 0x10001u);
  } else {
    static_assert(SHIFT + BITS <= 7 && BITS == 2);
    constexpr uint32_t kFactor = SHIFT == 2 ? 0x3e80u : 0x3d80u;  // 1/4, 1/16
    constexpr uint32_t kOffset = SHIFT == 2 ? 0xc208u : 0xc120u;  // -34, -10
    return fma2<T>(masked_or(w, kPair, 0x43004300u), kFactor * 0x10001u, kOffset * 0x10001u);
  }
}

// Position 2i of an interleaved block of P activations is element i, position 2i + 1 element i +
// P/2; P = 1 is the natural order.
template <typename T, int BITS, int RUN>
constexpr int kInterleave = BITS == 8   ? (std::is_same_v<T, __half> ? 1 : 4)
                            : BITS == 4 ? (RUN >= 2 ? 8 : 1)
                                        : (RUN == 4 ? 16 : 1);

// A lane's packed codes of a run, BYTES of them.
template <int BYTES>
__device__ __forceinline__ void load_codes(const unsigned char* from,
                                           uint32_t (&v)[(BYTES + 3) / 4]) {
  if constexpr (BYTES == 16) {
    const uint4 q = *reinterpret_cast<const uint4*>(from);
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
  } else if constexpr (BYTES == 8) {
    const uint2 q = *reinterpret_cast<const uint2*>(from);
    v[0] = q.x, v[1] = q.y;
  } else if constexpr (BYTES == 4) {
    v[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (BYTES == 2) {
    v[0] = *reinterpret_cast<const unsigned short*>(from);
  } else {
    v[0] = *from;
  }
}

// A lane's activations of RUN products, as their operand registers.
template <int RUN>
__device__ __forceinline__ void load_inputs(const void* from, uint32_t (&b)[RUN * 2]) {
  if constexpr (RUN == 1) {
    const uint2 v = *static_cast<const uint2*>(from);
    b[0] = v.x, b[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < RUN / 2; ++i) {
      const uint4 v = static_cast<const uint4*>(from)[i];
      b[4 * i] = v.x, b[4 * i + 1] = v.y, b[4 * i + 2] = v.z, b[4 * i + 3] = v.w;
    }
  }
}

// The codes a lane contributes to RUN products (4 a product, RUN * 4 consecutive elements of a row)
// as operand registers: a[j][0], a[j][1] of product j.
template <typename T, int BITS, int RUN>
__device__ __forceinline__ void unpack_codes(const uint32_t (&w)[(RUN * BITS + 7) / 8],
                                             uint32_t (&a)[RUN][2]) {
  if constexpr (BITS == 8) {
#pragma unroll
    for (int j = 0; j < RUN; ++j) {
      if constexpr (std::is_same_v<T, __half>) {
        a[j][0] = sub2<T>(__byte_perm(w[j], 0x64646464u, 0x4140), 0x64806480u);
        a[j][1] = sub2<T>(__byte_perm(w[j], 0x64646464u, 0x4342), 0x64806480u);
      } else {
        a[j][0] = centered_pair<T, 8, 0>(w[j]);
        a[j][1] = centered_pair<T, 8, 0>(w[j] >> 8);
      }
    }
  } else if constexpr (BITS == 4 && RUN >= 2) {
#pragma unroll
    for (int i = 0; i < RUN / 2; ++i) {
      const uint32_t v = w[i];
      a[2 * i][0] = centered_pair<T, 4, 0>(v);
      a[2 * i + 1][0] = centered_pair<T, 4, 0>(v >> 8);
      if constexpr (std::is_same_v<T, __half>) {
        a[2 * i][1] = centered_pair<T, 4, 4>(v);
        a[2 * i + 1][1] = centered_pair<T, 4, 4>(v >> 8);
      } else {
        a[2 * i][1] = centered_pair<T, 4, 0>(v >> 4);
        a[2 * i + 1][1] = centered_pair<T, 4, 0>(v >> 12);
      }
    }
  } else if constexpr (BITS == 4) {
    const uint32_t v = w[0] | w[0] << 12;  // w[0] holds 16 bits
    a[0][0] = centered_pair<T, 4, 0>(v);
    a[0][1] = centered_pair<T, 4, 0>(v >> 8);
  } else if constexpr (RUN == 4) {
    const uint32_t v = w[0];
    if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i][0] = centered_pair<T, 2, 0>(v >> (8 * i));
        a[2 * i][1] = centered_pair<T, 2, 2>(v >> (8 * i));
        a[2 * i + 1][0] = centered_pair<T, 2, 4>(v >> (8 * i));
        a[2 * i + 1][1] = centered_pair<T, 2, 6>(v >> (8 * i));
      }
    } else {
      a[0][0] = centered_pair<T, 2, 0>(v);
      a[0][1] = centered_pair<T, 2, 2>(v);
      a[1][0] = centered_pair<T, 2, 4>(v);
      a[1][1] = centered_pair<T, 2, 0>(v >> 6);
      a[2][0] = centered_pair<T, 2, 2>(v >> 6);
      a[2][1] = centered_pair<T, 2, 4>(v >> 6);
      a[3][0] = centered_pair<T, 2, 0>(v >> 12);
      a[3][1] = centered_pair<T, 2, 2>(v >> 12);
    }
  } else {
#pragma unroll
    for (int j = 0; j < RUN; ++j) {
      const uint32_t b = (w[0] >> (8 * j)) & 0xffu;
      const uint32_t v = b | b << 14;
      a[j][0] = centered_pair<T, 2, 0>(v);
      a[j][1] = centered_pair<T, 2, 4>(v);
    }
  }
}

// ---- activations -------------------------------------------------------------------------------

template <int P>
__device__ __forceinline__ void interleave(uint32_t (&w)[8]) {  // 16 elements, two a word
  if constexpr (P > 1) {
    uint32_t v[8];
    constexpr int kWords = P / 2;
#pragma unroll
    for (int b = 0; b < 8; b += kWords) {
#pragma unroll
      for (int i = 0; i < kWords / 2; ++i) {
        v[b + 2 * i] = __byte_perm(w[b + i], w[b + i + kWords / 2], 0x5410);
        v[b + 2 * i + 1] = __byte_perm(w[b + i], w[b + i + kWords / 2], 0x7632);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = v[i];
  }
}

template <typename T>
__device__ __forceinline__ float sum_of_pair(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&word));
    return v.x + v.y;
  } else {
    return __uint_as_float(word << 16) + __uint_as_float(word & 0xffff0000u);
  }
}

// Where a warp is in the block's sequence of units: unit u is chunk u % count of tile u / count.
struct Cursor {
  int tile;
  int chunk;
  __device__ __forceinline__ void advance(int tiles, int chunks, int count) {
    tile += tiles;
    chunk += chunks;
    if (chunk >= count) {
      chunk -= count;
      ++tile;
    }
  }
};

}  // namespace mkrs::cuda
