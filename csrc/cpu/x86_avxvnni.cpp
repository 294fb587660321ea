// AVX-VNNI: vpdpbusd on 256-bit vectors without AVX-512 (Alder Lake, Zen 5 and later).
//
// MKRS_AVXVNNI_AS_EVEX builds the same kernels for AVX-512 VL and VNNI, where the instruction has
// another encoding: that is how they are tested on machines that lack AVX-VNNI.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/limbs.h"

#if defined(MKRS_AVXVNNI_AS_EVEX)
#define MKRS_VPDPBUSD "vpdpbusd"
#define MKRS_VECTOR_REGISTER "v"
#if defined(__clang__)
#pragma clang attribute push(                                                  \
    __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512vl,avx512vnni"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512vl,avx512vnni")
#endif
#else
#define MKRS_VPDPBUSD "%{vex%} vpdpbusd"
#define MKRS_VECTOR_REGISTER "x"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,avxvnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avxvnni")
#endif
#endif

namespace mkrs::cpu::avxvnni {
namespace {

#define MKRS_HAS_F16C 1
#include "cpu/convert.inc"
#include "cpu/x86_vectors.inc"

struct V : Vector256 {
  // By name: around its intrinsic GCC copies and spills the accumulators.
  static void dot(Int& sum, Bytes codes, Bytes limb) {
    Int total = sum;
    asm(MKRS_VPDPBUSD " %2, %1, %0"
        : "+" MKRS_VECTOR_REGISTER(total)
        : MKRS_VECTOR_REGISTER(codes), MKRS_VECTOR_REGISTER "m"(limb));
    sum = total;
  }
};

#include "cpu/limb_dot4.inc"
#include "cpu/limb_rows.inc"

// Four codes of one row, broadcast, times 8 inputs by 4 activations. 12 accumulators, their limbs
// and a vector of codes fill the 16 registers.
struct T {
  static constexpr int kDepth = 4, kInputs = 8, kCodeRows = 1, kSumRows = 1;
  static constexpr int rows(int limbs) { return limbs == 3 ? 4 : 6; }
  static constexpr int panels(int limbs) { return limbs == 1 ? 2 : 1; }

  static void interleave(const uint8_t (*rows)[limbs::kTileBytes / limbs::kFewTileRows + 64],
                         int64_t n, uint8_t* out) {
    std::memcpy(out, rows[0], static_cast<size_t>(n));
  }

  template <int SUMS, int VECTORS, int LIMBS>
  static void multiply(const uint8_t* codes, int64_t stride, const V::Bytes (&limb)[LIMBS][VECTORS],
                       V::Int (&acc)[SUMS][VECTORS][LIMBS]) {
    MKRS_UNROLL_ALL for (int u = 0; u < SUMS; ++u) {
      int32_t four;
      std::memcpy(&four, codes + u * stride, 4);
      const V::Bytes weights = _mm256_set1_epi32(four);
      MKRS_UNROLL_ALL for (int v = 0; v < VECTORS; ++v) {
        MKRS_UNROLL_ALL for (int l = 0; l < LIMBS; ++l) V::dot(acc[u][v][l], weights, limb[l][v]);
      }
    }
  }

  static V::Real row_values(const float* p) { return V::broadcast(*p); }
};

#include "cpu/limb_tiles.inc"

// Measured as EVEX on Zen 4 (see above) with 4 bits, group 64.
int64_t rows_inputs(int, int count) {
  return count == 1 ? 8 : 4;
}

}  // namespace

const limbs::Level level{"avxvnni",        rows_inputs,   4,           24,
                         rows_unit_bytes,  rows_prepare,  rows_matmul, tiles_units,
                         tiles_unit_bytes, tiles_prepare, tiles_matmul};

}  // namespace mkrs::cpu::avxvnni

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
