#include "mps/weight.h"

namespace mkrs {
namespace {

constexpr int64_t kQuantizeSimdgroups = 4;  // QUANTIZE_SIMDGROUPS
constexpr uint8_t kNonFinite = 1;           // Status of mps_kernels/quantize.metal

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t bits, int64_t group_size,
                                            const std::string& scheme_name,
                                            const std::optional<ScalarType>& requested_dtype) {
  const char* op = "quantize";
  const auto [scheme, type, scale_type, scale_dtype, in_features, groups, codes, scale, zero] =
      check_quantize(op, weight, bits, group_size, scheme_name, requested_dtype);
  if (weight.numel() == 0) return {codes, scale, zero};

  const Tensor flat = has_uniform_rows(weight) ? weight : torch::stable::contiguous(weight);
  const int64_t rows = rows_of(weight);
  const Tensor status = empty_on(weight, {rows}, ScalarType::Byte);
  mps::Launch launch(op, mps::kernel(op, "quantize", "quantize",
                                     {mps::metal_type(type), mps::metal_type(scale_type),
                                      mps::metal_int(bits), mps::metal_scheme(scheme)}));
  launch.tensor(flat)
      .tensor(codes)
      .tensor(scale)
      .tensor(scheme == Scheme::Symmetric ? scale : zero)
      .tensor(status)
      .pair(rows, in_features, "rows and in_features")
      .pair(rows > 1 ? row_stride(flat) : 0, groups == 1 ? 0 : group_size,
            "the weight's row stride")
      .pair(groups, 0, "groups")
      .run({mps::ceil_div(rows, kQuantizeSimdgroups)}, {kQuantizeSimdgroups * mps::kSimd});

  // Bad input must be an error, so this op waits for the GPU; it runs once a weight.
  const Tensor result =
      torch::stable::to(status, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const uint8_t* row_status = static_cast<const uint8_t*>(result.const_data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    MKRS_CHECK(row_status[row] != kNonFinite, op, "weight must be finite, got inf or NaN in row ",
               row);
    MKRS_CHECK(row_status[row] == 0, op,
               "scale and offset must fit scale_dtype, got a group in row ", row,
               " that overflows ", dtype_name(scale_dtype), "; use scale_dtype=torch.float32");
  }
  return {codes, scale, zero};
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("quantize", TORCH_BOX(&mkrs::quantize));
}
