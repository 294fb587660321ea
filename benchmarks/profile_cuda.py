"""One call of each CUDA kernel that matters, to be run under Nsight Compute.

ncu --section SpeedOfLight --section SchedulerStats \\
  --metrics regex:smsp__average_warps_issue_stalled_.*_per_issue_active.ratio \\
  --metrics smsp__inst_executed.sum,launch__registers_per_thread \\
  -k regex:'stream_kernel|transposed_|fused_kernel|quantize_half' \\
  python -m benchmarks.profile_cuda
"""

import torch

from .compare_cuda import random_weight


def main() -> None:
    """Run them once each, on N=14336 K=4096."""
    n, k = 14336, 4096
    weights = {bits: random_weight(n, k, bits) for bits in (8, 4, 2)}
    dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    for m, bits in ((1, 4), (16, 4), (64, 4), (512, 4), (1, 2), (1, 8)):
        weights[bits].matmul(torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
    for m in (1, 16, 64):
        weights[4].matmul_t(torch.randn(m, n, device="cuda", dtype=torch.bfloat16))
    torch.ops.mkrs.quantize(dense, 4, 64, "affine")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
