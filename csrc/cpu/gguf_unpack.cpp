// Lossless conversion of GGUF weight blocks into the native components.
//
// Floor: every type is a fixed permutation of bits, so the cost is the bytes read plus the bytes
// written over memory bandwidth, e.g. 0.625 + 0.625 bytes a weight for Q4_1, 0.5625 + 0.75 for Q4_K
// (its scales widen to f32). The inner loops have constant trip counts over 16- and 32-bit lanes,
// so that the compiler's vectors do the work; blocks are loaded by memcpy because a GGUF mapping
// aligns tensors to 32 bytes at best and blocks of 18, 22, 34, 84 ... bytes to nothing.
//
// The layouts are those of ggml's block structs; d, dmin and m are IEEE f16, little endian.
#include "gguf_unpack.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "cpu/huge_pages.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

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

// One struct per GGUF type; unpack() writes the codes, scales and (affine) offsets of a block.
struct Q4_0 {
  static constexpr gguf::Layout layout = gguf::Q4_0;
  using Scale = uint16_t;  // the bits of an f16
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    *scale = load16(b);
    interleave_nibbles(b + 2, codes);
  }
};

struct Q4_1 {
  static constexpr gguf::Layout layout = gguf::Q4_1;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale* offset) {
    *scale = load16(b);
    *offset = load16(b + 2);
    interleave_nibbles(b + 4, codes);
  }
};

struct Q5_0 {
  static constexpr gguf::Layout layout = gguf::Q5_0;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    *scale = load16(b);
    widen_5bit(b + 2, b + 6, 128 - 16, codes);
  }
};

struct Q5_1 {
  static constexpr gguf::Layout layout = gguf::Q5_1;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale* offset) {
    *scale = load16(b);
    *offset = load16(b + 2);
    widen_5bit(b + 4, b + 8, 0, codes);
  }
};

struct Q8_0 {
  static constexpr gguf::Layout layout = gguf::Q8_0;
  using Scale = uint16_t;
  static void unpack(const uint8_t* b, uint8_t* codes, Scale* scale, Scale*) {
    *scale = load16(b);
    for (int i = 0; i < 32; ++i) codes[i] = b[2 + i] ^ 0x80;  // int8 q to q + 128
  }
};

struct Q2_K {
  static constexpr gguf::Layout layout = gguf::Q2_K;
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
  static constexpr gguf::Layout layout = gguf::Q3_K;
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
  static constexpr gguf::Layout layout = gguf::Q4_K;
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
  static constexpr gguf::Layout layout = gguf::Q5_K;
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
  static constexpr gguf::Layout layout = gguf::Q6_K;
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

using AllTypes = gguf::Types<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K>;

template <typename Type>
void unpack(const gguf::Unpacking& call) {
  using Scale = typename Type::Scale;
  constexpr gguf::Layout layout = Type::layout;
  const auto* src = static_cast<const uint8_t*>(call.blocks.const_data_ptr());
  cpu::prefer_huge_pages(call.codes.mutable_data_ptr(), call.codes.numel());
  auto* codes = static_cast<uint8_t*>(call.codes.mutable_data_ptr());
  auto* scale = static_cast<Scale*>(call.scale.mutable_data_ptr());
  auto* zero = layout.affine() ? static_cast<Scale*>(call.zero.mutable_data_ptr()) : nullptr;
  // Over blocks, not rows: one very long row is split as well. 64 KiB of input a task at least.
  constexpr int64_t grain = 65536 / layout.bytes;
  cpu::parallel_grains(call.count(), grain, [&](int64_t begin, int64_t end) {
    int64_t row = begin / call.row_blocks, column = begin % call.row_blocks;
    for (int64_t i = begin; i < end;) {
      const uint8_t* row_src = src + row * call.row_stride;
      for (; column < call.row_blocks && i < end; ++column, ++i) {
        Type::unpack(row_src + column * layout.bytes, codes + i * layout.codes(),
                     scale + i * layout.groups(),
                     layout.affine() ? zero + i * layout.groups() : nullptr);
      }
      column = 0;
      ++row;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> gguf_unpack(const Tensor& blocks, int64_t ggml_type,
                                               int64_t rows, int64_t in_features) {
  return gguf::dispatch(
      AllTypes{}, blocks, ggml_type, rows, in_features,
      [](auto type, const gguf::Unpacking& call) { unpack<decltype(type)>(call); });
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("gguf_unpack", TORCH_BOX(&mkrs::gguf_unpack));
}
