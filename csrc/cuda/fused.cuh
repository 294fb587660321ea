// dequant_matmul for many input rows on Hopper: see fused_kernel.cuh.
#pragma once

#include "decode.cuh"

namespace mkrs::cuda {

// False when a shape or an alignment is not one the kernel takes; nothing has been launched then.
// `like` is a tensor on the call's device.
bool run_fused_f16(const char* op, const MatmulCall& call, const DeviceInfo& info,
                   const Tensor& like, cudaStream_t stream);
bool run_fused_bf16(const char* op, const MatmulCall& call, const DeviceInfo& info,
                    const Tensor& like, cudaStream_t stream);

}  // namespace mkrs::cuda
