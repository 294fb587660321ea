#include "fused_kernel.cuh"

namespace mkrs::cuda {

bool run_fused_bf16(const char* op, const MatmulCall& call, const DeviceInfo& info,
                    const Tensor& like, cudaStream_t stream) {
  return run_fused<__nv_bfloat16>(op, call, info, like, stream);
}

}  // namespace mkrs::cuda
