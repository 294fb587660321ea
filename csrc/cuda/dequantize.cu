// Floor: codes, scales and the output each moved once over the memory bandwidth; at 4 bits and a
// 16-bit output that is 2.6 bytes an element, four fifths of it the output.
#include "dequantize_rows.cuh"

namespace mkrs::cuda {
namespace {

constexpr int kVector = 8;  // elements of one thread's step: 16 bytes of a 16-bit output
constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // rows a thread has in flight

template <int BITS>
struct Codes {  // kVector codes as words
  uint32_t words[BITS == 8 ? 2 : 1];
  __device__ __forceinline__ int get(int i) const {
    return static_cast<int>(words[i * BITS / 32] >> (i * BITS % 32)) & ((1 << BITS) - 1);
  }
};

template <int BITS>
__device__ __forceinline__ Codes<BITS> load_codes(const uint8_t* p) {
  Codes<BITS> c;
  if constexpr (BITS == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
    c.words[0] = v.x;
    c.words[1] = v.y;
  } else if constexpr (BITS == 4) {
    c.words[0] = __ldg(reinterpret_cast<const uint32_t*>(p));
  } else {
    c.words[0] = __ldg(reinterpret_cast<const unsigned short*>(p));
  }
  return c;
}

template <int BITS>
__device__ __forceinline__ Codes<BITS> load_code_bytes(const uint8_t* p, int bytes) {
  Codes<BITS> c{};
  for (int i = 0; i < bytes; ++i) c.words[i / 4] |= static_cast<uint32_t>(p[i]) << (i % 4 * 8);
  return c;
}

__device__ __forceinline__ void store_vector(float* out, const float* v) {
  reinterpret_cast<float4*>(out)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(out)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T>
__device__ __forceinline__ void store_vector(T* out, const float* v) {
  union {
    T t[kVector];
    uint4 u;
  } packed;
#pragma unroll
  for (int i = 0; i < kVector; ++i) packed.t[i] = from_float<T>(v[i]);
  *reinterpret_cast<uint4*>(out) = packed.u;
}

// A block covers blockDim.y * kUnroll rows by blockDim.x * kVector columns. FAST: every row of
// codes and output is aligned for vector access and in_features is a multiple of kVector.
template <typename T, int BITS, bool FAST>
__global__ void __launch_bounds__(kThreads)
    dequantize_rows_kernel(QuantizedWeight w, int shift, RowIndex index, int64_t count, T* out) {
  const int64_t k = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVector;
  if (k >= w.in_features) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kUnroll + threadIdx.y;
  Codes<BITS> codes[kUnroll];
  RawGroup groups[kUnroll];
  const int length = static_cast<int>(min(static_cast<int64_t>(kVector), w.in_features - k));
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * blockDim.y;
    if (i >= count) break;
    int64_t row = i;
    if (index.data != nullptr) {
      row = index.is_int64 ? static_cast<const int64_t*>(index.data)[i]
                           : static_cast<const int32_t*>(index.data)[i];
      if (row < 0 || row >= w.rows) {
        if (k == 0) {
          printf("mkrs::dequant_embedding: indices must be in [0, %lld), got %lld\n",
                 static_cast<long long>(w.rows), static_cast<long long>(row));
        }
        __trap();  // as torch's own indexing kernels do: an error of the stream, not a wrong read
      }
    }
    const uint8_t* p = w.codes + row * w.codes_stride + k * BITS / 8;
    codes[u] = FAST ? load_codes<BITS>(p) : load_code_bytes<BITS>(p, (length * BITS + 7) / 8);
    groups[u] = load_group(w, row, k >> shift);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * blockDim.y;
    if (i >= count) break;
    const Group group = finish_group(w, groups[u]);
    float v[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[j] = dequantize_code(codes[u].get(j), group);
    T* target = out + i * w.in_features + k;
    if constexpr (FAST) {
      store_vector(target, v);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (j < length) target[j] = from_float<T>(v[j]);
      }
    }
  }
}

}  // namespace

void launch_dequantize_rows(const char* op, const QuantizedWeight& w, const RowIndex& index,
                            int64_t count, void* out, Float type, cudaStream_t stream) {
  if (count == 0 || w.in_features == 0) return;
  const int64_t vectors = ceil_div(w.in_features, kVector);
  int width = 32;
  while (width < kThreads && width < vectors) width *= 2;
  const dim3 block(width, kThreads / width);
  const int64_t row_blocks = ceil_div(count, static_cast<int64_t>(block.y) * kUnroll);
  const int64_t column_blocks = ceil_div(vectors, width);
  MKRS_CHECK(column_blocks <= 65535 && row_blocks < (int64_t{1} << 31), op,
             "the weight must have fewer rows and columns for one CUDA grid, got ", count, " x ",
             w.in_features);
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(column_blocks));
  const bool fast = w.in_features % kVector == 0 && aligned(w.codes, w.bits) &&
                    w.codes_stride % w.bits == 0 && aligned(out, 16);
  const int shift = group_shift(w);
  dispatch_float(type, [&](auto element) {
    using T = decltype(element);
    dispatch_bits(w.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      const auto kernel =
          fast ? dequantize_rows_kernel<T, kBits, true> : dequantize_rows_kernel<T, kBits, false>;
      kernel<<<grid, block, 0, stream>>>(w, shift, index, count, static_cast<T*>(out));
    });
  });
  check_launch(op);
}

namespace {

Tensor dequantize(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                  const std::optional<Tensor>& offset, int64_t bits, int64_t group_size,
                  int64_t in_features, ScalarType dtype) {
  const char* op = "dequantize";
  const Scope scope(op, codes);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const Float type = check_float(op, "dtype", dtype);
  Tensor result = empty_on(codes, sizes_with_last(codes, in_features), dtype);
  launch_dequantize_rows(op, weight.view, RowIndex{}, weight.view.rows, result.mutable_data_ptr(),
                         type, scope.stream());
  return result;
}

void dequantize_into(const Tensor& codes, const Tensor& scale,
                     const std::optional<Tensor>& zero_point, const std::optional<Tensor>& offset,
                     int64_t bits, int64_t group_size, int64_t in_features, Tensor out) {
  const char* op = "dequantize_into";
  const Scope scope(op, codes);
  const WeightArgs weight =
      check_weight(op, codes, scale, zero_point, offset, bits, group_size, in_features);
  const Float type = check_out(op, out, codes, in_features);
  launch_dequantize_rows(op, weight.view, RowIndex{}, weight.view.rows, out.mutable_data_ptr(),
                         type, scope.stream());
}

}  // namespace
}  // namespace mkrs::cuda

STABLE_TORCH_LIBRARY_IMPL(mkrs, CUDA, m) {
  m.impl("dequantize", TORCH_BOX(&mkrs::cuda::dequantize));
  m.impl("dequantize_into", TORCH_BOX(&mkrs::cuda::dequantize_into));
}
