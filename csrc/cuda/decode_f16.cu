#include "decode_kernel.cuh"

namespace mkrs::cuda {

void launch_decode_f16(const char* op, const DecodePlan& plan, cudaStream_t stream) {
  launch_decode<__half>(op, plan, stream);
}

}  // namespace mkrs::cuda
