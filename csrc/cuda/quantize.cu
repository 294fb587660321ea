// Floor: the weight read once and codes, scales and zeros written once, over the memory bandwidth.
//
// The arithmetic is that of csrc/cpu/generic.inc, operation by operation, so codes, scales and
// zeros are the same on every device. A group with inf or NaN, or whose scale or offset overflows,
// cannot be refused from a kernel without waiting for it: its scale is NaN instead, which the
// Python op reports.
#include <cfloat>

#include "common.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kVector = 8;  // elements a lane takes at a time
constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // rows a thread has in flight

struct Target {
  uint8_t* codes;
  void* scale;
  void* zero;  // uint8 zero points, offsets like scale, or null
  int64_t rows;
  int64_t in_features;
  int64_t stride;  // of the weight's rows, in elements
  int64_t group_size;
  int64_t groups;
  int shift;  // log2 of group_size where that is a power of two
  Scheme scheme;
  Float scale_type;
};

__device__ __forceinline__ float round_to(Float type, float x) {
  if (type == Float::F16) return __half2float(__float2half_rn(x));
  if (type == Float::BF16) return __bfloat162float(__float2bfloat16_rn(x));
  return x;
}

__device__ __forceinline__ void store_float(void* data, int64_t i, Float type, float x) {
  if (type == Float::F32) {
    static_cast<float*>(data)[i] = x;
  } else if (type == Float::F16) {
    static_cast<__half*>(data)[i] = __float2half_rn(x);
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
  }
}

struct Quantizer {
  float scale;
  float inverse;
  float shift;   // subtracted before rounding
  float center;  // added after rounding
};

// From a group's range; `index` is where its scale lies. One lane of the group stores.
template <int BITS>
__device__ __forceinline__ Quantizer quantizer_of(const Target& t, float low, float high,
                                                  bool finite, int64_t index, bool store) {
  constexpr int kLevels = (1 << BITS) - 1;
  constexpr float kStep = 1.0f / static_cast<float>(kLevels);
  Quantizer q{0.0f, 0.0f, 0.0f, 0.0f};
  const bool constant = low == high;
  if (t.scheme == Scheme::Symmetric) {
    const float extreme = -low >= high ? low : high;
    q.scale = round_to(t.scale_type, __fdiv_rn(-extreme, static_cast<float>(1 << (BITS - 1))));
    q.center = static_cast<float>(1 << (BITS - 1));
  } else if (t.scheme == Scheme::Asymmetric) {
    if (constant) {
      q.scale = round_to(t.scale_type, low);
    } else {
      q.scale = round_to(t.scale_type, __fsub_rn(__fmul_rn(fmaxf(high, 0.0f), kStep),
                                                 __fmul_rn(fminf(low, 0.0f), kStep)));
    }
  } else {
    q.shift = round_to(t.scale_type, low);
    if (!constant) {
      q.scale =
          round_to(t.scale_type, __fsub_rn(__fmul_rn(high, kStep), __fmul_rn(q.shift, kStep)));
    }
  }
  const bool valid = finite && fabsf(q.scale) <= FLT_MAX && fabsf(q.shift) <= FLT_MAX;
  if (fabsf(q.scale) < FLT_MIN) q.scale = 0.0f;  // its reciprocal could overflow
  q.inverse = q.scale == 0.0f ? 0.0f : __frcp_rn(q.scale);
  if (t.scheme == Scheme::Asymmetric && !constant) {
    q.center = fminf(fmaxf(rintf(__fmul_rn(-fminf(low, 0.0f), q.inverse)), 0.0f),
                     static_cast<float>(kLevels));
  }
  if (store) {
    store_float(t.scale, index, t.scale_type, valid ? q.scale : NAN);
    if (t.scheme == Scheme::Asymmetric) {
      static_cast<uint8_t*>(t.zero)[index] = static_cast<uint8_t>(q.center);
    } else if (t.scheme == Scheme::Affine) {
      store_float(t.zero, index, t.scale_type, q.shift);
    }
  }
  return q;
}

// Rounding by adding 1.5 * 2**23, whose last mantissa bit is worth 1: to nearest, ties to even,
// like rintf, without the slow conversion units. Clamping first changes nothing, the limits being
// integers.
template <int BITS>
__device__ __forceinline__ uint32_t code_of(const Quantizer& q, float w) {
  constexpr float kTop = (1 << BITS) - 1;
  const float v = __fmul_rn(__fsub_rn(w, q.shift), q.inverse);
  const float clamped = fminf(fmaxf(v, -q.center), kTop - q.center);
  return __float_as_uint(__fadd_rn(clamped, 12582912.0f)) - 0x4b400000u +
         static_cast<uint32_t>(static_cast<int>(q.center));
}

// kVector elements as loaded: converted only when they are used, so that loads overlap.
template <typename T>
struct Raw {
  uint4 words[sizeof(T) * kVector / 16];
  __device__ __forceinline__ void load(const T* p) {
#pragma unroll
    for (unsigned i = 0; i < sizeof(T) * kVector / 16; ++i) {
      words[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
    }
  }
  __device__ __forceinline__ void floats(float (&v)[kVector]) const {
    const T* t = reinterpret_cast<const T*>(words);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(t[i]);
  }
};

// Groups of a power of two up to 256: group_size / 8 adjacent lanes hold one. in_features is a
// multiple of 8 and rows are aligned. A block covers blockDim.y * kUnroll rows.
template <typename T, int BITS>
__global__ void __launch_bounds__(kThreads) quantize_vector_kernel(const T* weight, Target t) {
  const int lanes = static_cast<int>(t.group_size) / kVector;
  const int64_t k = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVector;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kUnroll + threadIdx.y;
  const bool in_row = k < t.in_features;
  Raw<T> raw[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t row = first + u * blockDim.y;
    if (in_row && row < t.rows) raw[u].load(weight + row * t.stride + k);
  }
  float low[kUnroll];  // minus infinity also where a value is not finite
  float high[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    low[u] = INFINITY;
    high[u] = -INFINITY;
    if (in_row && first + u * blockDim.y < t.rows) {
      float v[kVector];
      raw[u].floats(v);
      float probe = 0.0f;  // turns NaN when a value is not finite
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        low[u] = fminf(low[u], v[i]);
        high[u] = fmaxf(high[u], v[i]);
        probe = fmaf(v[i], 0.0f, probe);
      }
      if (probe != 0.0f) low[u] = -INFINITY;
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {  // every lane of the warp takes part
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      low[u] = fminf(low[u], __shfl_xor_sync(~0u, low[u], offset));
      high[u] = fmaxf(high[u], __shfl_xor_sync(~0u, high[u], offset));
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t row = first + u * blockDim.y;
    if (!in_row || row >= t.rows) continue;
    float v[kVector];
    raw[u].floats(v);
    const bool finite = low[u] >= -FLT_MAX && high[u] <= FLT_MAX;
    const int64_t index = row * t.groups + (k >> t.shift);
    const Quantizer q =
        quantizer_of<BITS>(t, low[u], high[u], finite, index, threadIdx.x % lanes == 0);
    uint8_t* out = t.codes + (row * t.in_features + k) * BITS / 8;
    uint64_t packed = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      packed |= static_cast<uint64_t>(code_of<BITS>(q, v[i])) << (i * BITS);
    }
    if constexpr (BITS == 8) *reinterpret_cast<unsigned long long*>(out) = packed;
    if constexpr (BITS == 4) *reinterpret_cast<uint32_t*>(out) = static_cast<uint32_t>(packed);
    if constexpr (BITS == 2)
      *reinterpret_cast<unsigned short*>(out) = static_cast<unsigned short>(packed);
  }
}

// Any group, one warp each: a pass for the range, a second (from cache) for the codes.
template <typename T, int BITS>
__global__ void __launch_bounds__(kThreads) quantize_group_kernel(const T* weight, Target t) {
  const int lane = threadIdx.x % 32;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (index >= t.rows * t.groups) return;
  const int64_t row = index / t.groups;
  const int64_t begin = (index - row * t.groups) * t.group_size;
  const int64_t end = min(t.in_features, begin + t.group_size);
  const T* w = weight + row * t.stride;
  float low = INFINITY;
  float high = -INFINITY;
  bool finite = true;
#pragma unroll 4
  for (int64_t k = begin + lane; k < end; k += 32) {
    const float v = to_float(w[k]);
    low = fminf(low, v);
    high = fmaxf(high, v);
    finite = finite && fabsf(v) <= FLT_MAX;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    low = fminf(low, __shfl_xor_sync(~0u, low, offset));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, offset));
  }
  finite = __all_sync(~0u, finite);
  const Quantizer q = quantizer_of<BITS>(t, low, high, finite, index, lane == 0);
  constexpr int kPerByte = 8 / BITS;
  uint8_t* out = t.codes + row * ((t.in_features * BITS + 7) / 8);
#pragma unroll 4
  for (int64_t k = begin + lane * kPerByte; k < end; k += 32 * kPerByte) {
    uint32_t byte = 0;
#pragma unroll
    for (int i = 0; i < kPerByte; ++i) {
      if (k + i < end) byte |= code_of<BITS>(q, to_float(w[k + i])) << (i * BITS);
    }
    out[k / kPerByte] = static_cast<uint8_t>(byte);
  }
}

// The same for 16-bit weights, where arithmetic rather than memory would be the limit: ranges two
// elements at a time, and one lane a group works out the quantizer.

__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b, __half) {
  const __half2 m = __hmin2_nan(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&m);
}
__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b, __nv_bfloat16) {
  const __nv_bfloat162 m =
      __hmin2_nan(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&m);
}

constexpr uint32_t kSigns = 0x80008000u;

// (minimum, minus the maximum) of eight elements, so that one minimum joins two such ranges. NaN
// stays, and infinities are limits: both show in the result.
template <typename T>
__device__ __forceinline__ uint32_t range_of(const uint4& v) {
  const T type{};
  uint32_t low = min_pair(min_pair(v.x, v.y, type), min_pair(v.z, v.w, type), type);
  uint32_t high = min_pair(min_pair(v.x ^ kSigns, v.y ^ kSigns, type),
                           min_pair(v.z ^ kSigns, v.w ^ kSigns, type), type);
  low = min_pair(low, __byte_perm(low, low, 0x1032), type);
  high = min_pair(high, __byte_perm(high, high, 0x1032), type);
  return __byte_perm(low, high, 0x5410);
}

// Codes of eight elements whose distance from the group's shift is less than 2**15 steps: the
// rounding of code_of, with both limits applied to two integers of 16 bits at a time.
template <int BITS>
__device__ __forceinline__ uint2 narrow_codes(const float (&v)[kVector], float shift, float inverse,
                                              uint32_t center) {
  uint32_t rounded[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    rounded[i] =
        __float_as_uint(__fadd_rn(__fmul_rn(__fsub_rn(v[i], shift), inverse), 12582912.0f));
  }
  constexpr uint32_t kTop = ((1u << BITS) - 1) * 0x10001u;
  const auto pair = [&](int low, int high) {
    return __viaddmin_s16x2_relu(__byte_perm(rounded[low], rounded[high], 0x5410),
                                 center * 0x10001u, kTop);
  };
  if constexpr (BITS == 8) {
    return make_uint2(pair(0, 2) | pair(1, 3) << 8, pair(4, 6) | pair(5, 7) << 8);
  } else {
    const uint32_t all =
        pair(0, 4) | pair(1, 5) << BITS | pair(2, 6) << (2 * BITS) | pair(3, 7) << (3 * BITS);
    return make_uint2(BITS == 4 ? all : __byte_perm(all, 0, 0x4420), 0);
  }
}

template <typename T, int BITS>
__global__ void __launch_bounds__(kThreads) quantize_half_kernel(const T* weight, Target t) {
  const int lanes = static_cast<int>(t.group_size) / kVector;  // of a group
  const int lane = threadIdx.x % lanes;
  const int64_t k = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVector;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kUnroll + threadIdx.y;
  const bool in_row = k < t.in_features;
  const bool group_in_row = k - lane * kVector < t.in_features;
  uint4 raw[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t row = first + u * blockDim.y;
    raw[u] = make_uint4(0, 0, 0, 0);
    if (in_row && row < t.rows) {
      raw[u] = __ldg(reinterpret_cast<const uint4*>(weight + row * t.stride + k));
    }
  }
  constexpr uint32_t kNothing = std::is_same_v<T, __half> ? 0x7c007c00u : 0x7f807f80u;
  uint32_t range[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) range[u] = in_row ? range_of<T>(raw[u]) : kNothing;
  for (int offset = lanes / 2; offset > 0; offset /= 2) {  // every lane of the warp takes part
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      range[u] = min_pair(range[u], __shfl_xor_sync(~0u, range[u], offset), T{});
    }
  }

  // Lane i of a group works for its row i (and i + 2 where groups have two lanes only).
  float shift[kUnroll];
  float inverse[kUnroll];
  float center[kUnroll];
  bool narrow = true;
  const int stride = lanes < kUnroll ? lanes : kUnroll;
  const int passes = kUnroll / stride;
#pragma unroll
  for (int pass = 0; pass < kUnroll / 2; ++pass) {
    if (pass >= passes) break;
    const int mine = pass * stride + lane % stride;
    const uint32_t bits = mine == 0   ? range[0]
                          : mine == 1 ? range[1]
                          : mine == 2 ? range[2]
                                      : range[3];
    const T* ends = reinterpret_cast<const T*>(&bits);
    const float low = to_float(ends[0]);
    const float high = -to_float(ends[1]);
    const int64_t row = first + mine * blockDim.y;
    const bool finite = fabsf(low) <= FLT_MAX && fabsf(high) <= FLT_MAX;
    const bool store = lane < stride && group_in_row && row < t.rows;
    const Quantizer q =
        quantizer_of<BITS>(t, low, high, finite, row * t.groups + (k >> t.shift), store);
    narrow &= fmaxf(fabsf(low - q.shift), fabsf(high - q.shift)) * fabsf(q.inverse) < 30000.0f;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (u / stride != pass) continue;
      shift[u] = __shfl_sync(~0u, q.shift, u % stride, lanes);
      inverse[u] = __shfl_sync(~0u, q.inverse, u % stride, lanes);
      center[u] = __shfl_sync(~0u, q.center, u % stride, lanes);
    }
  }
  narrow = __all_sync(~0u, narrow || !group_in_row);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t row = first + u * blockDim.y;
    if (!in_row || row >= t.rows) continue;
    const T* elements = reinterpret_cast<const T*>(&raw[u]);
    float v[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = to_float(elements[i]);
    uint2 packed;
    if (narrow) {
      packed = narrow_codes<BITS>(v, shift[u], inverse[u], static_cast<uint32_t>(center[u]));
    } else {
      const Quantizer q{0.0f, inverse[u], shift[u], center[u]};
      uint64_t all = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        all |= static_cast<uint64_t>(code_of<BITS>(q, v[i])) << (i * BITS);
      }
      packed = make_uint2(static_cast<uint32_t>(all), static_cast<uint32_t>(all >> 32));
    }
    uint8_t* out = t.codes + (row * t.in_features + k) * BITS / 8;
    if constexpr (BITS == 8) *reinterpret_cast<uint2*>(out) = packed;
    if constexpr (BITS == 4) *reinterpret_cast<uint32_t*>(out) = packed.x;
    if constexpr (BITS == 2) {
      *reinterpret_cast<unsigned short*>(out) = static_cast<unsigned short>(packed.x);
    }
  }
}

template <typename T, int BITS>
void launch(const char* op, const T* weight, const Target& t, bool vector, cudaStream_t stream) {
  if (vector) {
    const int64_t vectors = t.in_features / kVector;
    int width = 32;
    while (width < kThreads && width < vectors) width *= 2;
    const dim3 block(width, kThreads / width);
    const dim3 grid(static_cast<unsigned>(ceil_div(t.rows, int64_t{block.y} * kUnroll)),
                    static_cast<unsigned>(ceil_div(vectors, width)));
    if constexpr (sizeof(T) == 2) {
      quantize_half_kernel<T, BITS><<<grid, block, 0, stream>>>(weight, t);
    } else {
      quantize_vector_kernel<T, BITS><<<grid, block, 0, stream>>>(weight, t);
    }
  } else {
    const int64_t blocks = ceil_div(t.rows * t.groups * 32, kThreads);
    MKRS_CHECK(blocks < (int64_t{1} << 31), op, "the groups must fit one CUDA grid, got ",
               t.rows * t.groups);
    quantize_group_kernel<T, BITS>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(weight, t);
  }
  check_launch(op);
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& weight, int64_t bits, int64_t group_size,
                                            const std::string& scheme_name,
                                            const std::optional<ScalarType>& requested_dtype) {
  const char* op = "quantize";
  const Scope scope(op, weight);
  const auto [scheme, type, scale_type, scale_dtype, in_features, groups, codes, scale, zero] =
      check_quantize(op, weight, bits, group_size, scheme_name, requested_dtype);
  const Tensor flat = has_uniform_rows(weight) ? weight : torch::stable::contiguous(weight);

  Target t;
  t.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  t.scale = scale.mutable_data_ptr();
  t.zero = scheme == Scheme::Symmetric ? nullptr : zero.mutable_data_ptr();
  t.rows = rows_of(weight);
  t.in_features = in_features;
  t.stride = row_stride(flat);
  t.group_size = std::max<int64_t>(1, std::min(group_size, in_features));
  t.groups = groups;
  t.shift = 0;
  while ((int64_t{2} << t.shift) <= t.group_size) ++t.shift;
  t.scheme = scheme;
  t.scale_type = scale_type;
  if (t.rows == 0 || in_features == 0) return {codes, scale, zero};

  const int64_t row_bytes = t.stride * float_size(type);
  const bool power_of_two = (t.group_size & (t.group_size - 1)) == 0;
  const bool vector = power_of_two && t.group_size >= 2 * kVector && t.group_size <= 256 &&
                      in_features % kVector == 0 && aligned(flat.const_data_ptr(), 16) &&
                      row_bytes % 16 == 0 && ceil_div(in_features, kVector * 32) <= 65535 &&
                      t.rows < (int64_t{1} << 31);
  dispatch_float(type, [&](auto element) {
    using T = decltype(element);
    dispatch_bits(static_cast<int>(bits), [&](auto b) {
      launch<T, decltype(b)::value>(op, static_cast<const T*>(flat.const_data_ptr()), t, vector,
                                    scope.stream());
    });
  });
  return {codes, scale, zero};
}

}  // namespace
}  // namespace mkrs::cuda

STABLE_TORCH_LIBRARY_IMPL(mkrs, CUDA, m) {
  m.impl("quantize", TORCH_BOX(&mkrs::cuda::quantize));
}
