// Floor: codes and scales read once over the memory bandwidth. At 4 bits an H100 then has to take
// in about 20 weights a clock and multiprocessor; every instruction a warp spends on a weight of
// each lane costs 4% of its issue slots.
//
// - Codes and scales stream through private rings of asynchronous copies, a unit of 16 rows x 512 k
//   at a time, so that no barrier stands between memory and the tensor cores. (The bulk copy engine
//   was slower: boxes that a warp can own are too small for it, some 200 cycles each.)
// - Codes become exact integers (stream_operands.cuh), the 16-row operand of m16n8k16; activations
//   are its 8 columns, or the 16 of two products. Weights are never rounded: scales and shifts are
//   applied to the f32 sums of runs of k inside one group, scale * sum(integer * x) + shift *
//   sum(x).
// - With fewer than 8 input rows the spare columns hold other runs: column n carries input row
//   n % COLS of run n / COLS of a block of 8 / COLS runs, and zeros elsewhere. One product then
//   still covers 256 weights, but sums are scaled once in 8 / COLS runs, and each lane needs the
//   scales of its own runs only.
// - A block's tiles, cut into units of 512 k, form one sequence of which each warp takes a
//   contiguous part, so that warps meet once, in the end, to add the sums of tiles they share in a
//   fixed order. Where the activations do not fit into shared memory, or the rows are few, K is
//   also split over the blocks of a cluster, which add up through distributed shared memory.
// - The kernel may be launched while the one before it still runs. Until that is complete, nothing
//   is read but into L2, where codes and scales then wait: every write passes through L2, so that
//   what is loaded afterwards cannot be stale.
#pragma once

#include "hopper.cuh"
#include "stream_operands.cuh"

namespace mkrs::cuda {

constexpr int kStreamLeastShared = 116 * 1024;

// Units of a warp that are asked into L2 while the kernel before may still run. Fewer where that
// kernel's block still works beside this one's.
template <int BITS, int WARPS>
constexpr int kStreamAhead = WARPS == kStreamLightWarps ? (BITS == 2 ? 2 : 1)
                             : BITS == 8                ? 2
                                                        : 24 / (2 * BITS);

// COLS: input rows, rounded up to 1, 4, 8 or 16.
template <typename T, int BITS, int RUN, int COLS, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, stream_is_light(COLS, WARPS) ? 2 : 1)
    stream_kernel(const StreamParams p) {
#if defined(MKRS_SM90)
  constexpr int kBoxes = BITS / 2;         // of a unit
  constexpr int kRuns = kStreamRuns<RUN>;  // of a unit
  constexpr int kUnitBytes = kStreamUnitBytes<BITS>;
  constexpr int kBoxRuns = kRuns / kBoxes;
  constexpr int kRunBytes = 2 * RUN * BITS;  // of a row
  constexpr int kLaneBytes = kRunBytes / 4;
  constexpr int kLaneWords = (RUN * BITS + 7) / 8;
  constexpr int kColumnTiles = COLS > 8 ? COLS / 8 : 1;
  constexpr int kSpread = COLS > 8 ? 1 : 8 / COLS;  // runs side by side in the columns
  constexpr int kChains = kSpread > 1 ? 2 : 1;      // independent sums, against latency
  constexpr int kPer = kRuns / 2;  // scales that a lane prepares: half a row of a unit
  constexpr int kPitch = kStreamPairPitch<RUN, COLS>;
  constexpr int kThreads = WARPS * 32;
  extern __shared__ __align__(1024) unsigned char shared[];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const QuantizedWeight& w = p.w;
  const StreamLayout at = stream_layout<BITS, RUN, COLS, WARPS>(p);

  const int first_chunk = blockIdx.y * p.split_chunks;
  const int count = min(p.split_chunks, p.chunks - first_chunk);
  // Shares of the first ones are larger by one; divisions by what only the host knows would keep
  // the first requests waiting.
  const int block = blockIdx.x;
  const int tile_begin = block * p.block_tiles + min(block, p.larger_blocks);
  const int tiles = p.block_tiles + (block < p.larger_blocks ? 1 : 0);
  const int units = tiles * count;
  // Of the block's units, in the order of tiles and of chunks in a tile.
  const int share_units = units / WARPS;
  const int larger_shares = units % WARPS;
  const int begin = warp * share_units + min(warp, larger_shares);
  const int mine = share_units + (warp < larger_shares ? 1 : 0);
  const Cursor start{tile_begin + begin / count, begin % count};

  // ---- the stream of codes and scales ----
  const bool affine = w.scheme == Scheme::Affine;
  const bool asymmetric = w.scheme == Scheme::Asymmetric;
  const int pair_row = lane / 2;  // scales of half a row of a unit are a lane's to prepare
  const int pair_run = lane % 2 * kPer;
  const int element_bytes = w.scale_type == Float::F32 ? 4 : 2;
  const int zero_element_bytes = asymmetric ? 1 : element_bytes;
  const int64_t row_bytes = (w.in_features * BITS + 7) / 8;
  const int whole_tiles = static_cast<int>(w.rows / kStreamTile);
  const int whole_chunks = static_cast<int>(row_bytes / (kBoxes * 128));
  {                                       // the first units' way into L2, where they are whole
    constexpr int kSectors = kBoxes * 4;  // of 32 bytes, in a row of a unit
    constexpr int kStep = 32 / kSectors;  // rows of a warp's requests
    const uint8_t* lane_sector = w.codes + lane / kSectors * w.codes_stride + lane % kSectors * 32;
    const int64_t step = kStep * w.codes_stride;
    if (mine > 0 && start.tile * kStreamTile + pair_row < w.rows) {  // scales of two units or more
      const int64_t row = start.tile * kStreamTile + pair_row;
      const int64_t group = int64_t{(first_chunk + start.chunk) * kRuns} >> p.run_shift;
      if (p.scale_bytes > 0 && lane % 2 == 0) {
        prefetch_l2(static_cast<const char*>(w.scale) +
                    (row * w.scale_stride + group) * element_bytes);
      } else if (p.zero_bytes > 0) {
        prefetch_l2(static_cast<const char*>(w.zero) +
                    (row * w.zero_stride + group) * zero_element_bytes);
      }
    }
    Cursor ahead = start;
#pragma unroll 1
    for (int u = 0; u < min(mine, kStreamAhead<BITS, WARPS>); ++u) {
      if (ahead.tile < whole_tiles && first_chunk + ahead.chunk < whole_chunks) {
        const uint8_t* sector = lane_sector + int64_t{ahead.tile} * kStreamTile * w.codes_stride +
                                int64_t{first_chunk + ahead.chunk} * (kBoxes * 128);
#pragma unroll
        for (int i = 0; i < kStreamTile / kStep; ++i) {
          prefetch_l2(sector);
          sector += step;
        }
      }
      ahead.advance(0, 1, count);
    }
  }
  wait_for_previous();
  let_next_start();
  const int copy_row = lane / 8;  // and 4, 8, 12 rows below
  const int copy_byte = lane % 8 * 16;
  const int64_t four_rows = 4 * w.codes_stride;
  const uint32_t ring = shared_address(shared) + warp * p.stages * kUnitBytes;
  const uint32_t ring_even = ring + copy_row * 128 + (copy_byte ^ copy_row * 16);
  const uint32_t ring_odd = ring + (copy_row + 4) * 128 + (copy_byte ^ (copy_row + 4) * 16);
  const int raw_lane = at.raw + (warp * p.stages * 32 + lane) * p.raw_bytes;
  Cursor ask_at = start;
  // Of the unit to ask for, moved on with ask_at: the lane's first codes, scale and zero.
  const int64_t start_row = int64_t{start.tile} * kStreamTile;
  const int64_t start_chunk = first_chunk + start.chunk;
  const int64_t start_group = (start_chunk * kRuns + pair_run) >> p.run_shift;
  const int chunk_groups = kRuns >> p.run_shift;
  const uint8_t* source =
      w.codes + (start_row + copy_row) * w.codes_stride + start_chunk * (kBoxes * 128) + copy_byte;
  const char* scale_source =
      static_cast<const char*>(w.scale) +
      ((start_row + pair_row) * w.scale_stride + start_group) * element_bytes;
  const char* zero_source =
      static_cast<const char*>(w.zero) +
      ((start_row + pair_row) * w.zero_stride + start_group) * zero_element_bytes;
  // From the end of a tile's units to the next tile.
  const int64_t next_codes = 4 * four_rows - int64_t{count} * (kBoxes * 128);
  const int64_t next_scale =
      (kStreamTile * w.scale_stride - int64_t{count} * chunk_groups) * element_bytes;
  const int64_t next_zero =
      (kStreamTile * w.zero_stride - int64_t{count} * chunk_groups) * zero_element_bytes;
  // The usual form of scales, which needs no loop over what a lane copies.
  const bool eights = p.scale_bytes == 8 && (p.zero_bytes == 8 || p.zero_bytes == 0);
  int asked = 0;
  int ask_slot = 0;
  const auto ask = [&] {  // for the next unit
    if (asked < mine) {
      const uint32_t even = ring_even + ask_slot * kUnitBytes;
      const uint32_t odd = ring_odd + ask_slot * kUnitBytes;
      const uint32_t raw = shared_address(shared) + raw_lane + ask_slot * (32 * p.raw_bytes);
      const bool whole = ask_at.tile < whole_tiles && first_chunk + ask_at.chunk < whole_chunks;
      if (whole) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int b = 0; b < kBoxes; ++b) {
            copy_async_16((i % 2 ? odd : even) + i / 2 * 1024 + b * kStreamBoxBytes,
                          source + i * four_rows + b * 128);
          }
        }
      } else {
        const int64_t here = row_bytes - int64_t{first_chunk + ask_at.chunk} * (kBoxes * 128);
        for (int i = 0; i < 4; ++i) {
          const bool inside = int64_t{ask_at.tile} * kStreamTile + copy_row + 4 * i < w.rows;
          for (int b = 0; b < kBoxes; ++b) {
            const int64_t left = inside ? here - b * 128 - copy_byte : 0;
            const int valid = static_cast<int>(max(int64_t{0}, min(int64_t{16}, left)));
            copy_async((i % 2 ? odd : even) + i / 2 * 1024 + b * kStreamBoxBytes,
                       valid > 0 ? reinterpret_cast<const char*>(source + i * four_rows + b * 128)
                                 : reinterpret_cast<const char*>(w.codes),
                       16, valid);
          }
        }
      }
      if (whole && eights) {
        copy_async(raw, scale_source, 8, 8);
        if (p.zero_bytes > 0) copy_async(raw + 8, zero_source, 8, 8);
      } else if (p.raw_bytes > 0) {
        const int group = ((first_chunk + ask_at.chunk) * kRuns + pair_run) >> p.run_shift;
        const int left = ask_at.tile * kStreamTile + pair_row < w.rows
                             ? max(0, static_cast<int>(w.groups) - group)
                             : 0;
        copy_async(raw, left > 0 ? scale_source : static_cast<const char*>(w.scale), p.scale_bytes,
                   min(p.scale_bytes, left * element_bytes));
        if (p.zero_bytes > 0) {
          copy_async(raw + p.scale_bytes, left > 0 ? zero_source : static_cast<const char*>(w.zero),
                     p.zero_bytes, min(p.zero_bytes, left * zero_element_bytes));
        }
      }
      source += kBoxes * 128;
      scale_source += chunk_groups * element_bytes;
      zero_source += chunk_groups * zero_element_bytes;
      if (++ask_at.chunk == count) {
        ask_at.chunk = 0;
        ++ask_at.tile;
        source += next_codes;
        scale_source += next_scale;
        zero_source += next_zero;
      }
      ask_slot = ask_slot + 1 == p.stages ? 0 : ask_slot + 1;
      ++asked;
    }
    copy_async_commit();  // also when empty: the counting of units goes on
  };
  const auto arrive = [&] {  // waits for the oldest unit asked for
    if (p.stages == 2) {
      copy_async_wait<1>();
    } else if (p.stages == 3) {
      copy_async_wait<2>();
    } else {
      copy_async_wait<3>();
    }
    __syncwarp();
  };

  // ---- scales: shared with the warp as (scale, shift) ----
  uint32_t raw_scale[kPer];
  uint32_t raw_zero[kPer];
  Cursor fetch_at = start;
  const auto fetch = [&] {  // a unit ahead, where asynchronous copies cannot bring them
    const int row = fetch_at.tile * kStreamTile + pair_row;
    const int run = (first_chunk + fetch_at.chunk) * kRuns + pair_run;  // of the whole row
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      // Zeros where there is no group, so that staged zeros meet finite numbers.
      RawGroup raw{0, 0};
      const int k = (run + i) * (16 * RUN);
      if (row < w.rows && k < w.in_features) raw = load_group(w, row, k >> p.shift);
      raw_scale[i] = raw.scale;
      raw_zero[i] = raw.zero;
    }
    fetch_at.advance(0, 1, count);
  };
  unsigned char* pairs = shared + at.pairs + warp * kStreamPairBytes<RUN, COLS>;
  const auto share = [&](int slot) {
    if (p.raw_bytes > 0) {
      const unsigned char* from = shared + raw_lane + slot * (32 * p.raw_bytes);
      const unsigned char* zeros = from + p.scale_bytes;
#pragma unroll
      for (int i = 0; i < kPer; ++i) raw_scale[i] = raw_zero[i] = 0;
      if (kPer == 4 && p.run_shift == 0 && element_bytes == 2 && !asymmetric) {
        const uint2 s = *reinterpret_cast<const uint2*>(from);
        raw_scale[0] = s.x & 0xffffu, raw_scale[1] = s.x >> 16;
        raw_scale[2] = s.y & 0xffffu, raw_scale[3] = s.y >> 16;
        if (affine) {
          const uint2 z = *reinterpret_cast<const uint2*>(zeros);
          raw_zero[0] = z.x & 0xffffu, raw_zero[1] = z.x >> 16;
          raw_zero[2] = z.y & 0xffffu, raw_zero[3] = z.y >> 16;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          const int j = i >> p.run_shift;
          raw_scale[i] = element_bytes == 4 ? reinterpret_cast<const uint32_t*>(from)[j]
                                            : reinterpret_cast<const unsigned short*>(from)[j];
          if (asymmetric) {
            raw_zero[i] = zeros[j];
          } else if (affine) {
            raw_zero[i] = element_bytes == 4 ? reinterpret_cast<const uint32_t*>(zeros)[j]
                                             : reinterpret_cast<const unsigned short*>(zeros)[j];
          }
        }
      }
    }
    constexpr float kCenter = kStreamCenter<T, BITS>;
    float2 pair[kPer];
    const auto convert = [&](Float type) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        pair[i].x = raw_to_float(raw_scale[i], type);
        if (affine) {
          pair[i].y = fmaf(pair[i].x, kCenter, raw_to_float(raw_zero[i], type));
        } else if (asymmetric) {
          // Small integers as floats: 2**23 + zero is exact.
          const float point = __uint_as_float(0x4b000000u | raw_zero[i]) - 8388608.0f;
          pair[i].y = pair[i].x * (kCenter - point);
        } else {
          pair[i].y = pair[i].x * (kCenter - (1 << (BITS - 1)));
        }
      }
    };
    if (w.scale_type == Float::F16) {
      convert(Float::F16);
    } else if (w.scale_type == Float::BF16) {
      convert(Float::BF16);
    } else {
      convert(Float::F32);
    }
    float4* to = reinterpret_cast<float4*>(pairs + pair_row * kPitch + pair_run * 8);
#pragma unroll
    for (int i = 0; i < kPer / 2; ++i) {
      to[i] = make_float4(pair[2 * i].x, pair[2 * i].y, pair[2 * i + 1].x, pair[2 * i + 1].y);
    }
  };
  if (p.raw_bytes == 0 && mine > 0) fetch();

  const int first_k = first_chunk * kStreamUnit;
  float* run_sums = reinterpret_cast<float*>(shared + at.sums);
  stage_inputs<T, BITS, RUN, COLS, WARPS>(p, at, shared, count, first_k, [&] {
    for (int i = 0; i < p.stages; ++i) ask();
  });
  __syncthreads();

  const bool shifted = kStreamCenter<T, BITS> < 0.0f || w.scheme != Scheme::Symmetric;
  const T kind{};
  // Which weight row a lane's operand row is: lanes that read together take rows whose swizzle
  // differs where it matters.
  const int row = kRunBytes == 32   ? (g << 1 | g >> 2) & 7
                  : kRunBytes == 64 ? (g << 2 | g >> 1) & 7
                                    : g;
  const int lane_offset =
      row * 128 + ((row * 16) ^ (t * kLaneBytes / 16 * 16)) + t * kLaneBytes % 16;
  const int ring_offset = warp * p.stages * kUnitBytes + lane_offset;
  const int my_row = g % COLS;  // input row of this lane's column
  const int x_lane = at.x + (my_row * p.x_row + t * (RUN * 4)) * 2;
  const int x_eight_rows = 16 * p.x_row;  // bytes
  const int zero_lane = at.zeros + t * (RUN * 8);
  const unsigned char* lane_pairs = pairs + row * kPitch + (COLS < 8 ? 2 * t / COLS : 0) * 8;
  const float* lane_sums = run_sums + 2 * t;

  const bool clustered = gridDim.y > 1;
  float* totals = reinterpret_cast<float*>(shared + at.totals);  // of a cluster's part of K
  // A result of input row m and weight row n, its sum complete.
  const auto finish = [&](float value, int m, int64_t n) {
    if (n >= w.rows) return;
    if (p.bias != nullptr) value += to_float(static_cast<const T*>(p.bias)[n]);
    static_cast<T*>(p.out)[m * w.rows + n] = from_float<T>(value);
  };
  // Calls f(value, m, row of the tile) for each of the lane's sums.
  const auto each = [&](const auto& from, const auto& f) {
#pragma unroll
    for (int j = 0; j < 4 * kColumnTiles; ++j) {
      const int c = j / 4;
      const int i = j % 4;
      const int column = 8 * c + 2 * t + (i & 1);
      if (column < p.m && column < COLS) f(from[c][i], column, row + (i / 2) * 8);
    }
  };

  Cursor now = start;
  int slot = 0;  // of the ring
  float acc[kColumnTiles][4] = {};
  float first[kColumnTiles][4] = {};  // sums of the first tile, which an earlier warp may share
  for (int done = 0; done < mine; ++done) {
    arrive();
    share(slot);
    __syncwarp();
    if (p.raw_bytes == 0 && done + 1 < mine) fetch();
    const int x_unit = x_lane + now.chunk * (kStreamUnit * 2);
    const float* unit_sums = lane_sums + now.chunk * (kRuns * COLS);
    float sum[kColumnTiles][kChains][4];
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (r % kSpread == 0) {
#pragma unroll
        for (int i = 0; i < kColumnTiles * kChains * 4; ++i) (&sum[0][0][0])[i] = 0.0f;
      }
      constexpr int kMask = kRunBytes >= 16 ? ~0 : ~15;
      const int run_byte = r % kBoxRuns * kRunBytes;
      const unsigned char* codes = shared +
                                   ((ring_offset + slot * kUnitBytes) ^ (run_byte / 16 * 16)) +
                                   (run_byte & ~kMask) + r / kBoxRuns * kStreamBoxBytes;
      uint32_t a[2][RUN][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t v[kLaneWords];
        const unsigned char* from = codes + half * 8 * 128;
        load_codes<kLaneBytes>(from, v);
        stream_codes<T, BITS, RUN>(v, a[half]);
      }
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c) {
        uint32_t b[RUN * 2];
        const bool used = my_row + 8 * c < p.m && g / COLS == r % kSpread;
        const unsigned char* x =
            shared + (used ? x_unit + c * x_eight_rows : zero_lane) + r * (RUN * 32);
        load_inputs<RUN>(x, b);
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
          mma(sum[c][j % kChains], a[0][j][0], a[1][j][0], a[0][j][1], a[1][j][1], b[2 * j],
              b[2 * j + 1], kind);
        }
      }
      if (r % kSpread == kSpread - 1) {
        float4 low, high;  // (scale, shift) of columns 2t and 2t + 1
        const unsigned char* from = lane_pairs + (r - (kSpread - 1)) * 8;
        if constexpr (COLS == 1) {
          low = *reinterpret_cast<const float4*>(from);
          high = *reinterpret_cast<const float4*>(from + 8 * kPitch);
        } else {
          const float2 l = *reinterpret_cast<const float2*>(from);
          const float2 h = *reinterpret_cast<const float2*>(from + 8 * kPitch);
          low = make_float4(l.x, l.y, l.x, l.y);
          high = make_float4(h.x, h.y, h.x, h.y);
        }
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) {
          float (&total)[4] = sum[c][0];
          if constexpr (kChains == 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += sum[c][1][i];
          }
          acc[c][0] = fmaf(low.x, total[0], acc[c][0]);
          acc[c][1] = fmaf(low.z, total[1], acc[c][1]);
          acc[c][2] = fmaf(high.x, total[2], acc[c][2]);
          acc[c][3] = fmaf(high.z, total[3], acc[c][3]);
          if (shifted) {
            const float2 ones =
                *reinterpret_cast<const float2*>(unit_sums + (r - (kSpread - 1)) * COLS + 8 * c);
            acc[c][0] = fmaf(low.y, ones.x, acc[c][0]);
            acc[c][1] = fmaf(low.w, ones.y, acc[c][1]);
            acc[c][2] = fmaf(high.y, ones.x, acc[c][2]);
            acc[c][3] = fmaf(high.w, ones.y, acc[c][3]);
          }
        }
      }
    }
    __syncwarp();  // before the next codes and pairs overwrite these
    ask();
    slot = slot + 1 == p.stages ? 0 : slot + 1;
    const int tile = now.tile;
    now.advance(0, 1, count);
    if (now.tile != tile || done + 1 == mine) {
      if constexpr (COLS == 1) {
        acc[0][0] += acc[0][1];
        acc[0][2] += acc[0][3];
      }
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        if (COLS <= 2 * offset && COLS < 8) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[0][i] += __shfl_xor_sync(~0u, acc[0][i], offset);
        }
      }
      const bool is_first = tile == start.tile;
      if (!is_first && done + 1 < mine) {  // all of its units were this warp's
        each(acc, [&](float value, int m, int r) {
          if (clustered) {
            totals[((tile - tile_begin) * p.m + m) * kStreamTile + r] = value;
          } else {
            finish(value, m, static_cast<int64_t>(tile) * kStreamTile + r);
          }
        });
      }
      if (is_first || done + 1 < mine) {
#pragma unroll
        for (int i = 0; i < 4 * kColumnTiles; ++i) {
          if (is_first) first[i / 4][i % 4] = acc[i / 4][i % 4];
          acc[i / 4][i % 4] = 0.0f;
        }
      }
    }
  }

  // ---- tiles that warps share: sums through the rings, which are idle now ----
  const int results = p.m * kStreamTile;  // of a tile
  const auto slot_of = [&](int which, int s) {
    return reinterpret_cast<float*>(shared + which * p.stages * kUnitBytes) + s * results;
  };
  each(first, [&](float value, int m, int r) { slot_of(warp, 0)[m * kStreamTile + r] = value; });
  each(acc, [&](float value, int m, int r) { slot_of(warp, 1)[m * kStreamTile + r] = value; });
  // Whose sums the slots hold, of the block's tiles, or -1. Each warp's pairs are idle now as well.
  const auto slot_tiles = [&](int which) -> int2& {
    return *reinterpret_cast<int2*>(shared + at.pairs + which * kStreamPairBytes<RUN, COLS>);
  };
  if (lane == 0) {
    const int low = start.tile - tile_begin;
    const int high = (begin + mine - 1) / count;
    slot_tiles(warp) = mine > 0 ? make_int2(low, high == low ? -1 : high) : make_int2(-1, -1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tiles * results; i += kThreads) {
    const int tile = COLS == 1 ? i / kStreamTile : static_cast<unsigned>(i) / results;
    const int j = i - tile * results;
    float parts[WARPS];
    bool is_shared = false;
#pragma unroll
    for (int s = 0; s < WARPS; ++s) {  // without branches, so that all of them load at once
      const int2 held = slot_tiles(s);
      const float part = slot_of(s, held.x == tile ? 0 : 1)[j];
      const bool is_part = held.x == tile || held.y == tile;
      parts[s] = is_part ? part : 0.0f;
      is_shared |= is_part;
    }
    float value = parts[0];
#pragma unroll
    for (int s = 1; s < WARPS; ++s) value += parts[s];
    if (!is_shared) continue;  // finished above
    if (clustered) {
      totals[i] = value;
    } else {
      finish(value, j / kStreamTile,
             static_cast<int64_t>(tile_begin + tile) * kStreamTile + j % kStreamTile);
    }
  }
  if (clustered) {
    // Every block of the cluster adds up its share of the results, in the order of k.
    cluster_barrier();
    const int splits = gridDim.y;
    for (int i = threadIdx.x * splits + blockIdx.y; i < tiles * results; i += kThreads * splits) {
      const int tile = COLS == 1 ? i / kStreamTile : static_cast<unsigned>(i) / results;
      const int j = i - tile * results;
      float value = 0.0f;
#pragma unroll 4
      for (int s = 0; s < splits; ++s) {
        value += read_cluster_float(shared_address(totals + i), s);
      }
      finish(value, j / kStreamTile,
             static_cast<int64_t>(tile_begin + tile) * kStreamTile + j % kStreamTile);
    }
    cluster_barrier();  // nobody leaves while others read
  }
#endif
}

template <typename T, int BITS, int RUN, int COLS, int WARPS>
void launch_stream_kernel(const char* op, const StreamPlan& plan, cudaStream_t stream) {
  const StreamParams& p = plan.params;
  const auto kernel = stream_kernel<T, BITS, RUN, COLS, WARPS>;
  // One block a multiprocessor; of heavy kernels also where the next launch's come while this one's
  // leave.
  const int least = stream_is_light(COLS, WARPS) ? 0 : kStreamLeastShared;
  const int shared_bytes = std::max(stream_layout<BITS, RUN, COLS, WARPS>(p).total,
                                    std::min(least, plan.shared_per_block));
  check_cuda(
      op, "asking for shared memory",
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  int blocks = std::min(p.tiles, most_clusters(op, kernel, plan.splits, WARPS * 32, shared_bytes,
                                               plan.multiprocessors));
  if (plan.splits > 1) {
    blocks = std::max(blocks, (p.tiles + p.total_tiles - 1) / p.total_tiles);
  }
  StreamParams params = p;
  params.block_tiles = p.tiles / blocks;
  params.larger_blocks = p.tiles % blocks;
  launch_overlapped(op, kernel, dim3(blocks, plan.splits), WARPS * 32, shared_bytes,
                    dim3(1, plan.splits), stream, params);
}

template <typename T, int BITS>
void launch_stream_bits(const char* op, const StreamPlan& plan, cudaStream_t stream) {
  const StreamParams& p = plan.params;
  dispatch_stream<BITS>(run_of(p.w.group_size, p.w.groups), p.m, plan.light, [&](auto variant) {
    using V = decltype(variant);
    launch_stream_kernel<T, BITS, V::kRun, V::kColumns, V::kWarps>(op, plan, stream);
  });
}

template <typename T>
void launch_stream(const char* op, const StreamPlan& plan, cudaStream_t stream) {
  const int bits = plan.params.w.bits;
  const auto launch = bits == 8   ? launch_stream_bits<T, 8>
                      : bits == 4 ? launch_stream_bits<T, 4>
                                  : launch_stream_bits<T, 2>;
  launch(op, plan, stream);
}

}  // namespace mkrs::cuda
