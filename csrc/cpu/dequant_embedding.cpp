#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

// Floor: the gathered rows' codes and scales read once and the output written once.
Tensor dequant_embedding(const Tensor& indices, const Tensor& codes, const Tensor& scale,
                         const std::optional<Tensor>& zero_point,
                         const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                         int64_t in_features, ScalarType dtype) {
  const char* op = "dequant_embedding";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  MKRS_CHECK(codes.dim() == 2, op, "codes must have 2 dimensions, got ", shape_string(codes));
  const Float type = check_float(op, "dtype", dtype);
  const ScalarType index_type = indices.scalar_type();
  MKRS_CHECK(index_type == ScalarType::Long || index_type == ScalarType::Int, op,
             "indices must be int64 or int32, got ", dtype_name(index_type));
  check_device(op, "indices", indices, codes, "codes");

  const Tensor flat = torch::stable::contiguous(indices);
  const int64_t count = flat.numel();
  const QuantizedWeight& w = weight.view;
  // Checked before any thread starts, so that a bad index cannot leave half an output behind.
  std::vector<int64_t> rows(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = index_type == ScalarType::Long
                  ? static_cast<const int64_t*>(flat.const_data_ptr())[i]
                  : static_cast<const int32_t*>(flat.const_data_ptr())[i];
    MKRS_CHECK(rows[i] >= 0 && rows[i] < w.rows, op, "indices must be in [0, ", w.rows, "), got ",
               rows[i], " at position ", i);
  }
  std::vector<int64_t> sizes(indices.dim() + 1);
  for (int64_t i = 0; i < indices.dim(); ++i) sizes[i] = indices.size(i);
  sizes.back() = in_features;
  Tensor result = empty_on(codes, sizes, dtype);
  const cpu::Output out{result.mutable_data_ptr(), in_features, type};
  cpu::prefer_huge_pages(out.data, count * in_features * float_size(type));
  cpu::parallel_items(count, w.in_features, [&](int64_t begin, int64_t end) {
    cpu::kernels().dequantize_rows(w, rows.data(), begin, end, out);
  });
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("dequant_embedding", TORCH_BOX(&mkrs::dequant_embedding));
}
