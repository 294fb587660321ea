// The storage format, version 1: the one definition that every backend and every file shares.
// docs/format.md describes it for people who write readers.
//
// A weight of logical shape [..., N, K] is stored as
//   codes  uint8          [..., N, ceil(K*bits/8)]      packed along K, lowest bits first
//   scale  f16|bf16|f32   [..., N, ceil(K/group_size)]  may be negative
//   zero   one of: nothing (symmetric), uint8 zero_point (asymmetric), offset like scale (affine)
// Rows are independent and groups never cross rows; the last group of a row may be short.
#pragma once

#include <cstdint>

namespace mkrs {

constexpr int64_t kFormatVersion = 1;

enum class Scheme : int {
  Symmetric = 0,   // w = scale * (q - 2**(bits-1))
  Asymmetric = 1,  // w = scale * (q - zero_point)
  Affine = 2,      // w = scale * q + offset
};

// Element types of activations, outputs, scales and offsets.
enum class Float : int { F32 = 0, F16 = 1, BF16 = 2 };

constexpr int64_t float_size(Float type) {
  return type == Float::F32 ? 4 : 2;
}

constexpr bool valid_bits(int64_t bits) {
  return bits == 8 || bits == 4 || bits == 2;
}

// A power of two from 16 to 256, or anything that covers the whole row ("per row").
constexpr bool valid_group_size(int64_t group_size, int64_t in_features) {
  return group_size == 16 || group_size == 32 || group_size == 64 || group_size == 128 ||
         group_size == 256 || (group_size >= in_features && group_size > 0);
}

constexpr int64_t code_bytes(int64_t in_features, int64_t bits) {
  return (in_features * bits + 7) / 8;
}

constexpr int64_t num_groups(int64_t in_features, int64_t group_size) {
  // Not (K + g - 1) / g: a per-row group_size may be close to the largest int64.
  return in_features / group_size + (in_features % group_size != 0);
}

// A weight as kernels see it: `rows` rows of `in_features` elements. Rows may be a view into a
// wider matrix, so every component has a row stride of its own; elements within a row are adjacent.
struct QuantizedWeight {
  const uint8_t* codes = nullptr;
  const void* scale = nullptr;
  const void* zero = nullptr;  // zero_point, offset or null, as `scheme` says
  int64_t codes_stride = 0;    // bytes from row to row
  int64_t scale_stride = 0;    // elements from row to row
  int64_t zero_stride = 0;     // elements from row to row
  int64_t rows = 0;
  int64_t in_features = 0;
  int64_t group_size = 0;  // at most in_features
  int64_t groups = 0;      // per row
  int bits = 0;
  Scheme scheme = Scheme::Symmetric;
  Float scale_type = Float::F32;
};

}  // namespace mkrs
