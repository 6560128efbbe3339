"""The largest scores on the GPU: one program per row finds the k-th largest bit by bit."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined
from tersor.kernels.topk_mask import check_range


def topk_mask(scores: Tensor, k: Tensor) -> Tensor | Declined:
    if scores.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Declined(f"scores are {scores.dtype}")
    check_range(scores, k)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel():
        n = scores.shape[-1]
        k = k.to(scores.device).long().expand(scores.shape[:-1]).flatten().contiguous()
        with torch.cuda.device_of(scores):
            block = min(triton.next_power_of_2(n), 4096)
            _mask[(len(k),)](scores.float().contiguous(), k, mask.view(torch.uint8), n, block)
    return mask


@triton.jit
def _keys(scores, i, n):
    """Integers in the order of the floats; both zeros are equal, NaN is the largest."""
    bits = tl.load(scores + i, mask=i < n, other=0.0).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits >= 0, magnitude, -magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFF, key)


@triton.jit
def _mask(scores, k, mask, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * n
    mask += row * n
    k = tl.load(k + row)
    # the largest number that k keys reach: the k-th largest of them
    smallest = tl.full((), -(2**31), tl.int64)
    for bit in range(32):
        candidate = smallest + (tl.full((), 2**31, tl.int64) >> bit)
        count = tl.full((), 0, tl.int64)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            count += tl.sum(((_keys(scores, i, n) >= candidate) & (i < n)).to(tl.int64))
        smallest = tl.where(count >= k, candidate, smallest)
    larger = tl.full((), 0, tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        larger += tl.sum(((_keys(scores, i, n) > smallest) & (i < n)).to(tl.int64))
    equal = tl.full((), 0, tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = _keys(scores, i, n)
        ties = ((key == smallest) & (i < n)).to(tl.int64)
        taken = (key > smallest) | ((ties > 0) & (equal + tl.cumsum(ties, 0) <= k - larger))
        tl.store(mask + i, taken.to(tl.uint8), mask=i < n)
        equal += tl.sum(ties)
