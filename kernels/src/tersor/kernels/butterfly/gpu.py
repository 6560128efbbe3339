"""Butterflies on the GPU: one program keeps a block in registers through all stages, which are of one shape."""

# pyright: reportArgumentType=false, reportCallIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.butterfly import shuffled
from tersor.kernels.dispatch import Declined

# the largest block in one program's registers
_MAX_STAGES = 14


def butterfly(x: Tensor, angles: Tensor, transpose: bool = False) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    stages = len(angles)
    if stages > _MAX_STAGES:
        return Declined(f"{stages} stages, {_MAX_STAGES} at most")
    if stages == 0 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    x = x.contiguous()
    y = torch.empty_like(x)
    cos, sin = shuffled(angles.float())
    with torch.cuda.device_of(x):
        warps = 4 if stages <= 10 else 8 if stages <= 12 else 16
        _transform[(x.numel() >> stages,)](
            x, y, cos, sin, len(cos), stages, 2 ** (stages - 1), transpose, num_warps=warps
        )
    return y


@triton.jit
def _transform(x, y, cos, sin, num_blocks, stages, HALF: tl.constexpr, TRANSPOSE: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    angles = block % num_blocks * stages * HALF + tl.arange(0, HALF)
    at = block * (2 * HALF) + tl.arange(0, 2 * HALF)
    z = tl.load(x + at).to(tl.float32)
    for i in range(stages):
        k = stages - 1 - i if TRANSPOSE else i
        c, s = tl.load(cos + angles + k * HALF), tl.load(sin + angles + k * HALF)
        if TRANSPOSE:
            a, b = tl.split(tl.permute(tl.reshape(z, (2, HALF)), (1, 0)))
            z = tl.reshape(tl.join(c * a + s * b, c * b - s * a), (2 * HALF,))
        else:
            a, b = tl.split(tl.reshape(z, (HALF, 2)))
            z = tl.reshape(tl.permute(tl.join(c * a - s * b, s * a + c * b), (1, 0)), (2 * HALF,))
    tl.store(y + at, z.to(y.dtype.element_ty))
