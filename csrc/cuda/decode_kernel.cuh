// Floor: codes and scales read once over the memory bandwidth. At 4 bits an H100 then has to take
// in about 20 weights a clock and multiprocessor, 6 instructions a weight if all issue slots were
// used.
//
// - The weights are the 16-row operand of m16n8k16, the activations its 8 columns, so one row of
//   activations or sixteen cost about the same, and a weight costs two instructions.
// - Codes become exact integers q - c; scale and shift are applied to the f32 sums of each run of
//   k inside one group: scale * sum((q - c) x) + shift * sum(x), where each block adds up the
//   sum(x) of every run once. So weights are never rounded to the activations' type.
// - A block stays on its multiprocessor and walks over tiles of 16 rows; the activations are staged
// in
//   shared memory once, in the order in which unpacking delivers the codes.
// - K is split over the warps in units of 128 code bytes a row. Each warp streams its own units
// through
//   a private ring of asynchronous copies, so that no barrier stands between memory and the tensor
//   cores; warps meet once in many tiles, to add their partial sums in a fixed order.
#pragma once

#include "decode.cuh"
#include "mma.cuh"

namespace mkrs::cuda {

// Runs of products inside one group that a unit consists of; group sizes above 64 repeat their
// scale.
template <int BITS, int RUN>
constexpr int kRunsPerUnit = 1024 / BITS / (16 * RUN);

template <int BITS, int RUN>
constexpr int kPairBytes = kRunsPerUnit<BITS, RUN> * kDecodeRows * 8;  // (scale, shift) of a unit

__device__ __forceinline__ uint32_t pack_high_halves(float a, float b) {
  return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
}

// Three bf16 limbs, by truncation, with x = limb[0] + limb[1] / 2**8 + limb[2] / 2**16 exactly. The
// powers keep small limbs from becoming subnormal; inf and NaN stay in the first.
constexpr float kLimbStep = 1.0f / 256.0f;

__device__ __forceinline__ void split_limbs(float x, float (&limb)[kLimbs]) {
  const float top = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
  const bool finite = fabsf(x) <= 3.402823466e38f;
  limb[0] = finite ? top : x == x ? x : __uint_as_float(0x7fc00000u);
  const float rest = finite ? (x - top) * 256.0f : 0.0f;
  limb[1] = __uint_as_float(__float_as_uint(rest) & 0xffff0000u);
  limb[2] = (rest - limb[1]) * 256.0f;
}

// 16 activations of one row, zeros past the end, into the columns of its limbs; `sums` receives
// their sums.
template <typename T, int P>
__device__ __forceinline__ void stage_block(const DecodeParams& p, int row, int64_t k, int64_t end,
                                            T* staged, int column, int local, float (&sums)[kLimbs],
                                            bool is_early, const uint4 (&early)[2]) {
  uint32_t words[8];
  const auto store = [&](int limb) {
    sums[limb] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[limb] += sum_of_pair<T>(words[i]);
    interleave<P>(words);
    uint4* target =
        reinterpret_cast<uint4*>(staged + static_cast<int64_t>(column + limb) * p.x_row + local);
    target[0] = make_uint4(words[0], words[1], words[2], words[3]);
    target[1] = make_uint4(words[4], words[5], words[6], words[7]);
  };
  if (p.type == Float::F32) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const float* x = static_cast<const float*>(p.x) + row * p.x_stride;
      float limbs[16][kLimbs];
#pragma unroll
      for (int i = 0; i < 16; ++i) split_limbs(k + i < end ? __ldg(x + k + i) : 0.0f, limbs[i]);
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          words[i] = pack_high_halves(limbs[2 * i][l], limbs[2 * i + 1][l]);
        store(l);
      }
    }
    return;
  }
  const unsigned short* x = static_cast<const unsigned short*>(p.x) + row * p.x_stride;
  if (p.x_aligned && k + 16 <= end) {
    const uint4* from = reinterpret_cast<const uint4*>(x + k);
    const uint4 low = is_early ? early[0] : __ldg(from);
    const uint4 high = is_early ? early[1] : __ldg(from + 1);
    words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
    words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t a = k + 2 * i < end ? __ldg(x + k + 2 * i) : 0;
      const uint32_t b = k + 2 * i + 1 < end ? __ldg(x + k + 2 * i + 1) : 0;
      words[i] = a | b << 16;
    }
  }
  store(0);
}

template <typename T, int BITS, int RUN, int TILES>
__global__ void __launch_bounds__(kDecodeWarps * 32, 1) decode_kernel(const DecodeParams p) {
  constexpr int kUnit = 8 * kUnitBytes / BITS;  // elements of a row in a unit
  constexpr int kRuns = kRunsPerUnit<BITS, RUN>;
  constexpr int kPairsPerLane = kRuns / 2;   // 16 rows x kRuns over 32 lanes
  constexpr int kRunBytes = 2 * RUN * BITS;  // of a row
  constexpr int kLaneBytes = kRunBytes / 4;
  constexpr int kLaneWords = (RUN * BITS + 7) / 8;
  constexpr int kSwizzle = kRunBytes >= 16 ? kRunBytes / 16 : 1;
  extern __shared__ __align__(128) unsigned char shared[];

  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int columns = p.m * p.limbs;
  const QuantizedWeight& w = p.w;

  const int first_chunk = blockIdx.y * p.split_chunks;
  const int count = min(p.split_chunks, p.chunks - first_chunk);
  const int tile_begin = static_cast<int>(static_cast<int64_t>(blockIdx.x) * p.tiles / gridDim.x);
  const int tile_end = static_cast<int>(static_cast<int64_t>(blockIdx.x + 1) * p.tiles / gridDim.x);
  const int units = (tile_end - tile_begin) * count;
  const int mine = units > warp ? (units - warp + warps - 1) / warps : 0;
  const int step_tiles = warps / count;
  const int step_chunks = warps % count;

  constexpr int kPadded = 8 * TILES;
  T* staged = reinterpret_cast<T*>(shared);
  T* zeros = staged + static_cast<int64_t>(columns) * p.x_row;  // what columns past the last read
  float* run_sums = reinterpret_cast<float*>(zeros + kUnit);    // [runs of the split][kPadded]
  unsigned char* rings = reinterpret_cast<unsigned char*>(run_sums + count * kRuns * kPadded);
  unsigned char* ring = rings + warp * p.stages * kSlotBytes;
  const uint32_t ring_address = shared_address(ring);
  unsigned char* all_pairs = rings + warps * p.stages * kSlotBytes;
  float2* pairs = reinterpret_cast<float2*>(all_pairs + warp * 2 * kPairBytes<BITS, RUN>);
  float* partials = reinterpret_cast<float*>(all_pairs + warps * 2 * kPairBytes<BITS, RUN>);
  const int slots = min(warps, count);  // warps that share a tile
  const int tile_sums = slots * columns * kDecodeRows;

  // ---- the stream of codes ----
  const int64_t row_bytes = (w.in_features * BITS + 7) / 8;
  const int whole_chunks = static_cast<int>(row_bytes / kUnitBytes);
  const int whole_tiles = static_cast<int>(w.rows / kDecodeRows);
  const uint8_t* lane_codes = w.codes + (lane / 8) * w.codes_stride +
                              static_cast<int64_t>(first_chunk) * kUnitBytes + lane % 8 * 16;
  const int64_t four_rows = 4 * w.codes_stride;
  const auto slot_offset = [&](int r) {
    return r * kUnitBytes + ((lane % 8) ^ (r * kSwizzle & 7)) * 16;
  };
  const auto issue = [&](const Cursor& at, int slot) {
    const uint8_t* source = lane_codes + at.tile * (4 * four_rows) + at.chunk * kUnitBytes;
    const uint32_t target = ring_address + slot * kSlotBytes;
    if (p.codes_aligned && at.tile < whole_tiles && first_chunk + at.chunk < whole_chunks) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy_async_16(target + slot_offset(lane / 8 + 4 * i), source + i * four_rows);
      }
      return;
    }
    const int64_t left =
        row_bytes - static_cast<int64_t>(first_chunk + at.chunk) * kUnitBytes - lane % 8 * 16;
    const int valid = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
    for (int i = 0; i < 4; ++i) {
      const int r = lane / 8 + 4 * i;
      const int n = static_cast<int64_t>(at.tile) * kDecodeRows + r < w.rows ? valid : 0;
      const uint8_t* from = source + i * four_rows;
      uint32_t v[4] = {};
#pragma unroll
      for (int b = 0; b < 16; ++b) {
        if (b < n) v[b / 4] |= static_cast<uint32_t>(__ldg(from + b)) << (b % 4 * 8);
      }
      *reinterpret_cast<uint4*>(ring + slot * kSlotBytes + slot_offset(r)) =
          make_uint4(v[0], v[1], v[2], v[3]);
    }
  };

  // ---- scales: loaded a unit ahead into registers, shared with the warp as (scale, shift) ----
  uint32_t raw_scale[kPairsPerLane];
  uint32_t raw_zero[kPairsPerLane];
  const bool is_f32 = w.scale_type == Float::F32;
  const bool is_bf16 = w.scale_type == Float::BF16;
  const bool affine = w.scheme == Scheme::Affine;
  const bool asymmetric = w.scheme == Scheme::Asymmetric;
  const int last = static_cast<int>(w.in_features);
  const int lane_k = first_chunk * kUnit + lane / 16 * (16 * RUN);
  const int group_bits = min(p.shift, 31);
  const auto fetch = [&](const Cursor& at) {
    const int64_t row = static_cast<int64_t>(at.tile) * kDecodeRows + lane % 16;
    const int64_t scale_row = row * w.scale_stride;
    const int64_t zero_row = row * w.zero_stride;
    const int k = lane_k + at.chunk * kUnit;
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      // Zeros where there is no group, so that staged zeros meet finite numbers.
      raw_scale[i] = 0;
      raw_zero[i] = 0;
      if (row < w.rows && k + i * (32 * RUN) < last) {
        const int group = (k + i * (32 * RUN)) >> group_bits;
        if (w.scale_type == Float::F32) {
          raw_scale[i] = __ldg(static_cast<const uint32_t*>(w.scale) + scale_row + group);
          if (affine) raw_zero[i] = __ldg(static_cast<const uint32_t*>(w.zero) + zero_row + group);
        } else {
          raw_scale[i] = __ldg(static_cast<const unsigned short*>(w.scale) + scale_row + group);
          if (affine) {
            raw_zero[i] = __ldg(static_cast<const unsigned short*>(w.zero) + zero_row + group);
          }
        }
        if (asymmetric) raw_zero[i] = __ldg(static_cast<const uint8_t*>(w.zero) + zero_row + group);
      }
    }
  };
  // One formula for all schemes, without branches.
  const auto convert = [&](uint32_t raw) {
    const float wide = __uint_as_float(is_f32 ? raw : raw << 16);
    const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(raw)));
    return is_f32 || is_bf16 ? wide : half;
  };
  const auto share = [&](int buffer) {
    constexpr float kCenter = 1 << (BITS - 1);
#pragma unroll
    for (int i = 0; i < kPairsPerLane; ++i) {
      const float scale = convert(raw_scale[i]);
      const float offset = affine ? convert(raw_zero[i]) : 0.0f;
      // Small integers as floats: 2**23 + zero is exact.
      const float zero = __uint_as_float(0x4b000000u | raw_zero[i]) - 8388608.0f;
      const float center = affine ? kCenter : asymmetric ? kCenter - zero : 0.0f;
      pairs[buffer * (kRuns * kDecodeRows) + lane + 32 * i] =
          make_float2(scale, fmaf(scale, center, offset));
    }
  };

  const Cursor start{tile_begin + warp / count, warp % count};
  Cursor issue_at = start;
  Cursor fetch_at = start;
  Cursor at = start;
  // The first activations and scales are asked for before the codes, which would otherwise keep
  // them waiting for the time that all the rings take to fill.
  const int blocks = count * (kUnit / 16);  // of 16 activations, per row: a multiple of RUN
  const int64_t first_k = static_cast<int64_t>(first_chunk) * kUnit;
  uint4 early[2] = {};
  const bool is_early = p.x_aligned && p.type != Float::F32 && threadIdx.x < blocks * p.m;
  if (is_early) {
    const int row = threadIdx.x / blocks;
    const int64_t k = first_k + (threadIdx.x - row * blocks) * 16;
    if (k + 16 <= w.in_features) {
      const uint4* from = reinterpret_cast<const uint4*>(static_cast<const unsigned short*>(p.x) +
                                                         row * p.x_stride + k);
      early[0] = __ldg(from);
      early[1] = __ldg(from + 1);
    }
  }
  if (mine > 0) fetch(fetch_at);
  for (int s = 0; s < p.stages - 1; ++s) {
    if (s < mine) {
      issue(issue_at, s);
      issue_at.advance(step_tiles, step_chunks, count);
    }
    copy_async_commit();
  }

  // ---- activations, while the first units travel ----
  {
    const int all = blocks * p.m;
    for (int begin = 0; begin < all; begin += blockDim.x) {
      const int i = begin + threadIdx.x;
      const bool inside = i < all;
      const int row = inside ? i / blocks : 0;
      const int block = inside ? i - row * blocks : 0;
      float sums[kLimbs] = {};
      if (inside) {
        stage_block<T, kInterleave<T, BITS, RUN>>(p, row, first_k + block * 16, w.in_features,
                                                  staged, row * p.limbs, block * 16, sums,
                                                  begin == 0 && is_early, early);
      }
      // RUN neighbours hold the sums of one run.
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) {
#pragma unroll
        for (int offset = RUN / 2; offset > 0; offset /= 2) {
          sums[l] += __shfl_xor_sync(~0u, sums[l], offset);
        }
        if (inside && block % RUN == 0 && l < p.limbs) {
          run_sums[block / RUN * kPadded + row * p.limbs + l] = sums[l];
        }
      }
    }
    for (int i = threadIdx.x; i < kUnit; i += blockDim.x) zeros[i] = from_float<T>(0.0f);
    for (int i = threadIdx.x; i < count * kRuns * kPadded; i += blockDim.x) {
      if (i % kPadded >= columns) run_sums[i] = 0.0f;
    }
  }
  if (mine > 0) {
    share(0);
    fetch_at.advance(step_tiles, step_chunks, count);
    if (mine > 1) fetch(fetch_at);
  }
  __syncthreads();

  const bool shifted = w.scheme != Scheme::Symmetric;
  const T kind{};
  int done = 0;  // units of this warp
  int slot = 0;  // of unit `done`
  for (int round = tile_begin; round < tile_end; round += p.round_tiles) {
    const int tiles = min(p.round_tiles, tile_end - round);
    float acc[TILES][4] = {};
    while (done < mine && at.tile < round + tiles) {
      const int ahead = done + p.stages - 1;
      if (ahead < mine) {
        issue(issue_at, slot == 0 ? p.stages - 1 : slot - 1);
        issue_at.advance(step_tiles, step_chunks, count);
      }
      copy_async_commit();
      if (done + 1 < mine) {
        share((done + 1) & 1);
        fetch_at.advance(step_tiles, step_chunks, count);
        if (done + 2 < mine) fetch(fetch_at);
      }
      // All but the stages - 1 youngest groups have landed: unit `done` is there.
      if (p.stages >= 4) {
        copy_async_wait<3>();
      } else if (p.stages == 3) {
        copy_async_wait<2>();
      } else {
        copy_async_wait<1>();
      }
      __syncwarp();

      const unsigned char* codes = ring + slot * kSlotBytes + g * kUnitBytes;
      const float2* unit_pairs = pairs + (done & 1) * (kRuns * kDecodeRows) + g;
      const float* unit_sums = run_sums + at.chunk * (kRuns * kPadded) + 2 * t;
      const T* x[TILES];
#pragma unroll
      for (int tc = 0; tc < TILES; ++tc) {
        x[tc] =
            (tc * 8 + g < columns ? staged + (tc * 8 + g) * p.x_row + at.chunk * kUnit : zeros) +
            t * RUN * 4;
      }
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const int byte = run * kRunBytes + t * kLaneBytes;
        const unsigned char* source = codes + (((byte / 16) ^ (g * kSwizzle & 7)) * 16) + byte % 16;
        uint32_t a[2][RUN][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t v[kLaneWords];
          const unsigned char* from = source + half * 8 * kUnitBytes;
          load_codes<kLaneBytes>(from, v);
          unpack_codes<T, BITS, RUN>(v, a[half]);
        }
        const float2 low = unit_pairs[run * kDecodeRows];
        const float2 high = unit_pairs[run * kDecodeRows + 8];
#pragma unroll
        for (int tc = 0; tc < TILES; ++tc) {
          uint32_t b[RUN * 2];
          const T* from = x[tc] + run * RUN * 16;
          load_inputs<RUN>(from, b);
          float sum[4] = {};
#pragma unroll
          for (int j = 0; j < RUN; ++j) {
            mma(sum, a[0][j][0], a[1][j][0], a[0][j][1], a[1][j][1], b[2 * j], b[2 * j + 1], kind);
          }
          acc[tc][0] = fmaf(low.x, sum[0], acc[tc][0]);
          acc[tc][1] = fmaf(low.x, sum[1], acc[tc][1]);
          acc[tc][2] = fmaf(high.x, sum[2], acc[tc][2]);
          acc[tc][3] = fmaf(high.x, sum[3], acc[tc][3]);
          if (shifted) {
            const float2 ones =
                *reinterpret_cast<const float2*>(unit_sums + run * kPadded + tc * 8);
            acc[tc][0] = fmaf(low.y, ones.x, acc[tc][0]);
            acc[tc][1] = fmaf(low.y, ones.y, acc[tc][1]);
            acc[tc][2] = fmaf(high.y, ones.x, acc[tc][2]);
            acc[tc][3] = fmaf(high.y, ones.y, acc[tc][3]);
          }
        }
      }
      const int tile = at.tile;
      const int chunk = at.chunk;
      at.advance(step_tiles, step_chunks, count);
      ++done;
      slot = slot + 1 == p.stages ? 0 : slot + 1;
      if (at.tile != tile || done == mine) {
        // The tile's last unit of this warp: its sums go to a slot of their own. A tile's units
        // fall on warps in turn, so chunk % slots names each warp once.
        float* own = partials + (tile - round) * tile_sums + chunk % slots * columns * kDecodeRows;
#pragma unroll
        for (int tc = 0; tc < TILES; ++tc) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = tc * 8 + 2 * t + (i & 1);
            if (column < columns) own[column * kDecodeRows + g + (i / 2) * 8] = acc[tc][i];
            acc[tc][i] = 0.0f;
          }
        }
      }
      __syncwarp();  // before the next copies overwrite what other lanes were reading
    }

    __syncthreads();
    for (int i = threadIdx.x; i < tiles * kDecodeRows * p.m; i += blockDim.x) {
      const int j = i / (kDecodeRows * p.m);
      const int m = i / kDecodeRows - j * p.m;
      const int64_t n = static_cast<int64_t>(round + j) * kDecodeRows + i % kDecodeRows;
      const float* from = partials + j * tile_sums + m * p.limbs * kDecodeRows + i % kDecodeRows;
      float value = 0.0f;
      float factor = 1.0f;
      for (int l = 0; l < p.limbs; ++l, factor *= kLimbStep) {
        float sum = 0.0f;
#pragma unroll 8
        for (int s = 0; s < slots; ++s) sum += from[(s * columns + l) * kDecodeRows];
        value = fmaf(sum, factor, value);
      }
      if (n < w.rows) {
        if (p.partial != nullptr) {
          p.partial[(static_cast<int64_t>(blockIdx.y) * p.m + m) * w.rows + n] = value;
        } else {
          const int64_t o = m * w.rows + n;
          if (p.type == Float::F32) {
            if (p.bias != nullptr) value += __ldg(static_cast<const float*>(p.bias) + n);
            static_cast<float*>(p.out)[o] = value;
          } else {
            if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[n]);
            static_cast<T*>(p.out)[o] = from_float<T>(value);
          }
        }
      }
    }
    if (round + p.round_tiles < tile_end) __syncthreads();
  }
}

template <typename T, int BITS, int RUN, int TILES>
void launch_decode_kernel(const char* op, const DecodePlan& plan, cudaStream_t stream) {
  const auto kernel = decode_kernel<T, BITS, RUN, TILES>;
  check_cuda(
      op, "asking for shared memory",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes));
  kernel<<<dim3(plan.blocks, plan.splits), plan.threads, plan.shared_bytes, stream>>>(plan.params);
  check_launch(op);
}

template <typename T>
void launch_decode(const char* op, const DecodePlan& plan, cudaStream_t stream) {
  const DecodeParams& p = plan.params;
  const int run = run_of(p.w.group_size, p.w.groups);
  const bool one_tile = p.m * p.limbs <= 8;
  dispatch_bits(p.w.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    const auto with_run = [&](auto r) {
      constexpr int kRun = decltype(r)::value;
      if (one_tile) {
        launch_decode_kernel<T, kBits, kRun, 1>(op, plan, stream);
      } else {
        launch_decode_kernel<T, kBits, kRun, 2>(op, plan, stream);
      }
    };
    if (run == 4) {
      with_run(std::integral_constant<int, 4>{});
    } else if (run == 2) {
      with_run(std::integral_constant<int, 2>{});
    } else {
      with_run(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace mkrs::cuda
