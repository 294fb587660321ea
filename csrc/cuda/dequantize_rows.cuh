// Rows of a quantized weight as floats: dequantize, dequant_embedding and the dense-matmul route of
// large inputs share this kernel.
#pragma once

#include "common.cuh"

namespace mkrs::cuda {

// Rows to read: all in order, or those an index tensor names.
struct RowIndex {
  const void* data = nullptr;  // null: row i is row i
  bool is_int64 = true;
};

// out [count, in_features] contiguous in `type`.
void launch_dequantize_rows(const char* op, const QuantizedWeight& w, const RowIndex& index,
                            int64_t count, void* out, Float type, cudaStream_t stream);

}  // namespace mkrs::cuda
