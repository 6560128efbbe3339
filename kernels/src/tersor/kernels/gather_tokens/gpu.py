"""Tokens picked on the GPU: one thread per element."""

# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.gather_tokens import check_range

_BLOCK = 1024
# an element is copied as an integer of its size; two of 8 bytes for complex128
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    check_range(x, index)
    y = x.new_empty(*index.shape, *x.shape[2:])
    if y.numel():
        unit = _UNITS.get(x.element_size(), torch.int64)
        source, target = x.contiguous().view(-1).view(unit), y.view(-1).view(unit)
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(target.numel(), _BLOCK),)
            dim = target.numel() // index.numel()
            _gather[grid](source, index.contiguous(), target, x.shape[1], index.shape[1], dim, target.numel(), _BLOCK)
    return y


@triton.jit
def _gather(x, index, y, num_tokens, k, dim, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    row = at // dim
    token = row // k * num_tokens + tl.load(index + row, mask=inside, other=0)
    tl.store(y + at, tl.load(x + token * dim + at % dim, mask=inside), mask=inside)
