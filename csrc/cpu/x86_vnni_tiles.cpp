// Many input rows: a tile of codes is unpacked once to a byte per code; lanes run over input rows,
// so a weight is broadcast and sums stay per lane, per group, with no reductions.
//
// Floor: M*N*K*limbs multiply-adds over the vpdpbusd peak (64 a cycle per core on Zen 4, so
// 473 GOP/s for compute="int8", 158 for exact f32, 237 for exact f16 and bf16). Float multiplies
// share the pipes of vpdpbusd: a span of 64 with three limbs takes 48 vpdpbusd and 3 of those, 94%
// of the floor at best; int8 with its spans of 32 takes 16 vpdpbusd and 5 per 64, 76% at best.
// Measured, cache-hot: 84% for exact f32, 65% for int8 from 32 rows on, 49% at 8, where a tile's
// loading (a store of 64 bytes takes 2 cycles) costs a third.
#if defined(__x86_64__)

#include "cpu/x86_vnni.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

MKRS_VNNI_BEGIN

namespace mkrs::cpu::vnni {
namespace {

#define MKRS_HAS_F16C 1
#include "cpu/convert.inc"
#include "cpu/x86_vnni_split.inc"

// Register arrays live in registers only where every loop over them is unrolled.
#define MKRS_UNROLL _Pragma("GCC unroll 24")

#include "cpu/x86_vnni_panels.inc"

// ---- lanes ------------------------------------------------------------------------------------

// The instruction by name: around its intrinsic GCC copies and spills the accumulators, at half the
// speed.

inline void dot(__m512i& sum, __m512i codes, __m512i limb) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(limb));
}

inline __m512i shift8_add(__m512i high, __m512i low) {
  return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

// Sixteen input rows by one weight row.
struct Wide {
  static constexpr int kRows = 1;
  static constexpr int pair(int r) { return r / 2; }  // where the tile keeps row r
  static constexpr int half(int r) { return r % 2; }
  // Four codes, or a scale, of the weight row in every lane.
  static __m512i codes(const uint8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static __m512 real(const float* p) { return _mm512_set1_ps(*p); }
};

// Eight input rows by two weight rows: even lanes hold the first, odd lanes the second.
struct Paired {
  static constexpr int kRows = 2;
  static constexpr int pair(int r) { return r; }
  static constexpr int half(int) { return 0; }
  static __m512i codes(const uint8_t* p) {
    int64_t eight;
    std::memcpy(&eight, p, 8);
    return _mm512_set1_epi64(eight);
  }
  static __m512 real(const float* p) {
    int64_t two;
    std::memcpy(&two, p, 8);
    return _mm512_castsi512_ps(_mm512_set1_epi64(two));
  }
};

// ---- tiles of weights -------------------------------------------------------------------------

constexpr int64_t kTileBytes = 24 * 1024;  // codes, a byte each: most of the smallest L1
// Codes of a tile's row. The tile's rows are a multiple of every kernel's: 24, with three limbs 16.
constexpr int64_t kTall = 256, kLong = 1024, kLongest = 1536;
// Up to so many input rows take long tiles, whose loading costs least; more take tall ones, so that
// the part of the prepared input that all tiles read stays in L2.
constexpr int64_t kFewInputs = 32;
constexpr int64_t kInputBlock = 512;  // input rows that share a tile: sums stay in L2

// Two weight rows side by side: per 64 packed bytes of each, part by part (part p of a byte is its
// p-th code), quads of the first and of the second row in turn. Bytes past the row's end are zero.
template <int BITS>
void unpack_pair(const uint8_t* first, const uint8_t* second, int64_t bytes, uint8_t* out) {
  constexpr int kParts = 8 / BITS;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < bytes; i += 64) {
    __m512i a, b;
    if (bytes - i >= 64) {
      a = _mm512_loadu_si512(first + i);
      b = _mm512_loadu_si512(second + i);
    } else {
      const __mmask64 read = (uint64_t{1} << (bytes - i)) - 1;
      a = _mm512_maskz_loadu_epi8(read, first + i);
      b = _mm512_maskz_loadu_epi8(read, second + i);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      __m512i x = a, y = b;
      if constexpr (kParts > 1) {
        x = _mm512_and_si512(_mm512_srli_epi16(a, p * BITS), mask);
        y = _mm512_and_si512(_mm512_srli_epi16(b, p * BITS), mask);
      }
      _mm512_store_si512(out, _mm512_permutex2var_epi32(x, low, y));
      _mm512_store_si512(out + 64, _mm512_permutex2var_epi32(x, high, y));
      out += 128;
    }
  }
}

inline void unpack_pair(const uint8_t* first, const uint8_t* second, int bits, int64_t bytes,
                        uint8_t* out) {
  bits == 8   ? unpack_pair<8>(first, second, bytes, out)
  : bits == 4 ? unpack_pair<4>(first, second, bytes, out)
              : unpack_pair<2>(first, second, bytes, out);
}

// A tile: rows [n, n + rows) by activations [k, k + depth), depth a multiple of the span but at the
// end. Rows past `rows` hold stale codes, or the last row's, and are never stored.
template <int64_t DEPTH>
struct Tile {
  static constexpr int64_t kDepth = DEPTH;
  static constexpr int64_t kRows = kTileBytes / DEPTH;  // a multiple of every kernel's row count
  static constexpr int64_t kPairBytes = 2 * DEPTH;
  int64_t rows = 0, depth = 0;
  alignas(64) uint8_t codes[kRows / 2][kPairBytes];  // as unpack_pair leaves them
  alignas(64) float scale[kRows / 2][DEPTH / 16][2];
  alignas(64) float shift[kRows / 2][DEPTH / 16][2];
  const uint8_t* ahead = nullptr;  // codes of the next tile, to be prefetched
  int64_t ahead_stride = 0;
  int64_t first_span = 0, row_spans = 0;
  int group_shift = 0;  // span s of the row belongs to group s >> group_shift

  int64_t group(int64_t s) const {
    return ((first_span + s) >> group_shift) - (first_span >> group_shift);
  }
  // Whether the tile's span s is the last of its group; a group's shift is added there.
  bool ends_group(int64_t s) const {
    const int64_t next = first_span + s + 1;
    return next == row_spans || (next & ((int64_t{1} << group_shift) - 1)) == 0;
  }
};

// Sixteen values of two rows, in turn.
inline void store_pairs(float (*out)[2], __m512 first, __m512 second) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_store_ps(out[0], _mm512_permutex2var_ps(first, low, second));
  _mm512_store_ps(out[8], _mm512_permutex2var_ps(first, high, second));
}

// Scales and shifts of groups [g, g + count) of two rows.
template <Float TYPE, Scheme SCHEME>
void load_groups(const QuantizedWeight& weight, const int64_t (&row)[2], int64_t g, int64_t count,
                 float (*scale)[2], float (*shift)[2]) {
  QuantizedWeight w = weight;  // with what the compiler is to know
  w.scale_type = TYPE;
  w.scheme = SCHEME;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first_lanes(count - i);
    const __m512 first = load_scales(w, row[0], g + i, mask);
    const __m512 second = load_scales(w, row[1], g + i, mask);
    store_pairs(scale + i, first, second);
    if constexpr (SCHEME != Scheme::Symmetric) {
      store_pairs(shift + i, load_shifts(w, row[0], g + i, mask, first),
                  load_shifts(w, row[1], g + i, mask, second));
    }
  }
}

using LoadGroups = void (*)(const QuantizedWeight&, const int64_t (&)[2], int64_t, int64_t,
                            float (*)[2], float (*)[2]);

template <Float TYPE>
LoadGroups groups_loader(Scheme scheme) {
  return scheme == Scheme::Symmetric    ? load_groups<TYPE, Scheme::Symmetric>
         : scheme == Scheme::Asymmetric ? load_groups<TYPE, Scheme::Asymmetric>
                                        : load_groups<TYPE, Scheme::Affine>;
}

inline void prefetch_groups(const QuantizedWeight& w, int64_t row, int64_t g, int64_t count) {
  const auto fetch = [&](const void* values, int64_t at, int64_t size) {
    const char* from = static_cast<const char*>(values) + at * size;
    for (int64_t b = 0; b < count * size; b += 64) _mm_prefetch(from + b, _MM_HINT_T1);
  };
  const int64_t size = float_size(w.scale_type);
  fetch(w.scale, row * w.scale_stride + g, size);
  if (w.scheme == Scheme::Affine) fetch(w.zero, row * w.zero_stride + g, size);
  if (w.scheme == Scheme::Asymmetric) fetch(w.zero, row * w.zero_stride + g, 1);
}

template <typename Tile>
void load_tile(const QuantizedWeight& w, int64_t span, int64_t n, int64_t k, Tile& tile) {
  const int span_shift = __builtin_ctzll(static_cast<uint64_t>(span));
  const int64_t bytes = code_bytes(tile.depth, w.bits);
  tile.first_span = k >> span_shift;
  tile.row_spans = ((w.in_features - 1) >> span_shift) + 1;
  // A single group has any length.
  tile.group_shift =
      w.groups == 1 ? 62 : __builtin_ctzll(static_cast<uint64_t>(w.group_size)) - span_shift;
  const int64_t first_group = tile.first_span >> tile.group_shift;
  const int64_t groups = tile.group((tile.depth - 1) >> span_shift) + 1;
  const LoadGroups load = w.scale_type == Float::F32   ? groups_loader<Float::F32>(w.scheme)
                          : w.scale_type == Float::F16 ? groups_loader<Float::F16>(w.scheme)
                                                       : groups_loader<Float::BF16>(w.scheme);
  // What is read next: these rows' next codes, or at their end the next rows' first.
  const bool row_done = k + tile.depth == w.in_features;
  tile.ahead = row_done ? w.codes + (n + Tile::kRows) * w.codes_stride
                        : w.codes + n * w.codes_stride + (k + tile.depth) * w.bits / 8;
  tile.ahead_stride = w.codes_stride;
  for (int64_t r = 0; r < tile.rows; r += 2) {
    const int64_t row[2] = {n + r, std::min(n + r + 1, n + tile.rows - 1)};
    const uint8_t* codes = w.codes + k * w.bits / 8;
    unpack_pair(codes + row[0] * w.codes_stride, codes + row[1] * w.codes_stride, w.bits, bytes,
                tile.codes[r / 2]);
    load(w, row, first_group, groups, tile.scale[r / 2], tile.shift[r / 2]);
    for (const int64_t i : row) {  // these groups of the next rows
      prefetch_groups(w, i + Tile::kRows, first_group, groups);
    }
  }
}

// Where a span's quads are: `parts` runs of `run` quads, 128 bytes apart.
struct Quads {
  int64_t parts, run;
};

// Integer dot products of a span: ROWS tile rows (or pairs of rows) times PANELS panels.
template <typename V, int64_t PAIR_BYTES, int LIMBS, int PANELS, int ROWS>
inline void dot_span(const uint8_t* codes, const char* const (&x)[PANELS], Quads quads,
                     __m512i (&acc)[ROWS][PANELS][LIMBS]) {
  const int64_t tail = quads.parts * quads.run * LIMBS * kVector;
  MKRS_UNROLL for (int r = 0; r < ROWS; ++r) {
    MKRS_UNROLL for (int p = 0; p < PANELS; ++p) {
      MKRS_UNROLL for (int l = 0; l < LIMBS; ++l) {
        acc[r][p][l] = _mm512_load_si512(x[p] + tail + l * kVector);
      }
    }
  }
  int64_t done = 0;  // bytes of the panels
  for (int64_t part = 0; part < quads.parts; ++part) {
    const uint8_t* quad = codes + part * 128;
    const uint8_t* const end = quad + quads.run * 8;
    do {  // a run has at least one quad
      __m512i limb[PANELS][LIMBS];
      MKRS_UNROLL for (int p = 0; p < PANELS; ++p) {
        MKRS_UNROLL for (int l = 0; l < LIMBS; ++l) {
          limb[p][l] = _mm512_load_si512(x[p] + done + l * kVector);
        }
      }
      done += LIMBS * kVector;
      MKRS_UNROLL for (int r = 0; r < ROWS; ++r) {
        const __m512i weight = V::codes(quad + V::pair(r) * PAIR_BYTES + 4 * V::half(r));
        MKRS_UNROLL for (int p = 0; p < PANELS; ++p) {
          MKRS_UNROLL for (int l = 0; l < LIMBS; ++l) dot(acc[r][p][l], weight, limb[p][l]);
        }
      }
      quad += 8;
    } while (quad != end);
  }
}

// The tile times PANELS panels: sums[panel][row or pair][lane].
template <typename V, typename Tile, int LIMBS, int PANELS, int ROWS, bool SHIFTED>
void tile_panels(const Tile& tile, int bits, int64_t span, const char* x, int64_t panel_bytes,
                 float* sums, int64_t sums_stride, bool prefetch) {
  const int64_t bytes = span_bytes(LIMBS, span);
  const int64_t tail = span / 4 * LIMBS * kVector;
  const int64_t parts = 8 / bits;
  const Quads quads{parts, span / (4 * parts)};
  const int64_t span_packed = span / parts;  // bytes of a row's packed codes
  // The next tile's lines, a few a span: all at once they would fill the queue to memory and stall.
  const int64_t lines = Tile::kDepth * bits / 8 / 64;
  const int64_t steps = Tile::kRows / (ROWS * V::kRows) * ((tile.depth + span - 1) / span);
  const int64_t lines_each = prefetch ? (Tile::kRows * lines + steps - 1) / steps : 0;
  const uint8_t* ahead = tile.ahead;
  int64_t line = 0;
  for (int64_t block = 0; block * V::kRows < tile.rows; block += ROWS) {
    const int64_t pair = block * V::kRows / 2;
    float* out = sums + block * kPanel;
    // One limb leaves registers for the sums, and needs them: its spans are short.
    constexpr bool kInRegisters = LIMBS == 1;
    __m512 total[ROWS][PANELS];
    if constexpr (kInRegisters) {
      MKRS_UNROLL for (int r = 0; r < ROWS; ++r) {
        MKRS_UNROLL for (int p = 0; p < PANELS; ++p) {
          total[r][p] = _mm512_load_ps(out + p * sums_stride + r * kPanel);
        }
      }
    }
    for (int64_t s = 0; s * span < tile.depth; ++s) {
      const char* in[PANELS];
      MKRS_UNROLL for (int p = 0; p < PANELS; ++p) in[p] = x + p * panel_bytes + s * bytes;
      for (int64_t i = 0; i < lines_each; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + 64 * line), _MM_HINT_T1);
        if (++line == lines) {
          line = 0;
          ahead += tile.ahead_stride;
        }
      }
      const int64_t packed = s * span_packed;
      const int64_t group = tile.group(s);
      __m512i acc[ROWS][PANELS][LIMBS];
      dot_span<V, Tile::kPairBytes, LIMBS, PANELS, ROWS>(
          tile.codes[pair] + packed / 64 * 128 * parts + 2 * (packed % 64), in, quads, acc);
      MKRS_UNROLL for (int p = 0; p < PANELS; ++p) {
        const __m512 input_scale = _mm512_load_ps(in[p] + tail + LIMBS * kVector);
        MKRS_UNROLL for (int r = 0; r < ROWS; ++r) {
          __m512 value;
          if constexpr (LIMBS == 1) {
            value = _mm512_cvtepi32_ps(acc[r][p][0]);
          } else if constexpr (LIMBS == 2) {
            value = _mm512_cvtepi32_ps(shift8_add(acc[r][p][0], acc[r][p][1]));
          } else {
            value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][p][0]), _mm512_set1_ps(65536.0f),
                                    _mm512_cvtepi32_ps(shift8_add(acc[r][p][1], acc[r][p][2])));
          }
          const __m512 scale = V::real(tile.scale[pair + V::pair(r)][group] + V::half(r));
          float* sum = out + p * sums_stride + r * kPanel;
          if constexpr (!kInRegisters) total[r][p] = _mm512_load_ps(sum);
          total[r][p] = _mm512_fmadd_ps(value, _mm512_mul_ps(input_scale, scale), total[r][p]);
          if constexpr (!kInRegisters && !SHIFTED) _mm512_store_ps(sum, total[r][p]);
        }
        if constexpr (SHIFTED) {
          const bool ends = tile.ends_group(s);
          const __m512 input_sum = _mm512_load_ps(in[p] + tail + (LIMBS + 1) * kVector);
          MKRS_UNROLL for (int r = 0; r < ROWS; ++r) {
            const __m512 shift = V::real(tile.shift[pair + V::pair(r)][group] + V::half(r));
            if (ends) total[r][p] = _mm512_fmadd_ps(shift, input_sum, total[r][p]);
            if constexpr (!kInRegisters) {
              _mm512_store_ps(out + p * sums_stride + r * kPanel, total[r][p]);
            }
          }
        }
      }
    }
    if constexpr (kInRegisters) {
      MKRS_UNROLL for (int r = 0; r < ROWS; ++r) {
        MKRS_UNROLL for (int p = 0; p < PANELS; ++p) {
          _mm512_store_ps(out + p * sums_stride + r * kPanel, total[r][p]);
        }
      }
    }
  }
}

template <typename Tile>
using TileKernel = void (*)(const Tile&, int, int64_t, const char*, int64_t, float*, int64_t, bool);

template <typename V, typename Tile, int LIMBS, int PANELS, int ROWS>
TileKernel<Tile> by_shift(bool shifted) {
  return shifted ? tile_panels<V, Tile, LIMBS, PANELS, ROWS, true>
                 : tile_panels<V, Tile, LIMBS, PANELS, ROWS, false>;
}

// 24 registers of accumulators, or of accumulators and sums, beside limbs and a weight.
template <typename V, typename Tile>
TileKernel<Tile> tile_kernel(int limbs, bool shifted) {
  if constexpr (Tile::kDepth == kLongest) {
    return by_shift<V, Tile, 3, 1, 8>(shifted);  // nothing else takes these tiles
  } else {
    return limbs == 1   ? by_shift<V, Tile, 1, 1, 12>(shifted)
           : limbs == 2 ? by_shift<V, Tile, 2, 1, 12>(shifted)
                        : by_shift<V, Tile, 3, 1, 8>(shifted);
  }
}

// Two panels at once, for one limb; null where tiles are not for that.
template <typename Tile>
TileKernel<Tile> two_panels(bool shifted) {
  if constexpr (Tile::kDepth == kLongest) {
    return nullptr;
  } else {
    return by_shift<Wide, Tile, 1, 2, 6>(shifted);
  }
}

// Writes a panel's sums as out[m][n], bias added.
void store_panel(const float* sums, bool paired, int64_t inputs, int64_t rows, const void* bias,
                 int64_t n, int64_t m, const Output& out) {
  alignas(64) float line[kTileBytes / kTall];
  for (int64_t lane = 0; lane < inputs; ++lane) {
    for (int64_t r = 0; r < rows; ++r) {
      line[r] = paired ? sums[r / 2 * kPanel + 2 * lane + r % 2] : sums[r * kPanel + lane];
    }
    if (bias != nullptr) {
      for (int64_t r = 0; r < rows; ++r) line[r] += load_float(bias, n + r, out.type);
    }
    store_floats(
        line, rows, out.type,
        static_cast<char*>(out.data) + ((m + lane) * out.stride + n) * float_size(out.type));
  }
}

template <typename Tile>
void multiply_tiles(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                    const void* scratch, const void* bias, int64_t begin, int64_t end,
                    const Output& out) {
  static thread_local Tile tile;
  alignas(64) static thread_local float sums[kInputBlock / kPanel * Tile::kRows * kPanel];
  const bool shifted = w.scheme != Scheme::Symmetric;
  const int64_t sums_stride = Tile::kRows * kPanel;
  const int64_t bytes = span_bytes(plan.limbs, plan.span);
  const TileKernel<Tile> paired = tile_kernel<Paired, Tile>(plan.limbs, shifted);
  const TileKernel<Tile> one = tile_kernel<Wide, Tile>(plan.limbs, shifted);
  const TileKernel<Tile> two = two_panels<Tile>(shifted);

  for (int64_t m0 = 0; m0 < x.rows; m0 += kInputBlock) {
    const int64_t inputs = std::min(kInputBlock, x.rows - m0);
    const int64_t panels = (inputs + kPanel - 1) / kPanel;
    PageTouch pages(w, begin, end);
    for (int64_t n = begin; n < end; n += Tile::kRows) {
      pages.reach(n);
      tile.rows = std::min(Tile::kRows, end - n);
      std::memset(sums, 0, static_cast<size_t>(panels * sums_stride) * sizeof(float));
      for (int64_t k = 0; k < w.in_features; k += Tile::kDepth) {
        tile.depth = std::min(Tile::kDepth, w.in_features - k);
        load_tile(w, plan.span, n, k, tile);
        for (int64_t p = 0; p < panels;) {
          const int64_t left = inputs - p * kPanel;
          const char* in = static_cast<const char*>(scratch) + (m0 / kPanel + p) * plan.unit_bytes +
                           k / plan.span * bytes;
          const bool both = plan.limbs == 1 && left > kPanel + kPanel / 2;
          const TileKernel<Tile> kernel = is_paired(left) ? paired : both ? two : one;
          kernel(tile, w.bits, plan.span, in, plan.unit_bytes, sums + p * sums_stride, sums_stride,
                 p == 0);
          p += both ? 2 : 1;
        }
      }
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t left = inputs - p * kPanel;
        store_panel(sums + p * sums_stride, is_paired(left), std::min(kPanel, left), tile.rows,
                    bias, n, m0 + p * kPanel, out);
      }
    }
  }
}

}  // namespace

int64_t tiles_units(int64_t input_rows, int) {
  return (input_rows + kPanel - 1) / kPanel;
}

int64_t tiles_unit_bytes(const QuantizedWeight& w, int limbs, int64_t span) {
  return (w.in_features + span - 1) / span * span_bytes(limbs, span);
}

bool tiles_prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                   int64_t end, void* scratch) {
  const float top = top_value(plan.limbs);
  Span rows[kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t m = panel * kPanel;
    const bool paired = is_paired(x.rows - m);
    char* out = static_cast<char*>(scratch) + panel * plan.unit_bytes;
    double sums[kPanel] = {};
    for (int64_t k = 0; k < w.in_features; k += plan.span) {
      const int64_t n = std::min(plan.span, w.in_features - k);
      for (int64_t i = 0; i < (paired ? kPanel / 2 : kPanel); ++i) {
        // Past the last input row it repeats; what comes of it is not stored.
        const int64_t row = std::min(m + i, x.rows - 1);
        const void* source = advance(x.data, row * x.stride + k, x.type);
        if (!split_span(source, x.type, n, plan.span, plan.limbs, top, rows[i])) return false;
      }
      const bool ends_group = k + n == w.in_features || (k + n) % w.group_size == 0;
      prepare_span(rows, plan, w, paired, sums, ends_group, out);
      out += span_bytes(plan.limbs, plan.span);
    }
  }
  return true;
}

void tiles_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                  const void* scratch, const void* bias, int64_t begin, int64_t end,
                  const Output& out) {
  const auto multiply = x.rows > kFewInputs ? multiply_tiles<Tile<kTall>>
                        : plan.limbs == 3   ? multiply_tiles<Tile<kLongest>>
                                            : multiply_tiles<Tile<kLong>>;
  multiply(plan, w, x, scratch, bias, begin, end, out);
}

}  // namespace mkrs::cpu::vnni

MKRS_VNNI_END

#endif  // __x86_64__
