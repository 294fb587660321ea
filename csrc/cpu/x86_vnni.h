// AVX-512 VNNI products of packed codes with activations split into limbs: vpdpbusd multiplies
// unsigned codes with signed limbs.
#pragma once

#include "cpu/limbs.h"

#if defined(__clang__)
#define MKRS_PRAGMA(x) _Pragma(#x)
#define MKRS_VNNI_BEGIN                                                                            \
  MKRS_PRAGMA(clang attribute push(                                                                \
      __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), \
      apply_to = function))
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

using limbs::center_of;
using limbs::top_value;

// Rows: x86_vnni_rows.cpp.
int64_t rows_unit_bytes(const QuantizedWeight& w, int limbs, int64_t span);
bool rows_prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                  int64_t end, void* scratch);
void rows_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                 const void* scratch, const void* bias, int64_t begin, int64_t end,
                 const Output& out);

// Tiles: x86_vnni_tiles.cpp.
int64_t tiles_units(int64_t input_rows, int limbs);
int64_t tiles_unit_bytes(const QuantizedWeight& w, int limbs, int64_t span);
bool tiles_prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                   int64_t end, void* scratch);
void tiles_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                  const void* scratch, const void* bias, int64_t begin, int64_t end,
                  const Output& out);

// Switch points measured on Zen 4 with 4 bits, group 64.
inline constexpr limbs::Level level{"avx512_vnni",
                                    [](int, int limbs) -> int64_t { return limbs == 1 ? 7 : 4; },
                                    4,
                                    24,
                                    rows_unit_bytes,
                                    rows_prepare,
                                    rows_matmul,
                                    tiles_units,
                                    tiles_unit_bytes,
                                    tiles_prepare,
                                    tiles_matmul};

}  // namespace mkrs::cpu::vnni
