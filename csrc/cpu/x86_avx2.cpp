// x86 with AVX2 (Haswell, Zen and later): products through vpmaddubsw and vpmaddwd.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/limbs.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

namespace mkrs::cpu::avx2_limbs {
namespace {

#define MKRS_HAS_F16C 1
#include "cpu/convert.inc"
#include "cpu/x86_vectors.inc"

using V = Vector256;

#include "cpu/x86_maddubs.inc"
// After the product that it drives.
#include "cpu/limb_rows.inc"

// Measured on Zen 4, group 64. Two limbs and one beat float products at any size; three have 12
// multiplications for every 8 of float32's at 4 bits, but no tile to make first.
int64_t rows_inputs(int bits, int count) {
  if (bits == 8) return count == 3 ? 8 : count == 2 ? limbs::kAnyInputs : 24;
  return count == 3 ? 16 : limbs::kAnyInputs;
}

}  // namespace

const limbs::Level level{"avx2",      rows_inputs, 4,       24,      rows_unit_bytes, rows_prepare,
                         rows_matmul, nullptr,     nullptr, nullptr, nullptr};

}  // namespace mkrs::cpu::avx2_limbs

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
