// Checks of op arguments, shared by all backends. Messages read
// "mkrs::<op>: <requirement>, got <value>".
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "format.h"

namespace mkrs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
[[noreturn]] inline void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "mkrs::" << op << ": ";
  ((message << args), ...);
  throw std::runtime_error(message.str());
}

// The message is only built when the check fails.
#define MKRS_CHECK(cond, op, ...)       \
  do {                                  \
    if (__builtin_expect(!(cond), 0)) { \
      ::mkrs::fail(op, __VA_ARGS__);    \
    }                                   \
  } while (false)

inline std::string shape_string(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline Float check_float(const char* op, const char* what, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Float::F32;
    case ScalarType::Half:
      return Float::F16;
    case ScalarType::BFloat16:
      return Float::BF16;
    default:
      fail(op, what, " must be float32, float16 or bfloat16, got ", dtype_name(type));
  }
}

inline ScalarType scalar_type(Float type) {
  return type == Float::F32   ? ScalarType::Float
         : type == Float::F16 ? ScalarType::Half
                              : ScalarType::BFloat16;
}

inline Scheme check_scheme(const char* op, const std::string& scheme) {
  if (scheme == "symmetric") return Scheme::Symmetric;
  if (scheme == "asymmetric") return Scheme::Asymmetric;
  if (scheme == "affine") return Scheme::Affine;
  fail(op, "scheme must be 'symmetric', 'asymmetric' or 'affine', got '", scheme, "'");
}

inline void check_bits(const char* op, int64_t bits) {
  MKRS_CHECK(valid_bits(bits), op, "bits must be 8, 4 or 2, got ", bits);
}

inline void check_group_size(const char* op, int64_t group_size, int64_t in_features) {
  MKRS_CHECK(valid_group_size(group_size, in_features), op,
             "group_size must be 16, 32, 64, 128, 256 or at least in_features (", in_features,
             "), got ", group_size);
}

inline void check_device(const char* op, const char* what, const Tensor& t, const Tensor& like,
                         const char* like_name) {
  MKRS_CHECK(t.device() == like.device(), op, what, " must be on the device of ", like_name,
             ", got a tensor on another device");
}

// The rows of a component as one matrix: adjacent elements, one stride for all leading dimensions.
inline bool has_uniform_rows(const Tensor& t) {
  const int64_t dim = t.dim();
  if (t.size(dim - 1) > 1 && t.stride(dim - 1) != 1) return false;
  for (int64_t i = 0; i + 2 < dim; ++i) {
    if (t.size(i) > 1 && t.stride(i) != t.stride(i + 1) * t.size(i + 1)) return false;
  }
  return true;
}

// Row stride in elements. A row stride is only meaningful with more than one row.
inline int64_t row_stride(const Tensor& t) {
  const int64_t dim = t.dim();
  return dim >= 2 ? t.stride(dim - 2) : t.size(dim - 1);
}

// The number of rows of `t` seen as a matrix.
inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// Whether `t` has a row of `columns` elements for each row of `codes`, in the same leading shape.
inline bool has_rows_of(const Tensor& codes, const Tensor& t, int64_t columns) {
  const int64_t dim = codes.dim();
  bool same = t.dim() == dim && t.size(dim - 1) == columns;
  for (int64_t i = 0; same && i + 1 < dim; ++i) same = t.size(i) == codes.size(i);
  return same;
}

// The components of one weight, made fit for kernels (copied only when a component's rows do not
// have one stride), with the view onto them. Keep it alive while a kernel runs.
struct WeightArgs {
  Tensor codes;
  Tensor scale;
  std::optional<Tensor> zero;
  QuantizedWeight view;
};

inline WeightArgs check_weight(const char* op, const Tensor& codes, const Tensor& scale,
                               const std::optional<Tensor>& zero_point,
                               const std::optional<Tensor>& offset, int64_t bits,
                               int64_t group_size, int64_t in_features) {
  check_bits(op, bits);
  MKRS_CHECK(in_features >= 0, op, "in_features must not be negative, got ", in_features);
  check_group_size(op, group_size, in_features);
  MKRS_CHECK(codes.scalar_type() == ScalarType::Byte, op, "codes must be uint8, got ",
             dtype_name(codes.scalar_type()));
  const int64_t dim = codes.dim();
  MKRS_CHECK(dim >= 2, op, "codes must have at least 2 dimensions [..., N, bytes], got ",
             shape_string(codes));
  MKRS_CHECK(codes.size(dim - 1) == code_bytes(in_features, bits), op, "codes must have ",
             code_bytes(in_features, bits), " bytes a row for in_features ", in_features, " at ",
             bits, " bits, got shape ", shape_string(codes));

  QuantizedWeight w;
  w.bits = static_cast<int>(bits);
  w.in_features = in_features;
  w.groups = num_groups(in_features, group_size);
  // A group longer than the row is the row: kernels then never overflow on group_size.
  w.group_size = group_size < in_features ? group_size : (in_features > 0 ? in_features : 1);
  w.scale_type = check_float(op, "scale", scale.scalar_type());
  w.rows = rows_of(codes);

  const auto check_groups = [&](const char* what, const Tensor& t) {
    MKRS_CHECK(has_rows_of(codes, t, w.groups), op, what, " must have the leading shape of codes ",
               shape_string(codes), " and ", w.groups, " groups a row, got ", shape_string(t));
    check_device(op, what, t, codes, "codes");
  };
  check_groups("scale", scale);
  MKRS_CHECK(!(zero_point.has_value() && offset.has_value()), op,
             "zero_point and offset must not both be given, got both");

  const auto as_rows = [](const Tensor& t) {
    return has_uniform_rows(t) ? t : torch::stable::contiguous(t);
  };
  WeightArgs args{as_rows(codes), as_rows(scale), std::nullopt, w};
  if (zero_point.has_value()) {
    check_groups("zero_point", *zero_point);
    MKRS_CHECK(zero_point->scalar_type() == ScalarType::Byte, op, "zero_point must be uint8, got ",
               dtype_name(zero_point->scalar_type()));
    args.view.scheme = Scheme::Asymmetric;
    args.zero = as_rows(*zero_point);
  } else if (offset.has_value()) {
    check_groups("offset", *offset);
    MKRS_CHECK(offset->scalar_type() == scale.scalar_type(), op, "offset must have scale's dtype ",
               dtype_name(scale.scalar_type()), ", got ", dtype_name(offset->scalar_type()));
    args.view.scheme = Scheme::Affine;
    args.zero = as_rows(*offset);
  }
  args.view.codes = static_cast<const uint8_t*>(args.codes.const_data_ptr());
  args.view.scale = args.scale.const_data_ptr();
  args.view.codes_stride = row_stride(args.codes);
  args.view.scale_stride = row_stride(args.scale);
  if (args.zero.has_value()) {
    args.view.zero = args.zero->const_data_ptr();
    args.view.zero_stride = row_stride(*args.zero);
  }
  return args;
}

// input of dequant_matmul and dequant_matmul_t: [..., features], on the device of 2-D codes.
inline Float check_matmul_input(const char* op, const Tensor& input, const Tensor& codes) {
  const Float type = check_float(op, "input", input.scalar_type());
  MKRS_CHECK(input.dim() >= 1, op, "input must have at least 1 dimension, got a scalar");
  MKRS_CHECK(codes.dim() == 2, op, "codes must have 2 dimensions, got ", shape_string(codes));
  check_device(op, "codes", codes, input, "input");
  return type;
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& input,
                       int64_t out_features) {
  if (!bias.has_value()) return;
  MKRS_CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, "bias must have shape [",
             out_features, "], got ", shape_string(*bias));
  MKRS_CHECK(bias->scalar_type() == input.scalar_type(), op, "bias must have input's dtype ",
             dtype_name(input.scalar_type()), ", got ", dtype_name(bias->scalar_type()));
  check_device(op, "bias", *bias, input, "input");
}

// The sizes of `t` with the last one replaced.
inline std::vector<int64_t> sizes_with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  sizes.back() = last;
  return sizes;
}

// An uninitialized tensor on the device of `like`.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), type);
}

// An output that the caller gives: contiguous, [..., N, in_features] beside codes [..., N, bytes].
inline Float check_out(const char* op, const Tensor& out, const Tensor& codes,
                       int64_t in_features) {
  check_device(op, "out", out, codes, "codes");
  MKRS_CHECK(has_rows_of(codes, out, in_features), op,
             "out must have the shape of codes with in_features (", in_features, ") columns, got ",
             shape_string(out), " for codes ", shape_string(codes));
  MKRS_CHECK(out.is_contiguous(), op, "out must be contiguous, got strides of another kind");
  return check_float(op, "out", out.scalar_type());
}

// The arguments of `quantize`, checked, with its uninitialized outputs on the weight's device.
struct QuantizeArgs {
  Scheme scheme;
  Float type;        // of the weight
  Float scale_type;  // of scale and offset
  ScalarType scale_dtype;
  int64_t in_features;
  int64_t groups;  // per row
  Tensor codes;
  Tensor scale;
  Tensor zero;  // empty for symmetric
};

inline QuantizeArgs check_quantize(const char* op, const Tensor& weight, int64_t bits,
                                   int64_t group_size, const std::string& scheme_name,
                                   const std::optional<ScalarType>& scale_dtype) {
  check_bits(op, bits);
  const Scheme scheme = check_scheme(op, scheme_name);
  const Float type = check_float(op, "weight", weight.scalar_type());
  const int64_t dim = weight.dim();
  MKRS_CHECK(dim >= 2, op, "weight must have at least 2 dimensions [..., N, K], got ",
             shape_string(weight));
  const int64_t in_features = weight.size(dim - 1);
  check_group_size(op, group_size, in_features);
  // float16 would overflow where bfloat16 weights do not.
  const ScalarType scale_scalar =
      scale_dtype.value_or(type == Float::BF16 ? ScalarType::BFloat16 : ScalarType::Half);
  const Float scale_type = check_float(op, "scale_dtype", scale_scalar);

  const int64_t groups = num_groups(in_features, group_size);
  const std::vector<int64_t> group_sizes = sizes_with_last(weight, groups);
  Tensor codes =
      empty_on(weight, sizes_with_last(weight, code_bytes(in_features, bits)), ScalarType::Byte);
  Tensor scale = empty_on(weight, group_sizes, scale_scalar);
  Tensor zero = scheme == Scheme::Symmetric    ? empty_on(weight, {0}, ScalarType::Byte)
                : scheme == Scheme::Asymmetric ? empty_on(weight, group_sizes, ScalarType::Byte)
                                               : empty_on(weight, group_sizes, scale_scalar);
  return {scheme,         type,   scale_type,       scale_scalar,
          in_features,    groups, std::move(codes), std::move(scale),
          std::move(zero)};
}

}  // namespace mkrs
