// arm64 with the int8 matrix product extension (Neoverse V1, N2, Apple M2 and later).
#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/limbs.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+i8mm")
#endif

namespace mkrs::cpu::i8mm {
namespace {

#define MKRS_DOT "usdot"
#define MKRS_SIGNED_CODES false
#define MKRS_HAS_NEON 1
#include "cpu/arm_dot.inc"
#include "cpu/convert.inc"
#include "cpu/limb_dot4.inc"
#include "cpu/limb_rows.inc"

// Matrix products: 2 rows by 8 codes times 2 inputs by 8 activations, 32 multiply-adds in one
// usmmla. 24 accumulators of 2 by 2, their limbs and a vector of codes fill the registers.
struct T {
  static constexpr int kDepth = 8, kInputs = 2, kCodeRows = 2, kSumRows = 2;
  static constexpr int rows(int limbs) { return limbs == 3 ? 8 : 12; }
  static constexpr int panels(int limbs) { return limbs == 1 ? 4 : 2; }

  static void interleave(const uint8_t (*rows)[limbs::kTileBytes / limbs::kFewTileRows + 64],
                         int64_t n, uint8_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
      const uint64x2_t a = vreinterpretq_u64_u8(vld1q_u8(rows[0] + i));
      const uint64x2_t b = vreinterpretq_u64_u8(vld1q_u8(rows[1] + i));
      vst1q_u8(out + 2 * i, vreinterpretq_u8_u64(vzip1q_u64(a, b)));
      vst1q_u8(out + 2 * i + 16, vreinterpretq_u8_u64(vzip2q_u64(a, b)));
    }
  }

  template <int SUMS, int VECTORS, int LIMBS>
  static void multiply(const uint8_t* codes, int64_t stride, const V::Bytes (&limb)[LIMBS][VECTORS],
                       V::Int (&acc)[SUMS][VECTORS][LIMBS]) {
    MKRS_UNROLL_ALL for (int u = 0; u < SUMS; ++u) {
      const V::Bytes weights = V::load_bytes(codes + u * stride);
      MKRS_UNROLL_ALL for (int v = 0; v < VECTORS; ++v) {
        MKRS_UNROLL_ALL for (int l = 0; l < LIMBS; ++l) {
          V::Int total = acc[u][v][l];
          asm("usmmla %0.4s, %1.16b, %2.16b" : "+w"(total) : "w"(weights), "w"(limb[l][v]));
          acc[u][v][l] = total;
        }
      }
    }
  }

  // Two rows' values, each for two inputs.
  static V::Real row_values(const float* p) {
    const float32x2_t two = vld1_f32(p);
    return vcombine_f32(vdup_lane_f32(two, 0), vdup_lane_f32(two, 1));
  }
};

#include "cpu/limb_tiles.inc"

}  // namespace

const limbs::Level level{"i8mm",           rows_inputs,   4,           24,
                         rows_unit_bytes,  rows_prepare,  rows_matmul, tiles_units,
                         tiles_unit_bytes, tiles_prepare, tiles_matmul};

}  // namespace mkrs::cpu::i8mm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __aarch64__
