"""One small call of every kernel, to be run under compute-sanitizer (``make sanitize-cuda``)."""

import torch

from mergekit_torch import ops
from mergekit_torch.ops.gguf_unpack import GGUF_LAYOUTS, gguf_unpack


def main() -> None:
    """Run every op over shapes with ragged edges; the sanitizer is the judge."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    for bits in (8, 4, 2):
        for group_size in (16, 32, 64):
            weight = torch.randn(85, 328, device=device)
            codes, scale, offset = torch.ops.mkrs.quantize(weight, bits, group_size, "affine", None)
            parts = (codes, scale, None, offset)
            shape = {"bits": bits, "group_size": group_size, "in_features": 328}
            ops.dequantize(*parts, **shape, dtype=torch.float16)
            ops.dequant_embedding(torch.tensor([84, 0], device=device), *parts, **shape)
            for reduction in ("sum", "abs_max"):
                ops.dequant_reduce(*parts, **shape, reduction=reduction)
            for m in (1, 5, 16, 70):
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(m, 328, device=device, dtype=dtype)
                    ops.dequant_matmul(x, *parts, bits=bits, group_size=group_size)
            for m in (1, 4, 8, 16, 64):
                y = torch.randn(m, 85, device=device, dtype=torch.float16)
                ops.dequant_matmul_t(y, *parts, **shape)
    # More tiles than blocks, aligned rows: the copy engine and the asynchronous copies.
    weight = torch.randn(4500, 512, device=device)
    codes, scale, offset = torch.ops.mkrs.quantize(weight, 4, 64, "affine", None)
    for m in (1, 12, 70, 200):
        x = torch.randn(m, 512, device=device, dtype=torch.bfloat16)
        ops.dequant_matmul(x, codes, scale, None, offset, bits=4, group_size=64)
    for m in (2, 12, 20, 64):
        y = torch.randn(m, 4500, device=device, dtype=torch.bfloat16)[:, :4496]
        parts = (codes[:4496], scale[:4496], None, offset[:4496])
        ops.dequant_matmul_t(y.contiguous(), *parts, bits=4, group_size=64, in_features=512)
    for number, layout in GGUF_LAYOUTS.items():
        for start in (0, 1, 4):  # aligned or not, adjacent or strided rows
            size = 9 * layout.block_bytes
            wide = torch.randint(0, 256, (start + 7 * (size + start),), device=device).byte()
            blocks = wide[start:].view(7, size + start)[:, :size]
            gguf_unpack(blocks, number, 7, 9 * layout.block)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
