"""Tokens merged on the GPU: one program per new token and block of features; its members are listed by a sort."""

# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined
from tersor.kernels.merge_tokens import check_range


def merge_tokens(x: Tensor, size: Tensor, place: Tensor, num_tokens: int) -> tuple[Tensor, Tensor] | Declined:
    if x.dtype == torch.float64 or size.dtype == torch.float64:
        return Declined("float64")
    check_range(place, num_tokens)
    batch, dim = len(x), x.shape[2:].numel()
    y = x.new_empty(batch, num_tokens, *x.shape[2:])
    total = x.new_empty(batch, num_tokens, dtype=torch.float32)
    if total.numel():
        # the members of place j of row b are member[b, start[b, j] : start[b, j + 1]], in the order of the sequence
        place, member = place.long().contiguous().sort(stable=True)
        start = torch.searchsorted(place, torch.arange(num_tokens + 1, device=x.device).repeat(batch, 1))
        block = min(triton.next_power_of_2(max(dim, 1)), 1024)
        with torch.cuda.device_of(x):
            grid = (total.numel(), triton.cdiv(max(dim, 1), block))
            _merge[grid](
                x.contiguous(), size.float().contiguous(), member, start, y, total, x.shape[1], num_tokens, dim, block
            )
    return y, total


@triton.jit
def _merge(x, size, member, start, y, total, num_tokens, num_places, dim, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, place = at // num_places, at % num_places
    begin = tl.load(start + row * (num_places + 1) + place)
    end = tl.load(start + row * (num_places + 1) + place + 1)
    x += row * num_tokens * dim
    size += row * num_tokens
    member += row * num_tokens
    sum = 0.0
    for i in range(begin, end):
        sum += tl.load(size + tl.load(member + i))
    merged = tl.zeros((BLOCK,), tl.float32)
    if sum != 0:
        base = tl.load(x + tl.load(member + begin) * dim + c, mask=c < dim, other=0.0).to(tl.float32)
        merged = base
        for i in range(begin + 1, end):
            token = tl.load(member + i)
            value = tl.load(x + token * dim + c, mask=c < dim, other=0.0).to(tl.float32)
            merged += tl.load(size + token) / sum * (value - base)
    tl.store(y + at * dim + c, merged.to(y.dtype.element_ty), mask=c < dim)
    if tl.program_id(1) == 0:
        tl.store(total + at, sum)
