// arm64 with the dot product extension (Cortex-A76, Neoverse N1, Apple M1 and later).
#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/limbs.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace mkrs::cpu::dotprod {
namespace {

#define MKRS_DOT "sdot"
#define MKRS_SIGNED_CODES true
#define MKRS_HAS_NEON 1
#include "cpu/arm_dot.inc"
#include "cpu/convert.inc"
#include "cpu/limb_dot4.inc"
#include "cpu/limb_rows.inc"

// Products by element: a vector of limbs, 4 inputs by 4 activations, with 4 codes of one row.
// 24 accumulators, their limbs and two or three vectors of codes fill the 32 registers; 24 sdot
// need 2 or 3 loads of codes and as many of limbs.
struct T {
  static constexpr int kDepth = 4, kInputs = 4, kCodeRows = 4, kSumRows = 1;
  static constexpr int rows(int limbs) { return limbs == 3 ? 8 : 12; }
  static constexpr int panels(int limbs) { return limbs == 1 ? 2 : 1; }

  static void interleave(const uint8_t (*rows)[limbs::kTileBytes / limbs::kFewTileRows + 64],
                         int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
      uint32x4x4_t words;
      for (int r = 0; r < 4; ++r) words.val[r] = vreinterpretq_u32_u8(vld1q_u8(rows[r] + i));
      vst4q_u32(reinterpret_cast<uint32_t*>(out + 4 * i), words);
    }
  }

  static void dot(V::Int& sum, V::Bytes codes, int row, V::Bytes limb) {
    V::Int total = sum;
    switch (row) {
      case 0:
        asm("sdot %0.4s, %1.16b, %2.4b[0]" : "+w"(total) : "w"(limb), "w"(codes));
        break;
      case 1:
        asm("sdot %0.4s, %1.16b, %2.4b[1]" : "+w"(total) : "w"(limb), "w"(codes));
        break;
      case 2:
        asm("sdot %0.4s, %1.16b, %2.4b[2]" : "+w"(total) : "w"(limb), "w"(codes));
        break;
      default:
        asm("sdot %0.4s, %1.16b, %2.4b[3]" : "+w"(total) : "w"(limb), "w"(codes));
    }
    sum = total;
  }

  template <int SUMS, int VECTORS, int LIMBS>
  static void multiply(const uint8_t* codes, int64_t stride, const V::Bytes (&limb)[LIMBS][VECTORS],
                       V::Int (&acc)[SUMS][VECTORS][LIMBS]) {
    MKRS_UNROLL_ALL for (int c = 0; c < SUMS / 4; ++c) {
      const V::Bytes weights = V::load_bytes(codes + c * stride);
      MKRS_UNROLL_ALL for (int r = 0; r < 4; ++r) {
        MKRS_UNROLL_ALL for (int v = 0; v < VECTORS; ++v) {
          MKRS_UNROLL_ALL for (int l = 0; l < LIMBS; ++l) {
            dot(acc[4 * c + r][v][l], weights, r, limb[l][v]);
          }
        }
      }
    }
  }

  static V::Real row_values(const float* p) { return vdupq_n_f32(*p); }
};

#include "cpu/limb_tiles.inc"

}  // namespace

const limbs::Level level{"dotprod",        rows_inputs,   4,           24,
                         rows_unit_bytes,  rows_prepare,  rows_matmul, tiles_units,
                         tiles_unit_bytes, tiles_prepare, tiles_matmul};

}  // namespace mkrs::cpu::dotprod

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __aarch64__
