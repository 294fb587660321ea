// The kernel of gguf_unpack as a function of a shared library.
#include "cuda/gguf_unpack_kernel.cuh"

namespace {

using namespace mkrs::cuda::gguf_unpacking;

template <typename Type>
void unpack(const uint8_t* blocks, const Rows& in, unsigned row_steps, bool descending, void* codes,
            void* scale, void* zero) {
  using Scale = typename Type::Scale;
  const Rows rows = joined(in, Type::layout.bytes);
  constexpr int kTile = kTileBlocks<Type>;
  dim3 grid;
  grid.x = static_cast<unsigned>((rows.row_blocks + kTile - 1) / kTile);
  grid.y = static_cast<unsigned>(std::min<int64_t>(rows.rows, row_steps));
  host::launch(grid, kThreads, descending, [&] {
    unpack_kernel<Type>(blocks, rows, static_cast<uint4*>(codes), static_cast<Scale*>(scale),
                        static_cast<Scale*>(zero));
  });
}

}  // namespace

// `row_steps` is the most rows of a grid: with fewer than there are, blocks walk over several.
extern "C" bool gguf_unpack(int ggml_type, const uint8_t* blocks, int64_t rows, int64_t row_blocks,
                            int64_t row_stride, int row_steps, bool descending, void* codes,
                            void* scale, void* zero) {
  return mkrs::gguf::with_type(AllTypes{}, ggml_type, [&](auto type) {
    unpack<decltype(type)>(blocks, {rows, row_blocks, row_stride}, static_cast<unsigned>(row_steps),
                           descending, codes, scale, zero);
  });
}
