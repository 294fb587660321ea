// Many input rows: a tile of codes is unpacked once to a byte per code; lanes run over input rows,
// so a weight is broadcast and sums stay per lane, per group, with no reductions.
//
// Floor: M*N*K*limbs multiply-adds over the vpdpbusd peak (64 a cycle per core on Zen 4, so
// 468 GOP/s for compute="int8", 156 for exact f32, 234 for exact f16 and bf16). A span of 64 with
// three limbs is 48 vpdpbusd and 3 multiply-add-pipe instructions: 94% of the floor at best.
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

// ---- vectors of 16 or 8 input rows ------------------------------------------------------------

// The instruction by name: around its intrinsic GCC copies and spills the accumulators, at half the
// speed.

struct Lanes16 {
  static constexpr int kLanes = 16;
  using Int = __m512i;
  using Real = __m512;
  static Int load(const void* p) { return _mm512_load_si512(p); }
  static Int broadcast(int32_t v) { return _mm512_set1_epi32(v); }
  static void dot(Int& sum, Int codes, Int limb) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(limb));
  }
  static Int shift8_add(Int high, Int low) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  }
  static Real real(Int v) { return _mm512_cvtepi32_ps(v); }
  static Real load_real(const float* p) { return _mm512_load_ps(p); }
  static void store_real(float* p, Real v) { _mm512_store_ps(p, v); }
  static Real broadcast_real(float v) { return _mm512_set1_ps(v); }
  static Real mul(Real a, Real b) { return _mm512_mul_ps(a, b); }
  static Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Lanes8 {
  static constexpr int kLanes = 8;
  using Int = __m256i;
  using Real = __m256;
  static Int load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  static Int broadcast(int32_t v) { return _mm256_set1_epi32(v); }
  static void dot(Int& sum, Int codes, Int limb) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(limb));
  }
  static Int shift8_add(Int high, Int low) {
    return _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
  }
  static Real real(Int v) { return _mm256_cvtepi32_ps(v); }
  static Real load_real(const float* p) { return _mm256_load_ps(p); }
  static void store_real(float* p, Real v) { _mm256_store_ps(p, v); }
  static Real broadcast_real(float v) { return _mm256_set1_ps(v); }
  static Real mul(Real a, Real b) { return _mm256_mul_ps(a, b); }
  static Real fma(Real a, Real b, Real c) { return _mm256_fmadd_ps(a, b, c); }
};

// ---- prepared input ---------------------------------------------------------------------------

constexpr int64_t kPanel =
    16;  // input rows of a panel; a last panel of up to 8 rows is half as wide

// A panel, span by span: for every 4 activations (a quad) the limbs [limb][lane][4]; then the
// centring terms [limb][lane] int32, the scales [lane] of the span and the sums [lane] of its group
// so far.
inline int64_t span_bytes(int limbs, int64_t span, int64_t lanes) {
  return lanes * (limbs * (span + 4) + 8);
}

inline int64_t panel_lanes(int64_t rows_left) {
  return rows_left <= 8 ? 8 : kPanel;
}

void prepare_span(const Span* rows, int limbs, int center, int64_t span, int64_t lanes,
                  double* group_sums, bool ends_group, char* out) {
  const int64_t quads = span / 4;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int l = 0; l < limbs; ++l) {
      char* target = out + (l * lanes + lane) * 4;
      for (int64_t q = 0; q < quads; ++q) {
        std::memcpy(target + q * limbs * lanes * 4, rows[lane].limb[l] + 4 * q, 4);
      }
    }
  }
  int32_t* centre = reinterpret_cast<int32_t*>(out + quads * limbs * lanes * 4);
  float* scales = reinterpret_cast<float*>(centre + limbs * lanes);
  float* sums = scales + lanes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int l = 0; l < limbs; ++l) {
      const __m512i digits = _mm512_load_si512(rows[lane].limb[l]);
      const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), digits);
      centre[l * lanes + lane] = -center * _mm512_reduce_add_epi32(sum);
    }
    scales[lane] = rows[lane].scale;
    group_sums[lane] += static_cast<double>(rows[lane].scale) * rows[lane].sum;
    sums[lane] = static_cast<float>(group_sums[lane]);
    if (ends_group) group_sums[lane] = 0.0;
  }
}

// ---- tiles of weights -------------------------------------------------------------------------

constexpr int64_t kMaxTileRows = 96;       // a multiple of every micro-kernel's row count
constexpr int64_t kTileBytes = 24 * 1024;  // codes, a byte each: half of the smallest L1
constexpr int64_t kFewInputs = 32;         // up to so many rows tiles are long instead of tall
constexpr int64_t kInputBlock = 512;       // input rows that share a tile: sums stay in L2

// 64 codes, a byte each.
inline __m512i spread4(__m256i packed) {
  const __m512i wide = _mm512_cvtepu8_epi16(packed);
  const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
  return _mm512_and_si512(both, _mm512_set1_epi16(0x0f0f));
}

inline __m512i spread2(__m128i packed) {
  const __m512i wide = _mm512_cvtepu8_epi32(packed);
  const __m512i nibbles = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi32(wide, 12)),
                                           _mm512_set1_epi32(0x000f000f));
  const __m512i pairs = _mm512_or_si512(nibbles, _mm512_slli_epi32(nibbles, 6));
  return _mm512_and_si512(pairs, _mm512_set1_epi32(0x03030303));
}

// n codes from a whole byte on, one per output byte; n is a multiple of 4 but for the row's end.
inline void unpack_row(const uint8_t* codes, int bits, int64_t n, uint8_t* out) {
  int64_t i = 0;
  if (bits == 8) {
    std::memcpy(out, codes, static_cast<size_t>(n));
    return;
  }
  if (bits == 4) {
    for (; i + 64 <= n; i += 64) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i / 2));
      _mm512_storeu_si512(out + i, spread4(packed));
    }
    if (i < n) {
      // Up to 32 bytes: shifted in 64 bits.
      const __mmask32 read = static_cast<__mmask32>((uint64_t{1} << ((n - i + 1) / 2)) - 1);
      _mm512_storeu_si512(out + i, spread4(_mm256_maskz_loadu_epi8(read, codes + i / 2)));
    }
    return;
  }
  for (; i + 64 <= n; i += 64) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 4));
    _mm512_storeu_si512(out + i, spread2(packed));
  }
  if (i < n) {
    const __mmask16 read = static_cast<__mmask16>((1u << ((n - i + 3) / 4)) - 1u);
    _mm512_storeu_si512(out + i, spread2(_mm_maskz_loadu_epi8(read, codes + i / 4)));
  }
}

// A tile: rows [n, n + rows) by activations [k, k + depth), depth a multiple of the span but at the
// end. Rows past `rows` up to a multiple of the micro-kernel hold stale codes and are never stored.
struct Tile {
  int64_t rows = 0, depth = 0, max_rows = 0, stride = 0;
  uint8_t* codes = nullptr;  // [max_rows][stride]
  int64_t spans = 0;         // row stride of scale and shift, a multiple of 16
  float* scale = nullptr;    // [max_rows][spans]
  float* shift = nullptr;    // [max_rows][spans]
  int64_t first_span = 0, row_spans = 0, group_spans = 0;  // group_spans: a power of two

  // Whether the tile's span s is the last of its group; a group's shift is added there.
  bool ends_group(int64_t s) const {
    const int64_t next = first_span + s + 1;
    return next == row_spans || (next & (group_spans - 1)) == 0;
  }
};

void load_tile(const QuantizedWeight& w, int64_t span, int64_t n, int64_t k, Tile& tile) {
  const int span_shift = __builtin_ctzll(static_cast<uint64_t>(span));
  // Span s of the row belongs to group s >> dup; a single group has any length.
  const int dup =
      w.groups == 1 ? 62 : __builtin_ctzll(static_cast<uint64_t>(w.group_size)) - span_shift;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i dup_index = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(dup));
  const int64_t bytes = code_bytes(tile.depth, w.bits);
  const int64_t first = k >> span_shift;
  const int64_t last = (k + tile.depth - 1) >> span_shift;
  tile.first_span = first;
  tile.row_spans = ((w.in_features - 1) >> span_shift) + 1;
  tile.group_spans = int64_t{1} << dup;
  // What is read next: these rows' next codes, or at their end the next rows' first.
  const bool row_done = k + tile.depth == w.in_features;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint8_t* source = w.codes + (n + r) * w.codes_stride + k * w.bits / 8;
    const uint8_t* next =
        row_done ? w.codes + (n + r + tile.max_rows) * w.codes_stride : source + bytes;
    for (int64_t b = 0; b < tile.stride * w.bits / 8; b += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(next + b), _MM_HINT_T1);
    }
    unpack_row(source, w.bits, tile.depth, tile.codes + r * tile.stride);
    for (int64_t s = first; s <= last; s += 16) {
      const int64_t g = s >> dup;
      const __mmask16 mask = first_lanes((std::min(last, s + 15) >> dup) + 1 - g);
      __m512 scale = load_scales(w, n + r, g, mask);
      float* target = tile.scale + r * tile.spans + (s - first);
      _mm512_store_ps(target, _mm512_permutexvar_ps(dup_index, scale));
      if (w.scheme == Scheme::Symmetric) continue;
      const __m512 shift = load_shifts(w, n + r, g, mask, scale);
      target = tile.shift + r * tile.spans + (s - first);
      _mm512_store_ps(target, _mm512_permutexvar_ps(dup_index, shift));
    }
  }
}

// sums[row][lane] += one span of ROWS tile rows times PANELS panels.
template <typename V, int LIMBS, int PANELS, int ROWS, bool SHIFTED>
inline void micro(const uint8_t* codes, int64_t stride, const float* scale, const float* shift,
                  int64_t spans, const char* const (&x)[PANELS], int64_t quads,
                  float* const (&sums)[PANELS]) {
  using Int = typename V::Int;
  using Real = typename V::Real;
  constexpr int64_t kStep = V::kLanes * 4;
  const int64_t tail = quads * LIMBS * kStep;
  Int acc[ROWS][PANELS][LIMBS];
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 24
    for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 3
      for (int l = 0; l < LIMBS; ++l) acc[r][p][l] = V::load(x[p] + tail + l * kStep);
    }
  }
  int64_t q = 0;
  do {  // a span has at least four quads
    Int limb[PANELS][LIMBS];
#pragma GCC unroll 24
    for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 3
      for (int l = 0; l < LIMBS; ++l) limb[p][l] = V::load(x[p] + (q * LIMBS + l) * kStep);
    }
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      std::memcpy(&four, codes + r * stride + 4 * q, 4);
      const Int weight = V::broadcast(four);
#pragma GCC unroll 24
      for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 24
        for (int l = 0; l < LIMBS; ++l) V::dot(acc[r][p][l], weight, limb[p][l]);
      }
    }
  } while (++q < quads);
  Real input_scale[PANELS], input_sum[PANELS];
#pragma GCC unroll 2
  for (int p = 0; p < PANELS; ++p) {
    const float* scales = reinterpret_cast<const float*>(x[p] + tail + LIMBS * kStep);
    input_scale[p] = V::load_real(scales);
    input_sum[p] = V::load_real(scales + V::kLanes);
  }
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r) {
    const Real row_scale = V::broadcast_real(scale[r * spans]);
    const Real row_shift = V::broadcast_real(SHIFTED ? shift[r * spans] : 0.0f);
#pragma GCC unroll 2
    for (int p = 0; p < PANELS; ++p) {
      Real value;
      if constexpr (LIMBS == 1) {
        value = V::real(acc[r][p][0]);
      } else if constexpr (LIMBS == 2) {
        value = V::real(V::shift8_add(acc[r][p][0], acc[r][p][1]));
      } else {
        value = V::fma(V::real(acc[r][p][0]), V::broadcast_real(65536.0f),
                       V::real(V::shift8_add(acc[r][p][1], acc[r][p][2])));
      }
      float* sum = sums[p] + r * V::kLanes;
      Real total = V::fma(value, V::mul(input_scale[p], row_scale), V::load_real(sum));
      if constexpr (SHIFTED) total = V::fma(row_shift, input_sum[p], total);
      V::store_real(sum, total);
    }
  }
}

// The tile times PANELS panels: sums[panel][row][lane].
template <typename V, int LIMBS, int PANELS, int ROWS, bool SHIFTED>
void tile_panels(const Tile& tile, int64_t span, const char* x, int64_t panel_bytes, float* sums,
                 int64_t sums_stride) {
  const int64_t bytes = span_bytes(LIMBS, span, V::kLanes);
  for (int64_t r = 0; r < tile.rows; r += ROWS) {
    float* out[PANELS];
    for (int p = 0; p < PANELS; ++p) out[p] = sums + p * sums_stride + r * V::kLanes;
    for (int64_t s = 0; s * span < tile.depth; ++s) {
      const char* in[PANELS];
      for (int p = 0; p < PANELS; ++p) in[p] = x + p * panel_bytes + s * bytes;
      const uint8_t* codes = tile.codes + r * tile.stride + s * span;
      const float* scale = tile.scale + r * tile.spans + s;
      const float* shift = tile.shift + r * tile.spans + s;
      if (SHIFTED && tile.ends_group(s)) {
        micro<V, LIMBS, PANELS, ROWS, true>(codes, tile.stride, scale, shift, tile.spans, in,
                                            span / 4, out);
      } else {
        micro<V, LIMBS, PANELS, ROWS, false>(codes, tile.stride, scale, shift, tile.spans, in,
                                             span / 4, out);
      }
    }
  }
}

using TileKernel = void (*)(const Tile&, int64_t, const char*, int64_t, float*, int64_t);

// Accumulators plus limbs and a weight fit 32 registers: 8*3, 12*2 and 12*2 accumulators.
template <typename V, int PANELS>
TileKernel tile_kernel(int limbs, bool shifted) {
  constexpr int kOneLimbRows = PANELS == 2 ? 12 : 24;
  switch (limbs) {
    case 1:
      return shifted ? tile_panels<V, 1, PANELS, kOneLimbRows, true>
                     : tile_panels<V, 1, PANELS, kOneLimbRows, false>;
    case 2:
      return shifted ? tile_panels<V, 2, 1, 12, true> : tile_panels<V, 2, 1, 12, false>;
    default:
      return shifted ? tile_panels<V, 3, 1, 8, true> : tile_panels<V, 3, 1, 8, false>;
  }
}

// Writes a panel's sums [row][lane] as out[m][n], bias added.
void store_panel(const float* sums, int64_t lanes, int64_t inputs, int64_t rows, const void* bias,
                 int64_t n, int64_t m, const Output& out) {
  alignas(64) float line[kMaxTileRows];
  for (int64_t lane = 0; lane < inputs; ++lane) {
    for (int64_t r = 0; r < rows; ++r) line[r] = sums[r * lanes + lane];
    if (bias != nullptr) {
      for (int64_t r = 0; r < rows; ++r) line[r] += load_float(bias, n + r, out.type);
    }
    store_floats(
        line, rows, out.type,
        static_cast<char*>(out.data) + ((m + lane) * out.stride + n) * float_size(out.type));
  }
}

}  // namespace

int64_t tiles_units(int64_t input_rows, int) {
  return (input_rows + kPanel - 1) / kPanel;
}

int64_t tiles_unit_bytes(const QuantizedWeight& w, int limbs, int64_t span) {
  return (w.in_features + span - 1) / span * span_bytes(limbs, span, kPanel);
}

bool tiles_prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                   int64_t end, void* scratch) {
  const float top = top_value(plan.limbs);
  Span rows[kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t m = panel * kPanel;
    const int64_t lanes = panel_lanes(x.rows - m);
    char* out = static_cast<char*>(scratch) + panel * plan.unit_bytes;
    double sums[kPanel] = {};
    for (int64_t k = 0; k < w.in_features; k += plan.span) {
      const int64_t n = std::min(plan.span, w.in_features - k);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        // Lanes past the last input row repeat it; they are not stored.
        const int64_t row = std::min(m + lane, x.rows - 1);
        const void* source = element(x.data, row * x.stride + k, x.type);
        if (!split_span(source, x.type, n, plan.limbs, top, rows[lane])) return false;
      }
      const bool ends_group = k + n == w.in_features || (k + n) % w.group_size == 0;
      prepare_span(rows, plan.limbs, center_of(w), plan.span, lanes, sums, ends_group, out);
      out += span_bytes(plan.limbs, plan.span, lanes);
    }
  }
  return true;
}

void tiles_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                  const void* scratch, const void* bias, int64_t begin, int64_t end,
                  const Output& out) {
  constexpr int64_t kScales = kTileBytes / 16;  // spans of 16, all rows
  alignas(64) static thread_local uint8_t codes[kTileBytes + 64];
  alignas(64) static thread_local float scale[kScales];
  alignas(64) static thread_local float shift[kScales];
  alignas(64) static thread_local float sums[kInputBlock / kPanel * kMaxTileRows * kPanel];

  Tile tile;
  tile.max_rows = x.rows <= kFewInputs ? 24 : kMaxTileRows;
  tile.stride = kTileBytes / tile.max_rows;
  tile.spans = tile.stride / 16;
  tile.codes = codes;
  tile.scale = scale;
  tile.shift = shift;
  const bool shifted = w.scheme != Scheme::Symmetric;
  const int64_t sums_stride = kMaxTileRows * kPanel;
  const int64_t panels_at_once = plan.limbs == 1 ? 2 : 1;
  const TileKernel one = tile_kernel<Lanes16, 1>(plan.limbs, shifted);
  const TileKernel two = tile_kernel<Lanes16, 2>(plan.limbs, shifted);
  const TileKernel half = tile_kernel<Lanes8, 1>(plan.limbs, shifted);

  for (int64_t m0 = 0; m0 < x.rows; m0 += kInputBlock) {
    const int64_t inputs = std::min(kInputBlock, x.rows - m0);
    const int64_t panels = tiles_units(inputs, plan.limbs);
    for (int64_t n = begin; n < end; n += tile.max_rows) {
      tile.rows = std::min(tile.max_rows, end - n);
      std::memset(sums, 0, static_cast<size_t>(panels * sums_stride) * sizeof(float));
      for (int64_t k = 0; k < w.in_features; k += tile.stride) {
        tile.depth = std::min(tile.stride, w.in_features - k);
        load_tile(w, plan.span, n, k, tile);
        for (int64_t p = 0; p < panels;) {
          const int64_t left = inputs - p * kPanel;
          const int64_t lanes = panel_lanes(left);
          const char* in = static_cast<const char*>(scratch) + (m0 / kPanel + p) * plan.unit_bytes +
                           k / plan.span * span_bytes(plan.limbs, plan.span, lanes);
          const bool pair = panels_at_once == 2 && left > kPanel + 8;
          const TileKernel kernel = lanes == 8 ? half : pair ? two : one;
          kernel(tile, plan.span, in, plan.unit_bytes, sums + p * sums_stride, sums_stride);
          p += pair ? 2 : 1;
        }
      }
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t left = inputs - p * kPanel;
        store_panel(sums + p * sums_stride, panel_lanes(left), std::min(kPanel, left), tile.rows,
                    bias, n, m0 + p * kPanel, out);
      }
    }
  }
}

}  // namespace mkrs::cpu::vnni

MKRS_VNNI_END

#endif  // __x86_64__
