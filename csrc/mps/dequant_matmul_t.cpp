#include "mps/matmul.h"

namespace mkrs {
namespace {

using mps::MatmulRegime;

constexpr int64_t kColumnSimdgroups = 8;  // COLUMN_SIMDGROUPS
constexpr int64_t kColumnSpan = mps::kSimd * mps::kPiece;
constexpr uint64_t kTileThreads = 128;  // GEMM_THREADS

Tensor dequant_matmul_t(const Tensor& input, const Tensor& codes, const Tensor& scale,
                        const std::optional<Tensor>& zero_point,
                        const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                        int64_t in_features) {
  const char* op = "dequant_matmul_t";
  const Float type = check_matmul_input(op, input, codes);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  MKRS_CHECK(input.size(input.dim() - 1) == w.rows, op, "input must have ", w.rows,
             " features (the rows of codes), got ", shape_string(input));

  Tensor result = empty_on(input, sizes_with_last(input, in_features), input.scalar_type());
  if (result.numel() == 0) return result;
  if (w.rows == 0) return torch::stable::zero_(result);
  const mps::InputRows x = mps::input_rows(input);
  const char* activation = mps::metal_type(type);
  const char* scales = mps::metal_type(w.scale_type);
  const char* code_bits = mps::metal_int(w.bits);
  const char* scheme = mps::metal_scheme(w.scheme);
  const char* aligned = mps::metal_bool(mps::aligned_pieces(weight));

  MatmulRegime regime = mps::matmul_regime(x.rows, in_features, w.rows);
  const bool tile = regime.kind == MatmulRegime::Kind::Tile;
  if (!tile) {
    regime.parts =
        mps::parts_for(static_cast<int64_t>(mps::ceil_div(in_features, kColumnSpan)), w.rows);
  }
  const bool split = regime.parts > 1;
  const Tensor partial =
      split ? empty_on(input, {regime.parts, x.rows, in_features}, ScalarType::Float) : result;
  const char* output = split ? "float" : activation;
  if (tile) {
    mps::Launch launch(op, mps::kernel(op, "dequant_matmul_t", "dequant_matmul_t_tile",
                                       {activation, output, scales, code_bits, scheme, aligned,
                                        mps::metal_int(regime.tile_rows)}));
    bind_components(launch, weight).tensor(x.data).tensor(partial);
    bind_shape(launch, w)
        .pair(x.rows, x.stride, "the input's rows and row stride")
        .pair(regime.parts, 0, "parts")
        .run({mps::ceil_div(in_features, mps::kTile), mps::ceil_div(x.rows, regime.tile_rows),
              static_cast<uint64_t>(regime.parts)},
             {kTileThreads});
  } else {
    mps::Launch launch(op, mps::kernel(op, "dequant_matmul_t", "dequant_matmul_t_small",
                                       {activation, output, scales, code_bits, scheme, aligned,
                                        mps::metal_int(x.rows)}));
    bind_components(launch, weight).tensor(x.data).tensor(partial);
    bind_shape(launch, w)
        .pair(x.stride, regime.parts, "the input's row stride")
        .run({mps::ceil_div(in_features, kColumnSpan), static_cast<uint64_t>(regime.parts)},
             {kColumnSimdgroups * mps::kSimd});
  }
  if (split) {
    mps::sum_parts(op, partial, std::nullopt, result, x.rows, in_features, regime.parts, type);
  }
  return result;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, MPS, m) {
  m.impl("dequant_matmul_t", TORCH_BOX(&mkrs::dequant_matmul_t));
}
