#include "mps/weight.h"

namespace mkrs {
namespace {

void write(const char* op, const WeightArgs& weight, const Tensor& out, Float type) {
  const QuantizedWeight& w = weight.view;
  if (out.numel() == 0) return;
  mps::Launch launch(
      op, mps::kernel(op, "dequantize", "dequantize",
                      {mps::metal_type(type), mps::metal_type(w.scale_type), mps::metal_int(w.bits),
                       mps::metal_scheme(w.scheme), mps::metal_bool(mps::aligned_pieces(weight))}));
  bind_components(launch, weight).tensor(out);
  bind_shape(launch, w).run(
      {mps::ceil_div(w.in_features, mps::kPiece * 64), static_cast<uint64_t>(w.rows)}, {64});
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                  int64_t in_features, ScalarType dtype) {
  const char* op = "dequantize";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const Float type = check_float(op, "dtype", dtype);
  Tensor result = empty_on(codes, sizes_with_last(codes, in_features), dtype);
  write(op, weight, result, type);
  return result;
}

void dequantize_into(const Tensor& codes, const Tensor& scale,
                     const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                     int64_t bits, int64_t group_size, int64_t in_features, Tensor out) {
  const char* op = "dequantize_into";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const Float type = check_out(op, out, codes, in_features);
  // Kernels store vectors of four where rows allow it.
  MKRS_CHECK(out.storage_offset() * float_size(type) % 16 == 0, op,
             "out must begin at a multiple of 16 bytes of its storage on mps, got an offset of ",
             out.storage_offset() * float_size(type));
  write(op, weight, out, type);
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("dequantize", TORCH_BOX(&mkrs::dequantize));
  m.impl("dequantize_into", TORCH_BOX(&mkrs::dequantize_into));
}
