// input [m, N] @ W -> [m, K].
//
// 16-bit inputs of up to 64 rows go to transposed.cu, many rows through weights dequantized into
// scratch once to the dense product (its floor). The kernel here serves the rest: f32 inputs, small
// groups, unaligned codes.
//
// Floor for few rows: codes and scales read once over the memory bandwidth. Each lane owns 16
// columns and walks down the rows with f32 sums, about 3 instructions a weight.
#include "dequantize_rows.cuh"
#include "rounded.cuh"
#include "sum_partials.cuh"
#include "transposed.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kColumns = 16;  // of a lane: never more than one group
constexpr int kTile = 32 * kColumns;
constexpr int kWarps = 8;
// Rows a lane has in flight; several input rows need the registers for their sums.
template <int M>
constexpr int kUnroll = M == 1 ? 8 : 4;
constexpr int kMostRows = 4;  // input rows of one pass
constexpr int kBlocksPerSm = 2;
// Above this many passes the dense route is faster (measured on an H100).
constexpr int kMostPasses = 2;
constexpr int kMostTransposedPasses = 1;

// A lane's codes as elements (rounded.cuh). Their bias is of the codes' own size and taken away in
// the end, except for f32 inputs: there it would show where a zero term cancels scale * q.
template <int BITS>
struct Lane {
  static constexpr int kWords = BITS / 2;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const uint8_t* p, bool vector, int bytes) {
    if (vector) {
      if constexpr (BITS == 8) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      } else if constexpr (BITS == 4) {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
        words[0] = v.x, words[1] = v.y;
      } else {
        words[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i) {
      if (i < bytes) words[i / 4] |= static_cast<uint32_t>(__ldg(p + i)) << (i % 4 * 8);
    }
  }

  __device__ __forceinline__ void elements(float (&v)[kColumns]) const {
    code_elements<BITS>(words, v);
  }
};

struct Params {
  QuantizedWeight w;
  const void* x;  // [m, N]
  int64_t x_stride;
  float* partial;  // [gridDim.y, m, K]
  int shift;
  int64_t split_rows;
  bool aligned;
};

// Grid (column tiles, row splits); the warps of a block take every kWarps-th row of its split.
template <typename T, int BITS, int M>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm) matmul_t_kernel(const Params p) {
  constexpr int kRows = kUnroll<M>;
  constexpr bool kPlain = std::is_same_v<T, float>;
  const QuantizedWeight& w = p.w;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kTile + lane * kColumns;
  const int64_t begin = blockIdx.y * p.split_rows;
  const int64_t end = min(w.rows, begin + p.split_rows);
  float acc[M][kColumns] = {};
  float shifts[M] = {};
  if (k < w.in_features) {
    const int64_t group = k >> p.shift;
    const int bytes =
        static_cast<int>((min(static_cast<int64_t>(kColumns), w.in_features - k) * BITS + 7) / 8);
    const bool vector = p.aligned && bytes == 2 * BITS;
    const T* x = static_cast<const T*>(p.x);
    for (int64_t row = begin + warp; row < end; row += kWarps * kRows) {
      Lane<BITS> codes[kRows];
      RawGroup groups[kRows];
      T inputs[kRows][M];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int64_t n = row + u * kWarps;
        const int64_t safe = n < end ? n : row;
        codes[u].load(w.codes + safe * w.codes_stride + k * BITS / 8, vector, bytes);
        groups[u] = load_group(w, safe, group);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          inputs[u][m] = x[m * p.x_stride + safe];
        }
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (row + u * kWarps >= end) break;
        float v[kColumns];
        codes[u].elements(v);
        if constexpr (kPlain) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) v[i] -= kElementBias<BITS> / kElementFactor<BITS>;
        }
        const Group g = finish_group(w, groups[u]);
        const float bias = kPlain ? 0.0f : kElementBias<BITS>;
        const float shift = fmaf(g.scale, -(bias + g.zero), g.offset);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float input = to_float(inputs[u][m]);
          const float scaled = input * g.scale * kElementFactor<BITS>;
          shifts[m] = fmaf(input, shift, shifts[m]);
#pragma unroll
          for (int i = 0; i < kColumns; ++i) acc[m][i] = fmaf(scaled, v[i], acc[m][i]);
        }
      }
    }
  }
  __shared__ float sums[kWarps][kTile];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (m > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < kColumns; i += 4) {
      *reinterpret_cast<float4*>(&sums[warp][lane * kColumns + i]) =
          make_float4(acc[m][i] + shifts[m], acc[m][i + 1] + shifts[m], acc[m][i + 2] + shifts[m],
                      acc[m][i + 3] + shifts[m]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += kWarps * 32) {
      const int64_t column = static_cast<int64_t>(blockIdx.x) * kTile + i;
      if (column >= w.in_features) break;
      float value = 0.0f;
#pragma unroll
      for (int s = 0; s < kWarps; ++s) value += sums[s][i];
      p.partial[(static_cast<int64_t>(blockIdx.y) * M + m) * w.in_features + column] = value;
    }
  }
}

template <typename T, int BITS>
void launch(const Params& p, int64_t m, dim3 grid, cudaStream_t stream) {
  const auto run = [&](auto kernel) { kernel<<<grid, kWarps * 32, 0, stream>>>(p); };
  if (m == 1) {
    run(matmul_t_kernel<T, BITS, 1>);
  } else if (m == 2) {
    run(matmul_t_kernel<T, BITS, 2>);
  } else if (m == 3) {
    run(matmul_t_kernel<T, BITS, 3>);
  } else {
    run(matmul_t_kernel<T, BITS, 4>);
  }
}

void run_pass(const char* op, const QuantizedWeight& w, const void* x, int64_t x_stride, Float type,
              int64_t m, void* out, const Scope& scope, const Tensor& like) {
  const int64_t tiles = ceil_div(w.in_features, kTile);
  MKRS_CHECK(tiles < (int64_t{1} << 31), op, "in_features must fit one CUDA grid, got ",
             w.in_features);
  // One wave of blocks.
  const int64_t wanted = int64_t{scope.info().multiprocessors} * kBlocksPerSm / tiles;
  const int64_t split_rows =
      std::max<int64_t>(kWarps * kUnroll<1>, ceil_div(w.rows, std::max<int64_t>(1, wanted)));
  const int64_t splits = ceil_div(w.rows, split_rows);
  Tensor partial = empty_on(like, {splits, m, w.in_features}, ScalarType::Float);
  const int64_t lane_bytes = 2 * w.bits;
  const Params p{w,
                 x,
                 x_stride,
                 static_cast<float*>(partial.mutable_data_ptr()),
                 group_shift(w),
                 split_rows,
                 aligned(w.codes, lane_bytes) && w.codes_stride % lane_bytes == 0};
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  dispatch_float(type, [&](auto element) {
    dispatch_bits(w.bits, [&](auto bits) {
      launch<decltype(element), decltype(bits)::value>(p, m, grid, scope.stream());
    });
  });
  check_launch(op);
  launch_sum_partials(op, p.partial, splits, m, w.in_features, nullptr, out, type, scope.stream());
}

// In passes over tensor cores; false where the weight or the input is not one they take.
bool run_transposed(const char* op, const QuantizedWeight& w, const Tensor& input, Float type,
                    const Scope& scope, Tensor& result) {
  const int64_t m = rows_of(input);
  const int64_t rows = kTransposedMost;
  if (ceil_div(m, rows) > kMostTransposedPasses) return false;
  for (int64_t first = 0; first < m; first += rows) {
    const int64_t count = std::min(rows, m - first);
    const char* x = static_cast<const char*>(input.const_data_ptr()) +
                    first * row_stride(input) * float_size(type);
    TransposedPlan plan;
    if (!plan_transposed(w, x, row_stride(input), type, count, scope.info(), &plan)) return false;
    Tensor partial = empty_on(input, {plan.splits, count, w.in_features}, ScalarType::Float);
    plan.params.partial = static_cast<float*>(partial.mutable_data_ptr());
    launch_transposed(op, plan, type, scope.stream());
    launch_sum_partials(
        op, plan.params.partial, plan.splits, count, w.in_features, nullptr,
        static_cast<char*>(result.mutable_data_ptr()) + first * w.in_features * float_size(type),
        type, scope.stream());
  }
  return true;
}

Tensor dequant_matmul_t(const Tensor& input, const Tensor& codes, const Tensor& scale,
                        const std::optional<Tensor>& zero_point,
                        const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                        int64_t in_features) {
  const char* op = "dequant_matmul_t";
  const Float type = check_matmul_input(op, input, codes);
  const Scope scope(op, input);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  MKRS_CHECK(input.size(input.dim() - 1) == w.rows, op, "input must have N = ", w.rows,
             " as its last size, got shape ", shape_string(input));

  const int64_t m = rows_of(input);
  const Tensor flat = has_uniform_rows(input) ? input : torch::stable::contiguous(input);
  Tensor result = empty_on(input, sizes_with_last(input, in_features), input.scalar_type());
  if (m == 0 || in_features == 0) return result;
  if (w.rows > 0 && run_transposed(op, w, flat, type, scope, result)) return result;
  if (ceil_div(m, kMostRows) > kMostPasses && w.rows > 0) {
    Tensor scratch = empty_on(input, {w.rows, in_features}, input.scalar_type());
    launch_dequantize_rows(op, w, RowIndex{}, w.rows, scratch.mutable_data_ptr(), type,
                           scope.stream());
    return torch::stable::matmul(flat, scratch);
  }
  for (int64_t first = 0; first < m; first += kMostRows) {
    const int64_t rows = std::min<int64_t>(kMostRows, m - first);
    void* out =
        static_cast<char*>(result.mutable_data_ptr()) + first * in_features * float_size(type);
    const void* x = static_cast<const char*>(flat.const_data_ptr()) +
                    first * row_stride(flat) * float_size(type);
    if (w.rows == 0) {  // an empty sum
      launch_sum_partials(op, nullptr, 0, rows, in_features, nullptr, out, type, scope.stream());
    } else {
      run_pass(op, w, x, row_stride(flat), type, rows, out, scope, input);
    }
  }
  return result;
}

}  // namespace
}  // namespace mkrs::cuda

STABLE_TORCH_LIBRARY_IMPL(mkrs, CUDA, m) {
  m.impl("dequant_matmul_t", TORCH_BOX(&mkrs::cuda::dequant_matmul_t));
}
