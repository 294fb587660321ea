#include "checks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

cpu::Reduction check_reduction(const char* op, const std::string& name) {
  if (name == "sum") return cpu::Reduction::Sum;
  if (name == "sum_squares") return cpu::Reduction::SumSquares;
  if (name == "amax") return cpu::Reduction::Amax;
  if (name == "amin") return cpu::Reduction::Amin;
  if (name == "abs_max") return cpu::Reduction::AbsMax;
  fail(op, "reduction must be 'sum', 'sum_squares', 'amax', 'amin' or 'abs_max', got '", name, "'");
}

// Floor: codes and scales read once over the memory bandwidth.
Tensor dequant_reduce(const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                      int64_t bits, int64_t group_size, int64_t in_features,
                      const std::string& reduction) {
  const char* op = "dequant_reduce";
  const cpu::Reduction kind = check_reduction(op, reduction);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  const bool is_sum = kind == cpu::Reduction::Sum || kind == cpu::Reduction::SumSquares;
  MKRS_CHECK(is_sum || in_features > 0, op, reduction, " needs in_features of at least 1, got 0");
  std::vector<int64_t> sizes = sizes_with_last(codes, 0);
  sizes.pop_back();
  Tensor result = empty_on(codes, sizes, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  cpu::parallel_items(w.rows, w.in_features, [&](int64_t begin, int64_t end) {
    cpu::kernels().reduce_rows(w, kind, begin, end, out);
  });
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("dequant_reduce", TORCH_BOX(&mkrs::dequant_reduce));
}
