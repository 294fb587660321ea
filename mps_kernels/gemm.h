// The tile kernel behind dequant_matmul (prefill) and dequant_matmul_t: 8x8 simdgroup matrices.
//
// Floor: 2 * M * N * K operations over the matrix rate; codes are read ceil(M / BM) times.
// 128 threads compute BM x 32 outputs from 32 deep slices. Each thread dequantizes 8 codes of a
// slice into threadgroup memory. Tiles are float whatever the activation: weights are then exactly
// those that dequantize writes (half would lose small scales, bfloat 8 bits of 24), and only
// simdgroup_float8x8 is needed, which every Apple7 GPU and later has.
#pragma once

#include "format.h"

constant constexpr int GEMM_THREADS = 128;
constant constexpr int TILE = 32;        // outputs across, and depth of a slice
constant constexpr int LINE = TILE + 4;  // rows padded by 16 bytes against bank conflicts

// How 4 simdgroups share BM x 32 outputs: 2 x 2 from 32 rows on, else side by side.
template <int BM>
struct Tiling {
  static constant constexpr int ROWS = BM >= 32 ? 2 : 1;  // simdgroups along M
  static constant constexpr int FM = BM / 8 / ROWS;       // 8x8 fragments of a simdgroup
  static constant constexpr int FN = TILE / 8 / (4 / ROWS);
};

// TRANSPOSED false: out[m, n] = sum_k x[m, k] * w[n, k]
// TRANSPOSED true:  out[m, k] = sum_n x[m, n] * w[n, k]
// `depth_begin`..`depth_end` is the part of the sum that this threadgroup takes (split-K).
template <typename T, typename O, typename S, int BITS, int SCHEME, bool ALIGNED, int BM,
          bool TRANSPOSED>
inline void gemm_tile(device const uchar* codes, device const S* scale,
                      device const typename ZeroType<SCHEME, S>::type* zero, device const T* x,
                      device const T* bias, device O* out, int2 shape, int2 layout, int2 strides,
                      int2 input, bool has_bias, int depth_begin, int depth_end, uint2 group,
                      uint thread_index, uint simdgroup, threadgroup float* memory) {
  const int rows = shape.x, columns = shape.y, M = input.x;
  const int outputs = TRANSPOSED ? columns : rows;
  const int m0 = int(group.y) * BM, o0 = int(group.x) * TILE;
  const int tid = int(thread_index);
  threadgroup float* x_tile = memory;
  threadgroup float* w_tile = memory + BM * LINE;

  typedef Tiling<BM> Tiles;
  const int fragment_m = (int(simdgroup) % Tiles::ROWS) * Tiles::FM * 8;
  const int fragment_o = (int(simdgroup) / Tiles::ROWS) * Tiles::FN * 8;
  simdgroup_float8x8 sums[Tiles::FM][Tiles::FN];
  UNROLL
  for (int i = 0; i < Tiles::FM; i++) {
    UNROLL
    for (int j = 0; j < Tiles::FN; j++)
      sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }

  for (int d0 = depth_begin; d0 < depth_end; d0 += TILE) {
    for (int i = tid; i < BM * TILE; i += GEMM_THREADS) {
      const int m = i / TILE, d = i % TILE;
      const bool inside = m0 + m < M && d0 + d < depth_end;
      x_tile[m * LINE + d] =
          inside ? float(x[ulong(m0 + m) * ulong(input.y) + ulong(d0 + d)]) : 0.0f;
    }
    {
      // 32 rows of 4 pieces: one for each thread.
      const int r = tid / 4, c = tid % 4 * PIECE;
      const int row = (TRANSPOSED ? d0 : o0) + r, k = (TRANSPOSED ? o0 : d0) + c;
      const int row_end = TRANSPOSED ? depth_end : rows;
      const ulong safe_row = ulong(row < row_end ? row : 0);
      float weights[PIECE];
      dequantize_piece<S, BITS, SCHEME, ALIGNED>(
          codes + safe_row * ulong(layout.x), scale + safe_row * ulong(strides.x),
          zero + safe_row * ulong(strides.y), row < row_end ? k : columns, columns, layout.y,
          weights);
      UNROLL
      for (int i = 0; i < PIECE; i++) w_tile[r * LINE + c + i] = weights[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int d = 0; d < TILE; d += 8) {
      simdgroup_float8x8 a[Tiles::FM], b[Tiles::FN];
      UNROLL
      for (int i = 0; i < Tiles::FM; i++) {
        simdgroup_load(a[i], x_tile + (fragment_m + 8 * i) * LINE + d, LINE);
      }
      UNROLL
      for (int j = 0; j < Tiles::FN; j++) {
        if (TRANSPOSED) {
          simdgroup_load(b[j], w_tile + d * LINE + fragment_o + 8 * j, LINE);
        } else {
          simdgroup_load(b[j], w_tile + (fragment_o + 8 * j) * LINE + d, LINE, ulong2(0, 0), true);
        }
      }
      UNROLL
      for (int i = 0; i < Tiles::FM; i++) {
        UNROLL
        for (int j = 0; j < Tiles::FN; j++) {
          simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Through threadgroup memory, so that edges are cut and the output is written in rows.
  UNROLL
  for (int i = 0; i < Tiles::FM; i++) {
    UNROLL
    for (int j = 0; j < Tiles::FN; j++) {
      simdgroup_store(sums[i][j], memory + (fragment_m + 8 * i) * LINE + fragment_o + 8 * j, LINE);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = tid; i < BM * TILE; i += GEMM_THREADS) {
    const int m = i / TILE, o = i % TILE;
    if (m0 + m < M && o0 + o < outputs) {
      float value = memory[m * LINE + o];
      if (has_bias) value += float(bias[o0 + o]);
      out[ulong(m0 + m) * ulong(outputs) + ulong(o0 + o)] = O(value);
    }
  }
}

// The part of `depth` that slice `part` of `parts` sums; whole slices of TILE.
inline int2 depth_part(int depth, int part, int parts) {
  const int slices = (depth + TILE - 1) / TILE;
  const int each = (slices + parts - 1) / parts * TILE;
  const int begin = min(part * each, depth);
  return int2(begin, min(begin + each, depth));
}
