#include "fused_kernel.cuh"

namespace mkrs::cuda {

bool run_fused_f16(const char* op, const MatmulCall& call, const DeviceInfo& info,
                   const Tensor& like, cudaStream_t stream) {
  return run_fused<__half>(op, call, info, like, stream);
}

}  // namespace mkrs::cuda
