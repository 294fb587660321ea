// dequant_matmul for few input rows (decode): every weight is read once, by tensor cores from the
// first row on. See decode_kernel.cuh for how.
#pragma once

#include "common.cuh"

namespace mkrs::cuda {

constexpr int kDecodeColumns = 16;  // operand columns of one pass: two tensor-core tiles of 8
constexpr int kDecodeRows = 16;     // weight rows of a tile

constexpr int kUnitBytes = 128;  // of codes, per row and unit
constexpr int kSlotBytes = kUnitBytes * kDecodeRows;
constexpr int kDecodeWarps = 16;

// Products that one group's scale covers: all group sizes from 64 up are cut into runs of 64.
constexpr int run_of(int64_t group_size, int64_t groups) {
  return groups <= 1 || group_size >= 64 ? 4 : group_size == 32 ? 2 : 1;
}

// f32 activations are split into three bf16 limbs, a column each: 3 x 8 bits are f32's mantissa.
constexpr int kLimbs = 3;

// Input rows one pass can take.
constexpr int decode_rows(Float type) {
  return type == Float::F32 ? kDecodeColumns / kLimbs : kDecodeColumns;
}

struct MatmulCall {
  QuantizedWeight w;
  const void* x;       // [m, K], rows x_stride elements apart
  int64_t x_stride;
  const void* bias;    // null or [N]
  void* out;           // [m, N] contiguous
  int64_t m;
  Float type;          // of x, bias and out
};

struct DecodeParams {
  QuantizedWeight w;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* out;
  float* partial;    // [splits, m, N] when the input features are split over blocks, else null
  Float type;
  int shift;         // of group sizes
  int m;
  int limbs;         // operand columns per input row
  int chunks;        // units of a weight row
  int split_chunks;  // units of a row that one block handles
  int tiles;         // of kDecodeRows weight rows
  int round_tiles;   // tiles whose sums are added up together, between barriers
  int stages;        // of each warp's ring
  int x_row;         // elements from one staged operand column to the next
  bool codes_aligned;
  bool x_aligned;
};

struct DecodePlan {
  DecodeParams params;
  int splits;
  int blocks;  // along the tiles
  int threads;
  int shared_bytes;
};

// How a call of at most decode_rows() rows runs. `supported` is false when even the smallest
// configuration does not fit the device's shared memory.
bool plan_decode(const MatmulCall& call, const DeviceInfo& info, DecodePlan* plan);

void launch_decode_f16(const char* op, const DecodePlan& plan, cudaStream_t stream);
void launch_decode_bf16(const char* op, const DecodePlan& plan, cudaStream_t stream);

}  // namespace mkrs::cuda
