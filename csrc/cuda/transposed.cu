// input [m, N] @ W -> [m, K] on tensor cores, where the summed index is the weight's row.
//
// Floor: codes and scales read once over the memory bandwidth. At 4 bits an H100 then has to take
// in about 20 weights a clock and multiprocessor; every instruction a warp spends on a weight of
// each lane costs 4% of its issue slots.
//
// A warp has 64 columns, a run inside one group, and walks down its rows 32 at a time. An operand
// register holds two neighbours of the summed index, so codes of the same column in two rows; two
// rows' words joined by halves hold four such pairs, and lane g takes 8 columns, which are rows g
// and g + 8 of four products. Which column is which row of a product does not matter to the sums.
//
// - Up to 8 input rows nothing is rounded: codes become exact integers, and what multiplies
//   them is input * scale, an f32 number as the sum of three bf16 limbs. Each lane works these out
//   for one weight row, and shares them with its warp; input * shift is summed in f32 beside it.
// - Above, weights are rounded to the input's type, as in a dense layer, and inputs are operands as
//   they lie in memory.
//
// The sums of row splits go to memory as f32 and are added by sum_partials.cu in a fixed order.
#include "hopper.cuh"
#include "transposed_walk.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kThreads = kTransposedWarps * 32;
constexpr int kLimbs = 3;  // 3 x 8 bits are f32's mantissa

// Blocks of a multiprocessor, for a number of input rows.
constexpr int transposed_blocks(int m) {
  return m <= 16 ? 2 : 1;
}

// The sums of one input row and the lane's columns.
__device__ __forceinline__ void store_partial(const TransposedParams& p, const TransposedPlace& at,
                                              int m, const float (&v)[8]) {
  const int64_t width = p.w.in_features;
  float* to = p.partial + (static_cast<int64_t>(blockIdx.y) * p.m + m) * width + at.k;
  if (at.k + 8 <= width && width % 4 == 0) {
    reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (at.k + i < width) to[i] = v[i];
    }
  }
}

// Grid (tiles of K, splits of N). M: input rows, rounded up to 1, 2, 4 or 8.
template <typename T, int BITS, int M>
__global__ void __launch_bounds__(kThreads, transposed_blocks(M))
    transposed_exact_kernel(const TransposedParams p) {
  constexpr int kAhead = 2;  // steps of scales and inputs in registers
  const QuantizedWeight& w = p.w;
  const TransposedPlace at = transposed_place<BITS>(p);
  // [buffer][limb][input row][weight row of the step], a warp each.
  __shared__ __align__(16) unsigned short all_limbs[kTransposedWarps][2][kLimbs][8][32];
  extern __shared__ __align__(128) unsigned char rings[];
  const unsigned char* ring = rings + at.warp * (kTransposedStages * kTransposedSlotBytes<BITS>);
  auto& limbs = all_limbs[at.warp];
  for (unsigned i = at.lane; i < sizeof(limbs) / 16; i += 32) {
    reinterpret_cast<uint4*>(&limbs)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
#if defined(MKRS_SM90)
  wait_for_previous();
  let_next_start();
#endif
  if (at.k - at.g * 8 >= w.in_features) return;

  TransposedWalk<BITS> walk(p, at, shared_address(ring));
  RawGroup groups[kAhead];
  T inputs[kAhead][M];
  const T* x = static_cast<const T*>(p.x);
  const auto fetch = [&](int row, int u) {
    groups[u] = walk.load_group_of(row);
    const T* from = x + min(row + at.lane, at.end - 1);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      inputs[u][m] = *from;
      from += m + 1 < p.m ? p.x_stride : 0;
    }
  };
#pragma unroll
  for (int i = 0; i < kTransposedStages - 1; ++i) {
    walk.ask();
    copy_async_commit();
  }
  float acc[4][4] = {};
  float sums[M] = {};
  int buffer = 0;
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (at.begin + u * kTransposedStep < at.end) fetch(at.begin + u * kTransposedStep, u);
  }
  for (int base = at.begin; base < at.end; base += kAhead * kTransposedStep) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int row = base + u * kTransposedStep;
      if (row >= at.end) break;
      {
        const bool inside = row + at.lane < at.end;
        const Group group = finish_group(w, groups[u]);
        const float shift = fmaf(group.scale, -group.zero, group.offset);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float input = to_float(inputs[u][m]);
          float rest = inside ? input * group.scale : 0.0f;
          sums[m] = inside ? fmaf(input, shift, sums[m]) : sums[m];
#pragma unroll
          for (int l = 0; l < kLimbs; ++l) {
            const __nv_bfloat16 limb = __float2bfloat16_rn(rest);
            limbs[buffer][l][m][at.lane] = __bfloat16_as_ushort(limb);
            rest -= __bfloat162float(limb);
          }
        }
      }
      copy_async_wait<kTransposedStages - 2>();
      __syncwarp();  // this step is there, and nobody reads the last one any more
      walk.ask();
      copy_async_commit();
      if (row + kAhead * kTransposedStep < at.end) fetch(row + kAhead * kTransposedStep, u);
      EightCodes<BITS> rows[8];
      walk.read(ring, rows);
      uint4 b[kLimbs];
#pragma unroll
      for (int l = 0; l < kLimbs; ++l) {
        b[l] = *reinterpret_cast<const uint4*>(&limbs[buffer][l][at.g][at.t * 8]);
      }
      buffer ^= 1;
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // products of 16 weight rows: 8t + 4j and the three below
        uint32_t low[8], high[8];
        pair_rows<BITS>(rows[4 * j], rows[4 * j + 1], low);
        pair_rows<BITS>(rows[4 * j + 2], rows[4 * j + 3], high);
#pragma unroll
        for (int l = 0; l < kLimbs; ++l) {
          const uint32_t b0 = j == 0 ? b[l].x : b[l].z;
          const uint32_t b1 = j == 0 ? b[l].y : b[l].w;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            mma(acc[i], low[2 * i], low[2 * i + 1], high[2 * i], high[2 * i + 1], b0, b1,
                __nv_bfloat16{});
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sums[m] += __shfl_xor_sync(~0u, sums[m], offset);
    }
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int m = 2 * at.t + c;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < M; ++i) {
      if (i == m) sum = sums[i];
    }
    float v[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = acc[i][c] + sum;
      v[2 * i + 1] = acc[i][2 + c] + sum;
    }
    if (m < p.m) store_partial(p, at, m, v);
  }
}

// Grid (tiles of K, splits of N). TILES: of 8 input rows. The warps of a block share its inputs.
template <typename T, int BITS, int TILES>
__global__ void __launch_bounds__(kThreads, transposed_blocks(8 * TILES))
    transposed_rounded_kernel(const TransposedParams p) {
  constexpr int kAhead = 2;  // steps of scales in registers
  const QuantizedWeight& w = p.w;
  const TransposedPlace at = transposed_place<BITS>(p);
  __shared__ __align__(16) float2 all_scales[kTransposedWarps][2][32];  // (factor, shift)
  __shared__ __align__(128) T inputs[kTransposedStages][TILES * 8][kTransposedStep];
  extern __shared__ __align__(128) unsigned char rings[];
  const unsigned char* ring = rings + at.warp * (kTransposedStages * kTransposedSlotBytes<BITS>);
  auto& scales = all_scales[at.warp];
#if defined(MKRS_SM90)
  wait_for_previous();
  let_next_start();
#endif
  // 16 bytes of a thread's are whole or none: rows of inputs are a multiple of eight long. Input
  // rows past the last are the last one again, and not stored.
  const int copy_row = threadIdx.x / 4;
  const T* source = static_cast<const T*>(p.x) + min(copy_row, p.m - 1) * p.x_stride + at.begin +
                    threadIdx.x % 4 * 8;
  const int source_end = at.end - threadIdx.x % 4 * 8;
  int copied = at.begin;  // rows of weights whose inputs are asked for
  int copy_stage = 0;
  const bool active = at.k - at.g * 8 < w.in_features;
  TransposedWalk<BITS> walk(p, at, shared_address(ring));
  const auto copy = [&] {
    if (active) walk.ask();
    if (copied < at.end && copy_row < TILES * 8) {
      const bool inside = copied < source_end;
      copy_async(shared_address(&inputs[copy_stage][copy_row][threadIdx.x % 4 * 8]),
                 reinterpret_cast<const char*>(inside ? source : static_cast<const T*>(p.x)), 16,
                 inside ? 16 : 0);
    }
    copy_async_commit();
    copied += kTransposedStep;
    source += kTransposedStep;
    copy_stage = (copy_stage + 1) % kTransposedStages;
  };
  RawGroup groups[kAhead];
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    if (active) groups[u] = walk.load_group_of(at.begin + u * kTransposedStep);
  }
#pragma unroll
  for (int i = 0; i < kTransposedStages - 1; ++i) copy();
  float acc[TILES][4][4] = {};
  int buffer = 0;
  int stage = 0;
  for (int base = at.begin; base < at.end; base += kAhead * kTransposedStep) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int row = base + u * kTransposedStep;
      if (row >= at.end) break;
      copy_async_wait<kTransposedStages - 2>();
      __syncthreads();  // this step's inputs are there, and nobody reads the last step's any more
      copy();
      if (active) {
        // Zeros where there is no row, so that zero inputs meet finite numbers.
        scales[buffer][at.lane] =
            row + at.lane < at.end ? element_scale<BITS>(w, groups[u]) : make_float2(0.0f, 0.0f);
        __syncwarp();
        const int next = row + kAhead * kTransposedStep;
        if (next < at.end) groups[u] = walk.load_group_of(next);
        EightCodes<BITS> rows[8];
        walk.read(ring, rows);
        const float2* shared_scales = &scales[buffer][at.t * 8];
        const T* b = &inputs[stage][at.g][at.t * 8];
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // products of 16 weight rows: 8t + 4j and the three below
          uint32_t a[4][4];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int first = 4 * j + 2 * h;
            const float4 scale = *reinterpret_cast<const float4*>(shared_scales + first);
            float low[8], high[8];
            rows[first].elements(low);
            rows[first + 1].elements(high);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              a[i / 2][2 * h + i % 2] =
                  pack_pair<T>(fmaf(low[i], scale.x, scale.y), fmaf(high[i], scale.z, scale.w));
            }
          }
#pragma unroll
          for (int tile = 0; tile < TILES; ++tile) {
            const uint2 v = *reinterpret_cast<const uint2*>(b + tile * 8 * kTransposedStep + 4 * j);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              mma(acc[tile][i], a[i][0], a[i][1], a[i][2], a[i][3], v.x, v.y, T{});
            }
          }
        }
      }
      buffer ^= 1;
      stage = (stage + 1) % kTransposedStages;
    }
  }
  if (!active) return;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int m = tile * 8 + 2 * at.t + c;
      float v[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[2 * i] = acc[tile][i][c];
        v[2 * i + 1] = acc[tile][i][2 + c];
      }
      if (m < p.m) store_partial(p, at, m, v);
    }
  }
}

// Calls f with the kernel of a plan.
template <typename F>
void dispatch_transposed(const TransposedPlan& plan, Float type, const F& f) {
  const int m = plan.params.m;
  const auto with_type = [&](auto element) {
    using T = decltype(element);
    dispatch_bits(plan.params.w.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      if (m <= kTransposedExact) {
        f(m == 1   ? transposed_exact_kernel<T, kBits, 1>
          : m == 2 ? transposed_exact_kernel<T, kBits, 2>
          : m <= 4 ? transposed_exact_kernel<T, kBits, 4>
                   : transposed_exact_kernel<T, kBits, 8>);
      } else {
        f(m <= 16   ? transposed_rounded_kernel<T, kBits, 2>
          : m <= 32 ? transposed_rounded_kernel<T, kBits, 4>
                    : transposed_rounded_kernel<T, kBits, 8>);
      }
    });
  };
  if (type == Float::F16) {
    with_type(__half{});
  } else {
    with_type(__nv_bfloat16{});
  }
}

}  // namespace

bool plan_transposed(const QuantizedWeight& w, const void* x, int64_t x_stride, Float type,
                     int64_t m, const DeviceInfo& info, TransposedPlan* plan) {
  const int64_t tiles = ceil_div(w.in_features, int64_t{kTransposedSpan} * kTransposedWarps);
  if (info.major < 8 || type == Float::F32 || !aligned(w.codes, 16) || w.codes_stride % 16 != 0 ||
      w.codes_stride <= 0 || (w.groups > 1 && w.group_size < kTransposedSpan) || m < 1 ||
      m > kTransposedMost || w.rows < 1 || w.rows >= (int64_t{1} << 30) || tiles < 1 ||
      tiles >= (int64_t{1} << 31)) {
    return false;
  }
  // Rounded weights multiply inputs that are loaded eight at a time.
  if (m > kTransposedExact && (w.rows % 8 != 0 || !aligned(x, 16) || x_stride % 8 != 0)) {
    return false;
  }
  // One wave of blocks, each with a few steps at least.
  const int64_t blocks = int64_t{info.multiprocessors} * transposed_blocks(static_cast<int>(m));
  const int64_t wanted = std::max<int64_t>(1, blocks / tiles);
  const int64_t steps = ceil_div(w.rows, int64_t{kTransposedStep});
  const int64_t split_steps =
      std::max<int64_t>(std::min<int64_t>(4, steps), ceil_div(steps, wanted));
  plan->overlapped = info.major >= 9;
  plan->tiles = static_cast<int>(tiles);
  plan->splits = static_cast<int>(ceil_div(steps, split_steps));
  plan->params = TransposedParams{w,
                                  x,
                                  x_stride,
                                  nullptr,
                                  group_shift(w),
                                  static_cast<int>(m),
                                  static_cast<int>(split_steps * kTransposedStep)};
  return plan->splits <= 65535;
}

void launch_transposed(const char* op, const TransposedPlan& plan, Float type,
                       cudaStream_t stream) {
  const dim3 grid(plan.tiles, plan.splits);
  dispatch_transposed(plan, type, [&](auto kernel) {
    const int bits = plan.params.w.bits;
    const int slot_bytes = bits == 8   ? kTransposedSlotBytes<8>
                           : bits == 4 ? kTransposedSlotBytes<4>
                                       : kTransposedSlotBytes<2>;
    const int shared_bytes = kTransposedWarps * kTransposedStages * slot_bytes;
    check_cuda(
        op, "asking for shared memory",
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
    if (plan.overlapped) {
      launch_overlapped(op, kernel, grid, kThreads, shared_bytes, dim3(1), stream, plan.params);
    } else {
      kernel<<<grid, kThreads, shared_bytes, stream>>>(plan.params);
      check_launch(op);
    }
  });
}

}  // namespace mkrs::cuda
