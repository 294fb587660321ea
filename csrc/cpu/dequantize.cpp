#include "checks.h"
#include "cpu/huge_pages.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

// From here on a result is larger than what last caches keep for a core: 11008 x 4096 floats took
// 7.2 ms through the caches and 6.6 past them. Results of 16 bits gain nothing.
constexpr int64_t kPastCache = int64_t{32} << 20;

// Floor: codes, scales and the output each moved once over the memory bandwidth.
void write(const QuantizedWeight& w, const cpu::Output& out) {
  cpu::parallel_items(w.rows, w.in_features, [&](int64_t begin, int64_t end) {
    cpu::kernels().dequantize_rows(w, nullptr, begin, end, out);
  });
}

Tensor dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                  int64_t in_features, ScalarType dtype) {
  const char* op = "dequantize";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const Float type = check_float(op, "dtype", dtype);
  Tensor result = empty_on(codes, sizes_with_last(codes, in_features), dtype);
  cpu::prefer_huge_pages(result.mutable_data_ptr(), result.numel() * float_size(type));
  write(weight.view, {result.mutable_data_ptr(), in_features, type, false});
  return result;
}

void dequantize_into(const Tensor& codes, const Tensor& scale,
                     const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                     int64_t bits, int64_t group_size, int64_t in_features, Tensor out) {
  const char* op = "dequantize_into";
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const Float type = check_out(op, out, codes, in_features);
  // Fresh memory is another matter: the system has just cleared it, through the caches.
  const bool past_cache = type == Float::F32 && out.numel() * 4 >= kPastCache;
  write(weight.view, {out.mutable_data_ptr(), in_features, type, past_cache});
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&mkrs::dequantize));
  m.impl("dequantize_into", TORCH_BOX(&mkrs::dequantize_into));
}
