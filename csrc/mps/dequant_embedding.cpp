#include "mps/weight.h"

namespace mkrs {
namespace {

// Unlike on the CPU an index cannot be checked without waiting for the GPU: one outside [0, N)
// gives a row of NaN.
Tensor dequant_embedding(const Tensor& indices, const Tensor& codes, const Tensor& scale,
                         const std::optional<Tensor>& zero_point,
                         const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                         int64_t in_features, ScalarType dtype) {
  const char* op = "dequant_embedding";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  MKRS_CHECK(codes.dim() == 2, op, "codes must have 2 dimensions, got ", shape_string(codes));
  const Float type = check_float(op, "dtype", dtype);
  const ScalarType index_type = indices.scalar_type();
  MKRS_CHECK(index_type == ScalarType::Long || index_type == ScalarType::Int, op,
             "indices must be int64 or int32, got ", dtype_name(index_type));
  check_device(op, "indices", indices, codes, "codes");

  std::vector<int64_t> sizes(indices.dim() + 1);
  for (int64_t i = 0; i < indices.dim(); ++i) sizes[i] = indices.size(i);
  sizes.back() = in_features;
  Tensor result = empty_on(codes, sizes, dtype);
  if (result.numel() == 0) return result;
  MKRS_CHECK(w.rows > 0, op, "indices must be in [0, 0), got ", indices.numel(), " of them");
  const Tensor flat = torch::stable::contiguous(indices);
  mps::Launch launch(
      op, mps::kernel(op, "dequant_embedding", "dequant_embedding",
                      {mps::metal_type(type), mps::metal_type(w.scale_type), mps::metal_int(w.bits),
                       mps::metal_scheme(w.scheme), mps::metal_bool(mps::aligned_pieces(weight)),
                       index_type == ScalarType::Long ? "long" : "int"}));
  bind_components(launch, weight).tensor(flat).tensor(result);
  bind_shape(launch, w).run(
      {mps::ceil_div(in_features, mps::kPiece * 64), static_cast<uint64_t>(flat.numel())}, {64});
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("dequant_embedding", TORCH_BOX(&mkrs::dequant_embedding));
}
