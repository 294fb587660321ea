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

// The input of one or more products, kept alive while they run.
struct Input {
  Tensor flat;
  cpu::Matrix matrix;
};

Input input_matrix(const Tensor& input, Float type) {
  Tensor flat = has_uniform_rows(input) ? input : torch::stable::contiguous(input);
  const cpu::Matrix matrix{flat.const_data_ptr(), rows_of(input), row_stride(flat), type};
  return {std::move(flat), matrix};
}

Tensor dequant_matmul(const Tensor& input, const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                      const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                      const std::string& compute) {
  const char* op = "dequant_matmul";
  const Float type = check_matmul_input(op, input, codes);
  const cpu::Compute mode = check_compute(op, compute);
  const WeightArgs weight = check_weight(op, codes, scale, zero_point, offset, bits, group_size,
                                         input.size(input.dim() - 1));
  check_bias(op, bias, input, weight.view.rows);

  Tensor result = empty_on(input, sizes_with_last(input, weight.view.rows), input.scalar_type());
  const Input x = input_matrix(input, type);
  const std::optional<Tensor> dense_bias =
      bias.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  const cpu::Product product{&weight.view,
                             dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr,
                             {result.mutable_data_ptr(), weight.view.rows, type}};
  cpu::matmul_many(&product, 1, x.matrix, mode);
  return result;
}

// The i-th of a list that may be empty.
std::optional<Tensor> optional_at(const std::vector<Tensor>& list, size_t i) {
  return list.empty() ? std::nullopt : std::optional<Tensor>(list[i]);
}

std::vector<Tensor> dequant_matmul_many(const Tensor& input, const std::vector<Tensor>& codes,
                                        const std::vector<Tensor>& scale,
                                        const std::vector<Tensor>& zero_point,
                                        const std::vector<Tensor>& offset,
                                        const std::vector<Tensor>& bias, int64_t bits,
                                        int64_t group_size, const std::string& compute) {
  const char* op = "dequant_matmul_many";
  const cpu::Compute mode = check_compute(op, compute);
  const size_t count = codes.size();
  MKRS_CHECK(count > 0, op, "codes must hold at least one weight, got none");
  const auto check_count = [&](const char* what, const std::vector<Tensor>& list, bool optional) {
    MKRS_CHECK(list.size() == count || (optional && list.empty()), op, what, " must have ",
               optional ? "no or " : "", count, " tensors like codes, got ", list.size());
  };
  check_count("scale", scale, false);
  check_count("zero_point", zero_point, true);
  check_count("offset", offset, true);
  check_count("bias", bias, true);

  std::vector<WeightArgs> weights;
  std::vector<Tensor> biases, results;
  std::vector<cpu::Product> products;
  weights.reserve(count);
  Float type = Float::F32;
  for (size_t i = 0; i < count; ++i) {
    type = check_matmul_input(op, input, codes[i]);
    weights.push_back(check_weight(op, codes[i], scale[i], optional_at(zero_point, i),
                                   optional_at(offset, i), bits, group_size,
                                   input.size(input.dim() - 1)));
    const QuantizedWeight& w = weights[i].view;
    const void* bias_data = nullptr;
    if (!bias.empty()) {
      check_bias(op, bias[i], input, w.rows);
      biases.push_back(torch::stable::contiguous(bias[i]));
      bias_data = biases.back().const_data_ptr();
    }
    results.push_back(empty_on(input, sizes_with_last(input, w.rows), input.scalar_type()));
    products.push_back({&w, bias_data, {results[i].mutable_data_ptr(), w.rows, type}});
  }
  const Input x = input_matrix(input, type);
  cpu::matmul_many(products.data(), static_cast<int64_t>(count), x.matrix, mode);
  return results;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("dequant_matmul", TORCH_BOX(&mkrs::dequant_matmul));
  m.impl("dequant_matmul_many", TORCH_BOX(&mkrs::dequant_matmul_many));
}
