#include "stream_kernel.cuh"

namespace mkrs::cuda {

void launch_stream_f16(const char* op, const StreamPlan& plan, cudaStream_t stream) {
  launch_stream<__half>(op, plan, stream);
}

}  // namespace mkrs::cuda
