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
  bool past_cache = false;  // too large to be found in a cache later; only dequantize_rows asks
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

// How activations enter a product.
//   Exact: at the precision of their dtype, accumulated in f32.
//   Int8:  rounded to 8-bit integers that share one f32 scale per int8_span(group_size) activations
//          (scale = max|x|/127, round to nearest even); the rounded activations' product is exact.
enum class Compute : int { Exact = 0, Int8 = 1 };

constexpr int64_t int8_span(int64_t group_size) {
  return group_size == 16 ? 16 : 32;
}

// Spans whose largest magnitude is nonzero but below this have no fixed-point form: scales derived
// from them would approach the subnormals.
constexpr float kSmallestSpan = 0x1p-80f;

// The way a product is computed, chosen once per call by the level's `plan`.
//   Float: weights become f32 in cache; any level, any activations.
//   Rows:  few input rows: dot products along k of packed codes with activations split into limbs.
//   Tiles: many input rows: codes are unpacked once per tile, lanes run over input rows.
enum class Regime : int { Float = 0, Rows = 1, Tiles = 2 };

struct MatmulPlan {
  Regime regime = Regime::Float;
  int limbs = 0;             // int8 digits of one activation (Rows, Tiles)
  int64_t span = 0;          // activations that share one fixed-point scale
  int64_t units = 0;         // pieces of the input that `prepare` works on; 0: nothing to prepare
  int64_t unit_rows = 1;     // input rows of a unit, a divisor of kInputAlign
  int64_t unit_bytes = 0;    // bytes of scratch per unit, a multiple of 64
  int64_t weight_rows = 16;  // rows of the weight in one item of parallel work
};

// Kernels work on a range of rows (or columns, for matmul_t) so that callers choose the threading.
struct Kernels {
  const char* name;
  // out[r, :] = row rows[r] of w (or row r when rows is null), for r in [begin, end).
  void (*dequantize_rows)(const QuantizedWeight& w, const int64_t* rows, int64_t begin, int64_t end,
                          const Output& out);
  MatmulPlan (*plan)(const QuantizedWeight& w, const Matrix& x, Compute compute);
  // Writes units [begin, end) of the prepared input to scratch (64-byte aligned). False if an
  // activation has no fixed-point form (inf, NaN, a span of tiny values): the caller then takes
  // the default plan, which is Regime::Float on the activations as they are.
  bool (*prepare)(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                  int64_t end, void* scratch);
  // out[m, n] = sum_k x[m, k] w[n, k] + bias[n] for n in [begin, end); bias has out's type.
  void (*matmul)(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                 const void* scratch, const void* bias, int64_t begin, int64_t end,
                 const Output& out);
  // out[m, k] = sum_n x[m, n] w[n, k] for k in [begin, end); begin is a multiple of kColumnAlign.
  void (*matmul_t)(const QuantizedWeight& w, const Matrix& x, int64_t begin, int64_t end,
                   const Output& out);
  void (*reduce_rows)(const QuantizedWeight& w, Reduction reduction, int64_t begin, int64_t end,
                      float* out);
  // Rows [begin, end) of the weight. On failure *bad_row names the first bad row of the range.
  QuantizeStatus (*quantize_rows)(const Matrix& weight, const QuantizeTarget& target, int64_t begin,
                                  int64_t end, int64_t* bad_row);
};

// Input rows that a product is given apart from others start at multiples of this.
constexpr int64_t kInputAlign = 64;

// Column blocks of matmul_t start at multiples of this: whole strips of the widest kernel,
// whole bytes at every width.
constexpr int64_t kColumnAlign = 64;

// The table in force. Throws std::runtime_error when MKRS_CPU_ISA asks for what is not there.
const Kernels& kernels();

// The table of one level, for tests that compare levels. Throws where it does not run.
const Kernels& kernels_of(const std::string& name);

// The switch points of the level in force at 4 bits, by name.
struct Threshold {
  const char* name;
  int64_t value;
};
std::vector<Threshold> thresholds();

// Levels that this build has and this processor can run, best last.
std::vector<std::string> available_isas();

}  // namespace mkrs::cpu
