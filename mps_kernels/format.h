// The storage format (csrc/format.h) as the kernels read it.
//
// Arguments: scalars arrive as 64-bit integers, so two 32-bit values share one (Launch::pair in
// csrc/mps/shader_library.h); every extent and stride is below 2**31, products are taken in 64 bits.
#pragma once

#include <metal_stdlib>
using namespace metal;

// The format promises a multiplication and an addition that round separately. Metal contracts them
// by default whatever the math mode is; what should be fused below says fma.
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)

// Loops over a block must unroll, or their arrays leave the registers.
#define UNROLL _Pragma("clang loop unroll(full)")

enum Scheme : int { SYMMETRIC = 0, ASYMMETRIC = 1, AFFINE = 2 };

constant constexpr int SIMD = 32;   // threads of a simdgroup
constant constexpr int BLOCK = 16;  // codes a lane takes at a time; never spans two groups
constant constexpr int PIECE = 8;   // half a block, where less work a thread gives more threads

// What the third buffer holds; symmetric weights have nothing there and get `scale` bound again.
template <int SCHEME, typename S>
struct ZeroType {
  typedef S type;
};
template <typename S>
struct ZeroType<ASYMMETRIC, S> {
  typedef uchar type;
};

// Codes start at whole bytes at every multiple of PIECE, whatever the number of bits.
template <int BITS>
constexpr int code_bytes(int count) {
  return (count * BITS + 7) / 8;
}

// The group of element k. Groups are powers of two, or there is one a row: then shift is 31.
inline int group_of(int k, int shift) {
  return k >> shift;
}

// 16 codes as BITS ushorts. `left` is how many bytes the row has from p on; bytes past it read as
// 0. ALIGNED promises that p is a multiple of 2 * BITS bytes.
template <int BITS, bool ALIGNED>
struct LoadBlock {
  static inline void load(device const uchar* p, int left, thread ushort* words) {
    UNROLL
    for (int i = 0; i < BITS; i++) {
      const ushort low = 2 * i < left ? p[2 * i] : uchar(0);
      const ushort high = 2 * i + 1 < left ? p[2 * i + 1] : uchar(0);
      words[i] = ushort(low | (high << 8));
    }
  }
};

template <>
struct LoadBlock<8, true> {
  static inline void load(device const uchar* p, int left, thread ushort* words) {
    if (left < 16) {
      LoadBlock<8, false>::load(p, left, words);
      return;
    }
    const uint4 v = *reinterpret_cast<device const uint4*>(p);
    const ushort4 low = as_type<ushort4>(v.xy);
    const ushort4 high = as_type<ushort4>(v.zw);
    UNROLL
    for (int i = 0; i < 4; i++) {
      words[i] = low[i];
      words[i + 4] = high[i];
    }
  }
};

template <>
struct LoadBlock<4, true> {
  static inline void load(device const uchar* p, int left, thread ushort* words) {
    if (left < 8) {
      LoadBlock<4, false>::load(p, left, words);
      return;
    }
    const ushort4 v = as_type<ushort4>(*reinterpret_cast<device const uint2*>(p));
    UNROLL
    for (int i = 0; i < 4; i++) words[i] = v[i];
  }
};

template <>
struct LoadBlock<2, true> {
  static inline void load(device const uchar* p, int left, thread ushort* words) {
    if (left < 4) {
      LoadBlock<2, false>::load(p, left, words);
      return;
    }
    const ushort2 v = as_type<ushort2>(*reinterpret_cast<device const uint*>(p));
    words[0] = v.x;
    words[1] = v.y;
  }
};

// 8 codes as BITS bytes. ALIGNED promises that p is a multiple of BITS bytes.
template <int BITS, bool ALIGNED>
struct LoadPiece {
  static inline void load(device const uchar* p, int left, thread uchar* bytes) {
    UNROLL
    for (int i = 0; i < BITS; i++) bytes[i] = i < left ? p[i] : uchar(0);
  }
};

template <>
struct LoadPiece<8, true> {
  static inline void load(device const uchar* p, int left, thread uchar* bytes) {
    if (left < 8) {
      LoadPiece<8, false>::load(p, left, bytes);
      return;
    }
    const uint2 v = *reinterpret_cast<device const uint2*>(p);
    const uchar4 low = as_type<uchar4>(v.x);
    const uchar4 high = as_type<uchar4>(v.y);
    UNROLL
    for (int i = 0; i < 4; i++) {
      bytes[i] = low[i];
      bytes[i + 4] = high[i];
    }
  }
};

template <>
struct LoadPiece<4, true> {
  static inline void load(device const uchar* p, int left, thread uchar* bytes) {
    if (left < 4) {
      LoadPiece<4, false>::load(p, left, bytes);
      return;
    }
    const uchar4 v = as_type<uchar4>(*reinterpret_cast<device const uint*>(p));
    UNROLL
    for (int i = 0; i < 4; i++) bytes[i] = v[i];
  }
};

template <>
struct LoadPiece<2, true> {
  static inline void load(device const uchar* p, int left, thread uchar* bytes) {
    if (left < 2) {
      LoadPiece<2, false>::load(p, left, bytes);
      return;
    }
    const uchar2 v = as_type<uchar2>(*reinterpret_cast<device const ushort*>(p));
    bytes[0] = v.x;
    bytes[1] = v.y;
  }
};

// Code i of a piece, as an integer.
template <int BITS>
inline int piece_code(thread const uchar* bytes, int i) {
  const int bit = i * BITS;
  return (bytes[bit / 8] >> (bit % 8)) & ((1 << BITS) - 1);
}

// The weight of a code exactly as the format defines it: one rounding (symmetric, asymmetric), or a
// rounded product plus a rounded sum (affine).
template <int BITS, int SCHEME>
struct Decode {
  template <typename Z>
  static inline float weight(int q, float scale, Z zero) {
    if (SCHEME == SYMMETRIC) return scale * float(q - (1 << (BITS - 1)));
    if (SCHEME == ASYMMETRIC) return scale * float(q - int(zero));
    return scale * float(q) + float(zero);
  }
};

// Up to 8 weights from column k of a row; columns past `columns` become 0.
template <typename S, int BITS, int SCHEME, bool ALIGNED>
inline void dequantize_piece(device const uchar* row_codes, device const S* row_scale,
                             device const typename ZeroType<SCHEME, S>::type* row_zero, int k,
                             int columns, int group_shift, thread float* out) {
  if (k >= columns) {
    UNROLL
    for (int i = 0; i < PIECE; i++) out[i] = 0.0f;
    return;
  }
  const int start = k / PIECE * BITS;
  uchar bytes[BITS];
  LoadPiece<BITS, ALIGNED>::load(row_codes + start, code_bytes<BITS>(columns) - start, bytes);
  const int group = group_of(k, group_shift);
  const float scale = float(row_scale[group]);
  const typename ZeroType<SCHEME, S>::type zero =
      SCHEME == SYMMETRIC ? typename ZeroType<SCHEME, S>::type(0) : row_zero[group];
  UNROLL
  for (int i = 0; i < PIECE; i++) {
    const float w = Decode<BITS, SCHEME>::weight(piece_code<BITS>(bytes, i), scale, zero);
    out[i] = k + i < columns ? w : 0.0f;
  }
}
