"""Activations rounded on the GPU: a program for each group."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined
from tersor.kernels.quantize_per_token import num_groups

_MOST = 2**16  # elements that a program holds
ROUNDER = tl.constexpr(1.5 * 2**23)


def quantize_per_token(
    x: Tensor, bits: int = 8, group_size: int | None = None, clip: float = 1.0
) -> tuple[Tensor, Tensor] | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    size = group_size or x.shape[-1]
    if size > _MOST:
        return Declined(f"groups of more than {_MOST} channels")
    scale = x.new_ones(*x.shape[:-1], num_groups(x.shape[-1], group_size), dtype=torch.float32)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel():
        top = 2 ** (bits - 1) - 1
        with torch.cuda.device_of(x):
            _round[(scale.numel(),)](x.contiguous(), codes, scale, size, clip, float(top), triton.next_power_of_2(size))
    return codes, scale


@triton.jit
def _round(x, codes, scale, size, clip, top, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    values = tl.load(x + group * size + i, mask=i < size, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    is_nan = tl.max((values != values).to(tl.int32), 0) > 0
    divisor = tl.div_rn(clip * largest, top)
    divisor = tl.where(divisor == 0, 1.0, divisor)
    tl.store(scale + group, tl.where(is_nan, float("nan"), divisor))
    code = tl.div_rn(values, tl.zeros((BLOCK,), tl.float32) + divisor)
    # the sum has no bits left for a fraction, and ties go to even
    code = (tl.minimum(tl.maximum(code, -top), top) + ROUNDER) - ROUNDER
    tl.store(codes + group * size + i, code.to(tl.int8), mask=i < size)
