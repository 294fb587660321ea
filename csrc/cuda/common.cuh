// What every CUDA op shares: device and stream of a call, launch checks, element conversions and
// the parameters of a group. Host code uses LibTorch's stable ABI and the CUDA runtime only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "checks.h"

namespace mkrs::cuda {

// ---- host ---------------------------------------------------------------------------------------

inline void check_cuda(const char* op, const char* what, cudaError_t error) {
  MKRS_CHECK(error == cudaSuccess, op, what, " must succeed, got CUDA error ",
             static_cast<int>(error), " (", cudaGetErrorString(error), ")");
}

inline void check_launch(const char* op) {
  check_cuda(op, "the kernel launch", cudaGetLastError());
}

struct DeviceInfo {
  int multiprocessors;
  int shared_per_block;  // most dynamic shared memory a block may ask for
  int major;             // compute capability
};

// Attributes never change, so each device is asked once.
inline const DeviceInfo& device_info(const char* op, int device) {
  constexpr int kMaxDevices = 64;
  static std::atomic<const DeviceInfo*> cache[kMaxDevices] = {};
  MKRS_CHECK(device >= 0 && device < kMaxDevices, op, "the device index must be below ",
             kMaxDevices, ", got ", device);
  if (const DeviceInfo* known = cache[device].load(std::memory_order_acquire)) return *known;
  DeviceInfo info{};
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    check_cuda(op, "cudaDeviceGetAttribute", cudaDeviceGetAttribute(value, attribute, device));
  };
  read(&info.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(&info.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(&info.major, cudaDevAttrComputeCapabilityMajor);
  const DeviceInfo* expected = nullptr;
  const DeviceInfo* fresh = new DeviceInfo(info);
  // Losing the race leaks a few bytes once; the table is never freed.
  cache[device].compare_exchange_strong(expected, fresh, std::memory_order_acq_rel);
  return *cache[device].load(std::memory_order_acquire);
}

// Makes the tensor's device current for the scope and names torch's current stream on it.
class Scope {
 public:
  Scope(const char* op, const Tensor& on)
      : device_(index_of(op, on)), guard_(device_), info_(device_info(op, device_)) {
    void* stream = nullptr;
    MKRS_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, op,
               "torch's current CUDA stream must be available, got an error from torch");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
  const DeviceInfo& info() const { return info_; }
  int device() const { return device_; }

 private:
  static int index_of(const char* op, const Tensor& on) {
    MKRS_CHECK(on.is_cuda(), op,
               "all tensors must be on one CUDA device, got one on another device");
    return on.get_device_index();
  }
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  const DeviceInfo& info_;
  cudaStream_t stream_ = nullptr;
};

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Calls f with a value of the element type's C++ type.
template <typename F>
void dispatch_float(Float type, F&& f) {
  switch (type) {
    case Float::F32:
      f(float{});
      break;
    case Float::F16:
      f(__half{});
      break;
    case Float::BF16:
      f(__nv_bfloat16{});
      break;
  }
}

// Calls f with bits as a compile-time constant.
template <typename F>
void dispatch_bits(int bits, F&& f) {
  switch (bits) {
    case 8:
      f(std::integral_constant<int, 8>{});
      break;
    case 4:
      f(std::integral_constant<int, 4>{});
      break;
    default:
      f(std::integral_constant<int, 2>{});
      break;
  }
}

// Group of an element by a shift: every group size but "the whole row" is a power of two, and a row
// of one group has all its elements in group 0.
inline int group_shift(const QuantizedWeight& w) {
  if (w.groups <= 1) return 62;
  int shift = 0;
  while ((int64_t{1} << shift) < w.group_size) ++shift;
  return shift;
}

// ---- device -------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float half_bits_to_float(uint32_t bits, Float type) {
  return type == Float::BF16 ? __uint_as_float(bits << 16)
                             : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// An element of a scale or offset tensor, as it lies there; finish with raw_to_float.
__device__ __forceinline__ uint32_t load_raw(const void* data, int64_t i, Float type) {
  if (type == Float::F32) return __ldg(static_cast<const uint32_t*>(data) + i);
  return __ldg(static_cast<const unsigned short*>(data) + i);
}

__device__ __forceinline__ float raw_to_float(uint32_t raw, Float type) {
  return type == Float::F32 ? __uint_as_float(raw) : half_bits_to_float(raw, type);
}

__device__ __forceinline__ float load_float(const void* data, int64_t i, Float type) {
  return raw_to_float(load_raw(data, i, type), type);
}

// One formula for the three schemes: w = scale * (q - zero) + offset, where adding the offset -0.0
// of symmetric and asymmetric groups changes no value, not even the sign of a zero.
struct Group {
  float scale;
  float zero;
  float offset;
};

// A group's scale and zero as they lie in memory. Loading and converting are apart so that a thread
// can have many loads in flight before it waits for the first.
struct RawGroup {
  uint32_t scale;
  uint32_t zero;
};

__device__ __forceinline__ RawGroup load_group(const QuantizedWeight& w, int64_t row,
                                               int64_t group) {
  RawGroup g{load_raw(w.scale, row * w.scale_stride + group, w.scale_type), 0};
  if (w.scheme == Scheme::Affine) {
    g.zero = load_raw(w.zero, row * w.zero_stride + group, w.scale_type);
  } else if (w.scheme == Scheme::Asymmetric) {
    g.zero = __ldg(static_cast<const uint8_t*>(w.zero) + row * w.zero_stride + group);
  }
  return g;
}

__device__ __forceinline__ Group finish_group(const QuantizedWeight& w, const RawGroup& raw) {
  Group g{raw_to_float(raw.scale, w.scale_type), 0.0f, -0.0f};
  if (w.scheme == Scheme::Affine) {
    g.offset = raw_to_float(raw.zero, w.scale_type);
  } else {
    g.zero = w.scheme == Scheme::Symmetric ? static_cast<float>(1 << (w.bits - 1))
                                           : static_cast<float>(raw.zero);
  }
  return g;
}

// The format's arithmetic: a multiplication and an addition, each rounded, never contracted.
__device__ __forceinline__ float dequantize_code(int q, const Group& g) {
  return __fadd_rn(__fmul_rn(g.scale, static_cast<float>(q) - g.zero), g.offset);
}

}  // namespace mkrs::cuda
