#include "mps/weight.h"

namespace mkrs {
namespace {

constexpr int64_t kQuantizeSimdgroups = 4;  // QUANTIZE_SIMDGROUPS
constexpr uint8_t kNonFinite = 1;           // Status of mps_kernels/quantize.metal

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t bits, int64_t group_size,
                                            const std::string& scheme_name,
                                            const std::optional<ScalarType>& scale_dtype) {
  const char* op = "quantize";
  check_bits(op, bits);
  const Scheme scheme = check_scheme(op, scheme_name);
  const Float type = check_float(op, "weight", weight.scalar_type());
  const int64_t dim = weight.dim();
  MKRS_CHECK(dim >= 2, op, "weight must have at least 2 dimensions [..., N, K], got ",
             shape_string(weight));
  const int64_t in_features = weight.size(dim - 1);
  check_group_size(op, group_size, in_features);
  const ScalarType scale_scalar =
      scale_dtype.value_or(type == Float::BF16 ? ScalarType::BFloat16 : ScalarType::Half);
  const Float scale_type = check_float(op, "scale_dtype", scale_scalar);

  const int64_t groups = num_groups(in_features, group_size);
  Tensor codes =
      empty_on(weight, sizes_with_last(weight, code_bytes(in_features, bits)), ScalarType::Byte);
  const std::vector<int64_t> group_sizes = sizes_with_last(weight, groups);
  Tensor scale = empty_on(weight, group_sizes, scale_scalar);
  Tensor zero = scheme == Scheme::Symmetric    ? empty_on(weight, {0}, ScalarType::Byte)
                : scheme == Scheme::Asymmetric ? empty_on(weight, group_sizes, ScalarType::Byte)
                                               : empty_on(weight, group_sizes, scale_scalar);
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
               " that overflows ", dtype_name(scale_scalar), "; use scale_dtype=torch.float32");
  }
  return {codes, scale, zero};
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("quantize", TORCH_BOX(&mkrs::quantize));
}
