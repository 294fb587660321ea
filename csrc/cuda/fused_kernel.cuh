// Floor: 2 m N K operations over the tensor cores' peak, or codes and scales over the memory
// bandwidth. Per 64 k a multiprocessor needs 4 cycles a row of input for the products of 128 weight
// rows, and about 280 issue cycles to dequantize them: hidden behind the products from 64 rows on.
//
// The weights are the first operand, dequantized in registers (f32 arithmetic, one rounding to the
// input's type, as a dense layer has it); the activations come through the bulk copy engine,
// swizzled as the products want them. A producer warpgroup keeps a ring of stages filled: one
// thread starts the bulk copies, all of them prepare the scales of a row each. A pair of consumer
// warpgroups has 64 weight rows each: one dequantizes while the other multiplies, and each prepares
// its next step while its products run. Few input rows need few registers: then two or three pairs
// take every second or third stage, and their sums are added in the end.
//
// The kernel may be launched while the one before it still runs: until that is complete, it asks
// for its first codes into L2 and reads nothing.
#pragma once

#include "fused.cuh"
#include "hopper.cuh"
#include "rounded.cuh"
#include "sum_partials.cuh"
#include "wgmma.cuh"

namespace mkrs::cuda {

constexpr int kFusedRows = 128;  // weight rows of a block
constexpr int kFusedDepth = 64;  // k of a stage

struct FusedParams {
  QuantizedWeight w;
  const void* bias;
  void* out;
  float* partial;  // [splits, m, N] where K is split over blocks, else null
  int m;
  int shift;
  int steps;        // stages' worth of k in a row
  int split_steps;  // of one block
  // Scales are 16 bits wide and aligned so that a producer thread can load those of kFusedBatch
  // steps at once. log2 of the steps that share one.
  bool batched;
  int batch_shift;
};

// Steps whose scales a producer thread holds. Few loads, each for many steps: a warp that waits for
// one of many loads in flight often waits for the youngest of them.
constexpr int kFusedBatch = 8;

template <int BITS>
constexpr int kFusedCodeBytes = kFusedRows * kFusedDepth * BITS / 8;

template <int BITS, int M>
constexpr int kFusedStageBytes = M * kFusedDepth * 2 + kFusedCodeBytes<BITS>;

// Scales of a stage: one or four runs of k times the rows.
template <int GROUPS>
constexpr int kFusedScaleBytes = GROUPS * kFusedRows * 8;

template <int M>
constexpr int kFusedStages = M == 256   ? 4
                             : M == 128 ? 6
                             : M == 64  ? 10
                                        : 12;

// Pairs of consumer warpgroups.
template <int M>
constexpr int kFusedPairs = M == 16   ? 3
                            : M == 64 ? 2
                                      : 1;

template <int M>
constexpr int kFusedConsumers = 256 * kFusedPairs<M>;  // threads

template <int M>
constexpr int kFusedThreads = kFusedConsumers<M> + 128;

constexpr int kFusedPitch = kFusedRows + 8;  // of a row of results in shared memory
constexpr int kFusedSumOffset = 32 * 1024;   // in shared memory, of the sums of other pairs

// Of the 64 codes of a row, which `words` holds, those of one lane, as (value + bias) * factor: for
// each run of 16 the codes 2t, 2t + 1, 2t + 8, 2t + 9. The constants are those of element_scale.
template <int BITS>
__device__ __forceinline__ void fused_elements(const uint32_t (&words)[2 * BITS], int t,
                                               float (&v)[16]) {
  if constexpr (BITS == 8) {
    const uint32_t select = 0x10 + 0x22 * t;  // bytes 2t and 2t + 1 of eight
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t two = __byte_perm(words[2 * i], words[2 * i + 1], select);
      v[2 * i] = __uint_as_float(__byte_perm(two, 0x4bu, 0x4550)) - 8388608.0f;
      v[2 * i + 1] = __uint_as_float(__byte_perm(two, 0x4bu, 0x4551)) - 8388608.0f;
    }
  } else if constexpr (BITS == 4) {
    const uint32_t select = 0x40 + 0x11 * t;  // byte t of both words
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = __byte_perm(words[4 * i], words[4 * i + 1], select);
      const uint32_t high = __byte_perm(words[4 * i + 2], words[4 * i + 3], select);
      const uint32_t eight = __byte_perm(low, high, 0x5410);
      const uint32_t even = (eight << 3) & 0x78787878u;
      const uint32_t odd = (eight >> 1) & 0x78787878u;
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // 8 + q / 2
        v[8 * i + 2 * j] = __uint_as_float(__byte_perm(even, 0x41u, 0x4055 + (j << 8)));
        v[8 * i + 2 * j + 1] = __uint_as_float(__byte_perm(odd, 0x41u, 0x4055 + (j << 8)));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t four = words[i] >> (4 * t);
      v[4 * i] = __uint_as_float((four << 21 & 0x600000u) | 0x40000000u);  // 2 + q / 2
      v[4 * i + 1] = __uint_as_float((four << 19 & 0x600000u) | 0x40000000u);
      v[4 * i + 2] = __uint_as_float((four << 5 & 0x600000u) | 0x40000000u);
      v[4 * i + 3] = __uint_as_float((four << 3 & 0x600000u) | 0x40000000u);
    }
  }
}

// 4, 8 or 16 bytes, in aligned halves of which the second may be missing.
__device__ __forceinline__ void load_words(const char* from, int bytes, bool whole,
                                           uint32_t (&words)[4]) {
  if (bytes == 16) {
    const uint2 low = __ldg(reinterpret_cast<const uint2*>(from));
    words[0] = low.x, words[1] = low.y;
    if (whole) {
      const uint2 high = __ldg(reinterpret_cast<const uint2*>(from) + 1);
      words[2] = high.x, words[3] = high.y;
    }
  } else {
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    if (bytes == 8 && whole) words[1] = __ldg(reinterpret_cast<const uint32_t*>(from) + 1);
  }
}

// Eight bytes to eight halves.
__device__ __forceinline__ void widen_bytes(uint32_t (&words)[4]) {
  const uint32_t low = words[0];
  const uint32_t high = words[1];
  words[0] = __byte_perm(low, 0, 0x4140);
  words[1] = __byte_perm(low, 0, 0x4342);
  words[2] = __byte_perm(high, 0, 0x4140);
  words[3] = __byte_perm(high, 0, 0x4342);
}

// Each of the first 8 >> shift halves 1 << shift times; shift is 0, 1 or 2.
__device__ __forceinline__ void spread_halves(const uint32_t (&from)[4], int shift,
                                              uint32_t (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t twice = __byte_perm(from[i / 2], 0, i % 2 ? 0x3232 : 0x1010);
    const uint32_t four = __byte_perm(from[0], 0, i / 2 ? 0x3232 : 0x1010);
    to[i] = shift == 0 ? from[i] : shift == 1 ? twice : four;
  }
}

// Grid (input tiles, weight tiles, splits of K). GROUPS: scales per stage and row, 1 or 4.
template <typename T, int BITS, int M, int GROUPS>
__global__ void __launch_bounds__(kFusedThreads<M>, 1)
    fused_kernel(const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap code_map, const FusedParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kStages = kFusedStages<M>;
  constexpr int kPairs = kFusedPairs<M>;
  constexpr int kStageBytes = kFusedStageBytes<BITS, M>;
  constexpr int kInputBytes = M * kFusedDepth * 2;
  constexpr int kRowBytes = kFusedDepth * BITS / 8;
  extern __shared__ unsigned char unaligned[];
  unsigned char* shared =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(unaligned) + 1023) & ~1023ull);
  __shared__ uint64_t barriers[2 * kStages];
  const auto address = [](const void* q) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(q));
  };
  const uint32_t full = address(barriers);
  const uint32_t empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1 + 128);
      barrier_init(empty + 8 * s, 8);  // one arrival a consumer warp
    }
    barrier_init_fence();
  }
  constexpr int kAhead = GROUPS == 1 ? kFusedBatch : 2;
  float2* all_scales = reinterpret_cast<float2*>(shared + kStages * kStageBytes);
  const int m0 = blockIdx.x * M;
  const int n0 = blockIdx.y * kFusedRows;
  const int first = blockIdx.z * p.split_steps;
  const int steps = min(p.split_steps, p.steps - first);
  if (threadIdx.x == 0) {
    for (int s = 0; s < min(steps, kStages); ++s) {
      prefetch_box(&code_map, (first + s) * kRowBytes, n0);
    }
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();
  const int group = threadIdx.x / 128;  // warpgroup

  if (group == 2 * kPairs) {
    if constexpr (M > 16) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;\n");
    const int r = threadIdx.x - kFusedConsumers<M>;
    const int64_t n = n0 + r;
    const QuantizedWeight& w = p.w;
    // Waits for step s's stage and has its inputs and codes copied.
    const auto fill = [&](int s) {
      const int stage = s % kStages;
      if (s >= kStages) barrier_wait(empty + 8 * stage, (s / kStages - 1) & 1);
      if (r == 0) {
        const uint32_t barrier = full + 8 * stage;
        const uint32_t target = address(shared + stage * kStageBytes);
        barrier_expect(barrier, kStageBytes);
        copy_box(target, &x_map, (first + s) * kFusedDepth, m0, barrier);
        copy_box(target + kInputBytes, &code_map, (first + s) * kRowBytes, n0, barrier);
      }
    };
    const auto share = [&](int s, const RawGroup(&raw)[GROUPS]) {
      const int stage = s % kStages;
      float2* scales = all_scales + stage * (GROUPS * kFusedRows) + r;
#pragma unroll
      for (int j = 0; j < GROUPS; ++j) scales[j * kFusedRows] = element_scale<BITS>(w, raw[j]);
      barrier_arrive(full + 8 * stage);
    };
    if (GROUPS == 1 && p.batched) {
      const bool inside = n < w.rows;
      const int64_t column = first >> p.batch_shift;
      const char* scale = static_cast<const char*>(w.scale) + (n * w.scale_stride + column) * 2;
      const bool narrow = w.scheme == Scheme::Asymmetric;  // zero points of a byte
      const char* zero =
          static_cast<const char*>(w.zero) + (n * w.zero_stride + column) * (narrow ? 1 : 2);
      const int scale_bytes = 2 * kFusedBatch >> p.batch_shift;
      const int zero_bytes = w.scheme == Scheme::Symmetric ? 0
                             : narrow                      ? scale_bytes / 2
                                                           : scale_bytes;
      uint32_t scale_next[4] = {};
      uint32_t zero_next[4] = {};
      const auto fetch = [&](int base) {
        if (base >= steps || !inside) return;
        const int batch = base / kFusedBatch;
        const bool whole = p.batch_shift > 0 || base + kFusedBatch / 2 < steps;
        load_words(scale + batch * scale_bytes, scale_bytes, whole, scale_next);
        if (zero_bytes > 0) load_words(zero + batch * zero_bytes, zero_bytes, whole, zero_next);
      };
      fetch(0);
      for (int base = 0; base < steps; base += kFusedBatch) {
        uint32_t scale_now[4];
        uint32_t zero_now[4];
        spread_halves(scale_next, p.batch_shift, scale_now);
        if (narrow) widen_bytes(zero_next);
        spread_halves(zero_next, p.batch_shift, zero_now);
        fetch(base + kFusedBatch);
#pragma unroll
        for (int i = 0; i < kFusedBatch; ++i) {
          if (base + i >= steps) break;
          fill(base + i);
          RawGroup raw[GROUPS];
          raw[0] = RawGroup{scale_now[i / 2] >> (i % 2 * 16) & 0xffffu,
                            zero_now[i / 2] >> (i % 2 * 16) & 0xffffu};
          share(base + i, raw);
        }
      }
    } else {
      RawGroup raw[kAhead][GROUPS];
      const auto fetch = [&](int s, RawGroup(&to)[GROUPS]) {
        const int k = (first + s) * kFusedDepth;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
          const int at = k + i * (kFusedDepth / GROUPS);
          to[i] = RawGroup{0, 0};
          if (s < steps && n < w.rows && at < w.in_features) {
            to[i] = load_group(w, n, at >> p.shift);
          }
        }
      };
#pragma unroll
      for (int i = 0; i < kAhead; ++i) fetch(i, raw[i]);
      for (int base = 0; base < steps; base += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (base + i >= steps) break;
          fill(base + i);
          share(base + i, raw[i]);
          fetch(base + i + kAhead, raw[i]);
        }
      }
    }
  } else {
    if constexpr (M > 64) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 232;\n");
    } else if constexpr (M == 64) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 104;\n");
    }
    const int warp = threadIdx.x / 32 % 4;
    const int lane = threadIdx.x % 32;
    const int g = lane / 4;
    const int t = lane % 4;
    const int row = group % 2 * 64 + warp * 16 + g;  // and row + 8
    const int pair = group / 2;
    const QuantizedWeight& w = p.w;

    float acc[M / 2];
#pragma unroll
    for (int i = 0; i < M / 2; ++i) acc[i] = 0.0f;
    const auto dequantize = [&](int s, uint32_t (&a)[4][4]) {
      const int stage = s % kStages;
      barrier_wait(full + 8 * stage, (s / kStages) & 1);
      const unsigned char* codes = shared + stage * kStageBytes + kInputBytes;
      const float2* scales = all_scales + stage * (GROUPS * kFusedRows) + row;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint4* from = reinterpret_cast<const uint4*>(codes + (row + 8 * h) * kRowBytes);
        uint32_t words[kRowBytes / 4];
#pragma unroll
        for (int i = 0; i < kRowBytes / 16; ++i) {
          const uint4 v = from[i];
          words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z,
                    words[4 * i + 3] = v.w;
        }
        float v[16];
        fused_elements<BITS>(words, t, v);
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
          const float2 scale = scales[(GROUPS == 4 ? kk : 0) * kFusedRows + 8 * h];
#pragma unroll
          for (int i = 0; i < 4; ++i) v[4 * kk + i] = fmaf(v[4 * kk + i], scale.x, scale.y);
          a[kk][h] = pack_pair<T>(v[4 * kk], v[4 * kk + 1]);
          a[kk][2 + h] = pack_pair<T>(v[4 * kk + 2], v[4 * kk + 3]);
        }
      }
    };
    const auto multiply = [&](int s, const uint32_t (&a)[4][4]) {
      const uint64_t b = wgmma::descriptor(address(shared + s % kStages * kStageBytes));
      wgmma::fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma::multiply<T, M>(acc, a[kk], b + 2 * kk, 1);
      wgmma::commit();
    };
    const auto release = [&](int s) {
      wgmma::wait();
      // Each warp for itself: another one may still be reading codes and scales.
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * (s % kStages));
    };
    if constexpr (kPairs == 1) {
      // The products of one step run while the next one's weights are dequantized.
      uint32_t even[4][4];
      uint32_t odd[4][4];
      dequantize(0, even);
      for (int s = 0; s < steps; s += 2) {
        multiply(s, even);
        if (s + 1 < steps) dequantize(s + 1, odd);
        release(s);
        if (s + 1 == steps) break;
        multiply(s + 1, odd);
        if (s + 2 < steps) dequantize(s + 2, even);
        release(s + 1);
      }
    } else {
      for (int s = pair; s < steps; s += kPairs) {
        uint32_t a[4][4];
        dequantize(s, a);
        multiply(s, a);
        release(s);
      }
    }

    // The stages are idle once all consumers are here.
    asm volatile("bar.sync 1, %0;\n" ::"n"(kFusedConsumers<M>) : "memory");
    if constexpr (kPairs > 1) {
      float* sums = reinterpret_cast<float*>(shared + kFusedSumOffset) + threadIdx.x % 256;
      if (pair > 0) {
#pragma unroll
        for (int i = 0; i < M / 2; ++i) sums[((pair - 1) * (M / 2) + i) * 256] = acc[i];
      }
      asm volatile("bar.sync 1, %0;\n" ::"n"(kFusedConsumers<M>) : "memory");
      if (pair > 0) return;
#pragma unroll
      for (int i = 0; i < (kPairs - 1) * (M / 2); ++i) acc[i % (M / 2)] += sums[i * 256];
    }

    // ---- results: lane holds rows `row`, `row` + 8 of columns 8j + 2t, 8j + 2t + 1 ----
    if (p.partial != nullptr) {
      float* partial = p.partial + static_cast<int64_t>(blockIdx.z) * p.m * w.rows;
#pragma unroll
      for (int i = 0; i < M / 2; ++i) {
        const int64_t m = m0 + i / 4 * 8 + 2 * t + (i & 1);
        const int64_t n = n0 + row + (i & 2 ? 8 : 0);
        if (m < p.m && n < w.rows) partial[m * w.rows + n] = acc[i];
      }
    } else {
      // Through shared memory, so that rows of the output are written in 16-byte pieces.
      float bias[2] = {0.0f, 0.0f};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t n = n0 + row + 8 * h;
        if (p.bias != nullptr && n < w.rows) bias[h] = to_float(static_cast<const T*>(p.bias)[n]);
      }
      T* tile = reinterpret_cast<T*>(shared);
#pragma unroll
      for (int i = 0; i < M / 2; ++i) {
        const int m = i / 4 * 8 + 2 * t + (i & 1);
        tile[m * kFusedPitch + row + (i & 2 ? 8 : 0)] = from_float<T>(acc[i] + bias[i / 2 % 2]);
      }
      asm volatile("bar.sync 2, 256;\n" ::: "memory");
      T* out = static_cast<T*>(p.out);
      const bool whole = n0 + kFusedRows <= w.rows && w.rows % 8 == 0;
      for (int i = threadIdx.x; i < M * (kFusedRows / 8); i += 256) {
        const int m = i / (kFusedRows / 8);
        const int n = i % (kFusedRows / 8) * 8;
        if (m0 + m >= p.m) break;
        T* to = out + static_cast<int64_t>(m0 + m) * w.rows + n0 + n;
        if (whole) {
          *reinterpret_cast<uint4*>(to) =
              *reinterpret_cast<const uint4*>(tile + m * kFusedPitch + n);
        } else {
          for (int j = 0; j < 8 && n0 + n + j < w.rows; ++j) to[j] = tile[m * kFusedPitch + n + j];
        }
      }
    }
  }
#endif
}

// ---- host ---------------------------------------------------------------------------------------

template <typename T, int BITS, int M, int GROUPS>
void launch_fused(const char* op, const MatmulCall& call, const DeviceInfo& info,
                  const Tensor& like, cudaStream_t stream) {
  const QuantizedWeight& w = call.w;
  const int64_t m_tiles = ceil_div(call.m, M);
  const int64_t n_tiles = ceil_div(w.rows, kFusedRows);
  const int64_t steps = ceil_div(w.in_features, kFusedDepth);
  // A few idle multiprocessors cost less than adding up partial sums.
  int64_t splits = std::max<int64_t>(
      1, std::min<int64_t>(info.multiprocessors / (m_tiles * n_tiles), steps / 8));
  // Can scales be loaded for kFusedBatch steps at once?
  int batch_shift = 0;
  while ((int64_t{kFusedDepth} << batch_shift) < w.group_size) ++batch_shift;
  const int scale_bytes = 2 * kFusedBatch >> batch_shift;
  const int zero_bytes = w.scheme == Scheme::Asymmetric ? scale_bytes / 2 : scale_bytes;
  const auto loadable = [](const void* data, int64_t stride_bytes, int bytes) {
    const int half = std::max(4, bytes / 2);
    return bytes >= 4 && aligned(data, half) && stride_bytes % half == 0;
  };
  const bool batched =
      GROUPS == 1 && w.groups > 1 && w.scale_type != Float::F32 && batch_shift <= 2 &&
      steps % (batch_shift == 0 ? kFusedBatch / 2 : kFusedBatch) == 0 &&
      loadable(w.scale, w.scale_stride * 2, scale_bytes) &&
      (w.scheme == Scheme::Symmetric ||
       loadable(w.zero, w.zero_stride * (w.scheme == Scheme::Asymmetric ? 1 : 2), zero_bytes));
  int64_t split_steps = ceil_div(steps, splits);
  if (batched) split_steps = ceil_div(split_steps, kFusedBatch) * kFusedBatch;
  splits = ceil_div(steps, split_steps);

  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUtensorMap x_map = tensor_map(op, kType, call.x, w.in_features, call.m, call.x_stride * 2,
                                       kFusedDepth, M, CU_TENSOR_MAP_SWIZZLE_128B);
  const CUtensorMap code_map = tensor_map(
      op, CU_TENSOR_MAP_DATA_TYPE_UINT8, w.codes, code_bytes(w.in_features, BITS), w.rows,
      w.codes_stride, kFusedDepth * BITS / 8, kFusedRows, CU_TENSOR_MAP_SWIZZLE_NONE);
  std::optional<Tensor> partial;
  if (splits > 1) partial = empty_on(like, {splits, call.m, w.rows}, ScalarType::Float);
  const FusedParams p{w,
                      call.bias,
                      call.out,
                      splits > 1 ? static_cast<float*>(partial->mutable_data_ptr()) : nullptr,
                      static_cast<int>(call.m),
                      std::min(group_shift(w), 31),
                      static_cast<int>(steps),
                      static_cast<int>(split_steps),
                      batched,
                      batch_shift};
  constexpr int kStageBytes = kFusedStageBytes<BITS, M> + kFusedScaleBytes<GROUPS>;
  constexpr int kShared = kStageBytes * kFusedStages<M> + 1024;
  static_assert(M * kFusedPitch * 2 <= (kFusedPairs<M> > 1 ? kFusedSumOffset : kShared - 1024));
  static_assert(kFusedSumOffset + (kFusedPairs<M> - 1) * M * 512 <= kShared - 1024);
  const auto kernel = fused_kernel<T, BITS, M, GROUPS>;
  check_cuda(op, "asking for shared memory",
             cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const dim3 grid(static_cast<unsigned>(m_tiles), static_cast<unsigned>(n_tiles),
                  static_cast<unsigned>(splits));
  launch_overlapped(op, kernel, grid, kFusedThreads<M>, kShared, dim3(1), stream, x_map, code_map,
                    p);
  if (splits > 1) {
    launch_sum_partials(op, p.partial, splits, call.m, w.rows, call.bias, call.out, call.type,
                        stream);
  }
}

template <typename T>
bool run_fused(const char* op, const MatmulCall& call, const DeviceInfo& info, const Tensor& like,
               cudaStream_t stream) {
  const QuantizedWeight& w = call.w;
  const bool fits = info.major == 9 && aligned(call.x, 16) && call.x_stride % 8 == 0 &&
                    aligned(w.codes, 16) && w.codes_stride % 16 == 0 &&
                    w.in_features >= kFusedDepth && w.in_features < (int64_t{1} << 30) &&
                    ceil_div(w.rows, kFusedRows) <= 65535 && call.m < (int64_t{1} << 30) &&
                    w.codes_stride > 0 && call.x_stride >= w.in_features;
  if (!fits) return false;
  dispatch_bits(w.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    const auto with_rows = [&](auto rows) {
      constexpr int kM = decltype(rows)::value;
      if (w.groups <= 1 || w.group_size >= kFusedDepth) {
        launch_fused<T, kBits, kM, 1>(op, call, info, like, stream);
      } else {
        launch_fused<T, kBits, kM, 4>(op, call, info, like, stream);
      }
    };
    if (call.m <= 16) {
      with_rows(std::integral_constant<int, 16>{});
    } else if (call.m <= 64) {
      with_rows(std::integral_constant<int, 64>{});
    } else if (call.m <= 128) {
      with_rows(std::integral_constant<int, 128>{});
    } else {
      with_rows(std::integral_constant<int, 256>{});
    }
  });
  return true;
}

}  // namespace mkrs::cuda
