#include "checks.h"
#include "cpu/isa.h"
#include "cpu/matmul.h"

namespace mkrs {
namespace {

cpu::Compute check_compute(const char* op, const std::string& compute) {
  if (compute == "exact") return cpu::Compute::Exact;
  if (compute == "int8") return cpu::Compute::Int8;
  fail(op, "compute must be 'exact' or 'int8', got '", compute, "'");
}

Tensor dequant_matmul(const Tensor& input, const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                      const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                      const std::string& compute) {
  const char* op = "dequant_matmul";
  const Float type = check_matmul_input(op, input, codes);
  const cpu::Compute mode = check_compute(op, compute);
  const int64_t in_features = input.size(input.dim() - 1);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  check_bias(op, bias, input, w.rows);

  Tensor result = empty_on(input, sizes_with_last(input, w.rows), input.scalar_type());
  const Tensor flat = has_uniform_rows(input) ? input : torch::stable::contiguous(input);
  const cpu::Matrix x{flat.const_data_ptr(), rows_of(input), row_stride(flat), type};
  const std::optional<Tensor> dense_bias =
      bias.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  const void* bias_data = dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr;
  const cpu::Output out{result.mutable_data_ptr(), w.rows, type};

  cpu::matmul(w, x, mode, bias_data, out);
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("dequant_matmul", TORCH_BOX(&mkrs::dequant_matmul));
}
