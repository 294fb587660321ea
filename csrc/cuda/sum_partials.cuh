// The second step of products whose sum is split over blocks.
#pragma once

#include "common.cuh"

namespace mkrs::cuda {

// out[m, n] = sum over splits of partial[split, m, n] + bias[n], always in the same order.
void launch_sum_partials(const char* op, const float* partial, int64_t splits, int64_t m, int64_t n,
                         const void* bias, void* out, Float type, cudaStream_t stream);

}  // namespace mkrs::cuda
