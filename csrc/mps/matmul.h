// What dequant_matmul and dequant_matmul_t share on MPS.
#pragma once

#include "mps/regimes.h"
#include "mps/weight.h"

namespace mkrs::mps {

// Input rows as one matrix with a row stride, copied only when they do not have one.
struct InputRows {
  Tensor data;
  int64_t rows;
  int64_t stride;
};

inline InputRows input_rows(const Tensor& input) {
  Tensor data = has_uniform_rows(input) ? input : torch::stable::contiguous(input);
  const int64_t rows = rows_of(data);
  return {data, rows, rows > 1 ? row_stride(data) : 0};
}

// out[M, outputs] = sum over parts of partial[parts, M, outputs], plus bias.
void sum_parts(const char* op, const Tensor& partial, const std::optional<Tensor>& bias,
               const Tensor& out, int64_t rows, int64_t outputs, int64_t parts, Float type);

}  // namespace mkrs::mps
