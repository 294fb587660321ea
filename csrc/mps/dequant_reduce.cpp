#include "mps/weight.h"

namespace mkrs {
namespace {

const char* check_reduction(const char* op, const std::string& name) {
  if (name == "sum") return "SUM";
  if (name == "sum_squares") return "SUM_SQUARES";
  if (name == "amax") return "AMAX";
  if (name == "amin") return "AMIN";
  if (name == "abs_max") return "ABS_MAX";
  fail(op, "reduction must be 'sum', 'sum_squares', 'amax', 'amin' or 'abs_max', got '", name, "'");
}

Tensor dequant_reduce(const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                      int64_t bits, int64_t group_size, int64_t in_features,
                      const std::string& reduction) {
  const char* op = "dequant_reduce";
  constexpr int64_t kSimdgroups = 4;  // REDUCE_SIMDGROUPS
  const char* kind = check_reduction(op, reduction);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  const bool is_sum = reduction == "sum" || reduction == "sum_squares";
  MKRS_CHECK(is_sum || in_features > 0, op, reduction, " needs in_features of at least 1, got 0");
  std::vector<int64_t> sizes = sizes_with_last(codes, 0);
  sizes.pop_back();
  Tensor result = empty_on(codes, sizes, ScalarType::Float);
  if (result.numel() == 0) return result;
  if (in_features == 0) return torch::stable::zero_(result);
  mps::Launch launch(op, mps::kernel(op, "dequant_reduce", "dequant_reduce",
                                     {mps::metal_type(w.scale_type), mps::metal_int(w.bits),
                                      mps::metal_scheme(w.scheme),
                                      mps::metal_bool(mps::aligned_pieces(weight)), kind}));
  bind_components(launch, weight).tensor(result);
  bind_shape(launch, w).run({mps::ceil_div(w.rows, kSimdgroups)}, {kSimdgroups * mps::kSimd});
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("dequant_reduce", TORCH_BOX(&mkrs::dequant_reduce));
}
