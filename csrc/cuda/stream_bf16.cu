#include "stream_kernel.cuh"

namespace mkrs::cuda {

void launch_stream_bf16(const char* op, const StreamPlan& plan, cudaStream_t stream) {
  launch_stream<__nv_bfloat16>(op, plan, stream);
}

}  // namespace mkrs::cuda
