// Hopper's asynchronous building blocks (sm_90): barriers in shared memory, bulk tensor copies and
// launches that overlap with the end of the kernel before.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace mkrs::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MKRS_SM90 1
#endif

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}

// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  uint32_t done = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// The box of `map` at (inner, outer) to shared memory; elements outside the tensor become zeros.
__device__ __forceinline__ void copy_box(uint32_t shared, const CUtensorMap* map, int inner,
                                         int outer, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(inner), "r"(outer), "r"(barrier)
      : "memory");
}

// The same box into L2 only.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int inner, int outer) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];\n" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(inner), "r"(outer)
               : "memory");
}

// In a kernel launched with launch_overlapped: waits until the kernels before it on the stream are
// complete and their writes visible. Nothing that they may touch is read or written earlier.
__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
}

// From here on the next kernel's blocks may start (and wait) beside this one's.
__device__ __forceinline__ void let_next_start() {
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
}

// The 32 bytes at an address to L2 only.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p));
}

// ---- clusters

__device__ __forceinline__ float read_cluster_float(uint32_t local, int rank) {
  uint32_t remote;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(remote) : "memory");
  return value;
}

__device__ __forceinline__ void cluster_barrier() {
  __syncwarp();  // the instruction wants whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::
                   : "memory");
}

// ---- host ---------------------------------------------------------------------------------------

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled(const char* op) {
  static const EncodeTiled function = [&] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check_cuda(op, "finding cuTensorMapEncodeTiled",
               cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                cudaEnableDefault, &found));
    MKRS_CHECK(found == cudaDriverEntryPointSuccess, op,
               "the driver must have cuTensorMapEncodeTiled, got query result ",
               static_cast<int>(found));
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

inline CUtensorMap tensor_map(const char* op, CUtensorMapDataType type, const void* data,
                              int64_t inner, int64_t outer, int64_t stride_bytes, int box_inner,
                              int box_outer, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(inner), static_cast<cuuint64_t>(outer)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_inner),
                             static_cast<cuuint32_t>(box_outer)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode_tiled(op)(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  MKRS_CHECK(result == CUDA_SUCCESS, op, "cuTensorMapEncodeTiled must succeed, got CUDA error ",
             static_cast<int>(result));
  return map;
}

// Clusters of `splits` blocks that a device runs at once, at one block a multiprocessor.
template <typename Kernel>
int most_clusters(const char* op, Kernel kernel, int splits, int threads, int shared_bytes,
                  int multiprocessors) {
  if (splits <= 2) return multiprocessors / splits;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(multiprocessors / splits, splits);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 1;
  attribute.val.clusterDim.y = splits;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check_cuda(op, "cudaOccupancyMaxActiveClusters",
             cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  return std::max(1, std::min(clusters, multiprocessors / splits));
}

// Launches a kernel that calls wait_for_previous.
template <typename... Params, typename... Args>
void launch_overlapped(const char* op, void (*kernel)(Params...), dim3 grid, dim3 threads,
                       int shared_bytes, dim3 cluster, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster.x;
  attributes[1].val.clusterDim.y = cluster.y;
  attributes[1].val.clusterDim.z = cluster.z;
  config.attrs = attributes;
  config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 2 : 1;
  check_cuda(op, "the kernel launch", cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace mkrs::cuda
