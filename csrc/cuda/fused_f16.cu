#include "fused_kernel.cuh"

namespace mkrs::cuda {

bool run_fused_f16(const char* op, const MatmulCall& call, const DeviceInfo& info,
                   cudaStream_t stream) {
  return run_fused<__half>(op, call, info, stream);
}

}  // namespace mkrs::cuda
