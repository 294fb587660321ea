// The kernel of gguf_unpack as a function of a shared library.
#include "cuda/gguf_unpack_kernel.cuh"

namespace {

using namespace mkrs::cuda::gguf_unpacking;

template <typename Type>
bool unpack(int ggml_type, const uint8_t* blocks, const Rows& in, unsigned row_steps,
            bool descending, void* codes, void* scale, void* zero) {
  using Scale = typename Type::Scale;
  if (Type::layout.type != ggml_type) return false;
  const Rows rows = joined(in, Type::layout.bytes);
  constexpr int kTile = kTileBlocks<Type>;
  dim3 grid;
  grid.x = static_cast<unsigned>((rows.row_blocks + kTile - 1) / kTile);
  grid.y = static_cast<unsigned>(std::min<int64_t>(rows.rows, row_steps));
  host::launch(grid, kThreads, descending, [&] {
    unpack_kernel<Type>(blocks, rows, static_cast<uint4*>(codes), static_cast<Scale*>(scale),
                        static_cast<Scale*>(zero));
  });
  return true;
}

template <typename... Types>
bool unpack_any(int ggml_type, const uint8_t* blocks, const Rows& in, unsigned row_steps,
                bool descending, void* codes, void* scale, void* zero) {
  return (unpack<Types>(ggml_type, blocks, in, row_steps, descending, codes, scale, zero) || ...);
}

}  // namespace

// `row_steps` is the most rows of a grid: with fewer than there are, blocks walk over several.
extern "C" bool gguf_unpack(int ggml_type, const uint8_t* blocks, int64_t rows, int64_t row_blocks,
                            int64_t row_stride, int row_steps, bool descending, void* codes,
                            void* scale, void* zero) {
  return unpack_any<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K>(
      ggml_type, blocks, {rows, row_blocks, row_stride}, static_cast<unsigned>(row_steps),
      descending, codes, scale, zero);
}
