#include "gguf_unpack.h"

#include "common.cuh"
#include "gguf_unpack_kernel.cuh"

namespace mkrs::cuda {
namespace {

using namespace gguf_unpacking;

template <typename Type>
void launch(const gguf::Unpacking& call, cudaStream_t stream) {
  using Scale = typename Type::Scale;
  const Rows rows = joined({call.rows, call.row_blocks, call.row_stride}, Type::layout.bytes);
  const int64_t tiles = ceil_div(rows.row_blocks, kTileBlocks<Type>);
  MKRS_CHECK(tiles < (int64_t{1} << 31), gguf::kOp, "a row must have fewer blocks, got ",
             rows.row_blocks);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(std::min<int64_t>(rows.rows, 65535)));
  unpack_kernel<Type>
      <<<grid, kThreads, 0, stream>>>(static_cast<const uint8_t*>(call.blocks.const_data_ptr()),
                                      rows, static_cast<uint4*>(call.codes.mutable_data_ptr()),
                                      static_cast<Scale*>(call.scale.mutable_data_ptr()),
                                      static_cast<Scale*>(call.zero.mutable_data_ptr()));
  check_launch(gguf::kOp);
}

std::tuple<Tensor, Tensor, Tensor> gguf_unpack(const Tensor& blocks, int64_t ggml_type,
                                               int64_t rows, int64_t in_features) {
  const Scope scope(gguf::kOp, blocks);
  return gguf::dispatch(AllTypes{}, blocks, ggml_type, rows, in_features,
                        [&](auto type, const gguf::Unpacking& call) {
                          launch<decltype(type)>(call, scope.stream());
                        });
}

}  // namespace
}  // namespace mkrs::cuda

STABLE_TORCH_LIBRARY_IMPL(mkrs, CUDA, m) {
  m.impl("gguf_unpack", TORCH_BOX(&mkrs::cuda::gguf_unpack));
}
