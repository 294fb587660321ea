// Arguments and outputs of gguf_unpack, shared by all backends.
#pragma once

#include <tuple>

#include "checks.h"
#include "gguf_layouts.h"

namespace mkrs::gguf {

constexpr const char* kOp = "gguf_unpack";

// A call with its outputs: rows of whole blocks, adjacent within a row.
struct Unpacking {
  Tensor blocks, codes, scale, zero;
  int64_t rows, row_blocks;
  int64_t row_stride;  // bytes from row to row of `blocks`

  int64_t count() const { return rows * row_blocks; }
  std::tuple<Tensor, Tensor, Tensor> result() const { return {codes, scale, zero}; }
};

inline Unpacking prepare(const Layout& layout, const Tensor& blocks, int64_t rows,
                         int64_t in_features) {
  MKRS_CHECK(in_features % layout.block == 0, kOp, "in_features must be a multiple of ",
             layout.block, " for ", layout.name, ", got ", in_features);
  const int64_t row_blocks = in_features / layout.block;
  MKRS_CHECK(blocks.size(0) == rows && blocks.size(1) % layout.bytes == 0 &&
                 blocks.size(1) / layout.bytes == row_blocks,
             kOp, "blocks must have shape [", rows, ", ", row_blocks, "*", layout.bytes, "] for ",
             layout.name, ", got ", shape_string(blocks));
  const bool adjacent = blocks.size(1) <= 1 || blocks.stride(1) == 1;
  const Tensor usable = adjacent ? blocks : torch::stable::contiguous(blocks);
  const ScalarType type = scalar_type(layout.scale);
  const auto empty = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    return empty_on(blocks, sizes, dtype);
  };
  return {usable,
          empty({rows, row_blocks * layout.codes()}, ScalarType::Byte),
          empty({rows, row_blocks * layout.groups()}, type),
          layout.affine() ? empty({rows, row_blocks * layout.groups()}, type)
                          : empty({0}, ScalarType::Byte),
          rows,
          row_blocks,
          rows > 1 ? usable.stride(0) : 0};
}

// Checks a call and has run(type, call) fill its outputs.
template <typename... T, typename Run>
std::tuple<Tensor, Tensor, Tensor> dispatch(Types<T...> types, const Tensor& blocks,
                                            int64_t ggml_type, int64_t rows, int64_t in_features,
                                            Run&& run) {
  MKRS_CHECK(blocks.scalar_type() == ScalarType::Byte, kOp, "blocks must be uint8, got ",
             dtype_name(blocks.scalar_type()));
  MKRS_CHECK(blocks.dim() == 2, kOp, "blocks must have 2 dimensions [rows, row_bytes], got ",
             shape_string(blocks));
  MKRS_CHECK(rows >= 0, kOp, "rows must not be negative, got ", rows);
  MKRS_CHECK(in_features >= 0, kOp, "in_features must not be negative, got ", in_features);
  std::optional<Unpacking> done;
  const bool found = with_type(types, ggml_type, [&](auto type) {
    done = prepare(decltype(type)::layout, blocks, rows, in_features);
    if (done->count() > 0) run(type, *done);
  });
  if (found) return done->result();
  std::ostringstream known;
  const char* comma = "";
  ((known << comma << T::layout.name << " (" << T::layout.type << ")", comma = ", "), ...);
  fail(kOp, "ggml_type must be one of ", known.str(), ", got ", ggml_type);
}

}  // namespace mkrs::gguf
