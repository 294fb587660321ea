#include "decode.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kMaxStages = 4;
constexpr int64_t kMostRoundTiles = 16;

int pair_bytes(int bits, int run) {
  return 1024 / bits / (16 * run) * kDecodeRows * 8;
}

}  // namespace

bool plan_decode(const MatmulCall& call, const DeviceInfo& info, DecodePlan* plan) {
  const QuantizedWeight& w = call.w;
  DecodeParams& p = plan->params;
  const int64_t unit = 8 * kUnitBytes / w.bits;
  const int64_t chunks = ceil_div(w.in_features, unit);
  const int64_t tiles = ceil_div(w.rows, kDecodeRows);
  // Counters of units, and k inside a row, are 32-bit in the kernel.
  if (chunks == 0 || chunks > (int64_t{1} << 20) || tiles > (int64_t{1} << 31) / chunks / 16) {
    return false;
  }
  p.w = w;
  p.x = call.x;
  p.x_stride = call.x_stride;
  p.bias = call.bias;
  p.out = call.out;
  p.partial = nullptr;
  p.type = call.type;
  p.shift = group_shift(w);
  p.m = static_cast<int>(call.m);
  p.limbs = call.type == Float::F32 ? kLimbs : 1;
  p.chunks = static_cast<int>(chunks);
  p.tiles = static_cast<int>(tiles);
  p.codes_aligned = aligned(w.codes, 16) && w.codes_stride % 16 == 0;
  p.x_aligned = aligned(call.x, 16) && call.x_stride % 8 == 0;

  const int columns = p.m * p.limbs;
  const int padded = columns <= 8 ? 8 : 16;
  const int run = run_of(w.group_size, w.groups);
  const int pairs = 2 * pair_bytes(w.bits, run);
  // Fewer tiles than multiprocessors: split K over blocks too, down to two units a warp.
  int64_t splits = 1;
  if (tiles * 2 <= info.multiprocessors) {
    splits = std::min<int64_t>(info.multiprocessors / tiles, ceil_div(chunks, 2 * kDecodeWarps));
  }
  for (; splits <= chunks; ++splits) {
    p.split_chunks = static_cast<int>(ceil_div(chunks, splits));
    if (ceil_div(chunks, p.split_chunks) != splits) continue;
    p.x_row = static_cast<int>(p.split_chunks * unit) + 8;  // 16 bytes of padding against conflicts
    plan->blocks = static_cast<int>(
        std::min<int64_t>(tiles, std::max<int64_t>(1, info.multiprocessors / splits)));
    const int64_t block_tiles = ceil_div(tiles, plan->blocks);
    const int64_t runs = p.split_chunks * unit / (16 * run);
    const int64_t staged = int64_t{2} * columns * p.x_row + 2 * unit + runs * padded * 4;
    for (const int warps : {kDecodeWarps, kDecodeWarps / 2}) {
      const int64_t tile_sums =
          int64_t{4} * std::min(warps, p.split_chunks) * columns * kDecodeRows;
      for (p.stages = kMaxStages; p.stages >= 2; --p.stages) {
        const int64_t fixed = staged + int64_t{warps} * (p.stages * kSlotBytes + pairs);
        const int64_t room = (info.shared_per_block - fixed) / tile_sums;
        if (fixed > info.shared_per_block || room < 1) continue;
        p.round_tiles = static_cast<int>(std::min({room, block_tiles, kMostRoundTiles}));
        plan->splits = static_cast<int>(splits);
        plan->threads = warps * 32;
        plan->shared_bytes = static_cast<int>(fixed + p.round_tiles * tile_sums);
        return true;
      }
    }
  }
  return false;
}

}  // namespace mkrs::cuda
