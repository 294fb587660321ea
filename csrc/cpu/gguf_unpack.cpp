// Lossless conversion of GGUF weight blocks into the native components.
//
// Floor: every type is a fixed permutation of bits, so the cost is the bytes read plus the bytes
// written over memory bandwidth, e.g. 0.625 + 0.625 bytes a weight for Q4_1, 0.5625 + 0.75 for Q4_K
// (its scales widen to f32). The inner loops have constant trip counts over 16- and 32-bit lanes,
// so that the compiler's vectors do the work; blocks are loaded by memcpy because a GGUF mapping
// aligns tensors to 32 bytes at best and blocks of 18, 22, 34, 84 ... bytes to nothing.
//
// The layouts are those of ggml's block structs; d, dmin and m are IEEE f16, little endian.
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <tuple>

#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

constexpr const char* kOp = "gguf_unpack";

uint16_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

float load_half(const uint8_t* p) {
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(load16(p));
}

// Vectors that GCC and clang lower to whatever the target has; narrowing is one pack instruction.
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

// 16 bytes hold elements 0..15 in their low nibbles and 16..31 in their high ones; the native order
// puts neighbours in one byte.
void interleave_nibbles(const uint8_t* qs, uint8_t* codes) {
  u16x8 v;
  std::memcpy(&v, qs, sizeof v);
  const u8x8 low = __builtin_convertvector((v & 0x0f) | ((v >> 4) & 0xf0), u8x8);
  const u8x8 high = __builtin_convertvector(((v >> 4) & 0x0f) | ((v >> 8) & 0xf0), u8x8);
  std::memcpy(codes, &low, sizeof low);
  std::memcpy(codes + 8, &high, sizeof high);
}

// Eight 5-bit values in the bytes of a word: `nibbles` below, the bits of `flags` as bit 4.
uint64_t join_5bit(uint64_t nibbles, uint8_t flags, uint64_t bias) {
  const uint64_t ones = 0x0101010101010101u;
  // Byte j keeps bit j only; adding 0x7f then carries it, wherever it is, into bit 7.
  const uint64_t bit = ((flags * ones) & 0x8040201008040201u) + 0x7f * ones;
  return ((nibbles & (0x0f * ones)) | ((bit >> 3) & (0x10 * ones))) + bias * ones;
}

// Bit j of the four bytes at qh is bit 4 of element j; nibbles as in interleave_nibbles.
void widen_5bit(const uint8_t* qh, const uint8_t* qs, uint64_t bias, uint8_t* codes) {
  uint64_t q[2], out[4];
  std::memcpy(q, qs, sizeof q);
  out[0] = join_5bit(q[0], qh[0], bias);
  out[1] = join_5bit(q[1], qh[1], bias);
  out[2] = join_5bit(q[0] >> 4, qh[2], bias);
  out[3] = join_5bit(q[1] >> 4, qh[3], bias);
  std::memcpy(codes, out, sizeof out);
}

// The 6-bit scales and mins that Q4_K and Q5_K pack into 12 bytes, times d and -dmin.
void unpack_scales_k4(float d, float dmin, const uint8_t* s, float* scale, float* offset) {
  for (int i = 0; i < 4; ++i) {
    scale[i] = d * static_cast<float>(s[i] & 63);
    offset[i] = -(dmin * static_cast<float>(s[4 + i] & 63));
    scale[4 + i] = d * static_cast<float>((s[8 + i] & 15) | ((s[i] >> 6) << 4));
    offset[4 + i] = -(dmin * static_cast<float>((s[8 + i] >> 4) | ((s[4 + i] >> 6) << 4)));
  }
}

// One struct per GGUF type. `block` is the number of weights in a block of `bytes` bytes; unpack()
// writes block*bits/8 codes and block/group scales (and offsets when the scheme is affine).
struct Q4_0 {
  static constexpr int block = 32, bytes = 18, bits = 4, group = 32;
  static constexpr Scheme scheme = Scheme::Symmetric;
  using Scale = uint16_t;  // the bits of an f16
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    *scale = load16(b);
    interleave_nibbles(b + 2, codes);
  }
};

struct Q4_1 {
  static constexpr int block = 32, bytes = 20, bits = 4, group = 32;
  static constexpr Scheme scheme = Scheme::Affine;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale* offset) {
    *scale = load16(b);
    *offset = load16(b + 2);
    interleave_nibbles(b + 4, codes);
  }
};

struct Q5_0 {
  static constexpr int block = 32, bytes = 22, bits = 8, group = 32;
  static constexpr Scheme scheme = Scheme::Symmetric;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    *scale = load16(b);
    widen_5bit(b + 2, b + 6, 128 - 16, codes);
  }
};

struct Q5_1 {
  static constexpr int block = 32, bytes = 24, bits = 8, group = 32;
  static constexpr Scheme scheme = Scheme::Affine;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale* offset) {
    *scale = load16(b);
    *offset = load16(b + 2);
    widen_5bit(b + 4, b + 8, 0, codes);
  }
};

struct Q8_0 {
  static constexpr int block = 32, bytes = 34, bits = 8, group = 32;
  static constexpr Scheme scheme = Scheme::Symmetric;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    *scale = load16(b);
    for (int i = 0; i < 32; ++i) codes[i] = b[2 + i] ^ 0x80;  // int8 q to q + 128
  }
};

struct Q2_K {
  static constexpr int block = 256, bytes = 84, bits = 2, group = 16;
  static constexpr Scheme scheme = Scheme::Affine;
  using Scale = float;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale* offset) {
    const uint8_t* qs = b + 16;
    const float d = load_half(b + 80), dmin = load_half(b + 82);
    for (int g = 0; g < 16; ++g) {
      scale[g] = d * static_cast<float>(b[g] & 15);
      offset[g] = -(dmin * static_cast<float>(b[g] >> 4));
    }
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 4; ++k) {
        // Four neighbours sit in four bytes at the same bit position: gather them into one byte.
        u32x8 v;
        std::memcpy(&v, qs + 32 * half, sizeof v);
        v = (v >> (2 * k)) & 0x03030303u;
        v |= v >> 6;
        const u8x8 out = __builtin_convertvector((v & 0x0f) | ((v >> 12) & 0xf0), u8x8);
        std::memcpy(codes + 32 * half + 8 * k, &out, sizeof out);
      }
    }
  }
};

struct Q3_K {
  static constexpr int block = 256, bytes = 110, bits = 4, group = 16;
  static constexpr Scheme scheme = Scheme::Symmetric;
  using Scale = float;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    const uint8_t *hmask = b, *qs = b + 32, *s = b + 96;
    const float d = load_half(b + 108);
    for (int g = 0; g < 16; ++g) {
      const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4;
      const int high = (s[8 + g % 4] >> (2 * (g / 4))) & 3;
      scale[g] = d * static_cast<float>((low | (high << 4)) - 32);
    }
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 4; ++k) {
        for (int t = 0; t < 16; ++t) {
          // q = low2 - (high ? 0 : 4), so the code q + 8 is low2 + 4 + 4*high.
          const uint32_t low = (load16(qs + 32 * half + 2 * t) >> (2 * k)) & 0x0303u;
          const uint32_t high = (load16(hmask + 2 * t) >> (4 * half + k)) & 0x0101u;
          const uint32_t v = low + 0x0404u + 4 * high;
          codes[64 * half + 16 * k + t] = static_cast<uint8_t>((v & 0x0f) | (v >> 4));
        }
      }
    }
  }
};

struct Q4_K {
  static constexpr int block = 256, bytes = 144, bits = 4, group = 32;
  static constexpr Scheme scheme = Scheme::Affine;
  using Scale = float;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale* offset) {
    unpack_scales_k4(load_half(b), load_half(b + 2), b + 4, scale, offset);
    const uint8_t* qs = b + 16;
    for (int chunk = 0; chunk < 4; ++chunk) {
      for (int t = 0; t < 16; ++t) {
        const uint32_t v = load16(qs + 32 * chunk + 2 * t);
        codes[32 * chunk + t] = static_cast<uint8_t>((v & 0x0f) | ((v >> 4) & 0xf0));
        codes[32 * chunk + 16 + t] = static_cast<uint8_t>(((v >> 4) & 0x0f) | ((v >> 8) & 0xf0));
      }
    }
  }
};

struct Q5_K {
  static constexpr int block = 256, bytes = 176, bits = 8, group = 32;
  static constexpr Scheme scheme = Scheme::Affine;
  using Scale = float;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale* offset) {
    unpack_scales_k4(load_half(b), load_half(b + 2), b + 4, scale, offset);
    const uint8_t *qh = b + 16, *qs = b + 48;
    for (int chunk = 0; chunk < 4; ++chunk) {
      for (int l = 0; l < 32; ++l) {
        const uint8_t q = qs[32 * chunk + l];
        const uint8_t high = qh[l] >> (2 * chunk);
        codes[64 * chunk + l] = static_cast<uint8_t>((q & 0x0f) | ((high & 1) << 4));
        codes[64 * chunk + 32 + l] = static_cast<uint8_t>((q >> 4) | ((high & 2) << 3));
      }
    }
  }
};

struct Q6_K {
  static constexpr int block = 256, bytes = 210, bits = 8, group = 16;
  static constexpr Scheme scheme = Scheme::Symmetric;
  using Scale = float;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    const uint8_t *ql = b, *qh = b + 128, *s = b + 192;
    const float d = load_half(b + 208);
    for (int g = 0; g < 16; ++g) scale[g] = d * static_cast<float>(static_cast<int8_t>(s[g]));
    for (int half = 0; half < 2; ++half) {
      // Copies, so that the compiler knows that the codes do not overlap them.
      uint8_t low[64], high[32];
      std::memcpy(low, ql + 64 * half, sizeof low);
      std::memcpy(high, qh + 32 * half, sizeof high);
      uint8_t* out = codes + 128 * half;
      for (int l = 0; l < 32; ++l) {
        const uint8_t h = high[l];
        // 6-bit value minus 32 plus 128.
        out[l] = static_cast<uint8_t>(((low[l] & 15) | ((h & 3) << 4)) + 96);
        out[32 + l] = static_cast<uint8_t>(((low[32 + l] & 15) | ((h & 0x0c) << 2)) + 96);
        out[64 + l] = static_cast<uint8_t>(((low[l] >> 4) | (h & 0x30)) + 96);
        out[96 + l] = static_cast<uint8_t>(((low[32 + l] >> 4) | ((h & 0xc0) >> 2)) + 96);
      }
    }
  }
};

template <typename Type>
std::tuple<Tensor, Tensor, Tensor> unpack(const char* name, const Tensor& blocks, int64_t rows,
                                          int64_t in_features) {
  MKRS_CHECK(in_features % Type::block == 0, kOp, "in_features must be a multiple of ", Type::block,
             " for ", name, ", got ", in_features);
  const int64_t row_blocks = in_features / Type::block;
  MKRS_CHECK(blocks.size(0) == rows && blocks.size(1) % Type::bytes == 0 &&
                 blocks.size(1) / Type::bytes == row_blocks,
             kOp, "blocks must have shape [", rows, ", ", row_blocks, "*", Type::bytes, "] for ",
             name, ", got ", shape_string(blocks));
  constexpr bool is_float = std::is_same_v<typename Type::Scale, float>;
  constexpr ScalarType scale_type = is_float ? ScalarType::Float : ScalarType::Half;
  constexpr int64_t groups = Type::block / Type::group;
  constexpr int64_t out_bytes = Type::block * Type::bits / 8;
  constexpr bool affine = Type::scheme == Scheme::Affine;

  Tensor codes = empty_on(blocks, {rows, row_blocks * out_bytes}, ScalarType::Byte);
  Tensor scale = empty_on(blocks, {rows, row_blocks * groups}, scale_type);
  Tensor zero = affine ? empty_on(blocks, {rows, row_blocks * groups}, scale_type)
                       : empty_on(blocks, {0}, ScalarType::Byte);
  const int64_t total = rows * row_blocks;
  if (total == 0) return {codes, scale, zero};

  const auto* src = static_cast<const uint8_t*>(blocks.const_data_ptr());
  const int64_t src_stride = rows > 1 ? blocks.stride(0) : 0;
  cpu::prefer_huge_pages(codes.mutable_data_ptr(), codes.numel());
  auto* dst = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* dst_scale = static_cast<typename Type::Scale*>(scale.mutable_data_ptr());
  auto* dst_zero = affine ? static_cast<typename Type::Scale*>(zero.mutable_data_ptr()) : nullptr;
  // Over blocks, not rows: one very long row is split as well. 64 KiB of input a task at least.
  constexpr int64_t grain = 65536 / Type::bytes;
  cpu::parallel_grains(total, grain, [&](int64_t begin, int64_t end) {
    int64_t row = begin / row_blocks, column = begin % row_blocks;
    for (int64_t i = begin; i < end;) {
      const uint8_t* row_src = src + row * src_stride;
      for (; column < row_blocks && i < end; ++column, ++i) {
        Type::unpack(row_src + column * Type::bytes, dst + i * out_bytes, dst_scale + i * groups,
                     affine ? dst_zero + i * groups : nullptr);
      }
      column = 0;
      ++row;
    }
  });
  return {codes, scale, zero};
}

std::tuple<Tensor, Tensor, Tensor> gguf_unpack(Tensor blocks, int64_t ggml_type, int64_t rows,
                                               int64_t in_features) {
  MKRS_CHECK(blocks.scalar_type() == ScalarType::Byte, kOp, "blocks must be uint8, got ",
             dtype_name(blocks.scalar_type()));
  MKRS_CHECK(blocks.dim() == 2, kOp, "blocks must have 2 dimensions [rows, row_bytes], got ",
             shape_string(blocks));
  MKRS_CHECK(rows >= 0, kOp, "rows must not be negative, got ", rows);
  MKRS_CHECK(in_features >= 0, kOp, "in_features must not be negative, got ", in_features);
  if (blocks.size(1) > 1 && blocks.stride(1) != 1) blocks = torch::stable::contiguous(blocks);
  switch (ggml_type) {
    case 2:
      return unpack<Q4_0>("Q4_0", blocks, rows, in_features);
    case 3:
      return unpack<Q4_1>("Q4_1", blocks, rows, in_features);
    case 6:
      return unpack<Q5_0>("Q5_0", blocks, rows, in_features);
    case 7:
      return unpack<Q5_1>("Q5_1", blocks, rows, in_features);
    case 8:
      return unpack<Q8_0>("Q8_0", blocks, rows, in_features);
    case 10:
      return unpack<Q2_K>("Q2_K", blocks, rows, in_features);
    case 11:
      return unpack<Q3_K>("Q3_K", blocks, rows, in_features);
    case 12:
      return unpack<Q4_K>("Q4_K", blocks, rows, in_features);
    case 13:
      return unpack<Q5_K>("Q5_K", blocks, rows, in_features);
    case 14:
      return unpack<Q6_K>("Q6_K", blocks, rows, in_features);
    default:
      fail(kOp,
           "ggml_type must be one of Q4_0 (2), Q4_1 (3), Q5_0 (6), Q5_1 (7), Q8_0 (8), Q2_K "
           "(10), Q3_K (11), Q4_K (12), Q5_K (13), Q6_K (14), got ",
           ggml_type);
  }
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("gguf_unpack", TORCH_BOX(&mkrs::gguf_unpack));
}
