// dequant_matmul for few input rows on Hopper: see stream_kernel.cuh.
#pragma once

#include "decode.cuh"

namespace mkrs::cuda {

constexpr int kStreamRows = 16;   // most input rows
constexpr int kStreamTile = 16;   // weight rows of a tile
constexpr int kStreamUnit = 512;  // k of a unit of work
constexpr int kStreamBoxBytes = 128 * kStreamTile;
constexpr int kStreamMostSplits = 8;  // blocks of a cluster

struct StreamParams {
  QuantizedWeight w;
  const void* x;
  int64_t x_stride;
  const void* bias;
  void* out;
  int shift;  // of group sizes
  int m;
  int chunks;        // units of a weight row
  int split_chunks;  // units of a row that one block handles
  int tiles;         // of kStreamTile weight rows
  int block_tiles;   // of a block at least; of the first larger_blocks one more
  int larger_blocks;
  int stages;       // units of each warp's ring: 2, 3 or 4
  int total_tiles;  // most tiles of a block, where K is split over a cluster
  int x_row;        // elements from one staged input row to the next
  bool x_aligned;
  // Scales copied with the codes: bytes of a lane (all zero: loaded a unit ahead instead, for
  // layouts that asynchronous copies cannot take), and log2 of runs in a group.
  int scale_bytes;
  int zero_bytes;
  int raw_bytes;  // both, padded
  int run_shift;
};

struct StreamPlan {
  StreamParams params;
  int splits;  // of K, over the blocks of a cluster
  bool light;  // little work for each multiprocessor
  int multiprocessors;
  int shared_per_block;
};

// Input rows that the kernel takes of a weight. Staging many long rows of activations takes longer
// than the products save: the fused kernel is faster then (measured on an H100).
constexpr int stream_rows(const QuantizedWeight& w) {
  const bool most = w.bits < 8 && run_of(w.group_size, w.groups) == 4 && w.in_features <= 8192;
  return most ? kStreamRows : kStreamRows / 2;
}

// How a call of at most stream_rows() rows of 16-bit input runs. False when the shape, an alignment
// or the device is not one that the kernel takes.
bool plan_stream(const MatmulCall& call, const DeviceInfo& info, StreamPlan* plan);

void launch_stream_f16(const char* op, const StreamPlan& plan, cudaStream_t stream);
void launch_stream_bf16(const char* op, const StreamPlan& plan, cudaStream_t stream);

}  // namespace mkrs::cuda
