"""Weighted sums on the GPU: one thread per element."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined
from tersor.kernels.weighted_sum import matrices

_BLOCK = 1024


def weighted_sum(weights: Tensor, history: Sequence[Tensor]) -> Tensor | Declined:
    newest = history[0]
    if newest.dtype == torch.float64:
        return Declined("float64")
    total = torch.empty(newest.shape, dtype=newest.dtype, device=newest.device)
    if total.numel():
        weights, columns, by_column = matrices(weights.float(), newest.shape)
        features = tuple(feature.contiguous() for feature in history)
        n = total.numel()
        with torch.cuda.device_of(newest):
            _sum[(triton.cdiv(n, _BLOCK),)](
                weights.contiguous(), features, total, n, weights.shape[1], columns, by_column, len(history), _BLOCK
            )
    return total


@triton.jit
def _sum(
    weights, history, total, n, num_weights, columns, BY_COLUMN: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = at % columns if BY_COLUMN else at // columns
    sum = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        weight = tl.load(weights + j * num_weights + which, mask=at < n, other=0.0)
        sum += weight * tl.load(history[j] + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(total + at, sum.to(total.dtype.element_ty), mask=at < n)
