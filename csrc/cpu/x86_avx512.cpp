// AVX-512 without VNNI (Skylake-X): products through vpmaddubsw and
// vpmaddwd.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/limbs.h"

#if defined(__clang__)
#pragma clang attribute push(                                                         \
    __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
// GCC 12's own intrinsics headers trip these.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace mkrs::cpu::avx512_limbs {
namespace {

#define MKRS_HAS_F16C 1
#define MKRS_HAS_AVX512 1
#include "cpu/convert.inc"
#include "cpu/x86_vectors.inc"

using V = Vector512;

#include "cpu/x86_maddubs.inc"
// After the product that it drives.
#include "cpu/limb_rows.inc"

// Measured on Zen 4, group 64. At 4 and 2 bits two limbs and one beat float products at any size.
int64_t rows_inputs(int bits, int count) {
  if (bits == 8) return count == 3 ? 4 : 16;
  return count == 3 ? 16 : limbs::kAnyInputs;
}

}  // namespace

const limbs::Level level{"avx512",    rows_inputs, 4,       24,      rows_unit_bytes, rows_prepare,
                         rows_matmul, nullptr,     nullptr, nullptr, nullptr};

}  // namespace mkrs::cpu::avx512_limbs

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
