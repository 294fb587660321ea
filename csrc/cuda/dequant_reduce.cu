// Floor: codes and scales read once over the memory bandwidth.
#include <cmath>

#include "common.cuh"

namespace mkrs::cuda {
namespace {

enum class Reduction : int { Sum, SumSquares, Amax, Amin, AbsMax };

Reduction check_reduction(const char* op, const std::string& name) {
  if (name == "sum") return Reduction::Sum;
  if (name == "sum_squares") return Reduction::SumSquares;
  if (name == "amax") return Reduction::Amax;
  if (name == "amin") return Reduction::Amin;
  if (name == "abs_max") return Reduction::AbsMax;
  fail(op, "reduction must be 'sum', 'sum_squares', 'amax', 'amin' or 'abs_max', got '", name, "'");
}

// NaN wins, as in torch's reductions.
__device__ __forceinline__ float larger(float a, float b) {
  return a != a || a > b ? a : b;
}

template <Reduction KIND>
struct Accumulator;

// Sums accumulate in f64: rows may be long, and the sums stand in for dense ones.
template <>
struct Accumulator<Reduction::Sum> {
  using Value = double;
  static __device__ Value identity() {
    return 0.0;
  }
  static __device__ Value combine(Value a, Value b) {
    return a + b;
  }
};
template <>
struct Accumulator<Reduction::SumSquares> : Accumulator<Reduction::Sum> {};
template <>
struct Accumulator<Reduction::Amax> {
  using Value = float;
  static __device__ Value identity() {
    return -INFINITY;
  }
  static __device__ Value combine(Value a, Value b) {
    return larger(a, b);
  }
};
template <>
struct Accumulator<Reduction::Amin> {
  using Value = float;
  static __device__ Value identity() {
    return INFINITY;
  }
  static __device__ Value combine(Value a, Value b) {
    return -larger(-a, -b);
  }
};
template <>
struct Accumulator<Reduction::AbsMax> : Accumulator<Reduction::Amax> {
  static __device__ Value identity() {
    return 0.0f;
  }
};

constexpr int kStep = 8;  // elements a thread takes at a time

// One row a block of blockDim.x threads (a power of two, 32 to 1024).
template <int BITS, Reduction KIND>
__global__ void reduce_kernel(QuantizedWeight w, int shift, bool words, float* out) {
  using A = Accumulator<KIND>;
  using Value = typename A::Value;
  const int64_t row = blockIdx.x;
  const uint8_t* codes = w.codes + row * w.codes_stride;
  Value total = A::identity();
  for (int64_t k = static_cast<int64_t>(threadIdx.x) * kStep; k < w.in_features;
       k += static_cast<int64_t>(blockDim.x) * kStep) {
    const int length = static_cast<int>(min(static_cast<int64_t>(kStep), w.in_features - k));
    constexpr int kBytes = kStep * BITS / 8;
    const uint8_t* p = codes + k * BITS / 8;
    uint64_t bits = 0;
    if (words && length == kStep) {
      if constexpr (BITS == 8) bits = __ldg(reinterpret_cast<const unsigned long long*>(p));
      if constexpr (BITS == 4) bits = __ldg(reinterpret_cast<const uint32_t*>(p));
      if constexpr (BITS == 2) bits = __ldg(reinterpret_cast<const unsigned short*>(p));
    } else {
      const int bytes = (length * BITS + 7) / 8;
      for (int i = 0; i < kBytes; ++i) {
        if (i < bytes) bits |= static_cast<uint64_t>(p[i]) << (8 * i);
      }
    }
    const Group g = finish_group(w, load_group(w, row, k >> shift));
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (i >= length) break;
      const float v = dequantize_code(static_cast<int>(bits >> (i * BITS)) & ((1 << BITS) - 1), g);
      if constexpr (KIND == Reduction::Sum) {
        total += v;
      } else if constexpr (KIND == Reduction::SumSquares) {
        total += static_cast<double>(v) * v;
      } else if constexpr (KIND == Reduction::AbsMax) {
        total = A::combine(total, fabsf(v));
      } else {
        total = A::combine(total, v);
      }
    }
  }
  __shared__ Value partial[32];
  for (int offset = 16; offset > 0; offset /= 2) {
    total = A::combine(total, __shfl_xor_sync(~0u, total, offset));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned i = 1; i < blockDim.x / 32; ++i) total = A::combine(total, partial[i]);
    out[row] = static_cast<float>(total);
  }
}

template <int BITS>
void launch(const QuantizedWeight& w, Reduction kind, float* out, cudaStream_t stream) {
  int threads = 32;
  while (threads < 1024 && static_cast<int64_t>(threads) * kStep * 4 < w.in_features) threads *= 2;
  const bool words = aligned(w.codes, BITS) && w.codes_stride % BITS == 0;
  const auto run = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(w.rows), threads, 0, stream>>>(w, group_shift(w), words, out);
  };
  switch (kind) {
    case Reduction::Sum:
      return run(reduce_kernel<BITS, Reduction::Sum>);
    case Reduction::SumSquares:
      return run(reduce_kernel<BITS, Reduction::SumSquares>);
    case Reduction::Amax:
      return run(reduce_kernel<BITS, Reduction::Amax>);
    case Reduction::Amin:
      return run(reduce_kernel<BITS, Reduction::Amin>);
    case Reduction::AbsMax:
      return run(reduce_kernel<BITS, Reduction::AbsMax>);
  }
}

Tensor dequant_reduce(const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                      int64_t bits, int64_t group_size, int64_t in_features,
                      const std::string& reduction) {
  const char* op = "dequant_reduce";
  const Scope scope(op, codes);
  const Reduction kind = check_reduction(op, reduction);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const QuantizedWeight& w = weight.view;
  const bool is_sum = kind == Reduction::Sum || kind == Reduction::SumSquares;
  MKRS_CHECK(is_sum || in_features > 0, op, reduction, " needs in_features of at least 1, got 0");
  MKRS_CHECK(w.rows < (int64_t{1} << 31), op, "the weight must have fewer than 2**31 rows, got ",
             w.rows);
  std::vector<int64_t> sizes = sizes_with_last(codes, 0);
  sizes.pop_back();
  Tensor result = empty_on(codes, sizes, ScalarType::Float);
  if (w.rows == 0) return result;
  float* out = static_cast<float*>(result.mutable_data_ptr());
  dispatch_bits(w.bits, [&](auto bits) {
    launch<decltype(bits)::value>(w, kind, out, scope.stream());
  });
  check_launch(op);
  return result;
}

}  // namespace
}  // namespace mkrs::cuda

STABLE_TORCH_LIBRARY_IMPL(mkrs, CUDA, m) {
  m.impl("dequant_reduce", TORCH_BOX(&mkrs::cuda::dequant_reduce));
}
