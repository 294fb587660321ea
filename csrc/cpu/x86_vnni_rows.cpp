// Decode: one to a few input rows. Every lane of a vector holds 32 adjacent bits of a weight row,
// so a row is read once, in order, and the lanes are summed at its end.
//
// Floor: bytes of codes, scales and zeros over the memory bandwidth. Instructions per 64 bytes of
// codes at 4 bits, one input row, three limbs: 6 vpdpbusd, 3 to unpack, 2 shifts, 1 add, convert,
// permute, multiply-add, prefetch: about 16, so a core at 3.7 GHz passes 23 GB/s when cache-hot.
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
#define MKRS_UNROLL _Pragma("GCC unroll 8")

// Prefetching into L2, not L1, keeps enough lines in flight for the full bandwidth: 33 GB/s on two
// Zen 4 cores against 26 into L1 and 19 without. Reaching past a row's end finds the next rows.
constexpr int64_t kPrefetchBytes = 6144;

// Prepared input row. For every 64 bytes of codes: limbs [limb][part][64] where part p of byte j is
// the activation of that byte's p-th code; then the centring terms of each lane, int32 [16], of the
// leading limb (with more than one) and of the others together; then each lane's scale, float [16].
// After the vectors: the sum of every group, padded to 16 with zeros.
struct Layout {
  int64_t vectors, vector_bytes, spans, sums_at, bytes;

  Layout(const QuantizedWeight& w, int limbs, int64_t span) {
    const int64_t parts = 8 / w.bits;
    vectors = (w.in_features + 64 * parts - 1) / (64 * parts);
    vector_bytes = 64 * (limbs * parts + (limbs > 1 ? 3 : 2));
    spans = (w.in_features + span - 1) / span;
    sums_at = vectors * vector_bytes;
    bytes = sums_at + (w.groups + 15) / 16 * 64;
  }
};

// One vector's worth of limbs in code order to [limb][part][64], centring terms and scales.
inline void store_vector(const int8_t (*linear)[256], const float* lane_scale, int limbs,
                         const QuantizedWeight& w, char* out) {
  const int parts = 8 / w.bits;
  const __m512i center = _mm512_set1_epi32(-center_of(w));
  __m512i leading = _mm512_setzero_si512();
  __m512i others = _mm512_setzero_si512();
  for (int l = 0; l < limbs; ++l) {
    __m512i digit_sum = _mm512_setzero_si512();
    for (int p = 0; p < parts; ++p) {
      char* target = out + 64 * (l * parts + p);
      for (int i = 0; i < parts; ++i) {  // 64 codes in, 64/parts bytes of this part out
        const __m512i codes = _mm512_load_si512(linear[l] + 64 * i);
        if (parts == 1) {
          _mm512_store_si512(target, codes);
        } else if (parts == 2) {
          _mm256_store_si256(
              reinterpret_cast<__m256i*>(target + 32 * i),
              _mm512_cvtepi16_epi8(_mm512_srl_epi16(codes, _mm_cvtsi32_si128(8 * p))));
        } else {
          _mm_store_si128(reinterpret_cast<__m128i*>(target + 16 * i),
                          _mm512_cvtepi32_epi8(_mm512_srl_epi32(codes, _mm_cvtsi32_si128(8 * p))));
        }
      }
      digit_sum = _mm512_dpbusd_epi32(digit_sum, _mm512_set1_epi8(1), _mm512_load_si512(target));
    }
    if (l == 0 && limbs > 1) {
      leading = digit_sum;
    } else {
      others = _mm512_add_epi32(_mm512_slli_epi32(others, 8), digit_sum);
    }
  }
  char* terms = out + 64 * limbs * parts;
  if (limbs > 1) {
    _mm512_store_si512(terms, _mm512_mullo_epi32(leading, center));
    terms += 64;
  }
  _mm512_store_si512(terms, _mm512_mullo_epi32(others, center));
  _mm512_store_si512(terms + 64, _mm512_loadu_si512(lane_scale));
}

template <int BITS>
inline void unpack(__m512i packed, __m512i (&codes)[8 / BITS]) {
  if constexpr (BITS == 8) {
    codes[0] = packed;
  } else if constexpr (BITS == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    codes[0] = _mm512_and_si512(packed, mask);
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
  } else {
    const __m512i mask = _mm512_set1_epi8(3);
    codes[0] = _mm512_and_si512(packed, mask);
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask);
    codes[2] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    codes[3] = _mm512_and_si512(_mm512_srli_epi16(packed, 6), mask);
  }
}

// A value that several instructions use: GCC would rather load it again for each.
template <typename T>
inline T in_register(T value) {
  asm("" : "+v"(value));
  return value;
}

// Centred dot products of R rows' codes with one prepared vector, per lane, as floats.
template <int BITS, int LIMBS, int R>
inline void dot(const __m512i (&codes)[R][8 / BITS], const char* x, __m512 (&sum)[R]) {
  constexpr int kParts = 8 / BITS;
  const __m512i low_start =
      in_register(_mm512_load_si512(x + 64 * (LIMBS * kParts + (LIMBS > 1 ? 1 : 0))));
  __m512i low[R], high[R], middle[R];
  MKRS_UNROLL for (int r = 0; r < R; ++r) low[r] = low_start;
  MKRS_UNROLL for (int p = 0; p < kParts; ++p) {
    const __m512i limb = in_register(_mm512_load_si512(x + 64 * ((LIMBS - 1) * kParts + p)));
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      low[r] = _mm512_dpbusd_epi32(low[r], codes[r][p], limb);
    }
  }
  if constexpr (LIMBS > 1) {
    const __m512i high_start = in_register(_mm512_load_si512(x + 64 * LIMBS * kParts));
    MKRS_UNROLL for (int r = 0; r < R; ++r) high[r] = high_start;
    MKRS_UNROLL for (int p = 0; p < kParts; ++p) {
      const __m512i limb = in_register(_mm512_load_si512(x + 64 * p));
      MKRS_UNROLL for (int r = 0; r < R; ++r) {
        high[r] = _mm512_dpbusd_epi32(high[r], codes[r][p], limb);
      }
    }
  }
  if constexpr (LIMBS > 2) {
    // At 8 bits three limbs need more than an int32; elsewhere shifting is the cheaper way.
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      middle[r] = BITS == 8 ? _mm512_setzero_si512() : _mm512_slli_epi32(high[r], 8);
    }
    MKRS_UNROLL for (int p = 0; p < kParts; ++p) {
      const __m512i limb = in_register(_mm512_load_si512(x + 64 * (kParts + p)));
      MKRS_UNROLL for (int r = 0; r < R; ++r) {
        middle[r] = _mm512_dpbusd_epi32(middle[r], codes[r][p], limb);
      }
    }
  }
  MKRS_UNROLL for (int r = 0; r < R; ++r) {
    if constexpr (LIMBS == 1) {
      sum[r] = _mm512_cvtepi32_ps(low[r]);
    } else if constexpr (LIMBS == 2) {
      sum[r] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]));
    } else {
      sum[r] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(middle[r], 8), low[r]));
      if constexpr (BITS == 8) {
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r]), _mm512_set1_ps(65536.0f), sum[r]);
      }
    }
  }
}

// One vector of R rows' packed codes times M input vectors; `scale` is each lane's weight scale.
template <int BITS, int LIMBS, int M, int R>
inline void accumulate(const __m512i (&packed)[R], const char* x, int64_t unit_bytes,
                       const __m512 (&scale)[R], __m512 (&acc)[R][M]) {
  constexpr int64_t kLaneScales = 64 * (LIMBS * 8 / BITS + (LIMBS > 1 ? 2 : 1));
  __m512i codes[R][8 / BITS];
  MKRS_UNROLL for (int r = 0; r < R; ++r) unpack<BITS>(packed[r], codes[r]);
  MKRS_UNROLL for (int m = 0; m < M; ++m) {
    const char* input = x + m * unit_bytes;
    __m512 sum[R];
    dot<BITS, LIMBS, R>(codes, input, sum);
    const __m512 input_scale = in_register(_mm512_load_ps(input + kLaneScales));
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      acc[r][m] = _mm512_fmadd_ps(_mm512_mul_ps(sum[r], input_scale), scale[r], acc[r][m]);
    }
  }
}

// What the kernels share about one call.
struct Call {
  const QuantizedWeight& w;
  Layout layout;
  int64_t span;
  const char* input;  // prepared rows of the M in hand
  int64_t unit_bytes;
  const void* bias;
  const Output& out;
  int64_t m0;
};

// Rows [n, n + R) times M input rows.
template <int BITS, int LIMBS, int M, int R>
inline void rows_block(const Call& c, int64_t n) {
  constexpr int kParts = 8 / BITS;
  constexpr int64_t kCodes = 64 * kParts;
  const QuantizedWeight& w = c.w;
  const int span_shift = __builtin_ctzll(static_cast<uint64_t>(c.span));
  const int lane_shift = span_shift - __builtin_ctz(32 / BITS);
  const bool one_group = w.groups == 1;
  // Span s belongs to group s >> dup.
  const int dup = one_group ? 0 : __builtin_ctzll(static_cast<uint64_t>(w.group_size)) - span_shift;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m128i lane_count = _mm_cvtsi32_si128(lane_shift);
  const __m512i dup_index = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(dup));
  const int64_t row_bytes = code_bytes(w.in_features, BITS);
  const int64_t full_vectors = row_bytes / 64;
  const int64_t block_vectors = 16 * c.span / kCodes;

  const uint8_t* codes[R];
  __m512 acc[R][M];
  MKRS_UNROLL for (int r = 0; r < R; ++r) {
    codes[r] = w.codes + (n + r) * w.codes_stride;
    MKRS_UNROLL for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  }

  int64_t v = 0;
  for (int64_t s = 0; s < c.layout.spans; s += 16) {
    __m512 scale[R];
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      if (one_group) {
        scale[r] = _mm512_set1_ps(load_float(w.scale, (n + r) * w.scale_stride, w.scale_type));
      } else {
        const int64_t g = s >> dup;
        const int64_t count = std::min<int64_t>(w.groups - g, 16 >> dup);
        scale[r] = load_scales(w, n + r, g, first_lanes(count));
        if (dup != 0) scale[r] = _mm512_permutexvar_ps(dup_index, scale[r]);
      }
    }
    const int64_t here = std::min(block_vectors, c.layout.vectors - v);
    for (int64_t j = 0; j < here; ++j) {
      const __m512i index = _mm512_srl_epi32(
          _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(16 * j))), lane_count);
      const int64_t at = 64 * (v + j);
      __m512i packed[R];
      __m512 lane_scale[R];
      MKRS_UNROLL for (int r = 0; r < R; ++r) {
        lane_scale[r] = _mm512_permutexvar_ps(index, scale[r]);
        _mm_prefetch(reinterpret_cast<const char*>(codes[r] + at + kPrefetchBytes), _MM_HINT_T1);
      }
      if (__builtin_expect(v + j < full_vectors, 1)) {
        MKRS_UNROLL for (int r = 0; r < R; ++r) packed[r] = _mm512_loadu_si512(codes[r] + at);
      } else {
        // The row's end: bytes past it belong to others and are not read.
        const __mmask64 mask = (uint64_t{1} << (row_bytes - at)) - 1;
        MKRS_UNROLL for (int r = 0; r < R; ++r) {
          packed[r] = _mm512_maskz_loadu_epi8(mask, codes[r] + at);
        }
      }
      accumulate<BITS, LIMBS, M, R>(packed, c.input + (v + j) * c.layout.vector_bytes, c.unit_bytes,
                                    lane_scale, acc);
    }
    v += block_vectors;
  }

  if (w.scheme != Scheme::Symmetric) {
    for (int64_t g = 0; g < w.groups; g += 16) {
      const __mmask16 mask = first_lanes(w.groups - g);
      MKRS_UNROLL for (int r = 0; r < R; ++r) {
        const __m512 shift = load_shifts(w, n + r, g, mask, load_scales(w, n + r, g, mask));
        MKRS_UNROLL for (int m = 0; m < M; ++m) {
          const char* sums = c.input + m * c.unit_bytes + c.layout.sums_at + 4 * g;
          acc[r][m] = _mm512_fmadd_ps(shift, _mm512_load_ps(sums), acc[r][m]);
        }
      }
    }
  }
  MKRS_UNROLL for (int m = 0; m < M; ++m) {
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      float value = _mm512_reduce_add_ps(acc[r][m]);
      if (c.bias != nullptr) value += load_float(c.bias, n + r, c.out.type);
      store_float(c.out.data, (c.m0 + m) * c.out.stride + n + r, c.out.type, value);
    }
  }
}

template <int BITS, int LIMBS, int M>
void rows_range(const Call& c, int64_t begin, int64_t end) {
  // More weight rows share an activation's loads, which bind at 2 bits (12 limb vectors per 64
  // bytes of codes) and with several input rows; else more streams cost more than they save.
  constexpr int kRows = BITS == 2 && M == 1 ? 3 : LIMBS == 1 && BITS != 2 && M > 2 ? 4 : 2;
  int64_t n = begin;
  for (; n + kRows <= end; n += kRows) rows_block<BITS, LIMBS, M, kRows>(c, n);
  for (; n < end; ++n) rows_block<BITS, LIMBS, M, 1>(c, n);
}

using Range = void (*)(const Call&, int64_t, int64_t);

constexpr int64_t kPassInputs = 4;  // input rows of one pass: what accumulators have room for
constexpr int64_t kPassRows = 64;   // weight rows whose codes stay in L2 from pass to pass

template <int BITS, int LIMBS>
Range by_inputs(int64_t m) {
  constexpr Range ranges[kPassInputs] = {rows_range<BITS, LIMBS, 1>, rows_range<BITS, LIMBS, 2>,
                                         rows_range<BITS, LIMBS, 3>, rows_range<BITS, LIMBS, 4>};
  return ranges[m - 1];
}

template <int BITS>
Range by_limbs(int limbs, int64_t m) {
  return limbs == 1   ? by_inputs<BITS, 1>(m)
         : limbs == 2 ? by_inputs<BITS, 2>(m)
                      : by_inputs<BITS, 3>(m);
}

}  // namespace

int64_t rows_unit_bytes(const QuantizedWeight& w, int limbs, int64_t span) {
  return Layout(w, limbs, span).bytes;
}

bool rows_prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, int64_t begin,
                  int64_t end, void* scratch) {
  const Layout layout(w, plan.limbs, plan.span);
  const int64_t vector_codes = 64 * (8 / w.bits);
  const float top = top_value(plan.limbs);
  const int64_t lane_codes = 32 / w.bits;
  alignas(64) int8_t linear[3][256];
  alignas(64) float lane_scale[16];
  Span part;
  for (int64_t m = begin; m < end; ++m) {
    char* out = static_cast<char*>(scratch) + m * plan.unit_bytes;
    std::memset(out + layout.sums_at, 0, static_cast<size_t>(layout.bytes - layout.sums_at));
    float* sums = reinterpret_cast<float*>(out + layout.sums_at);
    double sum = 0.0;
    int64_t group = 0, group_end = w.group_size;
    for (int64_t v = 0; v < layout.vectors; ++v) {
      for (int64_t i = 0; i < vector_codes; i += plan.span) {
        const int64_t k = v * vector_codes + i;
        const int64_t n = std::min(plan.span, w.in_features - k);
        const void* source = element(x.data, m * x.stride + k, x.type);
        // A span past the row's end splits into zeros.
        if (!split_span(source, x.type, n, plan.span, plan.limbs, top, part)) return false;
        for (int l = 0; l < plan.limbs; ++l) {
          std::memcpy(linear[l] + i, part.limb[l], static_cast<size_t>(plan.span));
        }
        for (int64_t lane = 0; lane < plan.span / lane_codes; ++lane) {
          lane_scale[i / lane_codes + lane] = part.scale;
        }
        if (n <= 0) continue;
        sum += static_cast<double>(part.scale) * part.sum;
        if (k + n >= group_end || k + n == w.in_features) {
          sums[group++] = static_cast<float>(sum);
          sum = 0.0;
          group_end += w.group_size;
        }
      }
      store_vector(linear, lane_scale, plan.limbs, w, out + v * layout.vector_bytes);
    }
  }
  return true;
}

void rows_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                 const void* scratch, const void* bias, int64_t begin, int64_t end,
                 const Output& out) {
  const Layout layout(w, plan.limbs, plan.span);
  const int64_t block = x.rows <= kPassInputs ? end - begin : kPassRows;
  for (int64_t n = begin; n < end; n += block) {
    for (int64_t m = 0; m < x.rows; m += kPassInputs) {
      const Call call{w,
                      layout,
                      plan.span,
                      static_cast<const char*>(scratch) + m * plan.unit_bytes,
                      plan.unit_bytes,
                      bias,
                      out,
                      m};
      const int64_t inputs = std::min(kPassInputs, x.rows - m);
      const Range range = w.bits == 8   ? by_limbs<8>(plan.limbs, inputs)
                          : w.bits == 4 ? by_limbs<4>(plan.limbs, inputs)
                                        : by_limbs<2>(plan.limbs, inputs);
      range(call, n, std::min(end, n + block));
    }
  }
}

}  // namespace mkrs::cpu::vnni

MKRS_VNNI_END

#endif  // __x86_64__
