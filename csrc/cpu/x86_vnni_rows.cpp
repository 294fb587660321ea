// Decode: one to a few input rows. Every lane of a vector holds 32 adjacent bits of a weight row,
// so a row is read once, in order, and the lanes are summed at its end.
//
// Floor: bytes of codes, scales and zeros over the memory bandwidth. Instructions per 64 bytes of
// codes at 4 bits, one input row, three limbs: 6 vpdpbusd, 3 to unpack, 2 shifts, 1 add, convert,
// permute, multiply-add: 15 on four pipes that each take two cycles for 64 bytes, so 7.5 cycles at
// least; measured 10.0 of a cache-hot kernel, 26 GB/s of codes and scales at 3.65 GHz.
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

// Prefetching into L2, not L1, and this far ahead keeps enough lines in flight: hardware
// prefetchers alone follow rows that are read side by side at a quarter of the memory's rate.
constexpr int64_t kPrefetchBytes = 16384;

// Prepared input row. For every 64 bytes of codes: limbs [limb][part][64] where part p of byte j is
// the activation of that byte's p-th code; then the centring terms of each lane, int32 [16], of the
// leading limb (with more than one) and of the others together. After the vectors, as floats padded
// to 16 with zeros: the scale of every span, the sum of every group, and a power of two that those
// are multiples of: with the largest scale near one, its product with a weight's scale neither
// overflows nor vanishes before the result does.
struct Layout {
  int64_t vectors, vector_bytes, spans, scales_at, sums_at, power_at, bytes;

  Layout(const QuantizedWeight& w, int limbs, int64_t span) {
    const int64_t parts = 8 / w.bits;
    vectors = (w.in_features + 64 * parts - 1) / (64 * parts);
    vector_bytes = 64 * (limbs * parts + (limbs > 1 ? 2 : 1));
    spans = (w.in_features + span - 1) / span;
    scales_at = vectors * vector_bytes;
    sums_at = scales_at + (spans + 15) / 16 * 64;
    power_at = sums_at + (w.groups + 15) / 16 * 64;
    bytes = power_at + 64;
  }
};

// One vector's worth of limbs in code order to [limb][part][64] and centring terms.
inline void store_vector(const int8_t (*linear)[256], int limbs, const QuantizedWeight& w,
                         char* out) {
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

// sum[r] += codes of row r times one limb, at `x`.
template <int PARTS, int R>
inline void dot_limb(const __m512i (&codes)[R][PARTS], const char* x, __m512i (&sum)[R]) {
  MKRS_UNROLL for (int p = 0; p < PARTS; ++p) {
    const __m512i limb = in_register(_mm512_load_si512(x + 64 * p));
    MKRS_UNROLL for (int r = 0; r < R; ++r) sum[r] = _mm512_dpbusd_epi32(sum[r], codes[r][p], limb);
  }
}

// Dot products of R rows' codes with one prepared vector, per lane, as floats. A limb is summed on
// top of 256 times the limbs before it.
template <int BITS, int LIMBS, bool CENTERED, int R>
inline void dot(const __m512i (&codes)[R][8 / BITS], const char* x, __m512 (&sum)[R]) {
  constexpr int kParts = 8 / BITS;
  // At 8 bits three limbs need more than an int32: the leading one is kept apart.
  constexpr bool kApart = BITS == 8 && LIMBS == 3;
  const char* terms = x + 64 * LIMBS * kParts;
  __m512i all[R], leading[R];
  MKRS_UNROLL for (int r = 0; r < R; ++r) {
    all[r] = CENTERED ? in_register(_mm512_load_si512(terms)) : _mm512_setzero_si512();
  }
  dot_limb<kParts>(codes, x, all);
  MKRS_UNROLL for (int l = 1; l < LIMBS; ++l) {
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      if (kApart && l == 1) {
        leading[r] = all[r];
        all[r] = _mm512_setzero_si512();
      } else {
        all[r] = _mm512_slli_epi32(all[r], 8);
      }
    }
    dot_limb<kParts>(codes, x + 64 * l * kParts, all);
  }
  const __m512i others =
      CENTERED && LIMBS > 1 ? in_register(_mm512_load_si512(terms + 64)) : _mm512_setzero_si512();
  MKRS_UNROLL for (int r = 0; r < R; ++r) {
    if (CENTERED && LIMBS > 1) all[r] = _mm512_add_epi32(all[r], others);
    sum[r] = _mm512_cvtepi32_ps(all[r]);
    if constexpr (kApart) {
      sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(leading[r]), _mm512_set1_ps(65536.0f), sum[r]);
    }
  }
}

// Which scales the lanes of a row's vectors take. Sixteen spans are worked on at a time; they share
// the scales of sixteen groups, or of 16 >> dup groups where several spans make a group.
struct Spans {
  bool one_group;        // then every span has group 0's scale
  int dup;               // else span s belongs to group s >> dup
  int64_t repeats;       // sixteens of spans that one load of group scales serves
  __m512i first_repeat;  // a span's group among the sixteen loaded, for the first sixteen spans
  __m512i repeat_step;   // and what it moves on by
  int64_t vectors;       // of sixteen spans
  __m512i first_vector;  // a lane's span among the sixteen, in their first vector
  __m512i vector_step;

  Spans(const QuantizedWeight& w, int64_t span) : one_group(w.groups == 1) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int span_shift = __builtin_ctzll(static_cast<uint64_t>(span));
    const int lane_shift = span_shift - __builtin_ctz(static_cast<unsigned>(32 / w.bits));
    dup = one_group ? 0 : __builtin_ctzll(static_cast<uint64_t>(w.group_size)) - span_shift;
    repeats = int64_t{1} << dup;
    first_repeat =
        one_group ? _mm512_setzero_si512() : _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(dup));
    repeat_step = _mm512_set1_epi32(one_group ? 0 : 16 >> dup);
    vectors = 16 * span * w.bits / 512;
    first_vector = _mm512_srl_epi32(lanes, _mm_cvtsi32_si128(lane_shift));
    vector_step = _mm512_set1_epi32(16 >> lane_shift);
  }
};

// What the kernels share about one call.
struct Call {
  const QuantizedWeight& w;
  Layout layout;
  Spans spans;
  const char* input;  // prepared rows of the M in hand
  int64_t unit_bytes;
  const void* bias;
  const Output& out;
  int64_t m0;
};

// Scales of the sixteen groups that span s begins, for rows [n, n + R); and what those groups' zero
// points or offsets add to the sums, which is theirs times the sum of the activations.
template <int M, int R>
__attribute__((always_inline)) inline void load_groups(const Call& c, int64_t n, int64_t s,
                                                       __m512 (&own)[R], __m512 (&acc)[R][M]) {
  const QuantizedWeight& w = c.w;
  const int64_t g = c.spans.one_group ? 0 : s >> c.spans.dup;
  const __mmask16 groups = first_lanes(w.groups - g);
  MKRS_UNROLL for (int r = 0; r < R; ++r) {
    own[r] = load_scales(w, n + r, g, groups);
    if (w.scheme != Scheme::Symmetric && (!c.spans.one_group || s == 0)) {
      const __m512 shift = load_shifts(w, n + r, g, groups, own[r]);
      MKRS_UNROLL for (int m = 0; m < M; ++m) {
        const char* sums = c.input + m * c.unit_bytes + c.layout.sums_at + 4 * g;
        acc[r][m] = _mm512_fmadd_ps(shift, _mm512_load_ps(sums), acc[r][m]);
      }
    }
  }
}

// Rows [n, n + R) times M input rows.
template <int BITS, int LIMBS, bool CENTERED, int M, int R>
inline void rows_block(const Call& c, int64_t n) {
  const QuantizedWeight& w = c.w;
  const int64_t row_bytes = code_bytes(w.in_features, BITS);
  const int64_t full_vectors = row_bytes / 64;

  const uint8_t* codes[R];
  __m512 acc[R][M];
  MKRS_UNROLL for (int r = 0; r < R; ++r) {
    codes[r] = w.codes + (n + r) * w.codes_stride;
    MKRS_UNROLL for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  }

  __m512 own[R];
  const Spans spans = c.spans;
  __m512i repeat = spans.first_repeat;
  const int64_t repeat_mask = 16 * spans.repeats - 1;
  int64_t first = 0;
  for (int64_t s = 0; s < c.layout.spans; s += 16, first += spans.vectors) {
    if ((s & repeat_mask) == 0) {
      load_groups<M, R>(c, n, s, own, acc);
      repeat = spans.first_repeat;
    }
    __m512 scale[R][M];
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      const __m512 repeated = _mm512_permutexvar_ps(repeat, own[r]);
      MKRS_UNROLL for (int m = 0; m < M; ++m) {
        const char* scales = c.input + m * c.unit_bytes + c.layout.scales_at + 4 * s;
        scale[r][m] = _mm512_mul_ps(repeated, _mm512_load_ps(scales));
      }
    }
    repeat = _mm512_add_epi32(repeat, spans.repeat_step);

    const auto multiply = [&](int64_t at, const __m512i(&codes_at)[R], __m512i lanes) {
      __m512i unpacked[R][8 / BITS];
      MKRS_UNROLL for (int r = 0; r < R; ++r) unpack<BITS>(codes_at[r], unpacked[r]);
      MKRS_UNROLL for (int m = 0; m < M; ++m) {
        __m512 sum[R];
        dot<BITS, LIMBS, CENTERED, R>(unpacked,
                                      c.input + m * c.unit_bytes + at * c.layout.vector_bytes, sum);
        MKRS_UNROLL for (int r = 0; r < R; ++r) {
          acc[r][m] = _mm512_fmadd_ps(sum[r], _mm512_permutexvar_ps(lanes, scale[r][m]), acc[r][m]);
        }
      }
    };
    __m512i packed[R];
    __m512i lane = spans.first_vector;
    int64_t v = first;
    const int64_t here = std::min(v + spans.vectors, c.layout.vectors);
    for (const int64_t full = std::min(here, full_vectors); v < full; ++v) {
      MKRS_UNROLL for (int r = 0; r < R; ++r) {
        packed[r] = _mm512_loadu_si512(codes[r] + 64 * v);
        _mm_prefetch(reinterpret_cast<const char*>(codes[r] + 64 * v + kPrefetchBytes),
                     _MM_HINT_T1);
      }
      multiply(v, packed, lane);
      lane = _mm512_add_epi32(lane, spans.vector_step);
    }
    if (v < here) {
      // The row's end: bytes past it belong to others and are not read.
      const __mmask64 mask = (uint64_t{1} << (row_bytes - 64 * v)) - 1;
      MKRS_UNROLL for (int r = 0; r < R; ++r) {
        packed[r] = _mm512_maskz_loadu_epi8(mask, codes[r] + 64 * v);
      }
      multiply(v, packed, lane);
    }
  }

  MKRS_UNROLL for (int m = 0; m < M; ++m) {
    const char* input = c.input + m * c.unit_bytes;
    float power;
    std::memcpy(&power, input + c.layout.power_at, sizeof power);
    MKRS_UNROLL for (int r = 0; r < R; ++r) {
      float value = _mm512_reduce_add_ps(acc[r][m]) * power;
      if (c.bias != nullptr) value += load_float(c.bias, n + r, c.out.type);
      store_float(c.out.data, (c.m0 + m) * c.out.stride + n + r, c.out.type, value);
    }
  }
}

template <int BITS, int LIMBS, bool CENTERED, int M>
void rows_range(const Call& c, int64_t begin, int64_t end) {
  // More weight rows share an activation's loads, which bind with several limbs; where memory
  // binds, more streams cost more than they save.
  constexpr int kRows = M == 1 && LIMBS > 1 && BITS != 8 ? 3 : 2;
  int64_t n = begin;
  PageTouch pages(c.w, begin, end);
  for (; n + kRows <= end; n += kRows) {
    pages.reach(n);
    rows_block<BITS, LIMBS, CENTERED, M, kRows>(c, n);
  }
  for (; n < end; ++n) rows_block<BITS, LIMBS, CENTERED, M, 1>(c, n);
}

using Range = void (*)(const Call&, int64_t, int64_t);

constexpr int64_t kPassInputs = 4;  // input rows of one pass: what accumulators have room for
constexpr int64_t kPassRows = 64;   // weight rows whose codes stay in L2 from pass to pass

template <int BITS, int LIMBS>
Range by_inputs(Scheme scheme, int64_t m) {
  constexpr Range ranges[kPassInputs] = {
      rows_range<BITS, LIMBS, true, 1>, rows_range<BITS, LIMBS, true, 2>,
      rows_range<BITS, LIMBS, true, 3>, rows_range<BITS, LIMBS, true, 4>};
  // Only symmetric codes are centred; one input row is where the terms' loads and sums show.
  if (m == 1 && scheme != Scheme::Symmetric) return rows_range<BITS, LIMBS, false, 1>;
  return ranges[m - 1];
}

template <int BITS>
Range by_limbs(int limbs, Scheme scheme, int64_t m) {
  return limbs == 1   ? by_inputs<BITS, 1>(scheme, m)
         : limbs == 2 ? by_inputs<BITS, 2>(scheme, m)
                      : by_inputs<BITS, 3>(scheme, m);
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
  alignas(64) int8_t linear[3][256];
  Span part;
  for (int64_t m = begin; m < end; ++m) {
    char* out = static_cast<char*>(scratch) + m * plan.unit_bytes;
    std::memset(out + layout.scales_at, 0, static_cast<size_t>(layout.bytes - layout.scales_at));
    float* scales = reinterpret_cast<float*>(out + layout.scales_at);
    float* sums = reinterpret_cast<float*>(out + layout.sums_at);
    float largest = 0.0f;
    double sum = 0.0;
    int64_t group = 0, group_end = w.group_size;
    for (int64_t v = 0; v < layout.vectors; ++v) {
      for (int64_t i = 0; i < vector_codes; i += plan.span) {
        const int64_t k = v * vector_codes + i;
        const int64_t n = std::min(plan.span, w.in_features - k);
        const void* source = advance(x.data, m * x.stride + k, x.type);
        // A span past the row's end splits into zeros.
        if (!split_span(source, x.type, n, plan.span, plan.limbs, top, part)) return false;
        for (int l = 0; l < plan.limbs; ++l) {
          std::memcpy(linear[l] + i, part.limb[l], static_cast<size_t>(plan.span));
        }
        if (n <= 0) continue;
        scales[k / plan.span] = part.scale;
        largest = std::max(largest, part.scale);
        sum += static_cast<double>(part.scale) * part.sum;
        if (k + n >= group_end || k + n == w.in_features) {
          sums[group++] = static_cast<float>(sum);
          sum = 0.0;
          group_end += w.group_size;
        }
      }
      store_vector(linear, plan.limbs, w, out + v * layout.vector_bytes);
    }
    int exponent = 0;
    if (largest > 0.0f) std::frexp(largest, &exponent);
    const float power = std::ldexp(1.0f, exponent);
    // Scales are at least kSmallestSpan / 2^23, so powers and their inverses are normal numbers.
    const float inverse = std::ldexp(1.0f, -exponent);
    for (int64_t i = 0; i < layout.spans; ++i) scales[i] *= inverse;
    for (int64_t i = 0; i < w.groups; ++i) sums[i] *= inverse;
    std::memcpy(out + layout.power_at, &power, sizeof power);
  }
  return true;
}

void rows_matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                 const void* scratch, const void* bias, int64_t begin, int64_t end,
                 const Output& out) {
  const Layout layout(w, plan.limbs, plan.span);
  const Spans spans(w, plan.span);
  const int64_t block = x.rows <= kPassInputs ? end - begin : kPassRows;
  for (int64_t n = begin; n < end; n += block) {
    for (int64_t m = 0; m < x.rows; m += kPassInputs) {
      const Call call{w,
                      layout,
                      spans,
                      static_cast<const char*>(scratch) + m * plan.unit_bytes,
                      plan.unit_bytes,
                      bias,
                      out,
                      m};
      const int64_t inputs = std::min(kPassInputs, x.rows - m);
      const Range range = w.bits == 8   ? by_limbs<8>(plan.limbs, w.scheme, inputs)
                          : w.bits == 4 ? by_limbs<4>(plan.limbs, w.scheme, inputs)
                                        : by_limbs<2>(plan.limbs, w.scheme, inputs);
      range(call, n, std::min(end, n + block));
    }
  }
}

}  // namespace mkrs::cpu::vnni

MKRS_VNNI_END

#endif  // __x86_64__
