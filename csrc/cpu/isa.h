// The CPU kernel table: one row per instruction-set level, one level chosen once per process.
//
// Levels: generic everywhere; avx2, avx512, avx512_vnni on x86-64; neon, dotprod, i8mm on arm64.
// MKRS_CPU_ISA forces a level (tests run all of them on one machine); a level that this processor
// or this build lacks is an error, never a silent fallback.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format.h"

namespace mkrs::cpu {

// Activations as a matrix: `rows` rows of adjacent elements.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t stride = 0;  // elements from row to row
  Float type = Float::F32;
};

// A contiguous result of `rows` rows of `stride` elements.
struct Output {
  void* data = nullptr;
  int64_t stride = 0;
  Float type = Float::F32;
};

enum class Reduction : int { Sum = 0, SumSquares = 1, Amax = 2, Amin = 3, AbsMax = 4 };

// What quantize_rows writes; the strides are those of contiguous tensors.
struct QuantizeTarget {
  uint8_t* codes = nullptr;
  void* scale = nullptr;
  void* zero = nullptr;  // uint8 zero_point, offset in scale's type, or null
  int64_t in_features = 0;
  int64_t group_size = 0;
  int64_t groups = 0;
  int bits = 0;
  Scheme scheme = Scheme::Symmetric;
  Float scale_type = Float::F16;
};

enum class QuantizeStatus : int { Ok = 0, NonFinite = 1, ScaleOverflow = 2 };

// Kernels work on a range of rows (or columns, for matmul_t) so that callers choose the threading.
struct Kernels {
  const char* name;
  // out[r, :] = row rows[r] of w (or row begin + r when rows is null), for r in [0, end - begin).
  void (*dequantize_rows)(const QuantizedWeight& w, const int64_t* rows, int64_t begin, int64_t end,
                          const Output& out);
  // out[m, n] = sum_k x[m, k] w[n, k] + bias[n] for n in [begin, end); bias has out's type.
  void (*matmul)(const QuantizedWeight& w, const Matrix& x, const void* bias, int64_t begin,
                 int64_t end, const Output& out);
  // out[m, k] = sum_n x[m, n] w[n, k] for k in [begin, end); begin is a multiple of kColumnAlign.
  void (*matmul_t)(const QuantizedWeight& w, const Matrix& x, int64_t begin, int64_t end,
                   const Output& out);
  void (*reduce_rows)(const QuantizedWeight& w, Reduction reduction, int64_t begin, int64_t end,
                      float* out);
  // Rows [begin, end) of the weight. On failure *bad_row names the first bad row of the range.
  QuantizeStatus (*quantize_rows)(const Matrix& weight, const QuantizeTarget& target, int64_t begin,
                                  int64_t end, int64_t* bad_row);
};

// Column blocks of matmul_t start at multiples of this: a whole byte of codes at every width.
constexpr int64_t kColumnAlign = 16;

// The table in force. Throws std::runtime_error when MKRS_CPU_ISA asks for what is not there.
const Kernels& kernels();

// Levels that this build has and this processor can run, best last.
std::vector<std::string> available_isas();

}  // namespace mkrs::cpu
