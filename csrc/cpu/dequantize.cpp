#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

// Floor: codes, scales and the output each moved once over the memory bandwidth.
Tensor dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                  int64_t in_features, ScalarType dtype) {
  const char* op = "dequantize";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const Float type = check_float(op, "dtype", dtype);
  Tensor result = empty_on(codes, sizes_with_last(codes, in_features), dtype);
  const cpu::Output out{result.mutable_data_ptr(), in_features, type};
  const QuantizedWeight& w = weight.view;
  cpu::prefer_huge_pages(out.data, w.rows * in_features * float_size(type));
  cpu::parallel_items(w.rows, w.in_features, [&](int64_t begin, int64_t end) {
    cpu::kernels().dequantize_rows(w, nullptr, begin, end, out);
  });
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&mkrs::dequantize));
}
