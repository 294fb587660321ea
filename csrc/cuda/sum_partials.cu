#include "sum_partials.cuh"

#include "hopper.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kColumns = 32;
constexpr int kSlices = 8;

// blockDim is (kColumns, slices): slices share the splits of WIDTH outputs a thread, so that many
// partial sums are in flight even for a short output.
template <typename T, int WIDTH>
__global__ void sum_partials_kernel(const float* partial, int64_t splits, int64_t total, int64_t n,
                                    const T* bias, T* out) {
#if defined(MKRS_SM90)
  wait_for_previous();
  let_next_start();
#endif
  __shared__ float sums[kSlices][kColumns][WIDTH];
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x) * WIDTH;
  float value[WIDTH] = {};
  if (i < total) {
#pragma unroll 8
    for (int64_t s = threadIdx.y; s < splits; s += blockDim.y) {
      if constexpr (WIDTH == 4) {
        const float4 v = *reinterpret_cast<const float4*>(partial + s * total + i);
        value[0] += v.x, value[1] += v.y, value[2] += v.z, value[3] += v.w;
      } else {
        value[0] += partial[s * total + i];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) sums[threadIdx.y][threadIdx.x][j] = value[j];
  __syncthreads();
  if (threadIdx.y != 0 || i >= total) return;
  for (unsigned s = 1; s < blockDim.y; ++s) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) value[j] += sums[s][threadIdx.x][j];
  }
#pragma unroll
  for (int j = 0; j < WIDTH; ++j) {
    if (bias != nullptr) value[j] += to_float(bias[(i + j) % n]);
    out[i + j] = from_float<T>(value[j]);
  }
}

constexpr int kThreads = 256;

// Few splits: a thread an output.
template <typename T>
__global__ void sum_few_kernel(const float* partial, int64_t splits, int64_t total, int64_t n,
                               const T* bias, T* out) {
#if defined(MKRS_SM90)
  wait_for_previous();
  let_next_start();
#endif
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  float value = 0.0f;
#pragma unroll 4
  for (int64_t s = 0; s < splits; ++s) value += partial[s * total + i];
  if (bias != nullptr) value += to_float(bias[i % n]);
  out[i] = from_float<T>(value);
}

}  // namespace

void launch_sum_partials(const char* op, const float* partial, int64_t splits, int64_t m, int64_t n,
                         const void* bias, void* out, Float type, cudaStream_t stream) {
  const int64_t total = m * n;
  if (total == 0) return;
  const bool few = splits < 8;
  // Four outputs a thread where that still leaves a block for each multiprocessor.
  const bool wide = total % 4 == 0 && total >= 4 * kColumns * 128;
  const int64_t blocks = ceil_div(total, few ? kThreads : wide ? 4 * kColumns : kColumns);
  MKRS_CHECK(blocks < (int64_t{1} << 31), op, "the output must fit one CUDA grid, got ", total,
             " elements");
  int device = 0;
  check_cuda(op, "cudaGetDevice", cudaGetDevice(&device));
  const bool overlapped = device_info(op, device).major >= 9;
  dispatch_float(type, [&](auto element) {
    using T = decltype(element);
    const auto kernel = few    ? sum_few_kernel<T>
                        : wide ? sum_partials_kernel<T, 4>
                               : sum_partials_kernel<T, 1>;
    const dim3 block = few ? dim3(kThreads) : dim3(kColumns, kSlices);
    if (overlapped) {
      launch_overlapped(op, kernel, dim3(static_cast<unsigned>(blocks)), block, 0, dim3(1), stream,
                        partial, splits, total, n, static_cast<const T*>(bias),
                        static_cast<T*>(out));
    } else {
      kernel<<<static_cast<unsigned>(blocks), block, 0, stream>>>(
          partial, splits, total, n, static_cast<const T*>(bias), static_cast<T*>(out));
      check_launch(op);
    }
  });
}

}  // namespace mkrs::cuda
