// Activations in limbs: the fixed-point form that every integer kernel shares.
//
// An activation x of a span is the fixed-point number v = round(x * top / max|x|); v's balanced
// base-256 digits are its limbs: v = l0*256**(L-1) + ... , each in [-128, 127]. Three limbs carry
// f32 activations (24 bits of the span's largest), two carry f16 and bf16, one is compute="int8".
// Products of codes and limbs are summed as integers, so that part is exact, and the same at every
// level. Then
//   symmetric   w = scale*(q - c):      -c * sum(v) is added as an integer, nothing cancels
//   others      w = scale*q + shift:    shift * sum(x) per group, as floats
#pragma once

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/page_touch.h"

namespace mkrs::cpu::limbs {

// Activations per fixed-point scale in exact mode, where groups are as long.
constexpr int64_t kExactSpan = 64;

// Largest |v| of an activation with so many limbs. Three balanced digits reach 0x7f7f7f; two less
// leaves room for the rounding of x * (top/max).
constexpr float top_value(int limbs) {
  return limbs == 1 ? 127.0f : limbs == 2 ? 32639.0f : 8355709.0f;
}

constexpr int limbs_of(Float type, Compute compute) {
  return compute == Compute::Int8 ? 1 : type == Float::F32 ? 3 : 2;
}

// A single group of any length is cut into spans; others are powers of two of at least 16.
constexpr int64_t span_of(const QuantizedWeight& w, Compute compute) {
  if (compute == Compute::Int8) return int8_span(w.group_size);
  return w.groups == 1 ? kExactSpan : std::min(kExactSpan, w.group_size);
}

// What codes are centred on in integers.
constexpr int center_of(const QuantizedWeight& w) {
  return w.scheme == Scheme::Symmetric ? 1 << (w.bits - 1) : 0;
}

// Sizes of limb_tiles.inc.
constexpr int64_t kMaxTileRows = 96;       // a multiple of every micro-kernel's row count
constexpr int64_t kFewTileRows = 24;       // likewise, for few inputs
constexpr int64_t kFewInputs = 32;         // up to so many rows tiles are long instead of tall
constexpr int64_t kTileBytes = 24 * 1024;  // codes, a byte each: they stay in L1
constexpr int64_t kInputBlock = 256;       // input rows that share a tile: sums stay in L2

constexpr int64_t kAnyInputs = int64_t{1} << 40;

// One level's integer kernels; isa.cpp makes a kernel table of them.
struct Level {
  const char* name;
  // Up to so many input rows take Regime::Rows; more take Regime::Tiles, or floats without tiles.
  int64_t (*rows_inputs)(int bits, int limbs);
  int64_t rows_weight_rows, tiles_weight_rows;  // weight rows in one item of parallel work

  int64_t (*rows_unit_bytes)(const QuantizedWeight& w, int limbs, int64_t span);
  decltype(Kernels::prepare) rows_prepare;
  decltype(Kernels::matmul) rows_matmul;

  int64_t (*tiles_units)(int64_t input_rows, int limbs);  // null: no tiles
  int64_t (*tiles_unit_bytes)(const QuantizedWeight& w, int limbs, int64_t span);
  decltype(Kernels::prepare) tiles_prepare;
  decltype(Kernels::matmul) tiles_matmul;
};

}  // namespace mkrs::cpu::limbs

// The levels, each defined in the file that is named like it.
namespace mkrs::cpu {
#if defined(__x86_64__)
namespace avx2_limbs {
extern const limbs::Level level;
}
namespace avxvnni {
extern const limbs::Level level;
}
namespace avx512_limbs {
extern const limbs::Level level;
}
#elif defined(__aarch64__)
namespace dotprod {
extern const limbs::Level level;
}
namespace i8mm {
extern const limbs::Level level;
}
#endif
}  // namespace mkrs::cpu
