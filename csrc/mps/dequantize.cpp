#include "mps/weight.h"

namespace mkrs {
namespace {

Tensor dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                  int64_t in_features, ScalarType dtype) {
  const char* op = "dequantize";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  const Float type = check_float(op, "dtype", dtype);
  Tensor result = empty_on(codes, sizes_with_last(codes, in_features), dtype);
  if (result.numel() == 0) return result;
  mps::Launch launch(
      op, mps::kernel(op, "dequantize", "dequantize",
                      {mps::metal_type(type), mps::metal_type(w.scale_type), mps::metal_int(w.bits),
                       mps::metal_scheme(w.scheme), mps::metal_bool(mps::aligned_pieces(weight))}));
  bind_components(launch, weight).tensor(result);
  bind_shape(launch, w).run(
      {mps::ceil_div(in_features, mps::kPiece * 64), static_cast<uint64_t>(w.rows)}, {64});
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("dequantize", TORCH_BOX(&mkrs::dequantize));
}
