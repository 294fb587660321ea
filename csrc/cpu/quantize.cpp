#include <atomic>

#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

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

  const Tensor flat = has_uniform_rows(weight) ? weight : torch::stable::contiguous(weight);
  const cpu::Matrix matrix{flat.const_data_ptr(), rows_of(weight), row_stride(flat), type};
  cpu::QuantizeTarget target;
  target.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  target.scale = scale.mutable_data_ptr();
  target.zero = scheme == Scheme::Symmetric ? nullptr : zero.mutable_data_ptr();
  target.in_features = in_features;
  target.group_size = std::max<int64_t>(1, std::min(group_size, in_features));
  target.groups = groups;
  target.bits = static_cast<int>(bits);
  target.scheme = scheme;
  target.scale_type = scale_type;

  cpu::prefer_huge_pages(target.codes, matrix.rows * code_bytes(in_features, bits));
  std::atomic<int> status{0};
  std::atomic<int64_t> row{-1};
  cpu::parallel_items(matrix.rows, in_features, [&](int64_t begin, int64_t end) {
    int64_t bad_row = -1;
    const cpu::QuantizeStatus result =
        cpu::kernels().quantize_rows(matrix, target, begin, end, &bad_row);
    if (result != cpu::QuantizeStatus::Ok) {
      status = static_cast<int>(result);
      row = bad_row;
    }
  });
  MKRS_CHECK(status != static_cast<int>(cpu::QuantizeStatus::NonFinite), op,
             "weight must be finite, got inf or NaN in row ", row.load());
  MKRS_CHECK(status != static_cast<int>(cpu::QuantizeStatus::ScaleOverflow), op,
             "scale and offset must fit scale_dtype, got a group in row ", row.load(),
             " that overflows ", dtype_name(scale_scalar), "; use scale_dtype=torch.float32");
  return {codes, scale, zero};
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("quantize", TORCH_BOX(&mkrs::quantize));
}
