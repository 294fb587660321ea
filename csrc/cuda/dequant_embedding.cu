// Floor: the gathered rows' codes and scales read once and the output written once.
#include "dequantize_rows.cuh"

namespace mkrs::cuda {
namespace {

// An index out of range traps in the kernel (the host cannot know without a synchronization): the
// error surfaces at the next synchronizing call, as with torch's own indexing.
Tensor dequant_embedding(const Tensor& indices, const Tensor& codes, const Tensor& scale,
                         const std::optional<Tensor>& zero_point,
                         const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                         int64_t in_features, ScalarType dtype) {
  const char* op = "dequant_embedding";
  const Scope scope(op, codes);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  MKRS_CHECK(codes.dim() == 2, op, "codes must have 2 dimensions, got ", shape_string(codes));
  const Float type = check_float(op, "dtype", dtype);
  const ScalarType index_type = indices.scalar_type();
  MKRS_CHECK(index_type == ScalarType::Long || index_type == ScalarType::Int, op,
             "indices must be int64 or int32, got ", dtype_name(index_type));
  check_device(op, "indices", indices, codes, "codes");

  const Tensor flat = torch::stable::contiguous(indices);
  std::vector<int64_t> sizes(indices.dim() + 1);
  for (int64_t i = 0; i < indices.dim(); ++i) sizes[i] = indices.size(i);
  sizes.back() = in_features;
  Tensor result = empty_on(codes, sizes, dtype);
  launch_dequantize_rows(op, weight.view,
                         RowIndex{flat.const_data_ptr(), index_type == ScalarType::Long},
                         flat.numel(), result.mutable_data_ptr(), type, scope.stream());
  return result;
}

}  // namespace
}  // namespace mkrs::cuda

STABLE_TORCH_LIBRARY_IMPL(mkrs, CUDA, m) {
  m.impl("dequant_embedding", TORCH_BOX(&mkrs::cuda::dequant_embedding));
}
