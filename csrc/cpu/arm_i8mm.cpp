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

bool has_tiles(const QuantizedWeight&, int) {
  return false;
}

}  // namespace

const limbs::Level level{
    "i8mm",       4,           8,       4,       24,      has_tiles, rows_unit_bytes,
    rows_prepare, rows_matmul, nullptr, nullptr, nullptr, nullptr};

}  // namespace mkrs::cpu::i8mm

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __aarch64__
