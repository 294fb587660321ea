#include "decode_kernel.cuh"

namespace mkrs::cuda {

void launch_decode_bf16(const char* op, const DecodePlan& plan, cudaStream_t stream) {
  launch_decode<__nv_bfloat16>(op, plan, stream);
}

}  // namespace mkrs::cuda
