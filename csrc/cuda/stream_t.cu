// input [m, N] @ W for few rows on Hopper.
//
// Floor: codes and scales read once over the memory bandwidth; at 4 bits and m = 1 a lane spends
// about 3.5 instructions a weight, half the issue slots of an H100.
//
// - Codes and scales come through private rings of asynchronous copies, as in stream_kernel.cuh: a
//   lane reads the very codes that it asked for, so that warps wait for nobody else.
// - A half-warp covers 256 columns of a row, its lanes 16 each. A block owns 256 columns and a part
//   of the rows; its warps meet once, in the end, and the blocks of a cluster, which share the
//   columns, add up through distributed shared memory in a fixed order. Where clusters do not fill
//   the device, partial sums go through memory.
// - Scales are turned into f32 pairs once a stage, by all lanes, so that the products are one
//   straight line of code.
// - The kernel may be launched while the one before it still runs: as stream_kernel.cuh, which see.
#include "hopper.cuh"
#include "mma.cuh"
#include "sum_partials.cuh"
#include "transposed.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kLanes = 16;  // side by side
constexpr int kTile = kLanes * kLaneColumns;
constexpr int kStages = 4;
constexpr int kMostSplits = 8;            // blocks of a cluster
constexpr int kLeastRows = 64;            // of a block, where rows are split
constexpr int kMostScaleBytes = 32;       // of a tile's row
constexpr int kLeastShared = 116 * 1024;  // one block a multiprocessor

// Rows of a half-warp in a stage: as many bytes at 8 bits as at 4.
template <int BITS>
constexpr int kDepth = BITS == 8 ? 4 : 8;
template <int BITS>
constexpr int kStageRows = 2 * kDepth<BITS>;
template <int BITS>
constexpr int kStageBytes = 32 * kDepth<BITS> * 2 * BITS;  // of codes

struct StreamTParams {
  QuantizedWeight w;
  const void* x;  // [m, N]
  int64_t x_stride;
  Float type;  // of x and out
  void* out;
  float* partial;  // [splits, m, K] where blocks form no clusters, else null
  int shift;       // of group sizes
  int split_rows;
  int groups_log2;  // groups in a tile's row
  int padded_rows;  // of x in shared memory
  int scale_bytes;  // of a tile's row
  int zero_bytes;
};

// Byte offsets into shared memory; host and kernel agree through this one function.
struct StreamTLayout {
  int raw, pairs, x, totals, total;
};

template <int BITS, int M>
__host__ __device__ __forceinline__ StreamTLayout stream_t_layout(const StreamTParams& p) {
  StreamTLayout l;
  l.raw = kWarps * kStages * kStageBytes<BITS>;
  l.pairs = l.raw + kWarps * kStages * kStageRows<BITS> * (p.scale_bytes + p.zero_bytes);
  l.x = l.pairs + kWarps * (kStageRows<BITS> * 8 << p.groups_log2);
  l.totals = l.x + M * p.padded_rows * 4;
  l.total = l.totals + M * kTile * 4;
  return l;
}

// Grid (column tiles, row splits).
template <int BITS, int M>
__global__ void __launch_bounds__(kThreads, 1) stream_t_kernel(const StreamTParams p) {
#if defined(MKRS_SM90)
  constexpr int kLaneBytes = 2 * BITS;
  constexpr int kRows = kStageRows<BITS>;
  constexpr int kHalfRows = kDepth<BITS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const StreamTLayout at = stream_t_layout<BITS, M>(p);
  const QuantizedWeight& w = p.w;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int side = lane / kLanes;  // which half of the warp
  const int column = lane % kLanes * kLaneColumns;
  const int64_t tile_k = static_cast<int64_t>(blockIdx.x) * kTile;
  const int begin = blockIdx.y * p.split_rows;
  const int end = min(static_cast<int>(w.rows), begin + p.split_rows);
  const int stages = (end - begin + kRows - 1) / kRows;  // of the block
  const int mine = (stages + kWarps - 1 - warp) / kWarps;

  // ---- the stream of codes and scales ----
  const int64_t row_bytes = (w.in_features * BITS + 7) / 8;
  const int64_t lane_byte = (tile_k + column) * BITS / 8;
  const int lane_valid =
      static_cast<int>(max(int64_t{0}, min(int64_t{kLaneBytes}, row_bytes - lane_byte)));
  const uint32_t base = shared_address(shared);
  const uint32_t ring = base + warp * kStages * kStageBytes<BITS> + lane * kLaneBytes;
  const int raw_row = p.scale_bytes + p.zero_bytes;
  const int raw_ring = at.raw + warp * kStages * kRows * raw_row;
  // A lane copies the scales of one row, another lane its zero points or offsets.
  const int raw_which = lane / kRows;
  const int raw_of = lane % kRows;
  const int element = w.scale_type == Float::F32 ? 4 : 2;
  const int raw_element = raw_which == 1 && w.scheme == Scheme::Asymmetric ? 1 : element;
  const int raw_bytes = raw_which == 0 ? p.scale_bytes : raw_which == 1 ? p.zero_bytes : 0;
  const char* raw_from = static_cast<const char*>(raw_which == 1 ? w.zero : w.scale);
  const int64_t raw_stride = (raw_which == 1 ? w.zero_stride : w.scale_stride) * raw_element;
  const int64_t first_group = tile_k >> p.shift;
  const int raw_valid = static_cast<int>(
      max(int64_t{0}, min(int64_t{raw_bytes}, (w.groups - first_group) * raw_element)));
  const int raw_to = raw_ring + (raw_which == 1 ? kRows * p.scale_bytes : 0) + raw_of * raw_bytes;
  for (int stage = 0; stage < min(mine, kStages); ++stage) {  // the first ones' way into L2
    const int first = begin + (stage * kWarps + warp) * kRows;
#pragma unroll
    for (int i = lane; i < kRows * BITS; i += 32) {  // 32 bytes of BITS in a tile's row
      const int row = first + i / BITS;
      const int64_t byte = tile_k * BITS / 8 + i % BITS * 32;
      if (row < end && byte < row_bytes) prefetch_l2(w.codes + row * w.codes_stride + byte);
    }
    if (raw_valid > 0 && first + raw_of < end) {
      prefetch_l2(raw_from + (first + raw_of) * raw_stride + first_group * raw_element);
    }
  }
  wait_for_previous();
  let_next_start();
  const bool whole_tile = tile_k + kTile <= w.in_features;
  int asked = 0;
  int ask_slot = 0;
  const auto ask = [&] {  // for the next stage
    if (asked < mine) {
      const int first = begin + (asked * kWarps + warp) * kRows;
      const int64_t row = first + side * kHalfRows;
      const char* from = reinterpret_cast<const char*>(w.codes) + row * w.codes_stride + lane_byte;
      const uint32_t to = ring + ask_slot * kStageBytes<BITS>;
      if (whole_tile && first + kRows <= end) {
#pragma unroll
        for (int i = 0; i < kHalfRows; ++i) {
          copy_async(to + i * 32 * kLaneBytes, from, kLaneBytes, kLaneBytes);
          from += w.codes_stride;
        }
      } else {
        for (int i = 0; i < kHalfRows; ++i) {
          const int valid = row + i < end ? lane_valid : 0;
          copy_async(to + i * 32 * kLaneBytes,
                     valid > 0 ? from + i * w.codes_stride : reinterpret_cast<const char*>(w.codes),
                     kLaneBytes, valid);
        }
      }
      if (raw_bytes > 0) {
        const int valid = first + raw_of < end ? raw_valid : 0;
        copy_async(base + raw_to + ask_slot * kRows * raw_row,
                   valid > 0 ? raw_from + (first + raw_of) * raw_stride + first_group * raw_element
                             : raw_from,
                   raw_bytes, valid);
      }
      ++asked;
      ask_slot = (ask_slot + 1) % kStages;
    }
    copy_async_commit();  // also when empty: the counting of stages goes on
  };

  // ---- the inputs; the first codes are asked for once their loads are under way ----
  float* inputs = reinterpret_cast<float*>(shared + at.x);
  constexpr int kBatch = 4;
  for (int first = 0; first < p.padded_rows; first += kBatch * kThreads) {
    uint32_t words[kBatch][M];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int n = first + b * kThreads + threadIdx.x;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        words[b][m] = begin + n < end ? load_raw(p.x, m * p.x_stride + begin + n, p.type) : 0;
      }
    }
    if (first == 0) {
#pragma unroll 1
      for (int i = 0; i < kStages; ++i) ask();
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int n = first + b * kThreads + threadIdx.x;
      if (n >= p.padded_rows) break;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        inputs[m * p.padded_rows + n] = raw_to_float(words[b][m], p.type);
      }
    }
  }
  __syncthreads();

  // ---- scales of a stage, as (scale, shift) with w = element * scale + shift ----
  float2* pairs = reinterpret_cast<float2*>(shared + at.pairs) + warp * (kRows << p.groups_log2);
  const auto share = [&](int slot) {
    const unsigned char* scales = shared + raw_ring + slot * kRows * raw_row;
    const unsigned char* zeros = scales + kRows * p.scale_bytes;
    const int mask = (1 << p.groups_log2) - 1;
    for (int i = lane; i < kRows << p.groups_log2; i += 32) {
      const unsigned char* scale = scales + (i >> p.groups_log2) * p.scale_bytes;
      const unsigned char* zero = zeros + (i >> p.groups_log2) * p.zero_bytes;
      const int group = i & mask;
      RawGroup raw{0, 0};
      if (element == 4) {
        raw.scale = reinterpret_cast<const uint32_t*>(scale)[group];
        if (w.scheme == Scheme::Affine) raw.zero = reinterpret_cast<const uint32_t*>(zero)[group];
      } else {
        raw.scale = reinterpret_cast<const unsigned short*>(scale)[group];
        if (w.scheme == Scheme::Affine) {
          raw.zero = reinterpret_cast<const unsigned short*>(zero)[group];
        }
      }
      if (w.scheme == Scheme::Asymmetric) raw.zero = zero[group];
      const Group g = finish_group(w, raw);
      pairs[i] = make_float2(g.scale * ColumnCodes<BITS>::kInverseFactor,
                             fmaf(g.scale, -(ColumnCodes<BITS>::kBias + g.zero), g.offset));
    }
  };

  float acc[M][kLaneColumns] = {};
  float shifts[M] = {};
  const float2* lane_pairs = pairs + (side * kHalfRows << p.groups_log2) + (column >> p.shift);
  const int lane_ring = warp * kStages * kStageBytes<BITS> + lane * kLaneBytes;
  int slot = 0;
  for (int done = 0; done < mine; ++done) {
    copy_async_wait<kStages - 1>();
    __syncwarp();
    share(slot);
    __syncwarp();
    const unsigned char* from = shared + lane_ring + slot * kStageBytes<BITS>;
    const float* input = inputs + (done * kWarps + warp) * kRows + side * kHalfRows;
#pragma unroll
    for (int i = 0; i < kHalfRows; ++i) {
      ColumnCodes<BITS> codes;
      if constexpr (BITS == 8) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + i * 32 * kLaneBytes);
        codes.words[0] = v.x, codes.words[1] = v.y, codes.words[2] = v.z, codes.words[3] = v.w;
      } else if constexpr (BITS == 4) {
        const uint2 v = *reinterpret_cast<const uint2*>(from + i * 32 * kLaneBytes);
        codes.words[0] = v.x, codes.words[1] = v.y;
      } else {
        codes.words[0] = *reinterpret_cast<const uint32_t*>(from + i * 32 * kLaneBytes);
      }
      const float2 pair = lane_pairs[i << p.groups_log2];
      float v[kLaneColumns];
      codes.elements(v);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float x = input[m * p.padded_rows + i];
        const float scaled = x * pair.x;
        shifts[m] = fmaf(x, pair.y, shifts[m]);
#pragma unroll
        for (int c = 0; c < kLaneColumns; ++c) acc[m][c] = fmaf(scaled, v[c], acc[m][c]);
      }
    }
    __syncwarp();  // before the next scales overwrite these
    ask();
    slot = (slot + 1) % kStages;
  }

  // ---- sums, through the rings, which are idle now ----
  float* sums = reinterpret_cast<float*>(shared);  // [2 * kWarps][kTile]
  float* totals = reinterpret_cast<float*>(shared + at.totals);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    __syncthreads();
    float4* to = reinterpret_cast<float4*>(sums + (warp * 2 + side) * kTile + column);
#pragma unroll
    for (int c = 0; c < kLaneColumns; c += 4) {
      to[c / 4] = make_float4(acc[m][c] + shifts[m], acc[m][c + 1] + shifts[m],
                              acc[m][c + 2] + shifts[m], acc[m][c + 3] + shifts[m]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += kThreads) {
      float value = 0.0f;
#pragma unroll
      for (int s = 0; s < 2 * kWarps; ++s) value += sums[s * kTile + i];
      if (p.partial == nullptr) {
        totals[m * kTile + i] = value;
      } else if (tile_k + i < w.in_features) {
        p.partial[(static_cast<int64_t>(blockIdx.y) * M + m) * w.in_features + tile_k + i] = value;
      }
    }
  }
  if (p.partial != nullptr) return;
  const int splits = gridDim.y;  // of a cluster
  cluster_barrier();
  for (int i = threadIdx.x * splits + blockIdx.y; i < M * kTile; i += kThreads * splits) {
    const int64_t k = tile_k + i % kTile;
    if (k >= w.in_features) continue;
    float value = 0.0f;
    for (int s = 0; s < splits; ++s) value += read_cluster_float(shared_address(totals + i), s);
    store_float(p.out, i / kTile * w.in_features + k, p.type, value);
  }
  cluster_barrier();  // nobody leaves while others read
#endif
}

template <int BITS, int M>
bool launch_stream_t(const char* op, StreamTParams p, int64_t tiles, const Scope& scope,
                     const Tensor& like) {
  const DeviceInfo& info = scope.info();
  int64_t splits =
      std::min<int64_t>({kMostSplits, std::max<int64_t>(1, info.multiprocessors / tiles),
                         ceil_div(p.w.rows, int64_t{kLeastRows})});
  int shared_bytes = 0;
  for (; splits <= kMostSplits; ++splits) {  // more where the inputs do not fit
    p.split_rows = static_cast<int>(ceil_div(p.w.rows, splits));
    const int64_t step = kWarps * kStageRows<BITS>;
    const int64_t padded = ceil_div(int64_t{p.split_rows}, step) * step;
    if (padded * M * 4 > info.shared_per_block) continue;
    p.padded_rows = static_cast<int>(padded);
    shared_bytes = stream_t_layout<BITS, M>(p).total;
    if (shared_bytes <= info.shared_per_block) break;
  }
  if (splits > kMostSplits) return false;
  splits = ceil_div(p.w.rows, int64_t{p.split_rows});
  shared_bytes = std::max(shared_bytes, std::min(kLeastShared, info.shared_per_block));

  const auto kernel = stream_t_kernel<BITS, M>;
  check_cuda(
      op, "asking for shared memory",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  // A wave of single blocks beats two of clusters.
  const bool clustered = tiles * splits > info.multiprocessors ||
                         tiles <= most_clusters(op, kernel, static_cast<int>(splits), kThreads,
                                                shared_bytes, info.multiprocessors);
  std::optional<Tensor> partial;
  if (!clustered) {
    partial = empty_on(like, {splits, M, p.w.in_features}, ScalarType::Float);
    p.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  launch_overlapped(op, kernel, grid, kThreads, shared_bytes,
                    dim3(1, clustered ? static_cast<unsigned>(splits) : 1), scope.stream(), p);
  if (!clustered) {
    launch_sum_partials(op, p.partial, splits, M, p.w.in_features, nullptr, p.out, p.type,
                        scope.stream());
  }
  return true;
}

}  // namespace

bool run_stream_t(const char* op, const QuantizedWeight& w, const void* x, int64_t x_stride,
                  Float type, int m, void* out, const Scope& scope, const Tensor& like) {
  const int64_t tiles = ceil_div(w.in_features, int64_t{kTile});
  if (scope.info().major < 9 || w.groups <= 1 || w.group_size > kTile ||
      w.rows >= (int64_t{1} << 30) || tiles >= (int64_t{1} << 30) || w.codes_stride <= 0 ||
      !aligned(w.codes, 2 * w.bits) || w.codes_stride % (2 * w.bits) != 0) {
    return false;
  }
  StreamTParams p{};
  p.w = w;
  p.x = x;
  p.x_stride = x_stride;
  p.type = type;
  p.out = out;
  p.shift = group_shift(w);
  const int groups = static_cast<int>(kTile / w.group_size);
  while ((1 << p.groups_log2) < groups) ++p.groups_log2;
  const auto copyable = [&](const void* data, int64_t stride, int element, int* bytes) {
    *bytes = groups * element;
    const int step = std::min(*bytes, 16);
    return *bytes >= 4 && *bytes <= kMostScaleBytes && aligned(data, step) &&
           stride * element % step == 0;
  };
  const int element = static_cast<int>(float_size(w.scale_type));
  if (!copyable(w.scale, w.scale_stride, element, &p.scale_bytes)) return false;
  if (w.scheme != Scheme::Symmetric &&
      !copyable(w.zero, w.zero_stride, w.scheme == Scheme::Affine ? element : 1, &p.zero_bytes)) {
    return false;
  }
  bool launched = false;
  dispatch_bits(w.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    launched = m == 1   ? launch_stream_t<kBits, 1>(op, p, tiles, scope, like)
               : m == 2 ? launch_stream_t<kBits, 2>(op, p, tiles, scope, like)
               : m == 3 ? launch_stream_t<kBits, 3>(op, p, tiles, scope, like)
                        : launch_stream_t<kBits, 4>(op, p, tiles, scope, like);
  });
  return launched;
}

}  // namespace mkrs::cuda
