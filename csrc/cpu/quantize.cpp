#include <atomic>

#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t bits, int64_t group_size,
                                            const std::string& scheme_name,
                                            const std::optional<ScalarType>& requested_dtype) {
  const char* op = "quantize";
  const auto [scheme, type, scale_type, scale_dtype, in_features, groups, codes, scale, zero] =
      check_quantize(op, weight, bits, group_size, scheme_name, requested_dtype);

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
             " that overflows ", dtype_name(scale_dtype), "; use scale_dtype=torch.float32");
  return {codes, scale, zero};
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("quantize", TORCH_BOX(&mkrs::quantize));
}
