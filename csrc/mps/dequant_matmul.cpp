#include "mps/matmul.h"

namespace mkrs {
namespace {

using mps::MatmulRegime;

constexpr int64_t kVectorSimdgroups = 2;  // VECTOR_SIMDGROUPS
constexpr int64_t kDecodeRowsEach = 4;    // DECODE_ROWS
constexpr uint64_t kTileThreads = 128;    // GEMM_THREADS

Tensor dequant_matmul(const Tensor& input, const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                      const std::optional<Tensor>& bias, int64_t bits, int64_t group_size,
                      const std::string& compute) {
  const char* op = "dequant_matmul";
  const Float type = check_matmul_input(op, input, codes);
  MKRS_CHECK(compute == "exact", op, "compute must be 'exact' on mps, got '", compute, "'");
  const int64_t in_features = input.size(input.dim() - 1);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  check_bias(op, bias, input, w.rows);

  Tensor result = empty_on(input, sizes_with_last(input, w.rows), input.scalar_type());
  if (result.numel() == 0) return result;
  if (in_features == 0) {
    return bias.has_value() ? torch::stable::copy_(result, *bias) : torch::stable::zero_(result);
  }
  const mps::InputRows x = mps::input_rows(input);
  const std::optional<Tensor> dense_bias =
      bias.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*bias)) : std::nullopt;
  const Tensor& bias_or_any = dense_bias.has_value() ? *dense_bias : x.data;
  const int64_t has_bias = bias.has_value() ? 1 : 0;
  const char* activation = mps::metal_type(type);
  const char* scales = mps::metal_type(w.scale_type);
  const char* code_bits = mps::metal_int(w.bits);
  const char* scheme = mps::metal_scheme(w.scheme);

  const MatmulRegime regime = mps::matmul_regime(x.rows, w.rows, in_features);
  if (regime.kind == MatmulRegime::Kind::Tile) {
    const bool split = regime.parts > 1;
    // Partial sums need a workspace: a block of torch's caching allocator, only for short grids.
    const Tensor partial =
        split ? empty_on(input, {regime.parts, x.rows, w.rows}, ScalarType::Float) : result;
    mps::Launch launch(op, mps::kernel(op, "dequant_matmul", "dequant_matmul_tile",
                                       {activation, split ? "float" : activation, scales, code_bits,
                                        scheme, mps::metal_bool(mps::aligned_pieces(weight)),
                                        mps::metal_int(regime.tile_rows)}));
    bind_components(launch, weight).tensor(x.data).tensor(bias_or_any).tensor(partial);
    bind_shape(launch, w)
        .pair(x.rows, x.stride, "the input's rows and row stride")
        .pair(split ? 0 : has_bias, regime.parts, "parts")
        .run({mps::ceil_div(w.rows, mps::kTile), mps::ceil_div(x.rows, regime.tile_rows),
              static_cast<uint64_t>(regime.parts)},
             {kTileThreads});
    if (split) {
      mps::sum_parts(op, partial, dense_bias, result, x.rows, w.rows, regime.parts, type);
    }
    return result;
  }

  const bool decode = regime.kind == MatmulRegime::Kind::Decode;
  const char* aligned = mps::metal_bool(mps::aligned_blocks(weight));
  const AOTIMetalKernelFunctionHandle function =
      decode
          ? mps::kernel(op, "dequant_matmul", "dequant_matmul_decode",
                        {activation, scales, code_bits, scheme, aligned})
          : mps::kernel(op, "dequant_matmul", "dequant_matmul_small",
                        {activation, scales, code_bits, scheme, aligned, mps::metal_int(x.rows)});
  // As dequant_matmul_small chooses its rows.
  const int64_t rows_each = decode || x.rows <= 4 ? kDecodeRowsEach : 2;
  mps::Launch launch(op, function);
  bind_components(launch, weight).tensor(x.data).tensor(bias_or_any).tensor(result);
  bind_shape(launch, w)
      .pair(has_bias, x.stride, "the input's row stride")
      .run({mps::ceil_div(w.rows, rows_each * kVectorSimdgroups)},
           {kVectorSimdgroups * mps::kSimd});
  return result;
}

// One input, several weights: a kernel call each. They share a command buffer, so what the CPU
// gains by one pass over its threads is not there to gain.
std::vector<Tensor> dequant_matmul_many(const Tensor& input, const std::vector<Tensor>& codes,
                                        const std::vector<Tensor>& scale,
                                        const std::vector<Tensor>& zero_point,
                                        const std::vector<Tensor>& offset,
                                        const std::vector<Tensor>& bias, int64_t bits,
                                        int64_t group_size, const std::string& compute) {
  const char* op = "dequant_matmul_many";
  const auto check_list = [&](const char* what, const std::vector<Tensor>& list, bool optional) {
    MKRS_CHECK(list.size() == codes.size() || (optional && list.empty()), op, what, " must have ",
               optional ? "no or " : "", codes.size(), " tensors like codes, got ", list.size());
  };
  MKRS_CHECK(!codes.empty(), op, "codes must hold at least one weight, got none");
  check_list("scale", scale, false);
  check_list("zero_point", zero_point, true);
  check_list("offset", offset, true);
  check_list("bias", bias, true);
  const auto at = [](const std::vector<Tensor>& list, size_t i) {
    return list.empty() ? std::nullopt : std::optional<Tensor>(list[i]);
  };
  std::vector<Tensor> results;
  results.reserve(codes.size());
  for (size_t i = 0; i < codes.size(); ++i) {
    results.push_back(dequant_matmul(input, codes[i], scale[i], at(zero_point, i), at(offset, i),
                                     at(bias, i), bits, group_size, compute));
  }
  return results;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("dequant_matmul", TORCH_BOX(&mkrs::dequant_matmul));
  m.impl("dequant_matmul_many", TORCH_BOX(&mkrs::dequant_matmul_many));
}
