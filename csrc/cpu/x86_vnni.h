// AVX-512 VNNI products of packed codes with activations split into int8 limbs.
//
// An activation x of a span is the fixed-point number v = round(x * top / max|x|); v's balanced
// base-256 digits are its limbs: v = l0*256**(L-1) + ... , each in [-128, 127]. Three limbs carry
// f32 activations (24 bits of the span's largest), two carry f16 and bf16, one is compute="int8".
// vpdpbusd multiplies unsigned codes with signed limbs, so the integer part is exact. Then
//   symmetric   w = scale*(q - c):      -c * sum(v) is added as an integer, nothing cancels
//   others      w = scale*q + shift:    shift * sum(x) per group, as floats
#pragma once

#include "cpu/isa.h"

#if defined(__clang__)
#define MKRS_VNNI_BEGIN                                                                     \
  _Pragma(                                                                                  \
      "clang attribute push(__attribute__((target(\"avx2,fma,f16c,bmi2,avx512f,avx512bw,\"" \
      "\"avx512dq,avx512vl,avx512vnni\"))), apply_to = function)")
#define MKRS_VNNI_END _Pragma("clang attribute pop")
#else
// GCC 12's own intrinsics headers trip the uninitialized warnings.
#define MKRS_VNNI_BEGIN                                                               \
  _Pragma("GCC diagnostic ignored \"-Wuninitialized\"") _Pragma(                      \
      "GCC diagnostic ignored \"-Wmaybe-uninitialized\"") _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni\")")
#define MKRS_VNNI_END _Pragma("GCC pop_options")
#endif

namespace mkrs::cpu::vnni {

// Largest |v| of an activation with so many limbs. Three balanced digits reach 0x7f7f7f; two less
// leaves room for the rounding of x * (top/max).
constexpr float top_value(int limbs) {
  return limbs == 1 ? 127.0f : limbs == 2 ? 32639.0f : 8355709.0f;
}

// What codes are centred on in integers.
constexpr int center_of(const QuantizedWeight& w) {
  return w.scheme == Scheme::Symmetric ? 1 << (w.bits - 1) : 0;
}

// Rows: x86_vnni_rows.cpp.
int64_t rows_unit_bytes(const QuantizedWeight& w, int limbs, int64_t span);
bool rows_prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                  int64_t end, void* scratch);
void rows_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                 const void* scratch, const void* bias, int64_t begin, int64_t end,
                 const Output& out);

// Tiles: x86_vnni_tiles.cpp.
int64_t tiles_units(int64_t input_rows);
int64_t tiles_unit_bytes(const QuantizedWeight& w, int limbs, int64_t span);
bool tiles_prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                   int64_t end, void* scratch);
void tiles_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                  const void* scratch, const void* bias, int64_t begin, int64_t end,
                  const Output& out);

}  // namespace mkrs::cpu::vnni
