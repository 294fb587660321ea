#include "checks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

// Threads split the columns: every output element is then summed by one thread, in one order.
Tensor dequant_matmul_t(const Tensor& input, const Tensor& codes, const Tensor& scale,
                        const std::optional<Tensor>& zero_point,
                        const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                        int64_t in_features) {
  const char* op = "dequant_matmul_t";
  const Float type = check_matmul_input(op, input, codes);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  MKRS_CHECK(input.size(input.dim() - 1) == w.rows, op, "input must have N = ", w.rows,
             " as its last size, got shape ", shape_string(input));

  Tensor result = empty_on(input, sizes_with_last(input, in_features), input.scalar_type());
  const Tensor flat = has_uniform_rows(input) ? input : torch::stable::contiguous(input);
  const cpu::Matrix x{flat.const_data_ptr(), rows_of(input), row_stride(flat), type};
  const cpu::Output out{result.mutable_data_ptr(), in_features, type};
  if (x.rows == 0) return result;
  const int64_t blocks = (in_features + cpu::kColumnAlign - 1) / cpu::kColumnAlign;
  cpu::parallel_items(blocks, w.rows * cpu::kColumnAlign, [&](int64_t begin, int64_t end) {
    cpu::kernels().matmul_t(w, x, begin * cpu::kColumnAlign,
                            std::min(in_features, end * cpu::kColumnAlign), out);
  });
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("dequant_matmul_t", TORCH_BOX(&mkrs::dequant_matmul_t));
}
