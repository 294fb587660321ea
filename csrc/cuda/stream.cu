#include "stream_variants.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kMostStages = 4;
// Bytes in flight that keep the memory busy; more only keep everybody's loads waiting.
constexpr int kRingBytes = 96 * 1024;
constexpr int kLightRingBytes = 64 * 1024;  // of two blocks of a multiprocessor
constexpr int kLightUnits = 24;             // of a multiprocessor

// The most stages that fit.
template <int BITS, int RUN, int COLS, int WARPS>
bool fit_stream(int limit, StreamParams* p) {
  for (p->stages = kMostStages; p->stages >= 2; --p->stages) {
    const int most = stream_is_light(COLS, WARPS) ? kLightRingBytes : kRingBytes;
    if (p->stages > 2 && WARPS * p->stages * kStreamUnitBytes<BITS> > most) continue;
    if (stream_layout<BITS, RUN, COLS, WARPS>(*p).total <= limit) return true;
  }
  return false;
}

}  // namespace

bool plan_stream(const MatmulCall& call, const DeviceInfo& info, StreamPlan* plan) {
  const QuantizedWeight& w = call.w;
  const int64_t row_bytes = code_bytes(w.in_features, w.bits);
  const int64_t chunks = ceil_div(w.in_features, int64_t{kStreamUnit});
  const int64_t tiles = ceil_div(w.rows, int64_t{kStreamTile});
  if (info.major < 9 || call.type == Float::F32 || call.m > stream_rows(w) || row_bytes < 128 ||
      !aligned(w.codes, 16) || w.codes_stride % 16 != 0 || w.codes_stride <= 0 ||
      w.codes_stride >= (int64_t{1} << 36) || w.in_features >= (int64_t{1} << 26) ||
      w.rows >= (int64_t{1} << 30) || chunks * tiles >= (int64_t{1} << 30)) {
    return false;
  }
  StreamParams& p = plan->params;
  p.w = w;
  p.x = call.x;
  p.x_stride = call.x_stride;
  p.bias = call.bias;
  p.out = call.out;
  p.shift = std::min(group_shift(w), 31);
  p.m = static_cast<int>(call.m);
  p.chunks = static_cast<int>(chunks);
  p.tiles = static_cast<int>(tiles);
  p.x_aligned = aligned(call.x, 16) && call.x_stride % 8 == 0;
  const int run = run_of(w.group_size, w.groups);
  plan->multiprocessors = info.multiprocessors;
  plan->light = chunks * tiles <= int64_t{kLightUnits} * info.multiprocessors;
  plan->shared_per_block = info.shared_per_block;

  // Scales that two lanes share a row of: can asynchronous copies bring a lane's half?
  const int run_k = 16 * run;
  p.run_shift = 0;
  while (w.groups > 1 && (run_k << p.run_shift) < w.group_size) ++p.run_shift;
  const int lane_groups = kStreamUnit / run_k / 2 >> p.run_shift;
  const auto copyable = [&](const void* data, int64_t stride, int element, int* bytes) {
    *bytes = lane_groups * element;
    const int step = std::min(*bytes, 16);
    return *bytes >= 4 && aligned(data, step) && stride * element % step == 0;
  };
  const int element = static_cast<int>(float_size(w.scale_type));
  p.scale_bytes = p.zero_bytes = 0;
  bool ahead = w.groups > 1 && copyable(w.scale, w.scale_stride, element, &p.scale_bytes);
  if (w.scheme != Scheme::Symmetric) {
    ahead = ahead && copyable(w.zero, w.zero_stride, w.scheme == Scheme::Affine ? element : 1,
                              &p.zero_bytes);
  }

  if (!ahead) p.scale_bytes = p.zero_bytes = 0;
  const int padding = std::max(1, std::min(p.scale_bytes, 16));
  p.raw_bytes = static_cast<int>(ceil_div(p.scale_bytes + p.zero_bytes, padding)) * padding;

  const auto fits = [&] {
    bool found = false;
    dispatch_bits(w.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      dispatch_stream<kBits>(run, p.m, plan->light, [&](auto variant) {
        using V = decltype(variant);
        found = fit_stream<kBits, V::kRun, V::kColumns, V::kWarps>(info.shared_per_block, &p);
      });
    });
    return found;
  };
  // Few tiles: split K over the blocks of a cluster, a unit or more for each warp.
  int splits = 1;
  while (splits < kStreamMostSplits && tiles * splits * 2 <= info.multiprocessors &&
         chunks >= int64_t{16} * splits) {
    splits *= 2;
  }
  for (; splits <= kStreamMostSplits && splits <= chunks; ++splits) {
    const int64_t split_chunks = ceil_div(chunks, int64_t{splits});
    if (ceil_div(chunks, split_chunks) != splits) continue;
    p.split_chunks = static_cast<int>(split_chunks);
    p.x_row = static_cast<int>(split_chunks) * kStreamUnit + 8;  // 16 bytes against bank conflicts
    if (int64_t{2} * p.m * p.x_row > info.shared_per_block) continue;
    plan->splits = splits;
    const int64_t clusters = std::max(1, info.multiprocessors * 7 / 8 / splits);
    p.total_tiles =
        splits == 1 ? 0 : static_cast<int>(std::min<int64_t>(32, ceil_div(tiles, clusters)));
    if (fits()) return true;
  }
  return false;
}

}  // namespace mkrs::cuda
