// input [m, K] @ W.T: which kernel serves which shape, and the op itself.
#include "decode.cuh"
#include "dequantize_rows.cuh"
#include "fused.cuh"
#include "stream.cuh"
#include "sum_partials.cuh"

namespace mkrs::cuda {
namespace {

enum class Route {
  Stream,  // stream_kernel.cuh: rings of asynchronous copies feed Hopper's tensor cores
  Decode,  // decode_kernel.cuh, in passes of decode_rows(type) input rows
  Fused,   // fused_kernel.cuh: Hopper's tensor cores on weights dequantized in registers
  Dense,   // dequantize into scratch, then torch's matmul
};

constexpr int64_t kLeastFusedRows = 9;
constexpr int64_t kMostFusedRows = 768;
constexpr int64_t kPassesBeforeDense = 5;
constexpr int64_t kPassesBeforeDenseF32 = 12;

// The one place where regimes meet. Measured on an H100 (docs/performance-cuda.md): a pass of the
// decode kernel costs one reading of the weights, the dense route about nine (4 bits, 16-bit
// scratch written and read once) and more for f32.
Route choose_route(const MatmulCall& call, const DeviceInfo& info) {
  if (call.type != Float::F32 && info.major >= 9 && call.m <= stream_rows(call.w)) {
    return Route::Stream;
  }
  if (call.type != Float::F32 && info.major == 9 && call.m >= kLeastFusedRows) {
    return call.m <= kMostFusedRows ? Route::Fused : Route::Dense;
  }
  const int64_t passes = ceil_div(call.m, decode_rows(call.type));
  return passes <= (call.type == Float::F32 ? kPassesBeforeDenseF32 : kPassesBeforeDense)
             ? Route::Decode
             : Route::Dense;
}

void run_decode(const char* op, const MatmulCall& call, const Scope& scope, const Tensor& like,
                bool* supported) {
  for (int64_t first = 0; first < call.m; first += decode_rows(call.type)) {
    MatmulCall pass = call;
    pass.m = std::min<int64_t>(decode_rows(call.type), call.m - first);
    pass.x = static_cast<const char*>(call.x) + first * call.x_stride * float_size(call.type);
    pass.out = static_cast<char*>(call.out) + first * call.w.rows * float_size(call.type);
    DecodePlan plan;
    *supported = plan_decode(pass, scope.info(), &plan);
    if (!*supported) return;
    std::optional<Tensor> partial;
    if (plan.splits > 1) {
      partial = empty_on(like, {plan.splits, pass.m, call.w.rows}, ScalarType::Float);
      plan.params.partial = static_cast<float*>(partial->mutable_data_ptr());
    }
    if (call.type == Float::F16) {
      launch_decode_f16(op, plan, scope.stream());
    } else {
      launch_decode_bf16(op, plan, scope.stream());
    }
    if (partial.has_value()) {
      launch_sum_partials(op, plan.params.partial, plan.splits, pass.m, call.w.rows, call.bias,
                          pass.out, call.type, scope.stream());
    }
  }
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input),
                                    torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Exact rounding of each weight to the input's dtype, as a dense layer of that dtype has it.
Tensor run_dense(const char* op, const QuantizedWeight& w, const Tensor& input,
                 const std::optional<Tensor>& bias, const Scope& scope) {
  Tensor scratch = empty_on(input, {w.rows, w.in_features}, input.scalar_type());
  launch_dequantize_rows(op, w, RowIndex{}, w.rows, scratch.mutable_data_ptr(),
                         check_float(op, "input", input.scalar_type()), scope.stream());
  return linear(input, scratch, bias);
}

Tensor multiply(const char* op, const Tensor& input, const Tensor& codes, const Tensor& scale,
                const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                const std::string& compute) {
  const Float type = check_matmul_input(op, input, codes);
  MKRS_CHECK(compute == "exact", op, "compute must be 'exact' on CUDA, got '", compute, "'");
  const Scope scope(op, input);
  const int64_t in_features = input.size(input.dim() - 1);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  check_bias(op, bias, input, w.rows);

  const int64_t m = rows_of(input);
  if (m == 0 || w.rows == 0) {
    return empty_on(input, sizes_with_last(input, w.rows), input.scalar_type());
  }
  const Tensor flat = has_uniform_rows(input) ? input : torch::stable::contiguous(input);
  const std::optional<Tensor> dense_bias =
      bias.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  MatmulCall call{w,
                  flat.const_data_ptr(),
                  row_stride(flat),
                  dense_bias.has_value() ? dense_bias->const_data_ptr() : nullptr,
                  nullptr,
                  m,
                  type};
  if (in_features == 0) {  // an empty sum: bias or zero
    Tensor result = empty_on(input, sizes_with_last(input, w.rows), input.scalar_type());
    launch_sum_partials(op, nullptr, 0, m, w.rows, call.bias, result.mutable_data_ptr(), type,
                        scope.stream());
    return result;
  }
  Route route = choose_route(call, scope.info());
  if (route == Route::Stream || route == Route::Fused) {
    Tensor result = empty_on(input, sizes_with_last(input, w.rows), input.scalar_type());
    call.out = result.mutable_data_ptr();
    StreamPlan plan;
    if (route == Route::Stream && plan_stream(call, scope.info(), &plan)) {
      (type == Float::F16 ? launch_stream_f16 : launch_stream_bf16)(op, plan, scope.stream());
      return result;
    }
    if (route == Route::Fused || m >= kLeastFusedRows) {
      const auto run = type == Float::F16 ? run_fused_f16 : run_fused_bf16;
      if (run(op, call, scope.info(), input, scope.stream())) return result;
    }
    // Rows that asynchronous copies cannot take: the same choice as on other devices.
    route = m <= kPassesBeforeDense * decode_rows(type) ? Route::Decode : Route::Dense;
  }
  if (route == Route::Decode) {
    Tensor result = empty_on(input, sizes_with_last(input, w.rows), input.scalar_type());
    call.out = result.mutable_data_ptr();
    bool supported = true;
    run_decode(op, call, scope, input, &supported);
    if (supported) return result;
  }
  return run_dense(op, w, flat, dense_bias, scope);
}

Tensor dequant_matmul(const Tensor& input, const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                      const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                      const std::string& compute) {
  return multiply("dequant_matmul", input, codes, scale, zero_point, offset, bias, bits, group_size,
                  compute);
}

// One launch a weight: on a stream they follow each other without the host.
std::vector<Tensor> dequant_matmul_many(const Tensor& input, const std::vector<Tensor>& codes,
                                        const std::vector<Tensor>& scale,
                                        const std::vector<Tensor>& zero_point,
                                        const std::vector<Tensor>& offset,
                                        const std::vector<Tensor>& bias, int64_t bits,
                                        int64_t group_size, const std::string& compute) {
  const char* op = "dequant_matmul_many";
  const size_t count = codes.size();
  MKRS_CHECK(count > 0, op, "codes must hold at least one weight, got none");
  MKRS_CHECK(scale.size() == count, op, "scale must have ", count, " tensors like codes, got ",
             scale.size());
  const auto check_list = [&](const char* what, const std::vector<Tensor>& list) {
    MKRS_CHECK(list.empty() || list.size() == count, op, what, " must have no or ", count,
               " tensors like codes, got ", list.size());
  };
  check_list("zero_point", zero_point);
  check_list("offset", offset);
  check_list("bias", bias);
  const auto at = [](const std::vector<Tensor>& list, size_t i) {
    return list.empty() ? std::nullopt : std::optional<Tensor>(list[i]);
  };
  std::vector<Tensor> results;
  for (size_t i = 0; i < count; ++i) {
    results.push_back(multiply(op, input, codes[i], scale[i], at(zero_point, i), at(offset, i),
                               at(bias, i), bits, group_size, compute));
  }
  return results;
}

}  // namespace
}  // namespace mkrs::cuda

STABLE_TORCH_LIBRARY_IMPL(mkrs, CUDA, m) {
  m.impl("dequant_matmul", TORCH_BOX(&mkrs::cuda::dequant_matmul));
  m.impl("dequant_matmul_many", TORCH_BOX(&mkrs::cuda::dequant_matmul_many));
}
